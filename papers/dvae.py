"""The dVAE of DALL-E (2102.12092v2, §2.1): a distribution over codes in each cell, relaxed by Gumbel noise.

The first of DALL-E's two stages (papers/dalle.py is the second). Where VQ-VAE takes the nearest code
(papers/vq.py), the encoder here gives logits over the K codes, and a Gumbel-softmax of a falling temperature
stands for a draw from them; so the lower bound (A1) has a gradient in the encoder. Document 3 says that the
re-parameterisation fails for discrete codes and leaves out that this is one.

    symbol   shape              here          meaning
    x        (B, 3, S, S)       map_pixels    (1 − 2ε) x + ε, ε = 0.1: the logit of a pixel stays finite
    l        (B, K, s, s)       logits        of q(code | x), independent from cell to cell
    z        (B, K, s, s)       relaxed       softmax((l + g) / τ), g = −ln(−ln u): one-hot as τ → 0
    μ, ln b  (B, 3, S, S) × 2   painter(z)    of a Laplace distribution of the logit of each pixel

    (A1)  ln p(x, y) ≥ E_q[ ln p(x | y, z) ] − β KL( q(y, z | x) ‖ p(y, z) )           the paper's Eq. 1
    (A2)  z = softmax((l + g) / τ),  τ from 1 to 1/16
    (A3)  −ln p(x) = ln 2b x(1 − x) + |logit x − μ| / b                                the paper's Eq. 2
    (A4)  L = (Σ −ln p(x) + β Σ_cells KL(q ‖ uniform)) / 3S²,  β from 0 to 6.6 (a weight of β / 192 per cell)
    (A5)  block(x) = x + 1/L² conv₄(relu conv₃(relu conv₂(relu conv₁(relu x)))),  L blocks in all

Codes for the second stage are argmax l, without noise; a picture is sigmoid(μ), mapped back. There is no norm
anywhere: the factor of (A5) keeps the sum of L blocks small. Inside a block the width is a quarter; of its
four convolutions the last is 1 × 1 in the encoder and the first in the painter. Published are these two
networks alone; (A2) to (A4) are written from the paper. The toy has β small enough to use its codes; it reads
and writes patches of 4 pixels, as papers/vq.py does.                    python train.py --recipe dvae
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.picture_task import PictureTask
from papers.recipe import Ingredients, Numbers, Recipe

EPSILON = 0.1                   # ε of the logit-Laplace distribution


@dataclass(frozen=True)
class DVAEConfig:
    """The defaults are the published ones: 256 pixels, 32 × 32 codes."""
    hidden: int = 256           # width of the group at the picture's own side; it doubles with every group
    groups: int = 4             # all but the last halve the side
    blocks: int = 2             # of a group
    codes: int = 8192           # K
    narrow: int = 128           # width of the painter's first convolution
    patch: int = 1              # pixels of a side that the first convolution reads and the last one writes
    kernel: int = 7             # of the first convolution


TOY = DVAEConfig(hidden=96, groups=1, blocks=1, codes=256, narrow=96, patch=4, kernel=1)


class DVAEBlock(nn.Module):
    def __init__(self, width: int, out: int, layers: int, kernels: tuple[int, ...]):
        super().__init__()
        inner = out // 4
        widths = (width, inner, inner, inner, out)
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, k, padding=k // 2)
                                   for a, b, k in zip(widths, widths[1:], kernels))
        self.gain = 1 / layers**2

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs:
            y = conv(F.relu(y))
        return self.skip(x) + self.gain * y                                     # (A5)


def make_groups(c: DVAEConfig, first: int, widths: list[int], kernels: tuple[int, ...]) -> nn.ModuleList:
    ends = [first, *widths]
    return nn.ModuleList(nn.Sequential(*(DVAEBlock(a if n == 0 else b, b, c.groups * c.blocks, kernels)
                                         for n in range(c.blocks))) for a, b in zip(ends, widths))


class DVAE(nn.Module):
    """A picture to codes and back; `painter` is None in files that hold the encoder alone."""

    def __init__(self, config: DVAEConfig, paints: bool = True):
        super().__init__()
        c, pixels = config, 3 * config.patch**2
        self.config = config
        widths = [c.hidden * 2**n for n in range(c.groups)]
        self.encoder = nn.ModuleDict({
            "first": nn.Conv2d(pixels, c.hidden, c.kernel, padding=c.kernel // 2),
            "groups": make_groups(c, c.hidden, widths, (3, 3, 3, 1)),
            "last": nn.Conv2d(widths[-1], c.codes, 1)})
        self.painter = nn.ModuleDict({
            "first": nn.Conv2d(c.codes, c.narrow, 1),
            "groups": make_groups(c, c.narrow, widths[::-1], (1, 3, 3, 3)),
            "last": nn.Conv2d(c.hidden, 2 * pixels, 1)}) if paints else None

    @property
    def codes(self) -> range:
        return range(self.config.codes)

    def logits(self, mapped: Tensor) -> Tensor:
        """Mapped pixels (B, 3, S, S) → l (B, K, s, s)."""
        x = self.encoder["first"](F.pixel_unshuffle(mapped, self.config.patch))
        for n, group in enumerate(self.encoder["groups"]):
            x = group(x if n == 0 else F.max_pool2d(x, 2))
        return self.encoder["last"](F.relu(x))

    def paint(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, K, s, s), each cell a mixture of codes → μ and ln b, (B, 3, S, S) each."""
        x = self.painter["first"](z)
        for n, group in enumerate(self.painter["groups"]):
            x = group(x if n == 0 else F.interpolate(x, scale_factor=2.0))
        return F.pixel_shuffle(self.painter["last"](F.relu(x)), self.config.patch).chunk(2, dim=1)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) in 0 … 1 → (B, s·s) int64, row by row."""
        return self.logits(map_pixels(pixels)).argmax(1).flatten(1)

    def decode(self, ids: Tensor) -> Tensor:
        """(B, s·s) int64 → (B, 3, S, S) in 0 … 1: the median of (A3)."""
        side = math.isqrt(ids.shape[1])
        z = F.one_hot(ids.unflatten(1, (side, side)), self.config.codes).movedim(-1, 1)
        mean, _ = self.paint(z.to(self.painter["first"].weight))
        return ((mean.sigmoid() - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


def map_pixels(pixels: Tensor) -> Tensor:
    return (1 - 2 * EPSILON) * pixels + EPSILON


def logit_laplace(mapped: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """−ln p of every value."""
    return (log_scale + (2 * mapped * (1 - mapped)).log()
            + (mapped.logit() - mean).abs() * (-log_scale).exp())               # (A3)


def kl_from_uniform(logits: Tensor) -> Tensor:
    """(B, K, s, s) → (B, s, s): KL(q ‖ uniform) = ln K − entropy of q."""
    log_q = logits.log_softmax(1)
    return math.log(logits.shape[1]) + (log_q.exp() * log_q).sum(1)


def gumbel_softmax(logits: Tensor, temperature: float) -> Tensor:
    noise = -torch.empty_like(logits).exponential_().log()                      # g
    return ((logits + noise) / temperature).softmax(1)                          # (A2)


# The paper's column as we remember its appendix.
RECIPES = {"dvae": Recipe(
    "DALL-E stage 1 (2102.12092v2 §2.1): a discrete VAE of pictures learns", "250M pairs",
    Numbers(1e-4, 512, 3_000_000, 0, weight_decay=1e-4, beta2=0.999),
    Numbers(3e-3, 16, 900, weight_decay=0.0), trained=("encoder", "painter"), task="dvae")}


class DVAETask(PictureTask):
    """Recipe `dvae`: (A4). Temperature and β reach their ends after three quarters of the steps."""
    beta, coldest = 0.05, 1 / 16                        # β: the paper's is 6.6, over 1,024 cells

    def __init__(self, given: Ingredients):
        super().__init__(given, DVAE(TOY))

    def progress(self, tokens: Tensor) -> float:
        return min(1.0, int(tokens[0]) / self.given.batch / (0.75 * self.given.steps))

    def loss(self, pixels: Tensor, tokens: Tensor, **_) -> Tensor:
        done, mapped = self.progress(tokens), map_pixels(pixels)
        logits = self.module.logits(mapped)
        mean, log_scale = self.module.paint(gumbel_softmax(logits.float(), self.coldest**done))
        lost = logit_laplace(mapped, mean.float(), log_scale.float()).sum()
        kl = kl_from_uniform(logits.float()).sum()
        return (lost + done * self.beta * kl) / pixels.numel()                  # (A4)


TASKS = {"dvae": DVAETask}
