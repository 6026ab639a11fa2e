"""Trained models draw pictures of texts, and a reader counts what of the texts is in them.

    python eval.py draw out/glide-shapes "a large red ring at the top left"
    python eval.py draw out/glide-shapes "a white circle at the top left" --each 8 --scale 6 --out circles.png
    python eval.py draw out/dalle-2-shapes "a small blue cross at the bottom left" --best-of 8
    python eval.py draw out/dalle-2-shapes --also out/chameleon-2-shapes out/glide-shapes --count 100

RUN is a run of recipe glide, dalle-2 or chameleon-2. A text gets a row of pictures; with --also it gets a
column, and every run a row. --count asks the reader of papers/scene_reader.py, which knows no words and ranks
nothing.
"""
from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import Shapes, caption_scene, to_pixels
from eval import align
from papers.dalle import choose_by_clip
from papers.scene_reader import UNIT, count_by_chance, count_found, draw_scenes, read_scenes
from support.formats.drawing_runs import CODES, READS, Drawer, drawing_recipe, load_drawer, to_arrays
from support.formats.files import UserError, atomically, read_json
from support.formats.glide import save_grid
from support.formats.towers import TEXT_TOWER, open_clip
from support.lab.claims import machine
from support.lab.unread import given_flags
from support.plumbing.cli import flag_name
from support.plumbing.flags import Parser, add_machine_flags, number, use_machine
from support.plumbing.start import refuse_unread

SPLITS = {"val": "pairs of colour and shape that training shows",
          "test": "a pair in each that training never shows"}


def best_by_clip(draw: Drawer, clip, samples: int) -> Drawer:
    """Of `samples` pictures of each text the one that CLIP likes best, as DALL-E does."""
    def drawer(texts: list[str], seed: int) -> list[np.ndarray]:
        drawn = draw(texts * samples, seed)
        parts = to_pixels(drawn, drawn[0].shape[0], UNIT).split(len(texts))
        return to_arrays(choose_by_clip(clip, texts, parts))

    return drawer


def count_drawings(draw: Drawer, split: str, count: int, seed: int) -> dict[str, float]:
    """What the reader finds in pictures of the first captions of a split; chance: in the next one's."""
    scenes, _ = draw_scenes(Shapes(split), 0, count)
    read = read_scenes(to_pixels(draw([caption_scene(things) for things in scenes], seed), Shapes.size, UNIT))
    chance = count_by_chance(scenes, read)
    return {**count_found(scenes, read), "chance": chance["pictures"], "chance, things": chance["things"]}


def is_fixed(run: Path, temperature: float | None) -> bool:
    """Whether a run draws one and the same picture of a text: codes at temperature 0."""
    if (recipe := drawing_recipe(run)) not in CODES:
        return False
    own = inspect.signature(CODES[recipe].draw).parameters["temperature"].default
    return (own if temperature is None else temperature) == 0


def refuse_void_flags(args, given: set[str], fixed: list[str]) -> None:
    """A UserError for a flag that was given and that changes no picture; fixed: the runs that are."""
    if args.count:
        refuse_unread(given, {"each", "out"}, "--count")
    else:
        refuse_unread(given, {"report"}, "a picture of TEXTs")
    if args.also:
        refuse_unread(given, {"each"}, "--also")
    void = {"best_of", *(["each"] * (args.each != 1)), *(["seed"] * (len(fixed) == 1 + len(args.also)))}
    if fixed and given & void:
        raise UserError(f"{', '.join(sorted(map(flag_name, given & void)))}: {fixed[0]} draws one and the "
                        "same picture of a text at temperature 0; give --temperature, 1 say.")


@dataclass
class System:
    """What draws: a run, alone or with CLIP to choose."""
    name: str
    draw: Drawer
    minutes: float                                      # of its training


def open_systems(args, device: str) -> list[System]:
    systems = []
    for run in map(Path, (args.run, *args.also)):
        draw = load_drawer(run, device, scale=args.scale, steps=args.steps, temperature=args.temperature)
        name, minutes = drawing_recipe(run), read_json(run / "config.json")["seconds"] / 60
        if any(name == system.name for system in systems):
            name = str(run)
        systems.append(System(name, draw, minutes))
        if args.best_of > 1:
            best = best_by_clip(draw, open_clip(TEXT_TOWER, device), args.best_of)
            systems.append(System(f"{name}, best of {args.best_of} by CLIP", best, minutes))
    return systems


def count_report(systems: list[System], argv: list[str], count: int, seed: int) -> str:
    """The table of --count: a row per system and split."""
    rows = [["", "pairs", "things", "exact", "chance", "chance, things", "minutes"]]
    for system in systems:
        for split in SPLITS:
            found = count_drawings(system.draw, split, count, seed)
            shares = [f"{100 * share:.1f}" for share in found.values()]
            rows.append([f"{system.name}, {split}", *shares, f"{system.minutes:.1f}"])
    splits = "; ".join(f"{split}: {what}" for split, what in SPLITS.items())
    return (f"python eval.py draw {' '.join(argv)}\n"
            f"{count} captions of each split of shapes ({splits}); {machine()}.\n"
            "Percent: pictures in which the reader finds all named pairs; things found at their places; "
            "pictures\nwith nothing more, less or else; chance: in the next caption's picture. Minutes of "
            f"training.\n\n{align(rows)}\n")


def main(argv: list[str]) -> None:
    parser = Parser("eval.py draw", __doc__)
    parser.add_argument("run", metavar="RUN", help=f"run folder of a recipe that draws: {', '.join(READS)}")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="what to draw")
    parser.add_argument("--also", nargs="+", default=[], metavar="RUN", help="other runs, a row of each")
    parser.add_argument("--each", type=number(least=1, most=64), metavar="N",
                        help="pictures of each text, without --also (4; at temperature 0 one)")
    parser.add_argument("--best-of", type=number(least=1, most=512), default=1, metavar="N",
                        help="pictures of which the bundled CLIP chooses each (1)")
    parser.add_argument("--scale", type=number(float, least=0, most=100), metavar="S",
                        help="glide: of the guidance; 1 is none (3)")
    parser.add_argument("--steps", type=number(least=1, most=1000), metavar="N",
                        help="glide: steps from noise to picture (25)")
    parser.add_argument("--temperature", type=number(float, least=0, most=100), metavar="T",
                        help="dalle-2, chameleon-2: 0 takes the likeliest code (1, and 0)")
    parser.add_argument("--seed", type=number(least=0), default=0, metavar="N", help="of the noise (0)")
    parser.add_argument("--out", default="pictures.png", metavar="FILE",
                        help="the picture file (pictures.png)")
    parser.add_argument("--count", type=number(least=2, most=10_000), metavar="N",
                        help="instead of texts: of N captions of each split, how much a reader finds, in %%")
    parser.add_argument("--report", default="", metavar="FILE", help="of the table of --count")
    add_machine_flags(parser)
    args = parser.parse_args(argv)
    if (args.count is None) == (not args.texts):
        raise UserError("give TEXTs to draw, or --count N to have N captions drawn and read.")
    fixed = [run for run in (args.run, *args.also) if is_fixed(Path(run), args.temperature)]
    refuse_void_flags(args, given_flags(parser, args), fixed)
    each = args.each or (1 if fixed else 4)
    systems = open_systems(args, use_machine(args))
    if args.count:
        text = count_report(systems, argv, args.count, args.seed)
        print(text)
        if args.report:
            with atomically(Path(args.report)) as tmp:
                tmp.write_text(text, encoding="utf-8")
        return
    systems = [system for system in systems if args.best_of == 1 or system.name.endswith("by CLIP")]
    texts = args.texts if args.also else [text for text in args.texts for _ in range(each)]
    columns = len(texts) if args.also else each
    drawn = [picture for system in systems for picture in system.draw(texts, args.seed)]
    save_grid(Path(args.out), drawn, columns)
    print(f"{args.out}: {len(drawn) // columns} rows of {columns} pictures")
