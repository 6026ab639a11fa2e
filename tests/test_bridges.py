"""Claim: each bridge computes what its published code computes, gradients included, with gates open; with
gates shut it leaves the decoder's logits alone to the bit; no word sees an image that it must not see; and
padding, the cache and beams change nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from bridges import (Flamingo, GatedCrossAttention, Linear, MAPL, MLP, QFormer, QFormerLayer, Resampler,
                     ZeroInit, ZeroInitV2)
from papers import ALL_BRIDGES, make_bridge
from papers.blip2_stage1 import Stage1
from papers.llama_adapter import ZeroInitV1
from conftest import SMALL, TINY, TINY_VIT, check, fixed_loss, golden, stir, tiny_decoder, tiny_vlm
from eval import generate_ids
from model import (Bridge, Cache, Context, Decoder, DecoderConfig, EncoderBlock, IGNORE, IMAGE, VLM,
                   ViTConfig, merge_heads, next_token_loss, rope_frequencies, split_heads, widen)
from support.formats.adapter import VISUAL_NAMES
from support.formats.checkpoint import Checkpoint, fill
from support.formats.files import UserError, write_tensors
from support.formats.flamingo import RESAMPLER_NAMES, XATTN_NAMES
from support.formats.llama import load_decoder, meta_names
from support.formats.mapl import MAPL_NAMES
from support.formats.names import as_source, expand
from support.formats.vision import load_vit
from support.formats.vlm import load_bridge_file, load_vlm, save_vlm

WB = ("weight", "bias")
IMG = IMAGE


# --- published numbers, by a table of names per case --------------------------------------------------------


def pour(
    module: nn.Module, theirs: dict, names: dict, ours_only: tuple = (), unused: tuple = ()
) -> nn.Module:
    """Give every parameter its published tensor (names: ours → theirs); strict both ways."""
    used = set()
    with torch.no_grad():
        for ours, p in module.named_parameters():
            if ours.startswith(ours_only):
                continue
            source = as_source(names.get(ours, ours))
            p.copy_(source.derive(theirs[source.name]).reshape(p.shape))
            used.add(source.name)
    assert {k for k in theirs if not k.startswith(unused)} <= used
    return module.eval()


def check_grads(case: dict, expected: dict, *modules_and_names) -> None:
    """Every stored gradient against ours; the pieces of a fused matrix are joined first."""
    mine = {}
    for module, names in modules_and_names:
        for ours, p in module.named_parameters():
            source = as_source(names.get(ours, ours))
            mine.setdefault(source.name, []).append((getattr(source, "index", 0), p))
    keys = [k for k in expected if k.startswith("grad.") and k != "grad.loss"]
    assert keys
    for key in keys:
        pieces = [p.grad for _, p in sorted(mine[key.removeprefix("grad.")], key=lambda piece: piece[0])]
        check(
            case,
            key,
            torch.cat(pieces).reshape(expected[key].shape)
            if len(pieces) > 1
            else pieces[0].reshape(expected[key].shape),
            expected[key],
        )


def test_mapl_is_the_published_mapper():
    folder, case, x, expected = golden("mapl-mapper")
    names = expand(MAPL_NAMES, 2)
    mapl = pour(
        MAPL(DecoderConfig(width=36), 20, constants=6, width=24, layers=2, heads=4),
        load_file(folder / "model.safetensors"),
        names,
    )
    y = mapl.prefix(mapl.see(x["x"]))
    check(case, "y", y, expected["y"])
    loss = fixed_loss(y)
    loss.backward()
    check(case, "grad.loss", loss, expected["grad.loss"])
    check_grads(case, expected, (mapl, names))


def test_zero_init_is_pefts_adaption_prompt():
    folder, case, x, expected = golden("adapter-peft")
    decoder = load_decoder(folder)
    bridge = ZeroInit(decoder.config, 20, prompts=5, adapted=2, tanh=False, gate_per="layer")
    theirs = {
        k.removeprefix("base_model.model."): v
        for k, v in load_file(folder / "adapter" / "adapter_model.safetensors").items()
    }
    key = "model.layers.{}.self_attn.adaption_{}"
    with torch.no_grad():
        for l in (1, 2):  # the topmost two of three layers
            bridge.prompts[l - 1] = theirs[key.format(l, "prompt")]
            bridge.gate[l] = theirs[key.format(l, "gate")]
    logits = decoder(x["input_ids"], bridge=bridge)
    check(case, "logits", logits, expected["logits"])
    loss = fixed_loss(logits)
    loss.backward()
    check(case, "grad.loss", loss, expected["grad.loss"])
    for l in (1, 2):
        check(
            case,
            "grad." + key.format(l, "prompt"),
            bridge.prompts.grad[l - 1 : l],
            expected["grad." + key.format(l, "prompt")],
        )
        check(
            case,
            "grad." + key.format(l, "gate"),
            bridge.gate.grad[l],
            expected["grad." + key.format(l, "gate")],
        )
    mask = x["padded_attention_mask"].bool()
    with torch.no_grad():
        padded = decoder(x["padded_input_ids"], mask, bridge=bridge)
    check(case, "padded_logits", padded * mask[..., None], expected["padded_logits"])
    check(
        case,
        "generated_ids",
        decoder.generate(x["input_ids"][:, :5], 10, bridge=bridge),
        expected["generated_ids"],
    )


def test_zero_init_is_the_authors_adapter_with_and_without_tanh():
    folder, case, x, expected = golden("adapter-llama-v1")
    decoder, adapter = load_decoder(folder), load_file(folder / "adapter.safetensors")
    bridge = ZeroInit(decoder.config, 20, prompts=5, adapted=3)
    with torch.no_grad():
        bridge.prompts.copy_(adapter["adapter_query.weight"].view(3, 5, 24))
        bridge.gate.copy_(torch.stack([adapter[f"layers.{l}.attention.gate"].flatten() for l in range(4)]))
    check(case, "logits", decoder(x["input_ids"], bridge=bridge), expected["logits"])
    labels = x["labels"].masked_fill(x["labels"] == 0, IGNORE)                  # their ignored id is 0
    total, n = next_token_loss(decoder, labels, tokens=x["input_ids"], bridge=bridge)
    loss = total / n
    loss.backward()
    check(case, "loss", loss, expected["loss"])
    check(
        case,
        "grad.adapter_query.weight",
        bridge.prompts.grad.view(15, 24),
        expected["grad.adapter_query.weight"],
    )
    for l in (1, 2, 3):
        check(
            case,
            f"grad.gate.{l}",
            bridge.gate.grad[l].view(1, 4, 1, 1),
            expected[f"grad.layers.{l}.attention.gate"],
        )
    assert not bridge.gate.grad[0].any()  # the lowest layer is not adapted
    bridge.tanh = False  # the same repository's inference file
    with torch.no_grad():
        check(
            case,
            "inference_code_logits",
            decoder(x["input_ids"], bridge=bridge),
            expected["inference_code_logits"],
        )


def test_zero_init_is_the_authors_second_version_with_images(tmp_path):
    folder, case, x, expected = golden("adapter-llama-v2-multimodal")
    adapter = load_file(folder / "adapter.safetensors")
    biases = {
        k.removeprefix("llama."): v
        for k, v in adapter.items()
        if k.startswith("llama.") and not k.endswith("gate")
    }
    write_tensors(tmp_path / "both.safetensors", {**load_file(folder / "model.safetensors"), **biases})
    decoder = Decoder(
        DecoderConfig(
            vocab_size=72,
            width=24,
            layers=3,
            heads=4,
            kv_heads=4,
            head_width=6,
            hidden=64,
            tied=False,
            attention_bias="qo",
            mlp_bias=True,
        )
    )  # bias tuning leaves k and v alone
    fill(decoder, Checkpoint(tmp_path), meta_names(decoder.config))
    vit = load_vit(folder / "clip.safetensors", heads=4)
    assert vit.config == ViTConfig(image_size=28, patch=7, width=20, layers=2, heads=4, hidden=80)
    out = load_file(folder / "clip.safetensors")["clip.visual.proj"]  # (Di, width of the shared space)
    bridge = ZeroInitV2(decoder.config, 16, prompts=5, adapted=2, width=18, depth=2, heads=3, mlp=2)
    names = {**expand(VISUAL_NAMES, 2), "prompts": "adapter_query.weight"}
    pour(bridge, adapter, names, ours_only=("gate",), unused=("llama.",))
    with torch.no_grad():
        bridge.gate.copy_(
            torch.stack([adapter[f"llama.layers.{l}.attention.gate"].flatten() for l in range(3)])
        )
        features = vit.post_norm(vit(x["pixel_values"])) @ out  # all tokens, normalised and projected
    visual = bridge.see(features)
    check(case, "visual_query", visual, expected["visual_query"])
    logits = decoder(x["input_ids"], bridge=bridge, visual=visual)
    check(case, "logits", logits, expected["logits"])
    loss = fixed_loss(logits)
    loss.backward()
    check(case, "grad.loss", loss, expected["grad.loss"])
    gates = {k: expected.pop(k) for k in list(expected) if k.endswith("gate")}
    assert len(gates) == 2
    for key, theirs in gates.items():
        check(case, key, bridge.gate.grad[int(key.split(".")[3])].view(1, 4, 1, 1), theirs)
    check_grads(case, expected, (bridge, names))


def test_the_resampler_is_openflamingos():
    folder, case, x, expected = golden("flamingo-perceiver")
    names = expand(RESAMPLER_NAMES, 2)
    resampler = pour(Resampler(24, 5, 2, 3, 8, 4, "gelu", 0), load_file(folder / "model.safetensors"), names)
    y = resampler(x["x"].flatten(0, 2)).unflatten(0, (2, 3))
    check(case, "y", y, expected["y"])
    loss = fixed_loss(y)
    loss.backward()
    check(case, "grad.loss", loss, expected["grad.loss"])
    check_grads(case, expected, (resampler, names))


def test_gated_cross_attention_is_openflamingos():
    folder, case, x, expected = golden("flamingo-gated-xattn")
    block = pour(
        GatedCrossAttention(32, 24, 3, 8, 4, "gelu", False),
        load_file(folder / "model.safetensors"),
        XATTN_NAMES,
    )
    k, v = block.project(x["media"].flatten(1, 2))
    image = torch.arange(1, 4).repeat_interleave(4)                             # 3 images of 4 latents
    phi = x["media_locations"].cumsum(1)
    visible = image == phi[..., None]
    y = block(x["x"], k, v, visible)
    check(case, "y", y, expected["y"])
    check(case, "y_attention_only", block.attention(x["x"], k, v, visible), expected["y_attention_only"])
    later = (image == phi[:, -1:, None]).expand(-1, 2, -1)  # two further words follow all images
    check(case, "y_cached", block(x["x_next"], k, v, later), expected["y_cached"])
    loss = fixed_loss(y)
    loss.backward()
    check(case, "grad.loss", loss, expected["grad.loss"])
    check_grads(case, expected, (block, XATTN_NAMES))


def test_flamingo_is_openflamingo_as_a_whole():
    folder, case, x, expected = golden("flamingo-open")
    decoder, theirs = load_decoder(folder), load_file(folder / "flamingo.safetensors")
    with torch.no_grad():
        decoder.embed.weight.copy_(theirs.pop("lang_encoder.model.embed_tokens.weight"))
    bridge = Flamingo(decoder.config, 20, every=2, first=1, latents=5, depth=2, heads=2, head_width=8)
    names = {**expand(RESAMPLER_NAMES, 2, "perceiver.", "resampler."),
             **expand(XATTN_NAMES, [1, 3], "lang_encoder.model.layers.{i}.gated_cross_attn_layer.",
                      "blocks.{i}.")}
    pour(bridge, theirs, names)
    vlm = VLM(None, bridge, decoder, image_token=71)
    is_image, mask = x["input_ids"] == 71, x["attention_mask"].bool()
    tokens = x["input_ids"].masked_fill(is_image, IMG)
    features = torch.cat(
        [f[:n] for f, n in zip(x["vision_features"], is_image.sum(1))]
    )  # unused ones left out
    with torch.no_grad():
        check(
            case,
            "resampled",
            bridge.resampler(x["vision_features"].flatten(0, 1)).unflatten(0, (3, 3)),
            expected["resampled"],
        )
    logits = vlm(tokens, mask=mask, features=features) * mask[..., None]
    check(case, "logits", logits, expected["logits"])
    loss = fixed_loss(logits)
    loss.backward()
    check(case, "grad.loss", loss, expected["grad.loss"])
    check_grads(case, expected, (bridge, names))
    with torch.no_grad():  # rows 0 and 1 hold 3 and 2 images
        ids = vlm.generate(tokens[:2], features=features[:5], max_new_tokens=8)
    check(case, "generated_ids", ids, expected["generated_ids"])


# --- at the start -------------------------------------------------------------------------------------------

G = lambda seed=0: torch.Generator().manual_seed(seed)
N = TINY_VIT.tokens  # 10: nine patches and the class token


def images(m: int, seed: int = 0) -> torch.Tensor:
    """(m, N, Di) features as a ViT would give them."""
    return torch.randn(m, N, TINY_VIT.width, generator=G(seed))


GATED = [
    ("zero_init", dict(version=0)),
    ("zero_init", dict(version=1)),
    ("zero_init", dict(version=2)),
    ("zero_init", dict(gate_per="layer", tanh=False)),
    ("flamingo", {}),
    ("flamingo", dict(act="squared_relu", norm_media=True)),
    ("idefics", {}),
    ("idefics", dict(vector_gates=True, latents=0)),
]


@pytest.mark.parametrize("gradients", [False, True, "of the bridge alone"])
@pytest.mark.parametrize("image_token", [None, 7])
@pytest.mark.parametrize("name, options", GATED)
def test_a_gate_at_zero_leaves_the_logits_alone_to_the_bit(name, options, image_token, gradients):
    vlm = tiny_vlm(name, image_token=image_token, stirred=False, **options)
    tokens = torch.randint(61, (3, 9), generator=G())
    mask = torch.tensor([[1] * 9, [0, 0] + [1] * 7, [0] + [1] * 8]).bool()
    tokens[:, 3] = IMG  # one image per row: nothing else moves
    plain = tokens.masked_fill(tokens == IMG, 7) if image_token else tokens[tokens != IMG].view(3, 8)
    plain_mask = mask if image_token else mask[tokens != IMG].view(3, 8)
    vlm.decoder.requires_grad_(gradients is True)  # frozen: the decoder alone would need no graph
    with torch.set_grad_enabled(bool(gradients)):
        assert torch.equal(vlm(tokens, features=images(3)), vlm.decoder(plain))
        padded = vlm(tokens, mask=mask, features=images(3))
        assert torch.equal(padded[plain_mask], vlm.decoder(plain, plain_mask)[plain_mask])
    assert all((g == 0).all() for g in vlm.bridge.gates())
    if not gradients:
        assert torch.equal(
            vlm.generate(tokens, features=images(3), max_new_tokens=5), vlm.decoder.generate(plain, 5)
        )
        stir(vlm.bridge)                                                        # and open gates do move them
        assert (vlm(tokens, features=images(3)) - vlm.decoder(plain)).abs().max() > 1e-2


@pytest.mark.parametrize("name, options", GATED)
def test_a_gate_at_zero_leaves_a_bfloat16_decoder_alone_to_the_bit_and_in_bfloat16(name, options):
    """How a GPU trains: the frozen decoder stored in bfloat16, the bridge in float32, autocast between
    them."""
    vlm = tiny_vlm(name, image_token=7, stirred=False, **options)
    vlm.decoder.to(torch.bfloat16).requires_grad_(False)
    tokens = torch.randint(61, (2, 9), generator=G())
    tokens[:, 3] = IMG
    with torch.autocast("cpu", torch.bfloat16):
        logits, hidden = vlm(tokens, features=images(2), return_hidden=True)
        assert torch.equal(logits, vlm.decoder(tokens.masked_fill(tokens == IMG, 7)))
    assert {x.dtype for x in hidden} == {torch.bfloat16}


@pytest.mark.parametrize("name, options", GATED)
def test_the_first_step_moves_the_gates_and_nothing_else(name, options):
    vlm = tiny_vlm(name, image_token=7, stirred=False, **options)
    tokens = torch.tensor([[3, IMG, 4, 5, 6, 8]])
    bridge = vlm.bridge
    for step in range(2):
        vlm.zero_grad()
        fixed_loss(vlm(tokens, features=images(1))).backward()
        for key, p in bridge.named_parameters():
            grad = torch.zeros(1) if p.grad is None else p.grad
            if key.endswith("gate"):
                used = (
                    grad[bridge.first :] if name == "zero_init" else grad
                )  # gates below the adapted layers do nothing
                assert used.all(), key
            elif step == 0:
                assert not grad.any(), key  # exactly zero: tanh(0) multiplies the branch
        with torch.no_grad():  # one step on the gates alone...
            for key, p in bridge.named_parameters():
                if key.endswith("gate"):
                    p -= 0.1 * p.grad
    if name == "zero_init":
        assert all(p.any() for p in bridge.prompts.grad)  # ...and every prompt matrix learns
    else:
        assert all(b.ff.up.weight.grad.any() and b.k.weight.grad.any() for b in bridge.blocks)


# --- zero-init attention, the maths -------------------------------------------------------------------------


@pytest.mark.parametrize("tanh", [False, True])
def test_the_papers_concatenation_with_two_softmaxes_is_our_added_term(tanh):
    """Eq. 8: S^g = [softmax(S^K) · g ; softmax(S^{M+1})] over keys [prompts ; words], times the values of
    both, then W_o."""
    decoder, l, T = tiny_decoder(), 2, 6
    bridge = stir(ZeroInit(TINY, 20, prompts=3, adapted=3, tanh=tanh))
    attention, x = decoder.layers[l].attention, torch.randn(2, T, 32, generator=G())
    angle = (torch.arange(T)[:, None] * rope_frequencies(TINY)).repeat(1, 2)
    cos, sin = angle.cos()[None, None], angle.sin()[None, None]
    mine = attention(x, None, l, Context(cos, sin, causal=True, bridge=bridge))

    heads = lambda y, n: y.view(*y.shape[:-1], n, 8).transpose(-3, -2)          # (…, T, n·E) → (…, n, T, E)
    half = lambda y: torch.cat((-y[..., 4:], y[..., :4]), -1)
    turn = lambda y: y * cos + half(y) * sin
    wide = lambda y: y.repeat_interleave(2, -3)                                 # 4 query heads on 2 key heads
    prompts = bridge.prompts[l - bridge.first].expand(2, -1, -1)
    q = turn(heads(attention.q(x), 4))
    k = torch.cat(
        (wide(heads(attention.k(prompts), 2)), wide(turn(heads(attention.k(x), 2)))), dim=2
    )  # (B, H, Q+T, E)
    v = torch.cat((wide(heads(attention.v(prompts), 2)), wide(heads(attention.v(x), 2))), dim=2)
    scores = q @ k.transpose(-2, -1) / math.sqrt(8)
    words = scores[..., 3:].masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
    gate = bridge.gate[l].tanh() if tanh else bridge.gate[l]
    s_g = torch.cat((scores[..., :3].softmax(-1) * gate.view(4, 1, 1), words), dim=-1)
    by_eq8 = attention.o((s_g @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(
        mine, by_eq8, atol=1e-5, rtol=1e-5
    )  # float32, sums of 9 terms in another order
    assert (mine - attention(x, None, l, Context(cos, sin, causal=True, bridge=Bridge()))).abs().max() > 1e-2


def test_without_zero_init_prompts_and_words_share_one_softmax():
    """(Z5) against its own sum, and an equality that needs both: with the gate of (Z2) at the odds of the
    prompts, y = (Z_p y_p + Z_w y_w) / (Z_p + Z_w), where Z are the sums of exp(scores)."""
    decoder, l = tiny_decoder(), 3
    options = dict(prompts=4, adapted=2, width=16, depth=2, heads=2)
    bridge = stir(make_bridge("zero_init", TINY, 20, version=3, **options))
    attention, x = decoder.layers[l].attention, torch.randn(1, 5, 32, generator=G())
    cos, sin = torch.ones(1, 1, 5, 8), torch.zeros(1, 1, 5, 8)                  # RoPE does not turn
    with torch.no_grad():
        visual = bridge.see(images(1))
        assert (visual["image"] - bridge.see(images(1, 1))["image"]).abs().max() > 1e-2
        found = attention(x, visual, l, Context(cos, sin, causal=True, bridge=bridge))
        q, k, v = (split_heads(f(x), n) for f, n in ((attention.q, 4), (attention.k, attention.kv_heads),
                                                     (attention.v, attention.kv_heads)))
        k, v = widen(k, attention.heads), widen(v, attention.heads)
        pk, pv = attention.project(bridge.prompts[l - bridge.first] + visual["image"])
        own, words = (q @ y.transpose(-2, -1) / math.sqrt(8) for y in (pk, k))
        own, words = own.exp(), words.exp().tril()
        total = own.sum(-1, keepdim=True) + words.sum(-1, keepdim=True)
        expected = attention.o(merge_heads((own @ pv + words @ v) / total))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)       # float32, another order
    assert bridge.gates() is None and "gate" not in dict(bridge.named_parameters())


@pytest.mark.parametrize("version", [1, 2])
def test_one_vector_for_the_image_cannot_be_steered_by_the_question_and_one_per_prompt_can(version):
    """Version 1 adds the same I to every prompt: q·k(I) is equal for all of them and cancels in the softmax,
    so the weights over the prompts do not depend on the image, and the image adds tanh(g) v(I) to every word,
    whatever the word is."""
    decoder, l = tiny_decoder(), 3
    bridge = stir(
        make_bridge("zero_init", TINY, 20, prompts=4, adapted=2, version=version, width=16, depth=2, heads=2,
                    hidden=12)
    )
    attention, q = (
        decoder.layers[l].attention,
        torch.randn(1, 4, 7, 8, generator=G()),
    )  # seven words of any question
    with torch.no_grad():
        weights, added = [], []
        for seed in (1, 2):
            image = 3 * bridge.see(images(1, seed))  # (1, 1 or Q, D), large: the effect is not small
            k, v = attention.project(bridge.prompts[l - bridge.first] + image)
            weights.append((q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1))
            added.append(
                bridge.beside(l, q, attention.project, image) - bridge.beside(l, q, attention.project, None)
            )
        differ = (weights[0] - weights[1]).abs().max()
        spread = max((a - a[:, :, :1]).abs().max() for a in added)              # over the words
        assert all(a.abs().max() > 0.1 for a in added)                          # the image does something
        if version == 1:
            patches = torch.cat((images(1)[:, :1], images(1, 5)[:, 1:]), 1)
            assert torch.equal(
                bridge.see(images(1)), bridge.see(patches)
            )  # I comes from the class token alone
            # 1e-5: float32; the score of a prompt is a sum of 8 products that each round at 1e-7 of their
            # size
            assert differ < 1e-5 and spread < 1e-5
            constant = bridge.gate[l].tanh().view(4, 1, 1) * attention.project(image)[1]
            torch.testing.assert_close(added[1], constant.expand_as(added[1]), atol=1e-5, rtol=1e-5)
        else:
            assert differ > 1e-2 and spread > 1e-2


def test_prompts_leave_the_words_own_attention_alone():
    """Two softmaxes: scaling the gate scales the branch, so the words' part is what remains at gate 0, bit
    for bit."""
    decoder, tokens = tiny_decoder(), torch.randint(61, (1, 6), generator=G())
    bridge = stir(
        ZeroInit(TINY, 20, prompts=3, adapted=1)
    )  # the last layer only: nothing downstream
    seen = []
    hook = decoder.layers[3].attention.o.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for factor in (0.0, 1.0, 2.0):
            value = torch.atanh(torch.full((4,), 0.3) * factor)
            bridge.gate[3] = value
            decoder(tokens, bridge=bridge)
    hook.remove()
    torch.testing.assert_close(
        seen[2] - seen[0], 2 * (seen[1] - seen[0]), atol=1e-5, rtol=1e-5
    )  # linear in tanh(g)


# --- who sees what, by perturbation -------------------------------------------------------------------------

TWO = torch.tensor([[3, IMG, 4, 5, IMG, 6, 8, 9]])                              # images at 1 and 4


def moved(a: torch.Tensor, b: torch.Tensor) -> list[int]:
    """Positions (dimension 1) at which the two are not equal to the bit."""
    return (a != b).flatten(2).any(-1)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("see_all", [False, True])
def test_flamingos_words_see_the_last_image_only(see_all):
    vlm = tiny_vlm("flamingo", image_token=7, see_all=see_all)
    plain, first, second = images(2), images(2), images(2)
    first[0], second[1] = images(1, 8)[0], images(1, 9)[0]
    x = torch.randn(1, 8, 32, generator=G())
    with torch.no_grad():
        block = {}
        for key, f in (("plain", plain), ("first", first), ("second", second)):
            inputs, _ = vlm.prepare(TWO, f)
            block[key] = vlm.bridge.before(
                1, x, inputs["visual"]
            )  # one block alone: no mixing over positions
        assert moved(block["plain"], block["first"]) == ([1, 2, 3, 4, 5, 6, 7] if see_all else [1, 2, 3])
        assert moved(block["plain"], block["second"]) == [
            4,
            5,
            6,
            7,
        ]  # the tag sees its own image, as in OpenFlamingo
        # the whole decoder: self-attention carries it onwards, never back
        logits = [vlm(TWO, features=f) for f in (plain, first, second)]
        assert moved(logits[0], logits[1]) == [1, 2, 3, 4, 5, 6, 7]
        assert moved(logits[0], logits[2]) == [4, 5, 6, 7]


def test_a_word_before_any_image_gets_exactly_nothing_from_attention():
    vlm = tiny_vlm("flamingo", image_token=7)
    inputs, _ = vlm.prepare(TWO, images(2))
    visual, x = inputs["visual"], torch.randn(1, 8, 32, generator=G())
    phi = visual["where"].columns(8)
    assert phi.tolist() == [[0, 1, 1, 1, 2, 2, 2, 2]]
    with torch.no_grad():
        y = vlm.bridge.blocks[0].attention(x, *visual["kv"][0], visual["image"][:, None] == phi[..., None])
    assert not y[:, 0].any() and (y[:, 1:] != 0).any(-1).all()


def test_flamingo_cares_for_the_order_of_images_not_of_patches():
    vlm = tiny_vlm("flamingo", image_token=7)
    f, shuffle = images(2), torch.randperm(N, generator=G())
    with torch.no_grad():
        same = vlm(TWO, features=f[:, shuffle])
        torch.testing.assert_close(
            same, vlm(TWO, features=f), atol=1e-5, rtol=1e-5
        )  # no positions: sums in another order
        assert (vlm(TWO, features=f.flip(0)) - vlm(TWO, features=f)).abs().max() > 1e-2


def test_the_papers_norm_on_the_keys_makes_the_latents_scale_irrelevant():
    for norm_media in (True, False):
        block = stir(GatedCrossAttention(32, 20, 2, 8, 4, "gelu", norm_media))
        media = torch.randn(1, 6, 20, generator=G())
        close = torch.allclose(
            block.project(100 * media)[0], block.project(media)[0], atol=1e-3
        )  # the norm's ε is all that differs
        assert close == norm_media


def test_a_learned_time_tells_images_apart():
    vlm = tiny_vlm("flamingo", image_token=7, times=2)
    f = images(1).expand(2, -1, -1)                                             # the same picture twice
    latents = vlm.bridge.see(f, vlm.prepare(TWO, f)[0]["visual"]["where"])["kv"][0][0][0]
    assert (latents[:, :3] - latents[:, 3:]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="image number 3 .* 2 time embeddings"):
        vlm(torch.tensor([[IMG, IMG, IMG, 4]]), features=images(3))


TEXT = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.mark.parametrize("kind", ["itm", "itg", "itc"])
def test_the_qformers_three_masks_by_perturbation(kind):
    former = stir(
        QFormer(TINY, 20, queries=3, width=16, layers=3, heads=2, hidden=24, vocab=30, positions=12)
    )
    image, other = images(1), images(1, 5)
    changed = TEXT.clone()
    changed[0, 3] = 20                                                          # the fourth word
    with torch.no_grad():
        plain, word, picture = (
            former.encode(i, t, kind)[-1] for i, t in ((image, TEXT), (image, changed), (other, TEXT))
        )
    queries, words = [0, 1, 2], [3, 4, 5, 6, 7]
    assert moved(plain, word) == {"itm": queries + words, "itg": [6, 7], "itc": words}[kind]
    assert moved(plain, picture) == (queries if kind == "itc" else queries + words)
    padding = torch.tensor([[1, 1, 1, 0, 0]]).bool()  # a padded word is seen by nobody
    with torch.no_grad():
        a, b = (former.encode(image, t, kind, padding)[-1] for t in (TEXT, changed))
    assert set(moved(a, b)) <= {6, 7}
    hidden = torch.tensor([[True] * 4 + [False] * 6])                           # nor a hidden patch
    far = image.clone()
    far[:, 7] = 3.0
    with torch.no_grad():
        assert torch.equal(*(former.encode(i, TEXT, kind, image_mask=hidden)[-1] for i in (image, far)))


def test_the_three_masks_are_the_figures():
    from bridges import qformer_mask

    mask = {
        kind: qformer_mask(kind, 2, torch.ones(1, 3, dtype=torch.bool))[0, 0].int().tolist()
        for kind in ("itm", "itg", "itc")
    }
    assert mask["itm"] == [[1, 1, 1, 1, 1]] * 5
    assert mask["itg"] == [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert mask["itc"] == [[1, 1, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 1]] * 3


def test_equal_queries_would_stay_equal_for_ever():
    former = stir(QFormer(TINY, 20, queries=3, width=16, layers=3, heads=2, hidden=24))
    with torch.no_grad():
        former.queries.copy_(former.queries[:1].expand_as(former.queries))
        y = former.encode(images(1))[-1]
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    assert (
        QFormer(TINY, 20, queries=3, width=16, layers=3, heads=2, hidden=24).queries.std() > 1e-3
    )  # so they are born apart


def test_the_instruction_reaches_the_queries_and_only_they_go_on():
    """InstructBLIP: the text is read beside the queries; the first Q rows alone become soft tokens."""
    vlm = tiny_vlm("qformer", vocab=30, positions=12)
    tokens = torch.tensor([[IMG, 4, 5]])
    with torch.no_grad():
        silent, a, b = (vlm(tokens, features=images(1), bridge_tokens=t) for t in (None, TEXT, TEXT.flip(1)))
    assert silent.shape == a.shape == (1, 3 + 2, 61)
    assert (a - b).abs().max() > 1e-3 and (a - silent).abs().max() > 1e-3
    with pytest.raises(ValueError, match="no text branch.*vocab=30523"):
        tiny_vlm("qformer")(tokens, features=images(1), bridge_tokens=TEXT)


# --- the splice ---------------------------------------------------------------------------------------------

ROWS = [
    [3, IMG, 4, 5, IMG, 6],
    [7, 8],
    [IMG],
    [9, 10, 11, IMG, 12, 13, 14],
    [IMG, IMG, 15],
]  # 2, 0, 1, 1 and 2 images


def batch(rows: list, side: str):
    """Rows of ids → tokens (B, T), mask (B, T) or None, labels: the id itself, every third one ignored
    (images are not: -200 % 3 is 1)."""
    T = max(map(len, rows))
    tokens, mask = torch.zeros(len(rows), T, dtype=torch.long), torch.zeros(len(rows), T, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        tokens[i, at], mask[i, at] = torch.tensor(row), True
    labels = torch.where(mask & (tokens % 3 > 0), tokens, IGNORE)
    return tokens, None if mask.all() else mask, labels


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[1:2], [[3, IMG, 4], [IMG, IMG, 5], [6, 7, 8]]])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "name, image_token", [("linear", None), ("none", None), ("none", 7), ("flamingo", 7), ("flamingo", None)]
)
def test_the_splice_is_a_loop_over_rows(name, image_token, side, rows):
    """What `prepare` scatters in one go, written as lists: soft tokens, the ordinary token or nothing in
    place of each image."""
    vlm = (
        tiny_vlm(name, image_token=image_token)
        if name != "none"
        else VLM(None, Bridge(), tiny_decoder(), image_token)
    )
    tokens, mask, labels = batch(rows, side)
    features = images(int((tokens == IMG).sum()))
    with torch.no_grad():
        inputs, new_labels = vlm.prepare(tokens, features, mask, labels)
        soft = vlm.bridge.prefix(features)
    m, built = 0, []
    for row in rows:
        embeds, expect, last, seen = [], [], [], 0
        for token in row:
            word = token
            if token == IMG:
                seen, m = seen + 1, m + 1
                if soft is not None:
                    embeds += list(soft[m - 1])
                    expect += [IGNORE] * N
                    last += [None] * N  # a soft token's own entry is never read
                    continue
                if image_token is None:
                    continue
                word = image_token
            embeds.append(vlm.decoder.embed.weight[word])
            expect.append(IGNORE if token == IMG or token % 3 == 0 else token)
            last.append(seen)
        built.append((embeds, expect, last))
    longest = max(len(e) for e, _, _ in built)
    T = inputs["embeds"].shape[1]
    assert T == (longest if image_token is None else tokens.shape[1])
    assert (inputs["mask"] is None) == all(len(e) == T for e, _, _ in built)
    where = inputs["visual"]["where"].last if name == "flamingo" else None
    for i, (embeds, expect, last) in enumerate(built):
        n = len(embeds)
        at = range(T - n, T) if side == "left" and mask is not None else range(n)
        assert new_labels[i, list(at)].tolist() == expect
        if inputs["mask"] is not None:
            assert inputs["mask"][i].tolist() == [p in at for p in range(T)]
        for p, e in zip(at, embeds):
            assert torch.equal(inputs["embeds"][i, p], e)
        if where is not None:
            assert all(want is None or int(where[i, p]) == want for p, want in zip(at, last))
    outside = new_labels.clone()
    if inputs["mask"] is not None:
        outside[inputs["mask"]] = IGNORE
        assert (outside == IGNORE).all()                                        # padding is never supervised


def test_the_loss_is_the_cross_entropy_of_the_shifted_labels():
    for name in SMALL:
        rows = ROWS[1:4] if name in ONE_IMAGE else ROWS
        vlm = tiny_vlm(name, image_token=7 if name == "flamingo" else None)
        tokens, mask, labels = batch(rows, "right")
        features = images(int((tokens == IMG).sum()))
        with torch.no_grad():
            total, n = vlm.loss(tokens, labels, mask=mask, features=features)
            inputs, moved_labels = vlm.prepare(tokens, features, mask, labels)
            logits = vlm.decoder(**inputs)
        want = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), moved_labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        torch.testing.assert_close(
            total, want, atol=1e-4, rtol=1e-5
        )  # float32 sum of some 15 losses of size 5
        # a first word is predicted by nothing, except after an image at the very front
        assert n == int((moved_labels[:, 1:] != IGNORE).sum()) and n > 0


def test_a_wrong_number_of_images_is_said_in_words():
    with pytest.raises(ValueError, match="2 image placeholders but 1 images"):
        tiny_vlm("linear")(TWO, features=images(1))
    with pytest.raises(ValueError, match="one image per text"):
        tiny_vlm("zero_init")(TWO, features=images(2))


# --- padding, cache and beams change nothing ----------------------------------------------------------------

# 1e-4 below: float32 through four layers whose matrices have other shapes, on logits of order 1 to 10

VARIANTS = [*[(name, {}) for name in SMALL], ("zero_init", dict(version=0)), ("zero_init", dict(version=1)),
            ("zero_init", dict(version=3)), ("flamingo", dict(see_all=True)),
            ("flamingo", dict(every=1, first=0, times=2)),
            ("idefics", dict(latents=0, qk_norm=False, vector_gates=True)),
            ("cogvlm", dict(full_mask=True, every=2)), ("cogvlm", dict(bias=True, mlp=False)),
            ("visualgpt", dict(mix="sigmoid", tau=0.0)), ("vcgpt", dict(fuse="inside")),
            ("vcgpt", dict(fuse="alone"))]


ONE_IMAGE = ("zero_init", "prefix_tuning")             # of each text


def rows_for(name: str) -> list:
    return [[3, 4, IMG, 5], [7, 8], [IMG, 6, 9, 10, 11, 12]] if name in ONE_IMAGE else ROWS


def per_row(rows: list, features: torch.Tensor):
    """Each row alone, with its own images."""
    m = 0
    for row in rows:
        n = row.count(IMG)
        yield torch.tensor([row]), features[m:m + n]
        m += n


@pytest.mark.parametrize("image_token", [None, 7])
@pytest.mark.parametrize("name, options", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows(name, options, side, image_token):
    """Left padding = right padding = no padding, with rows of no, one and two images side by side."""
    vlm, rows = tiny_vlm(name, image_token=image_token, **options), rows_for(name)
    tokens, mask, _ = batch(rows, side)
    features = images(int((tokens == IMG).sum()))
    with torch.no_grad():
        logits, inputs = vlm(tokens, mask=mask, features=features), vlm.prepare(tokens, features, mask)[0]
        for i, (row, own) in enumerate(per_row(rows, features)):
            if not (vlm.bridge.soft_tokens or image_token) and row.shape[1] == len(own):
                continue  # its images dropped, no word is left
            alone = vlm(row, features=own)[0]
            torch.testing.assert_close(logits[i][inputs["mask"][i]], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, options", VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_cache_changes_nothing_beside_a_bridge(name, options, padded):
    vlm = tiny_vlm(name, image_token=7 if name == "flamingo" else None, **options)
    rows = (
        [[3, IMG, 4, 5], [6, 7, IMG, 8]]
        if name in ONE_IMAGE
        else [[3, IMG, 4, IMG, 5], [IMG, 6, 8, IMG, 9]]
    )
    rows[1] = rows[1][2 if padded else 0:]
    tokens, mask, _ = batch(rows, "left")
    features = images(int((tokens == IMG).sum()))
    more = torch.randint(61, (2, 4), generator=G(3))
    with torch.no_grad():
        inputs, _ = vlm.prepare(tokens, features, mask)
        cache = Cache(vlm.decoder.config, 2, inputs["embeds"].shape[1] + 4, "cpu", torch.float32)
        steps = [vlm.decoder(**inputs, cache=cache)[:, -1:]]
        for t in range(4):
            steps.append(
                vlm.decoder(more[:, t : t + 1], cache=cache, bridge=vlm.bridge, visual=inputs["visual"])
            )
        full_mask = None if mask is None else torch.cat((mask, mask.new_ones(2, 4)), 1)
        whole = vlm(torch.cat((tokens, more), 1), mask=full_mask, features=features)
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, -5:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("image_token", [None, 7])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name, options", VARIANTS)
def test_generating_for_a_batch_is_generating_for_its_rows(name, options, beams, image_token):
    vlm = tiny_vlm(name, image_token=image_token, **options)
    if name in ONE_IMAGE:
        groups = [rows_for(name), [[3, 4, 5, 6], [7, IMG, 8, 9]]]
    else:  # the second needs no padding before its images unfold
        groups = [[r for r in ROWS if len(r) > 1], [[3, IMG, 4, 5], [6, 7, 8, 9], [IMG, 10, IMG, 11]]]
    for rows in groups:
        tokens, mask, _ = batch(rows, "left")
        features = images(int((tokens == IMG).sum()))
        ids = generate_ids(vlm, tokens, 5, beams, mask, features=features)
        for mine, (row, own) in zip(ids, per_row(rows, features)):
            assert torch.equal(mine, generate_ids(vlm, row, 5, beams, features=own)[0])


def test_a_text_without_any_image_is_read_like_one_beside_others():
    """Flamingo's feed-forward works on words that see no image too; that must not depend on who else is in
    the batch."""
    for name in SMALL:
        vlm = tiny_vlm(name, image_token=7)
        row = torch.tensor([[3, 4, 5]])
        with torch.no_grad():
            alone = vlm(row, features=images(0))
            assert torch.equal(vlm(row), alone)                 # nor need it be told that there is none
            beside = vlm(torch.cat((row, torch.tensor([[3, IMG, 4]]))), features=images(1))
        torch.testing.assert_close(beside[0, :3], alone[0], atol=1e-4, rtol=1e-4)
        for beams in (1, 2):
            assert generate_ids(vlm, row, 3, beams).shape == (1, 3)
            with pytest.raises(ValueError, match="the text is empty"):
                generate_ids(vlm, row[:, :0], 3, beams)


@pytest.mark.parametrize("how", ["autocast", "weights"])
@pytest.mark.parametrize("name, options", VARIANTS)
def test_bfloat16_follows_float32_and_learns(name, options, how):
    vlm, rows = tiny_vlm(name, image_token=7, **options), rows_for(name)
    tokens, mask, labels = batch(rows, "left")
    features = images(int((tokens == IMG).sum()))
    with torch.no_grad():
        exact = vlm(tokens, mask=mask, features=features)
        real = vlm.prepare(tokens, features, mask)[0]["mask"]
        if hasattr(vlm.bridge, "writer"):               # told's words: of two equally near ones the same
            writer = vlm.bridge.writer
            chosen = writer.nearest(writer.soft(writer.mapper.see(features)))
            writer.nearest = lambda soft: chosen
    if how == "weights":
        vlm, features = vlm.bfloat16(), features.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        logits = vlm(tokens, mask=mask, features=features).float()
        total, n = vlm.loss(tokens, labels, mask=mask, features=features)
        assert generate_ids(vlm, tokens, 3, 2, mask, features=features).shape == (
            len(rows),
            3,
        )
    # 8 bits of mantissa through some 60 roundings: about 2 %; twice that, since the bridge adds its own depth
    assert (logits - exact)[real].norm() < 4e-2 * exact[real].norm()
    (total / n).backward()
    assert all(torch.isfinite(p.grad).all() for p in vlm.bridge.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.any() for p in vlm.bridge.parameters())


@pytest.mark.parametrize("name, options", GATED)
def test_a_gate_at_zero_is_nothing_in_bfloat16_too(name, options):
    vlm, tokens = tiny_vlm(name, image_token=7, stirred=False, **options), torch.tensor([[3, IMG, 4, 5, 6]])
    plain = tokens.masked_fill(tokens == IMG, 7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vlm(tokens, features=images(1)), vlm.decoder(plain))
    with torch.no_grad():
        assert torch.equal(vlm.bfloat16()(tokens, features=images(1).bfloat16()), vlm.decoder(plain))


@pytest.mark.parametrize("name", SMALL)
def test_pixels_and_cached_features_are_the_same(name):
    vlm = tiny_vlm(name, image_token=7)
    pixels, tokens = torch.randn(2, 3, 24, 24, generator=G()), torch.tensor([[3, IMG, 4], [IMG, 5, 6]])
    with torch.no_grad():
        features = vlm.features(pixels)
        assert features.shape == (2, *vlm.features(None).shape[1:])
        if vlm.bridge.reads != "pooled":                                # see tests/papers/test_clipcap.py
            assert features.shape == (2, N - (not vlm.bridge.reads_cls), TINY_VIT.width)
            hidden = vlm.vit(pixels, return_hidden=True)[vlm.bridge.reads]
            assert torch.equal(features, hidden if vlm.bridge.reads_cls else hidden[:, 1:])
        assert torch.equal(vlm(tokens, pixels), vlm(tokens, features=features))


# --- on disk, by name, by number ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_a_run_folder_loads_back_to_the_bit(name, tmp_path):
    vlm = tiny_vlm(name, image_token=7, reads=-3)
    save_vlm(vlm, tmp_path)
    again = load_vlm(tmp_path)
    assert (again.bridge.name, again.bridge.reads, again.image_token) == (name, -3, 7)
    pixels, tokens = torch.randn(1, 3, 24, 24, generator=G()), torch.tensor([[3, IMG, 4]])
    with torch.no_grad():
        assert torch.equal(again(tokens, pixels), vlm(tokens, pixels))
    file = tmp_path / "bridge.safetensors"
    assert set(load_file(file)) == set(vlm.bridge.state_dict())  # the bridge's parameters and no other
    other = "mlp" if name != "mlp" else "linear"
    with pytest.raises(UserError, match=f'holds a "{name}" bridge, not "{other}"'):
        load_bridge_file(make_bridge(other, TINY, TINY_VIT.width), file)
    tensors = load_file(file)
    victim = sorted(tensors)[0]
    write_tensors(file, {k: v for k, v in tensors.items() if k != victim}, {"bridge": name})
    with pytest.raises(UserError, match=f'tensor "{victim}" is missing'):
        load_vlm(tmp_path)


def test_a_bridge_owns_all_of_its_parameters_and_the_decoder_none():
    for name in SMALL:
        vlm = tiny_vlm(name)
        assert set(vlm.decoder.state_dict()) == set(Decoder(TINY).state_dict())
        assert not {id(p) for p in vlm.bridge.parameters()} & {
            id(p) for p in [*vlm.decoder.parameters(), *vlm.vit.parameters()]
        }


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("qfomer", {}, 'unknown bridge "qfomer"; did you mean "qformer"'),
        ("zzz", {}, "Known: linear, mlp, mapl, qformer, zero_init, flamingo, frozen"),
        ("mapl", dict(constant=3), 'mapl has no option "constant"; did you mean "constants"'),
        ("linear", dict(read=1), 'did you mean "reads"'),
        ("flamingo", dict(xyz=1), "Known: every, first"),
        ("zero_init", dict(adapted=5), "topmost 5 layers, but the decoder has 4"),
        ("zero_init", dict(adapted=0), "adapted=1..4"),
        ("zero_init", dict(adapted=2, gate_per="heads"), '"head" or "layer", not "heads"'),
        ("zero_init", dict(adapted=2, version=4), "0, 1, 2 and 3, not 4"),
        ("mapl", dict(width=10, heads=3), "10.*3"),
        ("qformer", dict(width=10, heads=3), "10.*3"),
        ("zero_init", dict(adapted=2, width=10, heads=3), "10.*3"),
        ("flamingo", dict(act="geluu"), 'no activation "geluu"; known: .*gelu'),
        ("flamingo", dict(first=4), "first=4 is above the decoder; give 0..3"),
        ("flamingo", dict(latents=0), "latents is 0, not a whole number of at least 1"),
        ("qformer", dict(queries=0), "qformer needs one query or more beside a decoder"),
        ("minigpt4", dict(queries=0), "queries is 0, not a whole number of at least 1"),
        ("kosmos1", dict(queries=0), "queries is 0, not a whole number of at least 1"),
    ],
)
def test_an_unknown_name_or_impossible_option_is_said_in_words(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_bridge(name, TINY, 20, **options)


C7, C13 = (
    DecoderConfig(width=d, layers=l, heads=d // 128, kv_heads=d // 128, head_width=128)
    for d, l in ((4096, 32), (5120, 40))
)
width = lambda d: DecoderConfig(width=d)


def numel(build) -> int:
    with torch.device("meta"):
        built = build()
    return sum(p.numel() for m in (built if isinstance(built, tuple) else (built,)) for p in m.parameters())


def without(module: nn.Module, *names: str) -> nn.Module:
    """The module less some of its parts."""
    for name in names:
        setattr(module, name, None)
    return module


text_former = lambda d, v: QFormer(width(d), v, vocab=30523)
PUBLISHED = {  # what: (published, build); sources in reference/*.md
    "LLaVA 7B": (4_198_400, lambda: Linear(C7, 1024)),
    "LLaVA 13B": (5_248_000, lambda: Linear(C13, 1024)),
    "LLaVA-1.5 7B": (20_979_712, lambda: MLP(C7, 1024)),
    "LLaVA-1.5 13B": (31_467_520, lambda: MLP(C13, 1024)),
    "MiniGPT-4 7B": (3_149_824, lambda: Linear(C7, 768)),
    "MiniGPT-4 13B": (3_937_280, lambda: Linear(C13, 768)),
    "MiniGPT-v2": (23_072_768, lambda: Linear(C7, 5632)),
    "LiMBeR-CLIP": (12_587_008, lambda: Linear(C7, 3072)),
    "MAGMA's map": (8_392_704, lambda: Linear(C7, 2048)),
    "Mllama's projector": (31_461_376, lambda: Linear(C7, 7680)),
    "MAPL": (3_431_680, lambda: MAPL(C7, 1024)),
    "a layer of MAPL": (527_104, lambda: EncoderBlock(256, 8, 512, "relu", 1e-5)),
    # BLIP-2, stage 2: vision g = 1408, L = 1024; OPT-2.7B 2560, OPT-6.7B and FlanT5-XXL 4096, FlanT5-XL 2048
    **{
        f"BLIP-2 {v} {d}": (n, lambda d=d, v=v: QFormer(width(d), v))
        for n, d, v in (
            (107_133_696, 2560, 1408),
            (103_593_984, 2560, 1024),
            (108_314_880, 4096, 1408),
            (106_739_968, 2048, 1408),
            (103_200_256, 2048, 1024),
        )
    },
    "stage-2 Q-Former g": (
        105_137_664,
        lambda: without(QFormer(C7, 1408), "queries", "vision_norm", "project"),
    ),
    "stage-2 Q-Former L": (
        101_598_720,
        lambda: without(QFormer(C7, 1024), "queries", "vision_norm", "project"),
    ),
    "InstructBLIP 7B": (188_837_376, lambda: text_former(4096, 1408)),
    "BLIP-2's 188M": (188_834_560, lambda: without(text_former(4096, 1408), "vision_norm")),
    "bare Q-Former g": (
        185_660_160,
        lambda: without(text_former(4096, 1408), "queries", "vision_norm", "project"),
    ),
    "bare Q-Former L": (
        182_121_216,
        lambda: without(text_former(4096, 1024), "queries", "vision_norm", "project"),
    ),
    "encoder g": (161_823_744, lambda: text_former(4096, 1408).layers),
    "encoder L": (158_284_800, lambda: text_former(4096, 1024).layers),
    "BERT layer, one feed-forward": (
        2_363_904 + 4_723_968,
        lambda: QFormerLayer(768, 12, 3072, None, False, 0.0),
    ),
    "BERT layer, both": (2_363_904 + 2 * 4_723_968, lambda: QFormerLayer(768, 12, 3072, None, True, 0.0)),
    "with cross-attention g": (
        2_363_904 + 4_723_968 + 3_346_944,
        lambda: QFormerLayer(768, 12, 3072, 1408, False, 0.0),
    ),
    "with cross-attention L": (
        2_363_904 + 4_723_968 + 2_757_120,
        lambda: QFormerLayer(768, 12, 3072, 1024, False, 0.0),
    ),
    "stage 1 g": (186_705_470, lambda: Stage1(None, QFormer(None, 1408, vocab=30523))),
    "stage 1 L": (183_165_758, lambda: Stage1(None, QFormer(None, 1024, vocab=30523))),
    "LLaMA-Adapter": (1_229_824, lambda: ZeroInit(C7, 768)),
    "LLaMA-Adapter V2": (61_731_584, lambda: ZeroInitV2(C7, 768, adapted=31)),
    "a visual block of V2": (7_087_872, lambda: EncoderBlock(768, 16, 3072, "gelu", 1e-5)),
    "OpenFlamingo's resampler": (63_019_008, lambda: Flamingo(C7, 1024).resampler),
    "OpenFlamingo's block": (139_476_994, lambda: Flamingo(C7, 1024).blocks[0]),
    "OpenFlamingo 9B": (8 * 139_476_994 + 63_019_008, lambda: Flamingo(C7, 1024, every=4, first=3)),
}


@pytest.mark.parametrize("what", PUBLISHED)
def test_the_published_bridges_have_the_published_number_of_parameters(what):
    published, build = PUBLISHED[what]
    assert numel(build) == published


def matrices(module: nn.Module) -> nn.ParameterList:
    return nn.ParameterList(p for p in module.parameters() if p.ndim == 2)


def paper_flamingo(width: int, layers: int, every: int) -> Flamingo:
    config = DecoderConfig(
        width=width, layers=layers, heads=width // 128, kv_heads=width // 128, head_width=128
    )
    return Flamingo(
        config,
        1536,
        every=every,
        heads=width // 128,
        head_width=128,
        norm_media=True,
        act="squared_relu",
        resampler_heads=16,
        resampler_head_width=128,
    )


@pytest.mark.parametrize(
    "published, unit, build",
    [  # to the digits that were printed
        (1.79, 1e6, lambda: ZeroInitV1(C7, 768)),  # LLaMA-Adapter, multimodal
        (0.97, 1e6, lambda: ZeroInitV1(C7, 768, adapted=10)),  # with 10 layers
        (189.6, 1e6, lambda: text_former(5120, 1408)),
        (187.3, 1e6, lambda: text_former(2048, 1408)),  # InstructBLIP 13B, T5-XL
        (48.2, 1e6, lambda: paper_flamingo(2048, 24, 1).blocks[0]),
        (1.158, 1e9, lambda: paper_flamingo(2048, 24, 1).blocks),  # 3B
        (180.4, 1e6, lambda: paper_flamingo(4096, 40, 4).blocks[0]),
        (1.80, 1e9, lambda: paper_flamingo(4096, 40, 4).blocks),  # 9B
        (696.3, 1e6, lambda: paper_flamingo(8192, 80, 7).blocks[0]),
        (8.36, 1e9, lambda: paper_flamingo(8192, 80, 7).blocks),  # 80B
        (188.8, 1e6, lambda: matrices(paper_flamingo(2048, 24, 1).resampler)),
    ],
)  # their arithmetic leaves the norms out
def test_published_sizes_that_were_rounded_are_met_to_the_last_digit(published, unit, build):
    digits = len(str(published).split(".")[1])
    assert round(numel(build) / unit, digits) == published


def test_every_bridge_is_tested_here():
    assert set(SMALL) == set(ALL_BRIDGES)


def test_an_instruction_for_the_qformer_reaches_generate_and_loss_and_its_padding_is_not_read():
    vlm = tiny_vlm("qformer", vocab=61)
    tokens, text = torch.tensor([[5, IMAGE, 7, 8]]), torch.tensor([[3, 9, 11, 0]])
    real, x = torch.tensor([[True, True, True, False]]), torch.randn(1, 10, TINY_VIT.width)
    labels = torch.tensor([[IGNORE, IGNORE, 7, 8]])
    with torch.no_grad():
        a, _ = vlm.loss(tokens, labels, features=x, bridge_tokens=text, bridge_mask=real)
        b, _ = vlm.loss(tokens, labels, features=x, bridge_tokens=text[:, :3])
        c, _ = vlm.loss(tokens, labels, features=x, bridge_tokens=text)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # float32, sums of 7 and of 6 keys
        assert not torch.isclose(a, c, atol=1e-4)
        wrote = vlm.generate(tokens, features=x, bridge_tokens=text, bridge_mask=real, max_new_tokens=4)
        assert torch.equal(
            wrote, vlm.generate(tokens, features=x, bridge_tokens=text[:, :3], max_new_tokens=4)
        )
