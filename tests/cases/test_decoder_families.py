"""A Mistral with a sliding window (7B-v0.1, Zephyr, BakLLaVA) and a text shorter than the window."""
from __future__ import annotations

import pytest
import torch

from support.formats import load_decoder

SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=64)


@pytest.mark.parametrize("length", [6, 16, 30])
def test_a_mistral_with_a_window_opens_and_agrees_within_it_and_beyond(length, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, sliding_window=16)
    theirs = transformers.MistralForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    tokens = torch.arange(1, 1 + length)[None]
    with torch.no_grad():
        gap = (load_decoder(tmp_path)(tokens) - theirs(tokens).logits).abs().max()
    assert gap < 1e-5
