"""Several processes do what one does: DDP and FSDP2 over gloo give the losses and weights of one process, whatever each
of them reads; a killed run goes on to the same bits; what cannot be split is refused. Compiled layers: the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from support.formats.files import UserError

ROOT = Path(__file__).parents[2]
QUICK = "--dtype float32 --log-every 1 --eval-items 4 --samples 0".split()
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch was built without gloo, which joins processes on CPUs",
)

# one start of torchrun makes all runs, because it costs seconds; the names are the run folders
WORKER = """
import json, sys, train
for out, argv in json.load(open(sys.argv[1])).items():
    try:
        train.main([*argv, "--out", out])
    except train.UserError as e:
        print(f"{out}: {e}")
train.torch.distributed.destroy_process_group()
"""
# the process that is not the first dies at once; torchrun then ends the first, wherever it is
KILL_THE_OTHER = """
import os, signal, sys, train
first = train.schedule
def schedule(progress, *rest):
    if progress >= 0.6 and os.environ["RANK"] == "1": os.kill(os.getpid(), signal.SIGKILL)
    return first(progress, *rest)
train.schedule = schedule
train.main(sys.argv[1:])
"""
LLAVA_2 = "--recipe llava-2 --init none --batch 8 --shard"
LONE = "--bridge flamingo --optimizer adamw --steps 4 --batch 2"  # one of the processes has no picture
RUNS = {
    "ddp": "--recipe llava-1 --steps 4 --batch 8 --accumulate 2",
    "fsdp": f"{LLAVA_2} --steps 4 --accumulate 2 --checkpoint --ema 0.9 --check-every 3",
    "lone": LONE,
    "lone-fsdp": f"{LONE} --shard",
    "whole": f"{LLAVA_2} --steps 6 --save-every 2 --bridge qformer --option dropout=0.1",
}
REFUSED = {
    "odd": "--recipe llava-1 --batch 9",
    "sets": "--batch 6 --data shapes+++shapes",
    "clip": "--recipe clip",
    "stage1": "--recipe blip2-1",
    "lm": "--recipe lm",
}


def torchrun(*argv, check: bool = True) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*start, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert not check or done.returncode == 0, done.stderr
    return done


def flags(text: str, folder: Path) -> list[str]:
    words = [w.replace("+++", " + ") for w in text.split()]
    return [*words, *QUICK, *(["--data", f"llava:{folder / 'chat.json'}:all"] if "flamingo" in words else [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All runs of two processes, and their data set of two items: a picture with a short answer, a long one without."""
    folder = tmp_path_factory.mktemp("ranks")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        folder / "a.png"
    )
    say = lambda question, answer: [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    long = " and ".join(["a small red circle at the top left"] * 6)
    items = [{"id": 0, "image": "a.png", "conversations": say("<image>\nwhat color is it?", "red")},
             {"id": 1, "conversations": say("what is there?", long)}]
    runs = {str(folder / name): flags(text, folder) for name, text in {**RUNS, **REFUSED}.items()}
    for name, text in (("worker.py", WORKER), ("kill.py", KILL_THE_OTHER), ("chat.json", json.dumps(items)),
                       ("runs.json", json.dumps(runs))):
        (folder / name).write_text(text)
    (folder / "said").write_text(torchrun(folder / "worker.py", folder / "runs.json").stdout)
    return folder


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [x["loss"] for x in log(run) if "loss" in x]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "lone", "lone-fsdp"])
def test_two_processes_equal_one(name, folder, tmp_path):
    """Losses, norms, gates, scores, weights, files; in `lone` one process has an answer of 1 word, the other of 53."""
    train.main([*(a for a in flags(RUNS[name], folder) if a != "--shard"), "--out", str(tmp_path)])
    # rtol 1e-5: the same float32 sums in another order, through 4 AdamW updates (measured: up to 3e-6)
    np.testing.assert_allclose(losses(folder / name), losses(tmp_path), rtol=1e-5)
    assert len(losses(tmp_path)) == 4
    for mine, other in zip(log(folder / name), log(tmp_path), strict=True):
        for key in set(mine) - {"gates"}:
            if key not in ("loss", "ema", "seconds") and not key.endswith("_per_s"):
                assert mine[key] == pytest.approx(other[key], rel=5e-3), key  # a norm, a gate, a score
    for file in (
        ("bridge.safetensors", "decoder/model.safetensors") if name == "fsdp" else ("bridge.safetensors",)
    ):
        mine, other = load_file(folder / name / file), load_file(tmp_path / file)
        assert mine.keys() == other.keys()
        for key, tensor in other.items():
            # AdamW divides by √v: a gradient near 0 moves a weight by up to the rate, whatever its sign (here 4 · 2e-3)
            close = (mine[key] - tensor).abs() <= 1e-4 * tensor.abs().max()
            assert close.float().mean() > 0.99 and (mine[key] - tensor).abs().max() < 8e-3, key
    facts = [
        json.loads((run / "config.json").read_text())["trained_parameters"]
        for run in (folder / name, tmp_path)
    ]
    assert facts[0] == facts[1]
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in (folder / name).iterdir()}


def test_a_run_of_two_processes_that_was_killed_resumes_to_the_same_losses_bit_for_bit(folder):
    """Slices of parameters and moments, and the random state of each process: dropout is on."""
    whole, broken = folder / "whole", folder / "broken"
    assert (
        torchrun(folder / "kill.py", *flags(RUNS["whole"], folder), "--out", broken, check=False).returncode
        != 0
    )
    assert len(losses(broken)) < 6
    torchrun("train.py", "--resume", broken)
    assert losses(broken) == losses(whole) and len(losses(whole)) == 6          # equal floats, not close ones
    for file in ("bridge.safetensors", "decoder/model.safetensors"):
        a, b = (load_file(run / file) for run in (whole, broken))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not list(broken.glob(".*"))  # what the killed save left is gone


def test_what_cannot_be_split_is_refused(folder):
    said = (folder / "said").read_text()
    for name, words in {
        "odd": "--batch 9 does not divide among 2 processes; make it a multiple of 2.",
        "sets": "--batch 6 does not divide among 2 processes of 2 data sets; make it a multiple of 4.",
        "clip": "recipe clip",
        "stage1": "recipe blip2-1",
        "lm": "recipe lm",
    }.items():
        assert f"{folder / name}: {words}" in said
    assert said.count("start it without torchrun") == 2 * 3  # by both: none waits for the other
    with pytest.raises(UserError, match="--shard slices parameters over processes"):
        train.main(["--shard", "--out", str(folder / "alone")])


def test_several_processes_say_a_mistake_once_and_exit_with_2(folder):
    done = torchrun("train.py", "--bridge", "qfomer", check=False)
    assert done.stderr.count('unknown bridge "qfomer"') == 1 and "exitcode  : 2" in done.stderr


def test_compiled_layers_train_to_the_same_losses(tmp_path, monkeypatch):
    """Traced and differentiated ahead of time, but run by PyTorch's own kernels: to generate code takes a minute."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: compile(self, backend="aot_eager", **kw)
    )
    argv = ["--bridge", "zero_init", "--steps", "3", "--batch", "4", *QUICK]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train.main([*argv, "--out", str(tmp_path / "plain")])
    train.main([*argv, "--out", str(tmp_path / "compiled"), "--compile"])
    # rtol 1e-5: a compiler may fuse and reorder float32 sums (measured: 2e-6 with generated code)
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=1e-5)
    counters = torch._dynamo.utils.counters  # layer 0, whose input asks for no gradient, and the others
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    a, b = (load_file(tmp_path / run / "bridge.safetensors") for run in ("plain", "compiled"))
    assert a.keys() == b.keys()  # its files are like any other run's
