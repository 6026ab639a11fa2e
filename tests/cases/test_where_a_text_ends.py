"""Published folders name the tokens that end a text in several places; an answer ends at each of them."""
from __future__ import annotations

import base64
import json

import pytest
import torch

import data
import eval as evaluation
from conftest import chain_decoder, write_byte_tokenizer, writes_first
from model import IMAGE
from support.formats import load_decoder, load_tokenizer
from support.formats.files import UserError
from support.formats.llama import save_decoder
from support.formats.tokenizer_files import copy_tokenizer

LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
BEGIN, END, EOT = 256, 257, 260
A, B, C, LINE = *b"ABC", ord("\n")


def ask(folder, capsys, *flags) -> str:
    flags = ("--prompt", "hi\n", "--max-new-tokens", "6", "--device", "cpu", *flags)
    evaluation.main(["ask", str(folder), *flags])
    return capsys.readouterr().out.strip()


def llama_folder(folder, follow, special=LLAMA3, size=262, **settings):
    write_byte_tokenizer(folder, special, **settings)
    save_decoder(chain_decoder(size, follow), folder)
    return folder


def set_ends(folder, name, ids):
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, "eos_token_id": ids}))


@pytest.mark.parametrize("beams", ["1", "3"])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ids, answer", [([END, EOT], "A"), (END, "A"), (None, "ABCBC"), (-1, "ABCBC")])
def test_an_answer_ends_at_each_id_that_the_configs_name(file, ids, answer, beams, tmp_path, capsys):
    """The tokenizer names <|eot_id|> alone, and the model writes A <|end_of_text|> B C B C …"""
    folder = llama_folder(tmp_path, {LINE: A, A: END, END: B, B: C, C: B}, eos_token="<|eot_id|>")
    set_ends(folder, file, ids)
    assert ask(folder, capsys, "--beams", beams) == answer


@pytest.mark.parametrize("name", ["eos_token", "special_tokens_map"])
@pytest.mark.parametrize("token", ["<|eot_id|>", {"content": "<|eot_id|>", "lstrip": False}])
def test_the_tokenizer_names_its_eos_as_a_text_or_an_object_in_either_file(name, token, tmp_path):
    write_byte_tokenizer(tmp_path, LLAMA3, **({name: token} if name == "eos_token" else {}))
    if name != "eos_token":
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": token}))
    assert load_tokenizer(tmp_path).stop == (EOT,)


@pytest.mark.parametrize("ids", ["2", [2, "3"], {"a": 1}, 2.0, True])
def test_an_end_that_is_no_id_is_one_sentence(ids, tmp_path):
    write_byte_tokenizer(tmp_path, LLAMA3)
    set_ends(tmp_path, "generation_config.json", ids)
    with pytest.raises(UserError, match="generation_config.json: the key 'eos_token_id"):
        load_tokenizer(tmp_path)


def test_llama_3_as_meta_ships_it_ends_a_turn_with_eot(tmp_path, capsys):
    """params.json, consolidated.00.pth and tokenizer.model: the folder names no token that ends a text."""
    (tmp_path / "tokenizer.model").write_text("".join(
        f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256)))
    V, eot = 512, 256 + 9                                   # Meta's order of its 256 special tokens
    head = torch.zeros(V, V)
    for token, after in {LINE: A, A: eot, eot: B, B: C, C: B}.items():
        head[after, token] = 1
    hidden, zeros = -(-int(8 * V / 3) // 8) * 8, torch.zeros
    tensors = {"tok_embeddings.weight": torch.eye(V), "output.weight": head, "norm.weight": torch.ones(V),
               "layers.0.attention_norm.weight": torch.ones(V), "layers.0.ffn_norm.weight": torch.ones(V),
               **{f"layers.0.attention.w{p}.weight": zeros(V, V) for p in "qkvo"},
               "layers.0.feed_forward.w1.weight": zeros(hidden, V),
               "layers.0.feed_forward.w2.weight": zeros(V, hidden),
               "layers.0.feed_forward.w3.weight": zeros(hidden, V)}
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(dict(
        dim=V, n_layers=1, n_heads=4, n_kv_heads=4, vocab_size=V, multiple_of=8, norm_eps=1e-5,
        rope_theta=500000.0)))
    assert ask(tmp_path, capsys) == "A"
    assert load_tokenizer(tmp_path).stop == (257, eot)


def test_idefics_ends_an_utterance_with_its_own_token(tmp_path):
    special = ("<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>")
    write_byte_tokenizer(tmp_path, special, bos_token="<s>", eos_token="</s>", image_token="<image>",
                         post_processor=writes_first("<s>", 256))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "idefics", "eos_token_id": 2}))
    t = load_tokenizer(tmp_path)
    assert t.stop == (2, 257, 260) and t.answer_text([A, B, 260, C]) == "AB"
    prompt = data.Document(t).chat("<image>hello").tokens
    assert prompt == [256, *b"User:", 258, IMAGE, 258, *b"hello", 260, *b"\nAssistant:"]


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("texts, answer", [
    (["CB"], "AB"), ("CB", "AB"), (["\nX", "BC"], "A"), (["<|end_of_text|>"], "A"), (["no", ""], "ABCBC"),
    (None, "ABCBC"), ([], "ABCBC")])
def test_an_answer_ends_before_a_stop_string(file, texts, answer, tmp_path, capsys):
    """The model writes A <|end_of_text|> B C B C …; the tokenizer names another end."""
    folder = llama_folder(tmp_path, {LINE: A, A: END, END: B, B: C, C: B}, eos_token="<|eot_id|>")
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**content, "stop_strings": texts}))
    assert ask(folder, capsys) == answer
    copy_tokenizer(folder, tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").answer_text(b"ABCBC") == (
        "ABCBC" if "end" in str(texts) else answer)


@pytest.mark.parametrize("texts", [3, [1], {"a": "b"}, True])
def test_a_stop_string_that_is_no_text_is_one_sentence(texts, tmp_path):
    write_byte_tokenizer(tmp_path, LLAMA3)
    (tmp_path / "generation_config.json").write_text(json.dumps({"stop_strings": texts}))
    with pytest.raises(UserError, match="generation_config.json: the key 'stop_strings"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content, words", [
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "eos_token_id": [2]},
     "do_sample, temperature 0.6, top_p 0.9, max_length 4096;"),
    ({"repetition_penalty": 1.1, "temperature": 0.6}, "repetition_penalty 1.1;"),
    ({"no_repeat_ngram_size": 1, "min_length": 3, "bad_words_ids": [[1], [2, 3]]},
     "no_repeat_ngram_size 1, min_length 3, bad_words_ids [[1], [2, 3]];"),
    ({"suppress_tokens": [7], "forced_bos_token_id": 1, "forced_eos_token_id": 0, "min_new_tokens": 1},
     "min_new_tokens 1, suppress_tokens [7], forced_bos_token_id 1, forced_eos_token_id 0;"),
    ({"num_beams": 4, "length_penalty": 2.0}, "length_penalty 2.0, num_beams 4;"),
    ({"do_sample": False, "temperature": 1.0, "top_k": 50, "repetition_penalty": 1.0, "num_beams": 1,
      "no_repeat_ngram_size": 0, "min_length": 0, "max_length": 20, "bad_words_ids": None,
      "suppress_tokens": [], "bos_token_id": 1, "pad_token_id": 0, "use_cache": True}, "")])
def test_what_else_would_change_an_answer_is_said_in_one_sentence(content, words, tmp_path, capsys):
    folder = llama_folder(tmp_path, {LINE: A, A: EOT}, eos_token="<|eot_id|>")
    (folder / "generation_config.json").write_text(json.dumps(content))
    evaluation.main(["ask", str(folder), "--prompt", "hi\n", "--max-new-tokens", "3", "--device", "cpu"])
    said = [line for line in capsys.readouterr().err.splitlines() if "asks for" in line]
    assert (len(said), words in "".join(said)) == (bool(words), True)


def test_a_run_keeps_the_ends_of_its_decoder(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    llama_folder(source, {}, eos_token="<|eot_id|>")
    set_ends(source, "config.json", [END, EOT])
    copy_tokenizer(source, target)
    save_decoder(load_decoder(source), target)
    assert load_tokenizer(target).stop == load_tokenizer(source).stop == (END, EOT)
