"""worlds/shards.py: pictures with texts in tar or parquet shards as a world, one record in memory."""
from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import numpy as np

from support.formats.files import UserError, note
from support.formats.pictures import read_image
from support.formats.records import Record, Unpaired, reading_inside
from support.formats.shards import SHARDED, Shards, open_shards, shards_state
from support.worlds.files import Files


class Items:
    """The items `chosen` of shards; each is read when it is asked for."""

    def __init__(self, shards: Shards, chosen: np.ndarray):
        self.shards, self.chosen = shards, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> list[Record]:
        start, stop = self.shards.items[self.chosen[i]].tolist()
        try:
            return [self.shards.record(n) for n in range(start, stop)]
        except OSError as e:
            file = self.shards.files[self.shards.places[start, 0]]
            raise UserError(f"{file}: can no longer be read ({e.strerror or type(e).__name__}); put it back, "
                            "then go on with --resume.") from None


class ShardedFiles(Files):
    """A data set in shards: as Files, but a record and its pictures are read when their item is.

    Where the names of the shards say train and val or test, these are the splits, and a picture that train
    has, too, is left out of the others. Else a picture's own bytes decide: one in ten is val, one in ten
    test. So a picture under two keys lies in one split, and it stays there when shards are added.
    """
    kinds = SHARDED

    def open_items(self, reader, share: float) -> Items:
        path = Path(self.path)
        inside = contextlib.nullcontext() if self.follow_links else reading_inside(self.folder, path)
        with inside:
            self.shards = open_shards(self.kind, path, self.follow_links, shards_state(self.kind, path))
        unpaired: dict[tuple, list[str]] = {}
        for flaw in self.shards.flaws:
            if isinstance(flaw, Unpaired):
                self.count_unpaired(flaw, unpaired)
            else:
                self.skip(*flaw)
        self.report_unpaired(unpaired, usable=len(self.shards.items) > 0)
        if self.shards.unread:
            note(f"note: {self.shards.unread:,} rows of {self.name} have several pictures and a caption or a "
                 "question, which is read with the first picture alone; a conversation (messages) shows all")
        chosen = self.choose_items()
        if not len(chosen):
            self.refuse_empty()
        return Items(self.shards, chosen[self.share_of(len(chosen), share)])

    def choose_items(self) -> np.ndarray:
        """The items of this split: numbers of rows of `shards.items`."""
        first = self.shards.items[:, 0]
        contents, splits = self.shards.contents[first], self.shards.splits[first]
        if not (splits != "train").any():
            splits = split_by_content(contents)
        else:
            if "val" not in splits:
                self.held_out = "test"
            splits = self.without_repeats(contents, splits)
        return np.arange(len(first)) if self.split == "all" else np.flatnonzero(splits == self.split)

    def without_repeats(self, contents: np.ndarray, splits: np.ndarray) -> np.ndarray:
        """Splits, "" for a picture of val or test that an earlier one of train, val, test has, too."""
        splits, met = splits.copy(), np.zeros(0, contents.dtype)
        for split in ("train", "val", "test"):
            mine = splits == split
            twice = mine & np.isin(contents, met)
            met = np.append(met, contents[mine])
            splits[twice] = ""
            if split == self.split and twice.any():
                note(f"warning: {twice.sum():,} items of {self.name}:{split} show a picture of another "
                     "split, too, and are left out")
        return splits

    def new_order(self, epoch: int) -> np.ndarray:
        return self.shards.order(self.items.chosen, self.rng(epoch))

    def read_picture(self, path: str, item: int = 0, number: int = 0) -> np.ndarray:
        start = int(self.shards.items[self.items.chosen[item], 0])
        try:
            return read_image(self.shards.picture(start, number))
        except UserError as e:
            raise UserError(f"{path}: {str(e).partition(': ')[2]}") from None

    def draw_others(self, index: int, count: int) -> list[list[Record]]:
        """Items near this one in the order of its pass, which are read together with it."""
        epoch, n = divmod(index, len(self))
        near = self.order_of(epoch)[n // 64 * 64:n // 64 * 64 + 64]
        return [self.items[i] for i in near[self.rng(index).integers(0, len(near), count)]]

    @functools.cached_property
    def digest(self) -> str:
        return self.shards.digest

    @property
    def words(self) -> int:
        starts, stops = self.shards.items[self.items.chosen].T
        before = np.append(0, self.shards.words.cumsum())       # words of the rows before each
        return int((before[stops] - before[starts]).sum())

    @functools.cached_property
    def contents(self) -> set[int]:
        return {*self.shards.contents[self.shards.items[self.items.chosen, 0]].tolist()}

    @property
    def pictures(self) -> set[int]:
        return self.contents


def split_by_content(contents: np.ndarray) -> np.ndarray:
    """One picture in ten is val, one in ten test, by its bytes; of few the one with the largest number."""
    last = contents % 10
    splits = np.where(last == 9, "val", np.where(last == 8, "test", "train"))
    if "val" not in splits and len(np.unique(contents)) > 1:
        splits[contents == contents.max()] = "val"
    return splits
