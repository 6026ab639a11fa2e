"""Claim: the byte-level tokenizers give the published ids and texts, come back from disk unchanged, and a
file that cannot be read gives one sentence that names it."""

from __future__ import annotations

import gzip
import json
import random
import shutil

import pytest
import torch

import data
from conftest import GOLDEN
from model import IMAGE
from support.formats.chat import TEMPLATES
from support.formats.files import UserError
from support.formats.tokenizer_files import load_tokenizer
from support.formats.tokenizers import Tokenizer, byte_letters, train_bpe
from support.worlds.text import shapes_tokenizer


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """SmolLM2's real tokenizer, 49,152 entries."""
    folder = tmp_path_factory.mktemp("smollm2")
    case = GOLDEN / "smollm2-tokenizer"
    (folder / "tokenizer.json").write_bytes(gzip.decompress((case / "tokenizer.json.gz").read_bytes()))
    shutil.copy(case / "tokenizer_config.json", folder)
    return load_tokenizer(folder)


EXPECTED = json.loads((GOLDEN / "smollm2-tokenizer" / "expected.json").read_text(encoding="utf-8"))


def test_smollm2_ids_and_texts_are_the_published_ones(smol):
    assert len(EXPECTED["encode"]) == 213
    for row in EXPECTED["encode"]:
        assert smol.encode(row["text"], special=True) == row["ids"], row["text"]
        assert smol.decode(row["ids"]) == row["decoded_skip_special"], row["text"]
        assert smol.decode(row["ids"], special=True) == row["decoded"], row["text"]
    for row in EXPECTED["decode"]:  # arbitrary ids, some of them broken UTF-8
        assert smol.decode(row["ids"], special=True) == row["decoded"]


def test_smollm2_special_tokens(smol):
    assert (smol.bos, smol.eos, smol.image, smol.vocab_size) == (1, 2, None, 49152)
    assert smol.special["<|endoftext|>"] == 0 and len(smol.special) == 17


def test_special_tokens_typed_by_a_user_stay_plain_text(smol):
    text = "<|im_end|> and <|endoftext|>"
    assert not set(smol.encode(text)) & set(smol.special.values())
    assert smol.decode(smol.encode(text)) == text
    assert smol.encode(text, special=True)[0] == smol.eos


def test_chat_form_is_the_published_template(smol):
    for row in EXPECTED["chat"]:
        text = TEMPLATES["smollm2"].text(row["messages"], answer=row["add_generation_prompt"])
        assert text == row["text"]
        assert smol.encode(text, special=True) == row["ids"]
    assert TEMPLATES["smollm2"].text("Hi!") == EXPECTED["chat"][1]["text"]


def random_texts(count: int, lowest: int) -> list[str]:
    """Seeded strings from all planes of Unicode, in runs of one script, digits, blanks and emoji; no
    surrogates."""
    rng = random.Random(0)
    blocks = [
        (lowest, 127),
        (lowest, 127),
        (0xA0, 0x24F),
        (0x370, 0x5FF),
        (0x900, 0xDFF),
        (0x2000, 0x2BFF),
        (0x3040, 0x9FFF),
        (0xAC00, 0xD7A3),
        (0xFB00, 0xFFFD),
        (0x1D400, 0x1D7FF),
        (0x1F000, 0x1FAFF),
        (0x20000, 0x2A6DF),
        (0x30, 0x39),
        (0x20, 0x20),
        (0x9, 0xD),
    ]
    return [
        "".join(
            chr(rng.randint(*block))
            for block in rng.choices(blocks, k=rng.randint(0, 6))
            for _ in range(rng.randint(1, 5))
        )
        for _ in range(count)
    ]


def test_decoding_undoes_encoding(smol):
    for text in random_texts(2000, lowest=0x20):
        assert smol.decode(smol.encode(text)) == text
    shapes = shapes_tokenizer()                                            # it has a token for each byte
    for text in random_texts(2000, lowest=0):
        assert shapes.decode(shapes.encode(text)) == text


def test_a_byte_without_a_token_is_dropped_as_the_published_library_drops_it(smol):
    assert smol.decode(smol.encode("a\x04b")) == "ab"


def test_ids_that_name_no_token_are_left_out_of_the_text(smol):
    ids = smol.encode("hello")
    assert smol.decode([IMAGE, *ids, smol.vocab_size, 10**6]) == "hello"
    assert smol.decode(torch.tensor(ids)) == "hello"


def test_a_saved_tokenizer_comes_back_the_same(tmp_path):
    trained = shapes_tokenizer()
    trained.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for name in ("ranks", "special", "bos", "eos", "image", "vocab_size", "pattern"):
        assert getattr(loaded, name) == getattr(trained, name), name
    texts = [text for i in range(50) for text in data.Shapes("all").item(i).captions] + random_texts(
        200, lowest=0
    )
    assert all(loaded.encode(text) == trained.encode(text) for text in texts)
    merges = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert len(merges) == len(trained.ranks) - 256


def test_byte_pair_encoding_merges_the_commonest_pair_first():
    t = train_bpe(["low low low lowest"], 259, ["<end>"], eos="<end>")
    assert [token for token, i in t.ranks.items() if i >= 256] == [b"ow", b"low"] and t.eos == 258
    assert t.encode("low") == [257] and t.encode("ow") == [256] and t.decode([257, t.eos]) == "low"


def test_every_word_of_the_shapes_world_is_one_token():
    t = shapes_tokenizer()
    for word in (
        *data.COLORS,
        *data.SHAPES,
        *data.SIZES,
        *data.NUMBERS[1:],
        "yes",
        "no",
        "top",
        "middle",
        "bottom",
        "left",
        "center",
        "right",
    ):
        assert len(t.encode(" " + word)) == 1, word


def small_file(**changes) -> dict:
    """A tokenizer.json of the bytes alone, Llama-3 style, with one merge."""
    vocab = {letter: b for b, letter in byte_letters().items()} | {"aa": 256}
    split = {
        "type": "Split",
        "pattern": {"Regex": r"\p{N}{1,3}|[^\p{N}]+"},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "added_tokens": [{"id": 257, "content": "<|eot_id|>", "special": True}],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}],
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a a"]},
        **changes,
    }


def load_small(tmp_path, content) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
    )
    return load_tokenizer(tmp_path)


def test_a_file_with_its_own_split_expression_is_read(tmp_path):
    t = load_small(tmp_path, small_file())
    assert t.encode("aaa1234") == [256, *b"a", *b"1234"]
    assert t.bos is None and t.vocab_size == 258


BPE = small_file()["model"]
BROKEN = {
    "cut off": '{"model": {"type": "BPE", "vo',
    "a list": "[1, 2]",
    "no model": small_file(model=None),
    "WordPiece": small_file(model={**BPE, "type": "WordPiece"}),
    "SentencePiece style": small_file(model={**BPE, "byte_fallback": True}),
    "no merges": small_file(model={"type": "BPE", "vocab": BPE["vocab"]}),
    "a merge of unknown tokens": small_file(model={**BPE, "merges": ["q q"]}),
    "whole words whose merges have another order": small_file(
        model={**BPE, "vocab": {**BPE["vocab"], "bb": 258}, "merges": ["b b", "a a"], "ignore_merges": True}
    ),
    "no byte letters": small_file(model={**BPE, "vocab": {**BPE["vocab"], "▁the": 258}}),
    "an unknown normalizer": small_file(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
    "an unknown step of a sequence": small_file(
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Nmt"}]}),
    "an unknown behavior": small_file(pre_tokenizer={
        "type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"String": "a"}, "behavior": "Merged", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False}]}),
    "no bytes at the end": small_file(pre_tokenizer={"type": "Whitespace"}),
    "an unknown post-processor": small_file(post_processor={"type": "Other"}),
    "merges left out at random": small_file(model={**small_file()["model"], "dropout": 0.1}),
    "an unknown splitter": small_file(pre_tokenizer={"type": "Metaspace"}),
    "a broken expression": small_file(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_or_foreign_tokenizer_file_gives_one_sentence_that_names_it(what, tmp_path):
    with pytest.raises(UserError) as e:
        load_small(tmp_path, BROKEN[what])
    assert str(tmp_path / "tokenizer.json") in str(e.value) and "\n" not in str(e.value)


def test_a_missing_tokenizer_file_is_named(tmp_path):
    with pytest.raises(UserError, match="tokenizer.json: no such file"):
        load_tokenizer(tmp_path / "nowhere")
