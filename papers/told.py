"""papers/told.py: a picture told to a frozen language model in the model's own words.

A mapper (MAPL's, or BLIP-2's Q-Former) writes one vector per word, and the nearest word of a vocabulary takes
its place: the words are text, and can be read. A few learned vectors around them (prompt tuning) tell the
model what they are. Quantised by a language model's table, pictures are in LQAE (2302.00902) and SPAE
(2306.17842), too; both are named from memory, and the training here is not theirs.

    symbol    shape            here       meaning
    f(x)      (ΣM, S·k, D)     soft       the mapper's: S slots of k tokens, a name each, from left to right
    e_v       (V', D)          words      rows of the decoder's table: the tokens of all names, the line end
    P         (a + b, D)       prompts    learned: a in front of the words, b behind them

    (T1)  L = − mean log softmax_v(β cos(f(x), e_v))_w       stage 1: w are the names, then line ends; β = 30
    (T2)  y(x) = e_n,  n = argmax_v cos(f(x), e_v)           a word, and nothing between words
    (T3)  prefix = [P_1…a ; y(x) ; P_a+1…a+b]                stage 2: captions and answers train P alone

Why words: with a mapper's own f(x) in their place a small model does not read them. Where a name is right by
(T2), its first tokens have a cosine of 0.53 with their rows and half their length. Why P: behind "Question:
What is this? Answer:" SmolLM2-135M repeats none of 8 names that stand in front of it, with P it does after 40
steps. No gradient passes (T2), so each stage trains one part.

Run       python train.py --recipe told --data emoji --vit weights/vit-pictures --lm SMOLLM2       both stages
Content   Told, ToldTask, RECIPES
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridges import MAPL, QFormer
from model import Bridge, DecoderConfig, ImagePositions
from papers.recipe import MUON, Numbers, Recipe
from papers.word import WordTask

GAIN = 16                               # P is GAIN times a parameter: a step of P is GAIN times the rate
SCENES = 400                            # in the report of stage 1


class Told(Bridge):
    """S names of up to k tokens as words, between learned vectors. mapper: mapl or qformer."""
    name, soft_tokens, reads, reads_cls = "told", True, -1, True

    def __init__(self, decoder: DecoderConfig, vision_width: int, slots: int = 3, tokens: int = 6,
                 ahead: int = 2, behind: int = 6, vocabulary: int = 2048, mapper: str = "mapl",
                 width: int = 256, layers: int = 4, heads: int = 8):
        super().__init__()
        if mapper not in ("mapl", "qformer"):
            raise ValueError(f"told's mapper is mapl or qformer, not {mapper!r}.")
        self.slots, self.tokens, self.ahead = slots, tokens, ahead
        K = slots * tokens
        if mapper == "mapl":
            self.mapper = MAPL(decoder, vision_width, K, width, layers, heads)
        else:
            self.mapper = QFormer(decoder, vision_width, K, width, layers, heads, 4 * width, cross_every=1,
                                  dropout=0.0)          # small, and every layer looks
        self.prompts = nn.Parameter(torch.empty(ahead + behind, decoder.width).uniform_(-0.5, 0.5) / GAIN)
        self.words = nn.Parameter(0.02 * torch.randn(vocabulary, decoder.width))        # stage 1 writes them
        self.requires_grad_()

    def requires_grad_(self, requires_grad: bool = True) -> Told:
        super().requires_grad_(False)
        self.prompts.requires_grad_(requires_grad)      # no gradient passes (T2)
        return self

    def see(self, features: Tensor, where: ImagePositions | None = None) -> Tensor:
        return self.mapper.see(features, where)

    def soft(self, visual: Tensor) -> Tensor:
        return self.mapper.prefix(visual).float()                               # (ΣM, S·k, D)   f(x)

    def nearest(self, soft: Tensor) -> Tensor:
        """(…, D) → (…) numbers of words; a row of zeros is none."""
        words = self.words.float()
        cosines = F.normalize(soft, dim=-1) @ F.normalize(words, dim=-1).T      # (…, V')
        return cosines.masked_fill(~words.any(-1), -2.0).argmax(-1)

    def prefix(self, visual: Tensor) -> Tensor:
        y = self.words[self.nearest(self.soft(visual))]                         # (ΣM, S·k, D)   (T2)
        P = (GAIN * self.prompts).to(y.dtype).expand(len(y), -1, -1)
        return torch.cat((P[:, :self.ahead], y, P[:, self.ahead:]), dim=1)      #                (T3)


class ToldTask(WordTask):
    """Stage 1: recipe word's task for whole names, several to a picture; the bridge keeps its vocabulary."""

    def __init__(self, *given):
        super().__init__(*given)
        bridge = self.module.bridge
        rows = self.module.decoder.embed.weight.detach()[self.read_ids]
        room = len(bridge.words)
        if len(rows) > room:
            raise ValueError(f"the names have {len(rows):,} different tokens, the bridge has room for "
                             f"{room:,}; give --option vocabulary={len(rows)}.")
        with torch.no_grad():
            bridge.words.zero_()[:len(rows)] = rows
        self.expect = f"(a uniform guess over the names' tokens: ln {len(rows)} = {np.log(len(rows)):.2f})"

    def freeze(self, trained: tuple[str, ...], stored: torch.dtype) -> None:
        super().freeze(trained, stored)
        self.module.bridge.mapper.requires_grad_()
        self.module.bridge.prompts.requires_grad_(False)

    def shape(self) -> tuple[int, int]:
        return self.module.bridge.slots, self.module.bridge.tokens

    def soft(self, features: Tensor) -> Tensor:
        bridge = self.module.bridge
        return bridge.soft(bridge.see(features))

    def losses(self, soft: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        return {"words": self.words_loss(soft, numbers)}                        #                (T1)

    def ask(self, features: Tensor) -> list[str]:
        return [""] * len(features)                     # before stage 2 no P has learned

    def report(self, out: Path) -> dict[str, dict]:
        """Recipe word's, and the share of names that are read in their places, by how many there are."""
        files = super().report(out)
        rng, by_count = np.random.default_rng(self.given.seed), {}
        scenes = [self.things.scene(rng, self.slots) for _ in range(SCENES)]
        for i in range(0, SCENES, 100):
            images = [self.things.draw(scene, i, True) for scene in scenes[i:i + 100]]
            read = self.read_slots(self.features_of(images))
            for scene, names in zip(scenes[i:i + 100], read):
                right = [self.things.words[n] == name for n, name in zip(scene, names)]
                by_count.setdefault(len(scene), []).append(np.mean(right))
        for count, shares in sorted(by_count.items()):
            print(f"scenes   {len(shares)} new renderings of {count}: {100 * np.mean(shares):.1f} % of names")
            files["words.json"]["scores"][f"of {count}"] = float(np.mean(shares))
        return files


SIZES = dict(reads=-2, layers=2, heads=4)
RECIPES = {
    "told-1": Recipe(
        "pictures as words: the mapper learns to write the names of what a picture shows",
        "named pictures; no paper's recipe", None, Numbers(2e-3, 64, 3200, **MUON), "told", task="told-1",
        options=SIZES, toy_data="emoji"),
    "told-2": Recipe(
        "pictures as words: learned vectors around them tell a frozen language model to read them",
        "captions and questions; no paper's recipe", None, Numbers(2e-3, 32, 80), "told",
        options=SIZES, captions=0.7, toy_data="emoji", start="told-1")}
