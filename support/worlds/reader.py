"""worlds/reader.py: text from which a decoder that reads one scene learns what large ones have from the web.

Several scenes in one text, examples before a question, made-up words, multiple choice, yes or no, reasons.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from data import (CAPTION, COLORS, KINDS, QA, QUESTION, SHAPES, Document, Item, Shapes, Thing,
                  caption_scene, choose, place_phrase, unique)
from model import Decoder
from papers.recipe import Numbers, Recipe
from support.formats.benchmarks import scienceqa_text
from support.formats.chat import alpaca_prompt
from support.formats.tokenizers import Tokenizer
from support.worlds import prompts
from support.worlds.forms import ShapesChoices, true_and_false
from support.worlds.prompts import PromptText
from support.worlds.steps import two_step_question
from support.worlds.text import EMPTY, STYLES, ShapesText, TextTask, describe_scene, measure_reading

STAGES = (                  # up to this share of the training, so many of the texts have these forms
    (0.39, {"scene": 0.14, "pages": 0.14, "pica": 0.05, "word": 0.2, "letters": 0.1, "choices": 0.16,
            "yes_no": 0.07, "steps": 0.1, "instruction": 0.01, "caption": 0.015, "socratic": 0.015}),
    (0.45, {"scene": 0.1, "pages": 0.06, "pica": 0.01, "word": 0.06, "letters": 0.25, "choices": 0.12,
            "yes_no": 0.15, "steps": 0.25}),            # which letter stands before a word comes first, …
    (0.72, {"scene": 0.1, "pages": 0.07, "pica": 0.02, "word": 0.08, "letters": 0.03, "choices": 0.33,
            "yes_no": 0.1, "steps": 0.25, "instruction": 0.005, "caption": 0.0075, "socratic": 0.0075}),
    (0.9, {"scene": 0.2, "pages": 0.1, "pica": 0.04, "word": 0.05, "letters": 0.01, "choices": 0.27,
           "yes_no": 0.12, "steps": 0.19, "instruction": 0.005, "caption": 0.0075, "socratic": 0.0075}),
    (1.0, {"places": 0.35, "scene": 0.15, "pages": 0.1, "pica": 0.04, "word": 0.05, "letters": 0.01,
           "choices": 0.14, "yes_no": 0.06, "steps": 0.1}))     # … and the style "place" last
DRILLS = 0.25               # of the new forms' scenes have one or two things, of contexts the answer
REASON = "\nQuestion: {} Reason:"                       # asks for the way to the answer, then the answer
ASKED = (*KINDS, "count", "position", "shape")          # kinds, each as likely as it stands here
SLOTS = 17                                              # the longest picture: so many positions
CONSONANTS, VOWELS = "bdfgklmnprtvz", "aeiou"
MADE_UP = [word for a in CONSONANTS for b in VOWELS for c in CONSONANTS
           if a != c and (word := a + b + c) not in ("red", "top")]


def made_up_words(held_out: bool) -> list[str]:
    """The words of training, or every fifth, which no training meets."""
    return [w for n, w in enumerate(MADE_UP) if (n % 5 == 0) == held_out]


class ReaderText(PromptText):
    """Documents for recipe `lm-reader`. What is added to those of `lm-prompts`:

    places        every thing of a scene whose places stand before their things ("top left: a red circle")
    pages         two to nine scenes, each before its own questions: words, or bags in the place of pictures
    word          examples in which a made-up word stands for a colour or a shape, then questions with it
    choices       ScienceQA's problems, the letter alone, or reasons before or behind it; some contexts hold
                  the answer
    letters       the same without a scene: the question names the answer, "which letter is red?"
    yes_no        MME's pairs: a true sentence and a false one, "Please answer yes or no."
    steps         questions of two steps, answered at once ("Answer:") or with the way there ("Reason:")
    instruction   Alpaca's form, the scene as its input
    """

    def document(self, index: int, progress: float = 1.0) -> tuple[Document, list[list[int]]]:
        rng = np.random.default_rng((self.world.seed, 3, index))
        shares = next(shares for until, shares in STAGES if progress <= until)
        form = str(rng.choice([*shares], p=[*shares.values()]))
        if form == "scene":
            return ShapesText.document(self, index, 1.0)
        found = getattr(self, f"{form}_document")(rng)
        return found if isinstance(found, tuple) else (found, [])

    # how a scene stands in a text

    def show(self, d: Document, bags: list, things: list[Thing], how: str, rng: np.random.Generator) -> None:
        """Append a scene as words in one of STYLES, or as bags, one form for a picture of any bridge."""
        if how in STYLES:
            d.add(describe_scene(things, how))
            return
        new = {"things": lambda: [self.bag(t) for t in things],
               "grid": lambda: self.grid_bags(things, name_empty=True),
               "bare grid": lambda: self.grid_bags(things, name_empty=False),
               "slots": lambda: self.slot_bags(things, rng)}[how]()
        bags += new
        for _ in new:
            d.image()

    def slot_bags(self, things: list[Thing], rng: np.random.Generator) -> list[list[int]]:
        """4 to SLOTS positions: each thing once or several times at random ones, the others empty."""
        n = int(rng.integers(max(4, len(things)), SLOTS + 1))
        held = [*things, *(things[i] for i in rng.integers(0, len(things), int(rng.integers(0, n))))][:n]
        slots = [self.bag(t) for t in held] + [[EMPTY] * 5] * (n - len(held))
        return [slots[i] for i in rng.permutation(n)]

    def scene(self, rng: np.random.Generator) -> list[Thing]:
        """As the world draws it, or its first thing or two: a new form is learned there first."""
        things = self.world.scene(rng)
        return things[:int(rng.integers(1, 3))] if rng.random() < DRILLS else things

    def way_to_show(self, rng: np.random.Generator) -> str:
        pictures = rng.random() < self.bags
        return str(choose(["things", "grid", "bare grid", "slots"] if pictures else [*STYLES], rng))

    def ask(self, things: list[Thing], rng: np.random.Generator, kinds=ASKED) -> QA:
        """A question about a scene that has an answer."""
        for kind in rng.permutation(kinds):
            if q := self.world.question(things, str(kind), rng):
                return q
        return self.world.question(things, "existence", rng)

    # the forms

    def places_document(self, rng: np.random.Generator) -> tuple[Document, list]:
        d, things = Document(self.tokenizer), self.world.scene(rng)
        d.add(describe_scene(things, "place"))
        for t in [things[i] for i in rng.permutation(len(things))]:
            if unique(things, [t], lambda o: o.pair):
                d.turn(QUESTION.format(f"where is the {t.color} {t.shape}?"), t.place)
            d.turn(QUESTION.format(f"what color is the object at the {t.place}?"), t.color)
            if rng.random() < 0.5:
                d.turn(QUESTION.format(f"what shape is at the {t.place}?"), t.shape)
        if rng.random() < 0.3:
            d.turn(CAPTION, caption_scene(sorted(things, key=lambda t: t.cell)))
        return d, []

    def pages_document(self, rng: np.random.Generator) -> tuple[Document, list]:
        d, bags, how = Document(self.tokenizer), [], self.way_to_show(rng)
        mixed = rng.random() < 0.15
        for _ in range(int(rng.choice([2, 3, 4, 5, 7, 9], p=[0.2, 0.2, 0.2, 0.2, 0.1, 0.1]))):
            things = self.world.scene(rng)
            self.show(d, bags, things, self.way_to_show(rng) if mixed else how, rng)
            if rng.random() < 0.15:
                d.turn(CAPTION, caption_scene(sorted(things, key=lambda t: t.cell)))
            for _ in range(int(rng.integers(1, 4))):
                q = self.ask(things, rng)
                d.turn(QUESTION.format(q.question), q.answer)
        return d, bags

    def word_document(self, rng: np.random.Generator) -> tuple[Document, list]:
        word = str(choose(made_up_words(held_out=False), rng))
        return self.word_prompt(rng, word, int(rng.integers(3, 8)), self.way_to_show(rng), self.scene)[:2]

    def word_prompt(self, rng: np.random.Generator, word: str, examples: int, how: str,
                    scene: Callable, ends: bool = True) -> tuple[Document, list, str]:
        """Examples in which `word` stands for a colour or a shape, then a question that needs it; its answer.

        The first example cannot be known and is not learned. scene(rng) → things; ends=False: without the
        last answer.
        """
        kind = str(choose(["color", "shape"], rng))
        value = str(choose([*(COLORS if kind == "color" else SHAPES)], rng))
        d, bags = Document(self.tokenizer), []
        for n in range(examples + 1):
            meant = n < 2 or rng.random() < (0.7 if n == examples else 0.5)     # is this one about the word?
            things, q = self.word_question(kind, value, word, meant, n == examples, rng, scene)
            self.show(d, bags, things, how, rng)
            d.add(QUESTION.format(q.question))
            if n == examples and not ends:
                return d, bags, q.answer
            d.add(f" {q.answer}", learn=n > 0).ids([self.tokenizer.eos], learn=True)
        return d, bags, q.answer

    def word_question(self, kind: str, value: str, word: str, meant: bool, last: bool,
                      rng: np.random.Generator, scene: Callable) -> tuple[list[Thing], QA]:
        """A scene and a question whose answer is the word, if it is meant; the last may also ask with it."""
        while True:
            things = scene(rng)
            if meant and not any(getattr(t, kind) == value for t in things):
                i = int(rng.integers(len(things)))
                things[i] = replace(things[i], **{kind: value})
            if meant and rng.random() < (0.4 if last else 0.25):            # where is the dax ring?
                q = self.world.question(things, str(choose(["count", "position"], rng)), rng)
                if q and f" {value}" in q.question:
                    plural = f" {word} objects" if kind == "color" else f" {word}s"
                    named = q.question.replace(f" {value}es", plural).replace(f" {value}s", plural)
                    return things, replace(q, question=named.replace(f" {value}", f" {word}"))
                continue
            q = self.world.question(things, kind, rng)
            if q and (q.answer == value) == meant:
                return things, replace(q, answer=word if meant else q.answer)

    def scene_to_ask_about(self, rng: np.random.Generator) -> tuple[Document, list, list[Thing]]:
        d, bags, things, how = Document(self.tokenizer), [], self.scene(rng), self.way_to_show(rng)
        if how in ("grid", "bare grid", "slots"):       # the order in which a text goes through them
            things.sort(key=lambda t: t.cell)
        self.show(d, bags, things, how, rng)
        return d, bags, things

    def choices_document(self, rng: np.random.Generator) -> tuple[Document, list]:
        d, bags, things = self.scene_to_ask_about(rng)
        form = str(rng.choice(["QCM-A", "QCM-LEA", "QCM-ALE"], p=[0.75, 0.17, 0.08]))
        for _ in range(int(rng.integers(2, 5))):
            q = self.ask(things, rng, (*ASKED, "count", "count", "position", "position"))
            q = letter_question(q, things, rng)
            if rng.random() < DRILLS:                   # the context says the answer, its letter is asked for
                q = replace(q, hint=q.answer)
            if form == "QCM-A" and rng.random() < 0.8:
                self.ask_for_letter(d, q)
            else:
                prompt, answer = scienceqa_text(q, form)
                d.turn(f"\n{prompt}", answer)
        return d, bags

    def ask_for_letter(self, d: Document, q: QA) -> None:
        """Of "The answer is B." the letter alone is learned."""
        prompt, answer = scienceqa_text(q, "QCM-A")
        words, letter = answer.rsplit(" ", 1)
        d.add(f"\n{prompt} {words}").add(f" {letter}", learn=True).end()

    def letters_document(self, rng: np.random.Generator) -> tuple[Document, list]:
        d, things = Document(self.tokenizer), self.world.scene(rng)
        for _ in range(int(rng.integers(2, 6))):
            q = self.ask(things, rng)
            q = letter_question(replace(q, question=f"which letter is {q.answer}?"), things, rng)
            self.ask_for_letter(d, q)
        return d, []

    def yes_no_document(self, rng: np.random.Generator) -> tuple[Document, list]:
        d, bags, things = self.scene_to_ask_about(rng)
        for _ in range(int(rng.integers(1, 4))):
            q = self.ask(things, rng, (*KINDS, "count", "count", "position"))       # harder: these two
            pair = yes_no_questions(q, things, self.world, rng)
            for n in rng.permutation(2):
                d.turn(QUESTION.format(pair[n]), ("yes", "no")[n])
        return d, bags

    def steps_document(self, rng: np.random.Generator) -> tuple[Document, list]:
        d, bags, things = self.scene_to_ask_about(rng)
        questions = [q for _ in range(int(rng.integers(2, 6))) if (q := two_step_question(things, rng))]
        for q in questions:
            if rng.random() < 0.7:
                d.turn(REASON.format(q.question), f"{q.solution}: {q.answer}")
            else:
                d.turn(QUESTION.format(q.question), q.answer)
        if not questions:
            d.turn(CAPTION, caption_scene(sorted(things, key=lambda t: t.cell)))
        return d, bags

    def instruction_document(self, rng: np.random.Generator) -> Document:
        things = self.world.scene(rng)
        q = self.ask(things, rng)
        prompt = alpaca_prompt(q.question, describe_scene(things, "at"))
        return Document(self.tokenizer).turn(prompt, q.answer)


def letter_question(q: QA, things: list[Thing], rng: np.random.Generator) -> QA:
    """The question as ScienceQA asks it, with at most four options in random order."""
    item = Item(None, [caption_scene(sorted(things, key=lambda t: t.cell))], [q])
    return OPTIONS.choice(q, item, rng)


def yes_no_questions(q: QA, things: list[Thing], world: Shapes, rng: np.random.Generator) -> list[str]:
    """MME's two: the answer to the first is yes, to the second no."""
    item = Item(None, [], [q], about="; ".join(map(place_phrase, things)))
    pairs = [f"{c} {s}" for c, s in world.asked]
    return [f"{sentence} Please answer yes or no." for sentence in true_and_false(q, item, pairs, rng)]


OPTIONS = ShapesChoices("all")


# ---- The gate --------------------------------------------------------------------------------------------

def measure_reader(decoder: Decoder, tokenizer: Tokenizer, generate_texts: Callable,
                   count: int = 200) -> dict[str, float]:
    """Exact answers about scenes in words that no training met, of `count` questions each; in 0 … 1.

        page               about the last of four scenes, each behind its own question and answer
        0, 4, 8 shots      about the last scene, behind so many others with a question and an answer
        made-up word       explained by four examples, of a word that no training met
        letters            ScienceQA's options in any order, the letter alone
        yes and no         both of MME's pair are right (accuracy+)
        reason, at once    questions of two steps, with the way to the answer and without
    """
    text, found = ReaderText(tokenizer, seed=1), {}
    words = made_up_words(held_out=True)

    def right(asked: list[tuple[Document, str]], longest: int = 6) -> list[bool]:
        said = generate_texts(decoder, [d for d, _ in asked], tokenizer, longest)
        return [s.split(": ")[-1] == answer for s, (_, answer) in zip(said, asked)]

    def rngs() -> Iterator[tuple[np.random.Generator, str]]:
        return ((text.world.rng(20_000_000 + n), [*STYLES][n % len(STYLES)]) for n in range(count))

    def behind(shots: int, rng: np.random.Generator, style: str) -> tuple[Document, str]:
        d = Document(tokenizer)
        things = text.world.scene(rng)                  # the same one for any number of shots
        q = text.ask(things, rng, KINDS)
        for _ in range(shots):
            other = text.world.scene(rng)
            example = text.ask(other, rng, KINDS)
            d.add(describe_scene(other, style)).turn(QUESTION.format(example.question), example.answer)
        return d.add(describe_scene(things, style)).add(QUESTION.format(q.question)), q.answer

    for shots in (0, 3, 4, 8):
        name = "page" if shots == 3 else f"{shots} shots"
        found[name] = right([behind(shots, rng, style) for rng, style in rngs()])
    prompts = [text.word_prompt(rng, str(choose(words, rng)), 4, style, text.world.scene, ends=False)
               for rng, style in rngs()]
    found["made-up word"] = right([(d, answer) for d, _, answer in prompts])
    letters, pairs, steps, at_once = [], [], [], []
    for rng, style in rngs():
        things = text.world.scene(rng)
        q, shown = text.ask(things, rng, KINDS), describe_scene(things, style)
        prompt, answer = scienceqa_text(letter_question(q, things, rng), "QCM-A")
        letters.append((Document(tokenizer).add(shown).add(f"\n{prompt}"), answer))
        for sentence, truth in zip(yes_no_questions(q, things, text.world, rng), ("yes", "no")):
            pairs.append((Document(tokenizer).add(shown).add(QUESTION.format(sentence)), truth))
        if two := two_step_question(things, rng):
            steps.append((Document(tokenizer).add(shown).add(REASON.format(two.question)), two.answer))
            at_once.append((Document(tokenizer).add(shown).add(QUESTION.format(two.question)), two.answer))
    found["letters"] = right(letters, 12)
    hits = right(pairs)
    found["yes and no"] = [a and b for a, b in zip(hits[::2], hits[1::2])]
    found["reason"], found["at once"] = right(steps, 60), right(at_once)
    return {name: float(np.mean(hits)) for name, hits in found.items()}


GATE = {"page": 0.95, "made-up word": 0.8, "letters": 0.95, "yes and no": 0.9, "reason": 0.95}     # at least


class ReaderTask(TextTask):
    """Recipe `lm-reader`: the decoder of recipe `lm` reads on (ReaderText)."""
    documents = ReaderText

    def progress(self, step: int) -> float:
        return step / self.given.steps

    def check(self) -> dict[str, float]:
        return measure_reader(self.decoder, self.tokenizer, self.given.generate_texts, 40)

    def report(self, out) -> dict[str, dict]:
        """The gate, a line for each number."""
        g = self.given
        scenes = measure_reading(self.decoder, self.tokenizer, g.generate_texts, g.eval_items // 4, [*STYLES])
        found = measure_reader(self.decoder, self.tokenizer, g.generate_texts, g.eval_items)
        rows = [(f"scenes, {name}", x, 0.97) for name, x in scenes.items()]
        rows += [(name, x, GATE.get(name, 0.0)) for name, x in found.items()]
        rows += [(f"{k} shots against 0", found[f"{k} shots"], found["0 shots"]) for k in (4, 8)]
        for name, x, least in rows:
            print(f"{'passed' if x >= least else 'MISSED'}  {name:20s}{100 * x:6.1f} % of {100 * least:.0f}")
        return {"decoder/reading.json": {"scenes": scenes, "reader": found}}


RECIPES = prompts.RECIPES | {"lm-reader": Recipe(
    "GPT-3 (2005.14165v4): next-token loss on text that teaches to learn from the text itself",
    "300B tokens, 2,048 in a row, for the 175B",
    Numbers(6e-5, 1563, 93750, 117, weight_decay=0.1, beta2=0.95),
    Numbers(1e-3, 32, 25400, beta2=0.95, optimizer="muon", muon_lr=0.01), trained=("decoder",),
    task="lm-reader")}
TASKS = prompts.TASKS | {"lm-reader": ReaderTask}
