"""worlds/things.py: the things of a data set by their names (for papers/naming.py and papers/word.py)."""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from support.formats.files import UserError
from support.worlds import augmented, new_renderings, take_items
from support.worlds.augment import augment, may_mirror
from support.worlds.emoji import Emoji, any_held_out
from support.worlds.files import Files
from support.worlds.pairs import contrastive_pair, preference_pair

NEW, HELD_OUT = "new renderings of known things", "held-out pictures"
SEEN = "pictures as training shows them"
NAME = 3                                                # words of a name, at most
TRIES = 100                                             # to draw things that may meet
ARTICLES = {"a", "an", "the", "some", "our", "this", "my"}
LINKS = set("about and as at behind by for from in into is near of on or over to under with".split())


@dataclass
class Named:
    """Pictures of things with names."""
    what: str                       # in words
    known: bool                     # whether training shows these things
    pictures: list[np.ndarray]      # (h, w, 3) uint8 each
    names: list[str]                # as contrastive_pair tells them


def quietly(work: Sequence, what: str) -> Sequence:
    """In place of plumbing.meter.track: it says nothing of how far the work has come."""
    return work


@functools.singledispatch
def named_pictures(world, most: int = 2000, track: Callable = quietly) -> list[Named]:
    """A picture of each of up to `most` things that training shows, and of those that it never shows.

    Known things are shown in renderings that training does not draw. Where training shows pictures on disk as
    they are, there are no such: the known ones are training's own, and `what` says so.
    """
    raise TypeError(f"nothing has a name of its own in {world.name}")


@named_pictures.register(Emoji)
def drawings_with_names(world: Emoji, most: int = 2000, track: Callable = quietly) -> list[Named]:
    named = []
    for known, split in ((True, "val"), (False, "test")):
        other = new_renderings(world, split)
        things = [[d] for d in other.drawings[:most]]
        pictures = [other.draw(t, other.rng(i)) for i, t in track([*enumerate(things)], "drawings")]
        named.append(Named(NEW if known else HELD_OUT, known, pictures, [*map(other.about, things)]))
    return named


@named_pictures.register(Files)
def named_files(world: Files, most: int = 2000, track: Callable = quietly) -> list[Named]:
    """By their first captions; of your own pictures the split test, too, where they have one."""
    splits = {world.split: NEW if world.renderings else SEEN}
    if world.split != "all":
        splits.setdefault(world.held_out, HELD_OUT)
        if "all" in world.splits and "test" in world.splits:
            splits.setdefault("test", "pictures of the split test")
    named = []
    for split, what in splits.items():
        known = split == world.split
        try:
            other = new_renderings(world, split)
        except UserError:
            if split != "test":
                raise
            continue                                    # too few pictures for such a split
        items = take_items(other, most, track=functools.partial(track, what="pictures"))
        named.append(Named(what, known, [i.image for i in items], [i.captions[0] for i in items]))
    return named


@dataclass
class Things:
    """Things with names, and how they are drawn."""
    words: list[str]                                    # of thing n; several things may have one name
    draw: Callable[[list[int], int, bool], np.ndarray]  # (numbers, i, new) → rendering i of these, (S, S, 3)
    total: int                                          # things of the data set, whatever they are called
    apart: Callable[[list[int]], bool] | None = None    # whether these never meet; None: one to a picture

    def scene(self, rng: np.random.Generator, most: int = 1) -> list[int]:
        """Numbers of things that one picture shows: one in half of the pictures, else up to `most`."""
        count = 1 if most == 1 or self.apart is None or rng.random() < 0.5 else int(rng.integers(2, most + 1))
        for _ in range(TRIES):
            numbers = [int(n) for n in rng.integers(len(self.words), size=count)]
            if count == 1 or len(set(numbers)) == count and not self.apart(numbers):
                return numbers
        return numbers[:1]                              # few things, or none that may meet


@functools.singledispatch
def things_with_names(world, fits: Callable[[str], bool], whole: bool = False, most: int = 0,
                      track: Callable = quietly) -> Things:
    """The things whose name fits, a word or (whole) all of its words; of the first `most` names, if not 0."""
    raise UserError(f"--data {world.name}: no thing there has a name; give emoji, or pictures with captions.")


@things_with_names.register(Emoji)
def things_drawn(world: Emoji, fits: Callable[[str], bool], whole: bool = False, most: int = 0,
                 track: Callable = quietly) -> Things:
    """Drawings whose name is one word, and flags, whose word is the country; whole: all that have a name."""
    found = [(d.name if whole else d.country or d.name, d) for d in world.drawings]
    found = [(name, d) for name, d in found if name and (whole or " " not in name) and fits(name)]
    words, drawings = first_words(found, most)
    worlds = {new: augmented(world, "new" if new else "train") for new in (False, True)}

    def draw(numbers: list[int], i: int, new: bool) -> np.ndarray:
        return worlds[new].draw([drawings[n] for n in numbers],
                                np.random.default_rng((world.seed, *numbers, i, new)))

    def apart(numbers: list[int]) -> bool:
        return any_held_out([drawings[n] for n in numbers])

    return Things(words, draw, len(world.drawings), apart)


@things_with_names.register(Files)
def things_on_disk(world: Files, fits: Callable[[str], bool], whole: bool = False, most: int = 0,
                   track: Callable = quietly) -> Things:
    """Pictures whose first caption is a name, by its last word or (whole) without its article.

    Only those are opened that are drawn.
    """
    world, found = augmented(world), []
    for i in track(range(len(world)), "captions"):
        records = world.items[i]
        captions = [c.strip() for r in records for c in r.captions if c.strip()]
        words = name_words(captions[0]) if captions else []
        word = " ".join(words if whole else words[-1:])
        if word and fits(word):
            found.append((word, (records[0].images[0], i, may_mirror(captions))))

    def opens(picture: tuple[str, int, bool]) -> bool:
        path, i, _ = picture
        try:
            world.show(path, i)
        except UserError as e:
            world.skip(path, str(e).removeprefix(f"{path}: ").rstrip("."))
            return False
        return True

    words, pictures = first_words(track(found, "pictures"), most, opens)

    def draw(numbers: list[int], i: int, new: bool) -> np.ndarray:
        path, item, mirror = pictures[numbers[0]]
        rng = np.random.default_rng((world.seed, numbers[0], i, new))
        return augment(world.show(path, item), world.size, rng, new, mirror)

    return Things(words, draw, len(world))


def name_words(caption: str) -> list[str]:
    """The words of a caption that is a name, in lower case: "a Rubber duck." → rubber, duck; [] of any other.

    A name is at most NAME words behind an article or none, without a comma and without one of LINKS.
    """
    words = caption.lower().strip(" .!?").split()
    words = words[words[0] in ARTICLES:] if words else []
    fit = 0 < len(words) <= NAME and "," not in caption and LINKS.isdisjoint(words)
    return words if fit else []


def first_words(found: Iterable[tuple[str, object]], most: int,
                opens: Callable[..., bool] = lambda thing: True) -> tuple[list[str], list]:
    """The words and the things of these pairs that open; of the first `most` words, if that is not 0."""
    pairs, kept = [], set()
    for word, thing in found:
        if (word in kept or not most or len(kept) < most) and opens(thing):
            pairs.append((word, thing))
            kept.add(word)
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
                   named_pictures=named_pictures, things_with_names=things_with_names)
