"""The two convolutional networks of VQ-GAN (2012.09841v3, appendix A), which papers/vq.py puts codes between.

Each level has residual blocks of one width. The encoder halves the side behind every level but the last, the
painter doubles it again. In the middle, at the smallest side, all cells attend to all.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from model import attend

conv3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
conv1 = functools.partial(nn.Conv2d, kernel_size=1)


@dataclass(frozen=True)
class VQConfig:
    """The defaults are VQ-GAN's f = 16 on 256 pixels, without its attention at 16 × 16."""
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)      # a level has channels · multiplier
    blocks: int = 2             # residual blocks of a level; the decoder has one more
    groups: int = 32            # of GroupNorm
    latent: int = 256           # channels that the encoder gives
    patch: int = 0              # not 0: no such networks, but one linear map of patches of that side
    width: int = 256            # E
    codes: int = 1024           # K
    beta: float = 0.25


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm x))))); a 1 × 1 convolution where the width changes."""

    def __init__(self, width: int, out: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(groups, n, eps=1e-6) for n in (width, out))
        self.conv1, self.conv2 = conv3(width, out), conv3(out, out)
        self.skip = conv1(width, out) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class GridAttention(nn.Module):
    """One head over all cells of the grid."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.o = (conv1(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # (B, 1, N, C)
        return x + self.o(attend(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


def middle(width: int, groups: int) -> nn.Sequential:
    return nn.Sequential(ResBlock(width, width, groups), GridAttention(width, groups),
                         ResBlock(width, width, groups))


class Encoder(nn.Module):
    """(B, 3, S, S) → (B, latent, s, s). Halving pads on the right and below alone."""

    def __init__(self, c: VQConfig):
        super().__init__()
        widths = [c.channels, *(c.channels * m for m in c.multipliers)]
        self.first = conv3(3, c.channels)
        self.levels = nn.ModuleList(
            nn.Sequential(*(ResBlock(a if n == 0 else b, b, c.groups) for n in range(c.blocks)))
            for a, b in zip(widths, widths[1:]))
        self.downsample = nn.ModuleList(nn.Conv2d(w, w, 3, stride=2) for w in widths[1:-1])
        self.middle, self.norm = middle(widths[-1], c.groups), nn.GroupNorm(c.groups, widths[-1], eps=1e-6)
        self.last = conv3(widths[-1], c.latent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for n, level in enumerate(self.levels):
            x = level(x)
            if n < len(self.downsample):
                x = self.downsample[n](F.pad(x, (0, 1, 0, 1)))
        return self.last(F.silu(self.norm(self.middle(x))))


class Painter(nn.Module):
    """(B, latent, s, s) → (B, 3, S, S): the decoder. Doubling repeats each cell, then convolves."""

    def __init__(self, c: VQConfig):
        super().__init__()
        widths = [c.channels * m for m in reversed(c.multipliers)]
        self.first, self.middle = conv3(c.latent, widths[0]), middle(widths[0], c.groups)
        self.levels = nn.ModuleList(
            nn.Sequential(*(ResBlock(a if n == 0 else b, b, c.groups) for n in range(c.blocks + 1)))
            for a, b in zip([widths[0], *widths], widths))
        self.upsample = nn.ModuleList(conv3(w, w) for w in widths[:-1])
        self.norm, self.last = nn.GroupNorm(c.groups, widths[-1], eps=1e-6), conv3(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x))
        for n, level in enumerate(self.levels):
            x = level(x)
            if n < len(self.upsample):
                x = self.upsample[n](F.interpolate(x, scale_factor=2.0))
        return self.last(F.silu(self.norm(x)))


class PatchEncoder(nn.Module):
    """(B, 3, S, S) → (B, latent, S/p, S/p): a rotation of the 3p² numbers of each patch, at first."""

    def __init__(self, c: VQConfig):
        super().__init__()
        self.patch, self.map = c.patch, conv1(3 * c.patch**2, c.latent)
        nn.init.orthogonal_(self.map.weight.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.map(F.pixel_unshuffle(x, self.patch))


class PatchPainter(nn.Module):
    """(B, latent, s, s) → (B, 3, p·s, p·s)."""

    def __init__(self, c: VQConfig):
        super().__init__()
        self.patch, self.map = c.patch, conv1(c.latent, 3 * c.patch**2)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.map(x), self.patch)
