"""ClipCap (2111.09734v1): ONE vector of CLIP becomes a prefix of K words; nothing else is read.

Document 4 says that CLIP and the language model are both frozen, that a longer prefix is better, and that
prefixes can be read as words. The paper has two variants, and the document mixes them: an MLP with the
language model TUNED, whose prefixes name what is in the picture; and a transformer with the language model
FROZEN, whose prefixes the paper calls essentially unreadable. A longer prefix helps the frozen one; with
tuning it overfits (Fig. 7). On COCO, CIDEr (Table 1): transformer, frozen 113.08; MLP, tuned 108.35;
transformer, tuned 109.83; MLP, frozen 92.38.

    symbol     shape         here         meaning
    c          (ΣM, 1, De)   visual       CLIP's pooled vector of the picture (reads = "pooled")
    p          (ΣM, K, D)    return       the prefix, read as words
    C          (K, D)        constants    learned, one copy for all pictures
    L_c                      image_tokens words that the vector becomes ahead of the constants

    (C1)  p = reshape(W_2 tanh(W_1 c + b_1) + b_2)                          W_1 (KD/2, De), W_2 (KD, KD/2)
    (C2)  x = [reshape(W c + b, (L_c, D)) ; C];   x ← Blocks(x);   p = x_{L_c:}
    (C3)  L = −Σ_j log p_θ(c_j | p_1 … p_K, c_1 … c_{j−1})                  paper Eq. 5; the loss of VLM.loss

Paper and published code agree on both forms. The authors' c is CLIP's JOINT embedding, the class token after
its last norm times the projection. A folder with a vision tower alone has no projection; it is linear, so W_1
and W take its place. The released transformer reads c / ‖c‖ (normalize=True), the released MLPs read c.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Bridge, DecoderConfig, EncoderBlock, ImagePositions
from papers.recipe import Numbers, Recipe


class ClipCap(Bridge):
    """The MLP (§3.2), trained with the language model: 31,468,800 parameters at De 512, D 768, K 10."""
    name, soft_tokens, reads = "clipcap", True, "pooled"

    def __init__(self, decoder: DecoderConfig, vision_width: int, tokens: int = 10, normalize: bool = False):
        super().__init__()
        self.tokens, self.normalize = tokens, normalize
        self.up = nn.Linear(vision_width, tokens * decoder.width // 2)
        self.down = nn.Linear(tokens * decoder.width // 2, tokens * decoder.width)

    def see(self, features: Tensor, where: ImagePositions | None = None) -> Tensor:
        return F.normalize(features, dim=-1) if self.normalize else features

    def prefix(self, visual: Tensor) -> Tensor:
        y = self.down(self.up(visual[:, 0]).tanh())                             # (ΣM, K·D)    (C1)
        return y.unflatten(-1, (self.tokens, -1))                       # (ΣM, K, D)   token index slow


class ClipCapTransformer(Bridge):
    """The transformer (§3.3): 42,728,448 parameters at De 640, D 768, K 10 (43M); the release has K 40."""
    name, soft_tokens, reads = "clipcap_transformer", True, "pooled"

    def __init__(self, decoder: DecoderConfig, vision_width: int, tokens: int = 10, image_tokens: int = 10,
                 layers: int = 8, heads: int = 8, normalize: bool = False):
        super().__init__()
        D, self.normalize = decoder.width, normalize
        self.map = nn.Linear(vision_width, image_tokens * D)
        self.constants = nn.Parameter(torch.randn(tokens, D))                   # C ~ N(0, 1)
        self.blocks = nn.ModuleList(EncoderBlock(D, heads, 2 * D, "relu", 1e-5, attention_bias="o")
                                    for _ in range(layers))

    see = ClipCap.see

    def prefix(self, visual: Tensor) -> Tensor:
        K, D = self.constants.shape
        x = self.map(visual[:, 0]).unflatten(-1, (-1, D))                       # (ΣM, L_c, D)
        x = torch.cat((x, self.constants.expand(len(x), -1, -1)), dim=1)        # (ΣM, L_c+K, D)
        for block in self.blocks:
            x = block(x)
        return x[:, -K:]                                                        # (ΣM, K, D)   (C2)


# 10 epochs of 600K captions. The published code gives transformers' AdamW no decay; its default is 0.
PAPER = Numbers(2e-5, 40, 150_000, 5000, "linear", 0.0, 0.999, 0)
COCO, BOTH = "COCO, 120K pictures x 5", ("bridge", "decoder")
MLP, TRANSFORMER = dict(tokens=8), dict(tokens=8, image_tokens=8, layers=4, heads=4)
FROZEN, TUNED = Numbers(2e-3, 64, 800, optimizer="muon"), Numbers(1e-3, 64, 600)
RECIPES = {
    "clipcap": Recipe(
        "ClipCap's MLP (2111.09734v1 §3.2): the MLP and the decoder learn from captions", COCO,
        PAPER, TUNED, "clipcap", BOTH, options=MLP),
    "clipcap-frozen": Recipe(
        "ClipCap's ablation (Table 1): the MLP learns alone, the decoder is frozen", COCO,
        PAPER, FROZEN, "clipcap", options=MLP),
    "clipcap_transformer": Recipe(
        "ClipCap's transformer (2111.09734v1 §3.3): the mapper learns, the decoder is frozen", COCO,
        PAPER, FROZEN, "clipcap_transformer", options=TRANSFORMER),
    "clipcap_transformer-tuned": Recipe(
        "ClipCap's ablation (Table 1): the transformer and the decoder learn from captions", COCO,
        PAPER, TUNED, "clipcap_transformer", BOTH, options=TRANSFORMER),
}
