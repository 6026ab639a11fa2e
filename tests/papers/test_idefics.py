"""Claim: IDEFICS loads by its own names, split vocabulary included, and computes what its published code
computes, gradients too; a file that does not fit is refused by name."""
from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from papers.idefics import Idefics
from support.formats.flamingo import IDEFICS_NAMES
from support.formats.vlm import LAYOUTS
from conftest import check, check_states, fixed_loss, golden, tiny_vlm
from model import DecoderConfig, IMAGE
from support.formats.names import Joined, expand
from support.formats.files import UserError
from support.formats.vlm import load_vlm

CASES = ["idefics-plain", "idefics-resampler-qknorm"]


@pytest.mark.parametrize("name", CASES)
def test_idefics_is_the_published_one_at_every_layer(name):
    folder, case, x, expected = golden(name)
    vlm = load_vlm(folder)
    assert vlm.image_token == 73  # the published order; this case has them the other way
    vlm.image_token = 72
    tokens = x["input_ids"].masked_fill(x["input_ids"] == 72, IMAGE)
    # their mask of who sees which image is φ(ℓ), one image or none: what we derive from where the images
    # stand
    assert torch.equal(
        (x["image_attention_mask"] * torch.tensor([1, 2])).sum(-1), (tokens == IMAGE).cumsum(1)
    )
    features = vlm.features(x["pixel_values"].flatten(0, 1)).detach()           # two images a row
    seen = vlm.bridge.resampler(features)
    check(case, "image_hidden_states", seen.unflatten(0, (2, 2)), expected["image_hidden_states"])
    own = features[:3]  # the fourth fills the batch up: no word stands for it
    inputs, _ = vlm.prepare(tokens, own)
    logits, hidden = vlm.decoder(return_hidden=True, **inputs)
    # the library records what goes into layer 0, the first gated block already behind it, and from then on
    # what layers put out
    check_states(case, [vlm.bridge.before(0, hidden[0], inputs["visual"]), *hidden[1:]], expected)
    check(case, "logits", logits, expected["logits"])
    loss = fixed_loss(logits)
    loss.backward()
    check(case, "grad.loss", loss, expected["grad.loss"])
    theirs, grads = (
        expand(IDEFICS_NAMES, 4, "grad.model."),
        [k for k in expected if k.startswith("grad.model.")],
    )
    mine = {theirs[key]: p.grad for key, p in vlm.bridge.named_parameters()}
    for key in grads:
        check(case, key, mine[key], expected[key])
    # the rest of the bridge is what the case leaves out as zero: a constant on every key of a softmax
    rest = [f"grad.{key}" for key in case.get("gradients_not_stored_because_zero", [])]
    assert set(mine) == {*grads, *rest} and all(mine[key].abs().max() < 1e-6 for key in rest)


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_a_batch_is_itself_alone_and_the_cache_continues_it(name):
    folder, _, x, expected = golden(name)
    vlm = load_vlm(folder)
    vlm.image_token = 72
    tokens = x["input_ids"].masked_fill(x["input_ids"] == 72, IMAGE)
    with torch.no_grad():
        torch.testing.assert_close(
            vlm(tokens[1:], x["pixel_values"][1, :1]), expected["logits"][1:], atol=1e-4, rtol=1e-4
        )
        ids = vlm.generate(tokens[:1], x["pixel_values"][0], max_new_tokens=4)
        for t in range(4):  # greedy, each time from the beginning
            longer = torch.cat((tokens[:1], ids[:, :t]), 1)
            assert int(vlm(longer, x["pixel_values"][0])[0, -1].argmax()) == int(ids[0, t])


def altered(tmp_path, change=lambda tensors: None, name=CASES[1], **config):
    """A case's folder with something changed."""
    folder = golden(name)[0]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), **config})
    )
    return tmp_path


GATE, HEAD, LATENTS = (
    "model.gated_cross_attn_layers.1.alpha_dense",
    "lm_head.additional_fc.weight",
    "model.perceiver_resampler.latents",
)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(GATE), f'tensor "{GATE}" is missing'),
        (lambda t: t.pop(HEAD), f'tensor "{HEAD}" is missing'),
        (
            lambda t: t.update({GATE.replace("1", "2"): torch.ones(1)}),
            rf'1 tensors .*first: "{GATE.replace("1", "2")}"',
        ),
        (
            lambda t: t.update({LATENTS: torch.ones(5, 18)}),
            rf'"{LATENTS}" has shape \(5, 18\), this model expects \(4, 18\)',
        ),
        (
            lambda t: t.update({HEAD: torch.ones(3, 24)}),
            rf'{HEAD}" has shape \(75, 24\), this model expects \(74, 24\)',
        ),
        (
            lambda t: t.update({GATE: torch.ones(24)}),
            rf'"{GATE}" has shape \(24,\), this model expects \(1,\)',
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_vlm(altered(tmp_path, change))


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(use_resampler=False), "perceiver_resampler"),
        (dict(qk_layer_norms=False), "q_layer_norm|k_layer_norm"),
        (dict(alpha_type="vector"), r"alpha_cross_attn.*this model expects \(24,\)"),
        (dict(cross_layer_interval=2), "gated_cross_attn_layers.1"),
        (dict(additional_vocab_size=0), "embed_tokens.additional_embedding|lm_head.additional_fc"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_the_tensor(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        load_vlm(altered(tmp_path, **config))


def test_gates_per_channel_and_a_tied_vocabulary_load(tmp_path):
    """The two shapes of α that files have, and a head that is the embedding: no release has the latter, the
    format allows it."""

    def change(t):
        for n in [n for n in t if "alpha_" in n]:
            t[n] = t[n].expand(1, 1, 24).contiguous()
        t["lm_head.weight"], t[HEAD] = (
            t["model.embed_tokens.weight"].clone(),
            t["model.embed_tokens.additional_embedding.weight"].clone(),
        )

    _, _, x, _ = golden(CASES[1])
    tokens = x["input_ids"].masked_fill(x["input_ids"] == 72, IMAGE)
    (tmp_path / "a").mkdir()
    vector = load_vlm(altered(tmp_path / "a", change, alpha_type="vector"))
    assert vector.bridge.gates().shape == (2, 48)
    def drop(t):
        t.pop("lm_head.weight")
        t.pop(HEAD)
    (tmp_path / "b").mkdir()
    tied = load_vlm(altered(tmp_path / "b", drop, tie_word_embeddings=True))
    assert tied.decoder.lm_head is None
    with torch.no_grad():
        torch.testing.assert_close(
            tied(tokens, x["pixel_values"].flatten(0, 1)[:3]),
            vector(tokens, x["pixel_values"].flatten(0, 1)[:3]),
        )


def test_what_a_published_config_leaves_out_is_what_its_class_assumes(tmp_path):
    """What idefics-9b's config.json sets against its class, and nothing else: sizes and options must come out
    as released."""
    shutil.copy(
        golden(CASES[0])[0] / "model.safetensors", tmp_path
    )  # a layout opens it, but reads nothing here
    config = dict(
        model_type="idefics",
        additional_vocab_size=2,
        cross_layer_interval=4,
        qk_layer_norms=True,
        use_resampler=True,
        perceiver_config=dict(qk_layer_norms_perceiver=True),
        vision_config=dict(embed_dim=1280),
    )
    with torch.device("meta"):
        vlm, [(_, _, names, optional)] = LAYOUTS["idefics"](config, tmp_path)
        bare, _ = LAYOUTS["idefics"](dict(model_type="idefics"), tmp_path)
    d, v, b = vlm.decoder.config, vlm.vit.config, vlm.bridge
    assert (d.vocab_size, d.width, d.layers, d.heads, d.head_width, d.hidden) == (
        32002,
        4096,
        32,
        32,
        128,
        11008,
    )
    assert (d.norm_eps, d.tied, v.act, v.norm_eps) == (1e-6, False, "gelu", 1e-5)
    assert (v.width, v.layers, v.heads, v.hidden, v.patch, v.image_size, v.tokens) == (
        1280,
        32,
        16,
        5120,
        14,
        224,
        257,
    )
    assert (b.reads, b.reads_cls, b.every, b.first, len(b.blocks), len(b.resampler.layers)) == (
        -1,
        True,
        4,
        0,
        8,
        6,
    )
    assert (vlm.image_token, optional, names["decoder.lm_head.weight"]) == (
        32001,
        (),
        Joined(("lm_head.weight", "lm_head.additional_fc.weight")),
    )
    assert (b.resampler.latents.shape, b.resampler.layers[5].q.weight.shape) == ((64, 1280), (1536, 1280))
    assert all(name in names for name, _ in vlm.named_parameters())  # no parameter of ours keeps our own name
    with torch.device("meta"):
        own = Idefics(d, 1280)  # our defaults are the release
    assert [(n, p.shape) for n, p in b.named_parameters()] == [
        (n, p.shape) for n, p in own.named_parameters()
    ]
    assert (len(bare.bridge.blocks), bare.vit.config.width) == (32, 768)
    assert not list(bare.bridge.resampler.parameters())
    assert (bare.image_token, bare.decoder.config.vocab_size) == (None, 32000)
    assert not list(bare.bridge.blocks[0].q_norm.parameters()) and list(b.blocks[0].q_norm.parameters())


def test_the_published_numbers_of_parameters():
    with torch.device("meta"):
        config = DecoderConfig(width=4096, layers=32, heads=32, kv_heads=32, head_width=128, hidden=11008)
        bridge, vector = Idefics(config, 1280), Idefics(config, 1280, vector_gates=True)
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert (count(vector.blocks[0]), count(bridge.blocks[0]), len(bridge.blocks)) == (
        179_323_136,
        179_323_136 - 2 * 4095,
        8,
    )
    assert count(bridge.resampler) == 125_961_984


def test_a_word_sees_the_last_image_and_its_class_token_through_blocks_from_layer_0_on():
    vlm = tiny_vlm("idefics", image_token=7)  # every=2: before layers 0 and 2
    tokens, x = (
        torch.tensor([[3, IMAGE, 4, 5, IMAGE, 6]]),
        torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1)),
    )
    plain = torch.randn(2, 10, 20, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        visual = lambda f: vlm.prepare(tokens, f)[0]["visual"]
        block = lambda l, f: vlm.bridge.before(l, x, visual(f))
        assert [not torch.equal(block(l, plain), x) for l in range(4)] == [True, False, True, False]
        for image, positions in ((0, [1, 2, 3]), (1, [4, 5])):
            other = plain.clone()
            other[image, 0] += 1                                                # its class token alone
            changed = (block(0, other) != block(0, plain)).any(-1)[0]
            assert changed.nonzero().flatten().tolist() == positions
        blind = vlm.bridge.blocks[0].attention(
            x, *visual(plain)["kv"][0], torch.zeros(1, 6, 6, dtype=torch.bool)
        )
    assert not blind.any()


def test_norms_on_queries_and_keys_make_their_scale_irrelevant():
    for on in (True, False):
        vlm = tiny_vlm("idefics", image_token=7, qk_norm=on, resampler_qk_norm=on)
        tokens, features = (
            torch.tensor([[3, IMAGE, 4, 5]]),
            torch.randn(1, 10, 20, generator=torch.Generator().manual_seed(3)),
        )
        with torch.no_grad():
            before = vlm(tokens, features=features)
            for part in (*vlm.bridge.blocks, *vlm.bridge.resampler.layers):
                part.q.weight *= 30
                part.k.weight *= 30
            after = vlm(tokens, features=features)
        assert ((after - before).abs().max() < 1e-2) == on  # the norms' ε is all that differs
