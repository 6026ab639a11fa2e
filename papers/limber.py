"""LiMBeR (2209.15162v3): ONE linear map between two frozen models, and a question to three vision encoders.

Document 1 has it as a row of a table: LiMBeR-CLIP trains 12.6M parameters on 3.3M pairs and has 33.33 on
VQAv2 without an example, 40.34 with four. The row says that a linear map is enough. The paper's question is
another one: which encoders make it enough. So it maps three of them, with more and more language in their
training: BEiT saw none, NF-ResNet-50 the names of classes, CLIP sentences.

    symbol   shape          here       meaning
    Z        (ΣM, N, Di)    visual     cells of the encoder's grid, or N = 1 pooled vector (reads = "pooled")
    W        (sD, Di)       map        all that learns; encoder and decoder (GPT-J) are frozen
    H_v      (ΣM, Ns, D)    return     s soft tokens per cell; s = 1 on a grid

    (B1)  H_v = Drop_0.1(reshape(W Z + b, (N s, D)))              the index of the token is the slow one

Paper and published code differ in one thing: the paper's map is linear, the code has dropout behind it. Its
ancestor, MAGMA's prefix, has a LayerNorm there, too; LiMBeR switches it off. The cells of CLIP are those of
RN50x16 ahead of its attention pooling, (144, 3072); BEiT-L gives 196 without its class token; NF-ResNet-50
one pooled vector, (1, 2048). In the published code, a loader for the trained NF-ResNet-50 gives the random
one.

The claim: the three encoders transfer what a thing LOOKS like (colour, size) about equally; language in
their training helps with what it IS (its category). In miniature: this bridge over three ViTs, one trained on
captions, one to name shapes, one untrained; questions about colours and about shapes, apart. Expected:
shapes captions > names > none, colours about equal. Of the paper's numbers for it our sources have the
direction alone; VQAv2 33.33 is CLIP's.
"""
from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from bridges import Linear
from model import DecoderConfig
from papers.recipe import Numbers, Recipe


class Limber(Linear):
    """12,587,008 parameters from CLIP RN50x16 (Di 3072) to GPT-J (D 4096): document 1's 12.6M."""
    name = "limber"

    def __init__(self, decoder: DecoderConfig, vision_width: int, tokens: int = 1, dropout: float = 0.1):
        super().__init__(replace(decoder, width=tokens * decoder.width), vision_width)
        self.tokens, self.dropout = tokens, dropout

    def prefix(self, visual: Tensor) -> Tensor:
        y = super().prefix(visual)                                              # (ΣM, N, s·D)
        y = y.unflatten(-1, (self.tokens, -1)).flatten(1, 2)                    # (ΣM, N·s, D)
        return F.dropout(y, self.dropout, self.training)                        #               (B1)


# 2,048 pairs per update follow from the published settings. Their decay ends at step 300,000, which is as
# good as none in 15,000 steps; which schedule the released runs had is unknown.
RECIPES = {"limber": Recipe(
    "LiMBeR (2209.15162v3): a linear map learns from captions, both towers are frozen", "CC3M, 3.3M pairs",
    Numbers(8e-4, 2048, 15000, 100, "constant", 0.0, 0.95), Numbers(6e-3, 64, 1600), "limber",
    options=dict(reads=-2))}
