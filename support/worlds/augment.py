"""worlds/augment.py: new renderings of a picture: its place, scale, turn, mirror image, tint and background.

Everything is drawn from the generator of the item, so item(i) stays a function of (seed, split, i): a run
with --augment resumes to the bit. One combination of turn and scale in five is held out: training never draws
it, and `new` renderings show nothing else.
"""
from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

TURNS = tuple(range(-20, 21, 8))                        # borders of five ranges, in degrees
SCALES = (0.6, 0.68, 0.76, 0.84, 0.92, 1.0)             # of five ranges: longer side ÷ width of its place
HARD, NEAR = 12, 0.75                                   # see cut_out


def held_out(turn: int, scale: int) -> bool:
    """Whether training leaves out these ranges of turn and scale (0 … 4 each): a Latin square's diagonal."""
    return (turn + 2 * scale) % 5 == 0


@dataclass(frozen=True)
class View:
    """How a picture stands in its place."""
    turn: float                     # degrees
    scale: float                    # longer side ÷ width of the place
    right: float                    # −1 … 1 of the room to the right of the middle
    down: float                     # −1 … 1 of the room below the middle
    mirrored: bool
    tint: tuple[float, ...]         # brightness of red, green and blue


def draw_view(rng: np.random.Generator, new: bool = False, mirror: bool = True) -> View:
    """A view as training draws it, or a `new` one. mirror: whether the picture may be mirrored."""
    j = int(rng.integers(5))
    i = [i for i in range(5) if held_out(i, j) == new]
    i = i[int(rng.integers(len(i)))]
    u = rng.random(6)
    turn, scale = (borders[n] + v * (borders[n + 1] - borders[n])
                   for borders, n, v in ((TURNS, i, u[0]), (SCALES, j, u[1])))
    tint = (0.75 + 0.35 * u[5]) * (0.92 + 0.16 * rng.random(3))
    return View(turn, scale, 2 * u[2] - 1, 2 * u[3] - 1, bool(u[4] < 0.5) and mirror, tuple(tint))


def draw_background(rng: np.random.Generator, S: int) -> np.ndarray:
    """(S, S, 3) float32: white in two of five, else a colour, or one that becomes another."""
    form, across = rng.random(2)
    canvas = np.full((S, S, 3), 255, np.float32)
    if form >= 0.4:
        first, last = rng.integers(64, 256, (2, 3))
        canvas[:] = first + (last - first) * (np.arange(S)[:, None, None] / S if form >= 0.7 else 0)
    return canvas.swapaxes(0, 1) if across < 0.5 else canvas


def paste_view(canvas: np.ndarray, cut: Image.Image, view: View, left: int, width: int) -> None:
    """Draw a cut-out (RGBA) in the columns left … left + width of the canvas (S, S, 3), as the view says."""
    S = len(canvas)
    k = view.scale * width / max(cut.size)              # pixels of the canvas per pixel of the cut-out
    x, y = (n / 2 + max(0, n - k * m) / 2 * shift       # where its middle comes to lie
            for n, m, shift in zip((width, S), cut.size, (view.right, view.down)))
    c, s = math.cos(math.radians(view.turn)) / k, math.sin(math.radians(view.turn)) / k
    flip = -1 if view.mirrored else 1
    a, b, d, e = flip * c, flip * s, -s, c              # canvas → cut-out, about its middle
    where = (a, b, cut.width / 2 - a * x - b * y, d, e, cut.height / 2 - d * x - e * y)
    layer = np.asarray(cut.transform((width, S), Image.Transform.AFFINE, where, Image.Resampling.BILINEAR))
    patch, cover = canvas[:, left:left + width], layer[..., 3:] / np.float32(255)
    patch += cover * (np.minimum(layer[..., :3] * np.float32(view.tint), 255) - patch)


def augment(cut: Image.Image, S: int, rng: np.random.Generator, new: bool = False,
            mirror: bool = True) -> np.ndarray:
    """A cut-out (RGBA) → a rendering of it, (S, S, 3) uint8."""
    canvas = draw_background(rng, S)
    paste_view(canvas, cut, draw_view(rng, new, mirror), 0, S)
    return canvas.astype(np.uint8)


def cut_out(picture: np.ndarray, side: int) -> Image.Image:
    """(h, w, 3) uint8 → RGBA, the longer side `side`; transparent is what lies around the object.

    That is what is as bright as the border, up to HARD grey levels, and joined to it, where a share NEAR of
    the border has one colour. Any other picture stays a rectangle.
    """
    image = Image.fromarray(picture)
    k = 2 * side / max(image.size)
    image = image.resize([max(2, round(k * n)) for n in image.size], Image.Resampling.BOX if k < 1 else 2)
    x = np.asarray(image).astype(int)
    edge = np.ones(x.shape[:2], bool)
    edge[1:-1, 1:-1] = False
    near = np.abs(x - np.median(x[edge], axis=0)).max(-1) <= HARD
    around = reach(near, edge) if near[edge].mean() >= NEAR else np.zeros_like(near)
    if around.all():
        around[:] = False
    image.putalpha(Image.fromarray((~around * 255).astype(np.uint8)))
    image = image.crop(image.getchannel("A").getbbox())
    k = side / max(image.size)
    return image.resize([max(1, round(k * n)) for n in image.size], Image.Resampling.HAMMING)


def reach(near: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """What of `near` (h, w) bool can be reached from the edge by steps up, down, left and right."""
    seen = near & edge
    while True:
        grown = seen.copy()
        grown[1:] |= seen[:-1]
        grown[:-1] |= seen[1:]
        grown[:, 1:] |= seen[:, :-1]
        grown[:, :-1] |= seen[:, 1:]
        grown &= near
        if (grown == seen).all():
            return seen
        seen = grown


def may_mirror(texts: list[str]) -> bool:
    """Whether a mirror image leaves these texts true: not where they tell left from right."""
    return not any(re.search(r"\b(left|right)(ward)?s?\b", text, re.IGNORECASE) for text in texts)
