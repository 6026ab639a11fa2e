"""Data sets lie on people's disks in more than one order, and their files spell one thing in several ways."""
from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from support.formats.files import UserError
from support.worlds import open_data

HUMAN, GPT = {"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}
NUMBER = "000000000007.jpg"


def write(folder: Path, files: dict) -> None:
    """Files: path → content; a str stays as it is, None is a picture."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (20, 16), (9, 200, 9)).save(file)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))


COCO = {"images": [dict(id=7, file_name=f"train2014/COCO_train2014_{NUMBER}")],
        "annotations": [dict(image_id=7, caption="a dog")]}
FLICKR = {"images": [dict(filename="1.jpg", split="train", sentences=[dict(raw="a dog")])]}
TEN = [dict(answer="a")] * 10
QUESTIONS = {"questions": [dict(question_id=11, image_id="7", question="q")]}
ANSWERS = {"annotations": [dict(question_id="11", answers=TEN)]}
PROBLEM = dict(question="q", choices=["a", "b"], answer="1", image="image.png",
               split="train", subject="s", grade="g")
TEXTVQA = {"data": [dict(question_id=1, image_id="aa", question="q", answers=["a"] * 10)]}
VIZWIZ = [dict(image="v.jpg", question="q", answers=TEN)]


@pytest.mark.parametrize("kind, files", [
    ("coco", {"captions_train2014.json": COCO, f"images/train2014/COCO_train2014_{NUMBER}": None}),
    ("coco", {"Annotations/captions_train2014.json": COCO, f"train2014/COCO_train2014_{NUMBER}": None}),
    ("karpathy", {"karpathy/dataset_coco.json": {"images": [
        dict(FLICKR["images"][0], filepath="train2014")]}, "train2014/1.jpg": None}),
    *[("flickr30k", {"dataset_flickr30k.json": FLICKR, f"{place}/1.jpg": None})
      for place in ("flickr30k-images", "flickr30k_images", "Images")],
    ("vqav2", {"Questions/v2_OpenEnded_mscoco_train2014_questions.json": QUESTIONS,
               "Annotations/v2_mscoco_train2014_annotations.json": ANSWERS,
               f"train2014/COCO_train2014_{NUMBER}": None}),
    ("textvqa", {"TextVQA_0.5.1_train.json": TEXTVQA, "train_val_images/train_images/aa.jpg": None}),
    ("textcaps", {"TextCaps_0.1_train.json": {"data": [dict(image_id="aa", reference_strs=["a dog"])]},
                  "train_val_images/train_images/aa.jpg": None}),
    ("vizwizvqa", {"annotations/train.json": VIZWIZ, "images/train/v.jpg": None}),
    ("scienceqa", {"problems.json": {"4": PROBLEM}, "pid_splits.json": {"train": [4]},
                   "train/4/image.png": None}),
    ("mme", {"MME_Benchmark/count/1.txt": "q?\tYes\nr?\tNo", "MME_Benchmark/count/1.jpg": None}),
    ("llava", {"mine.jsonl": json.dumps(dict(image="0.png", conversations=[HUMAN, GPT])), "0.png": None}),
    ("alpaca", {"instructions.json": [dict(instruction="q", output="a")]}),
])
def test_files_are_found_where_people_put_them(kind, files, tmp_path):
    write(tmp_path, files)
    world = open_data(f"{kind}:{tmp_path}", strict=True)
    item = world.item(0)
    assert len(world) == 1 and bool(item.pictures) == (kind != "alpaca")
    if kind == "scienceqa":
        assert item.qas[0].answer == "b"


def test_a_folder_with_several_lists_is_not_guessed_at(tmp_path):
    rows = [dict(image="0.png", conversations=[HUMAN, GPT])]
    write(tmp_path, {"one.json": rows, "two.json": rows, "0.png": None})
    with pytest.raises(UserError, match="llava_instruct_150k.json: cannot be read"):
        open_data(f"llava:{tmp_path}")


@pytest.mark.parametrize("row", [
    dict(image="0.png", conversation=[HUMAN, GPT]),
    dict(images=[{"path": "0.png", "bytes": None}], conversations=[HUMAN, GPT]),
    dict(image="0.png", conversations=[{**HUMAN, "from": "Human"}, {**GPT, "from": "Assistant"}]),
    dict(image="0.png", conversations=[{**HUMAN, "from": "USER"}, {**GPT, "from": "chatgpt"}]),
    dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "0.png"},
                                                {"type": "text", "text": "q"}]},
                   {"role": "assistant", "content": "a"}]),
], ids=["conversation", "path", "capitals", "sharegpt", "image_url"])
def test_a_conversation_is_read_in_each_of_its_spellings(row, tmp_path):
    write(tmp_path, {"chat.json": [row], "0.png": None})
    item = open_data(f"llava:{tmp_path}:all", strict=True).item(0)
    assert [t["content"] for t in item.turns] == ["<image>\nq", "a"] and len(item.pictures) == 1


def test_an_instruction_without_words_is_counted(tmp_path, capsys):
    rows = [dict(instruction=text, output="a") for text in ("q", " ")]
    write(tmp_path, {"alpaca_data.json": rows})
    assert len(open_data(f"alpaca:{tmp_path}:all")) == 1 and "sample 2: " in capsys.readouterr().err
    with pytest.raises(UserError, match="sample 2: .* empty; repair it"):
        open_data(f"alpaca:{tmp_path}:all", strict=True)


@pytest.mark.parametrize("name, text", [
    ("captions.csv", "Image,Caption\ncat.jpg,a cat\n"), ("captions.csv", "image, caption\ncat.jpg, a cat\n"),
    ("captions.jsonl", '{"image_path": "cat.jpg", "caption": "a cat"}'),
    ("captions.tsv", "FILE_NAME\tText\ncat.jpg\ta cat\n"),
])
def test_own_captions_may_name_their_columns_in_other_ways(name, text, tmp_path):
    write(tmp_path, {name: text, "cat.jpg": None})
    assert open_data(f"folder:{tmp_path}:all", strict=True).item(0).captions == ["a cat"]


def test_a_table_with_the_line_ends_of_another_age_is_one_sentence(tmp_path):
    (tmp_path / "captions.csv").write_bytes(b"image,caption\rcat.jpg,a cat\r")
    with pytest.raises(UserError, match="captions.csv, line .*repair the table"):
        open_data(f"folder:{tmp_path}:all")


@pytest.mark.parametrize("listed, there", [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_is_one_character_or_two(listed, there, tmp_path):
    listed, there = (unicodedata.normalize(form, "café.jpg") for form in (listed, there))
    write(tmp_path, {"captions.jsonl": json.dumps(dict(image=listed, text="a cup")), there: None})
    assert open_data(f"folder:{tmp_path}:all", strict=True).item(0).image is not None
