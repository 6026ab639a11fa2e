"""LLaMA-Adapter's first way for an image (2303.16199v3, §3.3): one vector for all prompts, and why no
question can steer it.

The chapter in bridges.py has the prompts and their gates (`ZeroInit`, version 0: text alone) and the image of
the second version (`ZeroInitV2`). This file has the image of the first; `make_bridge("zero_init", …,
version=0 | 1 | 2)` builds each.
"""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bridges import ZeroInit, image_of_each_row
from model import DecoderConfig, ImagePositions


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
