"""DPO's losses are the authors'; its pairs differ in one thing; any bridge's run can be the start."""
from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import golden, tiny_vlm
from data import Shapes
from model import IGNORE, IMAGE
from papers.dpo import PAIR, DpoTask, SftTask, answer_log_probs, count_false_things, dpo_loss
from support.formats.files import UserError
from support.plumbing.log import read_log
from support.worlds import open_data
from support.worlds.pairs import preference_pair

QUICK = ["--batch", "8", "--eval-items", "8", "--samples", "0", "--log-every", "1", "--dtype", "float32"]


@pytest.fixture(scope="module")
def case():
    _, case, x, expected = golden("dpo-loss")
    for who in ("chosen", "rejected"):
        x[f"policy_{who}_logits"].requires_grad_()
    logps = {who: torch.stack([answer_log_probs(x[f"{who}_{y}_logits"], x[f"{y}_labels"])
                               for y in ("chosen", "rejected")]) for who in ("policy", "reference")}
    return case, x, expected, logps["policy"], logps["reference"]


def test_the_losses_and_their_gradients_are_the_authors(case):
    case, x, expected, policy, reference = case
    losses, rewards = dpo_loss(policy, reference)
    ours = {"losses": losses, "loss": losses.mean(), "trl_loss": losses.mean(),
            "reward_accuracy": (rewards[0] > rewards[1]).float().mean(),
            "losses_label_smoothing_01": dpo_loss(policy, reference, smoothing=0.1)[0],
            "losses_ipo": dpo_loss(policy, reference, ipo=True)[0],
            "losses_reference_free": dpo_loss(policy, torch.zeros_like(reference))[0]}
    for n, y in enumerate(("chosen", "rejected")):
        ours |= {f"policy_{y}_logps": policy[n], f"reference_{y}_logps": reference[n],
                 f"{y}_rewards": rewards[n]}
    losses.mean().backward(retain_graph=True)
    ours |= {f"grad.policy_{y}_logits": x[f"policy_{y}_logits"].grad for y in ("chosen", "rejected")}
    assert ours.keys() == expected.keys()
    for key, value in ours.items():                     # the case bounds its gradients as it does the rest
        torch.testing.assert_close(value.detach(), expected[key], atol=1e-4, rtol=1e-4, msg=key)
    assert case["tolerance"] == {"atol": 1e-4, "rtol": 1e-4}


def test_a_mean_over_the_tokens_is_another_loss(case):
    _, x, expected, policy, reference = case
    lengths = torch.stack([(x[f"{y}_labels"][:, 1:] != -100).sum(1) for y in ("chosen", "rejected")])
    losses, _ = dpo_loss(policy / lengths, reference / lengths)
    assert (losses - expected["losses"]).abs().max() > 0.1


def test_the_numbers_that_a_hand_computes():
    policy = torch.tensor([[-4.0], [-6.0]], requires_grad=True)
    loss, rewards = dpo_loss(policy, torch.tensor([[-5.0], [-5.5]]))
    loss.sum().backward()
    assert math.isclose(loss.item(), 0.620957, abs_tol=1e-6)
    torch.testing.assert_close(rewards, torch.tensor([[0.1], [-0.05]]))
    torch.testing.assert_close(policy.grad, torch.tensor([[-0.046257], [0.046257]]), atol=1e-6, rtol=0)


def test_a_rejected_caption_names_one_thing_that_is_not_there():
    world, longer = Shapes("test"), 0
    for i in range(50):
        item = preference_pair(world, i)
        chosen, rejected = (PAIR.findall(caption) for caption in item.captions)
        assert count_false_things([item.captions[1]], item.captions[:1])["false"] == 1
        assert len(set(rejected) - set(chosen)) == 1 and len(rejected) - len(chosen) in (0, 1)
        longer += len(rejected) > len(chosen)
    assert 10 < longer < 40                             # so that a shorter caption is not the better one


def test_things_are_counted_as_often_as_they_are_named():
    truth = "a small red ring at the top left and a large red ring at the top right"
    one, wrong = "a small red ring at the top left", "a small red ring at the top left and a blue ring"
    assert count_false_things([one], [truth]) == {"false": 0, "missed": 1, "named": 1}
    assert count_false_things([wrong], [truth]) == {"false": 1, "missed": 1, "named": 2}
    assert count_false_things([truth, one], [one, one]) == {"false": 0.5, "missed": 0, "named": 1.5}


def test_another_data_sets_pair_is_what_contrasts_with_its_picture():
    item = preference_pair(open_data("emoji"), 0)
    assert item.image is not None and len(item.captions) == 2 and item.captions[0] != item.captions[1]


def test_a_run_of_another_bridge_is_the_start_and_the_reference(untrained_run, tmp_path):
    train.main(["--recipe", "dpo", "--bridge", "linear", "--init", untrained_run, "--steps", "6",
                "--warmup", "0", "--examples", "8", *QUICK, "--out", str(tmp_path)])
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    assert math.isclose(lines[0]["loss"], math.log(2), rel_tol=1e-4) and abs(lines[0]["margin"]) < 1e-3
    assert lines[-1]["loss"] < 0.6 and lines[-1]["margin"] > 0 and lines[-1]["right"] > 0.6
    scores = json.loads((tmp_path / "preferences.json").read_text())
    assert scores["after"]["KL"] > 0 and scores["before"].keys() < scores["after"].keys()
    before, after = (load_file(Path(run) / "bridge.safetensors")["map.weight"]
                     for run in (untrained_run, tmp_path))
    assert not torch.equal(before, after)


def make_task(kind: type) -> tuple[DpoTask, dict]:
    """A task between tiny towers, and three pairs: rows 0 to 2 are chosen, 3 to 5 rejected."""
    task, g = kind.__new__(kind), torch.Generator().manual_seed(0)
    task.module, task.reference = tiny_vlm("linear"), tiny_vlm("linear", seed=5)
    task.given = SimpleNamespace(gather=lambda x: x)
    tokens = torch.randint(1, 61, (6, 7), generator=g)
    tokens[:, 0] = IMAGE
    labels = tokens.masked_fill(torch.arange(7) < 3, IGNORE)
    return task, dict(tokens=tokens, labels=labels, mask=None,
                      features=torch.randn(3, 9, 20, generator=g).repeat(2, 1, 1))


def test_pieces_of_a_batch_add_up_to_its_loss():
    task, batch = make_task(DpoTask)
    parts = [{k: v if v is None else v[rows] for k, v in batch.items()} for rows in ([0, 3], [1, 2, 4, 5])]
    torch.testing.assert_close(sum(task.loss(**part) for part in parts), task.loss(**batch))
    assert set(task.metrics()) == {"margin", "right"} and task.loss(**batch) != 3 * math.log(2)


def test_the_comparison_learns_the_chosen_captions_and_nothing_else():
    task, batch = make_task(SftTask)
    chosen = {k: v if v is None else v[:3] for k, v in batch.items()}
    torch.testing.assert_close(task.loss(**batch), task.module.loss(**chosen)[0])


def test_a_start_is_looked_for_under_the_name_of_the_bridge(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="starts from a run of mapl, and there is none at out/mapl-shapes"):
        train.main(["--recipe", "dpo", "--bridge", "mapl"])
    with pytest.raises(UserError, match="recipe dpo does not read --pack"):
        train.main(["--recipe", "dpo", "--pack"])
