"""Every recipe, every stage, in seconds: the loss falls, the parts that are frozen keep their bytes, the next stage starts from the last."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
from model import ViT
from support.formats.tokenizer_files import load_tokenizer
from support.worlds import open_data
import train
from model import IGNORE, IMAGE
from support.formats.llama import load_decoder
from support.formats.vision import load_vit
from support.formats.vlm import load_vlm

ROOT = Path(__file__).parents[2]
QUICK = ["--dtype", "float32", "--log-every", "1", "--eval-items", "8", "--samples", "0", "--batch", "16"]
SAME = ["--examples", "16", "--warmup", "0"]            # one batch over and over: its loss must fall
STEPS = {"lm": 8, "clip": 8, "blip2-1": 25, "frozen": 30}
ALONE = [name for name, r in train.RECIPES.items() if not r.start]


def losses(out) -> list[float]:
    return [
        x["loss"] for x in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines()) if "loss" in x
    ]


@pytest.mark.parametrize("name", ALONE)
def test_a_miniature_run_of_each_first_stage(name, tmp_path):
    r = train.RECIPES[name]
    module = train.main(
        ["--recipe", name, "--steps", str(STEPS.get(name, 20)), *SAME, "--out", str(tmp_path), *QUICK]
    )
    loss = losses(tmp_path)
    assert np.mean(loss[-2:]) < np.mean(loss[:2]), loss
    if r.task == "answer":
        towers = {"decoder": load_decoder(ROOT / "weights/decoder"), "vit": load_vit(ROOT / "weights/vit")}
        for part, fresh in towers.items():
            same = [
                torch.equal(a, b)
                for a, b in zip(getattr(module, part).state_dict().values(), fresh.state_dict().values())
            ]
            assert all(same) if part not in r.trained else not all(same), part
        saved = load_vlm(tmp_path)
        assert all(
            torch.equal(a, b) for a, b in zip(module.state_dict().values(), saved.state_dict().values())
        )


@pytest.mark.parametrize("system", train.SYSTEMS)
def test_a_system_runs_through_its_stages_and_each_starts_from_the_last(system, tmp_path):
    train.main(["--recipe", system, "--steps", "12", *SAME, "--out", str(tmp_path), *QUICK])
    first, second = (tmp_path / stage for stage in train.SYSTEMS[system])
    settings = json.loads((second / "config.json").read_text())["settings"]
    assert settings["init"] == str(first) and settings["recipe"] == train.SYSTEMS[system][1]
    assert all(losses(out)[-1] < losses(out)[0] for out in (first, second))
    if system == "blip2":
        a = load_file(first / "stage1.safetensors")
        assert {"temperature", "match_head.weight", "qformer.words.weight"} <= a.keys() and not any(
            n.startswith("vit.") for n in a
        )
    if system.startswith("llava"):  # the second stage moved the decoder and took it along
        assert not torch.equal(
            load_decoder(second / "decoder").embed.weight, load_decoder(ROOT / "weights/decoder").embed.weight
        )


def test_stage_two_begins_exactly_where_stage_one_ended(tmp_path):
    train.main(["--recipe", "llava-1", "--steps", "2", "--out", str(tmp_path / "1"), *QUICK])
    module = train.main(
        [
            "--recipe",
            "llava-2",
            "--init",
            str(tmp_path / "1"),
            "--steps",
            "1",
            "--lr",
            "0",
            "--out",
            str(tmp_path / "2"),
            *QUICK,
        ]
    )
    theirs = load_file(tmp_path / "1" / "bridge.safetensors")
    assert all(torch.equal(p, theirs[n]) for n, p in module.bridge.state_dict().items())
    train.main(["--recipe", "blip2-1", "--steps", "2", "--out", str(tmp_path / "3"), *QUICK])
    stage = load_vlm(tmp_path / "3")  # the first stage opens again as it was trained
    assert all(
        torch.equal(p, load_file(tmp_path / "3" / "stage1.safetensors")[n])
        for n, p in stage.state_dict().items()
        if not n.startswith("vit.")
    )
    assert torch.equal(stage.vit.positions, load_vit(ROOT / "weights/vit").positions)
    module = train.main(
        [
            "--recipe",
            "blip2-2",
            "--init",
            str(tmp_path / "3"),
            "--steps",
            "1",
            "--lr",
            "0",
            "--out",
            str(tmp_path / "4"),
            *QUICK,
        ]
    )
    theirs = load_file(tmp_path / "3" / "stage1.safetensors")
    shared = [n for n, _ in module.bridge.named_parameters() if not n.startswith("project.")]
    assert len(shared) > 20 and all(
        torch.equal(module.bridge.state_dict()[n], theirs[f"qformer.{n}"]) for n in shared
    )


def test_the_weighted_sum_of_two_data_sets_is_what_flamingo_writes(tmp_path):
    """Σ_m λ_m E_m: the loss of a mixture equals the weighted sum of the losses on each half of its batch (rtol: float32 sums)."""
    run = lambda spec, batch, out: (
        train.main(
            [
                "--bridge",
                "mapl",
                "--data",
                spec,
                "--steps",
                "1",
                "--lr",
                "0",
                *QUICK,
                "--batch",
                str(batch),
                "--out",
                str(tmp_path / out),
            ]
        ),
        losses(tmp_path / out)[0],
    )[1]
    mixed, first, second = (
        run("shapes + shapes-pages * 0.2", 16, "m"),
        run("shapes", 8, "a"),
        run("shapes-pages", 8, "b"),
    )
    np.testing.assert_allclose(mixed, first + 0.2 * second, rtol=1e-5)


def test_an_interleaved_page_is_learned_chunk_by_chunk_with_a_stop_after_each():
    tokenizer = load_tokenizer(ROOT / "weights/decoder")
    item = open_data("shapes-pages").item(1, turns=5)
    d = data.training_document(item, tokenizer)
    pictures = d.tokens.count(IMAGE)
    assert 2 <= pictures <= 4 and pictures == len(item.pictures) == d.tokens.count(tokenizer.eos)
    learned = [t for t, l in zip(d.tokens, d.labels) if l != IGNORE]
    assert IMAGE not in learned and tokenizer.decode(learned).count("\n") == pictures


@pytest.mark.parametrize(
    "flags",
    [
        ["--pack"],
        ["--accumulate", "4"],
        ["--checkpoint"],
        ["--workers", "2"],
        ["--cache", "CACHE"],
        ["--pack", "--accumulate", "2", "--checkpoint"],
    ],
    ids=" ".join,
)
def test_what_changes_memory_or_speed_does_not_change_the_losses(flags, tmp_path):
    run = [
        "--bridge",
        "mapl",
        "--optimizer",
        "adamw",
        "--lr",
        "1e-3",
        "--steps",
        "4",
        "--examples",
        "24",
        *QUICK,
    ]
    flags = [str(tmp_path / "cache") if f == "CACHE" else f for f in flags]
    train.main([*run, "--out", str(tmp_path / "plain")])
    train.main([*run, *flags, "--out", str(tmp_path / "other")])
    # rtol 2e-5: the same float32 sums in another order, through four updates (not by Muon, which rounds to bfloat16 inside)
    np.testing.assert_allclose(losses(tmp_path / "other"), losses(tmp_path / "plain"), rtol=2e-5)


def test_cached_features_are_read_back_bit_for_bit_and_no_picture_is_computed_twice(tmp_path, monkeypatch):
    run = [
        "--bridge",
        "linear",
        "--steps",
        "6",
        "--examples",
        "32",
        *QUICK,
        "--cache",
        str(tmp_path / "cache"),
    ]
    looked = []
    forward = ViT.forward
    monkeypatch.setattr(
        ViT,
        "forward",
        lambda self, pixels, *a, **k: looked.append(len(pixels)) or forward(self, pixels, *a, **k),
    )
    train.main([*run, "--out", str(tmp_path / "a")])
    training = 32  # 6 batches of 16 from 32 pictures
    assert sum(looked[:2]) == training and all(
        n in (8, 16) for n in looked
    )  # then only the final tables (8 pictures each)
    looked.clear()
    train.main([*run, "--out", str(tmp_path / "b")])
    assert 16 not in looked  # a second run computes none of them again
    assert losses(tmp_path / "a")[2:] == losses(tmp_path / "b")[2:] and losses(tmp_path / "a") == losses(
        tmp_path / "b"
    )
    files = list((tmp_path / "cache").glob("*.features"))
    other = train.main(
        ["--bridge", "linear", "--option", "reads=-1", *run[2:], "--out", str(tmp_path / "c")]
    )
    assert (
        len(list((tmp_path / "cache").glob("*.features"))) == len(files) + 1
    )  # another hidden state has a file of its own


def test_the_mean_of_the_parameters_is_what_is_saved_and_survives_a_resume(tmp_path):
    run = ["--bridge", "linear", "--lr", "0.05", "--warmup", "0", "--schedule", "constant", *QUICK]
    plain = (
        train.main([*run, "--steps", "3", "--out", str(tmp_path / "plain")])
        .bridge.map.weight.detach()
        .clone()
    )
    mean = (
        train.main([*run, "--steps", "3", "--ema", "0.5", "--out", str(tmp_path / "mean")])
        .bridge.map.weight.detach()
        .clone()
    )
    path = []
    for n in range(4):
        path.append(
            train.main(
                [*run, "--steps", "3", "--examples", "48", "--out", str(tmp_path / f"p{n}"), "--lr", "0"]
            )
            .bridge.map.weight.detach()
            .clone()
            if n == 0
            else train.main([*run, "--steps", str(n), "--out", str(tmp_path / f"p{n}")])
            .bridge.map.weight.detach()
            .clone()
        )
    expected = path[0]
    for step in path[1:]:
        expected = expected.lerp(step, 0.5)                                     # m ← ½ m + ½ θ
    assert torch.allclose(mean, expected, atol=1e-7) and not torch.allclose(mean, plain)
    state = load_file(tmp_path / "mean" / "state.safetensors")
    assert torch.equal(state["mean.bridge.map.weight"], mean) and torch.equal(
        state["parameter.bridge.map.weight"], plain
    )
