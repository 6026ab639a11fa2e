"""GLIGEN's grounding tokens and gated layers are the authors'; at zero they leave a ViT alone to the bit."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import TINY_VIT, check, fixed_loss, golden, stir
from model import EncoderBlock, ViT, merge_heads, split_heads
from papers import gligen
from papers.gligen import (DenseGatedSelfAttention, GatedCross, GatedSelfAttention, Grounded, GroundedViT,
                           PositionNet, beta_schedule, fourier)
from support.formats.checkpoint import Checkpoint, fill
from support.formats.files import UserError, write_tensors
from support.formats.gligen import FUSER, load_gligen, position_names


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

def grounded(kind: type[GatedSelfAttention] = GatedSelfAttention) -> tuple[ViT, GroundedViT, Grounded]:
    vit, g = stir(ViT(TINY_VIT)), torch.Generator().manual_seed(0)
    mine = GroundedViT(TINY_VIT, 6, kind).adopt(vit).eval()
    return vit, mine, Grounded(torch.randn(2, 3, 24, 24, generator=g), torch.randn(2, 3, 6, generator=g))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", [GatedSelfAttention, GatedCross])
def test_gates_or_beta_at_zero_leave_the_vit_alone_to_the_bit(kind, gradients):
    vit, mine, given = grounded(kind)
    with torch.set_grad_enabled(gradients):
        plain = vit.features(given.pixels)
        assert torch.equal(mine.features(given), plain)                         # both gates start at 0
        for block in mine.blocks:
            stir(block.fuser)
            nn.init.constant_(block.fuser.attention_gate, 0.5)
        assert not torch.allclose(mine.features(given), plain, atol=1e-2)
        assert torch.equal(mine.features(given.pixels), plain)                  # nothing is asked
        given.beta = 0.0
        assert torch.equal(mine.features(given), plain)


def test_only_the_gated_layers_learn_and_the_first_step_moves_the_gates():
    _, mine, given = grounded()
    mine.features(given, -1).square().sum().backward()
    moved = {name for name, p in mine.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {f"blocks.{l}.fuser.{g}" for l in range(3) for g in ("attention_gate", "ff_gate")}


def test_grounding_tokens_have_no_order_and_padding_is_seen():
    _, mine, given = grounded()
    for block in mine.blocks:
        stir(block.fuser)
        nn.init.constant_(block.fuser.attention_gate, 0.5)
    with torch.no_grad():
        y = mine.features(given)
        turned = mine.features(Grounded(given.pixels, given.tokens[:, [2, 0, 1]]))
        more = mine.features(Grounded(given.pixels, torch.cat((given.tokens, torch.zeros(2, 1, 6)), 1)))
    torch.testing.assert_close(turned, y, atol=1e-5, rtol=1e-5)     # float32, another order
    assert not torch.allclose(more, y, atol=1e-3)


def test_another_tower_is_refused():
    other = nn.ModuleDict({"blocks": nn.ModuleList([EncoderBlock(20, 2, 40, "gelu", 1e-5)])})
    with pytest.raises(ValueError, match="other parts"):
        GroundedViT(TINY_VIT, 6).adopt(other)


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
