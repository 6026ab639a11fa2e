"""Claim: the helpers of all readers: ids, spellings of a picture's name, JSON's two forms, tables."""
from __future__ import annotations

import json

import pytest

from support.formats.files import UserError
from support.formats.records import (BrokenRecord, Record, find_picture, link_leaves, parse_rows, path_inside,
                                     picture_key, read_lines, read_rows, read_table, row_object, same_id)


@pytest.mark.parametrize("value, same", [(7, 7), ("7", 7), ("000000000042", 42), (7.0, 7), ("a7", "a7"),
                                         (7.5, 7.5), ("", ""), ("-1", "-1")])
def test_ids_that_are_numbers_are_equal_however_they_are_written(value, same):
    assert same_id(value) == same


def test_a_picture_of_coco_has_one_key_under_all_of_its_names():
    names = ("a/train2014/COCO_train2014_000000000042.jpg", "b/val2014/COCO_val2014_000000000042.jpg",
             "c/train2017/000000000042.jpg", "c/val2017/000000000042.JPG")
    assert {picture_key(name) for name in names} == {"COCO 000000000042"}
    assert len({picture_key(name) for name in ("a/000000000042.jpg", "b/000000000042.jpg", "a/b.jpg")}) == 3
    assert picture_key("a/./b.jpg") == picture_key("a/c/../b.jpg") == picture_key("a/b.jpg")


@pytest.mark.parametrize("fields, why", [
    (dict(captions=["", " "]), "all of its captions are empty"),
    (dict(question="q", answers=["", ""]), "all of its answers are empty"),
    (dict(texts=["", "\n"]), "all of its texts are empty"),
    (dict(question=" ", answers=["a"]), "its question is empty"),
    (dict(question="", choices=["a"], answer=0), "its question is empty"),
    (dict(turns=[("human", "<image>"), ("gpt", "a")]), "<image> stands 1 times for 0 pictures"),
    (dict(turns=[("human", "q"), ("gpt", "<image>")], images=["a"]), "in a human turn"),
])
def test_a_record_of_which_nothing_can_be_learned_is_broken_when_it_is_read(fields, why):
    broken, = parse_rows("file, row", [fields], lambda n, row: Record(n, **row))
    assert isinstance(broken, BrokenRecord) and broken.where == "file, row 1" and why in broken.why


def test_a_record_with_one_text_among_empty_ones_is_none_of_these():
    rows = [dict(captions=["", "a"]), dict(question="q", answers=["", "a"]), dict(images=["a"]),
            dict(turns=[("human", "<image> <image>"), ("gpt", "")], images=["a", "b"])]
    assert all(isinstance(r, Record) for r in parse_rows("x", rows, lambda n, row: Record(n, **row)))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_rows_are_read_from_a_json_list_or_json_lines_in_the_encodings_that_people_have(tmp_path, encoding):
    rows, file = [{"a": "é"}, {"a": 2}], tmp_path / "rows"
    lines = "".join(json.dumps(row) + "\n\n" for row in rows)
    for text in (json.dumps(rows), "\n\n" + json.dumps(rows, indent=1), lines):
        file.write_text(text, encoding=encoding)
        assert [*parse_rows("x", read_rows(file), lambda n, row: row_object(row)["a"])] == ["é", 2]
    file.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="it is empty"):
        [*read_rows(file)]
    file.write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="rows: is no text in UTF-8; save it as UTF-8"):
        [*read_rows(file)]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_the_separator_of_a_table_is_the_commonest_of_its_first_line(tmp_path, mark):
    file = tmp_path / "table.csv"
    file.write_text(f'image{mark}text{mark}more\na{mark}"b, c; d"{mark}e\n', encoding="utf-8-sig")
    assert [*read_table(file, ("a", "image"), ("text",))] == [{"image": "a", "text": "b, c; d", "more": "e"}]
    with pytest.raises(UserError, match="among them one of picture, pic"):
        [*read_table(file, ("text",), ("picture", "pic"))]
    assert len([*read_lines(file)]) == 2


def test_paths_stay_inside_and_links_are_followed_to_their_ends(tmp_path):
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/sub/a.JPG").write_text("")
    (tmp_path / "out.png").write_text("")
    (tmp_path / "in/link.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "in/up").symlink_to(tmp_path)
    (tmp_path / "in/same.JPG").symlink_to("sub/a.JPG")
    inside = tmp_path / "in"
    assert path_inside(inside, "a.jpg", ".", "sub") == f"{inside}/sub/a.JPG"
    assert path_inside(inside, f"{inside}/sub/a.JPG") == f"{inside}/sub/a.JPG"
    assert find_picture(f"{inside}/sub\\a.jpeg") == f"{inside}/sub/a.JPG" == find_picture(f"{inside}/sub/a")
    assert find_picture(f"{inside}/sub/a.png") == f"{inside}/sub/a.png"
    for name in ("../out.png", "/out.png", "sub/../../out.png", "", "sub\\..\\x", "a\0b.png"):
        with pytest.raises(ValueError, match="lies outside the folder"):
            path_inside(inside, name)
    leaves = {name: link_leaves(inside, f"{inside}/{name}") for name in ("sub/a.JPG", "same.JPG", "link.png",
                                                                         "up/out.png", "up/in/sub/a.JPG")}
    assert leaves == {"sub/a.JPG": False, "same.JPG": False, "link.png": True, "up/out.png": True,
                      "up/in/sub/a.JPG": False}
