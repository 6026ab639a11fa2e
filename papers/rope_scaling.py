"""RoPE for contexts longer than those of pretraining.

Position Interpolation (2306.15595v2), YaRN (2309.00071v2), NTK-aware scaling by the length, Llama 3.1.

Each class below is a value of DecoderConfig.rope_scaling. It turns the angles θ (E/2,) of one position, (D3)
in model.py, into others; `positions` are those of the tokens that are turned, None: of the old context. Its
numbers are named as in a published config.json.

    symbol   here                meaning
    θ_i      theta               angle per position of pair i = 0 … E/2 − 1
    s        factor              how many times longer the context becomes
    L        original_max_…      the context of pretraining in tokens
    λ_i      –                   wavelength of pair i in tokens, 2π/θ_i
    T        positions.max() + 1 length of the text so far
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class RopeScaling:
    """Called with θ and positions it gives the new θ; cos and sin are multiplied by cos_sin_factor."""
    cos_sin_factor: ClassVar[float] = 1.0


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """All positions move closer together (2306.15595v2, Eq. 4).

    (P1)  θ_i ← θ_i / s
    """
    rope_type: ClassVar[str] = "linear"
    factor: float

    def __call__(self, theta: Tensor, positions: Tensor | None = None) -> Tensor:
        return theta / self.factor                                              # (P1)


@dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """A base that grows with the text once this is longer than L; a shorter text is read as ever.

    (P3)  base ← base · g^(E/(E−2)),   g = max(1, s T/L − (s − 1));   so θ_i ← θ_i g^(−i/(E/2−1))

    The slowest pair is divided by g, the fastest stays. Published in code only, in transformers too. Cached
    keys keep the angles that they were turned by, as there.
    """
    rope_type: ClassVar[str] = "dynamic"
    factor: float
    original_max_position_embeddings: int

    def __call__(self, theta: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            return theta
        longer = (positions.max() + 1) / self.original_max_position_embeddings
        growth = (self.factor * longer - (self.factor - 1)).clamp(min=1)
        return theta * growth ** -torch.linspace(0, 1, len(theta), device=theta.device)     # (P3)


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (2309.00071v2, §3): slow pairs are interpolated, fast ones stay, and all scores grow.

    (P4)  θ_i ← (1 − γ_i) θ_i + γ_i θ_i / s,   γ_i = clamp( (i − a) / (b − a), 0, 1 )
    (P5)  cos and sin are multiplied by m = 0.1 ln s + 1, so the scores by m²  (Eq. 15)

    a and b are the pairs that make beta_fast and beta_slow turns in L tokens; "truncate" rounds them
    outwards. The paper's ramp is over turns, its published code's, which models are trained with, over i.
    mscale and mscale_all_dim are DeepSeek's: m is the quotient of 0.1 · mscale · ln s + 1 for the two.
    """
    rope_type: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None       # m, where it is not what (P5) says
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __call__(self, theta: Tensor, positions: Tensor | None = None) -> Tensor:
        i = torch.arange(len(theta), dtype=torch.float32, device=theta.device)
        step = -theta[-1].double().log() / (len(theta) - 1)                     # θ_i = exp(−i · step)
        a, b = (math.log(self.original_max_position_embeddings / (2 * math.pi * turns)) / step
                for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            a, b = a.floor(), b.ceil()
        a, b = a.clamp(min=0), b.clamp(max=2 * len(theta) - 1)
        ramp = ((i - a) / torch.where(a == b, 0.001, b - a)).clamp(0, 1).to(theta.dtype)
        return (1 - ramp) * theta + ramp * theta / self.factor                  # (P4)

    @property
    def cos_sin_factor(self) -> float:
        def grown(scale: float) -> float:
            return 0.1 * scale * math.log(self.factor) + 1 if self.factor > 1 else 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return grown(self.mscale) / grown(self.mscale_all_dim)
        return grown(1)                                                         # (P5)


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1: slow pairs are interpolated, fast ones stay (the rule stands in its published code only).

    (P2)  θ_i ← κ θ_i + (1 − κ) θ_i / s,   κ = clamp( (L/λ_i − low) / (high − low), 0, 1 )

    κ = 1 below the wavelength L/high, 0 above L/low, and between them in proportion to the turns L/λ_i.
    """
    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, theta: Tensor, positions: Tensor | None = None) -> Tensor:
        turns = self.original_max_position_embeddings * theta / (2 * math.pi)   # of a pair in the old context
        low, high = self.low_freq_factor, self.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return theta * (keep + (1 - keep) / self.factor)                        # (P2)
