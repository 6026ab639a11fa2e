"""Strangers' reports about generation: ended beams, long and padded prompts, sampling numbers, no picture."""
from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

import eval as evaluation
from conftest import ROOT, small_vlm, tiny_decoder, tiny_vlm
from eval import generate_ids
from model import Decoder, DecoderConfig
from support.formats.files import UserError

START, END, A, B, V, D = 0, 1, 2, 3, 10, 16


def bigram_decoder() -> tuple[Decoder, torch.Tensor]:
    """START → END .40, A .35, B .25; A → six letters evenly; B → END. And its table of log p (V, V)."""
    p = torch.full((V, V), 1e-6)
    p[START, [END, A, B]] = torch.tensor([.40, .35, .25])
    p[A, 4:] = p[4:, 4:] = 1 / 6
    p[B, END] = p[END, END] = 1
    logp = (p / p.sum(1, keepdim=True)).log()
    decoder = Decoder(DecoderConfig(V, D, 1, 1, 1, D, 8, tied=False))
    with torch.no_grad():
        decoder.embed.weight.copy_(torch.eye(D)[:V])
        # the last norm makes a one-hot √D long
        decoder.lm_head.weight.zero_()[:, :V] = logp.T / math.sqrt(D)
        for w in (decoder.layers[0].attention.o, decoder.layers[0].mlp.down):
            w.weight.zero_()
    return decoder, logp


def test_a_beam_that_has_ended_does_not_take_the_place_of_one_that_still_grows():
    decoder, logp = bigram_decoder()
    ids = generate_ids(decoder, torch.tensor([[START]]), 4, beams=2, stop=(END,))[0].tolist()
    assert ids == [B, END]                              # transformers finds it with the same two beams
    assert (logp[START, B] + logp[B, END]) / 2 > logp[START, END]           # log p per token


def test_a_prompt_beyond_the_context_is_said_in_one_sentence(tmp_path, capsys):
    folder = shutil.copytree(ROOT / "weights/decoder", tmp_path / "decoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    with pytest.raises(ValueError, match=r"a prompt has 2\d tokens.*reads 1 to 16"):
        evaluation.main(["ask", str(folder), "--prompt", "is there a red ring or a blue square at the top "
                         "left or a green circle at the top right?", "--max-new-tokens", "3"])
    evaluation.main(["ask", str(folder), "--prompt", "a red circle", "--max-new-tokens", "20"])
    said = capsys.readouterr().err
    assert "runs past the 16 positions" in said and said.count("\n") == 1
    with pytest.raises(UserError, match="--max-new-tokens 999999: this decoder reads 16 positions"):
        evaluation.main(["ask", str(folder), "--prompt", "a red circle", "--max-new-tokens", "999999"])


@pytest.mark.parametrize("beams", [1, 2])
def test_a_row_padded_on_the_right_goes_on_as_alone(beams):
    decoder, rows = tiny_decoder(), torch.tensor([[7, 8, 9, 10], [7, 0, 0, 0]])
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    assert torch.equal(generate_ids(decoder, rows, 5, beams, mask=mask)[1],
                       generate_ids(decoder, rows[1:, :1], 5, beams)[0])


@pytest.mark.parametrize("arguments", [dict(top_p=0.0), dict(top_k=-1), dict(temperature=-1.0)])
def test_sampling_beyond_its_bounds_is_refused_in_a_sentence(arguments):
    (name, value), = arguments.items()
    with pytest.raises(ValueError, match=f"{name} {value}"):
        tiny_decoder().generate(torch.arange(1, 7)[None], 3, **{"temperature": 1.0, **arguments})


def test_a_text_without_a_picture_is_the_decoders_alone():
    vlm, ids = tiny_vlm("mlp"), torch.arange(1, 7)[None]
    with torch.no_grad():
        torch.testing.assert_close(vlm(ids), vlm.decoder(ids), atol=1e-5, rtol=1e-5)
    assert torch.equal(vlm.generate(ids, max_new_tokens=4), vlm.decoder.generate(ids, 4))
    assert small_vlm().generate(ids, max_new_tokens=2).shape == (1, 2)      # a tower that reads tiles
