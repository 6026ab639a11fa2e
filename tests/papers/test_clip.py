"""CLIP's task from its ingredients alone: no file, no run folder; the loss is the symmetric contrast (I4)."""
from __future__ import annotations

import math

import pytest
import torch

from data import Shapes
from model import ViT, ViTConfig
from papers.clip import ClipTask, text_tokens
from papers.linear_probe import fit_logistic_regression
from papers.recipe import Ingredients
from support.worlds.pairs import contrastive_pair
from support.worlds.text import shapes_tokenizer


@pytest.fixture(scope="module")
def task() -> ClipTask:
    torch.manual_seed(0)
    world = Shapes("train")
    given = Ingredients(torch.device("cpu"), seed=0, batch=4, steps=1, world=world, worlds=[world],
                        tokenizer=shapes_tokenizer(), contrastive_pair=contrastive_pair)
    return ClipTask(given)


def test_the_loss_contrasts_each_image_with_all_texts_and_each_true_text_with_all_images(task):
    """Three texts per picture: its own and two almost true ones, which are no rows of the second term."""
    piece, = task.batch(0)
    assert piece["pixels"].shape[0] == 4 and piece["tokens"].shape[0] == 12
    with torch.no_grad():
        S = task.module(piece["pixels"], piece["tokens"])                       # (4, 12)
        rows = torch.stack([S[i].logsumexp(0) - S[i, i] for i in range(4)]).mean()
        columns = torch.stack([S[:, i].logsumexp(0) - S[i, i] for i in range(4)]).mean()
        torch.testing.assert_close(task.loss(**piece), (rows + columns) / 2)
    again, = task.batch(0)
    assert torch.equal(again["pixels"], piece["pixels"]) and torch.equal(again["tokens"], piece["tokens"])


def test_the_scale_of_the_logits_stays_at_100_or_less(task):
    with torch.no_grad():
        before = task.module.logit_scale.clone()
        task.module.logit_scale.fill_(9.0)
        task.after_step()
        assert math.isclose(task.metrics()["scale"], 100, rel_tol=1e-5)
        task.module.logit_scale.copy_(before)


def test_a_given_vit_is_locked_and_all_else_learns():
    """Recipe clip-text (LiT): the ViT stays, its picture and the texts meet in new projections."""
    vit = ViT(ViTConfig(image_size=48, width=32, layers=1, heads=2, hidden=32))
    world = Shapes("train")
    given = Ingredients(torch.device("cpu"), seed=0, batch=2, steps=1, world=world, worlds=[world], vit=vit,
                        tokenizer=shapes_tokenizer(), contrastive_pair=contrastive_pair)
    locked = ClipTask(given)
    locked.freeze(("text", "image_projection", "text_projection"), torch.float32)
    locked.loss(**locked.batch(0)[0]).backward()
    assert locked.module.vit is vit and all(p.grad is None for p in vit.parameters())
    others = {n: p for n, p in locked.module.named_parameters() if not n.startswith("vit.")}
    assert all(p.grad is not None for p in others.values()) and "logit_scale" in others
    assert locked.check() == locked.report(None) == {}


def test_a_text_ends_with_its_end_token_even_if_it_is_cut():
    tokenizer = shapes_tokenizer()
    tokens = text_tokens(["red ring", "red"], tokenizer, 3, begin=(tokenizer.bos,))
    red, end = tokenizer.encode("red"), tokenizer.eos
    assert tokens[1].tolist() == ([tokenizer.bos, *red] + [end])[:3] or tokens[1, -1] == end
    assert tokens.shape[1] == 3 and (tokens == end).sum() == 2 and tokens[0, 0] == tokenizer.bos


def test_a_run_is_written_by_the_function_that_was_handed_over(task, tmp_path):
    written = []
    task.given.save = lambda *args: written.append(args)
    task.save(tmp_path, {"steps": 1})
    assert written == [(task, tmp_path, {"steps": 1})] and not list(tmp_path.iterdir())


def test_logistic_regression_separates_what_a_plane_separates():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    target = (x @ torch.tensor([1.0, -2.0, 0.5]) > 0).long()
    assert (fit_logistic_regression(x, target, 2)(x).argmax(1) == target).float().mean() > 0.95
