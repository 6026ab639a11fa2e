"""FLAVA computes what transformers' does: states of three encoders, six losses, the rows that they read."""
from __future__ import annotations

import json
import shutil

import pytest
import torch

from conftest import check, golden
from model import IGNORE, ViT, ViTConfig
from papers.flava import Flava
from support.formats.files import UserError
from support.formats.flava import load_flava


@pytest.fixture(scope="module")
def case():
    folder, case, x, expected = golden("flava")
    return case, x, expected, load_flava(folder)


def pair(x: dict) -> tuple:
    return (x["pixel_values"], x["bool_masked_pos"].bool(), x["mim_labels"], x["input_ids"],
            x["input_ids_masked"], x["mlm_labels"], x["attention_mask"].bool(), x["itm_labels"].bool())


@torch.no_grad()
def test_states_and_logits_are_the_library_s(case):
    case, x, expected, model = case
    pixels, hidden, codes, tokens, masked, labels, mask, match = pair(x)
    image, text, real = model.image(pixels), model.text(tokens, mask), mask[..., None]
    check(case, "image", model.vit.post_norm(image), expected["image_embeddings"])
    check(case, "text", model.text_norm(text) * real, expected["text_embeddings"] * real)
    check(case, "masked image", model.vit.post_norm(model.image(pixels, hidden)),
          expected["image_masked_embeddings"])
    all_real = torch.cat((mask.new_ones(3, 1 + image.shape[1]), mask), dim=1)[..., None]
    check(case, "joined", model.join(image, text, mask) * all_real,
          expected["multimodal_embeddings"] * all_real)
    joined = model.join(model.image(pixels, hidden), model.text(masked, mask), mask)
    check(case, "joined, masked", (joined * all_real)[match],
          expected["multimodal_masked_embeddings"] * all_real[match])
    check(case, "itm", model.match_logits(joined), expected["itm_logits"])
    u, v = model.embed(image, text)
    scale = model.logit_scale.exp()
    check(case, "contrast", (scale * u @ v.T)[match], expected["contrastive_logits_per_image"])
    check(case, "contrast", (scale * v @ u.T)[match], expected["contrastive_logits_per_text"])
    N = codes.shape[1]
    check(case, "mmm", model.mmm_image_head(joined[:, 2:2 + N][hidden & match[:, None]]),
          expected["mmm_image_logits"])
    check(case, "mmm", model.mmm_text_head(joined[:, 2 + N:][(labels != IGNORE) & match[:, None]]),
          expected["mmm_text_logits"])


def test_six_losses_are_the_library_s(case):
    case, x, expected, model = case
    losses = model.pair_losses(*pair(x))
    for ours, theirs in (("contrast", "global_contrastive"), ("itm", "itm"), ("mmm_image", "mmm_image"),
                         ("mmm_text", "mmm_text")):
        check(case, ours, losses[ours], expected[f"loss.{theirs}"])
    check(case, "loss", sum(losses.values()), expected["loss"])
    pixels, hidden, codes, _, masked, labels, mask, _ = pair(x)
    check(case, "mim", model.image_loss(pixels, hidden, codes), expected["unimodal.loss.mim"])
    check(case, "mlm", model.text_loss(masked, labels, mask), expected["unimodal.loss.mlm"])


@torch.no_grad()
def test_what_a_pair_that_does_not_match_may_say(case):
    """It is a column of the contrast and a row of matching, and no more; where none matches, all are rows."""
    _, x, expected, model = case
    *batch, match = pair(x)
    every = model.pair_losses(*batch, torch.ones_like(match))
    assert abs(every["contrast"] - expected["loss.global_contrastive"]) > 1e-3
    assert abs(every["mmm_text"] - expected["loss.mmm_text"]) > 1e-3
    none = model.pair_losses(*batch, torch.zeros_like(match))
    assert none["contrast"] == every["contrast"] and none["itm"] != every["itm"]


def test_the_published_sizes_have_303_859_063_parameters():
    with torch.device("meta"):
        vit = ViT(ViTConfig(224, 16, 768, 12, 12, 3072, "gelu", 1e-12, pre_norm=False, patch_bias=True))
        model = Flava(vit, 30522)
    poolers = 3 * (768 * 768 + 768)                     # three that the library builds and no loss reads
    assert sum(p.numel() for p in model.parameters()) + poolers == 303_859_063


@pytest.mark.parametrize("part, key, value", [
    (None, "a_new_key", 1), ("image_config", "qkv_bias", False),
    ("multimodal_config", "use_cls_token", False),
    ("text_config", "position_embedding_type", "relative_key"), ("text_config", "num_attention_heads", 2),
    ("image_config", "num_channels", 1), ("multimodal_config", "hidden_act", "relu")])
def test_no_key_of_its_config_is_ignored(part, key, value, tmp_path):
    shutil.copytree(golden("flava")[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (config[part] if part else config)[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json.*{'heads' if 'heads' in key else key}"):
        load_flava(tmp_path)


def test_the_vit_that_it_is_given_stays_as_it_was():
    vit = ViT(ViTConfig(8, 4, 8, 1, 2, 16, "gelu", pre_norm=False, patch_bias=True))
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    model = Flava(vit, 10, 5, 1, 2, 16, 1, 16, 8, 4)
    assert model.vit is vit and all(torch.equal(vit.state_dict()[name], x) for name, x in before.items())
    assert not model.image_in.bias.any() and 0.01 < model.image_in.weight.std() < 0.03
