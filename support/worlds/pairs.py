"""worlds/pairs.py: a picture, its text and false texts, for contrastive training (papers/clip.py) and for
preferences (papers/dpo.py)."""
from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

from data import COLORS, Item, SHAPES, SIZES, Shapes, Thing, caption_scene, choose, draw_scene
from support.formats.files import UserError
from support.worlds.emoji import Emoji
from support.worlds.files import Files
from support.worlds.forms import ShapesPhrases
from support.worlds.prompts import count_phrase
from support.worlds.text import describe_scene


@functools.singledispatch
def contrastive_pair(world, index: int) -> tuple[np.ndarray, str, list[str]]:
    """(picture, true text, false texts) of this index: two false ones, or on disk up to two."""
    raise TypeError(f"no pairs are made of {world.name}")


@contrastive_pair.register(Shapes)
def shapes_pair(world: Shapes, index: int) -> tuple[np.ndarray, str, list[str]]:
    """The false texts are those of nearly equal scenes (hard_negative)."""
    rng = world.rng(index)
    things = world.scene(rng)

    def text(scene: list[Thing]) -> str:
        return describe_scene([scene[i] for i in rng.permutation(len(scene))], "terse")

    image, true = draw_scene(things, rng), text(things)
    return image, true, [text(hard_negative(world, things, rng)) for _ in range(2)]


@contrastive_pair.register(ShapesPhrases)
def phrase_pair(world: ShapesPhrases, index: int) -> tuple[np.ndarray, str, list[str]]:
    """A caption of some things, often cut behind a word; or one thing, or how many there are.

    A false text says the same of a nearly equal scene, or another number.
    """
    rng = world.rng(index)
    things = world.scene(rng)
    image, form = draw_scene(things, rng), rng.choice(3, p=(0.7, 0.2, 0.1))
    if form == 2:
        numbers = [len(things), *rng.permutation([n for n in (1, 2, 3, 4) if n != len(things)])]
        true, *false = (f"There {count_phrase(n)} in this photo." for n in numbers[:3])
        return image, true, false
    if form == 1:
        names = [f"{t.color} {t.shape}" for t in things]
        others = [f"{c} {s}" for c, s in world.allowed if f"{c} {s}" not in names]
        near = [name for name in others if {*name.split()} <= {*" ".join(names).split()}]
        false = [choose(near or others, rng), choose(others, rng)]
        true, *false = (f"Photo of a {name}." for name in (choose(names, rng), *false))
        return image, true, false
    new = [hard_negative(world, things, rng) for _ in range(2)]
    return image, *cut_captions(things, new, rng)


def cut_captions(things: list[Thing], new: list[list[Thing]],
                 rng: np.random.Generator) -> tuple[str, list[str]]:
    """Captions of some things in one order, and of the same in nearly equal scenes, all cut behind one word.

    Those scenes have another thing at a place of the list; each caption is long enough to differ there. Cut
    short, a false one may still fit another thing of the picture; that is rare.
    """
    order = [int(i) for i in rng.permutation(len(things))]
    wrong = [min(n for n, i in enumerate(order) if scene[i] not in things) for scene in new]
    told = order[:max(int(rng.integers(1, len(order) + 1)), 1 + max(wrong))]
    texts = [caption_scene([scene[i] for i in told]).split() for scene in (things, *new)]
    shown = max(next(n for n, (a, b) in enumerate(zip(texts[0], text)) if a != b) for text in texts[1:])
    end = int(rng.integers(shown + 1, len(texts[0]) + 1)) if rng.random() < 0.7 else len(texts[0])
    true, *false = (" ".join(text[:end]).rstrip(",") for text in texts)
    return true, false


def hard_negative(world: Shapes, things: list[Thing], rng: np.random.Generator) -> list[Thing]:
    """A nearly equal scene: two things swap an attribute, or one thing changes one.

    The attribute is the shape most often, because it is the hardest to see.
    """
    while True:
        attribute = ("color", "shape", "size", "cell")[rng.choice(4, p=(0.2, 0.5, 0.1, 0.2))]
        new = list(things)
        if len(things) > 1 and rng.random() < 0.5:
            i, j = rng.choice(len(things), 2, replace=False)
            for a, b in ((i, j), (j, i)):
                new[a] = replace(things[a], **{attribute: getattr(things[b], attribute)})
        else:
            i = int(rng.integers(len(things)))
            free = [c for c in range(9) if all(t.cell != c for t in things)]
            values = {"color": list(COLORS), "shape": SHAPES, "size": list(SIZES), "cell": free}
            new[i] = replace(things[i], **{attribute: choose(values[attribute], rng)})
        if set(new) != set(things) and all(t.pair in world.allowed for t in new):
            return new


@contrastive_pair.register(Emoji)
def emoji_pair(world: Emoji, index: int) -> tuple[np.ndarray, str, list[str]]:
    """A false text names another drawing or another order."""
    rng = world.rng(index)
    things = world.scene(rng)
    image, false = world.draw(things, rng), []
    while len(false) < 2:
        i, other = rng.integers(len(things)), world.drawings[rng.integers(len(world.drawings))]
        if len(things) > 1 and rng.random() < 0.5:
            wrong = things[1:] + things[:1]
        else:
            wrong = [*things[:i], other, *things[i + 1:]]
        if wrong != things:
            false.append(world.about(wrong))
    return image, world.about(things), false


@contrastive_pair.register(Files)
def caption_pair(world: Files, index: int) -> tuple[np.ndarray, str, list[str]]:
    """A picture, one of its captions, and captions of up to two other pictures."""
    item = require_captions(world, index)
    others = (c.strip() for other in world.draw_others(index, 8) for c in other[0].captions[:1])
    return item.image, item.captions[0], [c for c in others if c not in item.captions][:2]


@functools.singledispatch
def preference_pair(world, index: int) -> Item:
    """A picture with two captions, a true and a false one, from what contrasts with it."""
    image, true, false = contrastive_pair(world, index)
    if not false:
        raise UserError(f"{world.name}: item {index} has no false caption beside its own; dpo needs data "
                        "whose pictures have different captions.")
    return Item(image, [true, false[0]], [])


@preference_pair.register(Shapes)
def shapes_preference(world: Shapes, index: int) -> Item:
    """The false caption names a thing that is not there: in the place of one, or as one more."""
    rng = world.rng(index)
    things = sorted(world.scene(rng), key=lambda t: t.cell)
    image, shown = draw_scene(things, rng), {t.pair for t in things}
    n = int(rng.integers(len(things)))
    near = [p for p in world.allowed if p not in shown and set(p) & set(things[n].pair)]
    color, shape = choose(near, rng)
    false = replace(things[n], color=color, shape=shape)
    if rng.random() < 0.5:
        rest = things[:n] + things[n + 1:]
    else:
        free = [cell for cell in range(9) if all(t.cell != cell for t in things)]
        rest, false = things, replace(false, cell=choose(free, rng))
    captions = [caption_scene(things), caption_scene(sorted([*rest, false], key=lambda t: t.cell))]
    return Item(image, captions, [], f"{world.split}-{index}")


def require_captions(world, index: int = 0) -> Item:
    """The item of this index; a UserError where it is not a picture with a caption."""
    item = world.item(index, turns=1)
    if not item.captions or item.image is None:
        raise UserError(f"{world.name}: item {item.id} is no picture with a caption; "
                        "this recipe learns from pairs of both and needs a data set that has them.")
    return item
