"""Real weights: SmolLM2-135M-Instruct gives the reference's logits, losses and greedy tokens. Skipped where
its folder is not at hand.

SMOLLM2=FOLDER python -m pytest tests/formats/test_real.py
FOLDER: config.json, model.safetensors (float16), tokenizer.json
"""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.formats.tokenizer_files import load_tokenizer
from conftest import GOLDEN
from support.formats.llama import load_decoder

FOLDER = os.environ.get("SMOLLM2", "")
pytestmark = pytest.mark.skipif(
    not Path(FOLDER, "model.safetensors").is_file(), reason="set SMOLLM2 to a folder with the weights"
)


@pytest.fixture(scope="module")
def smollm2():
    return load_decoder(FOLDER), load_tokenizer(FOLDER)


@pytest.mark.parametrize("n", [0, 1])
def test_logits_losses_and_greedy_tokens_equal_the_reference(smollm2, n):
    decoder, tokenizer = smollm2
    case, expected = (
        json.loads((GOLDEN / "smollm2-135m/case.json").read_text()),
        load_file(GOLDEN / "smollm2-135m/expected.safetensors"),
    )
    ids = expected[f"{n}.input_ids"].view(1, -1)
    assert tokenizer.encode(case["prompts"][n]["prompt"], special=True) == ids[0].tolist()
    with torch.no_grad():
        logits = decoder(ids)[0]
    # atol 2e-3, rtol 1e-3: the case's own; logits reach 30, and float32 sums over 49,152 words and 30 layers
    # come in another order
    torch.testing.assert_close(
        logits.gather(1, expected[f"{n}.top_ids"]), expected[f"{n}.top_logits"], atol=2e-3, rtol=1e-3
    )
    torch.testing.assert_close(logits.logsumexp(-1), expected[f"{n}.logsumexp"], atol=2e-3, rtol=1e-3)
    nll = -logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(nll, expected[f"{n}.nll"], atol=2e-3, rtol=1e-3)
    wrote, target = (
        decoder.generate(ids, max_new_tokens=16)[0].tolist(),
        expected[f"{n}.generated_ids"].flatten().tolist(),
    )
    sure = next((i for i, gap in enumerate(expected[f"{n}.generated_gap"].flatten()) if gap < 0.01), 16)
    assert wrote[:sure] == target[:sure]


def test_the_mean_loss_of_the_reference_text_is_reproduced(smollm2):
    decoder, tokenizer = smollm2
    case = json.loads((GOLDEN / "smollm2-135m/case.json").read_text())["perplexity"]
    ids = torch.tensor([tokenizer.encode(case["paragraph"])])
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(decoder(ids)[0, :-1], ids[0, 1:])
    assert (
        abs(nll.exp().item() - case["one paragraph"]["correct"]) < 0.02
    )  # q/k rows in the wrong order would give 100
