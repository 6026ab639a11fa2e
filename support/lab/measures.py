"""lab/measures.py: what the full comparison asks of a model, and how each answer is scored."""
from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import data
from eval import accuracy_by_kind, answer_accuracy, caption_scores, chance_scores, mean
from support.formats.benchmarks import mme_scores, postprocess_answer, scienceqa_accuracy, scienceqa_choice
from support.formats.datasets import MME
from support.formats.files import UserError
from support.formats.vqa import textvqa_normalize
from support.lab.protocols import (Comparison, PROTOCOLS, build_prompt, few_shot_examples, multiple_choice,
                                   yes_no_pairs)
from support.plumbing.cli import is_error_of_the_math
from support.worlds import KINDS, NO_QUESTIONS, open_data, open_split, take_items

Cells = dict[tuple[str, ...], float]            # {(measure,): number, (part, measure): number}


@dataclass(frozen=True)
class Settings:
    """What all rows of a table share."""
    specs: tuple[str, ...] = ()                 # data sets; none: each run's own
    protocol: str = "ours"
    shots: tuple[int, ...] = (0, 4, 8)          # numbers of examples in the prompt
    count: int = 400                            # pictures per row
    seed: int = 0                               # draws examples and choices
    beams: int = 1
    folder: str | None = None                   # of predictions
    device: str = "cpu"
    follow_links: bool = False                  # read pictures behind links that leave their data set
    alone: bool = False                         # soft tokens read no word before them (lab/alone.py)


@dataclass
class EvaluationSet:
    """The held-out items of a data set, and examples of its training split for each."""
    world: object
    items: list[data.Item]
    seed: int = 0
    asked: object = None                        # the world of the split that the items are of
    missing: int = 0                            # items whose picture cannot be read: in no cell and no file
    drawn: dict[int, list[list[data.Item]]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.world.name.split(":")[0]

    def count_questions(self) -> int:
        """Of the whole split, asked or not: what an official file of answers must hold."""
        return sum(bool(r.question) for group in self.asked.items for r in group)

    @functools.cached_property
    def train(self):
        return open_split(self.world, self.world.splits[0])

    def examples(self, k: int) -> list[list[data.Item]]:
        """k examples for each item."""
        if k == 0:
            return [[] for _ in self.items]
        if k not in self.drawn:
            self.drawn[k] = [few_shot_examples(self.train, item, k, self.seed) for item in self.items]
        return self.drawn[k]


def open_set(spec: str, settings: Settings) -> EvaluationSet:
    """The first items of the split that the table's spec names, or of the held-out one."""
    world = open_data(spec, settings.seed, follow_links=settings.follow_links)
    named = settings.specs and spec.endswith(f":{world.split}")
    asked = open_split(world, world.split if named else world.held_out)
    items = take_items(asked, settings.count)
    missing = min(settings.count, len(asked)) - len(items) if asked.finite else 0
    return EvaluationSet(world, items, settings.seed, asked, missing)


# What is asked ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Measure:
    """A column of the table and what is asked for it: (number of the item, question; None for a caption)."""
    name: str
    asked: list[tuple[int, data.QA | None]]
    shots: int = 0
    max_new_tokens: int = 12
    evaluator: str = ""                         # compares open answers; "": the data set's own


NO_OPEN_QUESTIONS = NO_QUESTIONS & KINDS.keys() | {"scienceqa", "mme"}      # kinds that read no shots


def build_questions(dataset: EvaluationSet, shots: tuple[int, ...]) -> list[Measure]:
    """The measures of a data set.

    CIDEr       captions; BLEU-4 comes with it
    0-shot …    open questions, with 0, … examples
    SQA         multiple choice in ScienceQA's words, of data that has choices: the choice that is written
    SQA rank    of generated worlds: the choice that is likeliest to be written, and then the stop token.
                So a bridge can be asked that has never met a letter.
    MME         two questions a picture; "yes" or "no" is read as its evaluation reads it
    """
    world, items = dataset.world, dataset.items
    asked = [(n, q) for n, item in enumerate(items) for q in item.qas]
    multiple = [(n, q) for n, q in asked if q.choices]
    captioned = [(n, None) for n, item in enumerate(items)
                 if item.image is not None and (item.captions or not item.qas)]
    if world.finite and world.kind == "mme":
        return [Measure("MME", sorted(asked, key=lambda pair: pair[1].source.id), max_new_tokens=6)]
    open_questions = [(n, q) for n, q in asked if not q.choices] if world.finite else asked
    measures = [Measure("CIDEr", captioned, max_new_tokens=64),
                *(Measure(f"{k}-shot", open_questions, k) for k in shots),
                Measure("SQA", multiple, max_new_tokens=256)]
    if not world.finite:
        pairs = [*yes_no_pairs(items, dataset.seed)] if isinstance(world, data.Shapes) else []
        measures += [Measure("SQA rank", [*multiple_choice(items, dataset.seed)]),
                     Measure("MME", pairs, max_new_tokens=6)]
    return measures


def build_prompts(comparison: Comparison, dataset: EvaluationSet, measure: Measure, protocol: str,
                  form: str) -> tuple[list[data.Document], list[list[data.Item]]]:
    """A document for each question, and the items whose pictures stand in it."""
    bare = PROTOCOLS[protocol].bare if measure.shots == 0 and measure.name != "SQA rank" else 0
    examples = dataset.examples(measure.shots or bare)
    if bare:
        examples = [[replace(example, image=None) for example in row] for row in examples]
    documents = [build_prompt(comparison.tokenizer, protocol, dataset.items[n], q, examples[n], form)
                 for n, q in measure.asked]
    return documents, [[*examples[n], dataset.items[n]] for n, _ in measure.asked]


def question_keys(dataset: EvaluationSet, measure: Measure) -> list[str]:
    return [", ".join([measure.name, dataset.items[n].id, *([q.question] if q else [])])
            for n, q in measure.asked]


def write_answers(comparison: Comparison, dataset: EvaluationSet, measure: Measure, protocol: str,
                  form: str) -> list[str]:
    """What the model writes to each question, as the protocol's rule reads it."""
    if measure.name == "SQA" and not PROTOCOLS[protocol].choices:
        protocol = "scienceqa"
    p = PROTOCOLS[protocol]
    documents, items = build_prompts(comparison, dataset, measure, protocol, form)
    keys = question_keys(dataset, measure)
    texts = comparison.texts(keys, documents, items, measure.max_new_tokens)
    if protocol == "scienceqa" and form.endswith("PA"):
        texts = prompt_answers(comparison, keys, documents, items, texts)
    if rule := p.rules[measure.name == "CIDEr"]:
        texts = [postprocess_answer(rule, text) for text in texts]
    return [*map(textvqa_normalize, texts)] if p.processed and measure.name.endswith("-shot") else texts


def prompt_answers(comparison: Comparison, keys: list[str], documents: list[data.Document],
                   items: list[list[data.Item]], texts: list[str]) -> list[str]:
    """LLaVA's answer prompter, for a model that was trained on the form QCM-LEPA.

    What it wrote up to "###" is its reasoning; asked again behind "###\nANSWER:" it writes the letter.
    """
    reasons = [text.partition("###")[0].strip() for text in texts]
    for document, reason in zip(documents, reasons):
        document.add(f" {reason} ###\nANSWER:")
    answers = comparison.texts([f"{key}, ANSWER" for key in keys], documents, items, 8)
    return [f"{reason}\n The answer is {answer}" for reason, answer in zip(reasons, answers)]


def rank_choices(comparison: Comparison, dataset: EvaluationSet, measure: Measure, protocol: str,
                 form: str) -> list[int]:
    """The choice of each question that is likeliest to be written, and then the stop token."""
    choices = [c for _, q in measure.asked for c in q.choices]
    repeated = replace(measure, asked=[(n, q) for n, q in measure.asked for _ in q.choices])
    documents, items = build_prompts(comparison, dataset, repeated, protocol, form)
    documents = [d.add(" " + c, learn=True).end() for d, c in zip(documents, choices)]
    keys = [f"{key}, {c}" for key, c in zip(question_keys(dataset, repeated), choices)]
    logp = iter(comparison.log_likelihoods(keys, documents, items))
    return [int(np.argmax([next(logp) for _ in q.choices])) for _, q in measure.asked]


# What it scores --------------------------------------------------------------------------------------------

def measure_cells(comparison: Comparison, dataset: EvaluationSet, settings: Settings = Settings(),
                  form: str = "QCM-LEA") -> tuple[Cells, dict[str, list[tuple]], list[str]]:
    """Cells, predictions {measure: rows of `save_predictions`}, and why a measure is missing.

    In %, CIDEr and BLEU-4 x 100, MME in points. Parts: kinds of question, of which VQA of a generated world
    is the mean; the columns of ScienceQA's tables; MME's tasks, of which perception is summed.
    form: of `scienceqa_text`.
    """
    cells, predictions, notes = {}, {}, []
    for measure in build_questions(dataset, settings.shots):
        measure = replace(measure, evaluator=PROTOCOLS[settings.protocol].evaluator)
        answer = rank_choices if measure.name == "SQA rank" else write_answers
        try:
            answers = answer(comparison, dataset, measure, settings.protocol, form)
        except ValueError as e:                 # a bridge that takes one picture; too few examples on disk
            if not (isinstance(e, UserError) or is_error_of_the_math(e)):
                raise
            notes.append(f"{measure.name} is empty: {e}")
            continue
        if measure.asked:
            score = next(f for end, f in SCORES.items() if measure.name.endswith(end))
            found, predictions[measure.name] = score(dataset, measure, answers)
            cells |= found
    return cells, predictions, notes


def prediction_ids(dataset: EvaluationSet, measure: Measure) -> list:
    return [q.source.id if dataset.world.finite and q else dataset.items[n].id for n, q in measure.asked]


def score_captions(dataset: EvaluationSet, measure: Measure, texts: list[str]) -> tuple[Cells, list[tuple]]:
    references, cells = [dataset.items[n].captions for n, _ in measure.asked], {}
    if all(references):
        scores = caption_scores(texts, references)
        cells = {("CIDEr",): 100 * scores["cider"], ("B@4",): 100 * scores["bleu4"]}
    return cells, [*zip(prediction_ids(dataset, measure), texts)]


def score_open_questions(dataset: EvaluationSet, measure: Measure,
                         texts: list[str]) -> tuple[Cells, list[tuple]]:
    questions, cells = [q for _, q in measure.asked], {}
    if all(q.answer for q in questions):
        scores = [answer_accuracy(q, text, measure.evaluator) for q, text in zip(questions, texts)]
        official = mean(scores) if dataset.world.finite else None
        cells = vqa_cells(measure.name, accuracy_by_kind(questions, texts, measure.evaluator), official)
    return cells, [*zip(prediction_ids(dataset, measure), texts)]


def score_yes_no(dataset: EvaluationSet, measure: Measure, texts: list[str]) -> tuple[Cells, list[tuple]]:
    rows = []
    for (n, q), text in zip(measure.asked, texts):
        picture = Path(q.source.images[0]).name if dataset.world.finite else dataset.items[n].id
        rows.append((q.kind, picture, q.question, q.answer, text))
    scores = mme_scores(rows)
    return mme_cells({task: x["score"] for task, x in scores.items() if isinstance(x, dict)}), rows


def score_written_choices(dataset: EvaluationSet, measure: Measure,
                          texts: list[str]) -> tuple[Cells, list[tuple]]:
    questions = [q for _, q in measure.asked]
    picked = [scienceqa_choice(text, len(q.choices)) for q, text in zip(questions, texts)]
    parts = {}
    if dataset.world.finite:
        problems = {n: {**q.source.more, "image": q.source.images, "answer": q.correct}
                    for n, q in enumerate(questions)}
        parts = scienceqa_accuracy(problems, dict(enumerate(picked)))
        parts.pop("Avg", None)
    cells = {(part, measure.name): 100 * x for part, x in parts.items()}
    cells[measure.name,] = 100 * mean([choice == q.correct for choice, q in zip(picked, questions)])
    return cells, [*zip(prediction_ids(dataset, measure), picked, texts)]


def score_ranked_choices(dataset: EvaluationSet, measure: Measure,
                         picked: list[int]) -> tuple[Cells, list[tuple]]:
    right = [choice == q.correct for choice, (_, q) in zip(picked, measure.asked)]
    return {(measure.name,): 100 * mean(right)}, []


SCORES = {"CIDEr": score_captions, "-shot": score_open_questions, "SQA": score_written_choices,
          "SQA rank": score_ranked_choices, "MME": score_yes_no}        # end of a measure's name → its score


def vqa_cells(measure: str, kinds: dict[str, float], official: float | None) -> Cells:
    """Of kinds of question and of all: `official`, the mean over questions, or else the mean over kinds."""
    cells = {(kind, measure): 100 * x for kind, x in kinds.items() if kind != "mean"}
    return cells | {(measure,): 100 * (kinds["mean"] if official is None else official)}


def mme_cells(tasks: dict[str, float]) -> Cells:
    perception = sum(tasks.get(task, 0) for task in MME["perception"])
    return {(task, "MME"): x for task, x in tasks.items()} | {("MME",): perception}


def chance_cells(dataset: EvaluationSet, shots: tuple[int, ...]) -> Cells:
    """Chance row: the most frequent answer in training for open questions, a uniform guess for choices."""
    cells = {}
    for measure in build_questions(dataset, shots):
        questions = [q for _, q in measure.asked]
        if not questions:
            continue
        if measure.name.endswith("-shot") and all(q.answer for q in questions):
            kinds = chance_scores(dataset.train, dataset.items)
            official = mean([kinds[q.kind] for q in questions]) if dataset.world.finite else None
            cells |= vqa_cells(measure.name, kinds, official)
        elif measure.name.startswith("SQA"):
            cells[measure.name,] = 100 * mean([1 / len(q.choices) for q in questions])
        elif measure.name == "MME":
            cells |= mme_cells({q.kind: 75.0 for q in questions})       # acc 1/2, acc+ 1/4
    return cells
