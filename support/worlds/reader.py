"""worlds/reader.py: what a picture of the `shapes` world shows, read without learning."""
from __future__ import annotations

import functools

import numpy as np

from data import BACKGROUND, CELL, COLORS, SHAPES, SIZES, Thing, sprite


@functools.cache
def masks() -> tuple[np.ndarray, list[tuple[str, str]]]:
    """(K, CELL²) coverage of each shape and size at each place within a cell; the shape and size of each."""
    rows, names = [], []
    for shape in SHAPES:
        for size, side in SIZES.items():
            jitter = 2 if size == "small" else 1
            middle = (CELL - side) // 2
            for top in range(middle - jitter, middle + jitter + 1):
                for left in range(middle - jitter, middle + jitter + 1):
                    cell = np.zeros((CELL, CELL))
                    cell[top:top + side, left:left + side] = sprite(shape, size)
                    rows.append(cell.ravel())
                    names.append((shape, size))
    return np.stack(rows), names


def read_scene(picture: np.ndarray) -> list[Thing]:
    """The things of a picture (48, 48, 3) uint8: in each cell the nearest drawing of a thing, or none.

    Nearest is the least squared difference ‖y − M d‖², with y the cell minus the background, M a mask and d a
    colour minus the background. A cell without a thing is y = 0.
    """
    M, names = masks()                                                          # (K, 256)
    colors = np.array([*COLORS.values()], float) - BACKGROUND                   # (C, 3)
    things = []
    for cell in range(9):
        top, left = CELL * (cell // 3), CELL * (cell % 3)
        y = (picture[top:top + CELL, left:left + CELL].astype(float) - BACKGROUND).reshape(-1, 3)
        gain = 2 * M @ y @ colors.T - np.outer((M**2).sum(1), (colors**2).sum(1))               # (K, C)
        best, color = np.unravel_index(gain.argmax(), gain.shape)
        if gain[best, color] > 0:                       # nearer than the empty cell
            things.append(Thing([*COLORS][color], *names[best], cell))
    return things
