"""lab/protocols.py: how a paper asks, with and without examples."""
from __future__ import annotations

import collections
import contextlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
from eval import generate_texts, vision_features
from model import IGNORE, VLM
from support.formats.files import UserError
from support.formats.tokenizers import Tokenizer
from support.worlds.files import Files


@dataclass(frozen=True)
class Protocol:
    """How a paper words what stands after a picture, and how its examples end."""
    question: str                           # {}: the question
    caption: str = ""
    first: str = ""                         # said once, before the first question
    answer: str = " {}"                     # of an example
    stop: bool = True                       # an example ends with <|endofchunk|>, or the stop token of a tokenizer that has none
    between: str = ""                       # … and then with this
    bare: int = 0                           # zero-shot shows so many examples, their pictures left out
    rules: tuple[str, str] = ("", "")       # of `tidy`: for answers, for captions
    chat: bool = False                      # a conversation, as the model's own template writes it


PROTOCOLS = {
    "ours": Protocol(data.QUESTION, data.CAPTION),                              # what train.py teaches
    "mapl": Protocol("Question: {} Answer:", "", "Please answer the question. ", " {}.", stop=False, rules=("mapl", "mapl")),
    "flamingo": Protocol("Question: {} Answer:", "Output:", bare=2, rules=("flamingo", "flamingo")),
    "openflamingo": Protocol("Question:{} Short answer:", "Output:", answer="{}", between="\n", bare=2,
                             rules=("openflamingo-vqa", "openflamingo-caption")),
    "blip2": Protocol("Question: {} Short answer:", "a photo of", rules=("blip2", "blip2")),
    "llava": Protocol("{}\nAnswer the question using a single word or phrase.", "Describe the image concisely.", answer="{}",
                      rules=("llava", "llava"), chat=True),
    "scienceqa": Protocol("\n{}", data.CAPTION),                                # {}: the problem as scienceqa_text words it
    "mme": Protocol(data.QUESTION.format("{} Please answer yes or no."), data.CAPTION),
}


def build_prompt(tokenizer: Tokenizer, protocol: str, item: data.Item, question: data.QA | None = None, support: list[data.Item] = (),
           form: str = "QCM-LEA") -> data.Document:
    """What is asked about an item (for a caption, without a question) after examples that bring their own first question and answer.

        mapl, one example:   <image>Please answer the question. Question: is it red? Answer: yes.<image>Question: is it blue? Answer:

    A picture stands before its text. MAPL's wording with examples is not published: the instruction once is our reading of the one
    prompt that is. form: of scienceqa_text.
    """
    p, d, said = PROTOCOLS[protocol], data.Document(tokenizer), []
    for n, (seen, q) in enumerate([*((other, question and other.qas[0]) for other in support), (item, question)]):
        text, told = p.caption, next(iter(seen.captions), "")
        if q is not None:
            if protocol == "scienceqa" and not q.choices:
                raise UserError('the protocol "scienceqa" asks multiple choice, and these questions have no choices; take another.')
            text, told = data.scienceqa_text(q, form) if protocol == "scienceqa" else (q.question, q.answer)
            text = p.first * (n == 0) + p.question.format(text.removesuffix(" Please answer yes or no.") if protocol == "mme" else text)
        said.append((seen.image is not None, text, p.answer.format(told)))
    if p.chat:
        turns = [turn for pictured, text, told in said for turn in (("user", "<image>\n" * pictured + text), ("assistant", told))]
        return d.chat([{"role": role, "content": text} for role, text in turns[:-1]])
    for n, (pictured, text, told) in enumerate(said):
        (d.image() if pictured else d).add(text)
        if n < len(support):
            d.add(told).ids([tokenizer.special.get("<|endofchunk|>", tokenizer.eos)] * p.stop).add(p.between)
    return d


def few_shot_generator(seed: int, item: data.Item) -> np.random.Generator:
    """Random numbers that belong to an item, whatever else is asked and in which order."""
    return np.random.default_rng((seed, zlib.crc32(item.id.encode())))


def few_shot_examples(train, item: data.Item, k: int, seed: int = 0, pool: int = 2048) -> list[data.Item]:
    """k examples for an item, each with one of its questions, among the first 2,048 items of the training split (as OpenFlamingo draws them);
    never the item itself or its picture. The first four of eight are the four."""
    rng, found, pool = few_shot_generator(seed, item), [], min(pool, len(train)) if isinstance(train, Files) else pool
    for other in (train.item(int(i)) for i in rng.permutation(pool)) if k else ():
        same = other.image is not None and item.image is not None and np.array_equal(other.image, item.image)
        if other.id != item.id and not same:
            asked = [q for q in other.qas if q.answer]
            found.append(replace(other, qas=[asked[rng.integers(len(asked))]] if asked else []))
        if len(found) == k:
            break
    if len(found) < k:
        raise UserError(f"the training split of {train.name} has {len(found)} other items, too few for {k} examples.")
    return found


def multiple_choice(items: list[data.Item], seed: int = 0) -> Iterator[tuple[int, data.QA]]:
    """ScienceQA's form of a question of each item: the answer among up to three others to questions of its kind, in random order."""
    known = collections.defaultdict(set)
    for item in items:
        for q in item.qas:
            known[q.kind].add(q.answer)
    for n, item in enumerate(items):
        rng = few_shot_generator(seed, item)
        for q in item.qas[n % len(item.qas):][:1] if item.qas else ():
            if others := rng.permutation(sorted(known[q.kind] - {q.answer}))[:3].tolist():
                options = rng.permutation([q.answer, *others]).tolist()
                yield n, replace(q, choices=tuple(options), correct=options.index(q.answer))


def yes_no_pairs(items: list[data.Item], seed: int = 0) -> Iterator[tuple[int, data.QA]]:
    """MME's form of a question of each picture of `shapes`, whose kind is the task: one whose answer is Yes, then one whose answer is No.

    The bundled decoder was taught no sentence for counts and places but "how many …" and "where is …"; it meets these two here first.
    """
    named = sorted({q.question[:-1].split(maxsplit=3)[3] for item in items for q in item.qas if q.kind == "existence"})
    for n, item in enumerate(items):
        rng, there = few_shot_generator(seed, item), re.findall(r"(?:small|large) ((\w+) (\w+)) at the (\w+ \w+)", item.about)
        pairs = [pair for pair, *_ in there]
        pick = lambda options: options[int(rng.integers(len(options)))]
        q = item.qas[n % len(item.qas)]
        words, yes, form = q.question[:-1].split(), q.answer, "is there {}?"
        if q.kind == "existence":                       # about the pairs that the other pictures are asked about
            yes = " ".join(words[3:]) if yes == "yes" else pick([p for p in pairs if p in named] or pairs)
            no = " ".join(words[3:]) if q.answer == "no" else pick([p for p in named if p not in pairs])
        elif q.kind == "color":
            shape = next(s for _, c, s, place in there if c == yes and (s == words[-1] or q.question.endswith(f"at the {place}?")))
            yes, no = f"{yes} {shape}", pick([p for c in data.COLORS if (p := f"{c} {shape}") not in pairs])
        else:
            no = pick([a for a in (data.NUMBERS if q.kind == "count" else data.PLACES) if a != yes])
            form = f"is the number of {' '.join(words[2:-2])} {{}}?" if q.kind == "count" else f"is {' '.join(words[2:])} at the {{}}?"
        for a, truth in ((yes, "Yes"), (no, "No")):
            yield n, data.QA(q.kind, form.format(data.with_article(a) if q.kind in ("existence", "color") else a), truth)


@torch.no_grad()
def log_likelihoods(vlm: VLM, documents: list[data.Document], features: Tensor, pictures: list[list[int]], batch: int = 128) -> list[float]:
    """log p of what each document learns, given what stands before it; pictures: the rows of `features` in each."""
    found = []
    for at in range(0, len(documents), batch):
        tokens, labels, mask = (x.to(features.device) for x in data.collate(documents[at:at + batch]))
        inputs, labels = vlm.prepare(tokens, features[sum(pictures[at:at + batch], [])], None if mask.all() else mask, labels)
        keep = labels[:, 1:] != IGNORE
        logits = vlm.decoder.head(vlm.decoder.states(**inputs)[-1][:, :-1][keep])
        loss = F.cross_entropy(logits.float(), labels[:, 1:][keep], reduction="none")
        found += loss.new_zeros(len(tokens)).index_add(0, keep.nonzero()[:, 0], -loss).tolist()
    return found


class Comparison:
    """A model before a data set: each picture is seen once, each text written once and kept in `file`, a line of JSON each."""

    def __init__(self, vlm: VLM, tokenizer: Tokenizer, blind: bool = False, beams: int = 1, file: Path | None = None, about: str = ""):
        self.vlm, self.tokenizer, self.blind, self.beams, self.file, self.about = vlm, tokenizer, blind, beams, file, about
        size = vlm.vit.config.image_size
        self.features = vlm.features(next(vlm.vit.parameters()).new_zeros(0, 3, size, size)).detach()
        self.rows, self.known = {}, {}                                          # picture → row of the features, key → text
        for line in file.read_bytes().split(b"\n") if file and file.exists() else ():
            with contextlib.suppress(ValueError):                               # the line that a crash cut short
                self.known.update([json.loads(line)])

    def look(self, shown: list[list[data.Item]]) -> list[list[int]]:
        """Rows of the features: the pictures of each prompt."""
        names = [[(hash(i.image.tobytes()), i) for i in items if i.image is not None] for items in shown]
        if new := {name: i for row in names for name, i in row if name not in self.rows}:
            self.features = torch.cat((self.features, vision_features(self.vlm, [*new.values()], self.blind)))
            self.rows |= {name: len(self.rows) + n for n, name in enumerate(new)}
        return [[self.rows[name] for name, _ in row] for row in names]

    def texts(self, keys: list[str], documents: list[data.Document], shown: list[list[data.Item]], longest: int, part: int = 512) -> list[str]:
        """What is written after each document, or with longest 0 the log p of what it learns; kept `part` by `part` under its key."""
        keys = [f"{self.about}, {key}" for key in keys]
        todo = sorted((n for n, key in enumerate(keys) if key not in self.known), key=lambda n: len(documents[n].tokens))
        for rows in (todo[i:i + part] for i in range(0, len(todo), part)):
            asked, pictures = [documents[n] for n in rows], self.look([shown[n] for n in rows])
            told = (generate_texts(self.vlm.generate, asked, self.tokenizer, longest, self.beams, self.features, pictures=pictures) if longest
                    else map(repr, log_likelihoods(self.vlm, asked, self.features, pictures)))
            new = dict(zip((keys[n] for n in rows), told))
            self.known |= new
            if self.file:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("ab") as f:
                    f.write(b"".join(b"\n" + json.dumps(pair).encode() for pair in new.items()))
        return [self.known[key] for key in keys]
