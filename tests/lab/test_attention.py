"""`run_with_attention` shows the very weights that were used, maps lead back to patches, analyses count what
they say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support.lab.attention import (attention_to_patches, attention_weights, gate_history, overlay_attention,
                                   rollout, rollout_step, run_with_attention)
from bridges import GatedCrossAttention, PostNormAttention, ResamplerLayer
from conftest import SMALL, small_pictures, small_vlm, tiny_vlm
from model import Attend, Attention, EncoderBlock, IMAGE, VLM, attend, merge_heads, split_heads, widen
from papers.kosmos1 import Connector
from papers.vcgpt import FusionLayer
from support.formats.files import UserError

H, T, N = 4, 5, 10  # heads of the decoder, words behind the picture, ViT tokens with the class token
TOKENS = torch.tensor([[3, IMAGE, 5, 9, 14, 20, 33]])
PIXELS = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(5))


def vlm_of(name: str, **options) -> VLM:
    return tiny_vlm(name, image_token=7, **options)


# --- run_with_attention -------------------------------------------------------------------------------------

LAYERS = [f"decoder.layers.{l}.attention" for l in range(4)]
NAMES = {                # what each bridge shows besides the decoder's own attention, and its shape
    "linear": {}, "mlp": {}, "frozen": {}, "limber": {}, "clipcap": {}, "minigpt4_llama2": {}, "magma": {},
    "fromage": {}, "vlkd": {}, "gligen": {},
    "cogvlm": {},
    "clipcap_transformer": {f"bridge.blocks.{l}": (1, 2, 2 + 3, 2 + 3) for l in range(2)},
    "mapl": {f"bridge.blocks.{l}": (1, 2, N + 3, N + 3) for l in range(2)},
    "qformer": {**{f"bridge.layers.{l}.attention": (1, 2, 3, 3) for l in range(3)},
                **{f"bridge.layers.{l}.cross": (1, 2, 3, N) for l in (0, 2)}},
    "zero_init": {**{f"bridge.blocks.{l}": (1, 2, 3 + N, 3 + N) for l in range(2)},
                  **{f"bridge.softmax.{l}": (1, H, 7, 3) for l in (0, 1, 2)}},
    "flamingo": {**{f"bridge.resampler.layers.{l}": (1, 2, 3, 9 + 3) for l in range(2)},
                 **{f"bridge.blocks.{l}": (1, 2, 7, 3) for l in range(2)}},
    "idefics": {**{f"bridge.resampler.layers.{l}": (1, 2, 3, N + 3) for l in range(2)},
                **{f"bridge.blocks.{l}": (1, H, 7, 3) for l in range(2)}},
}
NAMES["minigpt4"], NAMES["prompt_tuning"] = NAMES["qformer"], {}
NAMES["prefix_tuning"] = {key: (1, H, 7, 3 + 7) for key in LAYERS}              # [prefix ; words]
NAMES["told"] = {f"bridge.writer.mapper.blocks.{l}": (1, 2, N + 3, N + 3) for l in range(2)}
NAMES["told_flamingo"] = NAMES["told"] | {f"bridge.reader.blocks.{l}": (1, H, 7, 3) for l in range(2)}
NAMES["kosmos1"] = {"bridge.connector": (1, 2, 3, N + 3)}
NAMES["visualgpt"] = {**{f"bridge.resampler.layers.{l}.attention": (1, 2, 9, 9) for l in range(2)},
                      **{f"bridge.blocks.{l}.levels.{j}": (1, 2, 7, 9) for l in range(4) for j in range(2)}}
NAMES["vcgpt"] = {f"bridge.blocks.{l}": (1, 2, 7, N) for l in range(2)}


@pytest.mark.parametrize("name", SMALL)
def test_every_attention_is_there_under_its_modules_name_and_its_rows_sum_to_1(name):
    vlm = vlm_of(name)
    with torch.no_grad():
        logits, attention = run_with_attention(vlm, TOKENS, PIXELS)
    assert set(attention) == {*LAYERS, *NAMES[name]}
    for key, weights in attention.items():
        assert weights.shape == (NAMES[name].get(key) or (1, H, logits.shape[1], logits.shape[1])), key
        # 1e-6: float32, sums of at most 17 terms
        assert (weights >= 0).all() and (weights.sum(-1) - 1).abs().max() < 1e-6, key


@pytest.mark.parametrize("name", SMALL)
def test_watching_changes_nothing_and_leaves_nothing_behind(name):
    vlm = vlm_of(name)
    watched, attention = run_with_attention(vlm, TOKENS, PIXELS)  # with gradients: explicit
    assert torch.equal(watched, vlm(TOKENS, PIXELS)) and attention
    with torch.no_grad():
        (watched, hidden), _ = run_with_attention(vlm, TOKENS, PIXELS, return_hidden=True)
        logits, plain = vlm(TOKENS, PIXELS, return_hidden=True)                 # the fused kernel
    # 2e-5: float32; the stirred logits reach 10, the fused kernel sums in another order
    torch.testing.assert_close(watched, logits, atol=2e-5, rtol=0)
    for a, b in zip(hidden, plain, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vlm.modules())


def test_a_forward_that_fails_leaves_nothing_behind():
    vlm = vlm_of("mapl")
    with pytest.raises(ValueError):
        run_with_attention(vlm, TOKENS[:, 2:], PIXELS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vlm.modules())


def again(m, args: tuple, w: torch.Tensor, beside: torch.Tensor | None):
    """The output of the attending module m from its inputs and the shown weights w: W_o (w V) and its
    surroundings."""
    read = lambda v, heads: m.o(merge_heads(w @ split_heads(v, heads)))
    if isinstance(m, Attention):
        y = w @ widen(split_heads(m.v(args[0]), m.kv_heads), m.heads)
        return m.o(merge_heads(y if beside is None else y + beside))
    if isinstance(m, Attend):
        return w @ args[2]
    if isinstance(m, FusionLayer):
        x = args[0] + m.o(merge_heads(w @ args[2])) * args[3].any(-1, keepdim=True)
        return x + m.mlp(m.norm2(x))
    if isinstance(m, EncoderBlock):
        x = args[0] + read(m.v(m.norm1(args[0])), m.heads)
        return x + m.down(m.act(m.up(m.norm2(x))))
    if isinstance(m, PostNormAttention):
        return m.norm(args[0] + read(m.v(args[1]), m.heads))
    if isinstance(m, Connector):
        return read(m.v(torch.cat(args, 1)), m.heads)
    if isinstance(m, ResamplerLayer):
        x = args[1] + read(m.v(torch.cat((m.norm_media(args[0]), m.norm_latents(args[1])), 1)), m.heads)
        return x + m.ff(x)
    assert isinstance(m, GatedCrossAttention)
    x, k, v, visible = args
    x = x + m.attention_gate.tanh() * m.o(merge_heads(w @ v)) * visible.any(-1, keepdim=True)
    return x + m.ff_gate.tanh() * m.ff(x)


@pytest.mark.parametrize("name", SMALL)
def test_every_output_follows_from_the_weights_that_were_shown(name):
    options = dict(attention=False) if name == "cogvlm" else {}     # no expert's q, k, v beside the decoder's
    vlm, calls = vlm_of(name, **options), {}
    modules = dict(vlm.named_modules())
    keep = lambda n: lambda m, args, y: calls.__setitem__(n, (args, y))
    hooks = [m.register_forward_hook(keep(n)) for n, m in modules.items()]
    with torch.no_grad():
        _, attention = run_with_attention(vlm, TOKENS, PIXELS)
        for h in hooks:
            h.remove()
        for key, weights in attention.items():
            if "softmax" in key:
                continue  # with its layer's attention, below
            beside, prompts, b = None, None, vlm.bridge
            if name == "prefix_tuning":  # what the prefix adds, beside the words
                V = b.see(vlm.features(PIXELS))[:, :, LAYERS.index(key), 1].transpose(1, 2)
                beside, weights = weights[..., :3] @ widen(V, modules[key].heads), weights[..., 3:]
            if name == "zero_init" and key in LAYERS[b.first:]:
                l = LAYERS.index(key)
                prompts = attention[f"bridge.softmax.{l - b.first}"]
            if prompts is not None:  # zero_init: y + tanh(g) · A_p V_p
                p = b.prompts[l - b.first] + b.see(vlm.features(PIXELS))
                beside = b.gate[l].tanh().view(-1, 1, 1) * (prompts @ modules[key].project(p)[1])
            args, y = calls[key]
            # 1e-5: float32; `see` ran again by the fused kernel
            mine = again(modules[key], args, weights, beside)
            torch.testing.assert_close(mine, y, atol=1e-5, rtol=1e-5, msg=lambda m: f"{key}: {m}")


def test_a_padded_batch_shows_each_row_what_it_shows_alone():
    vlm = vlm_of("qformer")
    both = torch.tensor([[3, IMAGE, 5, 9, 14, 20, 33], [0, 0, 3, 5, IMAGE, 9, 14]])
    pixels = torch.cat((PIXELS, PIXELS.flip(3)))
    with torch.no_grad():
        _, batch = run_with_attention(vlm, both, pixels, both != 0)
        _, alone = run_with_attention(vlm, both[1:, 2:], pixels[1:])
    for key in LAYERS:
        torch.testing.assert_close(batch[key][1:, :, 2:, 2:], alone[key], atol=1e-5, rtol=0)
        assert (batch[key][1, :, 2:, :2] == 0).all()  # nobody looks at padding
    torch.testing.assert_close(
        batch["bridge.layers.0.cross"][1:], alone["bridge.layers.0.cross"], atol=1e-5, rtol=0
    )


def test_any_module_can_be_watched():
    block = EncoderBlock(8, 2, 16, "gelu", 1e-5)
    x = torch.randn(1, 4, 8)
    with attention_weights(block) as attention:
        y = block(x)
    assert list(attention) == [""] and torch.equal(y, block(x))
    q = k = split_heads(x, 2)
    with attention_weights(block) as attention:
        attend(q, k, k)  # outside of every watched module
    assert attention == {}


# --- rollout: from visual tokens to patches -----------------------------------------------------------------


def test_rollout_keeps_half_and_reads_half():
    x, source = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    weights = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.5]]]])  # two heads, whose mean is (0.25, 0.75)
    assert rollout_step(x, weights, source).tolist() == [[[0.625, 0.375]]]


@pytest.mark.parametrize("name", SMALL)
def test_what_visual_tokens_are_made_of_is_a_share_of_each_patch(name):
    vlm = vlm_of(name)
    pixels = torch.cat((PIXELS, PIXELS.flip(3)))
    features = vlm.features(pixels)
    with torch.no_grad():
        _, attention = run_with_attention(vlm, torch.cat((TOKENS, TOKENS)), features=features)
    made = rollout(vlm.bridge, attention, features)
    K = {"linear": 9, "mlp": 9, "gligen": 9, "limber": 9, "magma": 9, "minigpt4_llama2": 9, "visualgpt": 9,
         "cogvlm": 9, "vcgpt": N, "frozen": 2, "vlkd": 1}.get(name, 3)
    shares = torch.ones(2, K)
    if name in ("cogvlm", "told"):                      # two vectors that hold no patch stand around them
        shares = F.pad(torch.ones(2, K), (1, 1))
        K += 2
    assert made.shape == (2, K, features.shape[1])
    torch.testing.assert_close(made.sum(-1), shares, atol=1e-6, rtol=0)
    fixed = name in (*(n for n in NAMES if not NAMES[n]), "clipcap_transformer", "prefix_tuning", "vcgpt")
    assert (made >= 0).all() and (fixed or not torch.equal(made[0], made[1]))


def staring(name: str, at: torch.Tensor) -> dict[str, torch.Tensor]:
    """Hand-made weights: visual token k looks at ViT token at[k] and nowhere else, a ViT token at itself."""
    n = 9 if name == "flamingo" else N
    weights = {
        "mapl": torch.cat((torch.eye(N, N + 3), F.one_hot(at, N + 3))),  # [features ; constants]
        "zero_init": torch.cat((F.one_hot(3 + at, 3 + N), torch.eye(3 + N)[3:])),  # [queries ; features]
    }.get(name, F.one_hot(at, n if name == "qformer" else n + 3).float())
    return {
        key: torch.eye(3).expand(shape) if key.endswith(".attention") else weights.expand(*shape[:2], -1, -1)
        for key, shape in NAMES[name].items()
    }


@pytest.mark.parametrize("name", ["mapl", "qformer", "zero_init", "flamingo", "idefics", "kosmos1"])
def test_a_visual_token_that_looks_at_one_patch_alone_is_made_of_it(name):
    vlm, at = vlm_of(name), torch.tensor([8, 0, 4])
    features = vlm.features(PIXELS)
    assert torch.equal(
        rollout(vlm.bridge, staring(name, at), features)[0], F.one_hot(at, features.shape[1]).float()
    )


@pytest.mark.parametrize("name, first", [("mapl", N), ("zero_init", 0), ("flamingo", 9)])
def test_a_visual_token_that_reads_another_is_half_made_of_what_that_is_made_of(name, first):
    vlm, at = vlm_of(name), torch.tensor([8, 0, 4])
    weights = staring(name, at)  # layer 0: k looks at ViT token at[k]
    last = next(key for key in weights if key in ("bridge.resampler.layers.1", "bridge.blocks.1"))
    looks = torch.eye(weights[last].shape[-1])[first]  # layer 1: all look at visual token 0
    weights[last] = looks.expand(weights[last].shape)
    made = rollout(vlm.bridge, weights, vlm.features(PIXELS))[0]
    assert torch.equal(made, (F.one_hot(at, made.shape[1]) + F.one_hot(at[:1], made.shape[1])) / 2)


def test_mllama_shows_its_cross_layers_over_the_patches_of_all_tiles():
    vlm, pictures = small_vlm(), small_pictures(1)
    words, patches = attention_to_patches(vlm, TOKENS, vlm.features(pictures))
    assert words.shape == (3, H, T, 15) and torch.equal(patches, torch.eye(15))    # 3 tiles of 5 ViT tokens
    assert (words[..., :5].sum(-1) - 1).abs().max() < 1e-6                      # two of the tiles are absent
    with torch.no_grad():
        watched, attention = run_with_attention(vlm, TOKENS, pictures)
        torch.testing.assert_close(watched, vlm(TOKENS, pictures), atol=2e-5, rtol=0)
    assert {*attention} == {*LAYERS, *(f"bridge.blocks.{l}.attention" for l in range(3))}


def test_bridges_without_layers_between():
    features = lambda vlm: vlm.features(PIXELS)
    for name in ("linear", "mlp"):
        assert torch.equal(rollout(vlm_of(name).bridge, {}, features(vlm_of(name)))[0], torch.eye(9))
    v1, v0 = vlm_of("zero_init", version=1), vlm_of("zero_init", version=0)
    class_token = torch.eye(1, N).expand(3, -1)                                 # the same for every prompt
    assert torch.equal(rollout(v1.bridge, {}, features(v1))[0], class_token)
    assert not rollout(v0.bridge, {}, features(v0)).any()                       # prompts that hold no picture
    bare = vlm_of("idefics", latents=0)
    assert torch.equal(rollout(bare.bridge, {}, features(bare))[0], torch.eye(N))


# --- gaze ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_gaze_is_the_attention_of_the_words_behind_the_picture_to_its_visual_tokens(name):
    vlm = vlm_of(name)
    features = vlm.features(PIXELS)
    words, patches = attention_to_patches(vlm, TOKENS, features)
    with torch.no_grad():
        _, attention = run_with_attention(vlm, TOKENS, features=features)
    L, heads, K = {"zero_init": (3, H, 3), "flamingo": (2, 2, 3), "idefics": (2, H, 3), "vcgpt": (2, 2, N),
                   "told_flamingo": (2, H, 3), "visualgpt": (4, 2, 9)}.get(name, (4, H, len(patches)))
    assert words.shape == (L, heads, T, K) and patches.shape == (K, features.shape[1])
    if name == "prefix_tuning":  # in front of all keys
        mine = torch.stack([attention[k][0, :, 2:, :K] for k in LAYERS])
        assert (words.sum(-1) < 1).all()
    elif vlm.bridge.soft_tokens:  # they stand behind one word
        mine = torch.stack([attention[k][0, :, 1 + K:, 1:1 + K] for k in LAYERS])
        assert (words.sum(-1) < 1).all()
    else:
        reading = {"zero_init": "softmax", "told_flamingo": "reader.blocks",
                   "visualgpt": "levels.1"}.get(name, "bridge.blocks")
        mine = torch.stack([attention[k][0, :, 2:] for k in NAMES[name] if reading in k])
        torch.testing.assert_close(words.sum(-1), torch.ones(L, heads, T), atol=1e-6, rtol=0)
    assert torch.equal(words, mine)
    share = words[..., patches.any(-1)].sum(-1)         # of the visual tokens that hold patches
    torch.testing.assert_close((words @ patches).sum(-1), share, atol=1e-5, rtol=0)


def test_gaze_takes_one_text_about_one_picture():
    vlm = vlm_of("mlp")
    for tokens in (TOKENS.repeat(2, 1), torch.tensor([[1, 2]]), torch.tensor([[IMAGE, IMAGE, 2]])):
        with pytest.raises(UserError, match="one picture"):
            attention_to_patches(vlm, tokens, vlm.features(PIXELS))


def test_a_text_that_ends_with_its_picture_has_no_words_behind_it():
    for name in ("mlp", "flamingo"):
        vlm = vlm_of(name)
        assert attention_to_patches(vlm, TOKENS[:, :2], vlm.features(PIXELS))[0].shape[2] == 0


# --- words, projection, gates, pictures ---------------------------------------------------------------------

def test_gates_are_read_back_from_the_log(tmp_path):
    lines = [{"step": 1, "gates": [[0.0, 0.1], [-0.2, 0.3]]}, {"step": 2, "loss": 1.0},
             {"step": 50, "gates": [[0.5, 0.6], [0.7, -0.8]]}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps, gates = gate_history(tmp_path)
    assert steps.tolist() == [1, 50] and gates.shape == (2, 2, 2) and gates[1, 1, 1] == -0.8
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    for run in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="log.jsonl: holds no gates"):
            gate_history(run)


def test_an_overlay_reddens_the_patch_and_nothing_else():
    picture = np.full((48, 48, 3), 100, np.uint8)
    patches = [0, 0, 0, 0, 0, 0.5, 0, 0, 0]
    for weights in (patches, [9, *patches]):  # without and with a class token
        shown = overlay_attention(picture, weights, top=0.5, side=90)
        assert shown.shape == (90, 90, 3) and shown.dtype == np.uint8
        red = (shown != 100).any(-1)
        assert red[30:60, 60:].all() and red.sum() == 900
        assert (shown[45, 75] == np.round(0.3 * 100 + 0.7 * np.array([255, 40, 0]))).all()
    half = overlay_attention(picture, [0, 0, 0, 0.25], top=0.5, side=90)
    assert (half[80, 80] == np.round(0.65 * 100 + 0.35 * np.array([255, 40, 0]))).all()
    assert (overlay_attention(picture, np.zeros(4)) == 100).all()              # looking nowhere
