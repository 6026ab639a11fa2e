"""worlds/forms.py: the shapes world in other forms: words, pages, multiple choice, reasons, alt-texts."""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from data import CAPTION, COLORS, Item, NUMBERS, PLACES, QA, QUESTION, SHAPES, Shapes
from support.formats.chat import alpaca_prompt
from support.formats.records import Record


class ShapesWords(Shapes):
    """Instructions without pictures, in Alpaca's form: a question about a scene that is told in words (LLaMA-Adapter's first stage)."""
    says_scenes = False
    name = "shapes-words"

    def item(self, index: int, turns: int | None = None) -> Item:
        item = super().item(index, turns)
        talk = [turn for q in item.qas[:1] for turn in ({"role": "user", "content": alpaca_prompt(q.question, item.about)},
                                                        {"role": "assistant", "content": " " + q.answer})]
        return replace(item, image=None, captions=[], turns=talk if turns is not None else [])


class ShapesPages(Shapes):
    """Interleaved pages: two to four pictures, each followed by what is seen or by a question and its answer (Flamingo's M3W)."""
    says_scenes = False
    name = "shapes-pages"

    def item(self, index: int, turns: int | None = None) -> Item:
        if turns is None:
            return super().item(index)
        rng, parts = self.rng(index), [Shapes.item(self, 4 * index + n, turns) for n in range(4)]
        parts = parts[:int(rng.integers(2, 5))]
        text = lambda p: f"{CAPTION} {p.captions[0]}" if rng.random() < 0.5 else f"{QUESTION.format(p.qas[0].question)} {p.qas[0].answer}"
        return Item(None, [], [], f"{self.split}-{index}", "", [p.image for p in parts], [], [(n, text(p)) for n, p in enumerate(parts)])


class ShapesChoices(Shapes):
    """Multiple choice in ScienceQA's form: the lecture says how to find out, the solution what is there; `turns` questions a picture.

    Question: what color is the ring? Context: N/A Options: (A) red (B) blue (C) cyan (D) white
    Answer: Look at each place. There is a small red square at the top left and a large blue ring at the middle center. The answer is B.
    """
    says_scenes = False
    name = "shapes-choices"
    options = {"existence": ("yes", "no"), "count": NUMBERS, "color": tuple(COLORS), "shape": SHAPES, "position": PLACES}

    def item(self, index: int, turns: int | None = None) -> Item:
        item, rng = super().item(index), np.random.default_rng((self.seed, self.splits.index(self.split), index, 1))
        qas = [self.choice(q, item, rng) for q in item.qas]
        return replace(item, captions=[], qas=qas if turns is None else [qas[i] for i in rng.permutation(len(qas))[:turns]])

    def choice(self, q: QA, item: Item, rng: np.random.Generator) -> QA:
        """The question with at most four options in random order."""
        others = [o for o in self.options[q.kind] if o != q.answer]
        options = [q.answer, *(others[i] for i in rng.permutation(len(others))[:3])]
        options = [options[i] for i in rng.permutation(len(options))]
        more = {"hint": "", "lecture": "Look at each place.", "solution": f"There is {item.captions[0]}.", "subject": q.kind, "grade": "grade1"}
        return replace(q, record=Record(item.id, kind=q.kind, question=q.question, choices=options, answer=options.index(q.answer), more=more))


class ShapesReasons(Shapes):
    """Answers behind their reasoning, which is what is there: "a large blue ring at the middle center: blue"; `turns` questions a picture."""
    says_scenes = False
    name, form = "shapes-reasons", "{0}: {1}"

    def item(self, index: int, turns: int | None = None) -> Item:
        item, rng = super().item(index), np.random.default_rng((self.seed, self.splits.index(self.split), index, 1))
        if turns is None:
            return item
        qas = [replace(q, answer=self.form.format(item.captions[0], q.answer)) for q in item.qas]
        return replace(item, qas=[qas[i] for i in rng.permutation(len(qas))[:turns]])


class ShapesAnswers(ShapesReasons):
    """Answers before their reasoning: "blue: a large blue ring at the middle center"."""
    name, form = "shapes-answers", "{1}: {0}"


class ShapesWeb(Shapes):
    """Alt-texts as a crawl finds them, for training alone: one thing is named, one time in five a wrong one, among words that say nothing."""
    says_scenes = False
    name = "shapes-web"
    forms = ("{} stock photo", "free image of {}", "{} (4)", "buy {} here", "{}")

    def item(self, index: int, turns: int | None = None) -> Item:
        item, rng = super().item(index, turns), self.rng(index)
        if turns is None:
            return item
        pairs = [t.pair for t in self.scene(rng)]                               # the scene of the picture: the same numbers are drawn again
        named = self.allowed if rng.random() < 0.2 else pairs
        color, shape = named[rng.integers(len(named))]
        return replace(item, captions=[self.forms[rng.integers(len(self.forms))].format(f"{color} {shape}")], qas=[])
