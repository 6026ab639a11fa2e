"""worlds/instruct.py: pictures in, instructions in LLaVA's format out."""
from __future__ import annotations

import functools
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import BACKGROUND, CELL, Item, Shapes, Thing
from papers.llava_data import DESCRIBE, SHARES, ask_teacher, read_turns, symbolic_context, teacher_messages
from support.formats.files import UserError, at_the_door, check_value, write_json
from support.formats.hub import fetch
from support.formats.llama import load_decoder
from support.formats.records import find_picture, load_lists, naming_file, parse_rows, same_id
from support.formats.tokenizer_files import load_tokenizer
from support.worlds import open_data
from support.worlds.shards import ShardedFiles
from support.worlds.teacher import rule_teacher


Box = tuple[float, float, float, float]         # left, top, right, bottom, in 0 … 1 of the picture's sides


def drawn_boxes(things: list[Thing], image: np.ndarray) -> list[tuple[Thing, Box]]:
    """Each thing of a `shapes` scene with the box around its pixels."""
    boxes = []
    for t in things:
        y, x = np.array(divmod(t.cell, 3)) * CELL
        rows, columns = np.nonzero((image[y:y + CELL, x:x + CELL] != BACKGROUND).any(-1))
        corners = x + columns.min(), y + rows.min(), x + columns.max() + 1, y + rows.max() + 1
        boxes.append((t, tuple(float(c) / (3 * CELL) for c in corners)))
    return boxes


@functools.cache
def coco_boxes(folder: Path, part: str) -> dict[int, list[tuple[str, Box]]]:
    """{image id: boxes} from COCO's annotations/instances_{part}.json, {} without that file.

    A box around a crowd is left out, because it holds any number of things.
    """
    file, found = folder / "annotations" / f"instances_{part}.json", {}
    if not file.exists():
        return found
    images, notes, categories = load_lists(file, "images", "annotations", "categories")
    with naming_file(file):
        sizes = {same_id(i["id"]): (i["width"], i["height"]) for i in images}
        names = {c["id"]: c["name"] for c in categories}

    def note(n, row):
        (x, y, w, h), (W, H) = row["bbox"], sizes[same_id(row["image_id"])]
        if not (0 <= x < W and 0 <= y < H and w > 0 < h):
            raise ValueError(f"the box {row['bbox']} is not in its picture of {W} x {H} pixels")
        if not row.get("iscrowd"):
            box = x / W, y / H, min(1, (x + w) / W), min(1, (y + h) / H)
            found.setdefault(same_id(row["image_id"]), []).append((names[row["category_id"]], box))

    if bad := [*parse_rows(f"{file}, annotation", notes, note)]:
        print(f"warning: {len(bad)} boxes skipped (last: {bad[-1].where}: {bad[-1].why})", file=sys.stderr)
    return found


@dataclass
class Sample:
    """A picture, and what a teacher gets to know about it."""
    rng: np.random.Generator
    kind: str                       # conversation, detail or reasoning
    question: str                   # the question that a description answers; "" for the other kinds
    item: Item
    file: Path | None               # of the picture, where it is one
    boxes: list[tuple[object, Box]]
    things: list[Thing]             # of a `shapes` scene

    @property
    def stem(self) -> str:
        """The item's id as a file name."""
        return re.sub(r"[^\w.-]+", "_", self.item.id)[:100]


def draw_sample(world, index: int, seed: int) -> Sample:
    """The picture of this index with a kind of instruction, drawn by SHARES, and its symbolic context."""
    rng, item = np.random.default_rng((158, seed, index)), world.item(index)
    kind = str(rng.choice([*SHARES], p=np.array([*SHARES.values()]) / sum(SHARES.values())))
    question = str(rng.choice(DESCRIBE)) if kind == "detail" else ""
    if not item.captions or item.image is None:
        raise UserError(f"{world.name}: item {item.id} has no caption for a teacher; "
                        "give data with captions.")
    things = world.scene(world.rng(index)) if isinstance(world, Shapes) else []
    file, boxes = None, drawn_boxes(things, item.image)
    if world.finite and not isinstance(world, ShardedFiles):
        record = world.read(index)[0][0]
        file, part = Path(find_picture(record.images[0])), record.more.get("coco_split") or record.split
        boxes = coco_boxes(Path(world.path), part).get(record.id, [])
    return Sample(rng, kind, question, item, file, boxes, things)


class RuleTeacher:
    """The teacher that knows the scenes of `shapes`."""

    def replies(self, samples: list[Sample]) -> list[str]:
        return [rule_teacher(sample.things, sample.kind, sample.rng) for sample in samples]


class DecoderTeacher:
    """A decoder that chats, from a folder or the hub; it reads captions and boxes."""

    def __init__(self, name: str, seed: int):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.decoder = load_decoder(fetch(name), device, torch.bfloat16 if device == "cuda" else None)
        self.tokenizer = load_tokenizer(fetch(name))
        self.generator = torch.Generator(device).manual_seed(seed)

    def replies(self, samples: list[Sample]) -> list[str]:
        conversations = [teacher_messages(s.kind, symbolic_context(s.item.captions, s.boxes), s.question)
                         for s in samples]
        return ask_teacher(self.decoder, self.tokenizer, conversations, generator=self.generator)


def write_sample(sample: Sample, turns: list[tuple[str, str]], images: Path) -> dict:
    """Save the picture and return its entry in chat.json.

    The picture stands before the first question or after it, each in half of the entries.
    """
    image = images / (sample.stem + (sample.file.suffix if sample.file else ".png"))
    if sample.file:
        shutil.copyfile(sample.file, image)
    else:
        Image.fromarray(sample.item.image).save(image)
    (q, a), *more = turns
    turns = [(f"<image>\n{q}" if sample.rng.random() < 0.5 else f"{q}\n<image>", a), *more]
    conversation = [{"from": role, "value": text}
                    for turn in turns for role, text in zip(("human", "gpt"), turn)]
    return {"id": f"{sample.stem}-{sample.kind}", "image": image.name, "conversations": conversation}


def generate_instructions(spec: str = "shapes", out: str | Path = "out/instruct", count: int = 100,
                          teacher: str = "rules", seed: int = 0, batch: int = 16,
                          follow_links: bool = False) -> None:
    """`count` pictures of a data set → out/chat.json in LLaVA-Instruct's format and out/images/.

    `llava:OUT` reads them. spec: shapes, or another data set with captions; COCO's boxes are read from
    annotations/instances_*.json. teacher: "rules", for shapes alone, or a decoder that chats (folder, hub
    name). Replies of another form are dropped and counted. chat.json is written last.
    """
    with at_the_door():
        check_value("the number of pictures", count, int, least=1, most=10**6)
    world, out = open_data(spec, seed, follow_links=follow_links), Path(out)
    if teacher == "rules" and not isinstance(world, Shapes):
        raise UserError(f"{spec}: the teacher by rules knows only the scenes of shapes; "
                        "give a decoder's folder.")
    if (out / "chat.json").exists():
        raise UserError(f"{out / 'chat.json'}: exists already; remove it, or write to another folder.")
    source = RuleTeacher() if teacher == "rules" else DecoderTeacher(teacher, seed)
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows, dropped = [], []
    for start in tqdm(range(0, count, batch), disable=not sys.stderr.isatty(), leave=False):
        samples = [draw_sample(world, i, seed) for i in range(start, min(start + batch, count))]
        for sample, reply in zip(samples, source.replies(samples)):
            try:
                turns = read_turns(reply, sample.kind, sample.question)
            except ValueError as e:
                dropped.append(f"{sample.stem}: {e}")
            else:
                rows.append(write_sample(sample, turns, out / "images"))
    if dropped:
        print(f"warning: {len(dropped)} of {count} replies dropped (last: {dropped[-1]})", file=sys.stderr)
    if not rows:
        raise UserError(f"{teacher}: not one of {count} replies has the form asked for; "
                        "take a larger chat model.")
    write_json(out / "chat.json", rows)
    kinds = ", ".join(f"{sum(r['id'].endswith(k) for r in rows):,} {k}" for k in SHARES)
    print(f"{out / 'chat.json'}: {len(rows):,} samples, {kinds}")
