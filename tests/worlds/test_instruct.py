"""Claim: LLaVA's data generation makes, of captions and boxes, a data set that the `llava` reader opens;
whatever the
teacher by rules says of a scene is true, worked out again from the scene; and what a decoder writes is
kept only in the form that was asked for."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from model import IGNORE, IMAGE
from papers.llava_data import (DESCRIBE, EXAMPLE, SHARES, TEACHER_PROMPTS, ask_teacher, read_turns,
                               symbolic_context, teacher_messages, write_turns)
from support.formats.chat import TEMPLATES
from support.formats.llama import load_decoder
from support.formats.pictures import read_image
from support.formats.tokenizer_files import load_tokenizer
from support.worlds import open_data
from support.worlds.instruct import coco_boxes, drawn_boxes, generate_instructions
from support.worlds.teacher import RULE_KINDS, certain_questions, rule_teacher
from support.worlds.text import shapes_tokenizer
from conftest import GOLDEN
from test_shards import number_of, write_set
from data import COLORS, HELD_OUT, SHAPES, Shapes
from support.formats.files import UserError

ROOT = Path(__file__).parents[2]
WORLDS = [Shapes("train"), Shapes("test"), Shapes("all", seed=3)]


def scenes(count: int):
    return [(w.scene(w.rng(i)), w.item(i).image) for w in WORLDS for i in range(count)]


# --- what a teacher is told ---------------------------------------------------------------------------------


def test_the_box_of_a_thing_is_what_changes_when_the_thing_is_drawn_in_another_color():
    far = {
        c: max(COLORS, key=lambda o: min(abs(a - b) for a, b in zip(COLORS[c], COLORS[o]))) for c in COLORS
    }
    for world in WORLDS:
        for i in range(60):
            things = world.scene(world.rng(i))
            image = data.draw_scene(things, np.random.default_rng(i))
            for n, (t, box) in enumerate(drawn_boxes(things, image)):
                other = [*things[:n], replace(t, color=far[t.color]), *things[n + 1:]]
                rows, columns = np.nonzero(
                    (image != data.draw_scene(other, np.random.default_rng(i))).any(-1)
                )
                extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert [48 * x for x in box] == pytest.approx(extent), (t, box)


def test_boxes_lie_apart_and_agree_with_the_places_in_the_captions():
    for things, image in scenes(60):
        for t, (left, top, right, bottom) in drawn_boxes(things, image):
            row, column = t.place.split()
            assert {"top": 0, "middle": 1, "bottom": 2}[row] == int(top * 3) == int(bottom * 3 - 1e-6)
            assert {"left": 0, "center": 1, "right": 2}[column] == int(left * 3) == int(right * 3 - 1e-6)


def test_the_symbols_of_a_picture_are_its_captions_and_then_its_boxes():
    boxes = [("dog", (0, 0.25, 1 / 3, 1)), ("ball", (0.5, 0.5, 0.625, 0.75))]
    text = symbolic_context([" A dog\nruns. ", "A <image> dog"], boxes)
    assert (
        text == "A dog runs.\nA dog\n\ndog: [0.000, 0.250, 0.333, 1.000]\nball: [0.500, 0.500, 0.625, 0.750]"
    )
    assert symbolic_context(["A dog."]) == "A dog."
    things = [data.Thing("red", "square", "large", 4)]
    boxes = drawn_boxes(things, data.draw_scene(things, np.random.default_rng(0)))
    assert re.fullmatch(
        r"large red square: \[0\.\d{3}, 0\.\d{3}, 0\.\d{3}, 0\.\d{3}\]", symbolic_context([], boxes)
    )


def test_a_teacher_gets_the_rules_an_example_with_its_reply_and_the_picture():
    for kind in SHARES:
        question = DESCRIBE[2] if kind == "detail" else ""
        system, first, reply, last = teacher_messages(kind, "a red ring", question)
        assert [m["role"] for m in (system, first, reply, last)] == ["system", "user", "assistant", "user"]
        assert first["content"].startswith(EXAMPLE) and last["content"].startswith("a red ring")
        assert question in last["content"]
        assert read_turns(
            reply["content"].replace("wom", "m").replace("rains", "snows"), kind, "?"
        )  # its form is right,
        with pytest.raises(ValueError):  # but it is no reply about another picture
            read_turns(reply["content"], kind, "?")


# --- what a teacher by rules says is true -------------------------------------------------------------------

NUMBER = {w: n for n, w in enumerate(("no", "one", "two", "three", "four"))} | {"zero": 0}
ROW, COLUMN = ["top", "middle", "bottom"], ["left", "center", "right"]


def where(t) -> str:
    return f"{ROW[t.cell // 3]} {COLUMN[t.cell % 3]}"


def the(phrase: str, things) -> data.Thing:
    """The one thing that "the small red ring at the top left" can mean: every word of it must fit."""
    name, _, place = phrase.lower().removeprefix("the ").partition(" at the ")
    fits = [t for t in things if set(name.split()) <= {t.color, t.shape, t.size} and place in ("", where(t))]
    assert len(fits) == 1, f"{phrase} is {len(fits)} of {things}"
    return fits[0]


def group(phrase: str, things) -> list[data.Thing]:
    """What "rings", "crosses", "red objects", "one red object" or "objects" are in this scene."""
    word = phrase.lower().removesuffix(" objects").removesuffix(" object")
    shape = next((s for s in SHAPES if word in (s, s + "s", s + "es")), None)
    assert shape or word in COLORS or word in ("object", "objects"), phrase
    return [t for t in things if word in ("object", "objects", t.color) or t.shape == shape]


def counted(claim: str, things) -> list[data.Thing]:
    """Checks "there are two rings"; returns the rings."""
    verb, number, what = re.fullmatch(r"there (is|are) (no|one|two|three|four) (.+)", claim.lower()).groups()
    found = group(what, things)
    singular = not what.endswith("s") or what.endswith("ss")
    assert len(found) == NUMBER[number] and (verb == "is") == (number == "one") == singular, (claim, things)
    return found


def related(a, words: str, b) -> None:
    (y, x), (v, u) = divmod(a.cell, 3), divmod(b.cell, 3)
    assert set(words.split(" and ")) == {
        w
        for w, holds in (
            ("above", y < v),
            ("below", y > v),
            ("to the left of", x < u),
            ("to the right of", x > u),
        )
        if holds
    }, (a, words, b)


def listing(text: str) -> list[str]:
    return re.split(", | and ", text)


def check_conversation(question: str, answer: str, things) -> str:
    """Fails unless the answer is right and answers that question; returns the kind."""
    answer = answer.removesuffix(".")
    if question == "What kinds of things are in the picture?":
        first, *rest = listing(answer)
        verb, claims = first.split()[1], [first.removeprefix("There is ").removeprefix("There are "), *rest]
        assert verb == ("is" if claims[0].startswith("one") else "are")
        total = [
            t for c in claims for t in counted(f"there {'is' if c.startswith('one') else 'are'} {c}", things)
        ]
        assert sorted(map(repr, total)) == sorted(map(repr, things))            # each thing once
        return "types"
    if m := re.fullmatch(r"Are there any (.+)\?", question):
        yes, claim = answer.split(", ")
        assert counted(claim, things) == group(m[1], things) and yes == (
            "Yes" if group(m[1], things) else "No"
        )
        return "existence"
    if m := re.fullmatch(r"How many (.+) are there\?", question):
        assert counted(answer, things) == group(m[1], things)
        return "count"
    if m := re.fullmatch(
        r"What color is (.+)\?|Is (.+) small or large\?|Where is (.+?)(?: in relation to (.+))?\?", question
    ):
        color, size, place, other = m.groups()
        about = the(color or size or place, things)
        subject, _, predicate = answer.partition(" is ")
        assert the(subject, things) == about
        if other:
            assert predicate.endswith(" " + other)
            related(about, predicate.removesuffix(" " + other), the(other, things))
            return "relation"
        expected = {"color": about.color, "size": about.size, "place": f"at the {where(about)}"}
        kind = "color" if color else "size" if size else "place"
        assert predicate == expected[kind]
        assert expected[kind] not in (color or size or place)  # the question gives nothing away
        return kind
    raise AssertionError(question)


def check_reasoning(question: str, answer: str, things) -> str:
    """Fails unless every step of the answer is right and the last one answers the question; returns the
    kind."""
    steps = answer.removesuffix(".").split(". ")
    at = lambda t: f"in the {ROW[t.cell // 3]} row and the {COLUMN[t.cell % 3]} column"
    if m := re.fullmatch(r"How many objects would be left without the (.+)\?", question):
        gone = group(m[1], things)
        assert counted(steps[0], things) == things
        claim, names = steps[1].split(": ")
        assert counted(claim, things) == gone and [the(n, things) for n in listing(names)] == gone
        a, b, c = re.fullmatch("(.+) minus (.+) is (.+)", steps[2].lower()).groups()
        assert (NUMBER[a], NUMBER[b], NUMBER[c]) == (
            len(things),
            len(gone),
            len([t for t in things if t not in gone]),
        )
        left = re.fullmatch(r"So (\w+) (objects?) would be left", steps[3])
        assert NUMBER[left[1]] == len(things) - len(gone) and (left[2] == "object") == (left[1] == "one")
        return "remove"
    if m := re.fullmatch(r"Where would (.+) be if left and right were swapped\?", question):
        t = the(m[1], things)
        subject, place = steps[0].split(" is ", 1)
        swapped = {"left": "right", "right": "left", "center": "center"}[COLUMN[t.cell % 3]]
        assert the(subject, things) == t and place == at(t) and len(steps) == 3
        assert steps[2] == f"So it would be at the {ROW[t.cell // 3]} {swapped}"
        return "mirror"
    form = r"How many steps down, up, right or left lead from (.+) to (.+) on a grid of three by three\?"
    m = re.fullmatch(form, question)
    ends = [the(name, things) for name in m.groups()]
    for t, step in zip(ends, steps):
        subject, place = step.split(" is ", 1)
        assert the(subject, things) == t and place == at(t)
    y, x = divmod(ends[0].cell, 3)
    total = 0
    for leg in listing(steps[2].removeprefix("That takes ")):                   # walk it
        number, unit, way = leg.split()
        k, total = NUMBER[number], total + NUMBER[number]
        y, x = y + k * ((way == "down") - (way == "up")), x + k * ((way == "right") - (way == "left"))
        assert k > 0 and (unit == "step") == (k == 1)
    assert (y, x) == divmod(ends[1].cell, 3)
    assert steps[3] == f"So the answer is {'one step' if total == 1 else f'{[*NUMBER][total]} steps'}"
    return "walk"


def check_detail(text: str, things) -> None:
    first, *rest = text.removesuffix(".").split(". ")
    number = re.fullmatch("The picture shows (.+?) objects? on a dark background", first)[1]
    assert NUMBER[number] == len(things)
    placed, shared = [], set()
    for s in rest:
        if m := re.fullmatch("At the (.+) there is an? (.+)", s):
            placed.append(the(f"the {m[2]} at the {m[1]}", things))
            assert len(m[2].split()) == 3
        elif m := re.fullmatch("(.+) of them are (.+)", s):
            assert len(group(m[2], things)) == NUMBER[m[1].lower()] > 1
            shared.add(m[2])
        else:
            form = "(The .+?) is ((?:above|below|to|the|left|right|of|and| )+) (the .+)"
            subject, words, other = re.fullmatch(form, s).groups()
            related(the(subject, things), words, the(other, things))
    assert (
        sorted(placed, key=lambda t: t.cell) == placed
        and set(placed) == set(things)
        and len(placed) == len(things)
    )
    alike = {w for t in things for w in (t.color, t.shape) if sum(w in o.pair for o in things) > 1}
    assert len(shared) == len(alike)  # nothing that several share is left out


def check_turns(kind: str, turns: list[tuple[str, str]], things) -> None:
    if kind == "detail":
        assert turns[0][0] in DESCRIBE and len(turns) == 1
        check_detail(turns[0][1], things)
    elif kind == "reasoning":
        assert len(turns) == 1
        check_reasoning(*turns[0], things)
    else:
        kinds = [check_conversation(q, a, things) for q, a in turns]
        assert len(set(kinds)) == len(kinds) and 3 <= len(kinds) <= 5


def test_every_answer_to_every_question_about_hundreds_of_scenes_is_right():
    seen = {}
    for things, _ in scenes(130):
        for kind, question, answer in certain_questions(things):
            checker = check_reasoning if kind in RULE_KINDS["reasoning"] else check_conversation
            assert checker(question, answer, things) == kind
            seen[kind] = seen.get(kind, 0) + 1
    assert seen.keys() == {k for kinds in RULE_KINDS.values() for k in kinds} and min(seen.values()) >= 300


def test_every_description_of_hundreds_of_scenes_is_right():
    for n, (things, _) in enumerate(scenes(130)):
        check_detail(rule_teacher(things, "detail", np.random.default_rng(n)), things)


def test_the_checks_above_refuse_what_is_false():
    things = [data.Thing("red", "ring", "small", 0), data.Thing("blue", "cross", "large", 4)]
    questions = {k: (q, a) for k, q, a in certain_questions(things)}
    for question, answer in (
        ("What color is the ring?", "The ring is blue."),
        ("Is the ring small or large?", "The ring is large."),
        ("How many rings are there?", "There are two rings."),
        ("Are there any rings?", "No, there is one ring."),
        ("Where is the ring?", "The ring is at the top right."),
        ("Where is the ring in relation to the cross?", "The ring is above the cross."),
        ("What kinds of things are in the picture?", "There is one ring."),
    ):
        with pytest.raises(AssertionError):
            check_conversation(question, answer, things)
    for kind, false in (
        ("walk", ("two steps.", "three steps.")),
        ("remove", ("one object would", "two objects would")),
        ("mirror", ("be at the middle center", "be at the middle right")),
    ):
        question, answer = questions[kind]
        check_reasoning(question, answer, things)
        with pytest.raises(AssertionError):
            assert answer.replace(*false) != answer
            check_reasoning(question, answer.replace(*false), things)
    with pytest.raises(AssertionError):
        check_detail(
            rule_teacher(things, "detail", np.random.default_rng(0)).replace("below", "above"), things
        )


# --- what is written ----------------------------------------------------------------------------------------


def made(tmp_path, *args, **kw) -> list[dict]:
    generate_instructions(*args[:1], tmp_path, *args[1:], **kw)
    return json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))


def test_the_file_is_llava_instructs_and_true_of_its_pictures(tmp_path):
    rows, world = made(tmp_path, "shapes", 400), Shapes("train")
    kinds, places, words = [], [], json.dumps(rows)
    for i, row in enumerate(rows):
        assert row.keys() == {"id", "image", "conversations"} and row["image"] == f"train-{i}.png"
        assert np.array_equal(read_image(tmp_path / "images" / row["image"]), world.item(i).image)
        assert [t["from"] for t in row["conversations"]] == ["human", "gpt"] * (
            len(row["conversations"]) // 2
        )
        texts = [t["value"] for t in row["conversations"]]
        first = re.fullmatch(r"(<image>\n)?(.+?)(\n<image>)?", texts[0])
        assert (first[1] is None) != (first[3] is None) and "<image>" not in "".join([first[2], *texts[1:]])
        places.append(first[1] is None)
        kinds.append(row["id"].split("-")[-1])
        check_turns(kinds[-1], [*zip([first[2], *texts[2::2]], texts[1::2])], world.scene(world.rng(i)))
    assert 150 < sum(places) < 250
    for kind, share in {"conversation": 58, "detail": 23, "reasoning": 77}.items():
        expected, deviation = 400 * share / 158, (400 * share / 158 * (1 - share / 158)) ** 0.5
        assert abs(kinds.count(kind) - expected) < 3 * deviation
    assert not [p for p in HELD_OUT if " ".join(p) in words]  # training never hears of a held-out pair


def test_the_reader_of_llava_opens_what_was_written_and_lessons_come_of_it(tmp_path):
    rows = made(tmp_path, "shapes:test", 30)
    read = open_data(f"llava:{tmp_path}:all")
    assert len(read) == 30 and not read.broken
    items, tokenizer = [read.item(i) for i in range(30)], shapes_tokenizer()
    assert {i.id for i in items} == {r["id"] for r in rows}
    for item in items:
        answers = [t["content"] for t in item.turns if t["role"] == "assistant"]
        document = data.training_document(
            item, tokenizer, template=TEMPLATES["plain" if len(answers) == 1 else "alpaca"]
        )
        learned = tokenizer.decode([t for t in document.labels if t != IGNORE])
        assert learned.strip() == "".join(answers).strip() and document.tokens.count(IMAGE) == 1


def test_the_seed_decides_and_the_size_of_a_batch_does_not(tmp_path):
    runs = (("a", 1, 16), ("b", 1, 16), ("c", 1, 7), ("d", 2, 16))
    one, again, small, other = (made(tmp_path / n, "shapes", 40, seed=s, batch=b) for n, s, b in runs)
    assert one == again == small != other


REPLIES = {
    "conversation": "Question:\nWhat is it?\n===\nAnswer:\nA ring.\n"
    "===\nQuestion: Where?\n===\nAnswer: On the left,\nhigh up.\n===",
    "detail": "A ring.\n\nIt is red.",
    "reasoning": "Question:\nWhy?\n\n===\n\nAnswer:\nOne.\nTwo.",
}


def test_a_reply_is_read_into_turns():
    talk = [("What is it?", "A ring."), ("Where?", "On the left,\nhigh up.")]
    assert read_turns(REPLIES["conversation"], "conversation") == talk
    assert read_turns(REPLIES["reasoning"], "reasoning") == [("Why?", "One.\nTwo.")]
    assert read_turns(REPLIES["detail"], "detail", "Describe it.") == [
        ("Describe it.", "A ring.\n\nIt is red.")
    ]
    turns = [("a?", "b"), ("c?", "d")]
    assert read_turns(write_turns(turns), "conversation") == turns


@pytest.mark.parametrize(
    "kind, reply",
    [
        *(
            ("conversation", bad)
            for bad in (
                "",
                "It is a ring.",
                "Question:\nWhat?",
                "Question:\nWhat?\n===\nAnswer:\n",
                "Question:\n===\nAnswer:\nA ring.",
                "Question: a?\nAnswer: b",
                "Answer:\nA ring.\n===\nQuestion:\nWhat?",
                "Question: a?\n===\nAnswer: b\n===\nQuestion: c?",
                "Sure!\nQuestion: a?\n===\nAnswer: b",
                "Question: a?\n===\nQuestion: b?\n===\nAnswer: c",
                "Question: a <image>?\n===\nAnswer: b",
                "Question: a?\n===\nAnswer: b\n===\nBye!",
            )
        ),
        ("reasoning", "Question: a?\n===\nAnswer: b\n===\nQuestion: c?\n===\nAnswer: d"),
        ("reasoning", "b"),
        ("detail", " \n"),
        ("detail", "Question: a?\n===\nAnswer: b"),
        ("detail", "A <image>."),
    ],
)
def test_a_reply_of_another_form_is_refused(kind, reply):
    with pytest.raises(ValueError):
        read_turns(reply, kind, "Describe it.")


# --- decoders as teachers -----------------------------------------------------------------------------------


class Stub:
    """A teacher that reads its prompts: what they say of the picture is in `asked`; its replies keep the
    rules."""

    embed = types.SimpleNamespace(weight=torch.zeros(1))

    def __init__(self, broken: int = 0):
        self.tokenizer, self.asked, self.broken, self.batches = shapes_tokenizer(), [], broken, []

    def generate(self, tokens, max_new_tokens, temperature, mask, stop, generator):
        self.batches.append(len(tokens))
        replies = []
        for row, real in zip(tokens.tolist(), mask.tolist()):
            prompt = self.tokenizer.decode([t for t, m in zip(row, real) if m])
            kind = next(k for k, (rules, _) in TEACHER_PROMPTS.items() if prompt.startswith(rules))
            self.asked.append(prompt.rpartition(TEACHER_PROMPTS[kind][1])[2].strip())
            reply = REPLIES[kind] if len(self.asked) > self.broken else "Question: <image>"
            replies.append([*self.tokenizer.encode(reply), self.tokenizer.eos])
        longest = max(map(len, replies))
        return torch.tensor([r + [self.tokenizer.eos] * (longest - len(r)) for r in replies])


@pytest.fixture
def stub(monkeypatch):
    def use(**kw):
        teacher = Stub(**kw)
        monkeypatch.setattr("support.worlds.instruct.fetch", lambda name: name)
        monkeypatch.setattr("support.worlds.instruct.load_decoder", lambda *_: teacher)
        monkeypatch.setattr("support.worlds.instruct.load_tokenizer", lambda _: teacher.tokenizer)
        return teacher
    return use


def test_a_decoder_is_asked_about_captions_and_boxes_and_its_replies_are_written(stub, tmp_path, capsys):
    teacher = stub(broken=3)
    rows, world = made(tmp_path, "shapes", 20, "a decoder", batch=8), Shapes("train")
    assert teacher.batches == [8, 8, 4] and len(rows) == 17
    assert "3 of 20 replies dropped (last: train-2:" in capsys.readouterr().err
    for i, asked in enumerate(teacher.asked):
        item = world.item(i)
        boxes = drawn_boxes(world.scene(world.rng(i)), item.image)
        assert asked.startswith(symbolic_context(item.captions, boxes))
    for row in rows:
        kind = row["id"].split("-")[-1]
        assert row["conversations"][-1]["value"] == read_turns(REPLIES[kind], kind, "?")[-1][1]
        i = int(row["id"].split("-")[1])
        assert kind != "detail" or teacher.asked[i].split("\n\n")[-1] in row["conversations"][0]["value"]
    assert {p.name for p in (tmp_path / "images").iterdir()} == {r["image"] for r in rows}


@pytest.mark.parametrize("kind", ["wds", "parquet"])
def test_pictures_of_shards_are_written_as_files(kind, stub, tmp_path):
    stub()
    rows = made(tmp_path / "out", write_set(kind, tmp_path / "shards", 12), 3, "a decoder")
    numbers = [number_of(np.asarray(Image.open(tmp_path / "out/images" / row["image"]))) for row in rows]
    assert len({*numbers}) == 3 and all(row["image"].endswith(".png") for row in rows)


def test_not_one_usable_reply_is_a_sentence_and_leaves_no_list(stub, tmp_path):
    stub(broken=5)
    with pytest.raises(UserError, match="not one of 5 replies"):
        made(tmp_path, "shapes", 5, "a decoder")
    assert not (tmp_path / "chat.json").exists()


def test_the_bundled_decoder_replies_in_a_batch_as_alone_and_a_cut_reply_is_none():
    decoder, tokenizer = load_decoder(ROOT / "weights/decoder"), load_tokenizer(ROOT / "weights/decoder")
    asked = [
        [{"role": "user", "content": text}]
        for text in (
            "a small red ring at the top left\nQuestion: what color is the ring? Answer:",
            "a large blue square at the top left and a small red cross at the bottom right\n"
            "Question: where is the red cross? Answer:",
        )
    ]
    together = ask_teacher(decoder, tokenizer, asked, 20, temperature=0)
    assert together == [ask_teacher(decoder, tokenizer, [a], 20, temperature=0)[0] for a in asked]
    assert [t.strip() for t in together] == ["red", "bottom right"]
    assert ask_teacher(decoder, tokenizer, asked, 1, temperature=0) == ["", ""]  # no stop token among them


# --- COCO: captions and boxes of two files ------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path):
    folder = tmp_path / "coco"
    shutil.copytree(GOLDEN / "datasets" / "coco_captions", folder)
    image = {"id": 123456, "width": 41, "height": 28}
    box = lambda i, category, bbox, crowd=0: {
        "image_id": i,
        "category_id": category,
        "bbox": bbox,
        "iscrowd": crowd,
    }
    notes = [
        box(123456, 7, [0, 7, 20.5, 14]),
        box(123456, 9, [20.5, 0, 30, 28]),
        box(123456, 7, [0, 0, 40, 20], 1),
        box(42, 9, [10.5, 14, 21, 7]),
        box(42, 9, [10, 10, 0, 5]),
        box(42, 9, [50, 1, 2, 2]),
        box(42, 8, [1, 1, 2, 2]),
        box(5, 7, [1, 1, 2, 2]),
        {"image_id": 42},
    ]
    write = lambda part, value: (folder / "annotations" / f"instances_{part}.json").write_text(
        json.dumps(value)
    )
    write("val2014", {"images": [image, {"id": 42, "width": 42, "height": 28}], "annotations": notes,
                      "categories": [{"id": 7, "name": "person"}, {"id": 9, "name": "traffic light"}]})
    return folder


def test_the_boxes_of_coco_are_parts_of_the_picture_and_broken_ones_are_counted(coco, capsys):
    boxes = coco_boxes(coco, "val2014")
    assert boxes.keys() == {123456, 42}
    assert boxes[123456] == [
        ("person", (0, 0.25, 0.5, 0.75)),
        ("traffic light", (0.5, 0, 1, 1)),
    ]  # cut at the edge; no crowd
    assert boxes[42] == [("traffic light", (0.25, 0.5, 0.75, 0.75))]
    assert (
        "5 boxes skipped" in capsys.readouterr().err
    )  # no area, outside, no such category or image, no bbox
    assert coco_boxes(coco, "train2014") == {}
    (coco / "annotations" / "instances_train2017.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(UserError, match="instances_train2017.json"):
        coco_boxes(coco, "train2017")


@pytest.mark.parametrize("spec", ["coco:{}:val2014", "karpathy:{}:val"])
def test_coco_becomes_instructions_about_its_own_pictures(stub, coco, tmp_path, spec):
    teacher, world = stub(), open_data(spec.format(coco))
    rows = made(tmp_path / "out", spec.format(coco), len(world), "a decoder")
    assert len(rows) == len(world) == len(teacher.asked)
    boxes, told = (
        {
            123456: ["person: [0.000, 0.250, 0.500, 0.750]", "traffic light: [0.500, 0.000, 1.000, 1.000]"],
            42: ["traffic light: [0.250, 0.500, 0.750, 0.750]"],
        },
        {},
    )
    for i, (row, asked) in enumerate(zip(rows, teacher.asked)):
        r = world.read(i)[0][0]
        assert asked.startswith(" ".join(r.captions[0].split()) + "\n") and row["id"].startswith(str(r.id))
        assert (tmp_path / "out" / "images" / row["image"]).read_bytes() == Path(r.images[0]).read_bytes()
        told[r.id] = [line for line in asked.split("\n") if re.search(r"\[[\d., ]+\]$", line)]
    assert told.keys() & boxes.keys() and told == {i: boxes.get(i, []) for i in told}
    read = open_data(f"llava:{tmp_path / 'out'}:all")
    assert len(read) == len(rows) and {read.item(i).id for i in range(len(rows))} == {r["id"] for r in rows}


# --- mistakes -----------------------------------------------------------------------------------------------


def test_mistakes_are_one_sentence_each(coco, stub, tmp_path):
    with pytest.raises(UserError, match="teacher by rules knows only the scenes of shapes"):
        made(tmp_path / "a", f"coco:{coco}:val2014", 5)
    for count in ("many", 0, -1, 1.5):
        with pytest.raises(UserError, match="the number of pictures is .*, not a whole number"):
            made(tmp_path / "a", "shapes", count)
    assert not (tmp_path / "a").exists()
    rows = made(tmp_path / "b", "shapes", 3)
    with pytest.raises(UserError, match="exists already"):
        made(tmp_path / "b", "shapes", 5)
    assert json.loads((tmp_path / "b" / "chat.json").read_text()) == rows
    stub()
    with pytest.raises(UserError, match="has no caption"):
        made(tmp_path / "c", f"llava:{tmp_path / 'b'}", 3, "a decoder")


@pytest.mark.slow
def test_the_command_line_generates_and_explains(tmp_path):
    program = [sys.executable, ROOT / "data.py"]
    run = lambda *args: subprocess.run([*program, *args], cwd=tmp_path, capture_output=True, text=True)
    done = run("generate", "shapes", "made", "12")
    assert done.returncode == 0 and "made/chat.json: 12 samples" in done.stdout
    assert len([*(tmp_path / "made/images").iterdir()]) == 12
    wrong = run("generate", "shapes", "made", "12")
    assert wrong.returncode == 2 and "exists already" in wrong.stderr and "Traceback" not in wrong.stderr
