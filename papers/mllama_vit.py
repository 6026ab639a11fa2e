"""Llama 3.2 Vision's tower (Llama 3, 2407.21783v3, §7; code: transformers' mllama): the tiles of an image in
one sequence.

The bridge that reads it stands in papers/mllama.py; pictures become tiles in support/formats/pictures.py.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import EncoderBlock, ViTConfig, visible_to_bias


@dataclass
class Tiles:
    """Images cut into squares: stand in for the pixels of a VLM, and for the features that a TiledViT makes
    of them."""
    pixels: Tensor      # (ΣM, tiles, 3, S, S), as features (ΣM, tiles, N, Di); zeros where a tile is absent
    aspect: Tensor      # (ΣM,) int64: which arrangement of tiles, from 1 (aspect_ratio_ids)
    mask: Tensor        # (ΣM, tiles) bool: True = a tile

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows) -> Tiles:
        return Tiles(self.pixels[rows], self.aspect[rows], self.mask[rows])

    def to(self, device) -> Tiles:
        return Tiles(self.pixels.to(device), self.aspect.to(device), self.mask.to(device))


@dataclass(frozen=True)
class TiledViTConfig(ViTConfig):
    """Defaults: those of transformers' configuration class (the released files say 560 pixels)."""
    image_size: int = 448       # S of one tile
    patch: int = 14
    width: int = 7680           # Di, what a bridge reads: inner · (1 + number of taps)
    layers: int = 32            # local blocks
    heads: int = 16
    hidden: int = 5120
    act: str = "gelu"
    inner: int = 1280           # width of the blocks
    global_layers: int = 8      # gated blocks after them
    taps: tuple[int, ...] = (3, 7, 15, 23, 30)      # local blocks, from 0, whose outputs are features too
    tiles: int = 4              # most tiles of an image
    aspects: int = 8            # arrangements of tiles, counted from 1

    def __post_init__(self):
        super().__post_init__()
        inside = all(0 <= i < self.layers for i in self.taps)
        if self.width != self.inner * (1 + len(self.taps)) or not inside:
            raise ValueError(f"features of width {self.width} are not {self.inner} times one more than the "
                             f"{len(self.taps)} tapped blocks {list(self.taps)}, or one of these is not "
                             f"among the {self.layers}.")


class GatedEncoderBlock(EncoderBlock):
    """An EncoderBlock without biases in its attention, whose two terms are multiplied by tanh of a gate."""

    def __init__(self, width: int, heads: int, hidden: int, act: str, eps: float):
        super().__init__(width, heads, hidden, act, eps, attention_bias="")
        self.attention_gate, self.mlp_gate = (nn.Parameter(torch.full((1,), math.pi / 4)) for _ in range(2))

    def forward(self, x: Tensor, causal: bool = False, bias: Tensor | None = None) -> Tensor:
        x = x + self.attention_gate.tanh() * self.attention(self.norm1(x), causal, bias)
        return x + self.mlp_gate.tanh() * self.mlp(self.norm2(x))


class TiledViT(nn.Module):
    """Mllama's vision tower (Llama 3, 2407.21783v3, §7): the tiles of an image in one sequence.

                         ViT                     TiledViT
        an image         one square              up to `tiles` squares, and their arrangement (aspect)
        positions p      one table               (1 − tanh g) p + tanh g · p[aspect, tile]
        a tile's place   –                       tanh g' · e'[aspect, tile] on patches, tanh g" · e" after
        padding          –                       zeros behind each tile, to a multiple of 8 tokens
        mask             none                    padding and absent tiles do not see each other
        attention        biases                  no biases
        blocks           L                       L, post_norm, then `global_layers` with two tanh gates each
        ε of the norms   norm_eps                norm_eps in the blocks, 1e-5 in pre_norm and post_norm
        features         one hidden state        the last one, then those after the blocks `taps`, by channel
    """

    def __init__(self, config: TiledViTConfig):
        super().__init__()
        c = self.config = config
        sizes = c.inner, c.heads, c.hidden, c.act, c.norm_eps

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * c.inner**-0.5)

        self.patch = nn.Conv2d(3, c.inner, c.patch, stride=c.patch, bias=False)
        self.cls, self.positions = table(c.inner), table(c.tokens, c.inner)                            # p
        self.tile_positions = table(c.aspects + 1, c.tiles * c.tokens * c.inner)        # p[aspect, tile]
        self.before, self.after = (table(c.aspects + 1, c.tiles * c.inner) for _ in range(2))   # e', e"
        self.gate, self.before_gate, self.after_gate = (
            nn.Parameter(torch.zeros(1)) for _ in range(3))                     # g, g', g"
        self.pre_norm, self.post_norm = nn.LayerNorm(c.inner, eps=1e-5), nn.LayerNorm(c.inner, eps=1e-5)
        self.blocks = nn.ModuleList(EncoderBlock(*sizes, attention_bias="") for _ in range(c.layers))
        self.global_blocks = nn.ModuleList(GatedEncoderBlock(*sizes) for _ in range(c.global_layers))

    def forward(self, images: Tiles) -> Tensor:
        """(ΣM, tiles, 3, S, S) → (ΣM, tiles, N, Di), absent tiles too; class tokens stand at index 0."""
        c, gate, zeros = self.config, self.gate.tanh(), -self.config.tokens % 8

        def of(table: Tensor) -> Tensor:
            """The rows of each image's arrangement: (ΣM, tiles, 1 or N, inner)."""
            return table[images.aspect].unflatten(1, (c.tiles, -1, c.inner))

        x = self.patch(images.pixels.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (-1, c.tiles))
        x = x + self.before_gate.tanh() * of(self.before)                       # (ΣM, tiles, N−1, inner)
        x = torch.cat((self.cls.expand(*x.shape[:2], 1, -1), x), dim=2)
        x = self.pre_norm(x + (1 - gate) * self.positions + gate * of(self.tile_positions))
        x = F.pad(x, (0, 0, 0, zeros)).flatten(1, 2)                            # (ΣM, tiles·N', inner)
        real = F.pad(images.mask.bool()[..., None].expand(-1, -1, c.tokens), (0, zeros)).flatten(1)
        visible = real[:, None, :, None] | real[:, None, None]                  # (ΣM, 1, tiles·N', tiles·N')
        bias = visible_to_bias(visible, x.dtype)
        taps = {}
        for i, block in enumerate(self.blocks):
            x = block(x, bias=bias)
            if i in c.taps:
                taps[i] = x
        x = self.post_norm(x).unflatten(1, (c.tiles, -1))
        x = (x + self.after_gate.tanh() * of(self.after)).flatten(1, 2)
        for block in self.global_blocks:
            x = block(x, bias=bias)
        x = torch.cat((x, torch.stack([taps[i] for i in c.taps], -1).flatten(2)), dim=-1)
        return x.unflatten(1, (c.tiles, -1))[:, :, :c.tokens]                           # (ΣM, tiles, N, Di)

    def features(self, pixels: Tiles, layer: int = -1, cls: bool = True) -> Tiles:
        """What a bridge reads: the features of every tile, with the aspect and the mask they belong to."""
        c = self.config
        if layer != -1 or not cls:
            raise ValueError("a tower of tiles is read with reads=-1, reads_cls=True, "
                             f"not {layer} and {cls}.")
        shape = (c.tiles, 3, c.image_size, c.image_size)
        if isinstance(pixels, Tensor) and not len(pixels):              # of a text without pictures
            aspect = torch.zeros(0, dtype=torch.long, device=pixels.device)
            pixels = Tiles(pixels.new_zeros(0, *shape), aspect, aspect.new_zeros(0, c.tiles))
        if not isinstance(pixels, Tiles) or pixels.pixels.shape[1:] != shape:
            got = type(pixels).__name__
            if isinstance(pixels, Tiles):
                got = f"Tiles of shape {tuple(pixels.pixels.shape)}"
            raise ValueError(f"this tower reads Tiles of shape (images, {', '.join(map(str, shape))}), "
                             f"not {got}; make them with Tiles(*tile_pixels(images, …)).")
        return Tiles(self(pixels), pixels.aspect, pixels.mask)
