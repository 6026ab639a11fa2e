"""Claim: what a tokenizer.json does with a text before its vocabulary sees it is what Hugging Face's library
does with it: each step, sequences of steps, whole files (golden case tokenizer-steps), and added tokens."""
from __future__ import annotations

import json

import pytest

from conftest import GOLDEN, write_byte_tokenizer
from data import Document
from support.formats import load_tokenizer
from support.formats.files import UserError
from support.formats.tokenizers import byte_letters
from support.formats.text_steps import flat_steps, make_normalizer, make_splitter
from support.formats.towers import load_words

CASE = json.loads((GOLDEN / "tokenizer-steps" / "expected.json").read_text(encoding="utf-8"))


def test_each_normalizer_writes_what_the_library_writes():
    assert len(CASE["normalizers"]) == 20
    for step, texts in CASE["normalizers"]:
        assert [*map(make_normalizer(flat_steps(step)), CASE["texts"])] == texts, step


def test_each_pre_tokenizer_cuts_where_the_library_cuts():
    assert {step.get("behavior") for step, _ in CASE["pre_tokenizers"]} > {
        "Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"}
    for step, pieces in CASE["pre_tokenizers"]:
        assert [*map(make_splitter(flat_steps(step)), CASE["texts"])] == pieces, step


def whole_file(name: str) -> dict:
    """The tokenizer.json of a case."""
    case = CASE["vocabularies"][name]
    file = json.loads(json.dumps(case["tokenizer"]))
    file["model"]["vocab"] |= {letter: b for b, letter in enumerate(case["bytes"])}
    return file


@pytest.mark.parametrize("name", CASE["vocabularies"])
def test_whole_files_give_the_library_s_ids_and_texts(name, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole_file(name)), encoding="utf-8")
    t, case = load_tokenizer(tmp_path), CASE["vocabularies"][name]
    for text, ids, decoded in zip(CASE["code"], case["ids"], case["decoded"], strict=True):
        assert t.encode(text) == ids, text
        assert t.decode(ids) == t.decode([*ids, t.special["<|end|>"]]) == decoded


def test_an_added_token_is_text_unless_it_is_special_or_has_a_role(tmp_path):
    added = ({"content": "<think>", "special": False}, {"content": "</s>", "special": False},
             {"content": "<image>", "special": False}, {"content": "<tool>", "special": False})
    write_byte_tokenizer(tmp_path, ("<s>",), added=added, additional_special_tokens=["<tool>"])
    t = load_tokenizer(tmp_path)
    assert t.words == {"<think>": 257} and (t.bos, t.eos, t.image) == (256, 258, 259)
    assert t.encode("a<think></s>") == [97, 257, *b"</s>"] and 257 in t.text_ids
    assert t.decode([97, 257, 258, 260, 98]) == "a<think>b"


# --- what stands in front of a text -------------------------------------------------------------------------

def template_processing(*parts: str) -> dict:
    """A post-processor; "A" is the text, other parts are special tokens by name."""
    ids = {"<s>": 256, "</s>": 257}
    return {"type": "TemplateProcessing", "pair": [],
            "single": [{"Sequence": {"id": "A", "type_id": 0}} if part == "A" else
                       {"SpecialToken": {"id": part, "type_id": 0}} for part in parts],
            "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()}}


BOS = template_processing("<s>", "A")


@pytest.mark.parametrize("processor, settings, begin, end", [
    (None, {}, (), ()),                                                     # GPT-2, SmolLM2
    (BOS, {}, (256,), ()),
    (template_processing("<s>", "<s>", "A", "</s>"), {}, (256, 256), (257,)),
    (template_processing("A"), {}, (), ()),
    ({"type": "ByteLevel", "trim_offsets": False}, {}, (), ()),
    ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, BOS]}, {}, (256,), ()),
    ({"type": "RobertaProcessing", "cls": ["<s>", 256], "sep": ["</s>", 257]}, {}, (256,), (257,)),
    ({"type": "BertProcessing", "cls": ["<s>", 256], "sep": ["</s>", 257]}, {}, (256,), (257,)),
    (None, {"add_bos_token": True}, (), ()),                                # transformers 5 drops these two
    (BOS, {"add_bos_token": False}, (256,), ()),
    (BOS, {"add_bos_token": True, "add_eos_token": True}, (256,), ()),
    (None, {"tokenizer_class": "LlamaTokenizerFast"}, (), ()),
    (None, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, (), ()),
])
def test_bos_is_written_where_the_post_processor_says_so(processor, settings, begin, end, tmp_path):
    write_byte_tokenizer(tmp_path, ("<s>", "</s>"), processor,
                         **{"bos_token": "<s>", "eos_token": "</s>", **settings})
    t = load_tokenizer(tmp_path)
    assert (t.begin, t.end) == (begin, end)
    assert Document(t).chat("hello").tokens == [*begin, *b"hello"]          # a base model: the text itself


@pytest.mark.parametrize("settings, begin, end", [
    ({}, (256,), ()), ({"add_bos_token": False}, (), ()), ({"add_eos_token": True}, (256,), (257,)),
    ({"add_bos_token": True, "bos_token": None}, (), ())])
def test_without_a_post_processor_the_settings_say_what_stands_around_a_text(settings, begin, end, tmp_path):
    write_byte_tokenizer(tmp_path, ("<s>", "</s>"),
                         **{"bos_token": "<s>", "eos_token": "</s>", **settings})
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    del file["post_processor"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    t = load_tokenizer(tmp_path)
    assert (t.begin, t.end) == (begin, end)


SPLIT = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Sequence", "normalizers": [None]}}, {"normalizer": {"type": "Sequence"}},
    {"normalizer": {"type": "Sequence", "normalizers": {}}}, {"normalizer": {"type": 3}},
    {"normalizer": {"type": "Strip", "strip_left": "yes", "strip_right": True}},
    {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": 0}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "(("}, "content": ""}},
    {"pre_tokenizer": {**SPLIT, "invert": 1}}, {"pre_tokenizer": {**SPLIT, "behavior": None}},
    {"pre_tokenizer": {**SPLIT, "pattern": {"Glob": "*"}}}, {"pre_tokenizer": {"type": "Digits"}},
    {"post_processor": {**template_processing("<s>", "A"), "special_tokens": {}}},
    {"post_processor": {"type": "BertProcessing", "cls": ["x", 999], "sep": ["</s>", 257]}},
    {"post_processor": {"type": "BertProcessing", "cls": "x", "sep": None}},
    {"post_processor": {}}, {"decoder": {"type": "Morse"}}], ids=json.dumps)
def test_a_step_of_the_wrong_kind_is_one_sentence(change, tmp_path):
    write_byte_tokenizer(tmp_path, ("<s>", "</s>"))
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    if "pre_tokenizer" in change:
        change = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            change["pre_tokenizer"], {"type": "ByteLevel", "add_prefix_space": False}]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**file, **change}))
    with pytest.raises(UserError) as e:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(e.value) and "\n" not in str(e.value)


def test_files_without_a_tokenizer_json_have_the_steps_of_their_class(tmp_path):
    """vocab.json and merges.txt: GPT-2 splits "12" as one word, Qwen2 normalizes and tells digits apart."""
    vocab = {letter: b for b, letter in byte_letters().items()}
    vocab |= {"12": 256, "Ã©": 257, "<|endoftext|>": 258}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n1 2\nÃ ©\n", encoding="utf-8")
    assert load_tokenizer(tmp_path).encode("12e\u0301") == [256, *"e\u0301".encode()]
    for name, ids in (("Qwen2Tokenizer", [*b"12", 257]), ("GPT2TokenizerFast", [256, *"e\u0301".encode()])):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        assert load_tokenizer(tmp_path).encode("12e\u0301") == ids
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizer"}))
    with pytest.raises(UserError, match="vocab.json: no file of its folder says how a WhisperTokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("settings", [{"add_bos_token": "yes"}, {"add_eos_token": 1}])
def test_a_switch_is_true_or_false(settings, tmp_path):
    write_byte_tokenizer(tmp_path, ("<s>", "</s>"), **settings)
    with pytest.raises(UserError, match="tokenizer_config.json: .*add_..._token.* not true or false"):
        load_tokenizer(tmp_path)


def test_an_empty_role_is_none_and_the_vocabulary_says_which(tmp_path):
    write_byte_tokenizer(tmp_path, ("<s>", "</s>"), bos_token="", eos_token="")
    content = {"bos_token": "", "eos_token": {"content": "</s>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(content))
    t = load_tokenizer(tmp_path)
    assert (t.bos, t.eos, t.stop) == (256, 257, (257,))


@pytest.mark.parametrize("listed, eos", [(False, 257), (True, 258)])
def test_of_two_files_the_one_that_lists_the_added_tokens_counts(listed, eos, tmp_path):
    """As in transformers: without added_tokens_decoder in tokenizer_config.json, special_tokens_map.json."""
    names = {"added_tokens_decoder": {"258": {"content": "<|end|>", "special": True}}} if listed else {}
    write_byte_tokenizer(tmp_path, ("<s>", "</s>", "<|end|>"), eos_token="<|end|>", **names)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert load_tokenizer(tmp_path).eos == eos


# --- ids ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("added, vocab, words", [
    ({"id": 3}, {}, "the tokens '.*' and '<x>' both have the id 3"),
    ({"id": 256}, {}, "the tokens '<s>' and '<x>' both have the id 256"),
    ({"id": -1}, {}, "id' is -1"),
    ({"id": "7"}, {}, "id' is '7'"),
    ({"id": 1.5}, {}, "id' is 1.5"),
    ({"id": True}, {}, "id' is true"),
    ({"id": 2**40}, {}, "has the id 1099511627776"),
    ({}, {"aa": 5}, "both have the id 5"),
    ({}, {"aa": -5}, "the token 'aa' has the id -5"),
    ({}, {"aa": None}, "the token 'aa' has the id null"),
    ({"content": ""}, {}, "an added token is the empty text"),
])
def test_an_id_that_is_none_or_another_token_s_is_refused(added, vocab, words, tmp_path):
    write_byte_tokenizer(tmp_path, ("<s>",), added=({"content": "<x>", **added},))
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["model"]["vocab"] |= vocab
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(UserError, match=f"tokenizer.json: .*{words}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("config, refused", [
    ({"vocab_size": 257}, True), ({"vocab_size": 258}, False), ({"text_config": {"vocab_size": 257}}, True),
    ({"text_config": {"vocab_size": 300}, "vocab_size": 10}, False),
    ({"vocab_size": 257, "additional_vocab_size": 1}, False)])
def test_a_token_beyond_the_model_s_vocabulary_is_refused(config, refused, tmp_path):
    write_byte_tokenizer(tmp_path, ("<s>", "</s>"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    if refused:
        with pytest.raises(UserError, match="the id 257 is beyond the vocabulary of the model beside it"):
            load_tokenizer(tmp_path)
    else:
        assert load_tokenizer(tmp_path).vocab_size == 258


def test_a_training_asks_for_a_token_that_ends_a_text(tmp_path):
    write_byte_tokenizer(tmp_path, ("<x>",))
    assert load_tokenizer(tmp_path).eos is None
    with pytest.raises(UserError, match="names no token that ends a text; write one as eos_token"):
        load_words(str(tmp_path))


def test_a_special_token_beyond_the_model_s_vocabulary_is_none(tmp_path):
    write_byte_tokenizer(tmp_path, ("<s>", "</s>", "[PAD]"), pad_token="[PAD]")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 258}))
    t = load_tokenizer(tmp_path)
    assert [*t.special] == ["<s>", "</s>"]
    with pytest.raises(ValueError, match="no token .PAD. of the chat template"):
        Document(t).add("[PAD]", special=True)
