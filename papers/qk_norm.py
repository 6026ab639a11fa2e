"""Query-key normalisation (2302.05442v1, §2): queries and keys are normed before their product.

Large decoders diverge when scores grow; a norm bounds them. Here as Qwen3 has it (2505.09388v1, §2): an
RMSNorm of the E numbers of each head, ahead of RoPE. All query heads share a weight, all key heads another.

    (N1)  q ← q / √(mean q² + ε) · w_q;   k ← k / √(mean k² + ε) · w_k

DecoderConfig.qk_norm takes the class. model.Attention makes it and calls it.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from model import DecoderConfig


class QKNorm(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.heads, self.kv_heads, self.eps = c.heads, c.kv_heads, c.norm_eps
        self.q, self.k = (nn.Parameter(torch.ones(c.head_width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H + G, T, E), query heads, then key heads; or (·, G, Q, E), keys alone."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        weight = torch.cat((self.q.expand(self.heads, 1, -1), self.k.expand(self.kv_heads, 1, -1)))
        return weight[-x.shape[1]:] * y.to(x.dtype)                             # (N1)
