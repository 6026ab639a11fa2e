"""worlds/files.py: a data set on disk as a world: item(i) is a function of the seed, the split and i."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from data import Item, QA
from support.formats.datasets import FORMATS, OWN, split_at_pictures
from support.formats.files import UserError
from support.formats.pictures import read_image
from support.formats.records import BrokenRecord, LAYOUT, Record

ROLES = {"human": "user", "gpt": "assistant"}


class Files:
    """A data set on disk as a world: item(i) is a function of (seed, split, i); each pass is a permutation of its own.

    The questions about one picture make one item (MME's pairs, VQAv2's five). A broken record or picture is skipped
    with a counted warning, or stops a strict run. share = 0.01 keeps 1 % of the items, the same for the same seed.
    """
    finite, says_scenes = True, False
    size = 64                       # pixels a side, of a ViT trained here

    def __init__(self, kind: str, path: str, split: str, seed: int = 0, strict: bool = False, share: float = 1.0):
        reader, splits, self.held_out = FORMATS[kind]
        self.kind, self.path, self.split, self.seen, self.seed, self.strict = kind, path, split, split, seed, strict
        self.name, self.broken, self.order = f"{kind}:{path}", {}, (-1, None)
        groups, absent = {}, 0
        for n, r in enumerate(reader(Path(path), split)):
            if isinstance(r, BrokenRecord):
                self.skip(*r)
            elif (r.captions or r.texts) and not r.images:              # words about a picture that nobody downloaded
                absent += 1
            else:
                groups.setdefault(r.images if r.question and r.images else n, []).append(r)
        told = lambda r: r.captions or r.answers or r.choices or r.turns or r.texts
        items = [g for g in groups.values() if any(map(told, g))] or [*groups.values()]     # a test split tells nothing
        if absent := absent + len(groups) - len(items):
            print(f"note: {absent:,} records of {self.name} left out: no picture on disk, or no text", file=sys.stderr)
        if splits == OWN and split != "all":
            items = [g for i, g in enumerate(items) if (i % 10 == 9) == (split == "val")] or items[-1:]
        if not items:
            last = "".join(f" (last: {where}: {why})" for where, why in list(self.broken.items())[-1:])
            raise UserError(f"{path}: holds no usable record of {kind}, split {split}{last}; lay it out as {LAYOUT}.")
        chosen = np.random.default_rng((seed, len(items))).permutation(len(items))[:max(1, round(share * len(items)))]
        self.items: list[list[Record]] = [items[i] for i in np.sort(chosen)]

    def __len__(self) -> int:
        return len(self.items)

    def skip(self, where: str, why: str) -> None:
        if self.strict:
            raise UserError(f"{where}: {why}; repair it, or leave --strict out to skip it.")
        if where not in self.broken:
            self.broken[where] = why
            if (count := len(self.broken)) & (count - 1) == 0:          # at 1, 2, 4, 8, … broken ones
                print(f"warning: {count} broken records of {self.name} skipped (last: {where}: {why})", file=sys.stderr)

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, index))

    def read(self, index: int) -> tuple[list[Record], list[np.ndarray]]:
        """The records of an item and its pictures; a broken picture gives its turn to the next item."""
        turn, n = divmod(index, len(self))
        if self.order[0] != turn:
            self.order = (turn, self.rng(turn).permutation(len(self)))
        for k in range(len(self)):
            records = self.items[self.order[1][(n + k) % len(self)]]
            if self.broken.keys().isdisjoint(paths := records[0].images):
                try:
                    return records, [read_image(path := p) for p in paths]
                except UserError as e:
                    self.skip(path, str(e).removeprefix(f"{path}: ").rstrip(".") + f" (record {records[0].id})")
        raise UserError(f"{self.path}: not one picture of split {self.split} could be read (last: {paths[0]}).")

    def question(self, r: Record) -> QA:
        most = r.more.get("most_common") or max(r.answers, key=r.answers.count, default="")
        answer = r.choices[r.answer] if r.choices else most
        return QA(r.kind or self.kind, r.question, answer.strip(), list(r.answers) if len(r.answers) > 1 else [], r)

    def item(self, index: int, turns: int | None = None) -> Item:
        """For training (`turns`): captions in random order, and at most so many of the questions with an answer."""
        records, images = self.read(index)
        r, captions = records[0], [c.strip() for c in records[0].captions if c.strip()]
        qas = [self.question(q) for q in records if q.question]
        if turns is not None:
            mix = self.rng(index).permutation
            captions, qas = [captions[i] for i in mix(len(captions))], [q for q in qas if q.answer]
            qas = [qas[i] for i in mix(len(qas))[:turns]]
            if not (captions or qas or r.turns or r.texts):
                raise UserError(f"{self.name}: split {self.split} has no captions or answers to train on.")
        first = lambda text: "<image>\n" + text.replace("<image>", "").strip() if "<image>" in text else text
        talk = [{"role": ROLES[who], "content": first(text)} for who, text in r.turns]      # as LLaVA trains
        return Item(images[0] if images else None, captions, qas, str(r.id), "", images, talk, split_at_pictures(r))

    def pair(self, index: int) -> tuple[np.ndarray, str, list[str]]:
        """For stage `clip`: a picture, one of its captions, and two captions of other pictures."""
        item = self.item(index, turns=1)
        if not item.captions:
            raise UserError(f"{self.name}: item {item.id} has no caption; stage clip needs a data set with captions.")
        others = (c.strip() for i in self.rng(index).integers(0, len(self), 8) for c in self.items[i][0].captions[:1])
        return item.image, item.captions[0], [c for c in others if c not in item.captions][:2]
