"""Round-robin sees one data set an update and as many pictures; a weighted sum sees all of them."""
from __future__ import annotations

import pytest
import torch

import train
from conftest import ROOT
from support.lab.claims_store import loss_lines

DATA = "shapes-pages + shapes * 0.2"


@pytest.fixture
def pieces(monkeypatch):
    """[(step, its pieces)] of a run: what its task gave to the loop."""
    seen, batch = [], train.AnswerTask.pieces

    def watched(self, m, step, sets=1):
        seen.append((m, step, batch(self, m, step, sets)))
        return seen[-1][-1]
    monkeypatch.setattr(train.AnswerTask, "pieces", watched)
    return seen


def run(out, recipe: str, *flags: str) -> list[dict]:
    train.main(["--recipe", recipe, "--bridge", "linear", "--data", DATA, "--batch", "4", "--steps", "4",
                "--log-every", "1", "--warmup", "0", "--eval-items", "1", "--samples", "1", "--workers", "0",
                "--out", str(out), *flags])
    return loss_lines(out / "log.jsonl")


def test_each_update_reads_a_whole_batch_of_the_next_set(tmp_path, monkeypatch, pieces):
    monkeypatch.chdir(ROOT)
    run(tmp_path / "turns", "round-robin")
    assert [(m, turn) for m, turn, _ in pieces[:4]] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [len(piece["tokens"]) for *_, (piece,) in pieces[:4]] == [4] * 4
    assert [piece["weight"] for *_, (piece,) in pieces[:4]] == [1, 0.2, 1, 0.2]
    pages, pictures = (pieces[n][-1][0]["pixels"].shape[0] for n in (0, 1))
    assert pages > pictures == 4                                                    # a page has several


def test_its_loss_is_that_set_s_mean_over_tokens_times_its_weight(tmp_path, monkeypatch, pieces):
    """(R2), from runs with one of the sets alone."""
    monkeypatch.chdir(ROOT)
    still = "--lr", "1e-12", "--optimizer", "adamw", "--dtype", "float32"
    log = run(tmp_path / "turns", "round-robin", *still)
    alone = {}
    for m, data, weight in ((0, "shapes-pages", 1), (1, "shapes", 0.2)):
        lines = run(tmp_path / str(m), "linear", "--data", data, "--steps", "2", *still)
        alone[m] = [weight * line["loss"] for line in lines]
    expected = [alone[0][0], alone[1][0], alone[0][1], alone[1][1]]
    torch.testing.assert_close([x["loss"] for x in log], expected, atol=2e-4, rtol=0)   # a log has 4 digits


def test_accumulated_pieces_belong_to_one_set(tmp_path, monkeypatch, pieces):
    monkeypatch.chdir(ROOT)
    run(tmp_path / "run", "round-robin", "--accumulate", "2")
    assert [{piece["set"] for piece in step} for *_, step in pieces[:2]] == [{0}, {1}]
    assert [len(piece["tokens"]) for piece in pieces[0][-1]] == [2, 2]
