"""Unified-IO 2's parts are the authors': positions in two dimensions, norms, cosines, packed rows."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from conftest import TINY_VIT, check, golden, stir
from model import ViT, attend, visible_to_bias
from papers.masks import stream_mask
from papers.unified_io2 import (HistoryResampler, QKNorm, cosine_attend, grid_angles, pack_examples, rotate,
                                text_angles, to_half_split)


def heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)                            # (B, T, H, E) ↔ (B, H, T, E)


def cache(angles: torch.Tensor) -> torch.Tensor:
    """As the authors keep it: cosine and sine of each pair side by side."""
    return torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1)


def qk_norm(x: dict) -> QKNorm:
    norm = QKNorm(16)
    norm.q.weight, norm.k.weight = (nn.Parameter(to_half_split(x[n])) for n in ("query_norm", "key_norm"))
    return norm


def bias_of(x: dict) -> torch.Tensor:
    return visible_to_bias(x["mask"][:, None, None] > 0, torch.float32)


def test_positions_in_two_dimensions_and_in_one_are_the_authors():
    _, case, x, expected = golden("unified-io2-rope")
    grid, text = grid_angles(3, 4, 16), text_angles(6, 16)
    check(case, "rope2d_cache", cache(grid), expected["rope2d_cache"])
    check(case, "rope1d_cache", cache(text), expected["rope1d_cache"])
    for name, angles, rotated in (("q", grid, "q_rot2d"), ("k", grid, "k_rot2d"),
                                  ("q_text", text, "q_text_rot1d")):
        mine = heads_first(rotate(to_half_split(heads_first(x[name])), angles))
        check(case, rotated, mine, to_half_split(expected[rotated]))


def test_attention_with_norms_and_with_cosines_is_the_authors():
    _, case, x, expected = golden("unified-io2-rope")
    q, k, v = (heads_first(x[name]) for name in "qkv")
    norm = qk_norm(x)
    with torch.no_grad():
        normed = heads_first(norm(to_half_split(q), k)[0])
        check(case, "q_normed", normed, to_half_split(expected["q_normed"]))
        q2, k2 = norm(to_half_split(q), to_half_split(k), grid_angles(3, 4, 16))
        y = heads_first(attend(q2, k2, v, bias_of(x)))
    check(case, "attention_qknorm_rope2d", y, expected["attention_qknorm_rope2d"])
    scale = x["logit_scale"].view(-1, 1, 1)
    y = heads_first(cosine_attend(q, k, v, scale, bias_of(x)))
    check(case, "attention_scaled_cosine", y, expected["attention_scaled_cosine"])


@pytest.mark.parametrize("misread", ["halves", "LayerNorm", "rotated first", "column first"])
def test_a_misreading_fails_the_case(misread):
    _, case, x, expected = golden("unified-io2-rope")
    q, k, v = (heads_first(x[name]) for name in "qkv")
    norm, angles = qk_norm(x), grid_angles(3, 4, 16)
    with torch.no_grad():
        if misread == "halves":
            q, k = norm(q, k, angles)                   # channels in the authors' order
        elif misread == "LayerNorm":
            q, k = (x - x.mean(-1, keepdim=True) for x in (q, k))
        elif misread == "rotated first":
            q, k = norm(*(rotate(to_half_split(y), angles) for y in (q, k)))
        else:
            angles = torch.cat((angles[:, 4:], angles[:, :4]), dim=1)
        if misread in ("LayerNorm", "column first"):
            q, k = norm(to_half_split(q), to_half_split(k), angles)
        y = heads_first(attend(q, k, v, bias_of(x)))
    assert (y - expected["attention_qknorm_rope2d"]).abs().max() > 20 * case["tolerance"]["atol"]


def test_packed_rows_are_masked_as_the_authors_do():
    """In the case padding sees nothing; here it sees padding, which nothing reads."""
    _, _, x, expected = golden("unified-io2-rope")
    document = x["packed_segments"]
    real, words = document[:, :, None] > 0, torch.zeros_like(document)
    given = torch.tensor([[1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 0, 0, 0]], dtype=torch.bool)
    for name, kind, prefix in (("packed_decoder_mask", "causal", None), ("packed_encoder_mask", "all", None),
                               ("prefix_lm_mask", "prefix", given)):
        mask = stream_mask(kind, words, document, prefix) & real
        assert torch.equal(mask[:, None].long(), expected[name]), name


def test_a_score_depends_on_the_difference_of_rows_and_of_columns_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16).double()
    scores = (rotate(q.expand(1, 1, 20, 16), grid_angles(4, 5, 16).double())
              @ rotate(k.expand(1, 1, 20, 16), grid_angles(4, 5, 16).double()).transpose(-2, -1))[0, 0]
    scores = scores.view(4, 5, 4, 5)
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1])
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3
    with pytest.raises(ValueError, match="head width 6 must be a multiple of 4"):
        grid_angles(2, 2, 6)


def test_norms_bound_the_scores_however_large_the_weights():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 5, 16)
    big, small = QKNorm(16)(1000 * q, 1000 * k), QKNorm(16)(q, k)
    torch.testing.assert_close(big[0] @ big[1].mT, small[0] @ small[1].mT, atol=1e-3, rtol=1e-3)
    v = torch.eye(5).expand(1, 2, 5, 5)
    weights = cosine_attend(1000 * q, k, v, torch.full((2, 1, 1), 9.0))         # capped at 100
    torch.testing.assert_close(weights, cosine_attend(q, k, v, torch.full((2, 1, 1), math.log(100))))


@pytest.mark.parametrize("cosine", [False, True])
def test_the_resampler_reads_a_frame_of_any_length_in_any_order(cosine):
    torch.manual_seed(0)
    resampler = stir(HistoryResampler(24, latents=3, heads=2, hidden=32, cosine=cosine))
    frame = torch.randn(2, 7, 24)
    y = resampler(frame)
    assert y.shape == (2, 3, 24) and len(resampler.layers) == 2
    torch.testing.assert_close(resampler(frame.flip(1)), y)
    hidden = visible_to_bias(torch.arange(7) < 4, torch.float32)
    torch.testing.assert_close(resampler(frame, hidden), resampler(frame[:, :4]))
    assert sum(p.numel() for p in HistoryResampler(24, latents=3, heads=2, hidden=32).parameters()) == \
        3 * 24 + 24 + 2 * (4 * 24**2 + 2 * 24 * 32 + 2 * 24 + 2 * 12)


def test_a_vit_gives_two_layers_side_by_side():
    vit = stir(ViT(TINY_VIT))
    pixels = torch.randn(1, 3, 24, 24)
    states = vit(pixels, return_hidden=True)
    assert torch.equal(vit.features(pixels, [2, -2]), torch.cat((states[2], states[-2]), -1)[:, 1:])


def test_packing_fills_rows_and_loses_no_example():
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 400, 500).tolist()
    rows = [*pack_examples(lengths, 512)]
    assert sorted(n for row in rows for n in row) == [*range(500)]
    assert all(len(row) <= 2 and sum(lengths[n] for n in row) <= 512 for row in rows)
    assert len(rows) < 0.56 * 500                       # a row of its own for each takes 500
    assert all(abs(a - b) < 500 for a, *rest in rows for b in rest)
    assert [*pack_examples([3, 3, 4], 6)] == [[0, 1], [2]]
    assert [*pack_examples([5, 5, 5], 6, pool=1)] == [[0], [1], [2]]
    with pytest.raises(ValueError, match="example 1 has 9 tokens; a row has room for 8"):
        [*pack_examples([3, 9], 8)]
