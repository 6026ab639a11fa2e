"""The loop does what it says: frozen bytes stay, accumulation changes nothing, a killed run goes on to the same bits,
a mistake is one sentence, and every bridge learns to see more than its blind twin."""
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from support.formats.checkpoint import Checkpoint
from support.plumbing.log import rewind_log
from support.plumbing.meter import Meter, count_flops, count_positions, peak_flops
from support.plumbing.ranks import Ranks
from support.plumbing.state import load_state
from support.worlds.text import shapes_tokenizer
import eval as evaluation
import train
from papers import ALL_BRIDGES
from conftest import tiny_vlm
from model import IGNORE, IMAGE
from support.formats.files import UserError
from support.formats.llama import load_decoder
from support.formats.vision import load_vit
from support.formats.vlm import load_vlm

ROOT = Path(__file__).parent.parent
QUICK = ["--dtype", "float32", "--log-every", "1", "--eval-items", "4", "--samples", "0"]


def losses(out) -> dict[int, float]:
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return {x["step"]: x["loss"] for x in lines if "loss" in x}


def command(*argv, code: str | None = None, check: bool = True) -> subprocess.CompletedProcess:
    start = [sys.executable, "-c", code] if code else [sys.executable, "train.py"]
    done = subprocess.run([*start, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("bridge", ALL_BRIDGES)
def test_frozen_towers_keep_their_bytes_and_the_bridge_moves(bridge, tmp_path):
    module = train.main(["--bridge", bridge, "--steps", "3", "--batch", "8", "--out", str(tmp_path), *QUICK])
    towers = {"decoder": load_decoder(ROOT / "weights/decoder"), "vit": load_vit(ROOT / "weights/vit")}
    for tower, fresh in (
        (getattr(module, n), t) for n, t in towers.items() if n not in train.RECIPES[bridge].trained
    ):
        for (name, a), b in zip(tower.state_dict().items(), fresh.state_dict().values()):
            assert torch.equal(a, b), name
    saved = load_vlm(tmp_path)
    for (name, a), b in zip(module.bridge.state_dict().items(), saved.bridge.state_dict().values()):
        assert torch.equal(a, b), name                      # what was trained is what is on disk
    assert {p.name for p in tmp_path.iterdir()} - {
        "vit",
        "loss.png",
        "gates.png",
    } == {  # the curves only where matplotlib is installed
        "bridge.safetensors",
        "config.json",
        "first.png",
        "log.jsonl",
        "results.json",
        "samples.html",
        "state.safetensors",
    }


def test_finetune_trains_the_decoder_and_writes_it_into_the_run(tmp_path):
    module = train.main(
        [
            "--recipe",
            "llava-2",
            "--init",
            "none",
            "--steps",
            "3",
            "--batch",
            "8",
            "--out",
            str(tmp_path),
            *QUICK,
        ]
    )
    fresh = load_decoder(ROOT / "weights/decoder")
    assert not torch.equal(module.decoder.layers[0].mlp.up.weight, fresh.layers[0].mlp.up.weight)
    vlm, tokenizer, _ = evaluation.open_run(str(tmp_path), "cpu")  # and the run can be asked on its own
    assert torch.equal(vlm.decoder.layers[0].mlp.up.weight, module.decoder.layers[0].mlp.up.weight)
    assert tokenizer.encode(" circle") == shapes_tokenizer().encode(" circle")


def test_accumulation_equals_one_large_batch_with_answers_of_unequal_length(tmp_path):
    runs = [tmp_path / str(n) for n in (1, 3)]
    for n, out in zip((1, 3), runs):
        train.main(
            [
                "--bridge",
                "mlp",
                "--steps",
                "4",
                "--batch",
                "8",
                "--accumulate",
                str(n),
                "--out",
                str(out),
                *QUICK,
            ]
        )
    a, b = map(losses, runs)
    # rtol 1e-5: the same float32 sums in another order, through four AdamW updates
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)


def test_gates_open_and_are_logged(tmp_path):
    for bridge in ("zero_init", "flamingo"):
        train.main(["--bridge", bridge, "--steps", "3", "--batch", "8", "--out", str(tmp_path), *QUICK])
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert lines[-1]["gate"] > 0 and np.abs(lines[-1]["gates"]).max() > 0


RUN = [
    "--bridge",
    "qformer",
    "--steps",
    "12",
    "--batch",
    "4",
    "--save-every",
    "4",
    "--option",
    "dropout=0.1",
    *QUICK,
]  # dropout: random state counts
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
import os, signal, sys, model, train
rename, count = os.replace, 0
def replace(a, b):
    global count
    count += str(b).endswith("state.safetensors")
    if count == 2: os.kill(os.getpid(), signal.SIGKILL)
    rename(a, b)
model.os.replace = replace
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("code", [KILL_IN_A_STEP, KILL_IN_A_SAVE], ids=["step", "save"])
def test_a_killed_run_resumes_to_the_same_losses_bit_for_bit(code, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command(*RUN, "--out", whole)
    assert command(*RUN, "--out", broken, code=code, check=False).returncode == -signal.SIGKILL
    command("--resume", broken)
    assert losses(broken) == losses(whole) and len(losses(whole)) == 12  # equal floats, not close ones
    a, b = (
        load_file(out / "bridge.safetensors") for out in (whole, broken)
    )  # not the file: its header's entries have no fixed order
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_log_line_cut_off_by_a_crash_is_dropped_and_a_run_without_a_state_says_so(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 9, "loss": 1.0}\n{"step": 3, "lo')
    rewind_log(tmp_path / "log.jsonl", 4)
    assert losses(tmp_path) == {1: 2.0}
    with pytest.raises(UserError, match="no state was saved"):
        load_state(Ranks(train.Settings()), tmp_path, [], [], {})


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    done = command(
        "--bridge",
        "linear",
        "--steps",
        "30",
        "--batch",
        "4",
        "--lr",
        "1e37",
        "--warmup",
        "0",
        "--out",
        tmp_path,
        *QUICK,
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "not finite at step" in done.stderr and "items " in done.stderr and "state.safetensors" in done.stderr
    )
    state = Checkpoint(tmp_path / "state.safetensors")
    assert all(torch.isfinite(state.get(n)).all() for n in state.where if n.startswith("parameter."))


@pytest.mark.parametrize("argv, words", [
    (["--bridge", "qfomer"], ['unknown bridge "qfomer"', 'did you mean "qformer"', "flamingo"]),
    (["--bridge", "mapl", "--option", "widht=3"], ['no option "widht"', '"width"']),
    (["--option", "width"], ["name=value"]),
    (["--recipe", "lava-1"], ['unknown recipe "lava-1"', 'did you mean "llava-1"']),
    (["--recipe", "llava-2"], ["starts from a run of llava-1", "--init none"]),
    (["--bridge", "flamingo", "--scale", "paper"], ["batch of flamingo is not in our sources", "--batch"]),
    (["--scale", "papre"], ['unknown scale "papre"', "paper"]),
    (["--data", "shapes + shapes * two"], ['weight "two"', "SPEC * 0.2"]),
    (["--batc", "3"], ['unknown argument "--batc"', 'did you mean "--batch"']),
    (["--steps", "many"], ["--steps", "many"]),
    (["--steps", "0"], ["--steps 0", "at least 1"]),
    (["--lm", "no/such/folder"], ["no/such/folder: no such folder"]),
    (["--resume", "no/such/run"], ["no/such/run", "no such file"]),
    (["--data", "shaps"], ["shaps", "shapes"]),
    (["--data", "shapes:tset"], ["tset", "test"]),
    (["--dtype", "float8"], ["float8", "bfloat16"]),
], ids=lambda x: " ".join(x) if isinstance(x, list) and x[0].startswith("--") else "")
def test_a_mistake_is_one_sentence(argv, words, tmp_path):
    with pytest.raises(UserError) as e:
        train.main([*argv, *([] if "--resume" in argv else ["--out", str(tmp_path)])])
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_the_command_line_prints_that_sentence_and_exits_with_2():
    done = command("--bridge", "qfomer", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_list_prints_every_recipe_with_the_papers_numbers_beside_ours():
    text = command("--list").stdout
    assert all(f"\n{name}" in "\n" + text for name in train.RECIPES)
    assert text.count("    paper  ") == text.count("    toy    ") == len(train.RECIPES)


def test_a_decoder_with_a_broken_file_is_refused_by_name(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((ROOT / "weights/decoder" / name).read_bytes())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="truncated"):
        train.main(["--lm", str(tmp_path), "--out", str(tmp_path / "run")])


def test_the_schedule_warms_up_and_falls_to_its_floor():
    assert train.schedule(0.0, 0.1) == 0.02 and train.schedule(0.05, 0.1) == 0.5
    assert math.isclose(train.schedule(0.1, 0.1), 1.0) and math.isclose(train.schedule(1.0, 0.1), 0.02)


# A miniature run per bridge, on the two bundled towers: seconds each, and already far from blind.
MINIATURE = dict(
    linear=250, mlp=250, frozen=250, mapl=200, qformer=200, zero_init=200, flamingo=250, idefics=250
)


@pytest.mark.parametrize("bridge", ALL_BRIDGES)
def test_a_miniature_run_beats_its_blind_twin(bridge, tmp_path):
    train.main(
        [
            "--bridge",
            bridge,
            "--steps",
            str(MINIATURE[bridge]),
            "--batch",
            "32",
            "--log-every",
            "20",
            "--eval-items",
            "100",
            "--samples",
            "0",
            "--out",
            str(tmp_path),
        ]
    )
    first, *_, last = losses(tmp_path).values()
    assert last < 0.7 * first
    rows = {r["row"].split(", ")[-1]: r for r in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert rows["held-out"]["mean"] > rows["blind"]["mean"] + 0.05, (
        rows
    )  # 5 points on 400 questions: 2 standard errors
    assert rows["held-out"]["cider"] > rows["blind"]["cider"], rows


def test_a_run_whose_bridge_lies_in_bfloat16_loads_as_asked(tmp_path):
    """None means float32 for the bridge as for the towers, and bfloat16 all of the three."""
    folder = Path(train.HERE) / "notebooks" / "runs" / "linear"
    assert {v.dtype for v in load_file(folder / "bridge.safetensors").values()} == {torch.bfloat16}
    for asked, dtype in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        vlm = load_vlm(folder, dtype=asked)
        assert {p.dtype for p in vlm.parameters()} == {dtype}
        assert vlm(torch.tensor([[3, IMAGE, 5]]), torch.zeros(1, 3, 48, 48, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("learning, factor", [(("bridge",), 4), (("bridge", "decoder"), 6)])
def test_a_frozen_decoder_counts_four_operations_per_parameter_and_position_and_a_trained_one_six(
    learning, factor
):
    """The products with its matrices: forward and gradients of the activations, 2 + 2; gradients of the weights, 2 more.
    2 %: the bridge's own, and in the lowest layer the gradient of the embeddings."""
    vlm = tiny_vlm("linear")
    for part, module in vlm.named_children():
        module.requires_grad_(part in learning)
    B, T = 3, 10
    tokens = torch.randint(1, 61, (B, T))
    tokens[:, 2] = IMAGE
    labels = torch.where(torch.arange(T) > 6, tokens, IGNORE)
    features = torch.randn(B, 9, 20)
    counted = count_flops(lambda: vlm.loss(tokens, labels, features=features)[0], vlm)
    piece = dict(tokens=tokens, labels=labels)
    P = count_positions(piece, 9)
    assert P == B * (T + 8)
    c = vlm.decoder.config
    matrices = sum(p.numel() for n, p in vlm.decoder.named_parameters() if p.ndim == 2 and "layers" in n)
    attention = (
        3 * 4 * c.layers * B * (T + 8) ** 2 * c.heads * c.head_width
    )  # two products, once forward and twice backward
    head = factor * c.width * c.vocab_size * B * 3  # at the three supervised positions of each row
    expected = factor * matrices * P + attention + head
    bridge = 4 * 20 * 32 * B * 9  # forward and weights; features need no gradient
    assert abs(counted - expected - bridge) <= 0.02 * counted
    assert all(p.grad is None for p in vlm.parameters())


def test_what_is_computed_twice_to_save_memory_is_not_more_work(tmp_path):
    """--checkpoint leaves the operations of a step as they are; with cached features the ViT's own forward is not among them."""

    def work(*flags):
        s = train.with_recipe(train.settings_from(["--bridge", "linear", *flags])[0], "linear")
        task = train.AnswerTask(s, train.RECIPES["linear"], Ranks(s))
        task.freeze(("bridge",), torch.float32)
        return task.work()
    assert work() == work("--checkpoint") > work("--cache", str(tmp_path)) > 0


def test_an_unknown_card_has_no_utilisation():
    assert peak_flops(torch.device("cpu")) == 0
    meter = Meter(10, 0, 1e6, 9)
    meter.add([dict(tokens=torch.zeros(2, 5), count=3)])
    rates = meter.rates(torch.device("cpu"))
    assert rates["tflop_per_s"] > 0 and "mfu" not in rates


def test_counting_operations_counts_no_document_as_cut_and_takes_no_more_rows_than_a_step(monkeypatch):
    s = train.with_recipe(
        train.settings_from(["--bridge", "linear", "--batch", "4", "--accumulate", "2", "--longest", "24"])[
            0
        ],
        "linear",
    )
    task = train.AnswerTask(s, train.RECIPES["linear"], Ranks(s))
    task.freeze(("bridge",), torch.float32)
    rows, piece = [], task.piece
    monkeypatch.setattr(task, "piece", lambda lessons, *a: rows.append(len(lessons)) or piece(lessons, *a))
    assert task.work() > 0 and task.cut == 0 and rows == [2]
    task.read(0)
    assert task.cut == 4  # all are longer than 24; each is counted once
