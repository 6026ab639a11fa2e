"""The chain of noises is the published one: schedule, guidance, DDPM's step with three variances, DDIM's."""
from __future__ import annotations

import pytest
import torch

from conftest import check, golden
from papers.ddpm import Diffusion, cosine_betas, guide, linear_betas


@pytest.fixture(scope="module")
def case():
    _, case, x, expected = golden("diffusion-cfg")
    d, t, noise = Diffusion(linear_betas(50)), x["t"], x["step_noise"]
    first, eps = torch.zeros_like(t), guide(x["eps_cond"], x["eps_uncond"], 3.0)
    x0 = d.clean(x["x_t"], t, eps)
    clipped = x0.clamp(-1, 1)
    ddim_t, ddim_u = expected["ddim.t"]
    at = torch.full_like(t, ddim_t)
    ours = {
        "betas": d.betas.float(), "alphas_cumprod": d.abar.float(),
        "eps_guided": guide(x["eps_cond"], x["eps_uncond"], 3.0),
        "x_t_from_x0": d.add_noise(x["x0"], t, x["noise"]),
        "x0.fixed_small": x0, "x0.fixed_large": x0, "x0.fixed_small_clipped": clipped,
        "prev.fixed_small": d.step(x["x_t"], t, x0, noise),
        "prev.fixed_large": d.step(x["x_t"], t, x0, noise, v=1.0),
        "prev.fixed_small_clipped": d.step(x["x_t"], t, clipped, noise),
        "prev.learned_range_clipped": d.step(x["x_t"], t, clipped, noise, x["var_values"]),
        "prev.at_t0": d.step(x["x_t"], first, d.clean(x["x_t"], first, eps), noise),
        "ddim.t": torch.stack([ddim_t, ddim_u]),
        "ddim.prev_eta0": d.jump(d.clean(x["x_t"], at, eps), torch.full_like(t, ddim_u), eps),
        "glide.mean": d.mean(x["x_t"], t, clipped), "glide.variance": d.variance(t, x["var_values"])}
    return case, x, expected, ours, d


def test_every_number_is_the_published_codes(case):
    case, _, expected, ours, _ = case
    assert ours.keys() == expected.keys()
    for key, value in ours.items():
        check(case, key, value, expected[key])


def test_other_readings_are_other_numbers(case):
    """Times counted from 1; weights of the guidance as its own paper writes them; noise in the last step."""
    _, x, expected, _, d = case
    t, x0 = x["t"], expected["x0.fixed_small"]
    assert (d.step(x["x_t"], t - 1, x0, x["step_noise"]) - expected["prev.fixed_small"]).abs().max() > 1e-2
    assert (guide(x["eps_cond"], x["eps_uncond"], 3.0 + 1) - expected["eps_guided"]).abs().max() > 0.1
    first = torch.zeros_like(t)
    noisy = d.mean(x["x_t"], first, x0) + d.variance(first).sqrt() * x["step_noise"]
    assert (noisy - d.step(x["x_t"], first, x0, x["step_noise"])).abs().max() > 1e-3


def test_a_forecast_that_is_right_leads_back_to_the_picture(case):
    _, x, *_ = case
    d, x0, noise = Diffusion(cosine_betas(1000)), x["x0"], x["noise"]
    t = torch.tensor([999, 400])
    noisy = d.add_noise(x0, t, noise)
    torch.testing.assert_close(d.noise_of(noisy, t, x0), noise, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(d.clean(noisy[1:], t[1:], noise[1:]), x0[1:], atol=1e-4, rtol=1e-4)
    assert torch.equal(d.jump(x0, torch.tensor([-1, -1]), noise), x0)
    torch.testing.assert_close(d.jump(x0, t, noise), noisy)


def test_the_schedules_end_in_noise():
    for betas in (linear_betas(1000), cosine_betas(1000)):
        d = Diffusion(betas)
        assert 0.999 < d.abar[0] < 1 and d.abar[-1] < 1e-4 and (d.abar.diff() < 0).all()
    assert linear_betas(1000)[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
