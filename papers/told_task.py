"""papers/told_task.py: the training of told.py: names as words, then what reads them.

Stage 1 shows up to three named things, new on each step, and has (T1) alone; stage 2 is the usual answer task
on captions and questions.                                             python train.py --recipe told
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from papers.recipe import MUON, Numbers, Recipe
from papers.word import WordTask

SCENES = 400                            # in the report of stage 1


class ToldTask(WordTask):
    """Stage 1: recipe word's task for whole names, several to a picture; the bridge keeps its vocabulary."""

    def __init__(self, *given):
        super().__init__(*given)
        words = self.module.bridge.writer.words
        rows = self.module.decoder.embed.weight.detach()[self.read_ids]
        room = len(words)
        if len(rows) > room:
            raise ValueError(f"the names have {len(rows):,} different tokens, the bridge has room for "
                             f"{room:,}; give --option vocabulary={len(rows)}.")
        with torch.no_grad():
            words.zero_()[:len(rows)] = rows
        self.expect = f"(a uniform guess over the names' tokens: ln {len(rows)} = {np.log(len(rows)):.2f})"

    def freeze(self, trained: tuple[str, ...], stored: torch.dtype) -> None:
        super().freeze(trained, stored)
        self.module.bridge.writer.mapper.requires_grad_()
        self.module.bridge.prompts.requires_grad_(False)

    def shape(self) -> tuple[int, int]:
        return self.module.bridge.slots, self.module.bridge.tokens

    def soft(self, features: Tensor) -> Tensor:
        bridge = self.module.bridge
        return bridge.writer.soft(bridge.see(features))

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
        options=SIZES, captions=0.7, toy_data="emoji", start="told-1"),
    "told-2-flamingo": Recipe(
        "pictures as words: Flamingo's layers learn to read them to a frozen language model",
        "captions and questions; no paper's recipe", None, Numbers(4e-3, 32, 300, **MUON), "told_flamingo",
        options=SIZES, captions=0.7, turns=1, toy_data="emoji", start="told-1")}
