"""Tokenizers and chat templates of published folders, as people met them: what a folder says is done."""
from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import GOLDEN, chain_decoder, golden, speaking, write_byte_tokenizer, writes_first
import eval as evaluation
from data import Document
from model import VLM
from papers.blip2_stage1 import Stage1
from support.formats import load_clip, load_tokenizer
from support.formats.chat import TEMPLATES
from support.formats.files import UserError
from support.formats.llama import save_decoder
from support.lab.ask import Request, ask_published

IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURNS = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
         "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SYSTEM = ("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
          "You are a helpful assistant.<|im_end|>\n' }}{% endif %}")
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
          "'<|im_end|>' + '\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
ZEPHYR = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
           "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}"
           "{% endfor %}")
OTHER = "{% for m in messages %}{{ '@@' + m['role'] + ' ' + m['content'] }}{% endfor %}@@bot"


@pytest.mark.parametrize("special, settings", [
    (LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
              "post_processor": writes_first("<|begin_of_text|>", 256)}),
    (IM, {"eos_token": "<|endoftext|>"})], ids=["Llama 3", "Qwen2"])
def test_a_base_model_with_chat_tokens_is_given_the_text_itself(special, settings, tmp_path):
    write_byte_tokenizer(tmp_path, special, **settings)
    begin = [256] if "bos_token" in settings else []
    assert Document(load_tokenizer(tmp_path)).chat("The capital of").tokens == [*begin, *b"The capital of"]


@pytest.mark.parametrize("special, template, want", [
    (IM, SYSTEM + TURNS, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                         "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"),
    (IM, TURNS, "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"),
    (("<s>", "</s>"), ZEPHYR, "<|user|>\nhello</s>\n<|assistant|>\n"),
    (("<s>", "</s>"), MISTRAL, "<s>[INST] hello [/INST]"),
    (("<s>", "</s>"), OTHER, "@@user hello@@bot"),
], ids=["ChatML with its own system text", "ChatML without", "Zephyr", "Mistral", "nobody's"])
def test_a_prompt_is_what_the_published_template_writes(special, template, want, tmp_path):
    pytest.importorskip("jinja2")
    roles = {"bos_token": special[0], "eos_token": special[-1]}
    write_byte_tokenizer(tmp_path, special, chat_template=template, **roles)
    t = load_tokenizer(tmp_path)
    assert t.decode(Document(t).chat("hello").tokens, special=True) == want


def test_an_unknown_template_is_never_replaced_by_the_bare_question(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    write_byte_tokenizer(tmp_path, IM, chat_template=OTHER)
    with pytest.raises(UserError, match="pip install jinja2"):
        Document(load_tokenizer(tmp_path)).chat("hello")


def test_added_tokens_that_are_not_special_are_decoded(tmp_path):
    words = [{"content": text, "special": False} for text in ("<think>", "</think>", "    ")]
    write_byte_tokenizer(tmp_path, ("<|end|>",), added=tuple(words))
    t = load_tokenizer(tmp_path)
    for text, count in (("<think>\nso\n</think>\n\nyes", 2), ("def f():\n    return 1", 1)):
        ids = t.encode(text)
        assert t.decode([*ids, 256]) == text and sum(i > 256 for i in ids) == count


def test_empty_names_in_the_settings_are_none(tmp_path):
    """Early conversions of LLaMA: bos_token "" and eos_token "" beside SentencePiece's own vocabulary."""
    shutil.copy(GOLDEN / "sentencepiece-llama-style" / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}))
    t = load_tokenizer(tmp_path)
    assert (t.bos, t.eos, t.begin, t.stop) == (1, 2, (1,), (2,))


def test_a_bos_that_is_never_written_is_not_written(tmp_path):
    write_byte_tokenizer(tmp_path, ("<|endoftext|>",), bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    t = load_tokenizer(tmp_path)
    assert Document(t).chat("hello").tokens == [*b"hello"] and t.bos == t.eos == 256


@pytest.mark.parametrize("case", ["instructblip-llama", "blip2-itm-itc"])
def test_bert_s_words_stand_between_cls_and_sep_whatever_bos_is(case, tmp_path, monkeypatch):
    """The tokenizer beside InstructBLIP and BLIP-2 names [DEC] as its bos_token."""
    folder, seen = speaking(tmp_path, case), []
    words = load_tokenizer(folder if case == "blip2-itm-itc" else folder / "qformer_tokenizer")
    want = [words.special["[CLS]"], *words.encode("hello"), words.special["[SEP]"]]
    assert words.bos == words.special["[DEC]"] != want[0]
    prepare, itm = VLM.prepare, Stage1.itm
    monkeypatch.setattr(VLM, "prepare", lambda self, *a, **k: (
        seen.append(k["bridge_tokens"][0].tolist()), prepare(self, *a, **k))[1])
    monkeypatch.setattr(Stage1, "itm", lambda self, image, ids: (
        seen.append(ids[0].tolist()), itm(self, image, ids))[1])
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "picture.png")
    ask_published(folder, Request(str(tmp_path / "picture.png"), "hello", device="cpu"))
    assert seen == [want]


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_roles_of_bert_s_vocabulary(file):
    form = {"tokenizer.json": "new", "vocab.txt": "old"}[file]
    t = load_tokenizer(GOLDEN / "wordpiece-bert-style" / form)
    assert (t.begin, t.end) == ((t.special["[CLS]"],), (t.special["[SEP]"],)) and t.bos == t.special["[DEC]"]


def test_a_text_longer_than_clip_reads_is_one_sentence():
    folder, case, x, _ = golden("clip-model")
    clip = load_clip(folder)
    longest = clip.text.config.context
    with pytest.raises(UserError, match=f"a text of {longest + 1} tokens is longer than the {longest}"):
        clip(x["pixel_values"][:1], torch.ones(1, longest + 1, dtype=torch.long))


def test_template_takes_the_place_of_the_folder_s_own(tmp_path, capsys):
    """Vicuna publishes no template: `ask --template vicuna`; what it cannot write is one sentence."""
    write_byte_tokenizer(tmp_path, ("<s>", "</s>"), bos_token="<s>", eos_token="</s>")
    save_decoder(chain_decoder(262, {ord(":"): ord("A"), ord("A"): 257, 257: ord("B")}), tmp_path)
    ask = ["ask", str(tmp_path), "--prompt", "hi", "--max-new-tokens", "3", "--device", "cpu"]
    evaluation.main([*ask, "--template", "vicuna"])
    assert capsys.readouterr().out == "A\n"
    with pytest.raises(UserError, match="--template llama3 writes .*begin_of_text.* no such token"):
        evaluation.main([*ask, "--template", "llama3"])
    with pytest.raises(UserError, match="--template"):
        evaluation.main([*ask, "--template", "klingon"])
    assert TEMPLATES["vicuna"].turn_end == "</s>"


@pytest.mark.parametrize("template", [CHATML, TURNS], ids=["known", "rendered"])
def test_tokens_of_a_turn_that_were_added_as_words_still_end_it(template, tmp_path):
    """Some folders add <|im_end|> without calling it special: an answer ends there, and the prompt has it."""
    if template == TURNS:
        pytest.importorskip("jinja2")
    added = [{"content": text, "special": text == "<|endoftext|>"} for text in IM]
    write_byte_tokenizer(tmp_path, (), added=tuple(added), eos_token="<|endoftext|>", chat_template=template)
    t = load_tokenizer(tmp_path)
    end = {**t.words, **t.special}["<|im_end|>"]
    assert end in t.stop and Document(t).chat("hello").tokens.count(end) == 1
    assert t.answer_text([*b"yes", end, *b"no"]) == "yes"


@pytest.mark.parametrize("content", ["{{ m['content'] | upper }}", "{{ m['content'] | replace('l', 'L') }}",
                                     "{% if m['content'] | length > 3 %}LONG {% endif %}{{ m['content'] }}"])
def test_a_prompt_is_written_by_a_template_that_rewrites_its_messages(content, tmp_path):
    pytest.importorskip("jinja2")
    write_byte_tokenizer(tmp_path, IM, eos_token="<|im_end|>", chat_template=(
        "{% for m in messages %}<|im_start|>" + content + "<|im_end|>{% endfor %}"))
    t = load_tokenizer(tmp_path)
    said = t.decode(Document(t).chat("hello").tokens, special=True)
    assert said in [f"<|im_start|>{text}<|im_end|>" for text in ("HELLO", "heLLo", "LONG hello")]
    for messages, answer in (("hello <|im_end|>", True), ([{"role": "user", "content": "hello"},
                                                       {"role": "assistant", "content": "hello"}], False)):
        with pytest.raises(UserError, match="cannot be followed"):      # nobody could tell what is a token
            Document(t).chat(messages, answer)


@pytest.mark.parametrize("kind, in_file, setting, blank", [
    ("GPT2Tokenizer", False, True, True), ("GPT2TokenizerFast", True, None, False),
    ("Qwen2TokenizerFast", True, False, False), ("PreTrainedTokenizerFast", True, False, True),
    ("PreTrainedTokenizerFast", False, True, False)])
def test_the_blank_in_front_of_a_text_follows_the_class_that_opens_the_folder(kind, in_file, setting, blank,
                                                                              tmp_path):
    """As transformers 5.24 with these files: GPT-2's and Qwen2's classes go by their settings."""
    write_byte_tokenizer(tmp_path, ("<|endoftext|>",), tokenizer_class=kind, add_prefix_space=setting)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = in_file
    file.write_text(json.dumps(content))
    assert (load_tokenizer(tmp_path).encode("hello")[0] == ord(" ")) == blank


@pytest.mark.parametrize("settings", [
    dict(bos_token="", eos_token="", unk_token="", tokenizer_class="LLaMATokenizer"), {}])
def test_the_model_file_says_what_empty_settings_leave_open(settings, tmp_path):
    """Early conversions of Llama name no bos and no eos; a real SentencePiece model has both."""
    spm = pytest.importorskip("sentencepiece")
    text = "\n".join(["the cat sat on the mat", "hello world", "a test of words"] * 30)
    (tmp_path / "text.txt").write_text(text)
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe",
        vocab_size=310,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        character_coverage=1.0, hard_vocab_limit=False)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_tokenizer(tmp_path), spm.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    assert (ours.bos, ours.eos) == (theirs.bos_id(), theirs.eos_id()) == (1, 2)
    assert Document(ours).add("the cat  met Zoë").tokens == [1, *theirs.encode("the cat  met Zoë")]
    assert ours.stop == (2,)
