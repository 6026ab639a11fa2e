"""Claim: Llama-3.2-Vision loads by the names of published and later files and computes what transformers
computes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from papers.mllama import Mllama
from support.formats.vlm import LAYOUTS
from conftest import (SMALL_TILES, TINY, check, check_states, fixed_loss, golden, small_pictures, small_vlm,
                      stir, tiny_decoder)
from eval import generate_ids
from model import Decoder, DecoderConfig, IMAGE, VLM
from papers.mllama_vit import TiledViT, TiledViTConfig, Tiles
from support.formats.files import UserError
from support.formats.llama import load_decoder, save_decoder
from support.formats.vlm import load_vlm

FOLDER, CASE, X, EXPECTED = golden("mllama")
ROWS = CASE["pixel_values_rows"]
PICTURES = Tiles(X["pixel_values"], X["aspect_ratio_ids"], X["aspect_ratio_mask"].bool())


def tokens(name: str) -> torch.Tensor:
    ids = X[f"{name}.input_ids"]
    return ids.masked_fill(ids == 64, IMAGE)


def folder_with(tmp_path, tensors: dict, config: str = "config.json"):
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(FOLDER / config, tmp_path / "config.json")
    return tmp_path


@pytest.fixture(scope="module")
def loaded() -> VLM:
    return load_vlm(FOLDER)


@pytest.fixture
def vlm(loaded):
    loaded.bridge.leak = True
    loaded.zero_grad()
    return loaded


# --- transformers' numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("names, config", [("published", "config.json"), ("published", "config.hub.json"),
                                           ("memory", "config.json")])
def test_both_layouts_give_the_references_logits_and_words(tmp_path, names, config):
    tensors = load_file(FOLDER / "model.safetensors")
    if names == "memory":
        later = json.loads((FOLDER / "names_in_memory.json").read_text())
        assert set(later) == set(tensors) and not set(later.values()) & set(tensors)
        tensors = {later[n]: t for n, t in tensors.items()}
    vlm = load_vlm(folder_with(tmp_path, tensors, config))
    assert (
        vlm.image_token == 64
        and vlm.bridge.layers == [1, 1, 3]
        and vlm.decoder.embed.weight.shape == (72, 16)
    )
    for name, rows in ROWS.items():
        words, ids = f"{name}.generated_ids", tokens(name)
        check(CASE, f"{name}.logits", vlm(ids, PICTURES[rows]), EXPECTED[f"{name}.logits"])
        check(CASE, words, vlm.generate(ids, PICTURES[rows], 12), EXPECTED[words])


def test_vision_features_of_one_to_four_tiles(vlm):
    features = vlm.features(PICTURES)
    check(CASE, "features", features.pixels, EXPECTED["features"])
    check(CASE, "projected", vlm.bridge.map(features.pixels), EXPECTED["projected"])
    assert features.pixels.shape[-1] == vlm.vit.config.width == 36 and len(features) == 6
    for m in range(6):                                  # an image alone gives what it gives among others
        alone = vlm.features(PICTURES[[m]]).pixels
        torch.testing.assert_close(
            alone, features.pixels[[m]], atol=1e-5, rtol=1e-5
        )  # float32, other matrix shapes


@pytest.mark.parametrize("name", ["middle", "pair", "text"])
def test_every_hidden_state_of_both_kinds_of_layer(vlm, name):
    states, layers = [], (*vlm.bridge.blocks, *vlm.decoder.layers)
    hooks = [layer.register_forward_hook(lambda module, args, out: states.append(out)) for layer in layers]
    _, hidden = vlm(tokens(name), PICTURES[ROWS[name]], return_hidden=True)
    for hook in hooks:
        hook.remove()
    start = f"{name}.hidden_states."
    check_states(CASE, [hidden[0], *states[:-1], hidden[-1]],
                 {k.removeprefix(f"{name}."): v for k, v in EXPECTED.items() if k.startswith(start)})
    assert len(states) == (
        4 if name == "text" else 7
    )  # a text alone does not enter the cross-attention layers


def test_gradients_of_the_projector_and_of_every_cross_attention_layer(vlm):
    loss = fixed_loss(vlm(tokens("pair"), PICTURES[ROWS["pair"]]))
    loss.backward()
    check(CASE, "grad.loss", loss.detach(), EXPECTED["grad.loss"])
    memory = json.loads((FOLDER / "names_in_memory.json").read_text())
    with torch.device("meta"):
        _, [(_, _, names, _)] = LAYOUTS["mllama"](json.loads((FOLDER / "config.json").read_text()), FOLDER)
    checked = {f"grad.{memory[names[f'bridge.{ours}']]}": p.grad for ours, p in vlm.bridge.named_parameters()}
    assert set(checked) | {"grad.loss"} == {k for k in EXPECTED if k.startswith("grad.")}
    for key, grad in checked.items():
        check(CASE, key, grad, EXPECTED[key])


def test_a_batch_padded_on_the_left(vlm):
    mask = X["batch.attention_mask"].bool()
    logits = vlm(tokens("batch"), PICTURES[[0, 1]], mask) * mask[..., None]
    check(CASE, "batch.logits", logits, EXPECTED["batch.logits"])


def test_metas_rule_in_a_batch_with_one_two_and_no_images(vlm):
    vlm.bridge.leak = False
    check(
        CASE, "zeroed.middle.logits", vlm(tokens("middle"), PICTURES[[1]]), EXPECTED["zeroed.middle.logits"]
    )
    assert (
        EXPECTED["zeroed.middle.logits"] - EXPECTED["middle.logits"]
    ).abs().max() > 1  # the rules are far apart
    mask = X["zeroed.mixed.attention_mask"].bool()
    logits = vlm(tokens("zeroed.mixed"), PICTURES[[1, 2, 3]], mask) * mask[..., None]
    check(CASE, "zeroed.mixed.logits", logits, EXPECTED["zeroed.mixed.logits"])


# --- masks, by perturbation ---------------------------------------------------------------------------------

TEXT = torch.tensor([[3, 4, IMAGE, 5, IMAGE, IMAGE, 6, 8]])  # images 1 | 2 and 3, which are neighbours


@torch.no_grad()
def moved(vlm: VLM, m: int, tile: int) -> list[int]:
    """Positions of TEXT whose logits change, in any bit, with the features of this tile of image m."""
    features = vlm.features(small_pictures(3))
    other = Tiles(features.pixels.clone(), features.aspect, features.mask)
    other.pixels[m, tile] += 1
    return (vlm(TEXT, features=features) != vlm(TEXT, features=other))[0].any(-1).nonzero().flatten().tolist()


def test_words_before_the_first_image_are_untouched_unless_transformers_leak_is_asked_for():
    assert moved(small_vlm(), 0, 0) == [2, 3, 4, 5, 6, 7]  # later words through the decoder's own attention
    assert moved(small_vlm(leak=True), 0, 0) == list(range(8))
    assert moved(small_vlm(), 1, 1) == [4, 5, 6, 7] and moved(small_vlm(), 2, 1) == [5, 6, 7]


def test_absent_tiles_are_read_by_nobody_but_the_leak():
    assert moved(small_vlm(), 0, 1) == [] == moved(small_vlm(), 1, 2)           # one and two tiles
    assert 0 in moved(small_vlm(leak=True), 0, 1)


def test_a_word_sees_the_last_image_and_its_direct_neighbours():
    vlm, seen = small_vlm(layers=(0,)), []
    vlm.bridge.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[3]))
    vlm(TEXT, small_pictures(3))
    per_image = seen[0].unflatten(2, (3, 3, 5)).any(-1)[0]                      # (T, M, tiles)
    tiles = torch.tensor([1, 2, 3])                                             # of the three images
    want = torch.tensor([[0, 0, 0]] * 2 + [[1, 0, 0]] * 2 + [[0, 1, 0]] + [[0, 1, 1]] * 3) * tiles
    assert torch.equal(per_image.sum(-1), want)


def test_in_the_tower_padding_is_hidden_from_padding_alone():
    vit = stir(TiledViT(TiledViTConfig(**{**SMALL_TILES.__dict__, "layers": 1, "global_layers": 0})), 4)
    images = small_pictures(1)                          # one tile and two absent ones
    other = Tiles(images.pixels.clone(), images.aspect, images.mask)
    other.pixels[0, 1] = 1.0
    same = (vit(images) == vit(other))[0].flatten(1).all(-1)
    assert same.tolist() == [False, False, True]    # the present tile reads an absent one; the absent do not


# --- the bridge ---------------------------------------------------------------------------------------------


def test_at_its_start_the_decoders_logits_are_the_same_bits():
    decoder = tiny_decoder()
    vlm = VLM(stir(TiledViT(SMALL_TILES)), Mllama(TINY, SMALL_TILES.width), decoder, image_token=7).eval()
    assert vlm.bridge.layers == [3] and vlm.bridge.gates().abs().mean().item() == 0.0
    for leak in (False, True):
        vlm.bridge.leak = leak
        assert torch.equal(vlm(TEXT, small_pictures(3)), decoder(TEXT.masked_fill(TEXT == IMAGE, 7)))


@pytest.mark.parametrize("leak", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_do_not_depend_on_their_neighbours_nor_on_the_cache(leak, beams):
    vlm, pictures = small_vlm(leak), small_pictures(4)
    rows, images = [[3, IMAGE, 5], [9, 8], [4, 4, IMAGE, IMAGE, 6, IMAGE]], [[0], [], [1, 2, 3]]
    width = max(map(len, rows))
    batch = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[False] * (width - len(r)) + [True] * len(r) for r in rows])
    logits, words = vlm(batch, pictures, mask), generate_ids(vlm, batch, 6, beams, mask, pixels=pictures)
    for r, (row, of) in enumerate(zip(rows, images)):
        alone = vlm(torch.tensor([row]), pictures[of])
        torch.testing.assert_close(
            logits[r, -len(row) :], alone[0], atol=1e-4, rtol=1e-4
        )  # float32, other shapes
        assert torch.equal(words[r], generate_ids(vlm, torch.tensor([row]), 6, beams, pixels=pictures[of])[0])
        if beams == 1:                                  # and without a cache
            grown = list(row)
            for word in words[r].tolist():
                assert int(vlm(torch.tensor([grown]), pictures[of])[0, -1].argmax()) == word
                grown.append(word)


def test_without_an_image_token_images_leave_no_position_and_keep_their_neighbours():
    vlm, seen = small_vlm(layers=(0,)), []
    vlm.image_token = None
    vlm.bridge.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[3]))
    assert vlm(TEXT, small_pictures(3)).shape[1] == 5
    per_image = seen[0].unflatten(2, (3, 15)).any(-1)[0]
    assert per_image.int().tolist() == [[0, 0, 0]] * 2 + [[1, 0, 0]] + [[0, 1, 1]] * 2


# --- sizes and mistakes -------------------------------------------------------------------------------------


def test_a_config_that_says_nothing_has_the_released_sizes():
    with torch.device("meta"):
        vlm, _ = LAYOUTS["mllama"]({"model_type": "mllama"}, FOLDER)
        released = {"vision_config": {"image_size": 560}, "text_config": {"cross_attention_layers": None}}
        larger, _ = LAYOUTS["mllama"](released, FOLDER)
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert vlm.image_token == 128256 and vlm.decoder.config.rope_theta == 500000
    assert vlm.bridge.layers == [3, 7, 11, 15, 19, 23, 27, 31]
    assert {count(b) for b in vlm.bridge.blocks} == {218_112_258} and count(vlm.bridge.map) == 31_461_376
    assert count(vlm.decoder) == 8_030_261_248 + 8 * 4096                       # Llama-3.1-8B and eight rows
    assert count(vlm) == 10_642_941_475 and count(larger) == 10_670_220_835       # transformers has as many


def test_rows_of_the_embedding_beyond_the_vocabulary(tmp_path):
    decoder = stir(Decoder(DecoderConfig(**{**TINY.__dict__, "extra_tokens": 8})))
    assert decoder(torch.tensor([[68, 3]])).shape == (1, 2, 61)
    save_decoder(decoder, tmp_path)
    again = load_decoder(tmp_path)
    assert again.config.extra_tokens == 8 and torch.equal(again.embed.weight, decoder.embed.weight)
    with pytest.raises(ValueError, match="8 ids cannot be read only"):
        DecoderConfig(extra_tokens=8)


@pytest.mark.parametrize("name", [
    "language_model.model.layers.2.cross_attn.q_norm.weight", "language_model.model.embed_tokens.weight",
    "vision_model.global_transformer.layers.1.gate_ffn", "multi_modal_projector.bias",
    "vision_model.gated_positional_embedding.tile_embedding.weight"])
def test_a_missing_or_misshapen_tensor_is_named(tmp_path, name):
    tensors = load_file(FOLDER / "model.safetensors")
    held = tensors.pop(name)
    with pytest.raises(UserError, match=f'tensor "{name}" is missing'):
        load_vlm(folder_with(tmp_path, tensors))
    with pytest.raises(UserError, match=f'tensor "{name}" has shape .*, this model expects') as e:
        load_vlm(folder_with(tmp_path, {**tensors, name: torch.cat((held, held[:1]))}))
    assert str(tuple(held.shape)) in str(e.value)


@pytest.mark.parametrize("name", ["language_model.model.layers.1.self_attn.q_proj.weight",
                                  "vision_model.transformer.layers.0.gate_attn"])
def test_a_tensor_that_is_not_part_of_the_model_is_named(tmp_path, name):
    with pytest.raises(UserError, match=f'1 tensors are not part of this model .first: "{name}"'):
        load_vlm(folder_with(tmp_path, {**load_file(FOLDER / "model.safetensors"), name: torch.zeros(1)}))


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("text_config", {"cross_attention_layers": [1, 6]}, "cross-attention layer 6 is the last; one"),
        ("text_config", {"cross_attention_layers": []}, r"before layers 0 to 6 of the decoder, not \[\]"),
        (
            "vision_config",
            {"vision_output_dim": 48},
            "width 48 are not 12 times one more than the 2 tapped blocks",
        ),
        ("vision_config", {"intermediate_layers_indices": [0, 3]}, "one of these is not among the 3"),
        ("vision_config", {"hidden_act": "silu"}, 'vision_config: activation "silu" is not supported'),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path, part, change, message):
    c = json.loads((FOLDER / "config.json").read_text())
    c[part] |= change
    shutil.copy(FOLDER / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(c))
    with pytest.raises(UserError, match=message):
        load_vlm(tmp_path)


def test_a_tower_of_tiles_says_what_it_reads():
    vit = TiledViT(SMALL_TILES)
    with pytest.raises(ValueError, match=r"reads Tiles of shape \(images, 3, 3, 8, 8\), not Tensor"):
        vit.features(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"not Tiles of shape \(1, 4, 3, 8, 8\)"):
        vit.features(Tiles(torch.zeros(1, 4, 3, 8, 8), torch.ones(1).long(), torch.ones(1, 4).bool()))
    with pytest.raises(ValueError, match="reads=-1, reads_cls=True, not -2 and True"):
        vit.features(small_pictures(1), -2)
