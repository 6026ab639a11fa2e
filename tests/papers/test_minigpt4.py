"""MiniGPT-4 is the authors' code in both variants, its Q-Former stays frozen, and it trains by its name."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import check, fixed_loss, golden, tiny_vlm
from model import DecoderConfig
from papers import make_bridge
from support.formats import load_bridge, load_vlm
from support.formats.files import UserError
from support.lab.attention import rollout

QUICK = ["--batch", "4", "--eval-items", "2", "--samples", "0", "--dtype", "float32"]


def test_the_qformer_and_its_map_are_the_authors(tmp_path):
    """As they are published: the map alone in MiniGPT-4's file, the rest in BLIP-2's."""
    folder, case, x, expected = golden("minigpt4-projection")
    blip2 = load_file(folder / "model.safetensors")
    own = {n: blip2.pop(n) for n in ("llama_proj.weight", "llama_proj.bias")}
    torch.save({"model": own, "epoch": 3}, tmp_path / "minigpt4.pth")
    blip2 |= {"t5_proj.weight": torch.zeros(2, 24), "t5_proj.bias": torch.zeros(2)}
    torch.save({"model": blip2}, tmp_path / "blip2.pth")
    bridge = load_bridge("minigpt4", tmp_path / "minigpt4.pth", qformer=tmp_path / "blip2.pth", heads=3)
    assert {n for n, p in bridge.named_parameters() if p.requires_grad} == {"project.weight", "project.bias"}
    whole = load_bridge("minigpt4", folder / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(bridge.parameters(), whole.parameters()))
    with pytest.raises(UserError, match="holds llama_proj alone.*qformer="):
        load_bridge("minigpt4", tmp_path / "minigpt4.pth")
    with pytest.raises(UserError, match="a Q-Former of its own"):
        load_bridge("minigpt4", folder / "model.safetensors", qformer=tmp_path / "blip2.pth")
    bridge.queries.requires_grad_()                     # frozen, but the case has its gradient
    y = bridge.prefix(bridge.see(x["features"]))
    check(case, "y", y, expected["y"])
    loss = fixed_loss(y)
    loss.backward()
    check(case, "grad.loss", loss.detach(), expected["grad.loss"])
    check(case, "grad.query_tokens", bridge.queries.grad[None], expected["grad.query_tokens"])
    for ending in ("weight", "bias"):
        check(case, f"grad.llama_proj.{ending}", bridge.project.get_parameter(ending).grad,
              expected[f"grad.llama_proj.{ending}"])


def test_the_variant_for_llama2_joins_four_consecutive_patches(tmp_path):
    folder, case, x, expected = golden("minigpt4-projection")
    bridge = load_bridge("minigpt4_llama2", folder / "model.llama2.safetensors")
    y = bridge.prefix(bridge.see(x["features"][:, 1:]))                         # reads_cls is False
    check(case, "y_llama2", y, expected["y_llama2"])
    loss = fixed_loss(y)
    loss.backward()
    check(case, "grad.loss", loss.detach(), expected["grad_llama2.loss"])
    for ending in ("weight", "bias"):
        check(case, f"grad.llama_proj.{ending}", bridge.map.get_parameter(ending).grad,
              expected[f"grad_llama2.llama_proj.{ending}"])
    torch.save({"model": {f"llama_proj.{w}": bridge.map.get_parameter(w).data for w in ("weight", "bias")}},
               tmp_path / "map.pth")                    # as it is published: a norm that never learned
    with torch.no_grad():
        bridge.vision_norm.weight.fill_(1)
        bridge.vision_norm.bias.zero_()
    alone = load_bridge("minigpt4_llama2", tmp_path / "map.pth")
    assert torch.equal(alone.prefix(alone.see(x["features"][:, 1:])),
                       bridge.prefix(bridge.see(x["features"][:, 1:])))


@pytest.mark.parametrize("name, vision_width, width, learns", [
    ("minigpt4", 1408, 4096, 3_149_824), ("minigpt4", 1408, 5120, 3_937_280),
    ("minigpt4_llama2", 1408, 4096, 23_072_768)])
def test_the_published_sizes_are_what_learns(name, vision_width, width, learns):
    with torch.device("meta"):
        bridge = make_bridge(name, DecoderConfig(width=width), vision_width)
    assert sum(p.numel() for p in bridge.parameters() if p.requires_grad) == learns
    bridge.requires_grad_(False)
    assert not any(p.requires_grad for p in bridge.parameters())


def test_patches_that_do_not_divide_are_refused():
    vlm = tiny_vlm("minigpt4_llama2", join=2)
    with pytest.raises(ValueError, match="9 tokens of the ViT do not divide into groups of 2"):
        vlm.bridge.see(vlm.features(torch.zeros(1, 3, 24, 24)))
    made = rollout(tiny_vlm("minigpt4_llama2", join=3).bridge, {}, torch.zeros(2, 9, 20))
    assert torch.equal(made[1, 1] * 3, torch.tensor([0., 0, 0, 1, 1, 1, 0, 0, 0]))


@pytest.mark.parametrize("name, learns", [("minigpt4", "project"), ("minigpt4_llama2", "map")])
def test_it_trains_by_name_its_run_opens_and_only_the_map_moves(name, learns, tmp_path):
    runs = {n: train.main(["--bridge", name, "--steps", str(n), *QUICK, "--out", str(tmp_path / str(n))])
            for n in (1, 2)}
    before, after = (runs[n].bridge.state_dict() for n in (1, 2))
    moved = {n for n in after if not torch.equal(before[n], after[n])}
    assert moved == {f"{learns}.weight", f"{learns}.bias"}
    saved = load_vlm(tmp_path / "2")
    assert not saved.training and saved.bridge.name == name
    assert all(torch.equal(p, after[n]) for n, p in saved.bridge.state_dict().items())


@pytest.mark.parametrize("name, run, prefix", [("stage1.safetensors", ["--recipe", "blip2-1"], "qformer."),
                                               ("bridge.safetensors", ["--bridge", "qformer"], "")])
def test_it_starts_from_the_qformer_of_either_stage(name, run, prefix, tmp_path):
    """Three layers behind it, and a Q-Former that learns, are ablations."""
    train.main([*run, "--steps", "1", *QUICK, "--out", str(tmp_path / "1")])
    argv = ["--bridge", "minigpt4", "--init", str(tmp_path / "1"), "--steps", "1", *QUICK]
    bridge = train.main([*argv, "--option", "maps=3", "--out", str(tmp_path / "2")]).bridge
    assert [type(m).__name__ for m in bridge.project] == ["Linear"] * 3
    first = load_file(tmp_path / "1" / name)
    frozen = {n: p for n, p in bridge.state_dict().items() if not n.startswith("project.")}
    assert len(frozen) > 20 and all(torch.equal(p, first[f"{prefix}{n}"]) for n, p in frozen.items())


def test_a_tuned_one_learns_all_of_it_unless_it_is_frozen():
    bridge = tiny_vlm("minigpt4", tuned=True).bridge
    assert all(p.requires_grad for p in bridge.parameters())
    assert not any(p.requires_grad for p in bridge.requires_grad_(False).parameters())
