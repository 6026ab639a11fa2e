"""Claim: tar and parquet shards are a world whose items are read one at a time; what is broken in a shard is
counted or stops a strict run, a picture lies in one split, and a run goes on to the same bits."""
from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from support.formats.files import UserError, note
from support.formats.shards import declared_split
from support.worlds import open_data, shards
from support.worlds.pairs import contrastive_pair
from support.worlds.trained import name_split


def png(number: int, size: int = 12) -> bytes:
    """A picture whose pixels say its number."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (number % 256, number // 256, 7)).save(file, "png")
    return file.getvalue()


def number_of(image: np.ndarray) -> int:
    return int(image[0, 0, 0]) + 256 * int(image[0, 0, 1])


def write_tar(file: Path, members: list[tuple[str, bytes | str]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def write_parquet(file: Path, rows: list[dict], group: int = 5) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=group)
    return file


def picture(number: int) -> dict:
    return {"bytes": png(number), "path": f"{number}.png"}


def write_set(kind: str, folder: Path, count: int = 40, shard: str = "{}") -> str:
    """Three shards of `count` pictures with captions "thing N"; the spec of the folder."""
    parts = [range(n, count, 3) for n in range(3)]
    for n, part in enumerate(parts):
        name = shard.format(f"{n:05d}")
        if kind == "wds":
            write_tar(folder / f"{name}.tar", [(f"{i:04d}.{end}", content) for i in part
                                               for end, content in (("png", png(i)), ("txt", f"thing {i}"))])
        else:
            rows = [dict(image=picture(i), text=f"thing {i}") for i in part]
            write_parquet(folder / f"{name}.parquet", rows)
    return f"{kind}:{folder}"


def items(spec: str, **options) -> list:
    world = open_data(spec, **options)
    return [world.item(i) for i in range(len(world))]


KINDS = pytest.mark.parametrize("kind", ["wds", "parquet"])


@KINDS
def test_each_picture_comes_once_a_pass_with_its_own_text_in_another_order_the_next_time(kind, tmp_path):
    spec = write_set(kind, tmp_path)
    world = open_data(f"{spec}:all", strict=True)
    passes = [[world.item(i) for i in range(start, start + 40)] for start in (0, 40)]
    for found in passes:
        assert sorted(number_of(item.image) for item in found) == [*range(40)]
        assert all(item.captions == [f"thing {number_of(item.image)}"] for item in found)
    orders = [[number_of(item.image) for item in found] for found in passes]
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0]) and len({i.id for i in passes[0]}) == 40
    again = open_data(f"{spec}:all")
    assert number_of(again.item(73).image) == orders[1][33]             # a function of the index alone
    assert number_of(pickle.loads(pickle.dumps(world)).item(5).image) == orders[0][5]
    image, text, false = contrastive_pair(world, 3)
    assert text == f"thing {number_of(image)}" and false and text not in false
    assert len(open_data(f"{spec}:all", share=0.1)) == 4


@KINDS
def test_splits_are_stable_and_a_picture_under_two_names_lies_in_one(kind, tmp_path):
    spec = write_set(kind, tmp_path, 60)
    sets = {split: {number_of(i.image) for i in items(f"{spec}:{split}")}
            for split in ("train", "val", "test")}
    assert sorted(n for numbers in sets.values() for n in numbers) == [*range(60)] and all(sets.values())
    twins = [*sets["val"], *sorted(sets["train"])[:9], *sets["test"]]
    if kind == "wds":
        write_tar(tmp_path / "00007.tar", [(f"again-{n}.{end}", c) for n in twins
                                           for end, c in (("png", png(n)), ("txt", "again"))])
    else:
        write_parquet(tmp_path / "00007.parquet", [dict(image=picture(n), text="again") for n in twins])
    for split, numbers in sets.items():                 # nothing moved, and the twins joined their pictures
        found = [(number_of(i.image), i.captions) for i in items(f"{spec}:{split}")]
        assert {n for n, _ in found} == numbers
        assert sorted(n for n, said in found if said == ["again"]) == sorted(numbers & set(twins))


@KINDS
def test_names_of_shards_say_the_splits_and_what_train_has_is_in_no_other(kind, tmp_path, capsys):
    for n, name in enumerate(("train", "validation")):
        rows = [0, 1, 2] if n == 0 else [2, 3]
        if kind == "wds":
            write_tar(tmp_path / f"x-{name}-0000.tar", [(f"{i}.{end}", c) for i in rows
                                                        for end, c in (("png", png(i)), ("txt", f"{i}"))])
        else:
            write_parquet(tmp_path / f"data/{name}-00000-of-00001.parquet",
                          [dict(image=picture(i), text=f"{i}") for i in rows])
    spec = f"{kind}:{tmp_path}"
    found = {split: sorted(number_of(i.image) for i in items(f"{spec}:{split}"))
             for split in ("train", "val")}
    assert found == {"train": [0, 1, 2], "val": [3]} and "1 items of" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no usable record of .*, split test"):
        open_data(f"{spec}:test")


def test_the_name_of_a_shard_says_a_split_only_as_a_word():
    said = {"data/train-00000-of-00002.parquet": "train", "validation/0000.parquet": "val",
            "test.tar": "test", "cc3m-val-0001.tar": "val", "trainer-01.tar": "", "00001.tar": "",
            "default/dev/3.tar": "val"}
    assert {name: declared_split(name) for name in said} == said


@KINDS
def test_what_was_trained_on_in_shards_is_never_held_out(kind, tmp_path):
    spec = write_set(kind, tmp_path / "shards")
    val, rows = open_data(f"{spec}:val"), []
    assert name_split(val, [open_data(spec)]) == "held-out" != name_split(val, [open_data(f"{spec}:all")])
    for n in range(40):                                 # the same pictures as files
        (tmp_path / f"{n}.png").write_bytes(png(n))
        rows.append(json.dumps(dict(image=f"{n}.png", text="x")))
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    assert name_split(val, [open_data(f"folder:{tmp_path}:all")]) == "trained-on"
    assert name_split(open_data(f"folder:{tmp_path}:val"), [open_data(f"{spec}:all")]) == "trained-on"
    other = write_set(kind, tmp_path / "copy")
    assert name_split(val, [open_data(f"{other}:train")]) == "held-out"
    assert name_split(val, [open_data(f"{other}:all")]) == "trained-on"


# --- what is broken -----------------------------------------------------------------------------------------

def flawed_tar(folder: Path) -> Path:
    file = write_tar(folder / "0.tar", [
        ("./a/cat.1.png", b"seg"), ("a/cat.PNG", png(1)), ("a/cat.json", '{"caption": "a cat", "key": 5}'),
        ("b.png", png(2)), ("c.txt", "no picture"), ("../evil.png", png(3)), ("../evil.txt", "evil"),
        ("/etc/evil.png", png(3)), ("d.png", png(4)), ("d.txt", "first"), ("d.txt", "second"),
        ("d.jpg", png(5)), ("e.png", png(6)), ("e.json", "{no"), ("f.png", b"no picture"), ("f.txt", "f"),
        ("._g.png", b"mac"), ("g.caption", " g\n h "), ("g.png", png(7)), ("h.png", png(8)),
        ("h.json", "{}")])
    with tarfile.open(file, "a") as tar:
        link = tarfile.TarInfo("i.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return file


def test_each_flaw_of_a_tar_file_is_a_sentence(tmp_path, capsys):
    flawed_tar(tmp_path)
    world = open_data(f"wds:{tmp_path}:all")
    found = {}
    for i in range(len(world)):
        item = world.item(i)
        found[item.id] = item.captions
    assert found == {"0/a/cat": ["a cat"], "0/d": ["first"], "0/g": ["g", "h"]} and len(world) == 4
    whys = {where.rpartition("/")[2]: why for where, why in world.broken.items()}
    assert "leads out of the shard" in whys["evil.png"] and "it is a link" in whys["0.tar, i.png"]
    assert whys["0.tar, d.txt"] == "its key has a .txt already; the first one counts"
    assert whys["0.tar, d.jpg"] == "its key has a picture already; the first one counts"
    assert "Expecting property name" in whys["0.tar, key e"] and "not a picture" in whys["f"]
    said = capsys.readouterr().err
    assert "2 pictures of wds:" in said and "have no text (first: " in said and "key b)" in said
    assert "1 text of wds:" in said and "has no picture" in said
    with pytest.raises(UserError, match="or leave --strict out"):
        open_data(f"wds:{tmp_path}:all", strict=True)


def test_every_form_of_picture_is_read_and_what_a_key_cannot_name_is_counted(tmp_path, capsys):
    def encoded(number: int, form: str) -> bytes:
        file = io.BytesIO()
        Image.open(io.BytesIO(png(number))).save(file, form)
        return file.getvalue()

    members = [(f"{form}.{form}", encoded(n, form)) for n, form in enumerate(("gif", "bmp", "tiff", "ppm"))]
    members += [(f"{form}.txt", form) for form in ("gif", "bmp", "tiff", "ppm", "heic")]
    members += [("heic.heic", b"x"), ("Screenshot 10.11.12.png", png(5)), ("Screenshot 10.11.12.txt", "five"),
                ("gif.seg.png", png(6)), ("gif.cls", b"7")]
    members += [("cafe\u0301.png", png(8)), ("caf\u00e9.txt", "8")]
    write_tar(tmp_path / "0.tar", members)
    found = {item.captions[0]: item for item in items(f"wds:{tmp_path}:all")}
    assert found.keys() == {"gif", "bmp", "tiff", "ppm", "8"} and number_of(found["tiff"].image) == 2
    said = capsys.readouterr().err
    assert "3 members of wds:" in said and "a key ends at its first dot" in said and "10.11.12.png)" in said
    assert "1 picture of wds:" in said and "has no form that is read here (first: " in said
    with pytest.raises(UserError, match="heic.heic: this picture has no form that is read here"):
        open_data(f"wds:{tmp_path}:all", strict=True)


def test_each_line_of_a_text_is_a_caption_as_beside_a_picture_of_a_folder(tmp_path):
    text = "a cat\r\n\n  a grey   cat \n"
    write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.txt", text.encode("utf-16"))])
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "a.txt").write_text(text)
    for spec in (f"wds:{tmp_path}:all", f"folder:{tmp_path}:all"):
        assert items(spec, strict=True)[0].captions == ["a cat", "a grey   cat"]


@pytest.mark.parametrize("cut, why", [
    (lambda b: b[:len(b) // 2], "it is cut off or damaged, at"), (lambda b: b[:512], "it is cut off or"),
    (lambda b: b.rstrip(b"\0") + b"\0" * 400, "it is cut off or damaged, at byte"),
    (lambda b: b + b, "more follows after its end, at byte"), (lambda b: b"x" * 4000, "it is no tar file"),
    (lambda b: b"", "it is no tar file"),
    (lambda b: b[:2048] + b"\xff" * 512 + b[2560:], "it is cut off or damaged"),
], ids=["half", "header", "end", "twice", "text", "empty", "damaged"])
def test_a_tar_file_that_is_cut_off_says_where_and_keeps_what_is_whole(cut, why, tmp_path):
    write_set("wds", tmp_path, 30)
    file = tmp_path / "00001.tar"
    file.write_bytes(cut(file.read_bytes()))
    world = open_data(f"wds:{tmp_path}:all")
    found = [world.item(i) for i in range(len(world))]
    assert 20 <= len(found) <= 30 and all(i.captions == [f"thing {number_of(i.image)}"] for i in found)
    with pytest.raises(UserError, match=f"00001.tar: {why}.*leave --strict out"):
        open_data(f"wds:{tmp_path}:all", strict=True)


def test_a_folder_without_shards_and_packed_ones_are_a_sentence(tmp_path):
    (tmp_path / "0.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds no file .tar, but 0.tar.gz; unpack it with gunzip"):
        open_data(f"wds:{tmp_path}")
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=r"holds no file .parquet; give a file"):
        open_data(f"parquet:{tmp_path}")


def test_without_pyarrow_its_pip_command_is_named(tmp_path, monkeypatch):
    (tmp_path / "0.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        open_data(f"parquet:{tmp_path}")


def test_each_flaw_of_a_parquet_file_is_a_sentence(tmp_path, capsys):
    rows = [dict(image=picture(1), text="one"), dict(image=None, text="two"),
            dict(image=picture(3), text=None),
            dict(image={"bytes": b"no picture", "path": None}, text="four"),
            dict(image=picture(5), text=" ")]
    file = write_parquet(tmp_path / "0.parquet", rows)
    world = open_data(f"parquet:{tmp_path}:all")
    assert [world.item(i).captions for i in range(2)] == [["one"], ["one"]] and len(world.broken) == 2
    said = capsys.readouterr().err
    assert "1 picture of" in said and "1 text of" in said and "row 1)" in said
    (tmp_path / "1.parquet").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="1.parquet: it is cut off, damaged or no parquet file .*--strict"):
        open_data(f"parquet:{tmp_path}/1.parquet:all", strict=True)
    write_parquet(tmp_path / "1.parquet", [dict(image="a/path.png", text="x")])
    with pytest.raises(UserError, match="1.parquet: column image holds string, not bytes; rename"):
        open_data(f"parquet:{tmp_path}/1.parquet")
    write_parquet(tmp_path / "1.parquet", [dict(image=picture(1), label=3)])
    with pytest.raises(UserError, match="columns image, label is known; rename .* of texts to caption"):
        open_data(f"parquet:{tmp_path}/1.parquet")


# --- the layouts of the hub ---------------------------------------------------------------------------------

HUB = {
    "captions in a list": (dict(image=picture(1), caption=["a", "b"], img_id="7"), ["a", "b"], []),
    "numbered captions": (dict(image=picture(1), caption_0="a", caption_1="b"), ["a", "b"], []),
    "Karpathy's sentences": (dict(image=picture(1), sentences=[dict(raw="a", sentid=1)]), ["a"], []),
    "upper case": (dict(Image=picture(1), Caption="a", Label=3), ["a"], []),
    "bare bytes": (dict(jpg=png(1), text="a"), ["a"], []),
    "ten annotators": (dict(image=picture(1), question="q?", question_id=3, multiple_choice_answer="red",
                            answers=[dict(answer="red"), dict(answer="blue")]), [], [("q?", "red")]),
    "one answer": (dict(image=picture(1), question="q?", answer="red", category="a"), [], [("q?", "red")]),
    "choices": (dict(image=picture(1), question="q?", choices=["x", "y"], answer=1, hint="h", lecture="",
                     solution="s"), [], [("q?", "y")]),
    "letters": (dict(image=picture(1), question="q?", options=["x", "y"], answer="B"), [], [("q?", "y")]),
}


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_layouts_are_read(name, tmp_path):
    row, captions, questions = HUB[name]
    write_parquet(tmp_path / "0.parquet", [row])
    item = open_data(f"parquet:{tmp_path}/0.parquet:all", strict=True).item(0)
    assert item.captions == captions and [(q.question, q.answer) for q in item.qas] == questions
    assert number_of(item.image) == 1


@pytest.mark.parametrize("row", [
    dict(images=[picture(1), picture(2)], texts=[dict(user="q", assistant="a", source="s")]),
    dict(images=[picture(1), picture(2)], messages=[dict(role="user", content="<image>\n<image>\nq"),
                                                    dict(role="assistant", content="a")]),
    dict(image=[picture(1), picture(2)], conversations=[{"from": "human", "value": "q"},
                                                        {"from": "gpt", "value": "a"}]),
])
def test_a_conversation_of_the_hub_keeps_its_pictures_in_order(row, tmp_path):
    write_parquet(tmp_path / "0.parquet", [row, row])
    world = open_data(f"parquet:{tmp_path}:all", strict=True)
    item = world.item(0)
    assert len(world) == 2 and [number_of(p) for p in item.pictures] == [1, 2]
    assert [t["content"] for t in item.turns] == ["<image>\n<image>\nq", "a"]


def test_questions_about_one_picture_that_follow_one_another_are_an_item(tmp_path):
    write_parquet(tmp_path / "0.parquet", [dict(image=picture(i // 3), question=f"{i}?", answer="x")
                                           for i in range(6)], group=2)
    found = items(f"parquet:{tmp_path}:all")
    assert sorted(len(item.qas) for item in found) == [3, 3]


def bmp(last_row: int) -> bytes:
    """A white page with one dark row, which the file, written from below, holds ahead of its last 4 KB."""
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[last_row] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "bmp")
    return file.getvalue()


@KINDS
def test_pictures_are_the_same_only_if_all_of_their_bytes_are(kind, tmp_path):
    pages = [bmp(63), bmp(62), bmp(62)]
    assert len({(len(page), page[-4096:]) for page in pages}) == 1
    if kind == "wds":
        write_tar(tmp_path / "0.tar", [(f"{n}.{end}", c) for n, page in enumerate(pages)
                                       for end, c in (("png", page), ("txt", f"page {n}"))])
    else:
        write_parquet(tmp_path / "0.parquet", [dict(image=dict(bytes=page, path=None), text=f"page {n}")
                                               for n, page in enumerate(pages)])
    found = {tuple(item.captions): item.image for item in items(f"{kind}:{tmp_path}:all")}
    assert found.keys() == {("page 0",), ("page 1", "page 2")}
    assert not found["page 0",][63].any() and not found["page 1", "page 2"][62].any()


@pytest.mark.parametrize("several", [lambda a, b: dict(image_0=picture(a), image_1=picture(b)),
                                     lambda a, b: dict(images=[picture(a), picture(b)])])
def test_a_caption_or_question_is_about_the_first_of_several_pictures_and_that_is_counted(
        several, tmp_path, capsys):
    note.cache_clear()
    write_parquet(tmp_path / "0.parquet", [several(1, 2) | dict(text="1 2", question=None),
                                           several(1, 3) | dict(text="1 3", question=None),
                                           several(4, 5) | dict(text=None, question="what?")])
    found = items(f"parquet:{tmp_path}:all")
    assert sorted((number_of(i.image), len(i.pictures), *i.captions) for i in found) == [
        (1, 1, "1 2"), (1, 1, "1 3"), (4, 1)]
    said = capsys.readouterr().err
    assert "note: 3 rows of parquet:" in said and "with the first picture alone" in said


# --- memory, order, resumption ------------------------------------------------------------------------------

def test_a_large_row_group_is_read_in_blocks_and_few_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("support.formats.shards.BLOCK", 8 * len(png(1)))
    rows = [dict(image=picture(i), text=f"thing {i}") for i in range(100)]
    write_parquet(tmp_path / "0.parquet", rows, 1000)
    world = open_data(f"parquet:{tmp_path}:all")
    found = []
    for i in range(100):
        item = world.item(i)
        found.append(number_of(item.image))
        assert item.captions == [f"thing {found[-1]}"] and len(world.shards.loaded) <= 4
    assert sorted(found) == [*range(100)] and found[:24] != sorted(found[:24]) and max(found[:24]) < 40


QUICK = ["--bridge", "linear", "--batch", "4", "--dtype", "float32", "--device", "cpu", "--eval-items", "4",
         "--samples", "1", "--log-every", "1", "--save-every", "2"]


def test_a_shard_that_vanishes_is_a_sentence(tmp_path):
    world = open_data(f"{write_set('wds', tmp_path)}:all")
    for file in tmp_path.glob("*.tar"):
        file.unlink()
    with pytest.raises(UserError, match=r".tar: can no longer be read .No such file.*; put it back"):
        world.item(0)


class Killed(Exception):
    """Stands for a kill."""


def test_a_run_on_shards_goes_on_to_the_same_bits_with_workers_too(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    spec = f"{write_set('wds', tmp_path / 'w')} + {write_set('parquet', tmp_path / 'p')}"
    runs = [["--data", spec, "--out", str(tmp_path / run), "--steps", "5", *QUICK] for run in "ab"]
    train.main(runs[0])
    real = train.schedule

    def schedule(progress: float, *rest) -> float:
        if progress > 0.7:
            raise Killed
        return real(progress, *rest)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(train, "schedule", schedule)
        train.main([*runs[1], "--workers", "2"])
    train.main(["--resume", str(tmp_path / "b"), "--workers", "1"])
    files = [(tmp_path / run / "bridge.safetensors").read_bytes() for run in "ab"]
    assert files[0] == files[1]
    write_tar(tmp_path / "w/9.tar", [("x.png", png(99)), ("x.txt", "new")])
    with pytest.raises(UserError, match="other data"):
        train.main(["--resume", str(tmp_path / "b")])


def test_of_few_pictures_one_is_val():
    contents = np.array([20, 11, 33, 20], np.uint64)
    assert shards.split_by_content(contents).tolist() == ["train", "train", "val", "train"]
