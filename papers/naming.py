"""Naming by the nearest text (CLIP, 2103.00020v1 §3.1), and retrieval both ways, on new renderings.

    (N1)  name(x) = argmax_c cos(image(x), text(c))       over the names c of all data sets of the run

Known things are shown in new renderings, or, where training shows pictures on disk as they are, so: then the
gate says that it is about pictures that training has met. Held-out drawings have names of their own. Of a
folder the pictures alone are held out: a name may be that of training's pictures, too. What a tower has met
under no name it cannot name, so these lines are no part of the gate.
"""
from __future__ import annotations

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

    def see(pictures: list[np.ndarray]) -> Tensor:
        pixels = data.to_pixels(pictures, clip.vit.config.image_size, given.processor)
        return clip.embed_images(pixels.to(given.device))                       # (n, E), of length 1

    sets = [(world.name, part) for world in dict.fromkeys(given.worlds)
            for part in given.named_pictures(world, track=given.track)]
    every = sorted({name for _, part in sets for name in part.names})
    texts = task.tokens(every).to(given.device)
    among = torch.cat([*map(clip.embed_texts, texts.split(256))])               # (C, E)
    result, known = {}, []
    for world, part in sets:
        names, pictures = part.names, part.pictures
        parts = [pictures[i:i + 256] for i in range(0, len(pictures), 256)]
        images = torch.cat([*map(see, given.track(parts, "pictures"))])
        nearest = (images @ among.T).argmax(1).tolist()                         # (N1)
        right = [every[c] == name for c, name in zip(nearest, names)]
        same = torch.tensor([[a == b for b in names] for a in names])
        own = among[[every.index(name) for name in names]]
        scores = {"named": float(np.mean(right)), "chance": 1 / len(every), "pictures": len(names)}
        scores |= recall_at_1((images @ own.T).cpu(), same)
        result[f"{world}, {part.what}"] = scores
        known += [(scores["named"], part.what)] * part.known
        print(f"naming   {world}: {len(names)} {part.what}, {100 * scores['named']:.1f} % nearest to their "
              f"own of {len(every)} names; R@1 {100 * scores['image to text R@1']:.1f} % image to text, "
              f"{100 * scores['text to image R@1']:.1f} % text to image")
        wrong = [f'"{name}" → "{every[c]}"' for name, c, ok in zip(names, nearest, right) if not ok]
        if wrong:
            print(f"         wrong, for example: {', '.join(wrong[::1 + len(wrong) // 4][:4])}")
    worst, what = min(known)
    print(f"gate     {'PASSED' if worst >= GATE else 'NOT PASSED'}: of {what} {100 * worst:.1f} % "
          f"are named, the gate is {100 * GATE:.0f} %")
    return result
