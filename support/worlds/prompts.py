"""worlds/prompts.py: text in the forms in which systems without training ask a language model.

GPT-3 and GPT-2 have read such text; a decoder of a million parameters has to, before PICa, MAGiC and Socratic
Models can ask it: python train.py --recipe lm-prompts
"""
from __future__ import annotations

from typing import Sequence

import numpy as np

from data import (CAPTION, COLORS, NUMBERS, PLACES, QA, SEEN, SHAPES, Document, Item, Shapes,
                  caption_scene)
from papers import pica, socratic
from papers.recipe import Ingredients, Numbers, Recipe
from support.formats.files import UserError
from support.worlds import text
from support.worlds.text import ShapesText, TextTask

SHARES = {"pica": 0.6, "caption": 0.15, "socratic": 0.2, "scene": 0.05}     # of the documents
SHOTS, SHOT_SHARES = (0, 1, 2, 4, 8), (0.3, 0.3, 0.2, 0.15, 0.05)
OBJECTS = 5                                             # told in a prompt of Socratic Models
OTHER_HABIT = {                     # kind of question → another way to write its answers
    "existence": {"yes": "y", "no": "n"}, "count": {word: str(n) for n, word in enumerate(NUMBERS)},
    "position": {place: f"at the {place}" for place in PLACES},
    "color": {color: f"a {color} object" for color in COLORS}, "shape": {s: f"a {s}" for s in SHAPES}}
OWN_SHARE = {"existence": 2 / 3, "color": 2 / 3, "shape": 2 / 3, "count": 1 / 3, "position": 1 / 3}


def count_phrase(n: int) -> str:
    return "is one object" if n == 1 else f"are {NUMBERS[n]} objects"


def object_names(pairs=SEEN) -> tuple[str, ...]:
    return tuple(f"{color} {shape}" for color, shape in pairs)


class PromptText(ShapesText):
    """Documents for recipe `lm-prompts`, in four forms:

    pica      0 to 8 examples in PICa's form, then a question. A writer's habits differ from document to
              document (yes or y, one or 1, top left or at the top left, red or a red object) and hold for all
              answers to a kind of question within it. A document asks about one kind or two, so that its
              examples tell how the next answer is written. What the world's own questions expect is the
              rarer habit of two kinds.
    caption   a caption without a picture: what MAGiC's decoder learns
    socratic  the prompt of Socratic Models and a caption; its list names the things first, then others
    scene     a document of recipe `lm`, so that nothing is forgotten
    """

    def document(self, index: int, progress: float = 1.0) -> tuple[Document, list[list[int]]]:
        rng = self.world.rng(index)
        form = str(rng.choice([*SHARES], p=[*SHARES.values()]))
        if form == "scene":
            return super().document(index, 1.0)
        return getattr(self, f"{form}_document")(rng), []

    def caption_document(self, rng: np.random.Generator) -> Document:
        things = sorted(self.world.scene(rng), key=lambda t: t.cell)
        return Document(self.tokenizer).turn(CAPTION, caption_scene(things))

    def socratic_document(self, rng: np.random.Generator) -> Document:
        things = self.world.scene(rng)
        named = list(dict.fromkeys(f"{t.color} {t.shape}" for t in things))
        others = [name for name in object_names(self.world.allowed) if name not in named]
        names = [*named, *(others[i] for i in rng.permutation(len(others)))][:OBJECTS]
        prompt = socratic.write_prompt("photo", count_phrase(len(things)), [], names)
        return Document(self.tokenizer).turn(prompt, caption_scene(things))

    def pica_document(self, rng: np.random.Generator) -> Document:
        """Every answer is learned, those of the examples too, and where it ends."""
        own = {kind: rng.random() < share for kind, share in OWN_SHARE.items()}
        shots = int(rng.choice(SHOTS, p=SHOT_SHARES))
        kinds = rng.permutation([*OWN_SHARE])[:rng.integers(1, 3)]
        told = []
        for _ in range(shots + 1):
            context, q = self.question(rng, kinds)
            told.append((context, q.question, q.answer if own[q.kind] else OTHER_HABIT[q.kind][q.answer]))
        *examples, (context, question, _) = told
        parts = pica.write_prompt(examples, context, question).split("\nA:")
        d = Document(self.tokenizer)
        for n, (_, _, answer) in enumerate(told):
            before = parts[n].removeprefix(f" {told[n - 1][2]}\n") if n else parts[n]
            d.add(f"{before}\nA:").add(f" {answer}" + "\n" * (n < shots), learn=True)
        return d.end()

    def question(self, rng: np.random.Generator, kinds: Sequence[str]) -> tuple[str, QA]:
        """A caption of a new scene, and a question about it, of one of these kinds if the scene has one."""
        things = sorted(self.world.scene(rng), key=lambda t: t.cell)
        for kind in (*rng.permutation(kinds), "existence"):
            if q := self.world.question(things, str(kind), rng):
                return caption_scene(things), q
        raise AssertionError("a scene without a question")


class PromptTask(TextTask):
    """Recipe `lm-prompts`: a decoder that recipe `lm` made reads on, now prompts (PromptText)."""
    documents = PromptText

    def __init__(self, given: Ingredients):
        words, known = given.decoder.config.vocab_size, text.shapes_tokenizer().vocab_size
        if words != known:
            raise UserError(f"recipe lm-prompts continues a decoder of recipe lm, with {known} words; --lm's "
                            f"has {words}.")
        super().__init__(given)

    def check(self) -> dict[str, float]:
        return {f"{k} shots": x for k, x in self.measure_shots(25).items()}

    def measure_shots(self, count: int) -> dict[int, float]:
        """Exact answers behind 0, 1, 4 and 8 examples, drawn at random, of scenes in words."""
        asked, found = [Shapes("val", 1).item(i) for i in range(count)], {}
        examples = [Shapes("train", 1).item(i) for i in range(64)]
        true = [q.answer for item in asked for q in item.qas]
        for shots in (0, 1, 4, 8):
            answerer = pica.PICa(examples, None, first_caption, self.reply, shots, 1, "random")
            found[shots] = float(np.mean([a == b for a, b in zip(answerer.answer(asked), true)]))
        return found

    def reply(self, prompts: list[str]) -> list[pica.Reply]:
        return pica.greedy_replies(self.decoder, self.tokenizer, prompts)

    def report(self, out) -> dict[str, dict]:
        shots = self.measure_shots(self.given.eval_items // 4 or 1)
        scores = "  ".join(f"{k} {100 * x:.1f}" for k, x in shots.items())
        print(f"prompts  exact answers in %, by examples in the prompt: {scores}")
        return {"decoder/prompts.json": {str(k): x for k, x in shots.items()}}


def first_caption(item: Item) -> str:
    return item.captions[0]


RECIPES = {"lm": text.RECIPE, "lm-prompts": Recipe(
    "GPT-3 (2005.14165v4): next-token loss on text, here with the prompts of PICa, MAGiC, Socratic Models",
    "300B tokens, 2,048 in a row, for the 175B",
    Numbers(6e-5, 1563, 93750, 117, weight_decay=0.1, beta2=0.95),
    Numbers(1e-3, 32, 600, beta2=0.95), trained=("decoder",), task="lm-prompts")}
TASKS = {"lm": TextTask, "lm-prompts": PromptTask}
