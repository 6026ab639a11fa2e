"""A state returns into its places; what does not fit, or is not finite, is refused. Kills: test_kills.py."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from support.formats.files import UserError, write_tensors
from support.plumbing.log import read_log, rewind_log
from support.plumbing.ranks import Ranks
from support.plumbing.state import TrainState, load_state, save_state

def test_a_log_line_cut_off_by_a_crash_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "seconds": 3.5}\n'
                                        '{"step": 9, "loss": 1.0, "seconds": 9}\n{"step": 3, "lo')
    assert rewind_log(tmp_path / "log.jsonl", 4) == 3.5             # seconds of training so far
    assert [x["step"] for x in read_log(tmp_path / "log.jsonl")] == [1]


def test_a_state_returns_into_its_places_and_draws_go_on(tmp_path):
    """Parameters, moments, means, counters and the random state, without any model."""
    def new_state() -> TrainState:
        p = torch.nn.Parameter(torch.zeros(3, 2))
        return TrainState([("w", p)], [torch.optim.AdamW([p])], {"w": torch.zeros(3, 2)}, {"data": "a"})

    state, ranks = new_state(), Ranks("cpu")
    p = state.trained[0][1]
    p.grad = torch.randn(3, 2)
    state.optimizers[0].step()
    state.mean["w"].fill_(0.5)
    state.step, state.smooth_loss = 7, 1.25
    state.keep_random(ranks.device)
    save_state(state, ranks, tmp_path)
    draw = torch.rand(4)
    again = new_state()
    load_state(again, ranks, tmp_path)
    assert torch.equal(again.trained[0][1], p) and torch.equal(again.mean["w"], state.mean["w"])
    assert (again.step, again.smooth_loss, again.saved) == (7, 1.25, 7)
    moments, expected = (s.optimizers[0].state_dict()["state"][0] for s in (again, state))
    assert moments.keys() == expected.keys() and all(torch.equal(moments[k], expected[k]) for k in moments)
    assert torch.equal(torch.rand(4), draw)


def test_a_missing_truncated_or_other_state_is_refused_by_name(tmp_path):
    state = TrainState([("w", torch.nn.Parameter(torch.zeros(2)))], [])
    with pytest.raises(UserError, match="state.safetensors: no state was saved"):
        load_state(state, Ranks("cpu"), tmp_path)
    save_state(state, Ranks("cpu"), tmp_path)
    with pytest.raises(UserError,
                       match="state.safetensors: does not hold the state of this run .*parameter.other"):
        load_state(TrainState([("other", torch.nn.Parameter(torch.zeros(2)))], []), Ranks("cpu"), tmp_path)
    file = tmp_path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="state.safetensors"):
        load_state(state, Ranks("cpu"), tmp_path)


def saved_state(out: Path) -> TrainState:
    p = torch.nn.Parameter(torch.ones(3, 2))
    state = TrainState([("w", p)], [torch.optim.AdamW([p])], {}, {"data": "a", "weights": "b"})
    p.grad = torch.ones(3, 2)
    state.optimizers[0].step()
    state.keep_random(torch.device("cpu"))
    save_state(state, Ranks("cpu"), out)
    return state


@pytest.mark.parametrize("change, words", [
    (dict(facts={"data": "c"}), "the run had other data"), (dict(facts={"weights": ""}), "other weights"),
    (dict(facts={"step": "three"}), "three"), (dict(without="step"), "step"),
    (dict(tensors={"parameter.w": torch.ones(2, 3)}), r"parameter.w has shape \(2, 3\), not \(3, 2\)"),
    (dict(tensors={"parameter.w": torch.ones(2)}), "has shape"),                # would broadcast
    (dict(tensors={"parameter.w": torch.full((3, 2), torch.nan)}), "parameter.w is not finite"),
    (dict(tensors={"optimizer.0.0.exp_avg": torch.full((3, 2), torch.inf)}), "exp_avg is not finite"),
    (dict(tensors={"optimizer.0.0.exp_avg": torch.ones(2)}), "exp_avg has shape"),
    (dict(tensors={"optimizer.0.7.exp_avg": torch.ones(2)}), "index out of range"),
    (dict(tensors={"optimizer.3.0.exp_avg": torch.ones(2)}), "index out of range"),
    (dict(tensors={"stranger": torch.ones(2)}), "stranger has no place"), (dict(without="parameter.w"), "w"),
], ids=str)
def test_a_state_that_does_not_fit_is_refused_in_one_sentence(change, words, tmp_path):
    saved_state(tmp_path)
    file = tmp_path / "state.safetensors"
    with safe_open(file, "pt") as f:
        tensors, facts = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    tensors, facts = tensors | change.get("tensors", {}), facts | change.get("facts", {})
    for part in (tensors, facts):
        part.pop(change.get("without"), None)
    save_file(tensors, file, facts)
    p = torch.nn.Parameter(torch.ones(3, 2))
    fresh = TrainState([("w", p)], [torch.optim.AdamW([p])], {}, {"data": "a", "weights": "b"})
    with pytest.raises(UserError, match=f"state.safetensors: .*{words}") as e:
        load_state(fresh, Ranks("cpu"), tmp_path)
    assert "\n" not in str(e.value) and "without --resume" in str(e.value)


def test_what_is_not_finite_is_not_saved(tmp_path):
    state = saved_state(tmp_path)
    before = (tmp_path / "state.safetensors").read_bytes()
    state.step = 5
    state.optimizers[0].state_dict()["state"][0]["exp_avg"].fill_(torch.nan)
    with pytest.raises(UserError, match="exp_avg is not finite at step 5.* keeps the state of step 0"):
        save_state(state, Ranks("cpu"), tmp_path)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_the_same_tensors_make_the_same_bytes(tmp_path):
    """Metadata in a fixed order: the library's own is random."""
    facts = {c: c + "é" for c in "gfedcba"}
    for n in range(4):
        write_tensors(tmp_path / f"{n}", {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.int64)}, facts)
    assert len({(tmp_path / f"{n}").read_bytes() for n in range(4)}) == 1
    with safe_open(tmp_path / "0", "pt") as f:
        assert f.metadata() == facts | {"format": "pt"} and torch.equal(f.get_tensor("b"), torch.ones(3))
