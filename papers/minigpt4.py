"""MiniGPT-4 (2304.10592v2): BLIP-2's Q-Former, frozen, and ONE linear map into a frozen chat model.

Document 1 names it under "only learn the mapping network", document 3 its successor MiniGPT-v2 in one line;
neither gives an equation, and the paper numbers none. What learns is said right and is less than a mapping
network: W and b alone. The queries, their layers and the LayerNorm ahead of them come from BLIP-2 and stay.

    symbol   shape           here          meaning
    X                        pixels        a picture
    z        (ΣM, N, Di)     features      tokens of the frozen EVA tower; with the class token in (G1) only
    Q        (ΣM, 32, 768)   visual        states of the queries; no norm between them and W
    W        (D, 768)        project       learns; in (G2) map (D, join·Di)
    p        (ΣM, K, D)      return        soft tokens: K = 32, in (G2) N / join

    (G1)  Q = QFormer(queries, LN(ViT(X)));   p = W Q + b
    (G2)  z = LN(ViT(X)) without its class token;   p = W reshape(z, (N/4, 4·Di)) + b

(G2) is the variant for LLaMA-2, and MiniGPT-v2's: four CONSECUTIVE tokens side by side, a piece of one row of
the picture, not a block of 2 x 2. In the authors' code nothing fills its LN, which is frozen as it was made:
1 and 0 (norm_weights=False). ε of LN is 1e-5, of the Q-Former 1e-12. Frozen means evaluation mode, too:
its dropout is 0. Both stages train W and b, the first on captions with no prompt at all, the second on about
3,500 long descriptions (400 steps of 12 in the paper, 1,000 in the code) between ###Human: and ###Assistant:.

The claim: the Q-Former is no bottleneck, and one linear layer is enough (Table 5, AOK-VQA / GQA): as it is
58.2 / 32.2; without it 56.9 / 33.4; three linear layers 49.7 / 31.0; the Q-Former tuned, too, 52.1 / 28.0. In
miniature: these four on 96 pictures, behind the Q-Former of BLIP-2's two stages on all. What the second stage
mends (failures of 100, Table 3: detailed captions 35 → 2, poems 32 → 1) has no counterpart here: a small
decoder that knows nothing but scenes breaks off no caption.

    python train.py --bridge minigpt4 --init out/blip2-2        takes the Q-Former of a run of BLIP-2's stages

Without --init the Q-Former is frozen as it was born: random features. After 150 steps of 32 pictures its loss
still fell, and its answers were as good as blind (26.7 and 27.1 %).
"""
from __future__ import annotations

from torch import Tensor, nn

from bridges import QFormer
from model import Bridge, DecoderConfig, ImagePositions
from papers import blip2_stage1
from papers.recipe import Numbers, Recipe


class MiniGPT4(QFormer):
    """Learns 3,149,824 parameters at D 4096 (Vicuna-7B), 3,937,280 at D 5120 (13B).

    maps: that many linear layers, one behind the other; tuned: the Q-Former learns, too (both Table 5).
    """
    name = "minigpt4"

    def __init__(self, decoder: DecoderConfig, vision_width: int, queries: int = 32, width: int = 768,
                 layers: int = 12, heads: int = 12, hidden: int = 3072, cross_every: int = 2, maps: int = 1,
                 tuned: bool = False):
        super().__init__(decoder, vision_width, queries, width, layers, heads, hidden, cross_every, dropout=0)
        D, self.tuned = decoder.width, tuned
        if maps > 1:
            self.project = nn.Sequential(self.project, *(nn.Linear(D, D) for _ in range(maps - 1)))
        self.requires_grad_()

    def requires_grad_(self, requires_grad: bool = True) -> MiniGPT4:
        """The map learns or not; everything else never does, unless it is tuned."""
        super().requires_grad_(requires_grad and self.tuned)
        self.project.requires_grad_(requires_grad)                              #               (G1)
        return self


class MiniGPT4Llama2(Bridge):
    """Learns 23,072,768 parameters from EVA (Di 1408) to LLaMA-2 7B (D 4096)."""
    name, soft_tokens, reads = "minigpt4_llama2", True, -1

    def __init__(self, decoder: DecoderConfig, vision_width: int, join: int = 4, norm_weights: bool = True):
        super().__init__()
        self.join = join
        self.vision_norm = nn.LayerNorm(vision_width, elementwise_affine=norm_weights)
        self.map = nn.Linear(join * vision_width, decoder.width)
        self.requires_grad_()

    def requires_grad_(self, requires_grad: bool = True) -> MiniGPT4Llama2:
        super().requires_grad_(requires_grad)
        self.vision_norm.requires_grad_(False)
        return self

    def see(self, features: Tensor, where: ImagePositions | None = None) -> Tensor:
        if features.shape[1] % self.join:
            raise ValueError(f"{features.shape[1]} tokens of the ViT do not divide into groups of "
                             f"{self.join}; change the option join.")
        return self.vision_norm(features)

    def prefix(self, visual: Tensor) -> Tensor:
        z = visual.unflatten(1, (-1, self.join)).flatten(2)                     # (ΣM, N/4, 4·Di)
        return self.map(z)                                                      # (ΣM, N/4, D)  (G2)


# The paper's cosine falls to 80 % of the peak, ours to 2 %. The bundled ViT has rows of 3 patches, but the
# bundled decoder learned to read one thing per position (worlds/text.py), so the toy joins none.
PAPER = Numbers(1e-4, 256, 20000, 5000, "cosine", 0.05, 0.999, 0, floor=0.8)
SIZES = {k: v for k, v in blip2_stage1.RECIPES["blip2-1"].options.items() if k != "dropout"}
RECIPES = {
    "minigpt4": Recipe(
        "MiniGPT-4 stage 1 (2304.10592v2 §3.1): a linear map learns behind a frozen Q-Former",
        "LAION, CC, SBU: 5M pairs", PAPER, Numbers(6e-3, 64, 1600), "minigpt4", options=SIZES),
    "minigpt4_llama2": Recipe(
        "MiniGPT-4 for LLaMA-2, published code: a linear map of four patches side by side learns",
        "LAION, CC, SBU: 5M pairs", PAPER, Numbers(6e-3, 64, 1600), "minigpt4_llama2",
        options=dict(reads=-2, join=1)),
}
