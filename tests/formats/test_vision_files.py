"""Claim: one `ViT` is CLIP's, SigLIP's and BLIP-2's tower, every hidden state of them, and `CLIP` is both of
CLIP's towers; they load from published files in old and new layouts, and a saved tower has the published
names."""
from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import TINY_VIT, check, check_states, golden, stir
from model import ViT, ViTConfig
from papers.clip import CLIP, TextConfig, TextTransformer
from support.formats.files import UserError
from support.formats.vision import load_clip, load_vit, save_vit

TOWERS = ["clip-vision-quickgelu", "clip-vision-gelu", "siglip-vision", "blip2-vision"]
LAYOUTS = [
    (n, layout) for n in TOWERS for layout in ("library", "hub") if (n, layout) != ("blip2-vision", "hub")
]


def folder_of(name: str, layout: str, tmp_path):
    """The case as a model folder: as today's library writes it, or as published checkpoints look
    (`vision_model.` in front)."""
    folder = golden(name)[0]
    if layout == "library":
        return folder
    shutil.copy(folder / "config.json", tmp_path)
    shutil.copy(folder / "model.hub.safetensors", tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("name, layout", LAYOUTS)
def test_every_hidden_state_and_the_pooled_vector_are_the_published_ones(name, layout, tmp_path):
    _, case, x, expected = golden(name)
    vit = load_vit(folder_of(name, layout, tmp_path))
    with torch.no_grad():
        hidden = vit(x["pixel_values"], return_hidden=True)
        check_states(case, hidden, expected)
        check(case, "pooler_output", vit.pool(hidden[-1]), expected["pooler_output"])
        last = (
            hidden[-1] if name.startswith("clip") else vit.post_norm(hidden[-1])
        )  # CLIP's last state is never normalised
        check(case, "last_hidden_state", last, expected["last_hidden_state"])


@pytest.mark.parametrize("name", TOWERS)
def test_features_are_the_hidden_state_of_that_layer(name):
    folder, case, x, expected = golden(name)
    vit = load_vit(folder)
    first, L = int(vit.config.cls), vit.config.layers
    with torch.no_grad():
        for layer in range(-L - 1, L + 1):
            state = expected[f"hidden_states.{layer % (L + 1)}"]
            check(case, f"features({layer})", vit.features(x["pixel_values"], layer), state[:, first:])
            check(case, f"features({layer}, cls)", vit.features(x["pixel_values"], layer, cls=True), state)
        assert len(vit.blocks) == L  # looking at an early layer leaves the tower whole
        for layer in (L + 1, -L - 2):
            with pytest.raises(ValueError, match=f"hidden states 0 to {L}"):
                vit.features(x["pixel_values"], layer)


def test_blocks_after_the_layer_are_not_run_and_get_no_gradient():
    vit = stir(ViT(TINY_VIT))
    vit.features(torch.randn(1, 3, 24, 24)).sum().backward()
    assert all(p.grad is None for p in [*vit.blocks[-1].parameters(), *vit.post_norm.parameters()])
    assert all(p.grad is not None for p in vit.blocks[-2].parameters())


# --- both towers --------------------------------------------------------------------------------------------


def test_image_text_similarities_are_the_published_ones():
    folder, case, x, expected = golden("clip-model")
    clip = load_clip(folder)
    text = x["input_ids"]
    with torch.no_grad():
        check(case, "logits_per_image", clip(x["pixel_values"], text), expected["logits_per_image"])
        check(case, "image_embeds", clip.embed_images(x["pixel_values"]), expected["image_embeds"])
        check(case, "text_embeds", clip.embed_texts(text), expected["text_embeds"])
        check(case, "vision", clip.vit(x["pixel_values"]), expected["vision_last_hidden_state"])
        states = clip.text(text)
        check(case, "text", states * x["attention_mask"][..., None], expected["text_last_hidden_state"])
        check(
            case,
            "unnormalised",
            clip.text_projection(clip.text.pool(states, text)),
            expected["text_features_without_mask"],
        )


def test_the_vision_tower_of_a_dual_encoder_loads_alone():
    folder, case, x, expected = golden("clip-model")
    with torch.no_grad():
        check(case, "vision", load_vit(folder)(x["pixel_values"]), expected["vision_last_hidden_state"])


def test_the_text_is_read_at_its_first_end_token_and_no_further():
    text = stir(
        TextTransformer(TextConfig(vocab_size=20, width=16, layers=2, heads=2, hidden=24, context=9, end=7))
    )
    tokens = torch.tensor([[1, 15, 3, 7, 7, 7], [1, 4, 7, 18, 2, 7]])
    changed = torch.tensor([[1, 15, 3, 7, 9, 8], [1, 4, 7, 2, 2, 2]])
    with torch.no_grad():
        assert torch.equal(text.pool(text(tokens), tokens), text.pool(text(changed), changed))
        assert torch.equal(text.pool(text(tokens), tokens), text(tokens)[[0, 1], [3, 2]])


# --- sizes and positions ------------------------------------------------------------------------------------


def test_positions_resize_to_another_picture():
    vit = stir(ViT(TINY_VIT))  # a 3 x 3 grid and a class token
    assert vit.positions_for(3, 3) is vit.positions
    new = vit.positions_for(5, 4)
    assert new.shape == (1 + 5 * 4, TINY_VIT.width)
    assert torch.equal(new[0], vit.positions[0])  # the class token has no place in the grid
    with torch.no_grad():
        hidden = vit(torch.randn(2, 3, 40, 32), return_hidden=True)
        assert [h.shape for h in hidden] == [(2, 21, TINY_VIT.width)] * 4
        vit.positions[1:] = torch.arange(3.0).repeat_interleave(3)[
            :, None
        ]  # a position that tells only its row...
        rows = vit.positions_for(6, 3)[1:].view(6, 3, -1)
    torch.testing.assert_close(rows, rows[:, :1, :1].expand_as(rows))  # ...still tells only its row, in order
    assert (rows[1:, 0, 0] > rows[:-1, 0, 0]).all()


def test_resized_positions_are_bicubic_without_antialias():
    """One axis by hand: half-pixel centres, Keys' kernel with a = -0.75 (PyTorch's), edges repeated."""
    vit = stir(ViT(ViTConfig(**{**TINY_VIT.__dict__, "image_size": 32})))  # 4 x 4
    kernel = lambda t: (
        (1.25 * t**3 - 2.25 * t**2 + 1)
        if t <= 1
        else (-0.75 * t**3 + 3.75 * t**2 - 6 * t + 3)
        if t < 2
        else 0.0
    )
    weight = torch.zeros(7, 4)
    for i in range(7):
        at = (i + 0.5) * 4 / 7 - 0.5
        for j in range(-2, 6):
            weight[i, min(max(j, 0), 3)] += kernel(abs(at - j))
    grid = vit.positions[1:].view(4, 4, -1)
    by_hand = torch.einsum("ri,cj,ijd->rcd", weight, weight, grid)
    # 1e-5: float32, 16 terms
    torch.testing.assert_close(vit.positions_for(7, 7)[1:].view(7, 7, -1), by_hand, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "published, layers, config",
    [
        (303_179_776, 24, dict(image_size=224, patch=14, width=1024, heads=16, hidden=4096)),  # CLIP L/14
        (303_507_456, 24, dict(image_size=336, patch=14, width=1024, heads=16, hidden=4096)),  # CLIP L/14@336
        (
            290_581_504 + 2 * 1024,
            23,
            dict(image_size=224, patch=14, width=1024, heads=16, hidden=4096),
        ),  # as LAVIS builds it, + post-norm
        (
            412_987_248,
            27,
            dict(
                image_size=384,
                patch=14,
                width=1152,
                heads=16,
                hidden=4304,
                cls=False,
                pre_norm=False,
                patch_bias=True,
            ),
        ),  # SigLIP so400m@384, no head
        (
            985_952_256,
            39,
            dict(
                image_size=224,
                patch=14,
                width=1408,
                heads=16,
                hidden=6144,
                act="gelu",
                pre_norm=False,
                patch_bias=True,
            ),
        ),
    ],
)  # EVA-g of BLIP-2
def test_the_published_sizes_have_the_published_number_of_parameters(published, layers, config):
    with torch.device("meta"):
        vit = ViT(ViTConfig(layers=layers, **config))
    assert sum(p.numel() for p in vit.parameters()) == published


def test_a_picture_whose_side_is_no_multiple_of_the_patch_loses_its_edge():
    config = ViTConfig(
        **{**TINY_VIT.__dict__, "image_size": 29}
    )  # SigLIP so400m: 384 px in patches of 14, 27 x 27
    assert config.tokens == 10
    vit, pixels = stir(ViT(config)), torch.randn(1, 3, 29, 29)
    with torch.no_grad():
        y = vit(pixels)
        assert y.shape == (1, 10, 20)
        assert torch.equal(y, vit(pixels[:, :, :24, :24]))


# --- weights on disk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip-vision-quickgelu", "clip-vision-gelu", "siglip-vision"])
def test_saving_writes_the_published_names_and_loads_back_to_the_bit(name, tmp_path):
    folder, _, x, _ = golden(name)
    vit = load_vit(folder)
    save_vit(vit, tmp_path)
    theirs = {
        k: v.shape
        for k, v in load_file(folder / "model.hub.safetensors").items()
        if not k.endswith("position_ids")
    }
    assert {k: v.shape for k, v in load_file(tmp_path / "model.safetensors").items()} == theirs
    again = load_vit(tmp_path)
    assert again.config == vit.config
    with torch.no_grad():
        assert torch.equal(again(x["pixel_values"]), vit(x["pixel_values"]))


@pytest.mark.parametrize("name", ["blip2-vision"])
def test_a_tower_that_is_not_clips_is_not_saved_as_one(name, tmp_path):
    with pytest.raises(UserError, match="only CLIP- and SigLIP-style towers"):
        save_vit(load_vit(golden(name)[0]), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", TOWERS + ["clip-model"])
def test_a_tensor_that_is_missing_left_over_or_wrongly_shaped_is_named(name, tmp_path):
    folder = golden(name)[0]
    load = load_clip if name == "clip-model" else load_vit
    shutil.copy(folder / "config.json", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    victim = next(k for k in tensors if "layers.1" in k and "fc1.weight" in k)

    def attempt(change, message):
        new = dict(tensors)
        change(new)
        save_file(new, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            load(tmp_path)
    attempt(lambda t: t.pop(victim), f'"{victim}" is missing')
    attempt(
        lambda t: t.update({victim: tensors[victim][:-1].contiguous()}),
        rf'model.safetensors: tensor "{victim}" has shape',
    )
    attempt(lambda t: t.update({victim: tensors[victim].T.contiguous()}), rf'tensor "{victim}" has shape')
    attempt(lambda t: t.update({victim + "x": torch.zeros(1)}), f'first: "{victim}x"')


def test_a_config_that_is_no_vision_tower_is_refused_in_words(tmp_path):
    folder = golden("clip-vision-gelu")[0]
    shutil.copy(folder / "model.safetensors", tmp_path)
    good = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"model_type": "llama"}, '"llama" is no vision tower'),
        ({"hidden_act": "mish"}, '"mish" is not supported'),
        ({"patch_size": None}, "patch_size.* is missing"),
    ):
        (tmp_path / "config.json").write_text(
            json.dumps({k: v for k, v in {**good, **change}.items() if v is not None})
        )
        with pytest.raises(UserError, match=message):
            load_vit(tmp_path)
    with pytest.raises(UserError, match="text_config"):
        load_clip(folder)                                                       # one tower only


def test_the_temperature_is_clips():
    clip = CLIP(ViT(TINY_VIT), TextTransformer(TextConfig()), 16)
    assert abs(clip.logit_scale.exp().item() - 1 / 0.07) < 1e-4  # 2.6592 in the published config
