"""Claim: each reader returns what lies on disk, field by field; a broken entry is counted and skipped, or
named and stopped at when strict; a broken file is one sentence that names it; and what comes out trains a
bridge.

tests/golden/datasets holds a tiny data set in the layout of each public release; broken/ malformed
variants."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from support import worlds
from model import IMAGE
from support.formats.benchmarks import mme_scores, scienceqa_text
from support.formats.chat import TEMPLATES, alpaca_prompt
from support.formats.datasets import (FORMATS, MME, OWN, read_flickr8k, read_interleaved, read_karpathy,
                                      read_mme, split_at_pictures)
from support.formats.pictures import read_image
from support.worlds import open_data
from support.worlds.commands import show_items
from support.worlds.pairs import contrastive_pair
from support.worlds.text import shapes_tokenizer
import train
from conftest import GOLDEN
from support.formats.files import UserError
from support.formats.records import BrokenRecord, Record
from support.worlds.files import Files

SETS, BROKEN = GOLDEN / "datasets", GOLDEN / "datasets" / "broken"
ROOT = Path(__file__).parents[2]


def records(kind: str, path: Path, *splits: str) -> list[Record]:
    found = [r for split in splits for r in FORMATS[kind][0](path, split)]
    assert not [r for r in found if isinstance(r, BrokenRecord)]
    return found


# --- every reader returns its EXPECTED.json -----------------------------------------------------------------

READ = {  # folder: kind, files in it ("": itself), splits in the order of EXPECTED.json
    "coco_captions": ("karpathy", [""], ["train", "val", "test"]),
    "conceptual_captions": ("cc", [""], ["train", "val"]),
    "textcaps": ("textcaps", [""], ["train", "val", "test"]),
    "vizwiz_captions": ("vizwiz", [""], ["train", "val", "test"]),
    "vqav2": ("vqav2", [""], ["train", "val", "test"]),
    "okvqa": ("okvqa", [""], ["train", "val"]),
    "textvqa": ("textvqa", [""], ["train", "val", "test"]),
    "vizwiz_vqa": ("vizwizvqa", [""], ["train", "val", "test"]),
    "scienceqa": ("scienceqa", [""], ["train", "val", "test"]),
    "mme": ("mme", [""], ["test"]),
    "flickr8k": ("flickr8k", [""], ["train", "val", "test"]),
    "flickr30k": ("flickr30k", [""], ["train", "val", "test"]),
    "llava_instruct": (
        "llava",
        ["llava_instruct_150k.json", "blip_laion_cc_sbu_558k.json", "llava_v1_5_mix665k.json"],
        ["train"],
    ),
    "alpaca": ("alpaca", [""], ["train"]),
    "mmc4": ("interleaved", [""], ["train"]),
}


def as_expected(r: Record, key: str, folder: Path):
    """The value of a field of EXPECTED.json according to this record."""
    size = lambda path: list(read_image(path).shape[1::-1])
    if key in ("images", "sizes"):
        return [str(Path(p).relative_to(folder)) if key == "images" else size(p) for p in r.images]
    if key in ("image", "size"):
        return (
            [str(Path(p).relative_to(folder)) if key == "image" else size(p) for p in r.images] or [None]
        )[0]
    if key in ("id", "split", "question", "answer"):
        return getattr(r, key)
    if key in ("captions", "answers", "choices", "texts"):
        return list(getattr(r, key))
    if key in ("answer_type", "task", "subject"):
        return r.kind
    if key == "captions_all":                       # the same as the captions where none was rejected
        return r.more.get(key, list(r.captions))
    return {"turns": lambda: [list(t) for t in r.turns], "letter": lambda: "ABCDE"[r.answer],
            "grade": lambda: int(r.more["grade"].removeprefix("grade"))}.get(key, lambda: r.more[key])()


@pytest.mark.parametrize("name", READ)
def test_a_reader_returns_every_field_of_every_record(name):
    kind, files, splits = READ[name]
    expected = json.loads((SETS / name / "EXPECTED.json").read_text(encoding="utf-8"))["records"]
    found = [(r, file) for file in files for r in records(kind, SETS / name / file, *splits)]
    if name == "coco_captions":
        found += [(r, "") for r in records("coco", SETS / name, "val2017")]
    assert len(found) == len(expected)
    for (r, file), want in zip(found, expected):
        for key, value in want.items():
            assert (file if key == "file" else as_expected(r, key, SETS / name)) == value, (want["id"], key)


def test_the_miniatures_are_all_covered():
    assert {p.name for p in SETS.iterdir() if p.is_dir()} == {*READ, "broken"}
    assert {kind for kind, *_ in READ.values()} | {"coco", "folder"} == set(FORMATS)


def test_coco_reads_the_same_captions_from_the_annotations_as_from_karpathys_file():
    folder = SETS / "coco_captions"
    karpathy = {r.id: r for r in records("karpathy", folder, "train", "val", "test")}
    plain = {r.id: r for r in records("coco", folder, "train", "val")}
    assert plain.keys() == karpathy.keys() and len(plain) == 4
    for i, r in plain.items():
        assert sorted(r.captions) == sorted(karpathy[i].captions) and r.images == karpathy[i].images
        assert r.split == karpathy[i].more["coco_split"]
    assert [r.split for r in records("karpathy", folder, "restval")] == ["restval"]


def test_flickr8k_reads_the_same_from_its_token_file_as_from_karpathys():
    folder = SETS / "flickr8k"
    for split in ("train", "val", "test"):
        karpathy = read_karpathy(folder, split, "dataset_flickr8k.json", "Flicker8k_Dataset")
        mine = records("flickr8k", folder, split)
        mine, theirs = ([(r.id, r.images, r.captions) for r in rs] for rs in (mine, karpathy))
        assert mine == theirs and len(mine) == 1


def test_scienceqa_splits_are_the_lists_of_its_file():
    listed = json.loads((SETS / "scienceqa" / "EXPECTED.json").read_text())["pid_splits"]
    for split, pids in listed.items():
        assert [r.id for r in records("scienceqa", SETS / "scienceqa", split)] == pids


def test_mme_has_its_fourteen_tasks_and_both_questions_about_a_picture_in_one_item():
    world = open_data(f"mme:{SETS / 'mme'}")
    items = [world.item(i) for i in range(len(world))]
    assert len(items) == 16 and all(len(item.qas) == 2 for item in items)
    assert {q.kind for item in items for q in item.qas} == {*MME["perception"], *MME["cognition"]}
    assert all({q.answer for q in item.qas} == {"Yes", "No"} for item in items)
    rows = [(q.kind, q.source.images[0], q.question, q.answer, q.answer) for item in items for q in item.qas]
    assert mme_scores(rows)["perception"] == 2000  # and they go straight into the score


def test_the_newest_mixture_takes_pictures_from_the_folder_and_the_oldest_from_images():
    chat = records("llava", SETS / "conceptual_captions" / "llava_cc3m", "train")
    assert [Path(r.images[0]).name for r in chat] == ["GCC_train_000000000.jpg", "GCC_train_000000002.jpg"]
    assert all(Path(r.images[0]).exists() for r in chat)


# --- texts for training -------------------------------------------------------------------------------------


def test_scienceqa_prompts_and_both_orders_of_the_answer_are_the_published_ones():
    """LLaVA's converter leaves "Question: " out at the start, and "Answer: ", and appends the picture's
    place."""
    golden = json.loads((GOLDEN / "metrics" / "scienceqa.json").read_text(encoding="utf-8"))
    problems = {i: data.QA(p["subject"], p["question"], "", choices=p["choices"], correct=p["answer"],
                           hint=p["hint"], lecture=p["lecture"], solution=p["solution"])
                for i, p in golden["problems"].items()}
    compared = 0
    for form in ("QCM-LEA", "QCM-ALE", "QCM-A", "CQM-A"):
        for sample in golden["llava_prompts"][form]:
            prompt, answer = scienceqa_text(problems[sample["id"]], form)
            human = prompt.removesuffix("\nAnswer:").removeprefix("Question: ") + "\n<image>" * (
                "image" in sample
            )
            assert [turn["value"] for turn in sample["conversations"]] == [human, answer], (
                form,
                sample["id"],
            )
            compared += 1
    assert compared == 32
    for shots in golden["fewshot_prompts"]:             # ScienceQA's own code spells line breaks \n
        asked = (*shots["shot_qids"], shots["test_qid"])
        parts = [scienceqa_text(problems[i], shots["prompt_format"]) for i in asked]
        text = "\n\n".join([f"{prompt} {answer}" for prompt, answer in parts[:-1]] + [parts[-1][0]])
        assert text == shots["prompt"].replace("\\n", "\n")


def test_reasoning_first_ends_with_the_answer_and_answer_first_begins_with_it():
    world = open_data(f"scienceqa:{SETS / 'scienceqa'}:train")
    first = records("scienceqa", SETS / "scienceqa", "train")[0]
    q = world.question(first)
    prompt, reasoning_first = scienceqa_text(q, "QCM-LEA")
    assert prompt == "Question: Which shape is round?\nContext: N/A\nOptions: (A) circle (B) square\nAnswer:"
    assert reasoning_first == "A lecture on shapes.\nSecond line. A circle is round. The answer is A."
    answer_first = scienceqa_text(q, "QCM-ALE")[1]
    assert answer_first == "The answer is A. BECAUSE: A lecture on shapes.\nSecond line. A circle is round."


def test_an_interleaved_document_is_cut_before_its_pictures():
    expected = json.loads((SETS / "mmc4" / "EXPECTED.json").read_text(encoding="utf-8"))[
        "openflamingo_text_doc0"
    ]
    first = records("interleaved", SETS / "mmc4", "train")[0]
    assert (
        "".join(text if n is None else f"<image>{text}<|endofchunk|>" for n, text in split_at_pictures(first))
        == expected
    )
    world = open_data(f"interleaved:{SETS / 'mmc4'}:all")
    item = next(item for item in map(world.item, range(2)) if item.id == first.id)
    assert item.chunks == split_at_pictures(first) and [i.shape for i in item.images] == [(28, 40, 3)] * 2


def test_two_pictures_before_one_sentence_make_an_empty_chunk():
    r = Record("x", ["a", "b"], texts=["one", "two"], more={"places": [1, 1]})
    assert split_at_pictures(r) == [(None, "one"), (0, ""), (1, "two")]


def test_a_conversation_begins_with_its_picture_and_goes_into_a_document():
    world = open_data(f"llava:{SETS / 'llava_instruct'}:all")
    item = next(i for i in map(world.item, range(2)) if i.id == "000000052846")
    assert item.turns == [{"role": "user", "content": "<image>\nWhere is the plate?"},
                          {"role": "assistant", "content": "The plate is behind the box.\n\nIt is red."}]
    document = data.Document(shapes_tokenizer()).chat(item.turns, answer=False,
                                                      template=TEMPLATES["llava_v0"])
    assert document.tokens.count(IMAGE) == 1 and item.image.shape == (28, 40, 3)


def test_alpaca_has_two_prompts():
    items = sorted(map(open_data(f"alpaca:{SETS / 'alpaca'}:all").item, range(3)), key=lambda item: item.id)
    assert all(item.image is None and not item.images for item in items)
    assert items[1].turns[0]["content"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Shorten the sentence.\n\n### Input:\n"
        "The made-up cat sat on the made-up mat.\n\n### Response:"
    )
    assert [turn["content"] for turn in items[2].turns] == [alpaca_prompt("Say nothing."), ""]
    assert "Input" not in items[2].turns[0]["content"]


# --- broken files -------------------------------------------------------------------------------------------


def lay(root: Path, **files: Path) -> Path:
    """A data set of these files under these names; __ stands for /, and the ending is the golden file's."""
    for where, source in files.items():
        target = root / (where.replace("__", "/") + source.suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return root


def coco(root: Path, file: Path, *pictures: Path) -> Path:
    lay(root, annotations__captions_val2014=file)
    for p in pictures:
        (root / "val2014").mkdir(exist_ok=True)
        shutil.copy(p, root / "val2014" / p.name)
    return root


def refused(file: str, spec: str, **options) -> str:
    """The one sentence that opening this data set ends in; it names the file."""
    with pytest.raises(UserError) as e:
        open_data(spec, **options)
    assert file in str(e.value) and "\n" not in str(e.value), e.value
    return str(e.value)


def counted(world: Files, capsys, expected: int) -> str:
    """The warnings: as many broken entries as expected, told at 1, 2, 4, 8, …"""
    err = capsys.readouterr().err
    assert len(world.broken) == expected and err.count("warning: ") == expected.bit_length()
    assert f"warning: {1 << expected.bit_length() - 1} broken records of {world.name} skipped" in err
    return err


def unreadable(*files: Path) -> None:
    for file in files:
        with pytest.raises(UserError) as e:
            read_image(file)
        assert str(file) in str(e.value) and "\n" not in str(e.value)


def missing_image(tmp, capsys):
    root = coco(tmp, BROKEN / "missing_image/captions.json", BROKEN / "missing_image/val2014/good.jpg")
    world = open_data(f"coco:{root}:val")
    assert [world.item(i).id for i in range(4)] == ["1"] * 4                    # the other gives it its turn
    assert "not_there.jpg: no such picture file (record 2)" in counted(world, capsys, 1)
    strict = open_data(f"coco:{root}:val", strict=True)
    with pytest.raises(UserError, match=r"not_there.jpg: no such picture file \(record 2\); repair it"):
        [strict.item(i) for i in range(2)]


def truncated_json(tmp, capsys):
    root = coco(tmp, BROKEN / "truncated_json/captions.json")
    assert "JSONDecodeError" in refused("captions_val2014.json", f"coco:{root}:val")


def empty_file(tmp, capsys):
    empty = BROKEN / "empty_file"
    refused("captions_val2014.json", f"coco:{coco(tmp / '1', empty / 'captions.json')}:val")
    (tmp / "2").mkdir()
    shutil.copy(empty / "empty.tsv", tmp / "2" / "Train_GCC-training.tsv")
    assert "holds no usable record" in refused("Train_GCC-training.tsv", f"cc:{tmp / '2'}")
    assert "it is empty" in refused(
        "captions.jsonl", f"folder:{lay(tmp / '3', captions=empty / 'empty.jsonl')}"
    )
    assert "it is empty" in refused("docs.jsonl", f"interleaved:{lay(tmp / '4', docs=empty / 'empty.jsonl')}")
    unreadable(empty / "empty.jpg")


def wrong_types(tmp, capsys):
    assert len(open_data(f"coco:{coco(tmp / '0', BROKEN / 'wrong_types/captions_0.json')}:val")) == 1
    for n in range(1, 9):
        root = coco(tmp / str(n), BROKEN / f"wrong_types/captions_{n}.json")
        refused("captions_val2014.json", f"coco:{root}:val")
        refused("captions_val2014.json", f"coco:{root}:val", strict=True)
    assert '"caption" is missing' in refused("", f"coco:{tmp / '5'}:val", strict=True)
    lay(tmp / "vqa", v2_OpenEnded_mscoco_val2014_questions=BROKEN / "wrong_types/vqa_questions.json",
        v2_mscoco_val2014_annotations=BROKEN / "wrong_types/vqa_annotations.json")
    refused("v2_OpenEnded_mscoco_val2014_questions.json", f"vqav2:{tmp / 'vqa'}:val")
    refused("v2_mscoco_val2014_annotations.json", f"vqav2:{tmp / 'vqa'}:val", strict=True)
    wrong = BROKEN / "wrong_types"
    lay(tmp / "science", problems=wrong / "problems.json", pid_splits=wrong / "pid_splits.json")
    assert "problem 1" in refused("problems.json", f"scienceqa:{tmp / 'science'}:test")
    good = {"question": "q", "choices": ["a"], "answer": 0, "hint": "", "image": None, "split": "test",
            "grade": "grade2", "subject": "x", "lecture": "", "solution": ""}
    for broken, why in (({"choices": "abc"}, "where choices belong"), ({"answer": "A"}, "the answer is 'A'"),
                        ({"hint": None}, "None stands"), ({"image": True}, "True stands"),
                        ({"question": ["q"]}, "where a text belongs")):
        (tmp / "science/problems.json").write_text(json.dumps({"1": {**good, **broken}}))
        assert why in refused("problems.json, problem 1", f"scienceqa:{tmp / 'science'}:test", strict=True)
    (tmp / "science/problems.json").write_text(json.dumps({"1": good}))
    assert len(open_data(f"scienceqa:{tmp / 'science'}:test", strict=True)) == 1


def not_an_image(tmp, capsys):
    unreadable(*(BROKEN / "not_an_image" / name for name in ("page.png", "random.jpg", "text.jpg")))
    assert read_image(BROKEN / "not_an_image/really_a_png.jpg").ndim == 3


def truncated_image(tmp, capsys):
    unreadable(BROKEN / "truncated_image/half.jpg", BROKEN / "truncated_image/half.png")


def zero_size_image(tmp, capsys):
    unreadable(*(BROKEN / "zero_size_image").iterdir())


def huge_image(tmp, capsys):
    unreadable(BROKEN / "huge_image/bomb.png")
    with pytest.raises(UserError, match="60000 x 60000 pixels"):
        read_image(BROKEN / "huge_image/bomb.png")


def odd_but_valid_images(tmp, capsys):
    files = sorted((BROKEN / "odd_but_valid_images").iterdir())
    assert len(files) == 11
    for file in files:
        with Image.open(file) as image:
            w, h = image.size[::-1] if file.name == "rotated.jpg" else image.size  # we follow the EXIF tag
        assert (read := read_image(file)).shape == (h, w, 3) and read.dtype == np.uint8, file.name


def unicode_names(tmp, capsys):
    root = coco(tmp, BROKEN / "unicode_names/captions.json", *(BROKEN / "unicode_names/images").iterdir())
    world = open_data(f"coco:{root}:val")
    assert sorted(world.item(i).captions[0] for i in range(8)) == [
        f"Caption number {i}: naïve — 猫." for i in range(8)
    ]
    assert not world.broken


def encodings(tmp, capsys):
    for name in ("utf8_bom", "utf16"):
        (r,) = records("coco", coco(tmp / name, BROKEN / f"encodings/{name}.json"), "val")
        assert (r.id, r.captions) == (1, ("café",))
    root = coco(tmp / "latin1", BROKEN / "encodings/latin1.json")
    assert "save it as UTF-8" in refused("captions_val2014.json", f"coco:{root}:val")
    shutil.copy(BROKEN / "encodings/crlf.tsv", tmp / "Train_GCC-training.tsv")
    assert [(r.captions, r.more["url"]) for r in records("cc", tmp, "train")] == [
        (("a caption",), "http://example.com/1.jpg"), (("another",), "http://example.com/2.jpg")]
    root = coco(tmp / "half", BROKEN / "encodings/lone_surrogate.json")
    refused("captions_val2014.json", f"coco:{root}:val")  # it names an image that is not listed
    file = root / "annotations/captions_val2014.json"
    file.write_text(
        file.read_text().replace('"images": []', '"images": [{"id": 1, "file_name": "\\ud83d.jpg"}]')
    )
    (r,) = records("coco", root, "val")
    assert r.captions == ("bad ? char",) and (r.captions[0] + r.images[0]).encode("utf-8")


def bad_references(tmp, capsys):
    bad = BROKEN / "bad_references"
    world = open_data(
        f"coco:{coco(tmp / '1', bad / 'captions.json', bad / 'good.jpg', bad / 'lonely.jpg')}:val"
    )
    err = counted(world, capsys, 2)
    assert "image 3 has no caption" in err and "captions of image 99: there is no such image" in err
    assert world.item(0).id == "1"
    lay(tmp / "2", v2_OpenEnded_mscoco_val2014_questions=bad / "vqa_questions.json",
        v2_mscoco_val2014_annotations=bad / "vqa_annotations.json")
    world = open_data(f"vqav2:{tmp / '2'}:val")
    assert "question 2 has no annotation" in counted(world, capsys, 2)
    assert [r.question for records in world.items for r in records] == ["q?"]
    lay(tmp / "3", problems=bad / "problems.json", pid_splits=bad / "pid_splits.json")
    why = refused("problems.json", f"scienceqa:{tmp / '3'}:test")
    assert "problem 2: pid_splits.json lists it, but there is no such problem" in why
    assert "the answer is 5" in refused(
        "problems.json, problem 1", f"scienceqa:{tmp / '3'}:test", strict=True
    )
    root = lay(tmp / "4", dataset_coco=bad / "dataset_coco.json")
    assert 'split "holdout" with 0 sentences' in refused("dataset_coco.json, image 1", f"karpathy:{root}")


def bad_rows(tmp, capsys):
    bad = BROKEN / "bad_rows"
    (tmp / "training").mkdir()
    shutil.copy(bad / "cc.tsv", tmp / "Train_GCC-training.tsv")
    shutil.copy(BROKEN / "missing_image/val2014/good.jpg", tmp / "training/00000000.jpg")
    world = open_data(f"cc:{tmp}")
    assert "training.tsv, line" in counted(world, capsys, 4) and world.item(0).captions == ["good caption"]
    why = refused("training.tsv", f"cc:{tmp}", strict=True)
    assert 'line 2: "no tab in this row" is not a caption, a tab and a URL' in why

    shutil.copy(bad / "docs.jsonl", tmp / "docs.jsonl")
    good, *broken = read_interleaved(tmp, "train")
    assert isinstance(good, Record) and [b.where.rpartition(" ")[2] for b in broken] == ["3", "4"]
    assert broken[1].why == "x.jpg stands before sentence 7 of 0 to 0"

    (tmp / "Flickr8k_text").mkdir()
    shutil.copy(bad / "Flickr8k.token.txt", tmp / "Flickr8k_text")
    (tmp / "Flickr8k_text/Flickr_8k.trainImages.txt").write_text("a.jpg\n")
    *broken, good = read_flickr8k(tmp, "train")
    assert good.captions == ("good",) and [b.where.rpartition(" ")[2] for b in broken] == ["2", "3", "4"]

    found = [*read_mme(bad / "mme", "test")]
    assert (
        len(found) == 8 and all(isinstance(b, BrokenRecord) for b in found) and "0004.txt" in found[7].where
    )
    assert {b.why for b in found[:6]} == {"the file must have two lines: a question, a tab, Yes or No"}
    refused("existence/0001.txt, question 1", f"mme:{bad / 'mme'}", strict=True)


def bad_conversations(tmp, capsys):
    shutil.copytree(BROKEN / "bad_conversations", tmp, dirs_exist_ok=True)
    world = open_data(f"llava:{tmp / 'llava.json'}:all")
    counted(world, capsys, 8)
    assert sorted(world.item(i).id for i in range(2)) == ["ok", "unknown_role"]         # a system text
    refused("llava.json, sample 2", f"llava:{tmp / 'llava.json'}", strict=True)


def path_escape(tmp, capsys):
    shutil.copytree(BROKEN / "path_escape", tmp, dirs_exist_ok=True)
    shutil.copy(tmp / "llava.json", tmp / "root")
    world = open_data(f"llava:{tmp / 'root/llava.json'}:all")
    assert 'the picture "../outside.txt" lies outside' in world.broken[f"{tmp / 'root/llava.json'}, sample 2"]
    counted(world, capsys, 2)
    assert world.item(0).id == "inside"
    refused("llava.json, sample 2", f"llava:{tmp / 'root/llava.json'}", strict=True)


CASES = [
    missing_image,
    truncated_json,
    empty_file,
    wrong_types,
    not_an_image,
    truncated_image,
    zero_size_image,
    huge_image,
    odd_but_valid_images,
    unicode_names,
    encodings,
    bad_references,
    bad_rows,
    bad_conversations,
    path_escape,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_broken_files_do_as_promised(case, tmp_path, capsys):
    case(tmp_path, capsys)


def test_every_broken_case_is_covered():
    listed = json.loads((BROKEN / "EXPECTED.json").read_text(encoding="utf-8"))["cases"]
    assert [case["case"] for case in listed] == [case.__name__ for case in CASES]


# --- data sets as worlds ------------------------------------------------------------------------------------


def pictures(folder: Path, count: int) -> Path:
    """`folder:` with grey pictures and captions of their own."""
    folder.mkdir(exist_ok=True, parents=True)
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as f:
        for i in range(count):
            Image.new("L", (30, 20), i % 256).save(folder / f"{i}.png")
            f.write(json.dumps({"image": f"{i}.png", "text": f"grey {i}"}) + "\n")
    return folder


def test_a_share_is_the_same_for_the_same_seed_and_smaller_ones_lie_in_larger_ones(tmp_path):
    pictures(tmp_path, 200)
    ids = lambda **kw: [r.id for g in open_data(f"folder:{tmp_path}:all", **kw).items for r in g]
    one, ten = ids(share=0.01), ids(share=0.1)
    assert (len(one), len(ten), len(ids())) == (2, 20, 200) and set(one) < set(ten)
    assert ids(share=0.1) == ten and ids(share=0.1, seed=1) != ten
    assert ids(share=0.001) and len(ids(share=0.001)) == 1                      # never none


@pytest.mark.parametrize(
    "spec, share", [("folder", 0.0), ("folder", 1.5), ("folder", float("nan")), ("shapes", 0.5)]
)
def test_a_share_that_cannot_be_is_one_sentence(spec, share, tmp_path):
    with pytest.raises(UserError, match="--share"):
        open_data(spec if spec == "shapes" else f"folder:{pictures(tmp_path, 1)}", share=share)


def test_each_pass_is_a_permutation_and_an_item_a_function_of_its_index(tmp_path):
    world, again = (open_data(f"folder:{pictures(tmp_path, 30)}:all", seed=3) for _ in range(2))
    passes = [[world.item(30 * p + i).captions[0] for i in range(30)] for p in range(3)]
    assert all(len(set(p)) == 30 for p in passes) and passes[0] != passes[1] != passes[2]
    assert [again.item(i).captions[0] for i in (89, 0, 45)] == [passes[2][29], passes[0][0], passes[1][15]]


def test_kinds_without_a_split_keep_every_tenth_record_for_val(tmp_path):
    rows = [{"instruction": f"{i}", "input": "", "output": "x"} for i in range(25)]
    (tmp_path / "alpaca_data.json").write_text(json.dumps(rows))
    ids = lambda split: {r.id for g in open_data(f"alpaca:{tmp_path}:{split}").items for r in g}
    assert ids("val") == {9, 19} and ids("train") == ids("all") - ids("val") and len(ids("all")) == 25


def test_questions_about_one_picture_are_one_item_and_training_draws_some_of_them():
    world = open_data(f"vqav2:{SETS / 'vqav2'}:val")
    assert len(world) == 1
    assert [(q.source.id, q.question, q.answer, len(q.answers)) for q in world.item(0).qas] == [
        (42000, "How many ovals are there?", "3", 10),
        (42001, "Is this a field?", "no", 10),  # its choice of a tie
        (42002, "Why?", "don't know", 10),
    ]
    drawn = {tuple(q.question for q in world.item(i, turns=2).qas) for i in range(50)}
    assert len(drawn) == 6  # all ordered pairs of the three


def test_training_meets_every_caption_of_a_picture_and_none_with_blanks_around_it():
    world = open_data(f"coco:{SETS / 'coco_captions'}:train")
    assert "a box and a plate " in world.items[0][0].captions  # raw in the record
    assert {world.item(i, turns=1).captions[0] for i in range(60)} == {
        c.strip() for c in world.items[0][0].captions
    }


def test_a_picture_whose_captions_were_all_rejected_is_left_out_and_a_test_split_is_not(tmp_path, capsys):
    shutil.copytree(SETS / "vizwiz_captions", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "annotations/train.json"
    notes = json.loads(file.read_text())
    for a in notes["annotations"]:
        a["is_rejected"] |= a["image_id"] == 1
    file.write_text(json.dumps(notes))
    assert [g[0].id for g in open_data(f"vizwiz:{tmp_path}").items] == [2]
    assert "note: 1 records" in capsys.readouterr().err
    assert open_data(f"vizwiz:{tmp_path}:test").item(0).captions == []


def test_a_caption_of_conceptual_captions_without_its_picture_is_a_note_even_when_strict(capsys):
    world = open_data(f"cc:{SETS / 'conceptual_captions'}", strict=True)
    assert len(world) == 4 and not world.broken and "note: 1 records" in capsys.readouterr().err


def test_cc_clean_keeps_the_rows_of_your_list(tmp_path):
    shutil.copytree(SETS / "conceptual_captions", tmp_path, dirs_exist_ok=True)
    refused("cc_clean.txt", f"cc:{tmp_path}:clean")
    (tmp_path / "cc_clean.txt").write_text("3\n1\n")
    assert [(r.id, r.split) for r in records("cc", tmp_path, "clean")] == [(1, "train"), (3, "train")]
    (tmp_path / "cc_clean.txt").write_text("1\nthree\n")
    refused("cc_clean.txt, line 2", f"cc:{tmp_path}:clean", strict=True)


def test_a_line_separator_inside_a_caption_does_not_end_the_line(tmp_path):
    pictures(tmp_path, 1)
    (tmp_path / "captions.jsonl").write_text(
        '{"image": "0.png", "text": "one\u2028two\x85three"}\n', encoding="utf-8"
    )
    assert open_data(f"folder:{tmp_path}", strict=True).item(0).captions == ["one\u2028two\x85three"]


def test_a_path_may_hold_colons_and_only_a_known_split_is_taken_off_it(tmp_path):
    odd = pictures(tmp_path / "a:b", 12)
    assert len(open_data(f"folder:{odd}")) == 11 and len(open_data(f"folder:{odd}:val")) == 1
    with pytest.raises(UserError, match='folder has no split "vall"; did you mean "val"'):
        open_data(f"folder:{odd}:vall")
    for spec in ("coco", "coco:", f"coco:{tmp_path}/nowhere", f"coco:{tmp_path}/nowhere:val"):
        with pytest.raises(
            UserError, match=r"no such folder; write coco:PATH or coco:PATH:SPLIT \(of train, val, "
        ):
            open_data(spec)
    with pytest.raises(UserError, match='unknown data "coca"; did you mean "coco"'):
        open_data("coca:x")


@pytest.mark.parametrize("spec", [f"{kind}:{SETS / name}" for kind, name in (
    ("coco", "coco_captions"), ("mme", "mme"), ("interleaved", "mmc4"), ("alpaca", "alpaca"),
    ("llava", "llava_instruct"), ("scienceqa", "scienceqa"))])
def test_items_of_every_sort_can_be_shown(spec, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    show_items(f"{spec}:all" if FORMATS[spec.partition(":")[0]][1] == OWN else spec, 3)
    out = capsys.readouterr().out
    assert all((tmp_path / word).exists() for word in out.split() if word.startswith("out/samples/"))
    assert out.count("\n    ") >= 2
    if spec.startswith("interleaved"):
        assert len([*(tmp_path / "out/samples").iterdir()]) == 3 and "[1] The second box is red." in out


def test_stage_clip_gets_other_pictures_captions_as_false_ones(tmp_path):
    world = open_data(f"flickr8k:{SETS / 'flickr8k'}")
    image, text, wrong = contrastive_pair(world, 0)
    assert (
        image.shape == (28, 40, 3) and text in world.items[0][0].captions and not wrong
    )  # there is no other
    with pytest.raises(UserError, match="needs a data set that has them"):
        contrastive_pair(open_data(f"vqav2:{SETS / 'vqav2'}"), 0)


# --- and they train -----------------------------------------------------------------------------------------

QUICK = ["--steps", "3", "--batch", "4", "--dtype", "float32", "--log-every", "1", "--eval-items", "4",
         "--samples", "1", "--bridge", "linear"]


@pytest.mark.parametrize(
    "kind, name, column", [("coco", "coco_captions", "cider"), ("vqav2", "vqav2", "number")]
)
def test_captions_and_questions_from_disk_train_a_bridge_and_are_scored(kind, name, column, tmp_path, capsys):
    train.main(["--data", f"{kind}:{SETS / name}", "--out", str(tmp_path), *QUICK])
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 3 and losses[2] < losses[0]  # the same few pictures three times
    results = json.loads((tmp_path / "results.json").read_text())
    assert column in results["rows"][0] and results["items"] == {"coco": 3, "vqav2": 1}[kind]


def test_the_share_is_a_flag_in_percent_of_the_training_data_alone(tmp_path, monkeypatch):
    opened = []
    for name in ("open_data", "open_split"):
        monkeypatch.setattr(f"train.{name}", lambda *args, call=getattr(worlds, name), **kw: opened.append(
            call(*args, **kw)) or opened[-1])
    own = pictures(tmp_path / "own", 100)
    train.main(["--data", f"folder:{own}", "--share", "10", "--out", str(tmp_path / "run"), *QUICK])
    assert [(world.split, len(world)) for world in opened[:2]] == [("train", 9), ("val", 10)]


def test_a_split_without_captions_or_answers_cannot_be_trained_on_and_says_so(tmp_path):
    with pytest.raises(UserError, match="textvqa: split test has no captions or answers to train on"):
        train.main(["--data", f"textvqa:{SETS / 'textvqa'}:test", "--out", str(tmp_path), *QUICK])


def test_a_set_without_its_held_out_split_is_trained_and_says_why_there_is_no_table(tmp_path, capsys):
    root = tmp_path / "coco"
    shutil.copytree(SETS / "coco_captions", root)
    for file in (root / "annotations").glob("*val*"):
        file.unlink()
    train.main(
        [
            "--bridge",
            "linear",
            "--data",
            f"coco:{root}:train",
            "--steps",
            "2",
            "--check-every",
            "1",
            "--batch",
            "2",
            "--dtype",
            "float32",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    said = capsys.readouterr().err
    assert "warning: no check, " in said and "no final table" in said
    assert (tmp_path / "run" / "bridge.safetensors").exists()


@pytest.mark.parametrize("kind, source, file, where", [
    ("vqav2", "vqav2", "v2_mscoco_val2014_annotations.json", lambda c: c["annotations"]),
    ("textvqa", "textvqa", "TextVQA_0.5.1_val.json", lambda c: c["data"]),
    ("vizwizvqa", "vizwiz_vqa", "val.json", lambda c: c)])
def test_a_question_without_an_answer_is_no_record(kind, source, file, where, tmp_path):
    shutil.copytree(SETS / source, tmp_path / "set")
    path = next((tmp_path / "set").rglob(file))
    content = json.loads(path.read_text())
    for row in where(content):
        row["answers"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="holds no usable record"):
        len(open_data(f"{kind}:{tmp_path / 'set'}:val"))
