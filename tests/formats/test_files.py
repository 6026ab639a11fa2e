"""A JSON file is checked as it is read: what is wrong in it is named in a sentence, with the file and the
key."""
from __future__ import annotations

import json
import os
import shutil

import pytest

from conftest import golden
from support.formats import load_decoder, load_processor, load_tokenizer, load_vit
from support.formats.files import Json, UserError, read_json, read_json_lines
from support.formats.pictures import read_image
from support.worlds import open_data


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


def test_an_object_knows_its_file_and_its_keys():
    c = Json({"size": 4, "inner": {"act": "gelu", "deeper": {"x": 1}}}, "c.json")
    assert c["inner"]["deeper"]["x"] == 1 and c.object("inner").text("act") == "gelu"
    assert c.value("size", int, least=4) == 4 and {**c}["size"] == 4
    for read, message in [
            (lambda: c["absent"], "'absent' is missing"),
            (lambda: c["inner"]["deeper"]["y"], "'inner.deeper.y' is missing"),
            (lambda: c.object("size"), "'size' is 4, not an object"),
            (lambda: c["inner"].value("act", int), "'inner.act' is 'gelu', not a whole number"),
            (lambda: c.value("size", float, above=4), "'size' is 4, not a number above 4")]:
        with pytest.raises(UserError, match=f"^c.json: the key {message}\\.$"):
            read()


@pytest.mark.parametrize("name, content, message", [
    ("config.json", {"hidden_size": "64"}, "'hidden_size' is '64', not a whole number of at least 1"),
    ("config.json", {"hidden_size": True}, "'hidden_size' is true, not a whole number"),
    ("config.json", {"hidden_size": 64.0}, "'hidden_size' is 64.0, not a whole number"),
    ("config.json", {"hidden_size": None}, "'hidden_size' is null, not a whole number"),
    ("config.json", {"text_config": {"rope_scaling": {"factor": [8]}}}, "'text_config.rope_scaling.factor"),
    ("config.json", {"vision_config": []}, r"'vision_config' is \[\], not an object"),
    ("config.json", {"eos_token_id": [1, "2"]}, r"'eos_token_id\[1\]' is '2', not a whole number"),
    ("config.json", {"rms_norm_eps": 10**400}, "'rms_norm_eps' is 1000"),
    ("params.json", {"dim": -64}, "'dim' is -64, not a whole number of at least 1"),
    ("preprocessor_config.json", {"size": {"height": "224"}}, "'size.height' is '224', not a whole"),
    ("preprocessor_config.json", {"image_std": [0.5, 0]}, r"'image_std\[1\]' is 0, not a number of at least"),
    ("tokenizer.json", {"added_tokens": [{"id": -1}]}, r"'added_tokens\[0\].id' is -1, not a whole number"),
    ("tokenizer_config.json", {"bos_token": 1}, "'bos_token' is 1, not a text"),
    ("model.safetensors.index.json", {"weight_map": {"a": 1}}, "'weight_map.a' is 1, not a text"),
    ("results.json", {"rows": {}}, "'rows' is {}, not a list"),
])
def test_a_value_that_the_table_of_a_file_does_not_allow(tmp_path, name, content, message):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"^{tmp_path / name}: the key {message}.*\\.$"):
        read_json(tmp_path / name)


def test_null_means_the_default_where_published_files_have_it(tmp_path):
    published = {"head_dim": None, "rope_scaling": None, "sliding_window": None, "eos_token_id": None,
                 "num_key_value_heads": None, "architectures": None, "of no table": {"vocab_size": "?"}}
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert read_json(tmp_path / "config.json") == published


@pytest.mark.parametrize("read, name", [
    (load_decoder, "config.json"), (load_decoder, "model.safetensors"), (load_vit, "pytorch_model.bin"),
    (load_tokenizer, "tokenizer.model"), (load_tokenizer, "vocab.txt"),
    (load_processor, "processor_config.json"),
    (lambda folder: read_image(folder / "cat.jpg"), "cat.jpg"),
    (lambda folder: open_data(f"llava:{folder}"), "chat.json"),
    (lambda folder: open_data(f"coco:{folder}:val2014"), "captions_val2014.json"),
    (lambda folder: read_json_lines(folder / "seen.json"), "seen.json")])
def test_a_pipe_is_refused_where_it_would_be_read_for_ever(read, name, tmp_path):
    source = golden("clip-vision-gelu" if read is load_vit else "llama-mha")[0]
    shutil.copy(source / "config.json", tmp_path)
    for odd in ("pipe", "/dev/zero"):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name) if odd == "pipe" else os.symlink(odd, tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: (is a pipe or a device|a link that leaves)"):
            read(tmp_path)
