"""BLIP-2's image tower (2301.12597v3, §4.1; code: LAVIS, transformers' blip_2): EVA-CLIP's ViT-g, headless.

It is trained with a class token and without a norm ahead of its blocks. Its last block was dropped, because
the one before gives better features. The Q-Former in bridges.py reads all of its tokens.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model import ViT, ViTConfig


@dataclass(frozen=True)
class Blip2ViTConfig(ViTConfig):
    act: str = "gelu"
    norm_eps: float = 1e-6
    pre_norm: bool = False
    patch_bias: bool = True


class Blip2ViT(ViT):
    family = "eva"

    def pool(self, x: Tensor) -> Tensor:
        """(B, Di) as transformers has it: all tokens are normed, then the class token is normed once more."""
        return self.post_norm(self.post_norm(x)[:, 0])
