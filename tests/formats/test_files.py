"""A JSON file is checked as it is read: what is wrong in it is named in a sentence, with the file and the
key."""
from __future__ import annotations

import pytest

from support.formats.files import Json, UserError, read_json


@pytest.mark.parametrize("text, words", [
    ("", "not valid JSON"), ("[1]", r"holds \[1\], not an object"), ("null", "holds None"),
    ("{", "not valid"),
    ('{"a": NaN}', "NaN is no finite number"), ('{"a": -Infinity}', "-Infinity is no finite"),
    ('{"a": 1e400}', "1e400 is no finite"), ('{"a": %s}' % ("1" * 5000), "4300 digits"),
    ('{"a": {"b": 1, "b": 2}}', "'b' stands twice"), ("[" * 100_000, "nested too deeply"),
    ('{"a": ' * 100_000, "nested too deeply"), ('{"a": "\udcff"}', "utf-8"), ('{"a": 1} 2', "Extra data")])
def test_a_file_that_is_no_json_object(tmp_path, text, words):
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=f"^{file}: .*{words}"):
        read_json(file)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="config.json: no such file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="cannot be read .Is a directory"):
        read_json(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path, encoding):
    (tmp_path / "config.json").write_text('{"a": "é"}', encoding=encoding)
    assert read_json(tmp_path / "config.json") == {"a": "é"}


CONFIG = Json({"size": 4, "eps": 1, "tied": True, "act": "gelu", "taps": [1, 2], "none": None,
               "inner": {"size": "4", "taps": [1, "2"]}}, "config.json")


def test_values_of_the_right_type():
    c = CONFIG
    assert (c.size("size"), c.number("eps", above=0), c.flag("tied"), c.text("act")) == (4, 1, True, "gelu")
    assert c.list("taps", int) == [1, 2] and c.object("inner")["size"] == "4"
    assert c.size("none", 3) == 3 and c.size("absent", None) is None and c.object("absent", {}) == {}
    assert c.over({"size": 1, "new": 2}).size("size") == 4 and c.over({"new": 2}).size("new") == 2


@pytest.mark.parametrize("read, message", [
    (lambda c: c["absent"], "the key 'absent' is missing"),
    (lambda c: c.size("absent"), "the key 'absent' is missing"),
    (lambda c: c.size("none"), "the key 'none' is null, not a whole number"),
    (lambda c: c.size("act"), "the key 'act' is 'gelu', not a whole number of at least 1 and of at most"),
    (lambda c: c.int("tied"), "the key 'tied' is true, not a whole number"),
    (lambda c: c.number("size", most=3), "the key 'size' is 4, not a number of at most 3"),
    (lambda c: c.flag("size"), "the key 'size' is 4, not true or false"),
    (lambda c: c.text("size"), "the key 'size' is 4, not a text"),
    (lambda c: c.object("taps"), r"the key 'taps' is \[1, 2\], not an object"),
    (lambda c: c.object("inner").size("size"), "the key 'inner.size' is '4', not a whole number"),
    (lambda c: c.object("inner")["absent"], "the key 'inner.absent' is missing"),
    (lambda c: c.object("inner").list("taps", int), r"the key 'inner.taps\[1\]' is '2', not a whole number"),
    (lambda c: c.list("size", int), "the key 'size' is 4, not a list"),
])
def test_a_wrong_value_is_named_with_file_and_key(read, message):
    with pytest.raises(UserError, match=f"^config.json: {message}.*\\.$"):
        read(CONFIG)
