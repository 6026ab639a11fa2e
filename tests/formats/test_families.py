"""Families beside Llama, CLIP and LLaVA 1.5: what each adds is computed as its publisher meant it."""
from __future__ import annotations

import json
import shutil

import pytest
import torch

from conftest import TINY, check_decoder, golden, stir, tiny_decoder
from model import Cache, Decoder
from papers import make_bridge
from papers.qk_norm import QKNorm
from support.formats.llama import decoder_config, load_decoder, save_decoder


# --- Qwen3: normed queries and keys; Mistral 0.1: a sliding window ------------------------------------------

@pytest.mark.parametrize("changes", [
    dict(qk_norm=QKNorm), dict(window=3), dict(qk_norm=QKNorm, window=3),
    dict(attention_bias="qkv", window=3), dict(attention_bias="qkv"), {}])
def test_a_decoder_is_written_as_its_family_and_read_back_to_the_bit(changes, tmp_path):
    decoder = tiny_decoder(**changes)
    save_decoder(decoder, tmp_path)
    again = load_decoder(tmp_path)
    tokens = torch.randint(61, (2, 9))
    assert again.config == decoder.config
    with torch.no_grad():
        assert torch.equal(again(tokens), decoder(tokens))
    written = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    family = ("Qwen3" if "qk_norm" in changes else "Qwen2" if "attention_bias" in changes else
              "Mistral" if "window" in changes else "Llama")
    assert written == family + "ForCausalLM"


def test_queries_and_keys_are_normed_over_each_head_by_hand():
    decoder = stir(Decoder(type(TINY)(**{**TINY.__dict__, "qk_norm": QKNorm})))
    norm, x = decoder.layers[0].attention.qk_norm, torch.randn(1, 6, 3, 8)      # 4 heads of q, 2 of k
    y = norm(x)
    for head in range(6):
        row = x[0, head, 1]
        weight = norm.q if head < 4 else norm.k
        torch.testing.assert_close(y[0, head, 1], row / (row.square().mean() + TINY.norm_eps).sqrt() * weight)
    assert torch.equal(norm(x[:, 4:]), y[:, 4:])      # keys alone: zero_init's prompts


def test_zero_inits_prompts_pass_the_norm_of_the_keys():
    decoder = tiny_decoder(qk_norm=QKNorm)
    attention, prompts = decoder.layers[3].attention, torch.randn(1, 3, 32)
    keys, longer = (attention.project(p)[0] for p in (prompts, 7 * prompts))
    torch.testing.assert_close(keys, longer, atol=1e-3, rtol=1e-3)      # a norm forgets the length
    sizes = dict(prompts=3, adapted=2, width=16, depth=1, heads=2)
    bridge = stir(make_bridge("zero_init", decoder.config, 20, **sizes))
    assert decoder(torch.randint(61, (1, 5)), bridge=bridge).isfinite().all()


@pytest.mark.parametrize("window", [1, 3, 100])
def test_a_token_sees_itself_and_the_window_behind_it_and_no_further(window):
    decoder = stir(Decoder(type(TINY)(**{**TINY.__dict__, "layers": 1, "window": window})))
    tokens = torch.randint(61, (1, 9))
    for changed in range(9):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 61
        with torch.no_grad():
            moved = (decoder(tokens) != decoder(other)).any(-1)[0]
        assert moved.nonzero().flatten().tolist() == [t for t in range(9) if changed <= t < changed + window]


def test_a_window_agrees_with_the_cache_with_padding_and_with_packing():
    decoder = tiny_decoder(window=3)
    tokens = torch.randint(61, (2, 9))
    with torch.no_grad():
        whole = decoder(tokens)
        cache = Cache(decoder.config, 2, 9, "cpu", torch.float32)
        parts = [decoder(part, cache=cache) for part in tokens.split((2, 1, 4, 1, 1), dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)   # sums in another order
        padded = torch.cat((torch.zeros(2, 4, dtype=torch.long), tokens), 1)
        mask = torch.arange(13).expand(2, -1) >= 4
        torch.testing.assert_close(decoder(padded, mask)[:, 4:], whole, atol=1e-5, rtol=1e-5)
        two = torch.cat((tokens[:1], tokens[1:]), 1)
        packed = decoder(two, torch.tensor([[1] * 9 + [2] * 9]))
        torch.testing.assert_close(packed, torch.cat((whole[:1], whole[1:]), 1), atol=1e-5, rtol=1e-5)


def test_a_text_within_the_window_is_a_plain_decoders_to_the_bit():
    plain, windowed = tiny_decoder(), tiny_decoder(window=9)
    tokens = torch.randint(61, (2, 9))
    with torch.no_grad():
        assert torch.equal(plain(tokens), windowed(tokens))
        assert torch.equal(plain.generate(tokens[:, :4], 5), windowed.generate(tokens[:, :4], 5))
