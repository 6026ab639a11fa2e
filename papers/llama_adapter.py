"""LLaMA-Adapter's first way for an image (2303.16199v3, §3.3): one vector for all prompts, and why no
question can steer it.

The chapter in bridges.py has the prompts and their gates (`ZeroInit`, version 0: text alone) and the image of
the second version (`ZeroInitV2`). This file has the image of the first, and attention without zero-init;
`make_bridge("zero_init", …, version=0 | 1 | 2 | 3)` builds each.
"""
from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from bridges import ZeroInit, ZeroInitV2, image_of_each_row
from model import DecoderConfig, ImagePositions, split_heads
from papers.prompt_tuning import attend_with_prefix


class ZeroInitV1(ZeroInit):
    """One vector of the image for all prompts (LLaMA-Adapter, 2303.16199v3, §3.3, Eq. 10).

    symbol   shape          here            meaning
    [CLS]    (ΣM, Di)       features[:, 0]  the ViT's class token
    I        (B, 1, D)      visual          repeated over the Q prompts of every adapted layer

    (Z4)  I = W_2 SiLU(W_1 [CLS])

    The width between W_1 and W_2 is not published; hidden=114 meets the published total of parameters.

    THE QUESTION CANNOT STEER IT. In (Z1) the image adds q·k(I) to the score of every prompt, and a softmax
    ignores what all scores share:
        softmax_k( q·k(P_k + I) ) = softmax_k( q·k(P_k) + q·k(I) ) = softmax_k( q·k(P_k) ).
    The value that is read is Σ_k a_k v(P_k) + v(I), because Σ_k a_k = 1. So the image adds the constant
    tanh(g) v(I) to every word of a layer, whatever is asked; only the frozen feed-forwards can then select.
    """
    sees = True

    def __init__(self, decoder: DecoderConfig, vision_width: int, prompts: int = 10, adapted: int = 30,
                 tanh: bool = True, gate_per: str = "head", hidden: int = 114, gate_init: str = "zero"):
        super().__init__(decoder, vision_width, prompts, adapted, tanh, gate_per, gate_init)
        self.down, self.up = nn.Linear(vision_width, hidden), nn.Linear(hidden, decoder.width)

    def see(self, features: Tensor, where: ImagePositions | None = None) -> Tensor:
        image = self.up(F.silu(self.down(features[:, :1])))                     # (ΣM, 1, D)   (Z4)
        return image_of_each_row(image, where)


class OneSoftmax(ZeroInitV2):
    """Attention without zero-init: prompts and words share one softmax, and nothing gates it.

    (Z5)  y = softmax([q k(P_l + I)ᵀ ; q kᵀ] / √E) [v(P_l + I) ; v]             in the place of (Z1) and (Z2)

    The paper's ablation "rand-init attention" (§4.3, Table 5: ScienceQA 40.77 against 83.85) does not say
    what it replaces the zero gates by. One reading is gates that start at random (gate_init="random"), the
    other this one: what the gates were added to. From the first step on, prompts drawn at random take part.
    """

    def __init__(self, decoder: DecoderConfig, vision_width: int, prompts: int = 10, adapted: int = 30,
                 width: int = 768, depth: int = 8, heads: int = 16, mlp: int = 4):
        super().__init__(decoder, vision_width, prompts, adapted, width=width, depth=depth, heads=heads,
                         mlp=mlp)
        self.gate = None
        self.kv_heads, self.kv_width = decoder.kv_heads, decoder.kv_heads * decoder.head_width

    def see(self, features: Tensor, where: ImagePositions | None = None) -> dict:
        return {"image": super().see(features, where)}

    def beside(self, *_) -> None:
        return None

    def around(self, layer: int, part: str, f: Callable[..., Tensor], visual: dict | None, *x) -> Tensor:
        if visual is None or layer < self.first or part not in ("qkv", "attend"):
            return f(*x)
        if part == "qkv":                               # the layer's own projections, without RoPE
            p = self.prompts[layer - self.first] + visual["image"]              # (B, Q, D)
            visual["kv"] = f(p)[..., -2 * self.kv_width:].chunk(2, dim=-1)
            return f(*x)
        K, V = (split_heads(y, self.kv_heads) for y in visual["kv"])            # (B, G, Q, E) each
        return attend_with_prefix(f, K, V, *x)                                                  # (Z5)

    def gates(self) -> None:
        return None

    @property
    def gated_layers(self) -> list[int]:
        return []
