"""Contrasts of a batch of pictures and texts: CLIP's, ALIGN's, Florence's."""
from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(S: Tensor, smoothing: float = 0.0) -> Tensor:
    """½ (CE over each picture's texts + CE over each true text's pictures), means over the B rows.

    S (B, B + n): row i is picture i, column i its text; n more texts belong to none.
    """
    own = torch.arange(len(S), device=S.device)
    return (F.cross_entropy(S, own, label_smoothing=smoothing) +
            F.cross_entropy(S[:, :len(S)].T, own, label_smoothing=smoothing)) / 2


def hard_negatives(s: Tensor, gather: Callable[[Tensor], Tensor] = lambda x: x,
                   generator: torch.Generator | None = None) -> Tensor:
    """(B,): for each row of s (B, B) another row's column, drawn by the row's softmax without its own.

    Every process draws for the whole batch, and all take what the first one has drawn.
    """
    own = torch.eye(len(s), dtype=torch.bool, device=s.device)
    p = s.detach().float().masked_fill(own, -torch.inf).softmax(1)
    return gather(torch.multinomial(p, 1, generator=generator)[:, 0])[:len(s)]
