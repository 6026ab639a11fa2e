"""A killed run goes on to the same bits, whether it was killed in a step or while it saved."""
from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.formats.files import UserError
from support.plumbing.log import read_log, rewind_log
from support.plumbing.ranks import Ranks
from support.plumbing.state import TrainState, load_state, save_state

ROOT = Path(__file__).parents[2]
# dropout, so that the random state counts
RUN = ["--bridge", "qformer", "--steps", "12", "--batch", "4", "--save-every", "4", "--option", "dropout=0.1",
       "--dtype", "float32", "--log-every", "1", "--eval-items", "2", "--samples", "0"]
KILL_IN_A_STEP = """
import os, signal, sys, train
first = train.schedule
def schedule(progress, *rest):
    if progress >= 0.6: os.kill(os.getpid(), signal.SIGKILL)
    return first(progress, *rest)
train.schedule = schedule
train.main(sys.argv[1:])
"""
KILL_IN_A_SAVE = """
import os, signal, sys, train
rename, count = os.replace, 0
def replace(a, b):
    global count
    count += str(b).endswith("state.safetensors")
    if count == 2: os.kill(os.getpid(), signal.SIGKILL)
    rename(a, b)
os.replace = replace
train.main(sys.argv[1:])
"""


def command(*argv, code: str | None = None) -> subprocess.CompletedProcess:
    start = [sys.executable, "-c", code] if code else [sys.executable, "train.py"]
    return subprocess.run([*start, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=300)


def losses(out: Path) -> dict[int, float]:
    return {x["step"]: x["loss"] for x in read_log(out / "log.jsonl") if "loss" in x}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    done = command(*RUN, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("code", [KILL_IN_A_STEP, KILL_IN_A_SAVE], ids=["step", "save"])
def test_a_killed_run_resumes_to_the_same_losses_bit_for_bit(code, unbroken, tmp_path):
    assert command(*RUN, "--out", tmp_path, code=code).returncode == -signal.SIGKILL
    done = command("--resume", tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == losses(unbroken)          # equal floats, not close ones
    assert len(losses(unbroken)) == 12
    # tensors, not bytes: a safetensors header has no fixed order
    a, b = (load_file(out / "bridge.safetensors") for out in (unbroken, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_log_line_cut_off_by_a_crash_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 9, "loss": 1.0}\n{"step": 3, "lo')
    rewind_log(tmp_path / "log.jsonl", 4)
    assert losses(tmp_path) == {1: 2.0}


def test_a_state_returns_into_its_places_and_draws_go_on(tmp_path):
    """Parameters, moments, means, counters and the random state, without any model."""
    def new_state() -> TrainState:
        p = torch.nn.Parameter(torch.zeros(3, 2))
        return TrainState([("w", p)], [torch.optim.AdamW([p])], {"w": torch.zeros(3, 2)})

    state, ranks = new_state(), Ranks("cpu")
    p = state.trained[0][1]
    p.grad = torch.randn(3, 2)
    state.optimizers[0].step()
    state.mean["w"].fill_(0.5)
    state.step, state.smooth_loss, state.seconds = 7, 1.25, 3.5
    save_state(state, ranks, tmp_path)
    draw = torch.rand(4)
    again = new_state()
    load_state(again, ranks, tmp_path)
    assert torch.equal(again.trained[0][1], p) and torch.equal(again.mean["w"], state.mean["w"])
    assert (again.step, again.smooth_loss, again.seconds) == (7, 1.25, 3.5)
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
