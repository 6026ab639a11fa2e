"""VisualGPT's unit is the authors' at every step, its hand example, and what a cut gate still learns."""
from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import TINY, check, fixed_loss, golden, tiny_decoder, tiny_vlm
from model import IMAGE, DecoderConfig, EncoderBlock
from papers import make_bridge
from papers.visualgpt import MixingBlock, VisualEncoder, srau
from support.formats.files import UserError

TAUS = (0.0, 0.2)


def numel(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def names() -> dict[str, str]:
    """Ours → the authors', of what enters the mixture."""
    pairs = {"norm": "ln_1", "q": "enc_dec_attn.fc_q", "k": "enc_dec_attn.fc_k", "v": "enc_dec_attn.fc_v",
             "o": "enc_dec_attn.c_proj", **{f"alpha.{j}": f"fc_alpha{j + 1}" for j in range(3)}}
    return {f"{a}.{w}": f"{b}.{w}" for a, b in pairs.items() for w in ("weight", "bias")}


def authors_block(tau: float) -> tuple[EncoderBlock, MixingBlock]:
    """GPT-2's block and ours between its halves, with the case's weights; Conv1D stores (in, out)."""
    theirs = load_file(golden("visualgpt-srau")[0] / "model.safetensors")
    block, mixing = EncoderBlock(24, 3, 96, "gelu_tanh", 1e-5), MixingBlock(24, 3, 3, "learned", tau)
    tensors = {key: t.T if t.ndim == 2 and ".c_" in key else t for key, t in theirs.items()}
    with torch.no_grad():
        for ours, name in names().items():
            mixing.get_parameter(ours).copy_(tensors[name])
        for w in ("weight", "bias"):
            for p, part in zip("qkv", tensors[f"attn.c_attn.{w}"].chunk(3)):
                block.get_parameter(f"{p}.{w}").copy_(part)
            for ours, name in {"norm1": "ln_1", "norm2": "ln_2", "o": "attn.c_proj", "up": "mlp.c_fc",
                               "down": "mlp.c_proj"}.items():
                block.get_parameter(f"{ours}.{w}").copy_(tensors[f"{name}.{w}"])
    return block, mixing


def run_case(tau: float) -> dict:
    """Every intermediate of the authors' block under its name in the case, and the mixing block."""
    _, _, x, _ = golden("visualgpt-srau")
    block, mixing = authors_block(tau)
    h = x["x"] + block.attention(block.norm1(x["x"]), causal=True)
    visible = ~x["mask_encoder"][:, 0].expand(-1, h.shape[1], -1)               # (B, T, R)
    media = x["encoder"].transpose(1, 2).flatten(2)                             # (B, R, J·D)
    cross = mixing.cross(h, *mixing.project(media), visible)
    gates = [f(torch.cat((h, c), dim=-1)) for f, c in zip(mixing.alpha, cross)]
    mixed = mixing(h, *mixing.project(media), visible) * x["mask_queries"]
    y = (mixed + block.mlp(block.norm2(mixed))) * x["mask_queries"]
    found = {"residual": h, f"mixed_tau{tau}": mixed, f"y_tau{tau}": y}
    for j in range(3):
        found |= {f"cross_{j + 1}": cross[j], f"gate_{j + 1}": gates[j]}
    return found | {"block": mixing}


@pytest.mark.parametrize("tau", TAUS)
def test_every_step_is_the_authors(tau):
    _, case, x, expected = golden("visualgpt-srau")
    real = x["mask_queries"].bool()[..., 0]
    found = run_case(tau)
    mixing = found.pop("block")
    for key, tensor in found.items():
        padded = not key.startswith(("mixed", "y"))                             # their padding is not zeroed
        check(case, key, tensor[real] if padded else tensor, expected[key][real] if padded else expected[key])
    loss = fixed_loss(found[f"y_tau{tau}"])
    loss.backward()
    check(case, "grad.loss", loss.detach(), expected[f"grad.tau{tau}.loss"])
    inert = case["gradients_not_stored_because_zero"]
    for ours, theirs in names().items():
        grad, key = mixing.get_parameter(ours).grad, f"tau{tau}.{theirs}"
        if key in inert:
            assert grad.abs().max() < 1e-6                                      # it cancels in the softmax
        elif "ln_1" not in key:                             # theirs also norms the self-attention's input
            grad = grad.T if key.endswith("c_proj.weight") else grad
            check(case, f"grad.{key}", grad, expected[f"grad.{key}"])


@pytest.mark.parametrize("misreading", [
    lambda h, x, a, tau: (1 - a) * (a < 1 - tau) * h + a * (a > tau) * x,               # the gates swapped
    lambda h, x, a, tau: srau(h, x, a, 0.0),                                            # no threshold
    lambda h, x, a, tau: h + (1 - a) * (a < 1 - tau) * x,                               # a residual
    lambda h, x, a, tau: srau(h, x, a, tau) * math.sqrt(3),                             # no √3
])
def test_a_misreading_fails_the_case(misreading, monkeypatch):
    expected = golden("visualgpt-srau")[3]["mixed_tau0.2"]
    monkeypatch.setattr("papers.visualgpt.srau", misreading)
    assert (run_case(0.2)["mixed_tau0.2"] - expected).abs().max() > 1e-2


def test_the_hand_example_of_paper_and_code():
    h, x = torch.tensor([[0.0, 2.0], [-2.0, 0.5]]), torch.ones(2, 2)
    block = MixingBlock(2, 1, 1, "sigmoid", 0.2)
    paper, code = block.mixture(h, [x]), srau(h, x, h.sigmoid(), 0.2)
    torch.testing.assert_close(paper, torch.tensor([[0.5, 0.8808], [-1.7616, 0.8112]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(code, torch.tensor([[0.5, 1.7616], [0.8808, 0.6888]]), atol=1e-4, rtol=0)


def test_a_cut_gate_has_no_gradient_and_its_complement_revives_it():
    score = torch.tensor([-3.0, 0.0, 3.0], requires_grad=True)                  # α = 0.05, 0.5, 0.95
    h, x = torch.full((3,), 2.0), torch.full((3,), 5.0)
    for part, dead in ((srau(h, 0 * x, score.sigmoid(), 0.2), 0), (srau(0 * h, x, score.sigmoid(), 0.2), 2)):
        grad, = torch.autograd.grad(part.sum(), score)
        assert (grad == 0).nonzero().flatten().tolist() == [dead]
    assert torch.autograd.grad(srau(h, x, score.sigmoid(), 0.2).sum(), score)[0].all()
    alpha = torch.linspace(0, 1, 101)
    assert ((alpha > 0.49) | (alpha < 0.51)).all()                              # τ < ½: one is always open
    torch.testing.assert_close(srau(alpha * 0 + 7, alpha * 0 + 7, alpha, 0.0), alpha * 0 + 7)   # τ 0: sum 1


def test_the_published_sizes():
    with torch.device("meta"):
        block, mixing = EncoderBlock(768, 12, 3072, "gelu", 1e-5), MixingBlock(768, 12, 3, "learned", 0.2)
        encoder = VisualEncoder(2048, 768, 3, 12, 2048, 0.1)
        bridge = make_bridge("visualgpt", DecoderConfig(width=768, layers=12), 2048)
    unused, norm = 1_771_776, 1536                          # enc_dec_attn.c_attn; GPT-2's norm is theirs
    assert numel(mixing.alpha) == 3_541_248
    assert numel(mixing.q, mixing.k, mixing.v, mixing.o) + unused == 4_134_144
    assert numel(block, mixing) - norm + unused == 14_763_264
    assert 12 * 14_763_264 + (50257 + 1024) * 768 + 1536 == 216_544_512
    assert numel(encoder) + 3 * unused == 23_432_448
    assert numel(bridge) == numel(encoder) + 12 * numel(mixing)


def test_the_mixture_of_a_new_bridge_shrinks_the_stream():
    """α ≈ ½ and X small: about √3/2 of H, so the decoder is not preserved."""
    torch.manual_seed(0)
    block = MixingBlock(32, 2, 3, "learned", 0.0)
    h = 0.01 * torch.randn(1, 5, 32)                        # the learned gates stay at ½
    mixed = block.mixture(h, [torch.zeros_like(h)] * 3).detach()
    assert 0.8 < float(mixed.norm() / h.norm()) < 0.93


def images(m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, 9, 20, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mix", ["learned", "sigmoid", "residual", "tanh"])
def test_a_word_without_a_picture_is_read_by_the_plain_decoder_and_others_are_not(mix):
    vlm = tiny_vlm("visualgpt", image_token=7, mix=mix)
    tokens = torch.tensor([[3, 4, IMAGE, 5, IMAGE, 6]])
    with torch.no_grad():
        plain = vlm.decoder(tokens.masked_fill(tokens == IMAGE, 7))
        assert torch.equal(vlm(torch.tensor([[3, 4, 5]])), vlm.decoder(torch.tensor([[3, 4, 5]])))
        first, second = images(2), images(2)
        second[1] = images(1, 5)[0]
        logits, other = vlm(tokens, features=first), vlm(tokens, features=second)
    assert torch.equal(logits[:, :2], plain[:, :2])
    assert (logits[:, 2:] - plain[:, 2:]).abs().amax(-1).min() > 1e-3
    moved = (logits != other).any(-1)[0].nonzero().flatten().tolist()
    assert moved == [4, 5]                                  # the mark of the second picture, and later words


def test_flamingos_gate_at_zero_leaves_the_decoder_alone_to_the_bit():
    vlm = tiny_vlm("visualgpt", image_token=7, stirred=False, mix="tanh")
    tokens = torch.tensor([[3, IMAGE, 5, 6]])
    with torch.no_grad():
        assert torch.equal(vlm(tokens, features=images(1)), vlm.decoder(tokens.masked_fill(tokens < 0, 7)))
    assert torch.equal(vlm.bridge.gates(), torch.zeros(TINY.layers, 1))
    assert tiny_vlm("visualgpt").bridge.gates() is None
    assert vlm.bridge.gated_layers == [*range(TINY.layers)]


@pytest.mark.parametrize("options, message", [
    (dict(mix="sum"), 'mix learned, sigmoid, residual, tanh, not "sum"'),
    (dict(heads=5), "width 32 does not divide into 5 heads"),
    (dict(tau=0.5), "tau is 0.5, not a number of at least 0 and below 0.5"),
])
def test_an_impossible_option_is_said_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        make_bridge("visualgpt", tiny_decoder().config, 20, **options)


def test_packing_is_refused(tmp_path):
    with pytest.raises(UserError, match="--pack: a visualgpt bridge reaches into the layers"):
        train.main(["--bridge", "visualgpt", "--pack", "--out", str(tmp_path)])
