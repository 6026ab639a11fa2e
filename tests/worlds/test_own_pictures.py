"""Claim: a folder of own pictures is a world; its broken records are counted, or stop a strict run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import Shapes
from support.formats.files import UserError, note
from support.formats.own_pictures import PICTURE_FIELDS, TEXT_FIELDS
from support.worlds import open_data
from support.worlds.pairs import contrastive_pair
from support.worlds.trained import report_broken


def own_pictures(folder: Path, count: int = 12) -> Path:
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(count):
        Image.fromarray(np.full((20, 30, 3), i * 20, np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "text": f"grey {i}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def test_a_folder_of_own_pictures_shows_each_once_a_pass_and_keeps_every_tenth_for_val(tmp_path):
    train, val = (open_data(f"folder:{own_pictures(tmp_path)}{split}") for split in ("", ":val"))
    first = [train.item(i).captions[0] for i in range(11)]
    assert sorted(first) == sorted(f"grey {i}" for i in range(12) if i != 9) and val.item(0).captions == [
        "grey 9"
    ]
    assert [train.item(i).captions[0] for i in range(11, 22)] != first  # another order in the second pass
    image, text, false = contrastive_pair(train, 3)
    assert image.shape == (20, 30, 3) and text not in false


def test_broken_records_of_a_folder_are_counted_or_stop_a_strict_run(tmp_path, capsys):
    folder = own_pictures(tmp_path)
    (folder / "3.png").write_text("no picture")
    with open(folder / "captions.jsonl", "a") as f:
        f.write('\nnot json\n{"image": "1.png"}\n{"image": "1.png", "text": " "}')
    world = open_data(f"folder:{folder}")
    texts = [world.item(i).captions[0] for i in range(11)]
    assert "grey 3" not in texts and len(world.broken) == 4
    assert "4 broken records" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"captions.jsonl, line 13"):
        open_data(f"folder:{folder}", strict=True)


def test_the_last_count_of_broken_records_is_the_whole_one(tmp_path, capsys):
    folder = own_pictures(tmp_path)
    with open(folder / "captions.jsonl", "a") as f:
        f.write("\nnot json" * 7)
    world = open_data(f"folder:{folder}:all")           # those of the list are known when it is open
    assert "warning: 7 broken records of" in capsys.readouterr().err.splitlines()[-1]
    for n in range(6):
        (folder / f"{n}.png").write_text("no picture")
    for n in range(12):
        world.item(n)
    assert "warning: 8 broken records of" in capsys.readouterr().err.splitlines()[-1]
    for _ in range(2):                                  # said once
        report_broken([(Shapes(), 1.0), (world, 1.0)])
    assert capsys.readouterr().err.count("broken records") == 1 and world.said == 13


def test_an_empty_folder_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="captions.jsonl"):
        open_data(f"folder:{tmp_path}")
    (tmp_path / "captions.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no usable record"):
        open_data(f"folder:{tmp_path}")


def write(folder: Path, files: dict[str, str | int]) -> Path:
    """path → a text, or the grey of a picture."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            Image.fromarray(np.full((20, 30, 3), content, np.uint8)).save(file)
        else:
            file.write_text(content, encoding="utf-8")
    return folder


def captions(spec: str, **options) -> dict[str, list[str]]:
    world = open_data(spec, **options)
    return {item.id: sorted(item.captions) for item in map(world.item, range(len(world)))}


def test_texts_beside_pictures_are_read_in_sub_folders_too_and_its_path_is_a_pictures_id(tmp_path, capsys):
    write(tmp_path, {"cat.JPG": 1, "cat.txt": "a cat\r\na grey cat\n\n", "zoo/old/emu.png": 2,
                     "zoo/old/emu.caption": "\ufeffan emu", "zoo/fox.webp": 3, "zoo/fox.webp.txt": "a fox",
                     "README.txt": "mine", ".hidden/no.png": 4, "zoo/._fox.webp": "no picture"})
    expected = {"cat.JPG": ["a cat", "a grey cat"], "zoo/old/emu.png": ["an emu"], "zoo/fox.webp": ["a fox"]}
    assert captions(f"folder:{tmp_path}:all", strict=True) == expected and not capsys.readouterr().err
    os.symlink(tmp_path, tmp_path / "zoo/loop")         # a link to a folder above ends
    assert captions(f"folder:{tmp_path}:all", strict=True, follow_links=True) == expected


def test_a_list_and_texts_beside_pictures_stand_together_and_lists_of_sub_folders_count(tmp_path):
    write(tmp_path, {"a.png": 1, "b.png": 2, "a.txt": "a dot", "b.txt": "b dot",
                     "captions.csv": "image,text\na.png,first\na.png,second\n"})
    assert captions(f"folder:{tmp_path}:all") == {"a.png": ["a dot", "first", "second"], "b.png": ["b dot"]}
    assert captions(f"folder:{tmp_path}/captions.csv:all") == {"a.png": ["first", "second"]}
    sub = write(tmp_path / "sub", {"x/1.png": 3, "x/captions.jsonl": '{"image": "1.png", "text": "one"}',
                                   "y/1.png": 4, "y/metadata.csv": "file_name,text\n1.png,another"})
    assert captions(f"folder:{sub}:all") == {"x/1.png": ["one"], "y/1.png": ["another"]}


def test_pictures_without_text_and_texts_without_picture_are_each_one_counted_sentence(tmp_path, capsys):
    write(tmp_path, {"a.png": 1, "a.txt": "a", "b.png": 2, "c.png": 3, "d.txt": "d", "e.png": 4,
                     "e.txt": " \n"})
    for _ in range(2):                                  # said once
        assert [*captions(f"folder:{tmp_path}:all")] == ["a.png"]
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "2 pictures of" in line and "have no text (first: " in line
            and "b.png); write cat.txt beside cat.jpg" in line] and len(said) == 4
    assert [line for line in said if "1 text of" in line and "has no picture" in line and "d.txt" in line]
    assert sum("1 broken records" in line and "e.txt: it is empty" in line for line in said) == 2
    with pytest.raises(UserError, match=r"d.txt: this text has no picture; .*, or leave --strict out"):
        open_data(f"folder:{tmp_path}:all", strict=True)
    for name in ("d.txt", "e.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"b.png: this picture has no text; write cat.txt beside cat.jpg"):
        open_data(f"folder:{tmp_path}:all", strict=True)
    write(tmp_path, {"captions.jsonl": '{"image": "b.png", "text": "b"}\n{"image": "f.png", "text": "f"}'})
    open_data(f"folder:{tmp_path}:all", strict=True)    # a list may leave pictures out
    said = capsys.readouterr().err
    assert "2 pictures of" in said and "1 text of" in said and "(first: " in said and "f.png" in said


def test_a_folder_of_pictures_alone_says_where_texts_belong(tmp_path):
    write(tmp_path, {"a.png": 1, "b.png": 2})
    with pytest.raises(UserError, match=r"^2 pictures of .* have no text .*write cat.txt .*captions.jsonl\."):
        open_data(f"folder:{tmp_path}")


@pytest.mark.parametrize("files", [
    {f"{part}/{i}.png": 9 * i for i, part in enumerate(("train", "train", "Validation", "test"))}
    | {f"{part}/{i}.txt": f"{i}" for i, part in enumerate(("train", "train", "Validation", "test"))},
    {f"{i}.png": 9 * i for i in range(4)} | {"captions.csv": "image,text,split\n" + "".join(
        f"{i}.png,{i},{part}\n" for i, part in enumerate(("train", "train", "dev", "test")))},
], ids=["sub-folders", "column"])
def test_splits_may_be_sub_folders_or_a_column_and_a_picture_of_train_is_in_no_other(tmp_path, files, capsys):
    write(tmp_path, files)
    found = {split: {c for each in captions(f"folder:{tmp_path}:{split}").values() for c in each}
             for split in ("train", "val", "test", "all")}
    assert found == {"train": {"0", "1"}, "val": {"2"}, "test": {"3"}, "all": {"0", "1", "2", "3"}}
    if "captions.csv" in files:
        with open(tmp_path / "captions.csv", "a") as f:
            f.write("again.png,again,test\nb.png,b,blue\n")
        (tmp_path / "again.png").write_bytes((tmp_path / "0.png").read_bytes())
        assert [*captions(f"folder:{tmp_path}:test")] == ["3.png"] and "again.png" not in captions(
            f"folder:{tmp_path}:train")
        said = capsys.readouterr().err
        assert "1 items of" in said and "show a picture of another split" in said and '"blue" is none' in said


def test_of_two_hundred_pictures_a_tenth_is_val_and_a_tenth_test(tmp_path):
    own_pictures(tmp_path, 12)
    with pytest.raises(UserError, match="12 pictures, and fewer than 200 have no split test; evaluate on"):
        open_data(f"folder:{tmp_path}:test")
    for i in range(200):                                # one pixel tells them apart
        Image.fromarray(np.full((1, 1, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "captions.csv").write_text("image,text\n" + "".join(f"{i}.png,{i}\n" for i in range(200)))
    (tmp_path / "captions.jsonl").unlink()
    sets = [{*captions(f"folder:{tmp_path}:{split}")} for split in ("train", "val", "test")]
    assert [*map(len, sets)] == [160, 20, 20] and len(set.union(*sets)) == 200


def test_a_pipe_beside_a_picture_is_no_text(tmp_path, capsys):
    write(tmp_path, {"a.png": 1, "a.txt": "a", "b.png": 2})
    os.mkfifo(tmp_path / "b.txt")
    assert [*captions(f"folder:{tmp_path}:all")] == ["a.png"]
    assert "b.txt: is a pipe or a device" in capsys.readouterr().err


@pytest.mark.parametrize("alphas, said", [(b"\xff\x09", True), (b"\xff\xff\x09", False)])
def test_transparent_parts_of_a_palette_are_said_where_a_pixel_has_them(alphas, said, tmp_path, capsys):
    note.cache_clear()
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0] * 9)
    image.save(tmp_path / "0.png", transparency=alphas)
    (tmp_path / "0.txt").write_text("x")
    captions(f"folder:{tmp_path}:all")
    assert ("transparent parts of pictures" in capsys.readouterr().err) == said


def test_transparent_parts_are_said_once(tmp_path, capsys):
    note.cache_clear()
    for i in range(3):
        Image.new("RGBA", (8, 8), (i, 0, 0, 255 if i == 0 else 9)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("x")
    captions(f"folder:{tmp_path}:all")
    assert capsys.readouterr().err.count("transparent parts of pictures show the colours that are") == 1


def test_every_form_that_can_be_read_is_a_picture_and_others_are_one_counted_sentence(tmp_path, capsys):
    note.cache_clear()
    write(tmp_path, {f"{n}.{ending}": n for n, ending in enumerate(("JFIF", "ppm", "gif", "tif"))}
          | {f"{n}.txt": f"{n}" for n in range(6)} | {"4.HEIC": "x", "5.avif": "x", "6.heic": "x"})
    Image.new("L", (9, 9)).save(tmp_path / "7.pgm")
    (tmp_path / "7.pgm.txt").write_text("7")
    assert sorted(c for each in captions(f"folder:{tmp_path}:all").values() for c in each) == [*"01237"]
    said = capsys.readouterr().err
    assert "3 pictures of" in said and "have no form that is read here" in said and "4.HEIC" in said
    assert "to JPEG" in said and said.count("\n") == 1
    with pytest.raises(UserError, match="4.HEIC: this picture has no form that is read here; convert"):
        open_data(f"folder:{tmp_path}:all", strict=True)
    alone = write(tmp_path / "alone", {"1.heic": "x", "2.heic": "x", "1.txt": "one"})
    with pytest.raises(UserError, match="2 pictures of .* have no form that is read here .* to JPEG"):
        open_data(f"folder:{alone}")
    write(tmp_path / "cat", {"cat.ppm": 1, "captions.csv": "image,text\ncat.png,a cat\n"})
    with pytest.raises(UserError, match="not one picture"):     # another picture than cat.ppm
        open_data(f"folder:{tmp_path / 'cat'}:all").item(0)


def test_the_pictures_of_a_list_in_annotations_lie_beside_that_folder_or_in_it(tmp_path):
    write(tmp_path, {"a.png": 1, "annotations/b.png": 2, "images/c.png": 3, "d/a.png": 4,
                     "annotations/captions.csv": "image,text\na.png,a\nb.png,b\nc.png,c\nd/a.png,d\n"})
    assert captions(f"folder:{tmp_path}:all", strict=True) == {
        "a.png": ["a"], "annotations/b.png": ["b"], "images/c.png": ["c"], "d/a.png": ["d"]}


def test_an_accent_in_one_character_or_in_two_is_the_same_name(tmp_path, capsys):
    write(tmp_path, {"cafe\u0301.png": 1, "caf\u00e9.txt": "one", "u\u0308.png": 2, "\u00fc.png.txt": "two"})
    found = captions(f"folder:{tmp_path}:all", strict=True)
    assert sorted(found.values()) == [["one"], ["two"]] and not capsys.readouterr().err


def test_a_path_may_begin_with_the_sign_of_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    own_pictures(tmp_path / "mine")
    assert open_data("folder:~/mine:val").item(0).captions == ["grey 9"]
    assert open_data("folder:~/mine/captions.jsonl").path == f"{tmp_path}/mine/captions.jsonl"


@pytest.mark.parametrize("name, head", [("captions.csv", "picture,words"), ("captions.csv", "image,words"),
                                        ("captions.tsv", "words\ttext")])
def test_a_table_without_a_known_column_names_those_that_are_known(name, head, tmp_path):
    own_pictures(tmp_path)
    (tmp_path / "captions.jsonl").unlink()
    (tmp_path / name).write_text(f"{head}\n1.png\tone\n")
    known = ", ".join(TEXT_FIELDS if "image" in head else PICTURE_FIELDS)
    with pytest.raises(UserError, match=f'its first line is "{head}", .* among them one of {known}\\.$'):
        open_data(f"folder:{tmp_path}")


def test_a_list_that_another_program_wrote_may_have_upper_case_and_says_its_encoding(tmp_path):
    write(tmp_path, {"a.png": 1, "metadata.jsonl": '{"File_Name": "a.png", "Text": "a dot"}'})
    assert captions(f"folder:{tmp_path}:all", strict=True) == {"a.png": ["a dot"]}
    (tmp_path / "captions.csv").write_bytes("Image;Text\na.png;un café\n".encode("cp1252"))
    with pytest.raises(UserError, match="captions.csv: is no text in UTF-8; save it as UTF-8."):
        open_data(f"folder:{tmp_path}")


def test_a_name_that_is_no_utf_8_is_a_picture_like_any_other(tmp_path, capsys):
    """A disk may hold names in Latin-1; an id, which is printed and written, shows their bytes escaped."""
    names = [b"caf\xe9", b"caf\xe8", "café".encode(), b"plain"]
    for grey, name in enumerate(names):
        write(tmp_path, {os.fsdecode(name + b".png"): grey, os.fsdecode(name + b".txt"): f"grey {grey}"})
    world = open_data(f"folder:{tmp_path}:all", strict=True)
    shown = [(item.image[0, 0, 0], *item.captions, item.id) for item in map(world.item, range(4))]
    ids = [r"caf\udce9.png", r"caf\udce8.png", "café.png", "plain.png"]
    assert sorted(shown) == [(grey, f"grey {grey}", ids[grey]) for grey in range(4)]
    assert not capsys.readouterr().err and open_data(f"folder:{tmp_path}").held_out == "val"
