"""worlds/trained.py: which data sets a run has met, and so what a table may call held-out."""
from __future__ import annotations

import os
from pathlib import Path

from support.formats.files import UserError, read_json
from support.worlds import open_data
from support.worlds.files import Files


def name_split(world, trained: list) -> str:
    """What a table calls the items of `world` for a run on these data sets: "held-out" or "trained-on".

    They are trained-on if the run met one of their pictures, or on generated data their split or `all`.
    """
    for other in trained:
        if isinstance(world, Files) and isinstance(other, Files):
            same = other.kind == world.kind and os.path.abspath(other.path) == os.path.abspath(world.path)
            met = not world.pictures.isdisjoint(other.pictures)
        else:
            same, met = other.name.partition("-")[0] == world.name.partition("-")[0], False     # shapes-pages
        if met or same and (other.split == world.split or "all" in (other.split, world.split)):
            return "trained-on"
    return "held-out"


def training_sets(settings: dict, follow_links: bool = False) -> list:
    """The data sets that a run with these settings was trained on, its own first.

    After them come those of the run that it began with (--init), as far as they are on this machine.
    """
    links = settings.get("follow_links") or follow_links
    sets = [open_data(part.split(" * ")[0].strip(), settings["seed"], share=settings.get("share", 100) / 100,
                      follow_links=links) for part in settings["data"].split(" + ")]
    return sets + earlier_sets(settings.get("init", ""), settings.get("out", ""))


def earlier_sets(init: str, out: str = "") -> list:
    """The data sets of the run in folder `init`; none if it has no settings, or is the run itself (out)."""
    if not init or os.path.realpath(init) == os.path.realpath(out):
        return []
    try:
        return training_sets(read_json(Path(init) / "config.json")["settings"])
    except (KeyError, UserError):
        return []
