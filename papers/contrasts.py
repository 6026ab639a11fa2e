"""Contrasts of B pictures and B texts: CLIP's (2103.00020v1), ALIGN's (2102.05918v2), Florence's UniCL
(2111.11432v1 Eq. 1 to 3, 2204.03610v1).

Document 4 writes CLIP's two losses, of a text among the pictures and of a picture among the texts:

    L_txt2im = −1/N Σ_i log exp(L_iᵀV_i β) / Σ_j exp(L_iᵀV_j β)                   right
    L_im2txt = −1/N Σ_i log exp(V_iᵀL_i β) / Σ_j exp(V_jᵀL_i β)                   the same loss again

V_jᵀL_i = L_iᵀV_j: the second sum runs over the pictures once more, so no picture is ever asked for its text.
It has to be Σ_j exp(V_iᵀL_j β). The document puts the two headings at each other's loss, and minimises the
sum; CLIP takes the average. On the four pairs of tests/papers/test_contrasts.py the printed loss is .94722,
the right one 1.04931.

    symbol   shape    here         meaning
    u, v     (B, E)                vectors of pictures and of texts, of length 1
    S        (B, B)   S            β u_i·v_j; β = e^s in CLIP, 1/τ in ALIGN (τ learned itself, from 1.0 on)
    y        (B,)     y            a number for each text, the same for equal texts
    P(i)                           {k : y_k = y_i}: the rows that are right for row i, itself and its twins

    (T1)  L_i2t = −mean_i log softmax_j(S_ij)_i,   L_t2i = −mean_i log softmax_j(S_ji)_i
    (T2)  CLIP: ½ (L_i2t + L_t2i);   ALIGN: the same with labels smoothed by 0.1
    (T3)  UniCL: −Σ_i 1/|P(i)| Σ_{k ∈ P(i)} [log softmax_j(S_ij)_k + log softmax_j(S_ji)_k]        SUMS over i

Why UniCL: 350M of Florence's 900M pairs share their text with another. To CLIP the twin is a negative. The
public code of UniCL trains classification alone and does not have (T3); the test's numbers are by hand.
What else Florence is (CoSwin-H of 637M, a text ENCODER of 256M, which document 4 calls a decoder, adapters
for boxes, questions, videos), FLD-900M and 1M steps at batch 24,576, is not here.
"""
from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(S: Tensor, smoothing: float = 0.0) -> Tensor:
    """(T2) of S (B, B + n): row i is picture i, column i its text; n more texts belong to none."""
    own = torch.arange(len(S), device=S.device)
    return (F.cross_entropy(S, own, label_smoothing=smoothing) +                # (T1)
            F.cross_entropy(S[:, :len(S)].T, own, label_smoothing=smoothing)) / 2               # (T2)


def unicl_loss(S: Tensor, y: Tensor) -> Tensor:
    """(T3) of S (B, B) and the numbers y (B,) of the texts; divide by 2B to compare it with CLIP's."""
    same = (y[:, None] == y).to(S.dtype)                                        # (B, B) is k in P(i)?
    share = same / same.sum(1, keepdim=True)
    return -(share * (S.log_softmax(1) + S.T.log_softmax(1))).sum()             # (T3)


def recall_at_1(S: Tensor, same: Tensor) -> dict[str, float]:
    """How often the best column of a row of S (pictures, texts) is right, and the best row of a column.

    same (pictures, texts) bool: which pairs are right, the own pair and those with an equal text.
    """
    return {"image to text R@1": same.gather(1, S.argmax(1, True)).float().mean().item(),
            "text to image R@1": same.gather(0, S.argmax(0, True)).float().mean().item()}


def hard_negatives(s: Tensor, gather: Callable[[Tensor], Tensor] = lambda x: x,
                   generator: torch.Generator | None = None) -> Tensor:
    """(B,): for each row of s (B, B) another row's column, drawn by the row's softmax without its own.

    Every process draws for the whole batch, and all take what the first one has drawn.
    """
    own = torch.eye(len(s), dtype=torch.bool, device=s.device)
    p = s.detach().float().masked_fill(own, -torch.inf).softmax(1)
    return gather(torch.multinomial(p, 1, generator=generator)[:, 0])[:len(s)]


def mean_count(count: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """The words of a part, averaged over the parts of a batch; 1 where there are none.

    A part's summed loss divided by it, averaged over the parts, is the mean over the words of all.
    """
    return gather(count[None]).float().mean().clamp(min=1)
