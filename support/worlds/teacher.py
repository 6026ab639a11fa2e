"""worlds/teacher.py: a teacher that follows rules: all that it writes about a `shapes` scene is true."""
from __future__ import annotations

import itertools
from typing import Iterator

import numpy as np

from data import COLORS, COLUMNS, NUMBERS, PLURALS, ROWS, SHAPES, Thing, join_phrases, with_article
from papers.llava_data import write_turns

NAMES = ("{0.shape}", "{0.color} {0.shape}", "{0}", "{0} at the {0.place}")
SHAPE_AT_PLACE = "{0.shape} at the {0.place}"
ATTRIBUTES = (                      # kind, question, answer, names that do not give the answer away
    ("color", "What color is {}?", "{} is {.color}", ("{0.shape}", "{0.size} {0.shape}", SHAPE_AT_PLACE)),
    ("size", "Is {} small or large?", "{} is {.size}", ("{0.shape}", NAMES[1], SHAPE_AT_PLACE)),
    ("place", "Where is {}?", "{} is at the {.place}", NAMES[:3]))
RULE_KINDS = {"conversation": ("types", "existence", "count", "color", "size", "place", "relation"),
              "reasoning": ("remove", "mirror", "walk")}


def refer_to(t: Thing, things: list[Thing], forms=NAMES) -> str:
    """The first of these forms that describes this thing alone: "the red ring"; "" where there is none."""
    for form in forms:
        name = form.format(t)
        if sum(form.format(other) == name for other in things) == 1:
            return f"the {name}"
    return ""


def count_phrase(n: int, word: str = "object") -> str:
    """no rings, one ring, two red objects."""
    one = f"{word} object" if word in COLORS else word
    return f"{('no', *NUMBERS[1:])[n]} {one if n == 1 else dict(PLURALS).get(word, f'{word}s')}"


def there_is(*what: str) -> str:
    """there is one ring, there are two circles and one ring."""
    return f"there {'is' if what[0].startswith('one ') else 'are'} {join_phrases([*what])}"


def write_sentences(*sentences: str) -> str:
    """The sentences with a capital letter and a full stop each."""
    return " ".join(s[0].upper() + s[1:] + "." for s in sentences)


def relative_place(a: Thing, b: Thing) -> str:
    """The direction from b to a: above and to the left of."""
    (y, x), (v, u) = divmod(a.cell, 3), divmod(b.cell, 3)
    across = f"to the {'left' if x < u else 'right'} of"
    return " and ".join(["above" if y < v else "below"] * (y != v) + [across] * (x != u))


def certain_questions(things: list[Thing]) -> Iterator[tuple[str, str, str]]:
    """(kind, question, answer): all questions of RULE_KINDS that have one certain answer in this scene."""
    yield from inventory_questions(things)
    yield from attribute_questions(things)
    yield from pair_questions(things)


def inventory_questions(things: list[Thing]) -> Iterator[tuple[str, str, str]]:
    """Types, existence, counts, and what is left when some things are removed."""
    count, total = {word: sum(word in t.pair for t in things) for word, _ in PLURALS}, len(things)
    types = [count_phrase(count[s], s) for s in SHAPES if count[s]]
    yield "types", "What kinds of things are in the picture?", write_sentences(there_is(*types))
    for word, plural in PLURALS:
        n, names = count[word], [refer_to(t, things, NAMES[3:]) for t in things if word in t.pair]
        found = there_is(count_phrase(n, word))
        yield "existence", f"Are there any {plural}?", write_sentences(f"{'yes' if n else 'no'}, {found}")
        if n:
            yield "count", f"How many {plural} are there?", write_sentences(found)
            yield "remove", f"How many objects would be left without the {plural}?", write_sentences(
                there_is(count_phrase(total)),
                f"{found}: {join_phrases(names)}",
                f"{NUMBERS[total]} minus {NUMBERS[n]} is {NUMBERS[total - n]}",
                f"so {count_phrase(total - n)} would be left")


def attribute_questions(things: list[Thing]) -> Iterator[tuple[str, str, str]]:
    """Color, size and place of each thing, and its place in a mirror."""
    for t in things:
        for kind, question, answer, forms in ATTRIBUTES:
            name = refer_to(t, things, forms)
            if name:
                yield kind, question.format(name), write_sentences(answer.format(name, t))
        (y, x), name = divmod(t.cell, 3), refer_to(t, things)
        yield "mirror", f"Where would {name} be if left and right were swapped?", write_sentences(
            f"{name} is in the {ROWS[y]} row and the {COLUMNS[x]} column",
            "rows and the center column stay as they are",
            f"so it would be at the {ROWS[y]} {COLUMNS[2 - x]}")


def pair_questions(things: list[Thing]) -> Iterator[tuple[str, str, str]]:
    """Relation and distance of two things."""
    for a, b in itertools.permutations(things, 2):
        (y, x), (v, u) = divmod(a.cell, 3), divmod(b.cell, 3)
        m, n = refer_to(a, things), refer_to(b, things)
        relation = write_sentences(f"{m} is {relative_place(a, b)} {n}")
        yield "relation", f"Where is {m} in relation to {n}?", relation
        legs = [(abs(v - y), "down" if v > y else "up"), (abs(u - x), "right" if u > x else "left")]
        steps = "How many steps down, up, right or left"
        yield "walk", f"{steps} lead from {m} to {n} on a grid of three by three?", write_sentences(
            f"{m} is in the {ROWS[y]} row and the {COLUMNS[x]} column",
            f"{n} is in the {ROWS[v]} row and the {COLUMNS[u]} column",
            "that takes " + join_phrases([f"{count_phrase(k, 'step')} {way}" for k, way in legs if k]),
            "so the answer is " + count_phrase(abs(v - y) + abs(u - x), "step"))


def rule_teacher(things: list[Thing], kind: str, rng: np.random.Generator) -> str:
    """A reply about a scene.

    conversation: three to five questions of different kinds; detail: a description from the top left to the
    bottom right; reasoning: one question and its answer step by step.
    """
    if kind == "detail":
        things = sorted(things, key=lambda t: t.cell)
        named = [(t, refer_to(t, things)) for t in things]
        counts = [(sum(w in t.pair for t in things), w if w in COLORS else plural) for w, plural in PLURALS]
        return write_sentences(
            f"the picture shows {count_phrase(len(things))} on a dark background",
            *(f"at the {t.place} there is {with_article(str(t))}" for t in things),
            *(f"{m} is {relative_place(b, a)} {n}" for (a, n), (b, m) in itertools.pairwise(named)),
            *(f"{NUMBERS[n]} of them are {words}" for n, words in counts if n > 1))
    options = {k: [(q, a) for other, q, a in certain_questions(things) if other == k]
               for k in RULE_KINDS[kind]}
    kinds = rng.permutation([k for k in options if options[k]])
    kinds = kinds[:1 if kind == "reasoning" else rng.integers(3, 6)]
    return write_turns([options[k][rng.integers(len(options[k]))] for k in kinds])
