"""worlds/trained.py: which data sets a run has met, and so what a table may call held-out."""
from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from support.formats.files import UserError, read_json
from support.formats.records import MOST_COMPARED, name_contents
from support.worlds import WORLDS, open_data
from support.worlds.files import Files
from support.worlds.shards import ShardedFiles

MAYBE = "perhaps trained-on"


@dataclass(frozen=True)
class Unknown:
    """A data set that a model has met and that cannot be opened here.

    kind: as in its spec; "published" for what others trained on, which was no generated world of ours; "" if
    nothing is known of it.
    """
    kind: str
    why: str


def name_split(world, trained: list) -> str:
    """What a table calls the items of `world` for a run on these data sets: "held-out" or "trained-on".

    They are trained-on if the run met one of their pictures, or on generated data their split or `all`. Where
    a data set that it met is Unknown and may hold them, they are MAYBE.
    """
    known = [other for other in trained if not isinstance(other, Unknown)]
    if any(has_met(world, other) for other in known):
        return "trained-on"
    on_disk = isinstance(world, Files)
    unknown = [other for other in trained if isinstance(other, Unknown)]
    return MAYBE if any(not u.kind or on_disk == (u.kind not in WORLDS) for u in unknown) else "held-out"


def has_met(world, other) -> bool:
    """Whether a run that was trained on `other` has met an item of `world`."""
    if not (isinstance(world, Files) and isinstance(other, Files)):
        same = other.name.partition("-")[0] == world.name.partition("-")[0]             # shapes-pages
        return same and (other.split == world.split or "all" in (other.split, world.split))
    same = other.kind == world.kind and os.path.abspath(other.path) == os.path.abspath(world.path)
    if same and (other.split == world.split or "all" in (other.split, world.split)):
        return True
    return share_pictures(world, other, by_content=not same)


def share_pictures(world: Files, other: Files, by_content: bool) -> bool:
    """Whether the two show a picture in common: one path, one number of COCO's, or by_content the same bytes.

    Two splits of one data set are not compared by content: ours are made by it (own_split), and published
    ones are their publishers'.
    """
    if not world.pictures.isdisjoint(other.pictures):
        return True
    sharded = isinstance(world, ShardedFiles) + isinstance(other, ShardedFiles)
    if sharded:                                         # two of them were compared by their bytes just now
        return by_content and sharded == 1 and not world.contents.isdisjoint(other.contents)
    ours, theirs = [*world.paths.values()], [*other.paths.values()]
    if by_content and len(ours) + len(theirs) > MOST_COMPARED:
        say_not_compared(world.name, other.name)
    if not by_content or len(ours) + len(theirs) > MOST_COMPARED:
        return False
    contents = name_contents(ours + theirs)
    return not {contents[path] for path in ours}.isdisjoint(contents[path] for path in theirs)


@functools.cache
def say_not_compared(*names: str) -> None:
    """One line for two data sets that are too large to be compared by content."""
    print(f"warning: {' and '.join(names)} have more than {MOST_COMPARED:,} pictures, so they are compared "
          "by path and COCO's numbers alone; a copy under another name counts as held-out.", file=sys.stderr)


def training_sets(settings: dict, follow_links: bool = False) -> list:
    """The data sets that a run with these settings was trained on, its own first.

    After them come those of the run that it began with (--init); what is not on this machine is Unknown.
    """
    links = settings.get("follow_links") or follow_links
    sets = [open_data(part.split(" * ")[0].strip(), settings["seed"], share=settings.get("share", 100) / 100,
                      follow_links=links) for part in settings["data"].split(" + ")]
    return sets + earlier_sets(settings.get("init", ""), settings.get("out", ""))


def known_sets(facts: dict, seen: frozenset[str] = frozenset()) -> list:
    """The data sets that a model met, Unknown where they are not on this machine.

    facts: its config.json; seen: folders of runs that began with it, which are not followed again.
    """
    settings = facts.get("settings")
    if not isinstance(settings, dict) or not isinstance(settings.get("data"), str):
        return [Unknown("published", "its config.json does not say what it was trained on")]
    sets = []
    for part in settings["data"].split(" + "):
        try:
            sets += training_sets({**settings, "data": part, "init": ""})
        except (KeyError, UserError) as e:
            sets.append(Unknown(part.strip().partition(":")[0], str(e).rstrip(".")))
    return sets + earlier_sets(settings.get("init", ""), settings.get("out", ""), seen)


def earlier_sets(init: str, out: str = "", seen: frozenset[str] = frozenset()) -> list:
    """The data sets of the run in folder `init`; none if that is nothing, or the run itself (out)."""
    folder = os.path.realpath(init or "")
    if not init or folder in {os.path.realpath(out or ""), *seen}:
        return []
    try:
        return known_sets(read_json(Path(init) / "config.json"), seen | {folder})
    except UserError as e:
        return [Unknown("", str(e).rstrip("."))]


def report_broken(worlds: list) -> None:
    """The final count of the records that each data set on disk skipped."""
    for world in worlds:
        if isinstance(world, Files):
            world.report_broken()
