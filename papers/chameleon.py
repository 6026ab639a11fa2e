"""Chameleon (2405.09818v1): one decoder, one vocabulary, and pictures are words too (early fusion).

A picture of 512 pixels is 1,024 codes of a VQ-GAN (papers/vq.py). The 8,192 codes are among the 65,536 ids of
the vocabulary, not added to them. Text and pictures stand in any order in one stream with one loss; the same
weights answer about pictures and draw them. What had to be solved is stability: the two kinds of tokens share
all weights and compete by growing their norms, which a softmax does not see until bfloat16 gives out.

    symbol   shape            here         meaning
    q, k     (B, H, T, E)     QKLayerNorm  each head normed over E, ahead of RoPE; weights, biases (H|G, E)
    Z        (B, T)           z_loss       Σ_i exp(logit_i)
    y        (B, N) int64     codes        of a picture, between <boi> and <eoi>

    (H1)  7B    h = x + Attn(norm₁ x),   out = h + FFN(norm₂ h)             LLaMA's order, dropout 0.1
    (H2)  34B   h = x + norm₁(Attn x),   out = h + norm₂(FFN h)             the same norms behind, no dropout
    (H3)  q ← LN(q) w_q + b_q,  k ← LN(k) w_k + b_k                         both sizes
    (H4)  L = CE + 1e-5 mean log² Z                                         both sizes

Document 3 prints the weight of (H4) as 10e−5, ten times the paper's 10⁻⁵; on logits (2, 1, 0.5, −1) and
target 0, CE 0.495182 becomes 0.4952441, and 0.4958 by the slip. It gives the order (H2) without saying that
it is the 34B's alone, and says that the 34B needed the z-loss only; it has all of (H2), (H3) and (H4).
Without (H3) the 7B diverges after a fifth of an epoch; (H2) is as good as dropout for the 7B, dropout does
not save the 34B.

Paper and published code: the norms of (H3) have a weight per head because the shards of the training were
never averaged. A picture is <racm3:break>, 1,024 codes, <eoss>. transformers sets the logits of all codes to
the lowest float: its model can answer and never draw. The authors' inference allows or forbids ids by
position, here `Only`: inside a picture codes alone, outside words alone.

The toy: captions to pictures and pictures to answers, half and half; the loss is on what follows
the prompt (the paper's fine-tuning; its pre-training has it everywhere). The claim: one set of weights does
both. Reported: pairs found in drawn pictures as in papers/dalle.py, and answers of held-out questions, beside
chance. Paper: preferred to Gemini in 60.4 % of comparisons. A second one: without (H3) scores grow, without
(H4) log Z does (recipes chameleon-no-qk, -no-z, -z).            python train.py --recipe chameleon
"""
from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Block, Bridge, Context, Decoder, DecoderConfig
from papers.recipe import Numbers, Recipe

Z_WEIGHT = 1e-5                 # document 3's 10e-5 is 1e-4


class QKLayerNorm(nn.Module):
    """DecoderConfig.qk_norm takes this class."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        shapes = {"q": (c.heads, c.head_width), "k": (c.kv_heads, c.head_width)}
        self.weight = nn.ParameterDict({name: torch.ones(shape) for name, shape in shapes.items()})
        self.bias = nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H + G, T, E), query heads, then key heads; or (·, G, Q, E), keys alone."""
        weight, bias = (torch.cat((p["q"], p["k"]))[-x.shape[1]:, None] for p in (self.weight, self.bias))
        return F.layer_norm(x, x.shape[-1:], eps=1e-5) * weight + bias          # (H3)


class NormBehind(Block):
    """The order of the 34B."""

    def forward(self, x: Tensor, visual, layer: int, c: Context) -> Tensor:
        def attention(n: Tensor) -> Tensor:
            return self.attention(n, visual, layer, c)

        x = c.bridge.before(layer, x, visual)
        x = x + self.norm1(c.bridge.around(layer, "attention", attention, visual, x))           # (H2)
        x = c.bridge.between(layer, x, visual)
        return x + self.norm2(c.bridge.around(layer, "mlp", self.mlp, visual, x))               # (H2)


class Chameleon(Decoder):
    """norm_behind: (H2) in the place of (H1), which is LLaMA's."""

    def __init__(self, config: DecoderConfig, norm_behind: bool = False):
        super().__init__(config)
        if norm_behind:
            self.layers = nn.ModuleList(NormBehind(config) for _ in range(config.layers))


SIZE_7B = DecoderConfig(65536, 4096, 32, 32, 32, 128, 11008, tied=False, qk_norm=QKLayerNorm, context=4096)
SIZE_34B = replace(SIZE_7B, width=8192, layers=48, heads=64, kv_heads=8, hidden=22016)


def z_loss(logits: Tensor) -> Tensor:
    """(…, V) → (…): log² Z."""
    return logits.float().logsumexp(-1).square()


def chameleon_loss(logits: Tensor, target: Tensor, weight: float = Z_WEIGHT) -> Tensor:
    """The sum of (H4) over (n, V) logits and their targets."""
    return F.cross_entropy(logits.float(), target, reduction="sum") + weight * z_loss(logits).sum()     # (H4)


class Only(Bridge):
    """While decoding: ids below `first` have no chance, those from `last` on not even logits."""

    def __init__(self, first: int, last: int):
        super().__init__()
        self.first, self.last = first, last

    def head(self, h: Tensor, head) -> Tensor:
        logits, ids = head(h), torch.arange(self.last, device=h.device)
        logits = logits[..., :self.last]
        return logits.masked_fill(ids < self.first, -math.inf)


# The paper's 9.2T tokens (4.4T, 2.1 times) are so many batches of 2²³; its decay is exponential, not linear.
RECIPES = {
    name: Recipe(
        f"Chameleon (2405.09818v1): a decoder learns to read and to write pictures as words; {what}",
        "9.2T tokens of text, pairs and documents",
        Numbers(1e-4, 2048, 1_097_000, 4000, "linear", 0.1, 0.95), Numbers(1.5e-3, 16, 3500),
        trained=("embed", "layers", "norm"), task=name.removesuffix("-2"), start="vq")
    for name, what in (("chameleon-2", "QK-norm, z-loss"), ("chameleon-no-qk", "without QK-norm"),
                       ("chameleon-no-z", "without z-loss"), ("chameleon-z", "z-loss of weight 0.01"))}
RECIPES |= {
    f"chameleon-{name}": Recipe(
        f"Chameleon's data of fine-tuning (§3), learned from scratch: of the answers {share} are pictures",
        "1.6M texts to 64K pictures, batch 128, 1e-5; the steps are not in our sources", None,
        Numbers(1.5e-3, 16, 300), trained=("embed", "layers", "norm"), task=f"chameleon-{name}",
        start="vq")
    for name, share in (("even", "50 %"), ("words", "5 %"))}
