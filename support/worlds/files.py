"""worlds/files.py: a data set on disk as a world: item(i) is a function of the seed, the split and i."""
from __future__ import annotations

import contextlib
import functools
import os
import sys
from pathlib import Path

import numpy as np

from PIL import Image
from torch.utils.data import get_worker_info

from data import Item, QA
from support.formats.datasets import FORMATS, LAYOUTS, OWN, OWN_TEST, split_at_pictures
from support.formats.files import UserError, note
from support.formats.pictures import read_image
from support.formats.records import (BrokenRecord, MOST_COMPARED, Record, Unpaired, content_name, count_words,
                                     find_picture, link_leaves, name_contents, picture_key, reading_inside)
from support.worlds.augment import augment, cut_out, may_mirror

KEPT = 2**26                    # bytes of cut-outs that are kept in memory: 4,096 of 64 x 64 pixels
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}       # the names of LLaVA's files → ours


def has_text(r: Record) -> bool:
    """Whether the record holds something to train on or to compare with."""
    return bool(r.captions or r.answers or r.choices or r.turns or r.texts)


def picture_first(text: str) -> str:
    """The text with its picture moved to the front, as LLaVA's training code does; several stay in place."""
    return "<image>\n" + text.replace("<image>", "").strip() if text.count("<image>") == 1 else text


def group_by_picture(items: list[list[Record]],
                     contents: dict[str, str] | None = None) -> list[list[list[Record]]]:
    """The items in groups that have no picture in common, in the order of their first items.

    Two items are in one group if they show the same picture, or both share one with a third item. contents:
    of name_contents, for pictures that are the same under two names.
    """
    contents = contents or {}
    first = [*range(len(items))]                        # item → an earlier one of its group, or itself
    shown: dict[str, int] = {}                          # picture → the item that shows it first

    def root(i: int) -> int:
        while first[i] != i:
            first[i] = i = first[first[i]]
        return i

    for i, item in enumerate(items):
        for path in item[0].images:
            a, b = sorted((root(i), root(shown.setdefault(picture_key(contents.get(path, path)), i))))
            first[b] = a
    groups: dict[int, list[list[Record]]] = {}
    for i, item in enumerate(items):
        groups.setdefault(root(i), []).append(item)
    return [*groups.values()]


def group_by_content(items: list[list[Record]], name: str) -> list[list[list[Record]]]:
    """group_by_picture, where a picture is its bytes: two names of one picture are one. name: of the data
    set."""
    pictures, contents = {path for item in items for path in item[0].images}, None
    if len(pictures) <= MOST_COMPARED:
        contents = name_contents(sorted(pictures))
    else:
        note(f"note: {name} has {len(pictures):,} pictures, more than {MOST_COMPARED:,}: two names of one "
             "picture count as two, and may lie in train and val")
    groups = group_by_picture(items, contents)
    if len(groups) == 1 and len(pictures) > 1:
        groups = group_by_picture(items)
        note(f"note: the {len(pictures)} pictures of {name} are all the same, so val has one of those of "
             "train")
    return groups


FEWEST_TESTED = 200             # pictures; a tenth of fewer is too little to report on


def own_split(items: list[list[Record]], split: str, name: str, tests: bool) -> list[list[Record]]:
    """Items of a data set without splits: every tenth picture is for val, of fewer than ten the last.

    tests: the kind has a split `test`; of FEWEST_TESTED pictures and more it gets every tenth, too.
    """
    groups = group_by_content(items, name)
    every = min(10, max(2, len(groups)))
    tests = tests and len(groups) >= FEWEST_TESTED
    if split == "test" and not tests:
        raise UserError(f"{name} has {len(groups)} pictures, and fewer than {FEWEST_TESTED} have no split "
                        "test; evaluate on val, or put pictures into sub-folders train, val and test.")
    names = {every - 1: "val", **({every - 2: "test"} if tests else {})}
    return [item for n, group in enumerate(groups) if names.get(n % every, "train") == split
            for item in group]


def declared_split(items: list[list[Record]], split: str, name: str) -> list[list[Record]]:
    """Items of a data set whose records say of which split they are; what train has, too, is left out of the
    others."""
    chosen, twice = [], 0
    for group in group_by_content(items, name):
        splits = {item[0].split for item in group}
        keep = next(s for s in ("train", "val", "test") if s in splits)
        chosen += [item for item in group if item[0].split == split == keep]
        twice += sum(item[0].split == split != keep for item in group)
    if twice:
        note(f"warning: {twice:,} items of {name}:{split} show a picture of another split, too, and are left "
             "out")
    return chosen


class MissingPicture(UserError):
    """The picture of an item that an evaluation asks about cannot be read."""


class Files:
    """A data set on disk as a world: item(i) is a function of (seed, split, i); each pass has its own order.

    The questions about one picture make one item (MME's pairs, VQAv2's five), and so do its captions. A
    broken record or picture is skipped with a counted warning, or stops a strict run. share = 0.01 keeps 1 %
    of the items, the same ones for the same seed. A picture behind a link that leaves the folder is a broken
    one, and its records there are refused, unless follow_links. The path itself may be a link.
    """
    size = 64                       # side of new renderings in pixels; see fit_size
    finite, says_scenes = True, False
    kinds = FORMATS
    renderings = ""                 # of worlds.augmented: "train" or "new"
    evaluates = False               # a picture that cannot be read is missing; else the next item stands in

    def __init__(self, kind: str, path: str, split: str, seed: int = 0, strict: bool = False,
                 share: float = 1.0, follow_links: bool = False):
        reader, splits, held_out = self.kinds[kind]
        year = split[-4:] if kind == "coco" and split[:-4] in ("train", "val") else ""
        self.held_out = held_out + year                 # train2017 holds most of val2014
        self.kind, self.path, self.splits, self.split, self.seen = kind, path, splits.split(), split, split
        self.seed, self.strict, self.follow_links = seed, strict, follow_links
        self.folder = Path(path) if Path(path).is_dir() else Path(path).parent
        self.name, self.broken, self.order = f"{kind}:{path}", {}, (-1, None)
        self.said = 0                                   # so many broken records were reported
        self.cuts: dict[str, Image.Image] = {}          # path → cut-out
        self.items = self.open_items(reader, share)
        self.report_broken()

    def open_items(self, reader, share: float) -> list[list[Record]]:
        """The items of this split, or a share of them."""
        path = Path(self.path)
        with contextlib.nullcontext() if self.follow_links else reading_inside(self.folder, path):
            items = self.collect(reader(path, self.split))
        if items and " ".join(self.splits) in (OWN, OWN_TEST):
            items = self.choose_split(items)
        if not items:
            self.refuse_empty()
        return [items[i] for i in self.share_of(len(items), share)]

    def share_of(self, length: int, share: float) -> np.ndarray:
        """The numbers of a random part of so many items, the same for the same seed, in their order."""
        count = max(1, round(share * length))
        return np.sort(np.random.default_rng((self.seed, length)).permutation(length)[:count])

    def refuse_empty(self):
        last = "".join(f" (last: {where}: {why})" for where, why in list(self.broken.items())[-1:])
        raise UserError(f"{self.path}: holds no usable record of {self.kind}, split {self.split}{last}; "
                        f"lay it out so: {LAYOUTS[self.kind]}.")

    def choose_split(self, items: list[list[Record]]) -> list[list[Record]]:
        """The items of this split: as the records say, where they name more splits than train."""
        declared = {item[0].split for item in items} - {"train"}
        if declared and "val" not in declared:
            self.held_out = "test"
        if self.split == "all":
            return items
        if declared:
            return declared_split(items, self.split, self.name)
        items = own_split(items, self.split, self.name, "test" in self.splits)
        if not items:
            raise UserError(f"{self.path}: all of its items share one picture, so none is left for val; "
                            "give more pictures.")
        return items

    def collect(self, records) -> list[list[Record]]:
        """The usable records of a reader: those of a picture together, a conversation or a page alone."""
        groups, absent, unpaired = {}, 0, {}
        for n, r in enumerate(records):
            if isinstance(r, BrokenRecord):
                self.skip(*r)
            elif isinstance(r, Unpaired):
                self.count_unpaired(r, unpaired)
            elif (r.captions or r.texts) and not r.images:          # its picture was not downloaded
                absent += 1
            else:
                alone = r.turns or r.texts or not r.images
                groups.setdefault(n if alone else tuple(map(picture_key, r.images)), []).append(r)
        items = [g for g in groups.values() if any(map(has_text, g))] or [*groups.values()]
        absent += len(groups) - len(items)
        self.report_unpaired(unpaired, usable=bool(groups or self.broken))
        if absent:
            print(f"note: {absent:,} records of {self.name} left out: no picture on disk, or no text",
                  file=sys.stderr)
        return items

    def count_unpaired(self, r: Unpaired, counted: dict[tuple, list[str]]) -> None:
        if self.strict and r.stops:
            raise UserError(f"{r.where}: this {r.noun} has no {r.missing}; {r.advice}, "
                            "or leave --strict out.")
        counted.setdefault((r.noun, r.missing, r.advice), []).append(r.where)

    def report_unpaired(self, counted: dict[tuple, list[str]], usable: bool) -> None:
        """A sentence for each kind; a UserError where there is nothing else."""
        for (noun, missing, advice), wheres in counted.items():
            many, have = (noun, "has") if len(wheres) == 1 else (f"{noun}s", "have")
            said = f"{len(wheres):,} {many} of {self.name} {have} no {missing} (first: {wheres[0]}); {advice}"
            if not usable:
                raise UserError(f"{said}.")
            note(f"warning: {said}")

    @functools.cached_property
    def contents(self) -> set[int]:
        """What is shown, by its bytes: content_name of every picture that can be read."""
        found = set()
        for path in filter(os.path.isfile, map(find_picture, self.paths.values())):
            with contextlib.suppress(OSError), open(path, "rb") as f:
                size = f.seek(0, os.SEEK_END)
                f.seek(max(0, size - 4096))
                found.add(content_name(size, f.read()))
        return found

    @functools.cached_property
    def paths(self) -> dict[str, str]:
        """What is shown: picture_key → path."""
        return {picture_key(path): path for records in self.items for r in records for path in r.images}

    @functools.cached_property
    def pictures(self) -> set[str]:
        """What is shown, as picture_key names it."""
        return {*self.paths}

    def __len__(self) -> int:
        return len(self.items)

    @property
    def words(self) -> int:
        """The words that training can learn of this split."""
        return sum(count_words(r) for item in self.items for r in item)

    def skip(self, where: str, why: str) -> None:
        """Count a broken record or picture and warn; a UserError in a strict run."""
        if self.strict:
            raise UserError(f"{where}: {why}; repair it, or leave --strict out to skip it.")
        if where not in self.broken:
            self.broken[where] = why
            if len(self.broken) & (len(self.broken) - 1) == 0:          # at 1, 2, 4, 8, … broken records
                self.report_broken()

    def report_broken(self) -> None:
        """How many records were skipped so far, where that was not said before; each process counts its
        own."""
        if len(self.broken) > self.said:
            self.said = len(self.broken)
            where, why = list(self.broken.items())[-1]
            reader = get_worker_info()                  # of --workers
            by = f" by reader process {reader.id}" if reader else ""
            print(f"warning: {self.said:,} broken records of {self.name} skipped{by} (last: {where}: {why})",
                  file=sys.stderr)

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, index))

    def read(self, index: int) -> tuple[list[Record], list[np.ndarray | Image.Image]]:
        """The records and pictures of an item, as cut-outs where they are rendered anew.

        A broken picture is skipped and counted. In training the next item takes its place; of an evaluation
        it is a MissingPicture.
        """
        epoch, n = divmod(index, len(self))
        order = self.order_of(epoch)
        for k in range(1 if self.evaluates else len(self)):
            item = order[(n + k) % len(self)]
            records = self.items[item]
            paths, images = records[0].images, []
            if self.broken.keys().isdisjoint(paths):
                try:
                    for number, path in enumerate(paths):
                        images.append(self.show(path, item, number))
                    return records, images
                except UserError as e:
                    why = str(e).removeprefix(f"{path}: ").rstrip(".")
                    self.skip(path, f"{why} (record {records[0].id})")
        if self.evaluates:
            raise MissingPicture(f"{paths[0]}: this picture of {self.name}:{self.split} cannot be read.")
        raise UserError(f"{self.path}: not one picture of split {self.split} could be read "
                        f"(last: {paths[0]}).")

    def order_of(self, epoch: int) -> np.ndarray:
        """The order of the items in a pass."""
        if self.order[0] != epoch:
            self.order = (epoch, self.new_order(epoch))
        return self.order[1]

    def new_order(self, epoch: int) -> np.ndarray:
        return self.rng(epoch).permutation(len(self))

    def draw_others(self, index: int, count: int) -> list[list[Record]]:
        """Items at random, to contrast with that of this index."""
        return [self.items[i] for i in self.rng(index).integers(0, len(self), count)]

    def read_picture(self, path: str, item: int = 0, number: int = 0) -> np.ndarray:
        """Picture `number` of an item; a file needs no more than its path."""
        file = find_picture(path)
        if not self.follow_links and link_leaves(self.folder, file):
            raise UserError(f"{path}: a link that leaves {self.folder}; --follow-links reads it.")
        return read_image(file)

    def show(self, path: str, item: int = 0, number: int = 0) -> np.ndarray | Image.Image:
        """The picture, or where it is rendered anew its cut-out; the last ones, KEPT bytes, are kept."""
        if not self.renderings:
            return self.read_picture(path, item, number)
        if path not in self.cuts:
            if len(self.cuts) >= max(1, KEPT // (4 * self.size**2)):
                self.cuts.pop(next(iter(self.cuts)))
            self.cuts[path] = cut_out(self.read_picture(path, item, number), self.size)
        return self.cuts[path]

    def question(self, r: Record) -> QA:
        """A record's question; its answer is the correct choice or the annotators' most frequent answer."""
        answers = list(r.answers) if len(r.answers) > 1 else []
        if r.choices:
            hint, lecture, solution = (r.more.get(name, "") for name in ("hint", "lecture", "solution"))
            answer = r.choices[r.answer].strip()
            return QA(r.kind or self.kind, r.question, answer, answers, r.choices, r.answer, hint, lecture,
                      solution, source=r)
        given = [a for a in r.answers if a.strip()]
        answer = r.more.get("most_common") or max(given, key=given.count, default="")
        return QA(r.kind or self.kind, r.question, answer.strip(), answers, source=r)

    def item(self, index: int, turns: int | None = None) -> Item:
        """For training: captions in random order, at most `turns` of the questions that have an answer."""
        records, images = self.read(index)
        r, captions = records[0], [c.strip() for r in records for c in r.captions if c.strip()]
        if self.renderings:
            rng = np.random.default_rng((self.seed, index, 1 + (self.renderings == "new")))
            mirror = may_mirror([*captions, *(q.question for q in records)])
            images = [augment(cut, self.size, rng, self.renderings == "new", mirror) for cut in images]
        qas = [self.question(q) for q in records if q.question]
        if turns is not None:
            rng = self.rng(index)
            captions = [captions[i] for i in rng.permutation(len(captions))]
            qas = [q for q in qas if q.answer]
            qas = [qas[i] for i in rng.permutation(len(qas))[:turns]]
            if not (captions or qas or r.turns or r.texts):
                raise UserError(f"{self.name}: split {self.split} has no captions or answers to train on.")
        conversation = [{"role": ROLES[who], "content": picture_first(text)} for who, text in r.turns]
        image = images[0] if images else None
        return Item(image, captions, qas, str(r.id), images=images, turns=conversation,
                    chunks=split_at_pictures(r))


def fit_size(worlds: list, vit) -> None:
    """New renderings of pictures on disk have the size that this ViT reads; None: a new ViT fits itself."""
    for world in worlds:
        if isinstance(world, Files) and vit is not None:
            world.size = vit.config.image_size
