"""worlds/things.py: the things of a data set by their names (for papers/naming.py and papers/word.py)."""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from support.formats.files import UserError
from support.worlds import augmented, new_renderings, take_items
from support.worlds.augment import augment, may_mirror
from support.worlds.emoji import Emoji
from support.worlds.files import Files
from support.worlds.pairs import contrastive_pair, preference_pair


@functools.singledispatch
def named_pictures(world, known: bool, most: int = 2000) -> tuple[list[np.ndarray], list[str]]:
    """A picture of each of up to `most` things, and its name as contrastive_pair tells it.

    known: the things that training shows, in renderings that it does not draw; else those that it never
    shows, none where there are no such.
    """
    raise TypeError(f"nothing has a name of its own in {world.name}")


@named_pictures.register(Emoji)
def named_drawings(world: Emoji, known: bool, most: int = 2000) -> tuple[list[np.ndarray], list[str]]:
    world = new_renderings(world, "val" if known else "test")
    things = [[d] for d in world.drawings[:most]]
    return [world.draw(t, world.rng(i)) for i, t in enumerate(things)], [*map(world.about, things)]


@named_pictures.register(Files)
def named_files(world: Files, known: bool, most: int = 2000) -> tuple[list[np.ndarray], list[str]]:
    """By their first captions."""
    if not known and world.split == world.held_out or world.split == "all":
        return [], []
    world = new_renderings(world, world.split if known else world.held_out)
    items = take_items(world, most)
    return [item.image for item in items], [item.captions[0] for item in items]


@dataclass
class Things:
    """Things that one word names, and how they are drawn."""
    words: list[str]                                    # of thing n; several things may have one word
    draw: Callable[[int, int, bool], np.ndarray]        # (n, i, new) → rendering i of thing n, (S, S, 3)


@functools.singledispatch
def one_word_things(world, fits: Callable[[str], bool], most: int = 0) -> Things:
    """The things whose name is a word that fits; of the first `most` words where that is not 0."""
    raise UserError(f"--data {world.name}: no thing there has a name of one word; give emoji, or pictures "
                    "with captions.")


@one_word_things.register(Emoji)
def one_word_drawings(world: Emoji, fits: Callable[[str], bool], most: int = 0) -> Things:
    """Drawings whose whole name is one word, and flags, whose word is the country."""
    found = [(d.country or d.name, d) for d in world.drawings]
    words, drawings = first_words([(word, d) for word, d in found if " " not in word and fits(word)], most)
    worlds = {new: augmented(world, "new" if new else "train") for new in (False, True)}

    def draw(n: int, i: int, new: bool) -> np.ndarray:
        return worlds[new].draw([drawings[n]], np.random.default_rng((world.seed, n, i, new)))

    return Things(words, draw)


@one_word_things.register(Files)
def one_word_files(world: Files, fits: Callable[[str], bool], most: int = 0) -> Things:
    """Pictures by the last word of their first captions: "a rubber duck" is a duck."""
    world, found = augmented(world), []
    for i in range(len(world)):
        records, path = world.items[i], world.items[i][0].images[0]
        captions = [c.strip() for r in records for c in r.captions if c.strip()]
        word = captions[0].split()[-1].strip(".,!?") if captions else ""
        if word and fits(word):
            try:
                world.show(path, i)
            except UserError as e:
                world.skip(path, str(e).removeprefix(f"{path}: ").rstrip("."))
            else:
                found.append((word, (path, i, may_mirror(captions))))
    words, pictures = first_words(found, most)

    def draw(n: int, i: int, new: bool) -> np.ndarray:
        path, item, mirror = pictures[n]
        rng = np.random.default_rng((world.seed, n, i, new))
        return augment(world.show(path, item), world.size, rng, new, mirror)

    return Things(words, draw)


def first_words(found: list[tuple[str, object]], most: int) -> tuple[list[str], list]:
    """The words and the things of these pairs; those of the first `most` words alone, if that is not 0."""
    words = [*dict.fromkeys(word for word, _ in found)]
    kept = {*words[:most or None]}
    pairs = [(word, thing) for word, thing in found if word in kept]
    return [word for word, _ in pairs], [thing for _, thing in pairs]


def take_turns(sets: list[tuple]) -> list:
    """(data set, weight) pairs → the data sets in the order of their turns: emoji * 3 has three in a row."""
    for world, weight in sets:
        if weight != int(weight):
            raise UserError(f"--data: {world.name} * {weight:g}: recipe clip gives a data set so many turns; "
                            "give a whole number.")
    return [world for world, weight in sets for _ in range(int(weight))]


# what papers.recipe.Ingredients take of worlds, by the names of its fields
FROM_WORLDS = dict(contrastive_pair=contrastive_pair, preference_pair=preference_pair,
                   named_pictures=named_pictures, one_word_things=one_word_things)
