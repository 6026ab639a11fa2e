"""Unified-IO 2 (2312.17172v1): what holds one stream of images, audio, history, text and actions together.

Parts only: positions in two dimensions, norms of queries and keys, a resampler of the history, two layers
of features, several examples in a row. Not here: encoder, decoder and the tokenizers of its media, its
mixture of denoisers, and its dynamic masking, by which the decoder hides a token except where it is
predicted.

Document 3 says "120 million video clips"; the paper has 180 million. It links RoPE in two dimensions to
2403.13298, another paper. It calls packing similar to padding; packing takes the place of padding.

    symbol   shape            here        meaning
    r, c     (T,)             row, column cell of a patch; frame and latent of the history
    θ_i      (E/4,)           theta       angle per step of pair i
    φ        (T, E/2)         angles      of every pair
    q, k, v  (B, H, T|S, E)               after the projections
    s        (H, 1, 1)        log_scale   ln 10 at the start, at most ln 100
    h        (B, N, W)        context     what the encoder of images or audio saw of a past frame
    l        (n, W)           latents     learned, n = 32 for an image, 16 for audio

    (U1)  θ_i = 10000^(−2i / (E/2));   φ = [r θ ; c θ]          half of the channels by row, half by column
    (U2)  q ← q / √(mean q² + ε) ⊙ g_q,  k alike;  then the rotation by φ;  softmax(q kᵀ / √E) v
    (U3)  softmax(e^s cos(q, k)) v                              scaled cosine, in the resamplers
    (U4)  x ← x + MHA(RMS x, RMS h, RMS h);  x ← x + MLP(RMS x)     2 layers from x = l; RMS h is made once
    (U5)  features = [state 2 ; state −2] of the ViT: model.ViT.features(pixels, [2, -2])
    (U6)  two examples whose tokens fit into one row share it; masks and positions as if they were alone

By (U1) a score depends on r_q − r_k and c_q − c_k alone. Text has one coordinate: φ = t θ with E/2 pairs.

Paper and code: the paper's norm in (U2) is a LayerNorm, the code's an RMSNorm with one scale for all heads
and ε = 1e-6. The paper has (U3) in the resamplers; of the released configs the largest alone switches it
on, and (U2) off there. The code rotates neighbours, x_2i with x_2i+1; `to_half_split` reorders channels for
model.rope.

The point: without (U2) runs diverge, and (U6) gives about four times the throughput, because the examples
of so many tasks differ in length.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import RMSNorm, attend, merge_heads, rope, split_heads


def text_angles(T: int, E: int, base: float = 10000.0) -> Tensor:
    """(T, E/2): the angle of each pair at positions 0, 1, 2, …"""
    theta = base ** (-torch.arange(0, E, 2) / E)
    return torch.arange(T)[:, None] * theta


def grid_angles(rows: int, columns: int, E: int, base: float = 10000.0) -> Tensor:
    """(rows · columns, E/2), row by row: E/4 angles of the row, then E/4 of the column."""
    if E % 4:
        raise ValueError(f"two coordinates rotate pairs of channels each, so the head width {E} must be a "
                         "multiple of 4.")
    row, column = text_angles(rows, E // 2, base), text_angles(columns, E // 2, base)
    return torch.cat((row.repeat_interleave(columns, 0), column.repeat(rows, 1)), dim=1)            # (U1)


def to_half_split(x: Tensor) -> Tensor:
    """Neighbours (x_0, x_1), (x_2, x_3), … → their first halves, then their second halves."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x (B, H, T, E) in the order of `to_half_split`, angles (T, E/2)."""
    angles = torch.cat((angles, angles), dim=-1)
    return rope(x, angles.cos(), angles.sin())


class QKNorm(nn.Module):
    """(U2) without its softmax: norms, then the rotation. One scale for the queries, one for the keys."""

    def __init__(self, E: int, eps: float = 1e-6):
        super().__init__()
        self.q, self.k = RMSNorm(E, eps), RMSNorm(E, eps)

    def forward(self, q: Tensor, k: Tensor, angles: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k = self.q(q), self.k(k)                                             # (U2)
        return (q, k) if angles is None else (rotate(q, angles), rotate(k, angles))


def cosine_attend(q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """(U3). Scores are at most 100 in size, whatever the norms of q and k; no 1/√E."""
    q, k = (x * x.square().sum(-1, keepdim=True).clamp(min=1e-12).rsqrt() for x in (q, k))
    scale = log_scale.clamp(max=math.log(100)).exp() * q.shape[-1]**0.5         # `attend` divides by √E
    return attend(scale * q, k, v, bias)                                        # (U3)


class HistoryLayer(nn.Module):
    """Latents read a frame; the latents themselves are no keys, unlike in Flamingo's resampler."""

    def __init__(self, width: int, heads: int, hidden: int, cosine: bool):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.qk_norm = None if cosine else QKNorm(width // heads)
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10))) if cosine else None

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (split_heads(y, self.heads)
                   for y in (self.q(self.norm1(x)), self.k(context), self.v(context)))
        y = cosine_attend(q, k, v, self.log_scale, bias) if self.qk_norm is None else \
            attend(*self.qk_norm(q, k), v, bias)
        x = x + self.o(merge_heads(y))                                          # (U4)
        return x + self.down(F.gelu(self.up(self.norm2(x))))                    # (U4)


class HistoryResampler(nn.Module):
    """(B, N, W) of a past frame → (B, n, W). Frame f and latent j then stand at (f, j) in (U1)."""

    def __init__(self, width: int = 768, latents: int = 32, layers: int = 2, heads: int = 12,
                 hidden: int = 2048, cosine: bool = False):
        super().__init__()
        self.latents, self.norm = nn.Parameter(torch.randn(latents, width) * 0.02), RMSNorm(width, 1e-6)
        self.layers = nn.ModuleList(HistoryLayer(width, heads, hidden, cosine) for _ in range(layers))

    def forward(self, context: Tensor, bias: Tensor | None = None) -> Tensor:
        context, x = self.norm(context), self.latents.expand(len(context), -1, -1)
        for layer in self.layers:
            x = layer(x, context, bias)
        return x


def pack_examples(lengths: Iterable[int], longest: int, pool: int = 10) -> Iterator[list[int]]:
    """The numbers of the examples of each row: two that fit into `longest` together, or one alone.   (U6)

    Up to `pool` examples wait for a partner; a new one takes the longest that fits. The first to wait leaves
    alone when the pool is full.
    """
    waiting: dict[int, int] = {}
    for i, length in enumerate(lengths):
        if length > longest:
            raise ValueError(f"example {i} has {length} tokens; a row has room for {longest}.")
        partner = max((n for n in waiting if waiting[n] + length <= longest), key=waiting.get, default=None)
        if partner is not None:
            del waiting[partner]
            yield [partner, i]
            continue
        waiting[i] = length
        if len(waiting) > pool:
            first = next(iter(waiting))
            del waiting[first]
            yield [first]
    yield from ([n] for n in waiting)
