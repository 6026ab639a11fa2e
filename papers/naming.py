"""Naming by the nearest text (CLIP, 2103.00020v1 §3.1), and retrieval both ways, on new renderings.

    (N1)  name(x) = argmax_c cos(image(x), text(c))       over the names c of all data sets of the run

Known things are shown in new renderings. Held-out things have names that no picture of training had; a tower
that has met neither cannot know them, so their line is close to chance, and it is no part of the gate.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import data
from papers.contrasts import recall_at_1
from papers.recipe import Task

GATE = 0.80


def item_of_turn(worlds: list, i: int) -> tuple:
    """(data set, number there) of the i-th item, where the data sets take turns; one may have several."""
    turn = i % len(worlds)
    mine = [other is worlds[turn] for other in worlds]
    return worlds[turn], i // len(worlds) * sum(mine) + sum(mine[:turn])


@torch.no_grad()
def report_naming(task: Task) -> dict[str, dict[str, float]]:
    """Print a line for the known and the held-out pictures of each data set of ClipTask, then the gate."""
    clip, given = task.module, task.given

    def embed(kind: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([kind(part.to(given.device)) for part in x.split(256)])        # (n, E), of length 1

    sets = [(world.name, known, *given.named_pictures(world, known))
            for world in dict.fromkeys(given.worlds) for known in (True, False)]
    every = sorted({name for *_, names in sets for name in names})
    among, result = embed(clip.embed_texts, task.tokens(every)), {}             # (C, E)
    for world, known, pictures, names in sets:
        if not pictures:
            continue
        pixels = data.to_pixels(pictures, clip.vit.config.image_size, given.processor)
        images = embed(clip.embed_images, pixels)       # (n, E)
        nearest = (images @ among.T).argmax(1).tolist()                         # (N1)
        right = [every[c] == name for c, name in zip(nearest, names)]
        same = torch.tensor([[a == b for b in names] for a in names])
        own = among[[every.index(name) for name in names]]
        scores = {"named": float(np.mean(right)), "chance": 1 / len(every), "pictures": len(names)}
        scores |= recall_at_1((images @ own.T).cpu(), same)
        what = "new renderings of known things" if known else "held-out pictures"
        result[f"{world}, {what}"] = scores
        print(f"naming   {world}: {len(names)} {what}, {100 * scores['named']:.1f} % nearest to their own of "
              f"{len(every)} names; R@1 {100 * scores['image to text R@1']:.1f} % image to text, "
              f"{100 * scores['text to image R@1']:.1f} % text to image")
        wrong = [f'"{name}" → "{every[c]}"' for name, c, ok in zip(names, nearest, right) if not ok]
        if wrong:
            print(f"         wrong, for example: {', '.join(wrong[::1 + len(wrong) // 4][:4])}")
    worst = min(scores["named"] for where, scores in result.items() if where.endswith("known things"))
    print(f"gate     {'PASSED' if worst >= GATE else 'NOT PASSED'}: of known things {100 * worst:.1f} % are "
          f"named, the gate is {100 * GATE:.0f} %")
    return result
