"""The task of a tokenizer of pictures (papers/vq.py, dalle.py): scenes of `shapes` in, and out again."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import data
from papers.recipe import Ingredients, Task
from papers.scene_reader import count_found, draw_scenes, read_scenes


class PictureTask(Task):
    """What the tokenizers of pictures share: scenes of `shapes` in, a report of painted ones. Takes batch."""

    def __init__(self, given: Ingredients, module: nn.Module):
        self.given, self.world = given, data.Shapes(seed=given.seed)
        self.module = module.to(given.device)

    def batch(self, step: int) -> list[dict]:
        """pixels (B, 3, 48, 48); tokens (B,): the numbers of the scenes."""
        first, B = step * self.given.batch, self.given.batch
        pixels = draw_scenes(self.world, first, B)[1]
        return [dict(pixels=pixels, tokens=torch.arange(first, first + B), set=0, weight=1.0, count=1)]

    @torch.no_grad()
    def report(self, out: Path) -> dict[str, dict]:
        """Held-out pictures: their error, the codes in use, and what a reader finds in the painted ones."""
        scenes, x = draw_scenes(data.Shapes("test", self.given.seed), 0, self.given.eval_items)
        ids = torch.cat([self.module.encode(part.to(self.given.device)) for part in x.split(50)])
        painted = torch.cat([self.module.decode(part) for part in ids.split(50)]).cpu()
        use = ids.flatten().bincount() / ids.numel()
        result = {"error": (painted - x).square().mean().item(),
                  "error of one colour": x.var((0, 2, 3), correction=0).mean().item(),
                  "codes in use": int((use > 0).sum()), "codes": len(self.module.codes),
                  "perplexity": torch.special.entr(use).sum().exp().item()}
        read = read_scenes(painted)
        for size in data.SIZES:
            named = [[t for t in things if t.size == size] for things in scenes]
            result[f"{size} things found"] = count_found(named, read)["things"]
        split = self.given.name_split(data.Shapes("test"))
        print(f"error    {result['error']:.4f} a pixel of {split} pictures (0 … 1, squared); "
              f"all in one colour: {result['error of one colour']:.4f}")
        print(f"codes    {result['codes in use']} of {result['codes']} in use, perplexity "
              f"{result['perplexity']:.1f}; {ids.shape[1]} codes are a picture")
        print(f"reader   finds {100 * result['small things found']:.1f} % of the small and "
              f"{100 * result['large things found']:.1f} % of the large things (by chance 2 %)")
        return {"results.json": result}
