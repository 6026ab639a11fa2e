"""papers/idefics.py: IDEFICS (2306.16527v2): Flamingo with the decoder's kind of parts."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from bridges import Flamingo
from model import DecoderConfig, RMSNorm, SwiGLU
from papers.recipe import MUON, Numbers, Recipe


class NormedSwiGLU(SwiGLU):
    """RMSNorm → SwiGLU: the feed-forward of IDEFICS' gated blocks, as large as the decoder's own."""

    def __init__(self, c: DecoderConfig):
        super().__init__(c)
        self.norm = RMSNorm(c.width, c.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Idefics(Flamingo):
    """IDEFICS (OBELICS, 2306.16527v2; published code: transformers' idefics): (F1) to (F4) with the decoder's kind of parts.

                              Flamingo                IDEFICS
    norms of a gated block    LayerNorm               RMSNorm with the decoder's ε
    its heads                 any                     as many and as wide as the decoder's
    its queries and keys      as projected            RMSNorm over each head (qk_norm)
    its feed-forward          LN, act, 4 D            SwiGLU of the decoder's hidden width
    α_x, α_d                  one number              one number, or one per channel (vector_gates)
    queries, keys of (F1)     as projected            LayerNorm over each head (resampler_qk_norm)
    act of (F2)               squared ReLU            ReLU
    x_f                       no class token          with the class token; latents=0: read as they are, no resampler

    The defaults are the release of 9 billion parameters, 1,560,481,552 of them in here. φ(ℓ) is Flamingo's. Their processor
    also blinds the words between an end of text and the next image; a text of ours ends with its row.
    """
    name, reads_cls = "idefics", True

    def __init__(self, decoder: DecoderConfig, vision_width: int, every: int = 4, latents: int = 64, depth: int = 6,
                 qk_norm: bool = True, vector_gates: bool = False, resampler_heads: int = 16, resampler_head_width: int = 96,
                 resampler_qk_norm: bool = True):
        super().__init__(decoder, vision_width, every, 0, latents, depth, decoder.heads, decoder.head_width, act="relu",
                         resampler_heads=resampler_heads, resampler_head_width=resampler_head_width)
        D, E, eps = decoder.width, decoder.head_width, decoder.norm_eps
        for block in self.blocks:
            block.norm, block.ff = RMSNorm(D, eps), NormedSwiGLU(decoder)
            if qk_norm:
                block.q_norm, block.k_norm = RMSNorm(E, eps), RMSNorm(E, eps)
            if vector_gates:
                block.attention_gate, block.ff_gate = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
        for layer in self.resampler.layers if resampler_qk_norm else ():
            layer.q_norm, layer.k_norm = nn.LayerNorm(resampler_head_width), nn.LayerNorm(resampler_head_width)
        if not latents:
            self.resampler = None


RECIPE = Recipe(
    "IDEFICS 9B: resampler, gated blocks and the new words learn",
    "OBELICS, LAION, Wikipedia, PMD; 1.3M tokens a batch",
    Numbers(1e-5, 1280, 200000, 2000, weight_decay=0.1, beta2=0.999), Numbers(2e-3, 64, 1000, **MUON), "idefics",
    options=dict(reads=-2, every=1, latents=16, depth=2, resampler_heads=4, resampler_head_width=32))
