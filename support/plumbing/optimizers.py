"""plumbing/optimizers.py: optimisers, their rate over the run, and the clipping of gradients."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from support.plumbing.ranks import full_tensor


def clip_gradients(trained: list[tuple[str, nn.Parameter]], limit: float) -> Tensor:
    """The norm of all gradients together, which are scaled down to `limit` where it is larger (0: never)."""
    norm = nn.utils.clip_grad_norm_([p for _, p in trained], limit or math.inf)
    return full_tensor(norm)


def schedule(progress: float, warmup: float, kind: str = "cosine", floor: float = 0.02) -> float:
    """A factor of the peak rate at `progress` (0 … 1) of the run.

    A linear warm-up over its first share, then half a cosine down to `floor`, or what `kind` names.
    """
    if progress < warmup:
        return max(progress / warmup, 0.02)
    rest = (progress - warmup) / (1 - warmup)
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * rest))
    return {"cosine": cosine, "constant": 1.0, "linear": 1 - rest}[kind]


def make_optimizers(module: nn.Module, trained: list[tuple[str, nn.Parameter]],
                    s, numbers) -> list[torch.optim.Optimizer]:
    """AdamW with decay on matrices only. Muon: matrices of Linear layers by Muon, the rest by AdamW.

    Muon gets a tiny decoder off the plateau where it knows the words of a scene but not which belong together
    (measured: AdamW stayed there for thousands of steps). On slices (--shard) it is exact but slow, because
    each of its matrix products puts them together.

    s: settings with lr, beta2, weight_decay, optimizer; numbers: the recipe's, its muon_lr goes with its lr.
    """
    fused = trained[0][1].device.type == "cuda"
    if s.optimizer == "muon":
        linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
        matrices = [p for _, p in trained if id(p) in linear]
        rest = [p for _, p in trained if id(p) not in linear]
        return [torch.optim.Muon(matrices, lr=numbers.muon_lr * s.lr / numbers.lr,
                                 weight_decay=s.weight_decay),
                torch.optim.AdamW(rest, lr=s.lr, betas=(0.9, s.beta2), weight_decay=0.0, fused=fused)]
    groups = [{"params": [p for _, p in trained if p.ndim >= 2], "weight_decay": s.weight_decay},
              {"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, s.beta2), fused=fused)]
