"""FPT trains norms alone, with the published shares; BEiT's loss is about masked patches alone."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import train
from conftest import ROOT, TINY_VIT, stir, tiny_decoder
from model import Decoder, DecoderConfig, EncoderBlock, ViT, ViTConfig
from papers.short import Beit, block_mask, freeze_all_but_norms
from support.formats import load_decoder, load_vlm
from support.lab.claims_store import loss_lines

GPT2 = 124_439_808                                      # its words 38,597,376, its positions 786,432


def test_the_norms_of_gpt2_are_a_third_of_a_thousandth_and_its_positions_are_not():
    with torch.device("meta"):
        blocks = nn.ModuleList([*(EncoderBlock(768, 12, 3072, "gelu_tanh", 1e-5) for _ in range(12)),
                                nn.LayerNorm(768)])
    norms, total = freeze_all_but_norms(blocks)
    assert norms == 38_400 and total + 38_597_376 + 786_432 == GPT2
    assert norms / GPT2 < 0.001 < (norms + 786_432) / GPT2      # "<0.1 %" does not hold with the positions


def test_the_norms_of_llama_7b():
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(vocab_size=32000, width=4096, layers=32, heads=32, kv_heads=32,
                                        head_width=128, hidden=11008, tied=False))
    assert freeze_all_but_norms(decoder) == (266_240, 6_738_415_616)


def test_words_learn_where_asked():
    decoder = tiny_decoder()
    freeze_all_but_norms(decoder, words=True)
    learning = {name for name, p in decoder.named_parameters() if p.requires_grad}
    assert {"embed.weight", "lm_head.weight"} <= learning
    assert all("norm" in name for name in learning - {"embed.weight", "lm_head.weight"})


@pytest.mark.parametrize("recipe", ["fpt", pytest.param("fpt-random", marks=pytest.mark.slow)])
def test_a_run_moves_the_norms_and_the_map_and_nothing_else(recipe, tmp_path, capsys):
    train.main(["--recipe", recipe, "--steps", "2", "--batch", "4", "--eval-items", "2", "--samples", "0",
                "--dtype", "float32", "--out", str(tmp_path)])
    start, end = load_decoder(ROOT / "weights/decoder"), load_vlm(tmp_path).decoder
    pairs = zip(start.named_parameters(), end.parameters())
    moved = {name for (name, p), q in pairs if not torch.equal(p, q)}
    if recipe == "fpt":
        norms = {name for name, _ in start.named_parameters() if "norm" in name}
        assert moved == norms
        assert "1,152 of the decoder's 908,032 parameters: 0.13 %" in capsys.readouterr().out
    else:                                               # a uniform guess: ln 429
        assert abs(loss_lines(tmp_path / "log.jsonl")[0]["loss"] - 6.06) < 0.3
        assert len(moved) == len(list(start.parameters()))


def test_blocks_mask_forty_percent():
    masks = [block_mask(14, np.random.default_rng(seed)) for seed in range(20)]
    assert all(0.4 <= m.mean() < 0.65 for m in masks) and 0.4 < np.mean(masks) < 0.5
    neighbours = np.mean([m[:, 1:][m[:, :-1]].mean() for m in masks])
    assert neighbours > 0.75                            # scattered patches would have 0.4
    assert block_mask(3, np.random.default_rng(0)).sum() >= 4


def test_beits_loss_is_about_masked_patches_that_it_cannot_see():
    vit = stir(ViT(ViTConfig(**{**TINY_VIT.__dict__, "pre_norm": False})))
    beit, g = Beit(vit, 7), torch.Generator().manual_seed(0)
    pixels, codes = torch.randn(2, 3, 24, 24, generator=g), torch.randint(0, 7, (2, 9), generator=g)
    masked = torch.zeros(2, 9, dtype=torch.bool)
    masked[:, 4] = masked[1, 0] = True                  # the middle; top left
    loss = beit.loss(pixels, masked, codes)
    hidden, seen, other = pixels.clone(), pixels.clone(), codes.clone()
    hidden[:, :, 8:16, 8:16] += 1
    seen[:, :, 16:, 16:] += 1
    other[:, 8] = (other[:, 8] + 1) % 7
    assert torch.equal(beit.loss(hidden, masked, codes), loss)
    assert torch.equal(beit.loss(pixels, masked, other), loss)
    assert (beit.loss(seen, masked, codes) - loss).abs() > 1e-4
    loss.backward()
    assert beit.mask_token.grad.abs().max() > 0
    nn.init.zeros_(beit.head.weight)
    nn.init.zeros_(beit.head.bias)
    assert math.isclose(beit.loss(pixels, masked, codes).item(), math.log(7), rel_tol=1e-5)
    with pytest.raises(ValueError, match="pre_norm"):
        Beit(ViT(TINY_VIT), 7)
