"""Every recipe, every stage, in seconds: the loss falls, frozen parts keep their bytes, a stage starts from
the last.

The six bridges' own recipes run in tests/test_train.py.
"""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import train
from model import ACTIVATIONS, DecoderConfig, IGNORE, IMAGE
from papers import ALL_BRIDGES
from papers.llama_adapter import ZeroInitV1
from papers.systems import print_recipes
from support.formats.llama import load_decoder
from support.formats.tokenizer_files import load_tokenizer
from support.formats.vision import load_vit
from support.formats.vlm import load_vlm
from support.plumbing.log import read_log
from support.worlds import open_data

ROOT = Path(__file__).parents[2]
QUICK = ["--dtype", "float32", "--log-every", "1", "--eval-items", "8", "--samples", "0", "--batch", "16"]
SAME = ["--examples", "16", "--warmup", "0"]            # one batch over and over: its loss must fall
STILL = ["--lr", 1e-30]                                 # an update moves a zero by 1e-30, and nothing else
STEPS = {"lm": 8, "clip": 8, "clip-text": 8, "vq": 8, "dvae": 8, "blip2-1": 25,
         "visualbert": 8, "vilbert": 8, "vilt": 8, "albef": 10, "coca": 10, "cm3": 10, "simvlm": 10,
         "fpt": 10}
ABLATIONS = {f"{r.bridge}-{arm}" for r in train.RECIPES.values() for arm in ("frozen", "tuned")}
ABLATIONS |= {"adapter-1", "adapter-rand", "llava-1.5-1", "limber-names", "limber-pixels", "glide"}
ABLATIONS |= {"cm3-causal", "simvlm-causal", "simvlm-pairs", "simvlm-linear", "fpt-random"}
ABLATIONS |= {"visualbert-late", "visualbert-words", "vilbert-equal", "vilt-unaligned"}
ABLATIONS |= {"albef-fused", "albef-easy", "albef-untaught", "coca-1"}
FIRST_STAGES = [pytest.param(name, marks=pytest.mark.slow) if name in ABLATIONS else name
                for name, r in train.RECIPES.items()            # tests/worlds/test_prompts.py, test_word.py:
                if not r.start and name not in (*ALL_BRIDGES, "lm-prompts", "lm-reader", "word")]


def losses(out: Path) -> list[float]:
    return [x["loss"] for x in read_log(out / "log.jsonl") if "loss" in x]


def run(*argv, out: Path, more: list[str] = ()) -> torch.nn.Module:
    return train.main([*map(str, argv), "--out", str(out), *QUICK, *more])


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_a_miniature_run_of_each_first_stage(name, tmp_path):
    r = train.RECIPES[name]
    same = SAME[2:] if "examples" in r.unread else SAME     # they draw their own
    few = ["--batch", "8", "--examples", "8"] if name in ABLATIONS and same == SAME else []
    module = run("--recipe", name, "--steps", STEPS.get(name, 20), *same, out=tmp_path, more=few)
    loss = losses(tmp_path)
    assert np.mean(loss[-2:]) < np.mean(loss[:2]), loss
    if r.task == "answer":
        towers = {"decoder": load_decoder(ROOT / "weights/decoder"), "vit": load_vit(ROOT / "weights/vit")}
        for part, fresh in towers.items():
            pairs = zip(getattr(module, part).state_dict().values(), fresh.state_dict().values())
            same = [torch.equal(a, b) for a, b in pairs]
            assert all(same) if part not in r.trained else not all(same), part
        saved = load_vlm(tmp_path)
        pairs = zip(module.state_dict().values(), saved.state_dict().values())
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_a_step_of_each_first_stage_in_bfloat16(name, tmp_path):
    """As a machine whose processor is fast in bfloat16 trains: what a step keeps for the next is float32."""
    run("--recipe", name, "--steps", 2, "--warmup", "0", out=tmp_path,
        more=["--dtype", "bfloat16", "--batch", "4", "--eval-items", "2"])
    assert np.isfinite(losses(tmp_path)).all() and len(losses(tmp_path)) == 2


def paper_bridge(recipe: str, *flags: str) -> torch.nn.Module:
    """The bridge of `--scale paper` beside LLaMA-7B and CLIP's ViT-B, without its numbers."""
    s = train.settings_from(["--recipe", recipe, "--scale", "paper", *flags])[0]
    llama = DecoderConfig(32_000, 4096, 32, 32, 32, 128, 11_008)
    with torch.device("meta"):
        return train.new_bridge(s, train.RECIPES[recipe].bridge, llama, 768)


def test_the_papers_scale_is_the_papers_bridge():
    """Its class's defaults are published code's where the two differ; an ablation stays one."""
    for name in ("zero_init", "adapter-1", "adapter-2", "adapter-rand"):        # the paper's total: 1.79M
        bridge = paper_bridge(name)
        assert type(bridge) is ZeroInitV1 and sum(p.numel() for p in bridge.parameters()) == 1_788_530, name
    assert paper_bridge("adapter-rand").options["gate_init"] == "random"
    assert paper_bridge("magma-tuned").options["mlp"] == "none"
    assert paper_bridge("cogvlm-tuned").options == dict(attention=False, mlp=False)
    flamingo = paper_bridge("flamingo")
    for block in (*flamingo.blocks, *flamingo.resampler.layers):
        assert block.ff.act is ACTIVATIONS["squared_relu"] and block.q.out_features == 128 * block.heads
    assert flamingo.blocks[0].heads * 128 == 4096 and flamingo.blocks[0].norm_media is not None
    assert paper_bridge("flamingo", "--option", "heads=16").blocks[0].heads == 16
    assert paper_bridge("qformer").queries.shape == (32, 768)


def test_a_cosine_ends_at_the_floor_that_the_paper_names(tmp_path, monkeypatch, capsys):
    assert train.RECIPES["blip2-2"].paper.floor * train.RECIPES["blip2-2"].paper.lr == 5e-5
    r, floors = train.RECIPES["linear"], []
    monkeypatch.setitem(train.RECIPES, "linear", replace(r, paper=replace(r.paper, floor=0.3)))
    monkeypatch.setattr(train, "schedule", lambda progress, *rest: floors.append(rest[-1]) or 1.0)
    for scale in ("toy", "paper"):
        run("--recipe", "linear", "--scale", scale, "--steps", 1, out=tmp_path)
    assert floors == [0.02, 0.3]
    print_recipes(train.RECIPES, {})
    assert "cosine to 30 %" in capsys.readouterr().out


@pytest.mark.parametrize("system", [pytest.param(name, marks=[pytest.mark.slow] * (name != "llava"))
                                    for name in train.SYSTEMS])
def test_a_system_runs_through_its_stages_and_each_starts_from_the_last(system, tmp_path):
    run("--recipe", system, "--steps", 12, *SAME, out=tmp_path)
    first, second = (tmp_path / stage for stage in train.SYSTEMS[system])
    settings = json.loads((second / "config.json").read_text())["settings"]
    assert settings["init"] == str(first) and settings["recipe"] == train.SYSTEMS[system][1]
    assert all(losses(out)[-1] < losses(out)[0] for out in (first, second))
    if system == "blip2":
        names = load_file(first / "stage1.safetensors").keys()
        assert {"temperature", "match_head.weight", "qformer.words.weight"} <= names
        assert not any(n.startswith("vit.") for n in names)
    if system.startswith("llava"):                      # the second stage moved the decoder and took it along
        bundled = load_decoder(ROOT / "weights/decoder").embed.weight
        assert not torch.equal(load_decoder(second / "decoder").embed.weight, bundled)


def test_stage_two_begins_exactly_where_stage_one_ended(tmp_path):
    run("--recipe", "llava-1", "--steps", 2, out=tmp_path / "1")
    module = run("--recipe", "llava-2", "--init", tmp_path / "1", "--steps", 1, *STILL, out=tmp_path / "2")
    saved = load_file(tmp_path / "1" / "bridge.safetensors")
    assert all(torch.allclose(p, saved[n], rtol=0, atol=1e-29) for n, p in module.bridge.state_dict().items())


def test_the_second_stage_of_blip2_begins_with_the_qformer_of_the_first(tmp_path):
    run("--recipe", "blip2-1", "--steps", 2, out=tmp_path / "1")
    saved = load_file(tmp_path / "1" / "stage1.safetensors")
    stage = load_vlm(tmp_path / "1")                    # the first stage opens again as it was trained
    assert all(torch.equal(p, saved[n]) for n, p in stage.state_dict().items() if not n.startswith("vit."))
    assert torch.equal(stage.vit.positions, load_vit(ROOT / "weights/vit").positions)
    module = run("--recipe", "blip2-2", "--init", tmp_path / "1", "--steps", 1, *STILL, out=tmp_path / "2")
    shared = [n for n, _ in module.bridge.named_parameters() if not n.startswith("project.")]
    assert len(shared) > 20
    bridge = module.bridge.state_dict()
    assert all(torch.allclose(bridge[n], saved[f"qformer.{n}"], rtol=0, atol=1e-29) for n in shared)


@pytest.mark.slow
def test_the_weighted_sum_of_two_data_sets_is_what_flamingo_writes(tmp_path):
    """Σ_m λ_m E_m: a mixture's loss is the weighted sum of the losses on each half of its batch."""
    def first_loss(spec: str, batch: int) -> float:
        out = tmp_path / str(batch) / spec.split()[0]
        argv = ["--bridge", "mapl", "--data", spec, "--steps", "1", *QUICK, "--batch", str(batch)]
        train.main([*argv, "--out", str(out)])
        return losses(out)[0]

    mixed = first_loss("shapes + shapes-pages * 0.2", 16)
    expected = first_loss("shapes", 8) + 0.2 * first_loss("shapes-pages", 8)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5)                      # float32 sums


def test_an_interleaved_page_is_learned_chunk_by_chunk_with_a_stop_after_each():
    tokenizer = load_tokenizer(ROOT / "weights/decoder")
    item = open_data("shapes-pages").item(1, turns=5)
    d = data.training_document(item, tokenizer)
    pictures = d.tokens.count(IMAGE)
    assert 2 <= pictures <= 4 and pictures == len(item.pictures) == d.tokens.count(tokenizer.eos)
    learned = [t for t, l in zip(d.tokens, d.labels) if l != IGNORE]
    assert IMAGE not in learned and tokenizer.decode(learned).count("\n") == pictures


PLAIN = ["--bridge", "mapl", "--optimizer", "adamw", "--lr", "1e-3", "--steps", "4", "--examples", "24"]


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory) -> list[float]:
    out = tmp_path_factory.mktemp("plain")
    run(*PLAIN, out=out)
    return losses(out)


@pytest.mark.parametrize("flags", [
    ["--pack"], ["--accumulate", "4"], ["--checkpoint"], ["--workers", "2"], ["--cache", "CACHE"],
    ["--pack", "--accumulate", "2", "--checkpoint"],
], ids=" ".join)
def test_what_changes_memory_or_speed_does_not_change_the_losses(flags, plain_losses, tmp_path):
    run(*PLAIN, *(str(tmp_path / "cache") if f == "CACHE" else f for f in flags), out=tmp_path / "run")
    # rtol 2e-5: the same float32 sums in another order, through four updates; Muon would round to bfloat16
    # inside
    np.testing.assert_allclose(losses(tmp_path / "run"), plain_losses, rtol=2e-5)


def test_documents_that_are_cut_are_counted_whoever_reads_them(tmp_path, capsys):
    for workers in (0, 2):
        run("--bridge", "linear", "--steps", 1, "--longest", 24, "--workers", workers, out=tmp_path)
        assert "warning: 16 documents were longer than --longest 24" in capsys.readouterr().err


@pytest.mark.slow
def test_the_mean_of_the_parameters_is_what_is_saved_and_survives_a_resume(tmp_path):
    argv = ["--bridge", "linear", "--lr", "0.05", "--warmup", "0", "--schedule", "constant"]

    def weight(*flags, name: str) -> torch.Tensor:
        return run(*argv, *flags, out=tmp_path / name).bridge.map.weight.detach().clone()

    mean = weight("--steps", 3, "--ema", 0.5, name="mean")
    expected = weight("--steps", 3, "--examples", 48, *STILL, name="start")
    for n in (1, 2, 3):
        expected = expected.lerp(after := weight("--steps", n, name=str(n)), 0.5)       # m ← ½ m + ½ θ
    assert torch.allclose(mean, expected, atol=1e-7) and not torch.allclose(mean, after)
    state = load_file(tmp_path / "mean" / "state.safetensors")
    assert torch.equal(state["mean.bridge.map.weight"], mean)
    assert torch.equal(state["parameter.bridge.map.weight"], after)


@pytest.mark.parametrize("name", ["simvlm", "cm3", "coca"])
def test_what_a_run_counts_as_frozen_does_not_learn(name, tmp_path, monkeypatch):
    """The digest of frozen parts asks the recipe; a task that frees its parts itself must agree with it."""
    class Built(Exception):
        pass

    def stop(batch, *_, **__):
        raise Built(batch.__self__)

    monkeypatch.setattr(train, "prefetch", stop)
    with pytest.raises(Built) as caught:
        run("--recipe", name, "--steps", 1, out=tmp_path)
    recipe, parts = train.RECIPES[name], caught.value.args[0].module.named_children()
    learned = {part for part, child in parts if any(p.requires_grad for p in child.parameters())}
    assert learned == {*recipe.trained} and recipe.one_file
