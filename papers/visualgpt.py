"""VisualGPT (2102.10407v5): after each self-attention, a unit mixes what the decoder knows and what it sees.

Document 4 says in one sentence that a self-resurrecting activation unit controls the mixture of pre-trained
linguistic information and visual components; it has no formula. The unit stands in every layer, behind the
residual of the self-attention (the seam `between`), and its mixture REPLACES the stream.

    symbol   shape        here      meaning
    z        (ΣM, N, Di)  features  patches of the ViT; the authors have region features of a detector
    I_j      (ΣM, N, D)   media     level j = 1 … J of the visual encoder, J = 3; side by side, (·, N, J·D)
    H        (B, T, D)    h         the stream behind the residual of the self-attention
    X_j      (B, T, D)    x         what the words read of level j
    W_j      (D, 2D)      alpha[j]  the learned gate of a level
    τ                     tau       a gate below it is cut to zero, 0 ≤ τ < ½

    (S0)  I_0 = LN(GELU(W z + b));  I_j = Layer_j(I_{j−1})          post-norm layers, all levels are kept
    (S1)  out = σ(H)·1[σ(H) > τ]·X + (1−σ(H))·1[1−σ(H) > τ]·H       paper: no weights, element by element
    (S2)  α_j = σ(W_j [H | X_j] + c_j)                              published code
    (S3)  out = Σ_j ( α_j·1[α_j > τ]·H + (1−α_j)·1[α_j < 1−τ]·X_j ) / √J;   then out + MLP(LN_2 out)
    (S4)  X_j = W_o Attn(W_q LN H, W_k LN I_j, W_v LN I_j)          one attention and one norm for all levels

"Self-resurrecting": where τ cuts one gate, so that it has no gradient, its complement is open and moves the
same W_j: the unit can come back. Since τ < ½, one of the two is always open.

Paper and published code disagree. (1) (S1) gates with σ(H) itself, (S2) learns W_j. (2) In (S1) σ opens
VISION, in (S3) α opens LANGUAGE: (S1) is one term of (S3) at α = 1 − σ(H), and so is it computed here. (3)
The code adds J = 3 levels over √3, as a meshed memory does; the paper has one. (4) There is no residual: at
the start α ≈ ½, so that the stream shrinks to about √3/2 of itself in every layer. The decoder is not
preserved and has to learn, too. (5) τ is 0 in the training file, 0.2 in the README, which is our default.
Without effect in the code: dropout of the self-attention, and four projections (enc_dec_attn.c_attn and the
encoder's), 1,771,776 numbers a layer, which we leave out. We add three things that one picture per text did
not need. A word reads the last picture at or before it, as in Flamingo. A word without a picture keeps H, so
plain text is read as ever. And LN, in the code GPT-2's first norm of the layer, is the bridge's own.

The paper's claim: with little data the unit wins, by up to 10.8 CIDEr over the best baseline on 0.1 to 1 % of
COCO, 5.4 on Conceptual Captions. In miniature: the same cross-attention with mix = "learned" at τ 0 and 0.2,
"residual" (H + X) and "tanh" (H + tanh(g) X, Flamingo's gate), from 96 pictures.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridges import Flamingo, QFormerLayer
from model import Attend, Bridge, DecoderConfig, merge_heads, split_heads, visible_to_bias
from papers.recipe import Numbers, Recipe

MIXTURES = ("learned", "sigmoid", "residual", "tanh")


class VisualEncoder(nn.Module):
    """18,117,120 parameters at Di 2048, D 768, as many as the authors' encoder uses.

    Theirs starts with Xavier's matrices, ours as PyTorch's layers do.
    """

    def __init__(self, vision_width: int, width: int, levels: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.map, self.norm = nn.Linear(vision_width, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(QFormerLayer(width, heads, hidden, None, False, dropout)
                                    for _ in range(levels))

    def forward(self, z: Tensor, number: Tensor | None = None) -> Tensor:
        """(ΣM, N, Di) → (ΣM, N, J·D), level 1 first. `number`, of a picture in its text, is not read."""
        levels = [self.norm(F.gelu(self.map(z)))]                               # (ΣM, N, D)   (S0)
        for layer in self.layers:
            levels.append(layer(levels[-1], z.shape[1], None, None, None))      #              (S0)
        return torch.cat(levels[1:], dim=-1)


def srau(h: Tensor, x: Tensor, alpha: Tensor, tau: float) -> Tensor:
    """The self-resurrecting activation unit of one level: α opens language (h), its complement vision (x)."""
    return alpha * (alpha > tau) * h + (1 - alpha) * (alpha < 1 - tau) * x      # (S3) under the sum


class MixingBlock(nn.Module):
    """Cross-attention to the levels of the picture, and the mixture that follows the self-attention.

    W_q, W_k, W_v and the gates start as the authors'. W_o starts as PyTorch's layers do, its bias too, where
    theirs is GPT-2's: N(0, 0.02) and no bias.
    """

    def __init__(self, width: int, heads: int, levels: int, mix: str, tau: float):
        super().__init__()
        self.heads, self.mix, self.tau = heads, mix, tau
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.levels = nn.ModuleList(Attend() for _ in range(levels))    # one each, so that a hook sees it
        learned = levels if mix == "learned" else 0
        self.alpha = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(learned))
        if mix == "tanh":
            self.gate = nn.Parameter(torch.zeros(1))
        for p in (self.q, self.k, self.v):
            nn.init.xavier_uniform_(p.weight)
            nn.init.zeros_(p.bias)

    def project(self, media: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(B, M·N, J·D) → J keys, J values (B, H, M·N, E)."""
        levels = [self.norm(level) for level in media.chunk(len(self.levels), dim=-1)]
        return tuple([split_heads(f(level), self.heads) for level in levels] for f in (self.k, self.v))

    def cross(self, h: Tensor, keys: list[Tensor], values: list[Tensor], visible: Tensor) -> list[Tensor]:
        """X_j (B, T, D) of every level; visible (B, T, M·N) bool."""
        q = split_heads(self.q(self.norm(h)), self.heads)                       # (B, H, T, E)
        bias = visible_to_bias(visible[:, None], q.dtype)
        read = [attend(q, k, v, bias) for attend, k, v in zip(self.levels, keys, values)]
        return [self.o(merge_heads(y)) for y in read]                           #              (S4)

    def mixture(self, h: Tensor, x: list[Tensor]) -> Tensor:
        if self.mix == "learned":
            alphas = [f(torch.cat((h, x_j), dim=-1)).sigmoid() for f, x_j in zip(self.alpha, x)]        # (S2)
        elif self.mix == "sigmoid":
            alphas = [1 - h.sigmoid()] * len(x)                                                         # (S1)
        else:
            gate = self.gate.tanh() if self.mix == "tanh" else 1
            return h + (gate * sum(x) / math.sqrt(len(x))).to(h.dtype)
        return sum(srau(h, x_j, a, self.tau) for x_j, a in zip(x, alphas)) / math.sqrt(len(x))          # (S3)

    def forward(self, h: Tensor, keys: list[Tensor], values: list[Tensor], visible: Tensor) -> Tensor:
        if not keys[0].shape[2]:                                                # no picture in the batch
            return h
        out = self.mixture(h, self.cross(h, keys, values, visible))             # (B, T, D)
        return torch.where(visible.any(-1, keepdim=True), out.to(h.dtype), h)


class VisualGPT(Flamingo):
    """Flamingo's `see` with the visual encoder in the place of the resampler, and its call of a block, which
    here stands in the middle of every layer."""
    name = "visualgpt"
    before, between = Bridge.before, Flamingo.before

    def __init__(self, decoder: DecoderConfig, vision_width: int, levels: int = 3, heads: int = 12,
                 hidden: int = 2048, tau: float = 0.2, mix: str = "learned", dropout: float = 0.1):
        Bridge.__init__(self)                           # parts of its own
        if mix not in MIXTURES:
            raise ValueError(f'visualgpt has mix {", ".join(MIXTURES)}, not "{mix}".')
        if decoder.width % heads:
            raise ValueError(f"visualgpt: a decoder of width {decoder.width} does not divide into {heads} "
                             "heads; give heads=N.")
        self.every, self.first, self.see_all = 1, 0, False
        self.resampler = VisualEncoder(vision_width, decoder.width, levels, heads, hidden, dropout)
        self.blocks = nn.ModuleList(MixingBlock(decoder.width, heads, levels, mix, tau)
                                    for _ in range(decoder.layers))

    def gates(self) -> Tensor | None:
        """(layers, 1) of mix = "tanh"; a gate of (S2) depends on the word and has no value of its own."""
        gates = [block.gate for block in self.blocks if block.mix == "tanh"]
        return torch.stack(gates).detach().float().tanh() if gates else None


# The published code groups its parameters for a decay of 0.01, but gives AdamW all of them: its default is 0.
RECIPES = {"visualgpt": Recipe(
    "VisualGPT (2102.10407v5): encoder, units and decoder learn from captions; then CIDEr itself, at 1e-5",
    "0.1, 0.5 or 1 % of COCO, 5,664 captions: 227 steps are an epoch, early stopping says how many",
    Numbers(1e-4, 25, 227, 0, "constant", 0.0, 0.999), Numbers(1e-3, 64, 800), "visualgpt",
    ("bridge", "decoder"), options=dict(reads=-2, levels=3, heads=4, hidden=256, dropout=0.0))}
