"""worlds: data with known truth, and data sets on disk in the same form; `open_data` opens one by name.

A world has `name`, `size`, `splits`, item(index, turns), and four facts: `seen` and `held_out` name the
splits of seen and unseen compositions. `finite`: it has a length. `says_scenes`: Item.about tells the picture
in words that the bundled decoder reads (for the oracle).
"""
from __future__ import annotations

import contextlib
import copy
import os
import sys
from pathlib import Path

from data import Item, Shapes
from papers.bounds import nearest
from support.formats.datasets import FORMATS
from support.formats.files import UserError
from support.formats.shards import SHARDED
from support.worlds.clicks import ShapesClicks, ShapesClicksNoise, ShapesClicksText, ShapesClicksWhite
from support.worlds.emoji import Emoji
from support.worlds.files import Files, MissingPicture
from support.worlds.forms import (ShapesAnswers, ShapesChoices, ShapesPages, ShapesPhrases, ShapesPlaces,
                                  ShapesReasons, ShapesTold, ShapesWeb, ShapesWords)
from support.worlds.shards import ShardedFiles
from support.worlds.steps import ShapesSteps, ShapesStepsAnswers

WORLDS = {world.name: world for world in (Shapes, ShapesWords, ShapesTold, ShapesPages, ShapesChoices,
                                          ShapesReasons, ShapesAnswers, ShapesSteps, ShapesStepsAnswers,
                                          ShapesWeb, ShapesPhrases, ShapesPlaces, ShapesClicks,
                                          ShapesClicksWhite, ShapesClicksNoise, ShapesClicksText, Emoji)}

KINDS = {**FORMATS, **SHARDED}                          # on disk: (reader, splits, held-out split)
CHOICES = {"scienceqa", *SHARDED, ShapesChoices.name}   # kinds with multiple choice, or that may have it
NO_QUESTIONS = {"coco", "karpathy", "flickr30k", "flickr8k", "cc", "textcaps", "vizwiz", "llava", "alpaca",
                "interleaved", "folder", ShapesWeb.name}
CLICKS = {name for name in WORLDS if name.startswith(ShapesClicks.name)}
ONE_TURN = {ShapesWords.name, ShapesTold.name, ShapesPages.name, *CLICKS}    # kinds whose items have one form
CONVERSATIONS = {"llava", "alpaca", *SHARDED, ShapesWords.name}         # kinds that --template writes
NO_ANSWERS = {*CONVERSATIONS, "interleaved", ShapesTold.name, ShapesClicksText.name}    # its loss is reported
NO_CAPTIONS = {"vqav2", "okvqa", "textvqa", "vizwizvqa", "scienceqa", "mme", "interleaved", "llava", "alpaca",
               ShapesPages.name, ShapesChoices.name, ShapesWords.name, ShapesTold.name, *CLICKS}


def unread_settings(specs: list[str]) -> set[str]:
    """The settings of training that none of these data sets reads."""
    kinds = {spec.partition(":")[0] for spec in specs}
    unread = {"form": not kinds & CHOICES, "turns": kinds <= NO_QUESTIONS | ONE_TURN,
              "captions": kinds <= NO_CAPTIONS, "template": not kinds & CONVERSATIONS,
              "strict": kinds <= WORLDS.keys(), "follow_links": kinds <= WORLDS.keys()}
    return {name for name, nobody in unread.items() if nobody}


def open_data(spec: str, seed: int = 0, strict: bool = False, share: float = 1.0, follow_links: bool = False,
              renderings: str = ""):
    """A data set by its spec "kind[:path][:split]": shapes, emoji:val, coco:PATH:val.

    The text after the last colon is a split only if the kind has a split of that name, so a path may hold
    colons. share (0 … 1): the part of a data set on disk that is used. follow_links: also of pictures behind
    links that leave its folder. renderings: of `augmented`. A UserError for an unknown kind, path or split.
    """
    if renderings:
        return augmented(open_data(spec, seed, strict, share, follow_links), renderings)
    kind, _, rest = spec.partition(":")
    if kind not in WORLDS and kind not in KINDS:
        raise UserError(f'unknown data "{kind}"; ' + nearest(kind, [*WORLDS, *KINDS]))
    if not 0 < share <= 1 or kind in WORLDS and share < 1:
        raise UserError(f"--share {100 * share:g} of {spec}: give a percentage above 0, "
                        "under 100 only of files.")
    if kind in WORLDS:
        return WORLDS[kind](known_split(kind, rest, WORLDS[kind].splits), seed)
    splits, rest = KINDS[kind][1].split(), os.path.expanduser(rest)         # no shell does it behind a colon
    path, _, split = rest.rpartition(":")
    if not path or split not in splits and (Path(rest).exists() or not Path(path).exists()):
        path, split = rest, ""
    if not path or not Path(path).exists():
        raise UserError(f'{spec}: no such folder; write {kind}:PATH or {kind}:PATH:SPLIT '
                        f'(of {", ".join(splits)}).')
    world = ShardedFiles if kind in SHARDED else Files
    return world(kind, path, known_split(kind, split, splits), seed, strict, share, follow_links)


def augmented(world, renderings: str = "train"):
    """The world in other renderings (augment.py): "train", or "new" ones that training never draws."""
    if not hasattr(world, "renderings"):
        raise UserError(f"--augment: what is said of a picture of {world.name} would no longer be true; "
                        "leave it out.")
    world = copy.copy(world)
    world.renderings = renderings
    return world


def new_renderings(world, split: str):
    """Another split to evaluate on, in `new` renderings where training renders it; see open_split."""
    other = open_split(world, split)
    return augmented(other, "new") if world.renderings else other


def open_split(world, split: str):
    """Another split of a world, all of it, with the same seed, to evaluate on: see Files.evaluates.

    Not strict: an evaluation at the end of a strict run counts what is broken and keeps its table.
    """
    if isinstance(world, Files):
        other = type(world)(world.kind, world.path, split, world.seed, follow_links=world.follow_links)
        other.evaluates, other.size = True, world.size
        return other
    return type(world)(split, world.seed)


def take_items(world, count: int, turns: int | None = None, track=iter) -> list[Item]:
    """The first `count` items of a world that open_split opened; all of them where it has fewer.

    An item whose picture is missing is left out, and counted on standard error.
    """
    items, count = [], min(count, len(world)) if world.finite else count
    for i in track(range(count)):
        with contextlib.suppress(MissingPicture):
            items.append(world.item(i, turns))
    if len(items) < count:
        print(f"note: {count - len(items)} of {count} items of {world.name}:{world.split} are missing (their "
              "pictures cannot be read), and no score counts them", file=sys.stderr)
    if not items:
        raise UserError(f"{world.name}:{world.split}: not one of its pictures can be read.")
    return items


def has_answers(world, item: Item) -> bool:
    """Whether it has right answers or captions; a conversation, page or instruction has no one answer."""
    return bool((item.captions or item.qas) and (item.image is not None or world.finite))


def known_split(kind: str, split: str, splits: list[str] | tuple[str, ...]) -> str:
    """The split, or the first one where none is given; a UserError for an unknown name."""
    if split and split not in splits:
        raise UserError(f'{kind} has no split "{split}"; ' + nearest(split, splits))
    return split or splits[0]
