"""Claim: published vision-language models load by their own names and compute what their own code
computes."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import eval as evaluation
from conftest import GOLDEN, check, fixed_loss, golden, speaking
from model import IGNORE, IMAGE
from support.formats.files import UserError
from support.formats.vlm import load_bridge, load_vlm, save_vlm

LLAVA_FILES = [
    ("model.safetensors", "config.json"),
    ("model.hub.safetensors", "config.hub.json"),
    ("model.new.safetensors", "config.json"),
    ("model.new.safetensors", "config.hub.json"),
]


def layout(tmp_path, folder, weights="model.safetensors", config="config.json"):
    """A folder that holds one of a case's layouts under the usual names."""
    shutil.copy(folder / weights, tmp_path / "model.safetensors")
    shutil.copy(folder / config, tmp_path / "config.json")
    return tmp_path


@pytest.mark.parametrize("weights, config", LLAVA_FILES)
def test_llava_in_the_layouts_of_three_library_generations(tmp_path, weights, config):
    folder, case, x, expected = golden("llava-hf")
    vlm = load_vlm(layout(tmp_path, folder, weights, config))
    rows, tokens = (
        case["pixel_values_rows"],
        lambda name: x[f"{name}.input_ids_unexpanded"].masked_fill(
            x[f"{name}.input_ids_unexpanded"] == 70, IMAGE
        ),
    )
    features = vlm.features(x["pixel_values"])
    check(case, "selected_features", features, expected["selected_features"])
    check(case, "image_features", vlm.bridge.prefix(features), expected["image_features"])
    for name in ("start", "middle", "two", "text"):
        check(
            case,
            f"{name}.logits",
            vlm(tokens(name), features=features[rows[name]]),
            expected[f"{name}.logits"],
        )
        banned = torch.zeros(72).index_fill_(
            0, torch.tensor([70]), -1e9
        )  # the case never lets the image's id be chosen
        head = vlm.decoder.head
        vlm.decoder.head = lambda h: head(h) + banned
        check(
            case,
            f"{name}.generated_ids",
            vlm.generate(tokens(name), features=features[rows[name]], max_new_tokens=12),
            expected[f"{name}.generated_ids"],
        )
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


@pytest.mark.parametrize(
    "name, parts",
    [
        ("llava-original-v1-linear", {"map": "mm_projector"}),
        ("llava-original-v15", {"up": "mm_projector.0", "down": "mm_projector.2"}),
    ],
)
def test_llava_in_its_authors_layouts(name, parts):
    folder, case, x, expected = golden(name)
    vlm, rows = load_vlm(folder), case["pixel_values_rows"]
    features = vlm.features(x["pixel_values"]).detach()
    check(case, "image_features", vlm.bridge.prefix(features), expected["image_features"])
    for prompt in ("start", "middle", "two"):
        check(
            case,
            f"{prompt}.logits",
            vlm(x[f"{prompt}.input_ids"], features=features[rows[prompt]]),
            expected[f"{prompt}.logits"],
        )
        check(
            case,
            f"{prompt}.generated_ids",
            vlm.generate(x[f"{prompt}.input_ids"], features=features[rows[prompt]], max_new_tokens=12),
            expected[f"{prompt}.generated_ids"],
        )
    mask = x["batch.attention_mask"].bool()
    inputs, labels = vlm.prepare(x["batch.input_ids"], features[rows["batch"]], mask, x["batch.labels"])
    check(
        case,
        "batch.expanded_attention_mask",
        inputs["mask"].long(),
        expected["batch.expanded_attention_mask"],
    )
    check(case, "batch.logits", vlm.decoder(**inputs) * inputs["mask"][..., None], expected["batch.logits"])
    total, count = vlm.loss(
        x["batch.input_ids"], x["batch.labels"], mask=mask, features=features[rows["batch"]]
    )
    assert count == int((x["batch.labels"] != IGNORE).sum())
    (total / count).backward()
    check(case, "batch.loss", total / count, expected["batch.loss"])
    for ours, theirs in parts.items():
        for w in ("weight", "bias"):
            check(
                case,
                f"grad.{theirs}.{w}",
                getattr(getattr(vlm.bridge, ours), w).grad,
                expected[f"grad.{theirs}.{w}"],
            )


def test_what_we_export_loads_back_and_what_has_no_class_elsewhere_is_refused(tmp_path):
    from conftest import tiny_vlm
    tokens, pixels = torch.tensor([[3, IMAGE, 8, 9]]), torch.randn(1, 3, 24, 24)
    vlm = tiny_vlm("mlp", image_token=7)
    save_vlm(vlm, tmp_path / "llava", layout="hf")
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert (
        config["model_type"] == "llava"
        and config["image_token_index"] == 7
        and config["image_seq_length"] == 9
    )
    keys = load_file(
        golden("llava-hf")[0] / "model.hub.safetensors"
    ).keys()  # the names of the published files, for as many layers
    ours = load_file(tmp_path / "llava" / "model.safetensors").keys()
    generic = lambda names: {re.sub(r"layers\.\d+", "layers.N", n) for n in names if "position_ids" not in n}
    assert generic(ours) == generic(keys)
    assert torch.equal(load_vlm(tmp_path / "llava")(tokens, pixels), vlm(tokens, pixels))
    adapter = tiny_vlm("zero_init", version=0, gate_per="layer")
    save_vlm(adapter, tmp_path / "peft", layout="hf")
    theirs = load_file(golden("adapter-peft")[0] / "adapter" / "adapter_model.safetensors").keys()
    assert {re.sub(r"\d+", "N", n) for n in load_file(tmp_path / "peft" / "adapter_model.safetensors")} == {
        re.sub(r"\d+", "N", n) for n in theirs
    }
    again = load_bridge("zero_init", tmp_path / "peft", decoder=adapter.decoder.config)
    assert not again.tanh and torch.allclose(again.gates(), adapter.bridge.gates(), atol=1e-7)
    for name, options, words in (
        ("mapl", {}, 'no other library has a class for a "mapl" bridge'),
        ("zero_init", {}, "sees an image"),
        ("linear", {}, "at least 40 wide"),
        ("mlp", dict(hidden=7), "has 7"),
    ):
        with pytest.raises(UserError, match=words):
            save_vlm(tiny_vlm(name, **options), tmp_path / "no", layout="hf")
    with pytest.raises(UserError, match='unknown layout "onnx"'):
        save_vlm(vlm, tmp_path / "no", layout="onnx")


@pytest.mark.parametrize(
    "case",
    [
        "llava-hf",
        "llava-original-v1-linear",
        "llava-original-v15",
        "instructblip-llama",
        "idefics-plain",
        "idefics-resampler-qknorm",
        "mllama",
    ],
)
def test_a_published_model_answers_about_a_picture_file(tmp_path, case, capsys):
    folder = speaking(tmp_path, case)
    picture = GOLDEN / "image-processors" / "images" / "coffee_73x151.png"
    asked = ["ask", str(folder), "--image", str(picture), "--prompt", "hello", "--max-new-tokens", "5"]
    evaluation.main(asked)
    first = capsys.readouterr().out
    assert first.endswith("\n")  # random weights: any text will do, but it came from this picture
    evaluation.main(asked)
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("case", ["llava-hf", "idefics-plain", "mllama", "instructblip-llama"])
def test_a_published_model_is_asked_without_a_picture_where_it_takes_that(tmp_path, case, capsys):
    asked = ["ask", str(speaking(tmp_path, case)), "--prompt", "hello", "--max-new-tokens", "3"]
    if case == "instructblip-llama":
        with pytest.raises(UserError, match="answers about a picture only: give it one, --image FILE"):
            evaluation.main(asked)
    else:
        evaluation.main(asked)
        assert capsys.readouterr().out.endswith("\n")


def test_blip2s_first_stage_says_how_well_a_caption_fits(tmp_path, capsys):
    folder = speaking(tmp_path, "blip2-itm-itc")
    evaluation.main(
        [
            "ask",
            str(folder),
            "--image",
            str(GOLDEN / "image-processors/images/coffee_73x151.png"),
            "--prompt",
            "a cat",
        ]
    )
    words = re.findall(r"(match|similarity): (-?\d\.\d{3})", capsys.readouterr().out)
    assert (
        [w for w, _ in words] == ["match", "similarity"]
        and 0 <= float(words[0][1]) <= 1
        and -1 <= float(words[1][1]) <= 1
    )
    asked = ["ask", str(folder), "--image", str(GOLDEN / "image-processors/images/coffee_73x151.png")]
    with pytest.raises(UserError, match="which writes nothing, does not read --beams, --max-new-tokens"):
        evaluation.main([*asked, "--prompt", "a cat", "--beams", "2", "--max-new-tokens", "5"])
