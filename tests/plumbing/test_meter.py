"""Operations are counted as they run, and an unknown card promises nothing."""
from __future__ import annotations

import shlex
import shutil
import sys
import time

import pytest
import torch
from conftest import tiny_vlm
from PIL import Image

import data
import eval as evaluation
import train
from model import IGNORE, IMAGE
from support.formats.files import UserError
from support.plumbing.meter import (Meter, Progress, count_flops, count_positions, next_commands, peak_flops,
                                    report_end, report_saved, show_rest, track)


@pytest.mark.parametrize("learning, factor", [(("bridge",), 4), (("bridge", "decoder"), 6)])
def test_a_frozen_decoder_counts_four_operations_per_parameter_and_position_and_a_trained_one_six(learning,
                                                                                                  factor):
    """The products with its matrices: forward and gradients of the activations, 2 + 2; gradients of the
    weights, 2.

    2 %: the bridge's own, and in the lowest layer the gradient of the embeddings.
    """
    vlm = tiny_vlm("linear")
    for part, module in vlm.named_children():
        module.requires_grad_(part in learning)
    B, T = 3, 10
    tokens = torch.randint(1, 61, (B, T))
    tokens[:, 2] = IMAGE
    labels = torch.where(torch.arange(T) > 6, tokens, IGNORE)
    features = torch.randn(B, 9, 20)
    counted = count_flops(lambda: vlm.loss(tokens, labels, features=features)[0], vlm)
    P = count_positions(dict(tokens=tokens, labels=labels), 9)
    assert P == B * (T + 8)
    c = vlm.decoder.config
    matrices = sum(p.numel() for n, p in vlm.decoder.named_parameters() if p.ndim == 2 and "layers" in n)
    # two products, once forward and twice backward
    attention = 3 * 4 * c.layers * B * (T + 8) ** 2 * c.heads * c.head_width
    head = factor * c.width * c.vocab_size * B * 3      # at the three supervised positions of each row
    bridge = 4 * 20 * 32 * B * 9                        # forward and weights; features need no gradient
    assert abs(counted - factor * matrices * P - attention - head - bridge) <= 0.02 * counted
    assert all(p.grad is None for p in vlm.parameters())


def test_an_unknown_card_has_no_utilisation(monkeypatch):
    assert peak_flops(torch.device("cpu")) == 0
    gpu = torch.device("cuda:1")
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA L4", 121e12), ("L4", 121e12),
                       ("NVIDIA L40", 0), ("NVIDIA H100 NVL", 0), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 0),
                       ("NVIDIA GH200 480GB", 0), ("NVIDIA GeForce RTX 4090 Laptop GPU", 0)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert peak_flops(gpu) == peak, name
    meter = Meter(10, flops=1e6, K=9)
    meter.add([dict(tokens=torch.zeros(2, 5), count=3)])
    rates = meter.rates(torch.device("cpu"))
    assert rates["tflop_per_s"] > 0 and "mfu" not in rates


def test_rates_ask_the_gpu_of_the_run(monkeypatch):
    asked, gpu = [], torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: asked.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: asked.append(device) or 1e9)
    assert Meter(10).rates(gpu)["memory_gb"] == 1 and asked == [gpu, gpu]


@pytest.mark.parametrize("pictures, images", [
    (dict(features=torch.zeros(5, 9, 20)), 5), (dict(pixels=torch.zeros(3, 3, 8, 8)), 3),
    (dict(features=torch.zeros(0, 9, 20)), 0), (dict(), 2)])
def test_pictures_are_counted_not_rows_of_tokens(pictures, images, monkeypatch):
    """--pack puts several in a row, a page holds several, a text none; codes of pictures are a row each."""
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    meter = Meter(10, processes=2)
    meter.add([dict(tokens=torch.zeros(2, 5), count=3, **pictures)])
    assert meter.images == 2 * images


def test_the_line_of_progress_fits_into_120_characters():
    x = dict(step=99999, loss=12.345, ema=12.345, grad_norm=123.45, gate=0.123, lr=1e-4,
             learned_per_s=123456.0,
             tokens_per_s=1234567.0, memory_gb=79.9)
    assert len(metered(100000, 99999, 60.0).line(x)) <= 135     # the widest numbers of a run of a day
    x = dict(step=120, loss=1.842, ema=1.901, grad_norm=0.74, lr=9.8e-4, learned_per_s=4100.0,
             tokens_per_s=31200.0)
    line = metered(1200, 120, 0.5).line(x)
    assert "step    120/1200  10%  loss 1.842 (ema 1.901)" in line and "eta 9m00s, " in line
    assert len(line) <= 120


def metered(steps: int, done: int, seconds: float, warm: float = 30.0) -> Meter:
    """A meter after `done` steps: the first took `warm` seconds, each other one `seconds`."""
    meter = Meter(steps)
    with pytest.MonkeyPatch.context() as m:
        clock = iter([warm + seconds * n for n in range(done)])
        m.setattr("time.monotonic", lambda: next(clock))
        for step in range(1, done + 1):
            meter.done(step)
    return meter


def test_the_first_step_is_no_measure_of_the_others():
    """It warms up kernels and caches, and may take as long as a hundred of the others."""
    assert metered(1000, 1, 0.1).eta() == "eta -"
    assert metered(1000, 2, 0.1).eta().startswith("eta 1m40s, ")
    assert metered(1000, 50, 0.1).eta().startswith("eta 1m35s, ")
    assert metered(10_000, 10_000, 0.1).eta().startswith("eta 0m00s, ")
    assert "0.10 s a step: 1m38s, " in metered(1000, 20, 0.1).forecast(torch.device("cpu"))


def test_a_resumed_run_measures_its_own_steps():
    meter = Meter(1000)
    with pytest.MonkeyPatch.context() as m:
        clock = iter([7.0, 9.0])
        m.setattr("time.monotonic", lambda: next(clock))
        meter.done(501)
        meter.done(502)
    assert meter.seconds_per_step == 2.0 and meter.eta().startswith("eta 16m36s, ")


def test_a_rest_has_a_clock_time_and_beyond_today_a_day(monkeypatch):
    noon = time.mktime((2026, 3, 4, 12, 0, 0, 0, 0, -1))
    monkeypatch.setattr("time.time", lambda: noon)
    assert show_rest(161.4) == "2m41s, 12:02" and show_rest(7500) == "2h05m, 14:05"
    assert show_rest(50 * 3600) == "50h00m, Fri 14:00"


def test_long_work_says_how_far_it_is_and_short_work_says_nothing(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    for seconds, lines in ((0.1, 0), (4.0, 3)):
        for n, element in enumerate(track([*"abcdefghij"], "texts")):
            assert element == "abcdefghij"[n]
            now[0] += seconds
        said = capsys.readouterr()
        assert said.out == "" and len(said.err.splitlines()) == lines
    assert said.err.startswith("texts  3/10  30%  eta 0m28s, ")


def test_a_pipe_hears_of_a_slow_run_every_ten_seconds(tmp_path, monkeypatch, capsys):
    """Between two lines of the log: how far it is. A line that is due says it itself."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    meter = Meter(100)
    progress = Progress(tmp_path / "log.jsonl", meter)
    for step in range(1, 22):
        now[0] += 4
        due = progress.step(step, [], torch.device("cpu"), 10)
        assert due == (step in (1, 10, 20))
        if due:
            progress.write({"step": step}, f"line {step}")
    shown = [line.split("  eta")[0].split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["line 1", "step      4/100   4%", "step      7/100   7%", "line 10",
                     "step     13/100  13%", "step     16/100  16%", "step     19/100  19%",
                     "forecast 4.00 s a step", "line 20"]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3             # the log keeps its steps


def test_the_end_of_a_run_names_two_commands_that_exist(untrained_run, tmp_path, capsys):
    out = tmp_path / "a run"
    shutil.copytree(untrained_run, out)
    Image.fromarray(data.Shapes().item(0).image).save(out / "first.png")
    report_end(out)
    first, second = (line[9:] for line in capsys.readouterr().out.splitlines()[1:])
    assert first == f"python eval.py chat '{out}' --image '{out}/first.png'" and " look " in second
    evaluation.main(shlex.split(second)[2:])
    assert (out / "look" / "words.png").exists()
    for name in ("vit", "decoder"):
        (tmp_path / "lm" / name).mkdir(parents=True)
    commands = next_commands(tmp_path / "lm")
    assert commands[0] == f"python eval.py chat {tmp_path}/lm/decoder" and len(commands) > 2
    assert len(next_commands(tmp_path)) == 2                        # also of a run that nobody can ask
    report_saved(tmp_path, 60, 90.0)
    assert "trained  60 steps in 1.5 minutes\nsaved    " in capsys.readouterr().out


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for start in (0, 2):                                # step 3 is written again after a resume
        progress = Progress(tmp_path / "log.jsonl", Meter(4), start, board=True)
        for step in range(start + 1, 4):
            progress.write({"step": step, "loss": start + step / 2, "gates": [[1.0]]}, "")
        progress.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 3.5)]


def test_without_the_package_tensorboard_is_one_sentence_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        train.main(["--tensorboard", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
