"""What stands in a picture of the `shapes` world, read by comparison with everything that can stand there.

A cell of the grid is empty or shows one of 96 things (colour, shape, size) at one of 25 or 9 offsets: 1,633
patterns. The reader takes the nearest one.

    (O1)  thing(c) = argmin_t ‖x_c − t‖²                        x_c: the pixels of cell c

On drawn scenes it is always right. On painted ones (papers/vq.py, dalle.py, chameleon.py) it knows nothing of
the words that were painted, so that by chance it finds a pair of colour and shape once in 48.
"""
from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

import data
from data import BACKGROUND, CELL, COLORS, SHAPES, SIZES, Thing

UNIT = data.Processor(levels=255.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))           # pixels 0 … 1


@functools.cache
def patterns() -> tuple[list[tuple[str, str, str] | None], Tensor]:
    """(what each pattern shows: size, color, shape, or None) and the patterns (n, 16·16·3) in 0 … 1."""
    shown: list[tuple[str, str, str] | None] = [None]
    empty = np.tile(np.array(BACKGROUND, np.float32), (CELL, CELL, 1))
    drawn = [empty]
    for size, side in SIZES.items():
        jitter = 2 if size == "small" else 1            # as data.draw_scene
        offsets = [(CELL - side) // 2 + n for n in range(-jitter, jitter + 1)]
        for color, shape in ((c, s) for c in COLORS for s in SHAPES):
            for top in offsets:
                for left in offsets:
                    cell = empty.copy()
                    patch = cell[top:top + side, left:left + side]
                    patch += data.sprite(shape, size)[..., None] * (np.array(COLORS[color]) - patch)
                    shown.append((size, color, shape))
                    drawn.append(cell)
    return shown, torch.from_numpy(np.stack(drawn)).round().flatten(1) / 255


def read_scenes(pictures: Tensor) -> list[list[Thing]]:
    """(B, 3, 48, 48) in 0 … 1 → the things of each picture, row by row."""
    shown, known = patterns()
    cells = pictures.unfold(2, CELL, CELL).unfold(3, CELL, CELL)                # (B, 3, 3, 3, 16, 16)
    cells = cells.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)            # (B, 9, 16·16·3)
    nearest = (known.square().sum(1) - 2 * cells.cpu() @ known.T).argmin(-1)                    # (O1)
    found = []
    for row in nearest.tolist():
        things = [(cell, shown[n]) for cell, n in enumerate(row)]
        found.append([Thing(color, shape, size, cell) for cell, (size, color, shape)
                      in ((c, t) for c, t in things if t)])
    return found


def count_found(named: list[list[Thing]], read: list[list[Thing]]) -> dict[str, float]:
    """Shares: `pictures` in which every named pair of colour and shape is found, as often as it was named;
    `things` found with colour and shape at their place; `exact`: pictures with nothing more, less or else."""
    places = [({(t.cell, t.pair) for t in a}, {(t.cell, t.pair) for t in b}) for a, b in zip(named, read)]
    pairs = [all(sum(t.pair == p for t in b) >= sum(t.pair == p for t in a) for p in {t.pair for t in a})
             for a, b in zip(named, read)]
    return {"pictures": sum(pairs) / len(pairs),
            "things": sum(len(a & b) for a, b in places) / max(1, sum(len(a) for a, _ in places)),
            "exact": sum(set(a) == set(b) for a, b in zip(named, read)) / len(named)}


def count_by_chance(named: list[list[Thing]], read: list[list[Thing]]) -> dict[str, float]:
    """The same of what is read in the next picture, which was painted after other words."""
    return count_found(named, [*read[1:], *read[:1]])


def draw_scenes(world: data.Shapes, first: int, count: int,
                examples: int = 0) -> tuple[list[list[Thing]], Tensor]:
    """The things of scenes first … first + count − 1 and their pictures (count, 3, 48, 48) in 0 … 1.

    examples: if not 0, only the first so many scenes, over and over.
    """
    scenes, images = [], []
    for i in range(first, first + count):
        rng = world.rng(i % examples if examples else i)
        scenes.append(world.scene(rng))
        images.append(data.draw_scene(scenes[-1], rng))
    return scenes, data.to_pixels(images, world.size, UNIT)
