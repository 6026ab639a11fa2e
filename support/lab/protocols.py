"""lab/protocols.py: how a paper asks a question, with and without examples, and what a model answers."""
from __future__ import annotations

import collections
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
from eval import generate_texts, vision_features
from model import IGNORE, VLM
from support.formats.benchmarks import scienceqa_text
from support.formats.chat import use_template
from support.formats.files import UserError
from support.formats.tokenizers import Tokenizer
from support.worlds import CONVERSATIONS
from support.worlds.files import MissingPicture
from support.worlds.forms import true_and_false


@dataclass(frozen=True)
class Protocol:
    """How a paper words the text behind a picture, and how its examples end."""
    question: str                           # {}: the question
    caption: str = ""
    first: str = ""                         # once, before the first question
    answer: str = " {}"                     # of an example
    stop: bool = True                       # an example ends with <|endofchunk|>, or else the stop token
    between: str = ""                       # … and then with this
    bare: int = 0                           # zero-shot shows so many examples without their pictures
    rules: tuple[str, str] = ("", "")       # of `postprocess_answer`: for answers, for captions
    chat: bool = False                      # a conversation, as the model's own template writes it
    choices: tuple[str, str] = ()           # multiple choice: form of scienceqa_text, {}: its prompt
    processed: bool = False                 # open answers are written as TextVQA's evaluation spells them
    evaluator: str = ""                     # of EVALUATORS in formats/vqa.py; "": the data set's own


PROTOCOLS = {
    "ours": Protocol(data.QUESTION, data.CAPTION),                          # what train.py teaches
    "mapl": Protocol("Question: {} Answer:", "", "Please answer the question. ", " {}.", stop=False,
                     rules=("mapl", "mapl")),
    "flamingo": Protocol("Question: {} Answer:", "Output:", bare=2, rules=("flamingo", "flamingo")),
    "openflamingo": Protocol("Question:{} Short answer:", "Output:", answer="{}", between="\n", bare=2,
                             rules=("openflamingo-vqa", "openflamingo-caption"), evaluator="openflamingo"),
    "blip2": Protocol("Question: {} Short answer:", "a photo of", rules=("blip2", "blip2"),
                      evaluator="lavis"),
    "llava": Protocol("{}\nAnswer the question using a single word or phrase.",
                      "Describe the image concisely.", answer="{}", rules=("llava", "llava"), chat=True,
                      choices=("CQM-A", "{}\nAnswer with the option's letter from the given choices "
                                        "directly."), processed=True),
    "scienceqa": Protocol("\n{}", data.CAPTION),                        # {}: the problem, see scienceqa_text
    "mme": Protocol(data.QUESTION.format("{} Please answer yes or no."), data.CAPTION),
}

WORD = "word"                   # the recipe, and the form, in which a picture is a word of the sentence


def learned_chat(facts: dict, tokenizer: Tokenizer, template: str = "") -> str:
    """The chat form in which a run is asked; "" = as data.QUESTION has it. facts: its config.json.

    A --template, given by hand or learned; "own", its decoder's, where its first data set held conversations;
    WORD after recipe word, whichever template writes it. From now on the tokenizer's answers end as there.
    """
    settings = facts.get("settings", {})
    spec = (settings.get("data") or "").split(" + ")[0].split(" * ")[0].strip()
    word = settings.get("recipe") == WORD
    chat = settings.get("template") or "own" if word or spec.partition(":")[0] in CONVERSATIONS else ""
    if template:
        use_template(template, tokenizer)
    elif chat:
        tokenizer.text_end = tokenizer.template.text_end
    return WORD if word else template or chat


@dataclass(frozen=True)
class Exchange:
    """One picture, what is asked about it, and how the protocol writes its answer."""
    pictured: bool
    prompt: str
    answer: str


def build_prompt(tokenizer: Tokenizer, protocol: str, item: data.Item, question: data.QA | None = None,
                 examples: list[data.Item] = (), form: str = "QCM-LEA") -> data.Document:
    """A question about an item (without a question: its caption) behind examples with a question each.

        mapl, one example:   <image>Please answer the question. Question: is it red? Answer: yes.
                             <image>Question: is it blue? Answer:

    A picture stands before its text. The wording of MAPL's prompts with examples is not published: the
    instruction once is our reading of the one prompt that is. form: of scienceqa_text.
    """
    p, document = PROTOCOLS[protocol], data.Document(tokenizer)
    pairs = [*((example, question and example.qas[0]) for example in examples), (item, question)]
    exchanges = [word_exchange(protocol, *pair, form, first=n == 0) for n, pair in enumerate(pairs)]
    if p.chat:
        turns = []
        for exchange in exchanges:
            turns.append({"role": "user", "content": "<image>\n" * exchange.pictured + exchange.prompt})
            turns.append({"role": "assistant", "content": exchange.answer})
        return document.chat(turns[:-1])
    for n, exchange in enumerate(exchanges):
        if exchange.pictured:
            document.image()
        document.add(exchange.prompt)
        if n < len(examples):
            stop = [tokenizer.special.get("<|endofchunk|>", tokenizer.eos)] * p.stop
            document.add(exchange.answer).ids(stop).add(p.between)
    return document


def word_exchange(protocol: str, item: data.Item, q: data.QA | None, form: str, first: bool) -> Exchange:
    """The protocol's words for one item of a prompt."""
    p, pictured = PROTOCOLS[protocol], item.image is not None
    if q is None:
        return Exchange(pictured, p.caption, p.answer.format(next(iter(item.captions), "")))
    text, answer, question = q.question, q.answer, p.question
    if q.choices and p.choices:
        form, question = p.choices
        text, answer = scienceqa_text(q, form)
        text = text.removesuffix("\nAnswer:")
    if protocol == "scienceqa":
        if not q.choices:
            raise UserError('the protocol "scienceqa" asks multiple choice, and these questions have no '
                            "choices; take another.")
        text, answer = scienceqa_text(q, form)
    if protocol == "mme":
        text = text.removesuffix(" Please answer yes or no.")
    return Exchange(pictured, p.first * first + question.format(text), p.answer.format(answer))


def few_shot_generator(seed: int, item: data.Item) -> np.random.Generator:
    """Random numbers that belong to an item, whatever else is asked and in which order."""
    return np.random.default_rng((seed, zlib.crc32(item.id.encode())))


def few_shot_examples(train, item: data.Item, k: int, seed: int = 0, pool: int = 2048) -> list[data.Item]:
    """k examples for an item, each with one question, from the first `pool` items of the training split.

    OpenFlamingo draws them so. The item and its picture are never among them. Four are the first of eight.
    """
    if k == 0:
        return []
    rng, found = few_shot_generator(seed, item), []
    pool = min(pool, len(train)) if train.finite else pool
    for i in rng.permutation(pool):
        try:
            other = train.item(int(i))
        except MissingPicture:
            continue
        same = other.image is not None and item.image is not None and np.array_equal(other.image, item.image)
        if other.id != item.id and not same:
            answered = [q for q in other.qas if q.answer]
            found.append(replace(other, qas=[answered[rng.integers(len(answered))]] if answered else []))
        if len(found) == k:
            return found
    raise UserError(f"the training split of {train.name} has {len(found)} other items, too few for {k} "
                    "examples.")


def multiple_choice(items: list[data.Item], seed: int = 0) -> Iterator[tuple[int, data.QA]]:
    """ScienceQA's form of one question of each item: (number of the item, the question with choices).

    The answer stands among up to three other answers to questions of its kind, in random order.
    """
    answers = collections.defaultdict(set)
    for item in items:
        for q in item.qas:
            answers[q.kind].add(q.answer)
    for n, item in enumerate(items):
        rng = few_shot_generator(seed, item)
        for q in item.qas[n % len(item.qas):][:1] if item.qas else ():
            others = rng.permutation(sorted(answers[q.kind] - {q.answer}))[:3].tolist()
            if others:
                choices = rng.permutation([q.answer, *others]).tolist()
                yield n, replace(q, choices=tuple(choices), correct=choices.index(q.answer))


def yes_no_pairs(items: list[data.Item], seed: int = 0) -> Iterator[tuple[int, data.QA]]:
    """MME's form of one question of each picture of `shapes`: one with the answer Yes, then one with No.

    The kind of question is the task. The bundled decoder was taught no sentence for counts and places but
    "how many …" and "where is …", so these two are new to it.
    """
    asked_pairs = sorted({" ".join(q.question[:-1].split()[3:]) for item in items for q in item.qas
                          if q.kind == "existence"})
    for n, item in enumerate(items):
        rng, q = few_shot_generator(seed, item), item.qas[n % len(item.qas)]
        for sentence, truth in zip(true_and_false(q, item, asked_pairs, rng), ("Yes", "No")):
            yield n, data.QA(q.kind, sentence, truth)


@torch.no_grad()
def log_likelihoods(vlm: VLM, documents: list[data.Document], features: Tensor, pictures: list[list[int]],
                    batch: int = 128) -> list[float]:
    """log p of each document's supervised tokens, in nats; pictures: the rows of `features` in each."""
    found = []
    for at in range(0, len(documents), batch):
        tokens, labels, mask = (x.to(features.device) for x in data.collate(documents[at:at + batch]))
        own = features[sum(pictures[at:at + batch], [])]
        inputs, labels = vlm.prepare(tokens, own, None if mask.all() else mask, labels)
        keep = labels[:, 1:] != IGNORE
        logits = vlm.decoder.logits(vlm.decoder.states(**inputs)[-1][:, :-1][keep], vlm.bridge)
        loss = F.cross_entropy(logits.float(), labels[:, 1:][keep], reduction="none")
        found += loss.new_zeros(len(tokens)).index_add(0, keep.nonzero()[:, 0], -loss).tolist()
    return found


def read_results(file: Path) -> dict[str, str | float]:
    """What a Comparison has kept: a key and its result a line. A line that a crash cut short is left out."""
    results = {}
    for n, line in enumerate(file.read_bytes().split(b"\n"), 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        kinds = [type(value) for value in entry] if isinstance(entry, list) else []
        if len(kinds) != 2 or kinds[0] is not str or kinds[1] not in (str, float, int):
            raise UserError(f"{file}, line {n}: {entry!r:.40} is no key and its result; remove the file.")
        results.update([entry])
    return results


class Comparison:
    """A model and what it wrote about a data set: features once per picture, results once per key.

    `file` keeps the results, a line of JSON for each, so that a later call goes on. prefix: what the keys of
    this model and data set have in common.
    """

    def __init__(self, vlm: VLM, tokenizer: Tokenizer, blind: bool = False, beams: int = 1,
                 file: Path | None = None, prefix: str = ""):
        self.vlm, self.tokenizer, self.blind, self.beams = vlm, tokenizer, blind, beams
        self.file, self.prefix = file, prefix
        with torch.no_grad():
            self.features = vlm.features(None)          # of no picture yet
        if not isinstance(self.features, Tensor):
            raise UserError("this model reads a picture in tiles, which the comparison does not cut; ask it "
                            "about one picture: python eval.py ask MODEL --image FILE --prompt TEXT.")
        self.row_of: dict[int, int] = {}                # hash of a picture → its row of the features
        self.results = read_results(file) if file and file.exists() else {}

    def feature_rows(self, prompts: list[list[data.Item]]) -> list[list[int]]:
        """Rows of the features: the pictures of each prompt."""
        hashes = [[(hash(i.image.tobytes()), i) for i in items if i.image is not None] for items in prompts]
        new = {h: i for row in hashes for h, i in row if h not in self.row_of}
        if new:
            self.features = torch.cat((self.features, vision_features(self.vlm, [*new.values()], self.blind)))
            self.row_of |= {h: len(self.row_of) + n for n, h in enumerate(new)}
        return [[self.row_of[h] for h, _ in row] for row in hashes]

    def texts(self, keys: list[str], documents: list[data.Document], items: list[list[data.Item]],
              max_new_tokens: int) -> list[str]:
        """What the model writes after each document; items: those whose pictures stand in it."""
        def write(documents: list[data.Document], pictures: list[list[int]]) -> list[str]:
            return generate_texts(self.vlm, documents, self.tokenizer, max_new_tokens, self.beams,
                                  self.features, pictures=pictures)
        return self.keep(keys, documents, items, write)

    def log_likelihoods(self, keys: list[str], documents: list[data.Document],
                        items: list[list[data.Item]]) -> list[float]:
        """log p of the supervised tokens of each document."""
        def measure(documents: list[data.Document], pictures: list[list[int]]) -> list[float]:
            return log_likelihoods(self.vlm, documents, self.features, pictures)
        return [float(x) for x in self.keep(keys, documents, items, measure)]

    def keep(self, keys: list[str], documents: list[data.Document], items: list[list[data.Item]],
             compute: Callable, part: int = 512) -> list:
        """The results under these keys; missing ones are computed and kept, `part` of them at a time."""
        keys = [f"{self.prefix}, {key}" for key in keys]
        missing = [n for n, key in enumerate(keys) if key not in self.results]
        missing.sort(key=lambda n: len(documents[n].tokens))
        for rows in (missing[i:i + part] for i in range(0, len(missing), part)):
            pictures = self.feature_rows([items[n] for n in rows])
            found = compute([documents[n] for n in rows], pictures)
            new = dict(zip((keys[n] for n in rows), found))
            self.results |= new
            if self.file:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("ab") as f:
                    f.write(b"".join(b"\n" + json.dumps(pair).encode() for pair in new.items()))
        return [self.results[key] for key in keys]
