"""DINOv2 (2304.07193v2) and its registers (2309.16588v2): a ViT that learned without any text.

What differs from the ViT of model.py, block by block:

                              CLIP's ViT          DINOv2
    norm ahead of the blocks  yes                 no
    bias of the patches       no                  yes
    each residual term        as computed         times a learned vector λ (layer scale, 2103.17239v2)
    feed-forward              W_down act(W_up x)  the same, or SwiGLU in the giant tower
    extra tokens              class               class, and perhaps R registers that no loss reads
    its objective             a text              self-distillation and masked patches; neither stands here

    symbol   shape     here        meaning
    λ_1, λ_2 (Di,)     scale1, 2   layer scale of the attention and of the feed-forward
    r        (R, Di)   registers   tokens without a position, between the class token and the patches

    (O1)  x ← x + λ_1 ⊙ Attn(LN x);   x ← x + λ_2 ⊙ FFN(LN x)
    (O2)  FFN(x) = W_down( SiLU(W_gate x) ⊙ W_up x )       with swiglu=True
    (O3)  z = [class; r_1 …; r_R; patches], the positions added before r comes in
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import EncoderBlock, ViT, ViTConfig


@dataclass(frozen=True)
class DINOv2Config(ViTConfig):
    act: str = "gelu"
    norm_eps: float = 1e-6
    pre_norm: bool = False
    patch_bias: bool = True
    swiglu: bool = False        # a gated feed-forward; `hidden` is its width
    registers: int = 0          # R

    @property
    def first(self) -> int:
        return 1 + self.registers


class DINOv2Block(EncoderBlock):
    def __init__(self, c: DINOv2Config):
        super().__init__(c.width, c.heads, c.hidden, c.act, c.norm_eps)
        self.gate = nn.Linear(c.width, c.hidden) if c.swiglu else None
        self.scale1, self.scale2 = (nn.Parameter(torch.ones(c.width)) for _ in range(2))

    def mlp(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return super().mlp(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))                     # (O2)

    def forward(self, x: Tensor, causal: bool = False, bias: Tensor | None = None) -> Tensor:
        x = x + self.scale1 * self.attention(self.norm1(x), causal, bias)       # (O1)
        return x + self.scale2 * self.mlp(self.norm2(x))                        # (O1)


class DINOv2(ViT):
    """pixels (B, 3, S, S) → tokens (B, 1 + R + patches, Di); the pooled vector is the normed class token."""
    family = "dinov2"

    def __init__(self, config: DINOv2Config):
        super().__init__(config)
        shape = config.registers, config.width
        self.antialias = config.registers > 0   # of resized positions, in the published towers
        self.registers = nn.Parameter(torch.randn(shape) * config.width**-0.5) if config.registers else None

    def block(self, c: DINOv2Config) -> DINOv2Block:
        return DINOv2Block(c)

    def embed(self, pixels: Tensor) -> Tensor:
        x = super().embed(pixels)
        if self.registers is None:
            return x
        r = self.registers.expand(len(x), -1, -1)                               # (B, R, Di)
        return torch.cat((x[:, :1], r, x[:, 1:]), dim=1)                        # (O3)
