"""RoPE for contexts longer than those of pretraining: Position Interpolation (2306.15595v2), Llama 3.1.

Each class below is a value of DecoderConfig.rope_scaling. It turns the angles θ (E/2,) of one position, (D3)
in model.py, into others. Its numbers are named as in a published config.json.

    symbol   here                meaning
    θ_i      theta               angle per position of pair i
    s        factor              how many times longer the context becomes
    L        original_max_…      the context of pretraining in tokens
    λ_i      –                   wavelength of pair i in tokens, 2π/θ_i
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class LinearScaling:
    """All positions move closer together (2306.15595v2, Eq. 4).

    (P1)  θ_i ← θ_i / s
    """
    rope_type: ClassVar[str] = "linear"
    factor: float

    def __call__(self, theta: Tensor) -> Tensor:
        return theta / self.factor                                              # (P1)


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: slow pairs are interpolated, fast ones stay (the rule stands in its published code only).

    (P2)  θ_i ← κ θ_i + (1 − κ) θ_i / s,   κ = clamp( (L/λ_i − low) / (high − low), 0, 1 )

    κ = 1 below the wavelength L/high, 0 above L/low, and between them in proportion to the turns L/λ_i.
    """
    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, theta: Tensor) -> Tensor:
        turns = self.original_max_position_embeddings * theta / (2 * math.pi)   # of a pair in the old context
        low, high = self.low_freq_factor, self.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return theta * (keep + (1 - keep) / self.factor)                        # (P2)
