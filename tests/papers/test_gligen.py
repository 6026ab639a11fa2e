"""GLIGEN's grounding tokens and gated layers are the authors'; at zero they leave a ViT alone to the bit."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import train
from conftest import TINY, TINY_VIT, check, fixed_loss, golden, shapes_vlm, stir, tiny_vlm
from data import HELD_OUT, PLACES, QA, Item
from model import VLM, merge_heads, split_heads
from papers import gligen, make_bridge
from papers.gligen import (DenseGatedSelfAttention, GatedCross, GatedSelfAttention, PositionNet,
                           beta_schedule, fourier)
from papers.gligen_task import answer_boxes, take_place
from support.formats.checkpoint import Checkpoint, fill
from support.formats.files import UserError, read_json, write_tensors
from support.formats.gligen import FUSER, load_gligen, position_names
from support.worlds import open_data
from support.worlds.text import shapes_tokenizer


def variant(kind: type[GatedSelfAttention], prefix: str) -> GatedSelfAttention:
    """A gated layer of the case under a name of its own."""
    layer, file = kind(24, 20, 3), Checkpoint(golden("gligen-gated-self-attention")[0] / "model.safetensors")
    names = {ours: prefix + theirs for ours, theirs in FUSER.items()}
    fill(layer, file, names, tuple(n for n in file.where if not n.startswith(prefix)))
    return layer


def published_block(tensors: dict, x: torch.Tensor, context: torch.Tensor, fuser, h, beta: float):
    """Stable Diffusion's block around the gated layer: self-attention, ·, cross-attention, feed-forward."""
    t = {name.removeprefix("block."): value for name, value in tensors.items()}
    norm = lambda n, x: nn.functional.layer_norm(x, (24,), t[f"norm{n}.weight"], t[f"norm{n}.bias"])

    def attend(name: str, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        q, k, v = (split_heads(y @ t[f"{name}.to_{p}.weight"].T, 3)
                   for p, y in (("q", x), ("k", source), ("v", source)))
        y = merge_heads((q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v)
        return y @ t[f"{name}.to_out.0.weight"].T + t[f"{name}.to_out.0.bias"]

    x = x + attend("attn1", norm(1, x), norm(1, x))
    x = fuser(x, h, beta)
    x = x + attend("attn2", norm(2, x), context)
    a, g = (norm(3, x) @ t["ff.net.0.proj.weight"].T + t["ff.net.0.proj.bias"]).chunk(2, -1)
    return x + (a * nn.functional.gelu(g)) @ t["ff.net.2.weight"].T + t["ff.net.2.bias"]


def test_grounding_tokens_and_layers_are_the_authors():
    folder, case, x, expected = golden("gligen-gated-self-attention")
    net, layers = load_gligen(folder / "model.safetensors", heads=3)
    assert [*layers] == ["block."]
    fuser, tensors = layers["block."], load_file(folder / "model.safetensors")
    check(case, "fourier", fourier(x["boxes"]), expected["fourier"])
    h = net(x["boxes"], x["phrases"], x["masks"].bool())
    check(case, "grounding", h.detach(), expected["grounding"])
    with torch.no_grad():
        for beta in (1, 0.3):
            key = f"gated_sa_beta{beta}"
            check(case, key, fuser(x["x"], h, beta), expected[key])
        check(case, "gated_ca", variant(GatedCross, "gated_ca.")(x["x"], h), expected["gated_ca"])
        dense = variant(DenseGatedSelfAttention, "gated_sa2.")
        check(case, "gated_sa2", dense(x["x"], h), expected["gated_sa2"])
        off = published_block(tensors, x["x"], x["context"], fuser, h, 0.0)
        check(case, "block_beta0", off, expected["block_beta0"])
    y = published_block(tensors, x["x"], x["context"], fuser, h, 1.0)
    check(case, "block", y.detach(), expected["block"])
    loss = fixed_loss(y)
    loss.backward()
    check(case, "grad.loss", loss.detach(), expected["grad.loss"])
    for module, names, prefix in ((fuser, FUSER, "block.fuser."), (net, position_names("position_net."), "")):
        for ours, theirs in names.items():
            if ours in dict(module.named_parameters()):
                key = f"grad.{prefix}{theirs}"
                check(case, key, module.get_parameter(ours).grad, expected[key])


@pytest.mark.parametrize("what", ["one gate", "norm ahead of joining", "pi"])
def test_a_misreading_fails_the_case(what, monkeypatch):
    folder, case, x, expected = golden("gligen-gated-self-attention")
    net, layers = load_gligen(folder / "model.safetensors", heads=3)
    fuser = layers["block."]
    if what == "one gate":
        monkeypatch.setattr(GatedSelfAttention, "mlp", lambda self, x: 0 * x)
    elif what == "norm ahead of joining":
        monkeypatch.setattr(GatedSelfAttention, "read", lambda self, v, h: self.attention(
            torch.cat((self.norm1(v), self.linear(h)), 1))[:, :v.shape[1]])
    else:
        monkeypatch.setattr(gligen, "fourier", lambda boxes, n: fourier(torch.pi * boxes, n))
    with torch.no_grad():
        y = fuser(x["x"], net(x["boxes"], x["phrases"], x["masks"].bool()))
    assert (y - expected["gated_sa_beta1"]).abs().max() > 100 * case["tolerance"]["atol"]


class Plain(GatedSelfAttention):
    """Its attention alone, without norm, with identity weights."""

    def __init__(self):
        super().__init__(2, 2, 1)
        self.norm1 = nn.Identity()
        for map in (self.q, self.k, self.v, self.o, self.linear):
            nn.init.eye_(map.weight)
        nn.init.zeros_(self.o.bias), nn.init.zeros_(self.linear.bias)
        nn.init.constant_(self.attention_gate, 0.5)


def test_by_hand():
    """One visual token (1, 0), one grounding token (0, 1), α = ½: weights .6698 and .3302."""
    y = Plain()(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]))
    torch.testing.assert_close(y, torch.tensor([[[1.3095, 0.1526]]]), atol=1e-4, rtol=0)


# --- inside a ViT -------------------------------------------------------------------------------------------

def grounded(cross: bool = False) -> tuple[VLM, dict]:
    """A tiny model with the bridge as it begins, and what its `grounded_features` take."""
    vlm, g = tiny_vlm("gligen", stirred=False, cross=cross), torch.Generator().manual_seed(0)
    stir(vlm.vit)
    given = dict(pixels=torch.randn(2, 3, 24, 24, generator=g), phrase=torch.randn(TINY.width, generator=g),
                 boxes=torch.tensor([[0, 0, 1, 1], [1, 2, 2, 3]]) / 3)
    return vlm, given


def open_gates(bridge) -> None:
    for layer in bridge.layers:
        stir(layer)
        nn.init.constant_(layer.attention_gate, 0.5)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_gates_or_beta_at_zero_leave_the_vit_alone_to_the_bit(cross, gradients):
    vlm, given = grounded(cross)
    with torch.set_grad_enabled(gradients):
        plain = vlm.features(given["pixels"])
        assert torch.equal(vlm.bridge.grounded_features(vlm.vit, **given), plain)      # both gates at 0
        open_gates(vlm.bridge)
        boxed = vlm.bridge.grounded_features(vlm.vit, **given)
        assert not torch.allclose(boxed, plain, atol=1e-2)
        assert torch.equal(vlm.features(given["pixels"]), plain)                # nothing is asked
        assert torch.equal(vlm.bridge.grounded_features(vlm.vit, **given, beta=0.0), plain)
        each = vlm.bridge.grounded_features(vlm.vit, **given, beta=torch.tensor([1.0, 0.0])[:, None, None])
    assert torch.equal(each[0], boxed[0]) and torch.equal(each[1], plain[1])


@pytest.mark.parametrize("tuned", [False, True])
def test_the_gated_layers_learn_and_the_first_step_moves_the_gates(tuned):
    vlm, given = grounded()
    bridge = make_bridge("gligen", TINY, TINY_VIT.width, layers=2, heads=2, context=6, hidden=12, tuned=tuned)
    bridge.prefix(bridge.grounded_features(vlm.vit, **given)).square().sum().backward()
    moved = {name for name, p in bridge.named_parameters() if p.grad is not None and p.grad.any()}
    gates = {f"layers.{n}.{gate}" for n in range(2) for gate in ("attention_gate", "ff_gate")}
    assert moved == gates | ({"map.weight", "map.bias"} if tuned else set())


def test_boxes_are_told_apart_and_padding_is_seen():
    vlm, given = grounded()
    open_gates(vlm.bridge)
    with torch.no_grad():
        y = vlm.bridge.grounded_features(vlm.vit, **given)
        other = vlm.bridge.grounded_features(vlm.vit, **given | {"boxes": given["boxes"].flip(0)})
        vlm.bridge.net.null_box += 1
        padded = vlm.bridge.grounded_features(vlm.vit, **given)
    assert not torch.allclose(other, y, atol=1e-3) and not torch.allclose(padded, y, atol=1e-3)


# --- the task -----------------------------------------------------------------------------------------------

def test_the_place_goes_from_the_words_into_a_box():
    world = open_data("shapes-places:test")
    for i in range(40):
        item = world.item(i)
        boxed, place = take_place(item), item.qas[0].question.split(" at the ")[1].strip("?")
        assert [q.question for q in boxed.qas] == ["what color is the object there?", "what shape is there?"]
        x0, y0, x1, y1 = (3 * boxed.box).round().long().tolist()
        assert PLACES[3 * y0 + x0] == place and (x1, y1) == (x0 + 1, y0 + 1)
        color, shape = (q.answer for q in boxed.qas)
        assert f"{color} {shape} at the {place}" in item.about and (color, shape) in HELD_OUT
    assert len(world.item(0, turns=1).qas) == 1
    with pytest.raises(UserError, match="^--data shapes: the questions of item .* give --data shapes-places"):
        train.main(["--recipe", "gligen", "--data", "shapes"])


def test_a_box_answers_what_it_is_asked(monkeypatch):
    """Right with its own box, wrong with the other's; a guess is one thing of the picture; one with a single
    thing is left out."""
    two = "a small red ring at the top left; a large blue ring at the bottom right"
    grey, asked = np.full((48, 48, 3), 99, np.uint8), "what color is the object at the {}?"
    items = [Item(grey, [], [QA("color", asked.format(p), a)], about=about)
             for p, a, about in (("top left", "red", two), ("bottom right", "blue", two),
                                 ("top left", "red", two.split(";")[0]))]
    vlm, seen = shapes_vlm("gligen", context=6, hidden=12), []
    monkeypatch.setattr(type(vlm.bridge), "grounded_features", lambda self, vit, pixels, boxes, phrase, beta:
                        seen.append((beta, bool(pixels.any()))) or boxes)

    def read(vlm, prompts, tokenizer, longest, features, pictures):
        return ["blue" if features[n, 0] > 0 and all(seen[-1]) else " red" for n, in pictures]
    found = answer_boxes(vlm, shapes_tokenizer(), items, read)
    assert found == {"box": 1.0, "another box": 0.0, "no box": 0.5, "blind box": 0.5, "a guess": 0.5}
    assert seen == [(1, True), (1, True), (0, True), (1, False)]


def test_the_map_is_a_linear_runs_and_stays_as_it_is(tmp_path):
    quick = ["--steps", "2", "--batch", "2", "--eval-items", "6", "--samples", "0", "--log-every", "1"]
    lock = ["--recipe", "gligen", "--option", "tuned=false", "--init", str(tmp_path / "linear"), *quick]
    train.main(["--bridge", "linear", "--data", "shapes-places", "--out", str(tmp_path / "linear"), *quick])
    vlm = train.main([*lock, "--out", str(tmp_path / "run")])
    started = load_file(tmp_path / "linear/bridge.safetensors")
    assert torch.equal(vlm.bridge.map.weight, started["map.weight"]) and vlm.bridge.gates().abs().min() > 0
    assert read_json(tmp_path / "run/boxes.json").keys() == {"box", "another box", "no box", "blind box",
                                                            "a guess"}
    tables = [read_json(tmp_path / f"{run}/results.json")["rows"][0] for run in ("linear", "run")]
    assert tables[0]["mean"] == tables[1]["mean"]                               # β = 0: what it started from
    with pytest.raises(UserError, match="give the option layers, not reads"):
        train.main([*lock, "--option", "reads=-1", "--out", str(tmp_path / "other")])


def test_the_schedule():
    assert beta_schedule(10, 0.3) == [1.0] * 3 + [0.0] * 7          # the text examples' (0.3, 0, 0.7)
    assert beta_schedule(8, 0.25, 0.5) == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert beta_schedule(5, 1.0) == [1.0] * 5
    with pytest.raises(ValueError, match="more than all"):
        beta_schedule(5, 0.8, 0.4)


# --- sizes and files ----------------------------------------------------------------------------------------

def test_the_published_sizes():
    with torch.device("meta"):
        sizes = {width: sum(p.numel() for p in GatedSelfAttention(width, 768, 8).parameters())
                 for width in (320, 640, 1280)}
        net = sum(p.numel() for p in PositionNet().parameters())
    assert sizes == {320: 1_888_962, 640: 7_054_722, 1280: 27_216_642} and net == 1_083_968
    assert 5 * sizes[320] + 5 * sizes[640] + 6 * sizes[1280] == 208_018_272     # Stable Diffusion's 16 blocks


@pytest.mark.parametrize("drop, add, words", [
    ("block.fuser.ff.net.2.bias", {}, "block.fuser.ff.net.2.bias"),
    ("position_net.linears.2.weight", {}, "position_net.linears.2.weight"),
    ("", {"block.fuser.attn.to_q.bias": torch.ones(24)}, "block.fuser.attn.to_q.bias"),
    ("", {"position_net.linears.6.weight": torch.ones(2, 2)}, "position_net.linears.6.weight"),
    ("", {"block.fuser.norm1.weight": torch.ones(25)}, "(25,)"),
    ("block.fuser.alpha_attn", {}, "holds no position_net and no fuser"),
])
def test_what_does_not_fit_is_refused_by_name(tmp_path, drop, add, words):
    tensors = load_file(golden("gligen-gated-self-attention")[0] / "model.safetensors") | add
    write_tensors(tmp_path / "model.safetensors", {k: v for k, v in tensors.items() if k != drop})
    with pytest.raises(UserError) as e:
        load_gligen(tmp_path / "model.safetensors", heads=3)
    assert words in str(e.value) and "\n" not in str(e.value)
    if not drop:
        return
    with pytest.raises(UserError):
        load_gligen(tmp_path / "model.safetensors", heads=5)
