"""worlds/instruct.py: pictures in, instructions in LLaVA's format out."""
from __future__ import annotations

import functools
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Shapes, drawn_boxes
from papers.llava_data import DESCRIBE, SHARES, ask_teacher, read_turns, symbolic_context, teacher_messages
from support.formats.files import UserError, write_json
from support.formats.hub import fetch
from support.formats.llama import load_decoder
from support.formats.records import load_lists, naming_file, parse_rows
from support.formats.tokenizer_files import load_tokenizer
from support.worlds import open_data
from support.worlds.files import Files
from support.worlds.teacher import rule_teacher


@functools.cache
def coco_boxes(folder: Path, part: str) -> dict[int, list[tuple[str, tuple[float, ...]]]]:
    """{image id: its boxes for symbolic_context} from COCO's annotations/instances_{part}.json; {} without such a file.
    A box around a crowd is left out: it holds any number of things."""
    file, found = folder / "annotations" / f"instances_{part}.json", {}
    if not file.exists():
        return found
    images, notes, categories = load_lists(file, "images", "annotations", "categories")
    with naming_file(file):
        sizes, names = {i["id"]: (i["width"], i["height"]) for i in images}, {c["id"]: c["name"] for c in categories}

    def note(n, row):
        (x, y, w, h), (W, H) = row["bbox"], sizes[row["image_id"]]
        if not (0 <= x < W and 0 <= y < H and w > 0 < h):
            raise ValueError(f"the box {row['bbox']} is not in its picture of {W} x {H} pixels")
        if not row.get("iscrowd"):
            box = x / W, y / H, min(1, (x + w) / W), min(1, (y + h) / H)
            found.setdefault(row["image_id"], []).append((names[row["category_id"]], box))

    if bad := [*parse_rows(f"{file}, annotation", notes, note)]:
        print(f"warning: {len(bad)} boxes skipped (last: {bad[-1].where}: {bad[-1].why})", file=sys.stderr)
    return found


def teacher_input(world, index: int, seed: int) -> tuple:
    """What is drawn for a picture and what a teacher is told about it: (rng, kind, question that a description answers,
    item, file of the picture or None, boxes, things of a `shapes` scene)."""
    rng, item = np.random.default_rng((158, seed, index)), world.item(index)
    kind = str(rng.choice([*SHARES], p=np.array([*SHARES.values()]) / sum(SHARES.values())))
    question, things, file = str(rng.choice(DESCRIBE)) if kind == "detail" else "", [], None
    if not item.captions or item.image is None:
        raise UserError(f"{world.name}: item {item.id} has no caption for a teacher; give data with captions.")
    if isinstance(world, Shapes):
        things = world.scene(world.rng(index))
    boxes = drawn_boxes(things, item.image)
    if isinstance(world, Files):
        r = world.read(index)[0][0]
        file, boxes = Path(r.images[0]), coco_boxes(Path(world.path), r.more.get("coco_split") or r.split).get(r.id, [])
    return rng, kind, question, item, file, boxes, things


def generate_instructions(spec: str = "shapes", out: str | Path = "out/instruct", count: int | str = 100,
                          teacher: str = "rules", seed: int = 0, batch: int = 16) -> None:
    """`count` pictures of a data set → out/chat.json in LLaVA-Instruct's format and out/images/; `llava:OUT` reads it.

    spec: shapes, or another data set with captions; COCO's boxes are read from annotations/instances_*.json.
    teacher: "rules", for shapes alone, or a decoder that chats (folder, hub name), whose replies of another form are
    dropped and counted. A picture gets one of the three kinds, drawn by SHARES. The list is written last of all.
    """
    from PIL import Image
    if not str(count).isdecimal() or not int(count):
        raise UserError(f'the number of pictures is "{count}"; write python data.py generate SPEC OUT COUNT TEACHER.')
    world, out, rows, dropped, count = open_data(spec, seed), Path(out), [], [], int(count)
    if teacher == "rules" and not isinstance(world, Shapes):
        raise UserError(f"{spec}: the teacher by rules knows only the scenes of shapes; give a decoder's folder.")
    if (out / "chat.json").exists():
        raise UserError(f"{out / 'chat.json'}: exists already; remove it, or write to another folder.")
    if teacher != "rules":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        decoder = load_decoder(fetch(teacher), device, torch.bfloat16 if device == "cuda" else None)
        tokenizer, generator = load_tokenizer(fetch(teacher)), torch.Generator(device).manual_seed(seed)
    (out / "images").mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, count, batch), disable=not sys.stderr.isatty(), leave=False):
        some = [teacher_input(world, i, seed) for i in range(start, min(start + batch, count))]
        if teacher == "rules":
            replies = [rule_teacher(things, kind, rng) for rng, kind, *_, things in some]
        else:
            replies = ask_teacher(decoder, tokenizer, generator=generator, asked=[
                teacher_messages(kind, symbolic_context(item.captions, boxes), question)
                for _, kind, question, item, _, boxes, _ in some])
        for (rng, kind, question, item, file, *_), reply in zip(some, replies):
            stem = re.sub(r"[^\w.-]+", "_", item.id)[:100]
            try:
                (q, a), *more = read_turns(reply, kind, question)
            except ValueError as e:
                dropped.append(f"{stem}: {e}")
                continue
            image = out / "images" / (stem + (file.suffix if file else ".png"))
            shutil.copyfile(file, image) if file else Image.fromarray(item.image).save(image)
            turns = [(f"<image>\n{q}" if rng.random() < 0.5 else f"{q}\n<image>", a), *more]
            rows.append({"id": f"{stem}-{kind}", "image": image.name, "conversations": [
                {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn)]})
    if dropped:
        print(f"warning: {len(dropped)} of {count} replies dropped (last: {dropped[-1]})", file=sys.stderr)
    if not rows:
        raise UserError(f"{teacher}: not one of {count} replies has the form asked for; take a larger chat model.")
    write_json(out / "chat.json", rows)
    kinds = ", ".join(f"{sum(r['id'].endswith(k) for r in rows):,} {k}" for k in SHARES)
    print(f"{out / 'chat.json'}: {len(rows):,} samples, {kinds}")
