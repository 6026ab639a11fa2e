"""FLAVA's training: a batch of each kind in turn, the same rows whoever reads them, the losses of each."""
from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from data import Shapes, to_pixels
from papers.flava_task import ARMS, KINDS, TASKS, FlavaTask
from papers.recipe import Ingredients
from papers.vq import VQ, VQConfig
from support.worlds.text import shapes_tokenizer

ROOT = Path(__file__).parents[2]


def make_task(kind=FlavaTask, batch: int = 4) -> FlavaTask:
    torch.manual_seed(0)
    images = VQ(VQConfig(patch=4, latent=8, width=8, codes=12))
    given = Ingredients(torch.device("cpu"), seed=0, batch=batch, steps=6, world=Shapes(), images=images,
                        tokenizer=shapes_tokenizer(), open_held_out=lambda: Shapes("test"), eval_items=6,
                        take_items=lambda world, count: [world.item(i) for i in range(count)])
    return kind(given)


@pytest.fixture(scope="module")
def task() -> FlavaTask:
    return make_task()


def test_pictures_have_vectors_of_their_own_before_any_training(task):
    """With BERT's N(0, 0.02²) at this width 1 − cos of two pictures is 0.0004, and no contrast learned."""
    pixels = to_pixels([Shapes().item(i).image for i in range(32)], 48)
    with torch.no_grad():
        u = task.module.image_projection(task.module.vit.post_norm(task.module.image(pixels)[:, 0]))
    u = torch.nn.functional.normalize(u, dim=-1)
    assert (u @ u.T).mean() < 0.98


def test_kinds_take_turns_and_each_has_its_losses(task):
    assert [task.batch(step)[0]["kind"] for step in range(4)] == [*KINDS, "pairs"]
    named = []
    for step in range(3):
        task.module.zero_grad()
        task.loss(**task.batch(step)[0]).backward()
        named.append({*task.last})
        assert all(p.grad is not None for p in task.module.parameters())        # as processes need it
    assert named == [{"contrast", "itm", "mmm_image", "mmm_text"}, {"mim"}, {"mlm"}]
    assert task.module.layers[0].q.weight.grad.any() and not task.module.vit.cls.grad.any()


def test_a_batch_of_two_processes_is_that_of_one_and_has_a_code_for_every_patch(task):
    whole, parts = task.batch(3)[0], []
    for number in range(2):
        task.given.part = number, 2
        parts += task.batch(3)
    task.given.part = 0, 1
    for key in ("pixels", "hidden", "codes", "match"):
        assert torch.equal(torch.cat([part[key] for part in parts]), whole[key]), key
    assert whole["codes"].shape == whole["hidden"].shape == (4, 36)
    assert (whole["hidden"].sum(1) >= math.ceil(36 * 75 / 196)).all() and not whole["hidden"].all()


def test_a_pair_that_does_not_match_has_a_text_of_no_picture_of_its_batch(task):
    """Else a picture would have two right texts among the columns of (V3), and one would count as wrong."""
    matches = []
    for step in range(0, 15, 3):
        piece, = task.batch(step)
        items = [Shapes().item(i) for i in task.given.indices(step)]
        matches += piece["match"].tolist()
        for row, (ids, real, match) in enumerate(zip(piece["tokens"], piece["mask"], piece["match"])):
            words = task.tokenizer.decode(ids[real][1:-1].tolist()).strip()
            assert [words in item.captions for item in items] == [bool(match) and n == row for n in range(4)]
    assert 4 < sum(matches) < 16


def test_a_local_contrast_is_that_of_each_half():
    local, whole = make_task(TASKS["flava-local"]), make_task(TASKS["flava-pairs"])
    piece, = whole.batch(0)
    piece["match"][:] = True
    with torch.no_grad():
        whole.loss(**piece), local.loss(**piece)
        u, v = local.embed(*(piece[key] for key in ("pixels", "tokens", "mask")))
        scale = local.module.logit_scale.exp()

        def contrast(rows: slice) -> torch.Tensor:
            S = scale * u[rows] @ v[rows].T
            return -(S.log_softmax(0).diag() + S.log_softmax(1).diag()).mean() / 2

        torch.testing.assert_close(whole.last["contrast"], contrast(slice(4)))
        halves = (contrast(slice(2)) + contrast(slice(2, 4))) / 2
        torch.testing.assert_close(local.last["contrast"], halves)
        local.given.part = 1, 2                         # of two processes, each has its half already
        local.loss(**{key: x[2:] if torch.is_tensor(x) else x for key, x in piece.items()})
        torch.testing.assert_close(local.last["contrast"], contrast(slice(2, 4)))
    assert {*make_task(TASKS["flava-contrast"]).losses} == {"contrast"} and TASKS.keys() == ARMS.keys()


def test_it_is_measured_beside_chance(task, capsys):
    task.given.name_split = lambda world: "held-out"
    result = task.report(None)["results.json"]
    assert {"words", "pairs", "image to text R@1", "of codes, the commonest"} <= {*result}
    assert all(0 <= share <= 1 for share in result.values())
    assert "of codes, picture alone" in capsys.readouterr().out
