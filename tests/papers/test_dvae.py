"""The encoder of DALL-E's dVAE is the published one to its numbers; its losses are those of the paper."""
from __future__ import annotations

import math
import re

import pytest
import torch
from safetensors.torch import load_file

from conftest import check, golden
from papers.dvae import (DVAE, DVAEConfig, DVAETask, gumbel_softmax, kl_from_uniform, logit_laplace,
                         map_pixels)
from papers.recipe import Ingredients


def ours(name: str) -> str:
    """The published name of a tensor (openai/DALL-E, and transformers after it) → ours."""
    name = name.removeprefix("blocks.").replace("output.conv", "last").replace("input", "first")
    name = re.sub(r"group_(\d)\.group\.block_(\d)",
                  lambda m: f"groups.{int(m[1]) - 1}.{int(m[2]) - 1}", name).replace("id_path", "skip")
    return "encoder." + re.sub(r"res_path\.path\.conv_(\d)", lambda m: f"convs.{int(m[1]) - 1}", name)


@pytest.fixture(scope="module")
def published() -> DVAE:
    dvae = DVAE(DVAEConfig(hidden=8, codes=23), paints=False)
    tensors = load_file(golden("dalle-dvae-encoder")[0] / "model.safetensors")
    dvae.load_state_dict({ours(name): tensor for name, tensor in tensors.items()})
    return dvae.eval()


def test_mapped_pixels_logits_and_codes_are_the_published_ones(published):
    _, case, x, expected = golden("dalle-dvae-encoder")
    with torch.no_grad():
        mapped = map_pixels(x["image"])
        mine = {"mapped_pixels": mapped, "logits": published.logits(mapped),
                "codes": published.encode(x["image"])}
        assert set(mine) == set(expected)
        for key, value in mine.items():
            check(case, key, value, expected[key])
        unmapped = published.logits(x["image"])         # what is easily forgotten
    assert (unmapped - expected["logits"]).abs().max() > 0.01


def test_the_logit_laplace_is_a_density_over_pixels():
    """∫ p(x) dx = 1 over 0 … 1, whatever its mean and scale."""
    x = torch.linspace(1e-5, 1 - 1e-5, 400_001, dtype=torch.float64)
    for mean, log_scale in ((0.0, 0.0), (1.5, -1.0), (-2.0, 0.5)):
        p = (-logit_laplace(x, torch.tensor(mean), torch.tensor(log_scale).double())).exp()
        assert torch.trapezoid(p, x).item() == pytest.approx(1, abs=2e-3)


def test_the_divergence_from_the_uniform_distribution_by_hand():
    """Uniform 0; all on one of four codes ln 4; half and half ln 2."""
    rows = torch.tensor([[0.0, 0, 0, 0], [200, 0, 0, 0], [200, 200, 0, 0]])
    expected = [0, math.log(4), math.log(2)]
    assert kl_from_uniform(rows[:, :, None, None]).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_gumbel_noise_draws_the_codes_of_the_distribution():
    """At a low temperature the relaxed draw is one-hot, and its frequencies are q's."""
    torch.manual_seed(0)
    q = torch.tensor([0.6, 0.3, 0.1])
    z = gumbel_softmax(q.log()[None, :, None, None].expand(4000, 3, 1, 1), 0.01)
    assert (z.amax(1) > 0.9).float().mean() > 0.97
    assert z.mean(0).flatten().tolist() == pytest.approx(q.tolist(), abs=0.03)          # 4 standard errors


def test_the_temperature_falls_and_the_divergence_comes_in():
    torch.manual_seed(0)
    task = DVAETask(Ingredients(torch.device("cpu"), seed=0, batch=2, steps=8, world=None))
    pieces = [task.batch(step)[0] for step in (0, 6, 7)]
    assert [task.progress(p["tokens"]) for p in pieces] == [0, 1, 1]
    with torch.no_grad():
        torch.manual_seed(1)
        first = task.loss(**pieces[0])
        pixels = pieces[0]["pixels"]
        mapped = map_pixels(pixels)
        torch.manual_seed(1)
        logits = task.module.logits(mapped)
        alone = logit_laplace(mapped, *task.module.paint(gumbel_softmax(logits, 1.0))).mean()
        torch.testing.assert_close(first, alone)        # β is still 0
        painted = task.module.decode(task.module.encode(pixels))
    assert painted.shape == pixels.shape and 0 <= painted.min() and painted.max() <= 1


def test_the_published_networks_have_their_numbers_of_parameters():
    """1,024 codes of 8,192 from 256 pixels; the painter gives two numbers per value."""
    with torch.device("meta"):
        dvae = DVAE(DVAEConfig())
        mean, log_scale = dvae.paint(torch.zeros(1, 8192, 32, 32))
    assert mean.shape == log_scale.shape == (1, 3, 256, 256)
    counts = [sum(p.numel() for p in part.parameters()) for part in (dvae.encoder, dvae.painter)]
    assert counts == [53_786_240, 43_829_766], counts
