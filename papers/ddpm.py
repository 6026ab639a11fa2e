"""DDPM (2006.11239v2), DDIM (2010.02502v4), classifier-free guidance (2207.12598v1): pictures out of noise.

Document 4 has two words on diffusion, "Diffusion Based", at GLIDE (papers/glide.py). A network sees a picture
under noise and says what the noise is. Drawing begins with noise alone and takes a little of it away at every
step. A text, if there is one, says where to: what the network says with the text, minus what it says without,
is pushed further.

    symbol    shape           here            meaning
    x_0, x_t  (B, 3, S, S)    x0, x           the picture, −1 … 1, and the same under noise
    t         (B,)            t               how much noise, 0 … T − 1, counted from 0
    β_t, ᾱ_t  (T,)            betas, abar     variance of the noise of step t; ᾱ_t = ∏ (1 − β)
    β̃_t       (T,)            least           the variance of x_{t−1} where x_0 is known
    ε         (B, 3, S, S)    noise           N(0, 1)
    s         ()              scale           of the guidance; 1 is none

    (G1)  x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε                                           DDPM, Eq. 4
    (G2)  L = ‖ε − ε_θ(x_t, t, c)‖²                                               DDPM, Eq. 14
    (G3)  ε̂ = ε_θ(x_t, ∅) + s (ε_θ(x_t, c) − ε_θ(x_t, ∅))                         GLIDE, §2.3
    (G4)  μ = √ᾱ_{t−1} β_t/(1−ᾱ_t) x̂_0 + √(1−β_t) (1−ᾱ_{t−1})/(1−ᾱ_t) x_t         DDPM, Eq. 7
    (G5)  x_{t−1} = μ + σ ε, nothing at t = 0;  σ² = β_t, or β̃_t = β_t (1−ᾱ_{t−1})/(1−ᾱ_t),
          or learned between the two: log σ² = f log β_t + (1 − f) log β̃_t, f = (v + 1)/2
    (G6)  x_u = √ᾱ_u x̂_0 + √(1 − ᾱ_u) ε̂                                           DDIM, from t to any u < t

Where papers and code differ: β̃_0 is 0 and has no logarithm, the code takes β̃_1. The code clips x̂_0 to
−1 … 1 before (G4). The paper of guidance writes (1 + w) ε(c) − w ε(∅), which is (G3) with s = 1 + w. With a
learned σ² the code guides the three colours alone. GLIDE keeps the schedule in float64, another library in
float32; their steps are up to 2e-4 apart.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_betas(T: int) -> Tensor:
    """From 0.0001 to 0.02 at DDPM's T = 1000, more per step where there are fewer."""
    return torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64)


def cosine_betas(T: int) -> Tensor:
    """ᾱ falls as a squared cosine (2102.09672v1, Eq. 17): GLIDE's base model."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


class Diffusion:
    """The chain of noises. Pictures are (B, 3, S, S), times (B,) int64."""

    def __init__(self, betas: Tensor):
        self.betas, self.abar = betas, (1 - betas).cumprod(0)
        self.before = F.pad(self.abar[:-1], (1, 0), value=1.0)                  # ᾱ_{t−1}
        self.least = betas * (1 - self.before) / (1 - self.abar)                # β̃_t

    @staticmethod
    def at(values: Tensor, t: Tensor) -> Tensor:
        """(T,), (B,) → (B, 1, 1, 1)."""
        return values.to(t.device)[t].float().view(-1, 1, 1, 1)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        abar = self.at(self.abar, t)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise                     # (G1)

    def clean(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x̂_0 of x_t and what the network says its noise is."""
        abar = self.at(self.abar, t)
        return (x - (1 - abar).sqrt() * noise) / abar.sqrt()                    # (G1)

    def noise_of(self, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """ε of x_t and a forecast x̂_0."""
        abar = self.at(self.abar, t)
        return (x - abar.sqrt() * x0) / (1 - abar).sqrt()                       # (G1)

    def mean(self, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        beta, abar, before = (self.at(values, t) for values in (self.betas, self.abar, self.before))
        ahead = (1 - beta).sqrt() * (1 - before) / (1 - abar) * x
        return before.sqrt() * beta / (1 - abar) * x0 + ahead                   # (G4)

    def variance(self, t: Tensor, v: Tensor | float = -1.0) -> Tensor:
        """σ²: β̃ at v = −1, β at v = 1, between them what the network says."""
        least = self.at(torch.cat((self.least[1:2], self.least[1:])), t)
        f = (v + 1) / 2
        return (f * self.at(self.betas, t).log() + (1 - f) * least.log()).exp()                 # (G5)

    def step(self, x: Tensor, t: Tensor, x0: Tensor, noise: Tensor, v: Tensor | float = -1.0) -> Tensor:
        """DDPM: from x_t to x_{t−1}."""
        noisy = (t > 0).view(-1, 1, 1, 1)
        return self.mean(x, t, x0) + noisy * self.variance(t, v).sqrt() * noise                 # (G5)

    def jump(self, x0: Tensor, u: Tensor, noise: Tensor) -> Tensor:
        """DDIM: to time u, with the noise that was found; u = −1 is the picture itself."""
        noisy = self.add_noise(x0, u.clamp(min=0), noise)
        return torch.where((u < 0).view(-1, 1, 1, 1), x0, noisy)                # (G6)


def guide(with_text: Tensor, without: Tensor, scale: float) -> Tensor:
    return without + scale * (with_text - without)                              # (G3)
