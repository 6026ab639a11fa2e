"""Which text is a picture's own: how the tasks that pair pictures with texts are examined.

Beside the true text stand false ones that say almost the same (support/worlds/pairs.py), two in the bundled
worlds: chance is one third. Asked are new pictures of known pairs of a colour and a shape: where the true
text has a pair that no training text had and the false ones do not, the likelier text is the wrong one.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import Shapes, to_pixels
from papers.recipe import Task


class ChoiceTask(Task):
    """A task that scores texts of a picture. Takes open_held_out, contrastive_pair, processor, name_split."""
    image_size: int

    def scores(self, pixels: Tensor, texts: list[str]) -> dict[str, Tensor]:
        """pixels (1, 3, S, S), n texts → scores (n,) by name; the highest should be the true text's."""
        raise NotImplementedError

    def open_asked(self):
        """Scenes of the split `val`: see above."""
        world = self.given.world
        return Shapes(world.seen, world.seed) if world.says_scenes else self.given.open_held_out()

    @torch.no_grad()
    def check(self, count: int = 100) -> dict[str, float]:
        """By the name of each score: the share of held-out pictures whose own text scores highest; chance."""
        g, right, chance = self.given, {}, []
        world = self.open_asked()
        for i in range(min(count, len(world)) if world.finite else count):
            image, true, false = g.contrastive_pair(world, i)
            pixels = to_pixels([image], self.image_size, g.processor).to(g.device)
            for name, scores in self.scores(pixels, [true, *false]).items():
                right.setdefault(name, []).append(int(scores.argmax()) == 0)
            chance.append(1 / (1 + len(false)))
        return {name: float(np.mean(hits)) for name, hits in (right | {"chance": chance}).items()}

    def report(self, out: Path) -> dict[str, dict]:
        result, split = self.check(self.given.eval_items), self.given.name_split(self.open_asked())
        scores = "  ".join(f"{name} {100 * share:.1f}" for name, share in result.items())
        print(f"the text of {split} pictures among almost true ones, % right: {scores}")
        return {"results.json": result}
