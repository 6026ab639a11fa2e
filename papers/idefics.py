"""IDEFICS (OBELICS, 2306.16527v2; published code: transformers' idefics): Flamingo with the decoder's kind of
parts.

                              Flamingo                IDEFICS
    norms of a gated block    LayerNorm               RMSNorm with the decoder's ε
    its heads                 any                     as many and as wide as the decoder's
    its queries and keys      as projected            RMSNorm over each head (qk_norm)
    its feed-forward          LN, act, 4 D            SwiGLU of the decoder's hidden width
    α_x, α_d                  one number              one number, or one per channel (vector_gates)
    queries, keys of (F1)     as projected            LayerNorm over each head (resampler_qk_norm)
    act of (F2)               squared ReLU            ReLU
    x_f                       no class token          with the class token; latents=0: no resampler

(F1) to (F4) are those of bridges.Flamingo, and so is φ(ℓ). The processor of IDEFICS also blinds the words
between an end of text and the next image; a text of ours ends with its row.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from bridges import Flamingo, GatedCrossAttention, Resampler, ResamplerLayer
from model import Attend, Bridge, DecoderConfig, RMSNorm, SwiGLU, merge_heads, split_heads, visible_to_bias
from papers.recipe import MUON, Numbers, Recipe


class NormedSwiGLU(SwiGLU):
    """RMSNorm → SwiGLU: the feed-forward of the gated blocks, as large as the decoder's own."""

    def __init__(self, c: DecoderConfig):
        super().__init__(c)
        self.norm = RMSNorm(c.width, c.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class IdeficsBlock(GatedCrossAttention):
    """(F3) and (F4) with RMSNorms, SwiGLU, and perhaps normed heads and a gate per channel."""

    def __init__(self, decoder: DecoderConfig, vision_width: int, qk_norm: bool, vector_gates: bool):
        D, E, eps = decoder.width, decoder.head_width, decoder.norm_eps
        nn.Module.__init__(self)                        # parts of its own; the forward is Flamingo's
        self.heads, self.norm_media = decoder.heads, None
        self.norm, self.ff, self.attend = RMSNorm(D, eps), NormedSwiGLU(decoder), Attend()
        self.q = nn.Linear(D, decoder.heads * E, bias=False)
        self.o = nn.Linear(decoder.heads * E, D, bias=False)
        self.k, self.v = (nn.Linear(vision_width, decoder.heads * E, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = (RMSNorm(E, eps) if qk_norm else nn.Identity() for _ in range(2))
        gate = (D,) if vector_gates else (1,)
        self.attention_gate, self.ff_gate = nn.Parameter(torch.zeros(gate)), nn.Parameter(torch.zeros(gate))

    def project(self, media: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().project(media)
        return self.k_norm(k), v

    def attention(self, x: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        q = self.q_norm(split_heads(self.q(self.norm(x)), self.heads))          # (B, H, T, E)
        y = self.attend(q, k, v, visible_to_bias(visible[:, None], q.dtype))    # (B, H, T, E)
        return self.o(merge_heads(y)) * visible.any(-1, keepdim=True)


class IdeficsResamplerLayer(ResamplerLayer):
    """(F1) and (F2) with a LayerNorm over each head of the queries and keys."""

    def __init__(self, width: int, heads: int, head_width: int, mult: int, act: str):
        super().__init__(width, heads, head_width, mult, act)
        self.q_norm, self.k_norm = nn.LayerNorm(head_width), nn.LayerNorm(head_width)

    def attention(self, x: Tensor, latents: Tensor) -> Tensor:
        kv = torch.cat((x, latents), dim=1)
        q, k, v = (split_heads(y, self.heads) for y in (self.q(latents), self.k(kv), self.v(kv)))
        return self.o(merge_heads(self.attend(self.q_norm(q), self.k_norm(k), v)))


class NoResampler(nn.Module):
    """The ViT's tokens are read as they are."""

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        return x


class Idefics(Flamingo):
    """The defaults are the release of 9 billion parameters, 1,560,481,552 of them in here."""
    name, reads_cls = "idefics", True

    def __init__(self, decoder: DecoderConfig, vision_width: int, every: int = 4, latents: int = 64,
                 depth: int = 6,
                 qk_norm: bool = True, vector_gates: bool = False, resampler_heads: int = 16,
                 resampler_head_width: int = 96, resampler_qk_norm: bool = True):
        Bridge.__init__(self)                           # parts of its own; the seams are Flamingo's
        self.every, self.first, self.see_all = every, 0, False
        layer = IdeficsResamplerLayer if resampler_qk_norm else ResamplerLayer
        self.resampler = NoResampler() if not latents else Resampler(
            vision_width, latents, depth, resampler_heads, resampler_head_width, mult=4, act="relu", times=0,
            layer=layer)
        self.blocks = nn.ModuleList(IdeficsBlock(decoder, vision_width, qk_norm, vector_gates)
                                    for _ in range(0, decoder.layers, every))


RECIPES = {"idefics": Recipe(
    "IDEFICS 9B: resampler, gated blocks and the new words learn",
    "OBELICS, LAION, Wikipedia, PMD; 1.3M tokens a batch",
    Numbers(1e-5, 1280, 200000, 2000, weight_decay=0.1, beta2=0.999, floor=0.6),
    Numbers(2e-3, 64, 1000, **MUON), "idefics",
    options=dict(reads=-2, every=1, latents=16, depth=2, resampler_heads=4, resampler_head_width=32))}
