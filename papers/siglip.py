"""SigLIP (2303.15343v4): two towers that learn by one yes-or-no question per pair, without a softmax.

Content  SiglipConfig, AttentionPool, SiglipViT       the image tower and its pooling head
         SiglipText, Siglip, sigmoid_loss             the text tower, the pair, the loss

Against CLIP (papers/clip.py) the image tower has no class token and no norm ahead of its blocks, a bias in
its patches and the tanh form of GELU. The text tower is not causal, and is read at its last position.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ACTIVATIONS, Attend, ViT, ViTConfig, merge_heads, split_heads
from papers.clip import TextConfig, TextTransformer


@dataclass(frozen=True)
class SiglipConfig(ViTConfig):
    act: str = "gelu_tanh"
    norm_eps: float = 1e-6
    cls: bool = False
    pre_norm: bool = False
    patch_bias: bool = True
    head: bool = True           # the pooling head; a tower published for its patches alone has none


class AttentionPool(nn.Module):
    """One learned probe attends to all tokens; a residual feed-forward follows (in the published code only).

    symbol   shape        here      meaning
    p        (1, 1, Di)   probe     the learned query
    x        (B, N, Di)   x         the last state after the final norm

    (G1)  y = W_o MHA(p, x, x)
    (G2)  pooled = y + W_down act(W_up LN y)
    """

    def __init__(self, c: ViTConfig):
        super().__init__()
        self.heads, self.act = c.heads, ACTIVATIONS[c.act]
        self.probe = nn.Parameter(torch.randn(1, 1, c.width))
        self.q, self.k, self.v, self.o = (nn.Linear(c.width, c.width) for _ in range(4))
        self.norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.up, self.down = nn.Linear(c.width, c.hidden), nn.Linear(c.hidden, c.width)
        self.attend = Attend()

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(self.q(self.probe).expand(x.shape[0], -1, -1), self.heads)
        k, v = (split_heads(f(x), self.heads) for f in (self.k, self.v))
        y = self.o(merge_heads(self.attend(q, k, v)))                           # (B, 1, Di)   (G1)
        return (y + self.down(self.act(self.up(self.norm(y)))))[:, 0]           # (B, Di)      (G2)


class SiglipViT(ViT):
    """pixels (B, 3, S, S) → tokens (B, N, Di), N patches and nothing else."""
    family = "siglip"

    def __init__(self, config: SiglipConfig):
        super().__init__(config)
        self.head = AttentionPool(config) if config.head else None

    def pool(self, x: Tensor) -> Tensor:
        """(B, Di) from the last state."""
        if self.head is None:
            raise ValueError("this SigLIP tower has no pooling head, so it has no pooled vector; "
                             "read one of its hidden states.")
        return self.head(self.post_norm(x))


class SiglipText(TextTransformer):
    """Every token sees every other one, the padding too, which the text was trained with.

    tokens (B, T), T the context of the config (64): the published texts are padded to it.
    """

    def __init__(self, config: TextConfig, width: int):
        super().__init__(config, causal=False)
        self.head = nn.Linear(config.width, width)

    def pool(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(B, width): a linear map of the LAST position's state."""
        return self.head(x[:, -1])


class Siglip(nn.Module):
    """Two towers, a temperature and a bias (2303.15343v4, §3.2, Algorithm 1).

    symbol   shape          here            meaning
    x_i      (B, W)         embed_images    of length 1
    y_j      (B, W)         embed_texts     of length 1
    t'       ()             logit_scale     log of the temperature; log 10 at the start
    b        ()             logit_bias      −10 at the start, because most pairs do not match
    z_ij     (B, B)         ±1              1 where image i and text j belong together, else −1

    (G3)  S_ij = e^t' x_i · y_j + b                  σ(S_ij) is the probability that i and j match
    (G4)  L = −1/B Σ_i Σ_j log σ(z_ij S_ij)
    """

    def __init__(self, vit: SiglipViT, text: SiglipText):
        super().__init__()
        if vit.head is None or text.head.out_features != vit.config.width:
            raise ValueError(f"a text of width {text.head.out_features} and an image tower of width "
                             f"{vit.config.width}, {'with' if vit.head else 'without'} a pooling head, "
                             "do not make a pair.")
        self.vit, self.text = vit, text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def embed_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, W), of length 1."""
        return F.normalize(self.vit.pool(self.vit(pixels)), dim=-1)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, W), of length 1."""
        return F.normalize(self.text.pool(self.text(tokens), tokens), dim=-1)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """(B_images, B_texts) logits of a match."""
        cosine = self.embed_images(pixels) @ self.embed_texts(tokens).T
        return self.logit_scale.exp() * cosine + self.logit_bias                # (G3)


def sigmoid_loss(S: Tensor) -> Tensor:
    """(B, B) logits, matches on the diagonal → the loss of a batch. No row knows of another, unlike in CLIP.

    Example: S = [[0, −ln 3], [−ln 3, ln 3]] has σ(z S) = [[1/2, 3/4], [3/4, 3/4]], so
    L = (ln 2 + 3 ln 4/3) / 2 = 0.7781.
    """
    z = 2 * torch.eye(len(S), dtype=S.dtype, device=S.device) - 1
    return -F.logsigmoid(z * S).sum() / len(S)                                  # (G4)
