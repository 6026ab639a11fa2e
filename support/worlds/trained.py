"""worlds/trained.py: which data sets a run has met, and so what a table may call held-out."""
from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from support.formats.files import UserError, read_json
from support.formats.records import MOST_COMPARED, find_picture, name_contents
from support.worlds import WORLDS, open_data
from support.worlds.files import Files
from support.worlds.shards import ShardedFiles

MAYBE = "perhaps trained-on"


@dataclass(frozen=True)
class Unknown:
    """A data set that a model has met and that cannot be opened here, or not as it was then.

    kind: as in its spec; "published" for what others trained on, which was no generated world of ours; "" if
    nothing is known of it. path: of one that is here, but has changed.
    """
    kind: str
    why: str
    path: str = ""

    def may_hold(self, world) -> bool:
        """Whether an item of `world` may have been in it."""
        on_disk = isinstance(world, Files)
        if self.path:
            return on_disk and same_place(world.path, self.path)
        return not self.kind or on_disk == (self.kind not in WORLDS)


def name_split(world, trained: list) -> str:
    """What a table calls the items of `world` for a run on these data sets: "held-out" or "trained-on".

    They are trained-on if the run met one of their pictures, or on generated data their split or `all`. Where
    a data set that it met is Unknown and may hold them, they are MAYBE.
    """
    known = [other for other in trained if not isinstance(other, Unknown)]
    if any(has_met(world, other) for other in known):
        return "trained-on"
    unknown = [other for other in trained if isinstance(other, Unknown)]
    return MAYBE if any(u.may_hold(world) for u in unknown) else "held-out"


def same_place(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


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


def specs_of(data: str) -> list[str]:
    """The data sets of the setting `data`, without their weights."""
    return [part.split(" * ")[0].strip() for part in data.split(" + ")]


def data_digests(data: str, sets: list) -> dict[str, dict[str, str]]:
    """For config.json: spec → set_digest, of those of the data sets that lie on the disk; {} without one."""
    found = {spec: set_digest(world) for spec, world in zip(specs_of(data), sets) if isinstance(world, Files)}
    return {"data_digests": found} if found else {}


def set_digest(world: Files) -> str:
    """Of the pictures of a data set, by name and size, and of records without one; of shards of everything.

    A picture that is added or leaves may move others into another split (own_split).
    """
    if isinstance(world, ShardedFiles):
        return world.digest
    digest = hashlib.sha256()
    for records in world.items:
        facts = [(path, size_of(path)) for path in records[0].images] or records
        digest.update(f"{facts}\n".encode("utf-8", "replace"))
    return digest.hexdigest()[:32]


def size_of(path: str) -> int:
    with contextlib.suppress(OSError):
        return os.stat(find_picture(path)).st_size
    return -1


def training_sets(settings: dict, follow_links: bool = False, digests: dict | None = None) -> list:
    """The data sets that a run with these settings was trained on, its own first.

    After them come those of the run that it began with (--init); what is not on this machine is Unknown.
    digests: "data_digests" of its config.json; what has another digest by now is Unknown, too.
    """
    links = settings.get("follow_links") or follow_links
    sets = [open_data(spec, settings["seed"], share=settings.get("share", 100) / 100, follow_links=links)
            for spec in specs_of(settings["data"])]
    changed = [Unknown(world.kind, f"{spec} has changed since the run was trained on it", world.path)
               for spec, world in zip(specs_of(settings["data"]), sets)
               if spec in (digests or {}) and digests[spec] != set_digest(world)]
    return sets + changed + earlier_sets(settings.get("init", ""), settings.get("out", ""))


def known_sets(facts: dict, seen: frozenset[str] = frozenset()) -> list:
    """The data sets that a model met, Unknown where they are not on this machine.

    facts: its config.json; seen: folders of runs that began with it, which are not followed again.
    """
    settings = facts.get("settings")
    if not isinstance(settings, dict) or not isinstance(settings.get("data"), str):
        return [Unknown("published", "its config.json does not say what it was trained on")]
    sets = []
    for part in specs_of(settings["data"]):
        try:
            sets += training_sets({**settings, "data": part, "init": ""}, digests=facts.get("data_digests"))
        except (KeyError, UserError) as e:
            sets.append(Unknown(part.partition(":")[0], str(e).rstrip(".")))
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


def report_broken(sets: list[tuple]) -> None:
    """The final count of the records that each data set on disk skipped. sets: (data set, weight)."""
    for world, _ in sets:
        if isinstance(world, Files):
            world.report_broken()
