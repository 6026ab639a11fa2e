"""Frozen (2106.13884v2): the ancestor of all prefix bridges, whose VISION ENCODER learns through a frozen
decoder."""
from __future__ import annotations

from torch import Tensor, nn

from model import Bridge, DecoderConfig
from papers.recipe import MUON, Numbers, Recipe


class Frozen(Bridge):
    """The whole picture in a few soft tokens (Frozen, 2106.13884v2, §3.1).

    symbol   shape         here      meaning
    z        (ΣM, Di)      z         the mean over all patches, as the paper's NF-ResNet-50 pools its cells
    W        (nD, Di)      map       trained together with the whole encoder; the decoder is frozen
    H_v      (ΣM, n, D)    return    n = 2 soft tokens

    (R1)  H_v = reshape(W z + b)
    """
    name, soft_tokens, reads = "frozen", True, -1

    def __init__(self, decoder: DecoderConfig, vision_width: int, tokens: int = 2):
        super().__init__()
        self.tokens = tokens
        self.map = nn.Linear(vision_width, tokens * decoder.width)

    def prefix(self, visual: Tensor) -> Tensor:
        return self.map(visual.mean(1)).unflatten(-1, (self.tokens, -1))        # (ΣM, n, D)   (R1)


PAPER = Numbers(3e-4, 128, 39000, 1, "constant", 0.0, 0.95, 0)
RECIPES = {
    "frozen": Recipe(
        "Frozen (2106.13884v2 §3.2): the vision encoder and a map to 2 tokens learn THROUGH a frozen decoder",
        "CC3M, 3.3M pairs", PAPER, Numbers(2e-3, 64, 1000, **MUON),
        "frozen", ("bridge", "vit"), options=dict(reads=-1, tokens=2)),
    "frozen-tuned": Recipe(
        "Frozen's ablation (§4): the decoder learns, too", "CC3M, 3.3M pairs", PAPER,
        Numbers(2e-3, 64, 1000, optimizer="muon", muon_lr=0.01),
        "frozen", ("bridge", "vit", "decoder"), options=dict(reads=-1, tokens=2)),
}
