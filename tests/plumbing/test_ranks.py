"""Several processes do what one does: DDP and FSDP2 over gloo give the losses and weights of one process,
whatever each of them reads. A killed run goes on to the same bits; what cannot be split is refused; compiled
layers train to the same losses."""
from __future__ import annotations

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
from support.plumbing.log import read_log
from model import DecoderConfig
from support.plumbing.ranks import Ranks, prefetch

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
ONE_PICTURE = "--bridge flamingo --optimizer adamw --steps 4 --batch 2"  # one of the processes has no picture
RUNS = {
    "ddp": "--recipe llava-1 --steps 4 --batch 8 --accumulate 2",
    "fsdp": f"{LLAVA_2} --steps 4 --accumulate 2 --checkpoint --ema 0.9 --check-every 3",
    "uneven": ONE_PICTURE,
    "uneven-fsdp": f"{ONE_PICTURE} --shard",
    "unbroken": f"{LLAVA_2} --steps 6 --save-every 2 --bridge qformer --option dropout=0.1",
}
REFUSED = {
    "odd": "--recipe llava-1 --batch 9",
    "sets": "--batch 6 --data shapes+++shapes",
    "names": "--recipe limber-names",
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
    """All runs of two processes. Their data set: a picture with a short answer, a long answer without one."""
    folder = tmp_path_factory.mktemp("ranks")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png")

    def turns(question: str, answer: str) -> list[dict]:
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    long = " and ".join(["a small red circle at the top left"] * 6)
    items = [{"id": 0, "image": "a.png", "conversations": turns("<image>\nwhat color is it?", "red")},
             {"id": 1, "conversations": turns("what is there?", long)}]
    runs = {str(folder / name): flags(text, folder) for name, text in {**RUNS, **REFUSED}.items()}
    for name, text in (("worker.py", WORKER), ("kill.py", KILL_THE_OTHER), ("chat.json", json.dumps(items)),
                       ("runs.json", json.dumps(runs))):
        (folder / name).write_text(text)
    (folder / "output.txt").write_text(torchrun(folder / "worker.py", folder / "runs.json").stdout)
    return folder


def log(run: Path) -> list[dict]:
    return read_log(run / "log.jsonl")


def losses(run: Path) -> list[float]:
    return [x["loss"] for x in log(run) if "loss" in x]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp", "uneven", "uneven-fsdp"])
def test_two_processes_equal_one(name, folder, tmp_path):
    """Losses, norms, gates, scores, weights, files. The answers of `uneven` have 1 word and 53 words."""
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
            # AdamW divides by √v: a gradient near 0 moves a weight by up to the rate (here 4 · 2e-3)
            close = (mine[key] - tensor).abs() <= 1e-4 * tensor.abs().max()
            assert close.float().mean() > 0.99 and (mine[key] - tensor).abs().max() < 8e-3, key
    facts = [
        json.loads((run / "config.json").read_text())["trained_parameters"]
        for run in (folder / name, tmp_path)
    ]
    assert facts[0] == facts[1]
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in (folder / name).iterdir()}


@pytest.mark.slow
def test_a_run_of_two_processes_that_was_killed_resumes_to_the_same_losses_bit_for_bit(folder):
    """Slices of parameters and moments, and the random state of each process: dropout is on."""
    unbroken, broken = folder / "unbroken", folder / "broken"
    assert (
        torchrun(folder / "kill.py", *flags(RUNS["unbroken"], folder), "--out", broken,
                 check=False).returncode
        != 0
    )
    assert len(losses(broken)) < 6
    torchrun("train.py", "--resume", broken)
    assert losses(broken) == losses(unbroken) and len(losses(unbroken)) == 6    # equal floats, not close ones
    for file in ("bridge.safetensors", "decoder/model.safetensors"):
        a, b = (load_file(run / file) for run in (unbroken, broken))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not list(broken.glob(".*"))  # what the killed save left is gone


@pytest.mark.slow
def test_what_cannot_be_split_is_refused(folder):
    output = (folder / "output.txt").read_text()
    for name, words in {
        "odd": "--batch 9 does not divide among 2 processes; make it a multiple of 2.",
        "sets": "--batch 6 does not divide among 2 processes of 2 data sets; make it a multiple of 4.",
        "names": "recipe limber-names",
        "lm": "recipe lm",
    }.items():
        assert f"{folder / name}: {words}" in output
    assert output.count("start it without torchrun") == 2 * 2  # by both: none waits for the other
    with pytest.raises(UserError, match="--shard slices parameters over processes"):
        train.main(["--shard", "--out", str(folder / "one")])


@pytest.mark.slow
def test_several_processes_say_a_mistake_once_and_exit_with_2(folder):
    done = torchrun("train.py", "--bridge", "qfomer", check=False)
    assert done.stderr.count('unknown bridge "qfomer"') == 1 and "exitcode  : 2" in done.stderr


@pytest.mark.slow
def test_compiled_layers_train_to_the_same_losses(tmp_path, monkeypatch):
    """Traced and differentiated ahead of time, but run by PyTorch's own kernels: no minute of compiling."""
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


def test_one_process_scales_every_piece_by_its_data_set(monkeypatch):
    """λ_m ÷ the supervised tokens of data set m in the whole update."""
    pieces = [dict(set=0, weight=1.0, count=3), dict(set=1, weight=0.2, count=4),
              dict(set=0, weight=1.0, count=5)]
    assert Ranks("cpu").loss_scales(pieces) == [1 / 8, 0.2 / 4, 1 / 8]
    apple, asked, zeros = Ranks("cpu"), [], torch.zeros
    apple.device = torch.device("mps")
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: asked.append((dtype, device)) or zeros(n))
    assert apple.loss_scales(pieces)[0] == 1 / 8 and asked == [(torch.float32, apple.device)]


def double(step: int) -> list[dict]:
    return [{"step": 2 * step}]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_arrive_in_order_from_any_step_on(workers):
    batches = prefetch(double, 5, workers, pin=False)
    assert [next(batches)[0]["step"] for _ in range(3)] == [10, 12, 14]


def refused(step: int) -> list[dict]:
    if step == 6:
        raise UserError("cat.jpg: not a picture.")
    if step == 7:
        DecoderConfig(heads=3, kv_heads=2)              # the math refuses this number
    return [{"step": step}]


@pytest.mark.parametrize("first, message", [(5, "cat.jpg: not a picture."),
                                            (7, "3 query heads cannot share")])
def test_a_mistake_in_a_reader_process_is_the_same_sentence(first, message):
    batches = prefetch(refused, first, 1, pin=False)
    with pytest.raises(UserError) as e:
        next(batches), next(batches)
    assert str(e.value).startswith(message) and "\n" not in str(e.value)


def test_a_command_of_one_process_does_not_load_the_library_of_slices():
    """It would be a second more for every command."""
    code = "import sys, train; print('torch.distributed.fsdp' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
