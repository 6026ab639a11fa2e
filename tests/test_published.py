"""Claim: published vision-language models load by their own names and compute what their own code computes."""
from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F

from conftest import check, fixed_loss, golden
from model import IGNORE, IMAGE, UserError, load_vlm

LLAVA_FILES = [("model.safetensors", "config.json"), ("model.hub.safetensors", "config.hub.json"), ("model.new.safetensors", "config.json"),
               ("model.new.safetensors", "config.hub.json")]


def layout(tmp_path, folder, weights="model.safetensors", config="config.json"):
    """A folder that holds one of a case's layouts under the usual names."""
    shutil.copy(folder / weights, tmp_path / "model.safetensors")
    shutil.copy(folder / config, tmp_path / "config.json")
    return tmp_path


@pytest.mark.parametrize("weights, config", LLAVA_FILES)
def test_llava_in_the_layouts_of_three_library_generations(tmp_path, weights, config):
    folder, case, x, expected = golden("llava-hf")
    vlm = load_vlm(layout(tmp_path, folder, weights, config))
    rows, tokens = case["pixel_values_rows"], lambda name: x[f"{name}.input_ids_unexpanded"].masked_fill(x[f"{name}.input_ids_unexpanded"] == 70, IMAGE)
    features = vlm.features(x["pixel_values"])
    check(case, "selected_features", features, expected["selected_features"])
    check(case, "image_features", vlm.bridge.prefix(features), expected["image_features"])
    for name in ("start", "middle", "two", "text"):
        check(case, f"{name}.logits", vlm(tokens(name), features=features[rows[name]]), expected[f"{name}.logits"])
        banned = torch.zeros(72).index_fill_(0, torch.tensor([70]), -1e9)       # the case never lets the image's id be chosen
        head = vlm.decoder.head
        vlm.decoder.head = lambda h: head(h) + banned
        check(case, f"{name}.generated_ids", vlm.generate(tokens(name), features=features[rows[name]], max_new_tokens=12),
              expected[f"{name}.generated_ids"])
        vlm.decoder.head = head
    # two rows, padded on the left
    short, long = tokens("start"), tokens("middle")
    pad = long.shape[1] - short.shape[1]
    batch, mask = torch.cat((F.pad(short, (pad, 0)), long)), torch.ones(2, long.shape[1], dtype=torch.bool)
    mask[0, :pad] = False
    logits = vlm(batch, mask=mask, features=features[[*rows["start"], *rows["middle"]]])
    check(case, "batch.logits", logits * x["batch.attention_mask"][..., None], expected["batch.logits"])
    loss = fixed_loss(vlm(tokens("middle"), features=features[rows["middle"]].detach()))
    loss.backward()
    check(case, "grad.loss", loss, expected["grad.loss"])
    for ours, theirs in (("up", "linear_1"), ("down", "linear_2")):
        for w in ("weight", "bias"):
            key = f"grad.multi_modal_projector.{theirs}.{w}"
            check(case, key, getattr(getattr(vlm.bridge, ours), w).grad, expected[key])


@pytest.mark.parametrize("name, parts", [("llava-original-v1-linear", {"map": "mm_projector"}),
                                         ("llava-original-v15", {"up": "mm_projector.0", "down": "mm_projector.2"})])
def test_llava_in_its_authors_layouts(name, parts):
    folder, case, x, expected = golden(name)
    vlm, rows = load_vlm(folder), case["pixel_values_rows"]
    features = vlm.features(x["pixel_values"]).detach()
    check(case, "image_features", vlm.bridge.prefix(features), expected["image_features"])
    for prompt in ("start", "middle", "two"):
        check(case, f"{prompt}.logits", vlm(x[f"{prompt}.input_ids"], features=features[rows[prompt]]), expected[f"{prompt}.logits"])
        check(case, f"{prompt}.generated_ids", vlm.generate(x[f"{prompt}.input_ids"], features=features[rows[prompt]], max_new_tokens=12),
              expected[f"{prompt}.generated_ids"])
    mask = x["batch.attention_mask"].bool()
    inputs, labels = vlm.prepare(x["batch.input_ids"], features[rows["batch"]], mask, x["batch.labels"])
    check(case, "batch.expanded_attention_mask", inputs["mask"].long(), expected["batch.expanded_attention_mask"])
    check(case, "batch.logits", vlm.decoder(**inputs) * inputs["mask"][..., None], expected["batch.logits"])
    total, count = vlm.loss(x["batch.input_ids"], x["batch.labels"], mask=mask, features=features[rows["batch"]])
    assert count == int((x["batch.labels"] != IGNORE).sum())
    (total / count).backward()
    check(case, "batch.loss", total / count, expected["batch.loss"])
    for ours, theirs in parts.items():
        for w in ("weight", "bias"):
            check(case, f"grad.{theirs}.{w}", getattr(getattr(vlm.bridge, ours), w).grad, expected[f"grad.{theirs}.{w}"])
