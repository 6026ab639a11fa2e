"""LLaVA-RLHF (2309.14525v1): a reward learned from preferences, and the losses of PPO that climbs it.

Document 3 names RLHF under "alignment tuning", without an equation. A person says which of two answers is
better; a copy of the model with one number on top learns to say it, too; PPO (1707.06347v2) moves the policy
towards answers with a high number, and a KL term holds it near the start. DPO (papers/dpo.py) shows the point
in a tenth of the lines, so training by PPO is not here: its parts are, as functions.

    symbol    shape   here        meaning
    r_0, r_1  (B,)    r0, r1      rewards of two answers; c = 1 (choice): the second is better
    log π     (B, T)  new         per token of the answer; log π_old of the policy that wrote it
    log π_ref (B, T)  reference   of the start, frozen
    s         (B,)    score       the reward model's number of the whole answer
    V         (B, T)  values      the value model's forecast; V_old when the answer was written
    A, R      (B, T)  advantages, returns

    (R1)  r = w · (last state at the last token)                 the model with a scalar in the place of words
    (R2)  L = BCE(σ(r_1 − r_0), c) + 10⁻³ |mean(r_1 + r_0)|      the second term holds the mean near 0
    (R3)  k_t = max(log π_old − log π_ref, 0)
    (R4)  ρ_t = −0.1 k_t, and s more at the last token
    (R5)  δ_t = ρ_t + γ V_{t+1} − V_t;  A_t = δ_t + γλ A_{t+1};  R = A + V           (generalised advantages)
    (R6)  Â = (A − mean A) / (std A + 10⁻⁸)                      over the whole batch
    (R7)  L_π = mean max(−Â q, −Â clip(q, 0.8, 1.2)),  q = π / π_old
    (R8)  L_V = 0.1 · ½ mean max((V − R)², (clip(V, V_old ± 0.2) − R)²)

Paper and code: the code calls (R3) an estimate of the KL, but the clamp makes it another quantity, which is
too large in the mean; `kl_k3` is unbiased and never negative. It multiplies (R4) by 10 where others whiten
it. Its reward model also sees five true captions of the picture ("factually augmented"): a longer prompt.

The paper's numbers as our sources have them: LLaVA-Bench 81.0 → 86.3 by more supervised data → 94.1 by
RLHF (7B); MMHal 1.11 → 2.43 → 2.53, its share of answers with hallucination .84 → .55 → .57 (13B).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import VLM


class RewardModel(nn.Module):
    """A VLM that gives one number to a picture with a text."""

    def __init__(self, vlm: VLM):
        super().__init__()
        self.vlm, self.head = vlm, nn.Linear(vlm.decoder.config.width, 1)       # w
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens (B, T), mask and features as in `VLM.forward` → (B,)."""
        inputs, _ = self.vlm.prepare(tokens, features, mask)
        states = self.vlm.decoder.states(**inputs)[-1]                          # (B, T', D)
        at, real = torch.arange(states.shape[1], device=states.device), inputs["mask"]
        last = at[-1:] if real is None else (real * at).argmax(1)               # padding on either side
        return self.head(states[torch.arange(len(states), device=states.device), last])[:, 0]       # (R1)


def reward_loss(r0: Tensor, r1: Tensor, choice: Tensor, centre: float = 1e-3) -> Tensor:
    """(B,) each; choice int64, 1 where the second answer is better."""
    pairs = F.binary_cross_entropy_with_logits(r1 - r0, choice.float())
    return pairs + centre * (r1 + r0).mean().abs()                              # (R2)


def kl_clamped(old: Tensor, reference: Tensor) -> Tensor:
    return (old - reference).clamp(min=0)                                       # (R3)


def kl_k3(old: Tensor, reference: Tensor) -> Tensor:
    """e^d − 1 − d with d = log π_ref − log π_old: its mean over answers of π_old is the KL."""
    d = reference - old
    return d.exp() - 1 - d


def shape_rewards(score: Tensor, kl: Tensor, weight: float = 0.1) -> Tensor:
    """score (B,), kl (B, T) → (B, T). Answers are padded on the left: the last column is the last token."""
    rewards = -weight * kl
    rewards[:, -1] += score
    return rewards                                                              # (R4)


def estimate_advantages(rewards: Tensor, values: Tensor, gamma: float = 1.0,
                        lam: float = 1.0) -> tuple[Tensor, Tensor]:
    """(B, T) each → advantages, whitened, and returns (B, T)."""
    after, A, columns = F.pad(values[:, 1:], (0, 1)), 0.0, []                   # V_{t+1}, 0 behind the end
    for t in reversed(range(values.shape[1])):
        A = rewards[:, t] + gamma * after[:, t] - values[:, t] + gamma * lam * A
        columns.insert(0, A)
    advantages = torch.stack(columns, dim=1)                                    # (R5)
    return whiten(advantages), advantages + values


def whiten(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.std(correction=0) + 1e-8)                        # (R6)


def policy_loss(new: Tensor, old: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    q = (new - old).exp()
    return torch.max(-advantages * q, -advantages * q.clamp(1 - clip, 1 + clip)).mean()             # (R7)


def value_loss(new: Tensor, old: Tensor, returns: Tensor, clip: float = 0.2, weight: float = 0.1) -> Tensor:
    clipped = torch.clamp(new, old - clip, old + clip)
    return weight * torch.max((new - returns).square(), (clipped - returns).square()).mean() / 2    # (R8)
