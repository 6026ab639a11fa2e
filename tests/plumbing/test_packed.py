"""Packed matrices change the order of summation and nothing else, and leave no trace."""

import pytest
import torch

from conftest import golden
from eval import generate_ids
from support.formats.llama import load_decoder
from support.plumbing.packed import packed

CASES = ["llama-mha", "llama-gqa-tied", "llama-rope-llama3", "llama-sharded", "llama-bf16"]


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 instructions"
)
@pytest.mark.parametrize("name", [*CASES, "qwen2-bias"])
def test_packed_matrices_change_the_order_of_summation_and_nothing_else(name, monkeypatch):
    """Logits, greedy tokens and beams with all matrices packed, against published and unpacked ones."""
    monkeypatch.setattr("support.plumbing.packed.PACKED", range(10**9))
    folder, _, x, expected = golden(name)
    decoder = load_decoder(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        plain = decoder(x["input_ids"])
    with torch.no_grad(), packed(decoder):
        linears = [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
        assert all("forward" in vars(m) for m in linears) and "head" in vars(decoder)
        mine = decoder(x["input_ids"])
        with packed(decoder):  # on already: nothing happens, nothing is undone
            again = decoder(x["input_ids"])
        assert torch.equal(mine, again) and "head" in vars(decoder)
    # as without packing: see test_bfloat16_stays_close_to_float32 in tests/test_model.py
    assert (mine.float() - expected["logits"]).norm() <= 2e-2 * expected["logits"].norm()
    assert (mine - plain).float().norm() <= 1e-2 * plain.float().norm()
    assert not any("forward" in vars(m) for m in decoder.modules()) and "head" not in vars(decoder)
    with torch.no_grad():
        assert torch.equal(decoder(x["input_ids"]), plain)
    for beams in (1, 3):
        with packed(decoder):
            ids = generate_ids(decoder, x["prompt_ids"], 16, beams)
        unpacked = generate_ids(decoder, x["prompt_ids"], 16, beams)
        assert ids.shape == unpacked.shape                  # later tokens may part where two logits tie
        assert (ids[:, :4] == unpacked[:, :4]).all()
