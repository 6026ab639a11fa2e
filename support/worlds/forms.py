"""worlds/forms.py: the shapes world in other forms: words, pages, multiple choice, reasons, alt-texts.

The forms change what training sees. The oracle belongs to the plain world alone: says_scenes = False.
"""
from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from data import (CAPTION, COLORS, Item, KINDS, NUMBERS, PLACES, QA, QUESTION, SHAPES, Shapes, Thing,
                  choose, with_article)
from support.formats.chat import alpaca_prompt


class ShapesWords(Shapes):
    """Instructions without pictures in Alpaca's form, for LLaMA-Adapter's first stage.

    A question about a scene that is described in words, and its answer.
    """
    name, says_scenes = "shapes-words", False

    def item(self, index: int, turns: int | None = None) -> Item:
        item = super().item(index, turns)
        if turns is None:
            return replace(item, image=None, captions=[], turns=[])
        conversation = []
        for q in item.qas[:1]:
            conversation += [{"role": "user", "content": alpaca_prompt(q.question, item.about)},
                             {"role": "assistant", "content": " " + q.answer}]
        return replace(item, image=None, captions=[], turns=conversation)


class ShapesPages(Shapes):
    """Interleaved pages like Flamingo's M3W: two to four pictures, each before its caption or a question."""
    name, says_scenes = "shapes-pages", False

    def item(self, index: int, turns: int | None = None) -> Item:
        if turns is None:
            return super().item(index)
        rng, parts = self.rng(index), [Shapes.item(self, 4 * index + n, turns) for n in range(4)]
        parts = parts[:int(rng.integers(2, 5))]
        chunks = []
        for n, part in enumerate(parts):
            if rng.random() < 0.5 or not part.qas:      # few scenes lack the drawn kinds of question
                chunks.append((n, f"{CAPTION} {part.captions[0]}"))
            else:
                q = part.qas[0]
                chunks.append((n, f"{QUESTION.format(q.question)} {q.answer}"))
        return Item(None, [], [], f"{self.split}-{index}", images=[p.image for p in parts], chunks=chunks)


class ShapesTold(Shapes):
    """Texts without pictures, every word learned: a scene in words, then a question and its answer.

    In the words of the bundled decoder's own training (worlds/text.py).
    """
    name, says_scenes = "shapes-told", False

    def item(self, index: int, turns: int | None = None) -> Item:
        item = super().item(index, turns)
        asked = "".join(f"{QUESTION.format(q.question)} {q.answer}" for q in item.qas[:1])
        return Item(None, [], [], item.id, chunks=[(None, item.about + asked)])


class ShapesPlaces(Shapes):
    """The color and the shape of one thing, which the questions name by its place."""
    name, says_scenes = "shapes-places", False

    def questions(self, things: list[Thing], rng: np.random.Generator, kinds=KINDS) -> list[QA]:
        t = choose([t for t in things if t.pair in self.asked], rng)
        return [QA("color", f"what color is the object at the {t.place}?", t.color),
                QA("shape", f"what shape is at the {t.place}?", t.shape)][:len(kinds)]


class ShapesChoices(Shapes):
    """Multiple choice in ScienceQA's form, for training `turns` questions a picture.

    The lecture says how to find the answer, the solution describes the picture and says the answer in words:
    Question: what color is the ring? Context: N/A Options: (A) red (B) blue (C) cyan (D) white
    Answer: Look at each place. There is a small red square at the top left and a large blue ring at the
    middle center: blue. The answer is B.
    """
    name, says_scenes = "shapes-choices", False
    options = {"existence": ("yes", "no"), "count": NUMBERS, "color": tuple(COLORS), "shape": SHAPES,
               "position": PLACES}

    def item(self, index: int, turns: int | None = None) -> Item:
        item = super().item(index)
        rng = np.random.default_rng((self.seed, self.splits.index(self.split), index, 1))
        qas = [self.choice(q, item, rng) for q in item.qas]
        if turns is not None:
            qas = [qas[i] for i in rng.permutation(len(qas))[:turns]]
        return replace(item, captions=[], qas=qas)

    def choice(self, q: QA, item: Item, rng: np.random.Generator) -> QA:
        """The question with at most four options in random order."""
        others = [o for o in self.options[q.kind] if o != q.answer]
        options = [q.answer, *(others[i] for i in rng.permutation(len(others))[:3])]
        options = tuple(options[i] for i in rng.permutation(len(options)))
        return replace(q, choices=options, correct=options.index(q.answer), lecture="Look at each place.",
                       solution=f"There is {item.captions[0]}: {q.answer}.")


class ShapesReasons(Shapes):
    """Reasoning, then the answer: "a large blue ring at the middle center: blue".

    The reasoning is a question's solution, or else the picture's caption; training gets `turns` questions a
    picture.
    """
    name, says_scenes, reasons = "shapes-reasons", False, "before"

    def item(self, index: int, turns: int | None = None) -> Item:
        item = super().item(index)
        rng = np.random.default_rng((self.seed, self.splits.index(self.split), index, 1))
        if turns is None:
            return replace(item, qas=[replace(q, reasons=self.reasons) for q in item.qas])
        form = "{0}: {1}" if self.reasons == "before" else "{1}: {0}"
        written = (form.format(q.solution or item.captions[0], q.answer) for q in item.qas)
        qas = [replace(q, answer=text) for q, text in zip(item.qas, written)]
        return replace(item, qas=[qas[i] for i in rng.permutation(len(qas))[:turns]])


class ShapesAnswers(ShapesReasons):
    """The answer, then the reasoning: "blue: a large blue ring at the middle center"."""
    name, reasons = "shapes-answers", "behind"


class ShapesWeb(Shapes):
    """Noisy alt-texts as a crawl finds them, for training alone.

    One thing is named, in one text of five a wrong one, among words that carry no information.
    """
    name, says_scenes = "shapes-web", False
    forms = ("{} stock photo", "free image of {}", "{} (4)", "buy {} here", "{}")

    def item(self, index: int, turns: int | None = None) -> Item:
        item, rng = super().item(index, turns), self.rng(index)
        if turns is None:
            return item
        pairs = [t.pair for t in self.scene(rng)]       # the generator gives the picture's scene again
        named = self.allowed if rng.random() < 0.2 else pairs
        color, shape = named[rng.integers(len(named))]
        caption = self.forms[rng.integers(len(self.forms))].format(f"{color} {shape}")
        return replace(item, captions=[caption], qas=[])


class ShapesPhrases(Shapes):
    """Pictures for a text tower of CLIP's that reads parts of captions (pairs.py), for training alone.

    "a small red square at the top left and a large", "Photo of a red square.", "There are two objects in this
    photo."
    """
    name, says_scenes = "shapes-phrases", False


def true_and_false(q: QA, item: Item, asked_pairs: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """MME's two questions about what q asks of a picture of `shapes`: its answers are yes, and no.

    asked_pairs: "red ring", …: the pairs that the questions about other pictures name.
    """
    def pick(options: list[str]) -> str:
        return options[int(rng.integers(len(options)))]

    things = re.findall(r"(?:small|large) ((\w+) (\w+)) at the (\w+ \w+)", item.about)
    pairs, words = [pair for pair, *_ in things], q.question[:-1].split()
    if q.kind == "existence":
        own = " ".join(words[3:])
        yes = own if q.answer == "yes" else pick([p for p in pairs if p in asked_pairs] or pairs)
        every = [f"{c} {s}" for c in COLORS for s in SHAPES]            # of very few items, any pair
        no = own if q.answer == "no" else pick([p for p in asked_pairs if p not in pairs] or
                                               [p for p in every if p not in pairs])
        return f"is there {with_article(yes)}?", f"is there {with_article(no)}?"
    if q.kind == "color":
        shape = next(s for _, c, s, place in things
                     if c == q.answer and (s == words[-1] or q.question.endswith(f"at the {place}?")))
        absent = pick([p for p in (f"{c} {shape}" for c in COLORS) if p not in pairs])
        return f"is there {with_article(f'{q.answer} {shape}')}?", f"is there {with_article(absent)}?"
    no = pick([a for a in (NUMBERS if q.kind == "count" else PLACES) if a != q.answer])
    form = f"is {' '.join(words[2:])} at the {{}}?"
    if q.kind == "count":
        form = f"is the number of {' '.join(words[2:-2])} {{}}?"
    return form.format(q.answer), form.format(no)
