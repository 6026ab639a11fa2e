"""worlds: data with known truth, and data sets on disk in the same form; `open_data` opens one by its name."""
from __future__ import annotations

import re
from pathlib import Path

from data import Shapes
from support.formats.datasets import FORMATS
from support.formats.files import UserError, nearest
from support.worlds.emoji import Emoji
from support.worlds.files import Files
from support.worlds.forms import (ShapesAnswers, ShapesChoices, ShapesPages, ShapesReasons, ShapesWeb,
                                  ShapesWords)

WORLDS = {world.name: world for world in (Shapes, ShapesWords, ShapesPages, ShapesChoices, ShapesReasons, ShapesAnswers, ShapesWeb, Emoji)}


def open_data(spec: str, seed: int = 0, strict: bool = False, share: float = 1.0):
    """A data set by its spec "kind[:path][:split]": shapes, emoji:val, coco:PATH:val; share (0 … 1): that much of it.

    What follows the last colon is a split only if the kind has one of that name, so a path may hold colons.
    """
    kind, _, rest = spec.partition(":")
    if kind not in WORLDS and kind not in FORMATS:
        raise UserError(f'unknown data "{kind}"; ' + nearest(kind, [*WORLDS, *FORMATS]))
    if not 0 < share <= 1 or kind in WORLDS and share < 1:
        raise UserError(f"--share {100 * share:g} of {spec}: give a percentage above 0, under 100 only of files.")
    splits = WORLDS[kind].splits if kind in WORLDS else FORMATS[kind][1].split()
    path, _, split = rest.rpartition(":") if kind in FORMATS else ("", "", rest)
    if kind in FORMATS and (not path or split not in splits and (Path(rest).exists() or not Path(path).exists())):
        path, split = rest, ""
    if kind in FORMATS and (not path or not Path(path).exists()):
        raise UserError(f'{spec}: no such folder; write {kind}:PATH or {kind}:PATH:SPLIT (of {", ".join(splits)}).')
    if (split := split or splits[0]) not in splits:
        raise UserError(f'{kind} has no split "{split}"; ' + nearest(split, splits))
    return WORLDS[kind](split, seed) if kind in WORLDS else Files(kind, path, split, seed, strict, share)


def show_items(spec: str = "shapes", count: str = "3") -> None:
    """Print items of a data set and write their pictures to out/samples/."""
    from PIL import Image
    world, folder = open_data(spec), Path("out/samples")
    folder.mkdir(parents=True, exist_ok=True)
    for item in map(world.item, range(int(count))):
        stem = re.sub(r"[^\w.-]+", "_", f"{spec.partition(':')[0]}-{item.id}")[:100]
        images = item.images or ([] if item.image is None else [item.image])
        files = [folder / f"{stem}{f'-{n}' if n else ''}.png" for n in range(len(images))]
        for file, image in zip(files, images):
            Image.fromarray(image).save(file)
        said = item.captions + [f"{q.question} {q.answer}" for q in item.qas]
        said += [f"{t['role']}: {t['content']}" for t in item.turns] + [f"[{n}] {text}" for n, text in item.chunks]
        print(*(files or [f"{stem} (no picture)"]), *(f"\n    {line}" for line in said))
