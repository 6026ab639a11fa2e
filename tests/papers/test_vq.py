"""The quantiser of VQ-GAN is diffusers' and taming's to their numbers, under both conventions of its loss."""
from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from conftest import check, golden
from papers.recipe import Ingredients
from papers.vq import VQ, VQTask, adaptive_weight, vq_loss
from papers.vq_nets import VQConfig

SMALL = VQConfig(channels=8, multipliers=(1, 1), blocks=1, groups=4, latent=6, width=5, codes=14)
NAMES = {"resnets.": "", "mid_block.resnets.0": "middle.0", "mid_block.attentions.0": "middle.1",
         "mid_block.resnets.1": "middle.2", "group_norm": "norm", "to_out.0": "o", "to_": "",
         "conv_norm_out": "norm", "conv_in": "first", "conv_out": "last", "down_blocks": "levels",
         "up_blocks": "levels", "decoder.": "painter.", "post_quant_conv": "post_quant",
         "quant_conv": "quant", "quantize.embedding.weight": "codes"}


def ours(name: str) -> str:
    """diffusers' name of a tensor → ours."""
    name = re.sub(r"\w+_blocks\.(\d+)\.(down|up)samplers\.0\.conv", r"\2sample.\1", name)
    for theirs in sorted(NAMES, key=len, reverse=True):
        name = name.replace(theirs, NAMES[theirs])
    return name


@pytest.fixture(scope="module")
def published() -> VQ:
    vq = VQ(SMALL)
    tensors = load_file(golden("vqgan")[0] / "model.safetensors")
    vq.load_state_dict({ours(n): t[:, :, None, None] if ".to_" in n and t.ndim == 2 else t
                        for n, t in tensors.items()})
    return vq


def test_codes_pictures_losses_and_gradients_are_the_published_ones(published):
    _, case, x, expected = golden("vqgan")
    kept = {}
    hook = published.quant.register_forward_hook(lambda m, args, y: (y.retain_grad(), kept.update(z=y))[1])
    painted, loss, z, ids = published(x["image"], legacy=True)
    hook.remove()
    rec = (painted - x["image"]).square().mean()
    (rec + loss).backward()
    mine = {"prequant": z, "codes": ids.flatten(1), "quantised": published.look_up(ids),
            "loss_codebook": loss, "reconstruction": painted, "loss_rec": rec,
            "loss_codebook_as_in_paper": published(x["image"])[1]}
    for key, value in mine.items():
        check(case, key, value.detach(), expected[key])
    grads = {"grad.prequant": kept["z"].grad, "grad.quantize.embedding.weight": published.codes.grad,
             "grad.encoder.conv_in.weight": published.encoder.first.weight.grad}
    for key, value in grads.items():
        torch.testing.assert_close(value, expected[key], **case["tolerance"])
    assert set(expected) == {*mine, *grads, "grad_paper.prequant", "grad_paper.codebook"}


def test_the_papers_loss_holds_the_vector_to_its_code_by_beta(published):
    _, case, _, expected = golden("vqgan")
    z = expected["prequant"].clone().requires_grad_()
    published.codes.grad = None
    vq_loss(z, published.look_up(expected["codes"].view(2, 8, 8))).backward()
    torch.testing.assert_close(z.grad, expected["grad_paper.prequant"], **case["tolerance"])
    torch.testing.assert_close(published.codes.grad, expected["grad_paper.codebook"], **case["tolerance"])
    assert not torch.allclose(published.codes.grad, 0.25 * expected["grad_paper.codebook"], atol=1e-5)


@pytest.mark.parametrize("legacy, to_z, to_code", [(False, (0.05, -0.025), (-0.2, 0.1)),
                                                   (True, (0.2, -0.1), (-0.05, 0.025))])
def test_both_conventions_by_hand(legacy, to_z, to_code):
    """z = (.2, .9), codes (0, 1), (1, 0), (.5, .5): one value, 0.03125, and gradients that change places."""
    vq = VQ(VQConfig(channels=2, multipliers=(1,), blocks=0, groups=1, latent=2, width=2, codes=3))
    codes = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    vq.codes.data.copy_(codes)
    z = torch.tensor([0.2, 0.9]).view(1, 2, 1, 1).requires_grad_()
    ids = vq.nearest(z)
    assert ids.item() == 0
    loss = vq_loss(z, vq.look_up(ids), legacy=legacy)
    loss.backward()
    assert loss.item() == pytest.approx(0.03125)
    assert z.grad.flatten().tolist() == pytest.approx(to_z)
    assert vq.codes.grad[0].tolist() == pytest.approx(to_code) and not vq.codes.grad[1:].any()


def test_gradients_pass_the_quantiser_straight_through():
    torch.manual_seed(0)
    vq = VQ(SMALL)
    z = torch.randn(1, 5, 4, 4, requires_grad=True)
    e = vq.look_up(vq.nearest(z))
    (z + (e - z).detach()).sin().sum().backward()
    torch.testing.assert_close(z.grad, e.detach().cos())


def test_the_weight_of_the_gan_balances_its_gradient_with_the_reconstructions():
    rec, gan = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    assert adaptive_weight(rec, gan, step=250_001).item() == pytest.approx(0.8 * 5 / 0.5001)
    assert adaptive_weight(rec, 0 * gan, step=250_001).item() == pytest.approx(0.8 * 1e4)
    assert adaptive_weight(rec, gan, step=250_000) == 0


def test_chameleons_tokenizer_has_the_published_number_of_parameters():
    """Encoder, codebook, both 1 × 1 convolutions, no painter: 29,423,616 in 32 × 32 codes of 512 pixels."""
    with torch.device("meta"):
        vq = VQ(VQConfig(codes=8192), paints=False)
    assert sum(p.numel() for p in vq.parameters()) == 29_423_616
    assert vq.prequant(torch.zeros(1, 3, 512, 512, device="meta")).shape == (1, 256, 32, 32)


def test_codes_that_nobody_takes_begin_again_at_vectors_of_the_batch():
    torch.manual_seed(0)
    task = VQTask(Ingredients(torch.device("cpu"), seed=0, batch=4, steps=10, world=None))
    piece, = task.batch(0)
    assert piece["pixels"].shape == (4, 3, 48, 48) and 0 <= piece["pixels"].min() < piece["pixels"].max() <= 1
    task.loss(**piece).backward()
    z, ids = task.coded
    before, taken = task.module.codes.detach().clone(), ids.flatten().bincount(minlength=512) > 0
    task.after_step()
    after = task.module.codes.detach()
    assert 0 < taken.sum() < 512 and torch.equal(after[taken], before[taken])
    vectors = z.detach().movedim(1, -1).flatten(0, 2)
    assert (after[~taken][:, None] == vectors).all(-1).any(1).all()
    task.step = 8                                       # the second half of the steps
    task.module.codes.data.copy_(before)
    task.after_step()
    assert torch.equal(task.module.codes, before)
