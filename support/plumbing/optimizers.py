"""plumbing/optimizers.py: optimisers, their rate over the run, and the clipping of gradients."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from support.plumbing.device import pick_dtype
from support.plumbing.ranks import full_tensor


FUSED = 10**7       # trained numbers: from here on, AdamW on a CPU makes one pass over memory


def clip_gradients(trained: list[tuple[str, nn.Parameter]], limit: float) -> Tensor:
    """The norm of all gradients together, which are scaled down to `limit` where it is larger (0: never).

    torch.nn.utils.clip_grad_norm_ to the bit; it would multiply every gradient by one where it is smaller.
    """
    parameters = [p for _, p in trained]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    whole = full_tensor(norm)
    if not whole + 1e-6 <= (limit or math.inf):         # nan scales, too: the caller finds it
        nn.utils.clip_grads_with_norm_(parameters, limit or math.inf, norm)
    return whole


def schedule(progress: float, warmup: float, kind: str = "cosine", floor: float = 0.02) -> float:
    """A factor of the peak rate at `progress` (0 … 1) of the run.

    A linear warm-up over its first share, then half a cosine down to `floor`, or what `kind` names.
    """
    if progress < warmup:
        return max(progress / warmup, 0.02)
    rest = (progress - warmup) / (1 - warmup)
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * rest))
    return {"cosine": cosine, "constant": 1.0, "linear": 1 - rest}[kind]


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (2502.16982v1, Eq. 1 and 2): torch.optim.Muon, to the bit.

    symbol   here       meaning
    G        p.grad     the gradient of a matrix W (A, B)
    M        momentum   their running mean, μ = 0.95
    O        direction  of M = U S Vᵀ about U Vᵀ: all singular values between 0.7 and 1.2

    (U1)  M ← μ M + (1 − μ) G;   O = NS(μ M + (1 − μ) G)                        Nesterov's look ahead
    (U2)  W ← W (1 − η λ) − η √max(1, A/B) O

    torch.optim.Muon runs NS in bfloat16 everywhere. A CPU without bfloat16 instructions takes ten times as
    long for that as for float32, so here the device decides, as it does for the forward pass.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype, _ = pick_dtype("auto", matrices[0].device)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, mu = group["lr"], group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - mu)
                direction = orthogonalize(p.grad.lerp(momentum, mu).to(self.dtype))         # (U1)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(direction, alpha=-lr * math.sqrt(max(1, p.shape[0] / p.shape[1])))   # (U2)


def orthogonalize(G: Tensor) -> Tensor:
    """Newton and Schulz's iteration: five steps of a polynomial that takes each singular value near 1.

    (U3)  X ← a X + (b X Xᵀ + c (X Xᵀ)²) X,   X = G / ‖G‖,   (a, b, c) = (3.4445, −4.775, 2.0315)
    """
    X = G.T if len(G) > G.shape[1] else G               # the smaller of the two products G Gᵀ and Gᵀ G
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(5):
        XX = X @ X.T
        polynomial = torch.addmm(XX, XX, XX, beta=-4.775, alpha=2.0315)
        X = torch.addmm(X, polynomial, X, beta=3.4445)                                      # (U3)
    return X.T if len(G) > G.shape[1] else X


def make_optimizers(module: nn.Module, trained: list[tuple[str, nn.Parameter]],
                    s, numbers) -> list[torch.optim.Optimizer]:
    """AdamW with decay on matrices only. Muon: matrices of Linear layers by Muon, the rest by AdamW.

    Muon gets a tiny decoder off the plateau where it knows the words of a scene but not which belong together
    (measured: AdamW stayed there for thousands of steps). On slices (--shard) it is exact but slow, because
    each of its matrix products puts them together.

    AdamW is fused on a GPU, and on a CPU from FUSED numbers on: 177 million take 0.37 s a step, not 1.6. Its
    sums are rounded in another order, so the toys keep the order that their tables were made in.

    s: settings with lr, beta2, weight_decay, optimizer; numbers: the recipe's, its muon_lr goes with its lr.
    """
    kind, size = trained[0][1].device.type, sum(p.numel() for _, p in trained)
    fused = kind == "cuda" or kind == "cpu" and size >= FUSED
    if s.optimizer == "muon":
        linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
        matrices = [p for _, p in trained if id(p) in linear]
        rest = [p for _, p in trained if id(p) not in linear]
        muon = [Muon(matrices, numbers.muon_lr * s.lr / numbers.lr, s.weight_decay)] if matrices else []
        if not rest:                                    # an optimiser of nothing is an error
            return muon
        return [*muon, torch.optim.AdamW(rest, lr=s.lr, betas=(0.9, s.beta2), weight_decay=0.0, fused=fused)]
    norms = {id(p) for m in module.modules() if type(m).__name__.endswith("Norm") for p in m.parameters()}
    decayed, rest = [], []          # a norm with a weight per head, as Chameleon's, is no matrix
    for _, p in trained:
        (decayed if p.ndim >= 2 and id(p) not in norms else rest).append(p)
    groups = [{"params": decayed, "weight_decay": s.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, s.beta2), fused=fused)]
