"""A CogVLM folder gives its language expert as a decoder and its vision experts as a bridge, strictly."""
from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from conftest import GOLDEN
from support.formats import load_bridge, load_decoder, load_vlm
from support.formats.files import UserError, write_tensors


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN / "cogvlm-expert", tmp_path, dirs_exist_ok=True)
    return tmp_path


def change(folder, config: dict | None = None, drop: str = "", add: dict | None = None) -> None:
    c = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps({k: v for k, v in c.items() if v is not None}))
    tensors = load_file(folder / "model.safetensors") | (add or {})
    write_tensors(folder / "model.safetensors", {k: t for k, t in tensors.items() if k != drop})


def as_cogvlm2(folder) -> dict[str, torch.Tensor]:
    """Grouped keys, biases on the vision expert's q, k, v, a convolution, and tensors of the tower."""
    tensors, g = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in list(tensors):
        if "query_key_value" in name:
            tensors[name] = torch.randn(24 + 2 * 8, 24, generator=g)
            if "vision" in name:
                tensors[name.replace("weight", "bias")] = torch.randn(40, generator=g)
    tensors |= {"model.vision.conv.weight": torch.randn(20, 20, 2, 2),
                "model.vision.conv.bias": torch.randn(20),
                "model.vision.patch_embedding.proj.weight": torch.randn(20, 3, 4, 4),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(4)}
    return tensors


def test_cogvlm2s_grouped_rows_biases_and_convolution(folder, capsys):
    tensors = as_cogvlm2(folder)
    change(folder, {"num_multi_query_heads": 1, "vision_expert_bias": None, "rope_theta": None}, add=tensors)
    decoder, bridge = load_decoder(folder), load_bridge("cogvlm", folder)
    assert decoder.config.kv_heads == 1 and decoder.config.rope_theta == 500_000
    experts = {"language": decoder.layers[1].attention, "vision": bridge.experts[1].attention}
    for kind, attention in experts.items():
        fused = tensors[f"model.layers.1.self_attn.{kind}_expert_query_key_value.weight"]
        assert torch.equal(torch.cat((attention.q.weight, attention.k.weight, attention.v.weight)), fused)
    assert torch.equal(bridge.experts[0].attention.k.bias,
                       tensors["model.layers.0.self_attn.vision_expert_query_key_value.bias"][24:32])
    assert torch.equal(bridge.conv.weight, tensors["model.vision.conv.weight"])
    assert bridge.see(torch.randn(1, 16, 20)).shape == (1, 4, 20)
    assert "not the bridge's and stay where they are" in capsys.readouterr().err


def test_the_first_versions_config_names_its_class_alone(folder):
    change(folder, {"model_type": None, "num_multi_query_heads": None, "rope_theta": None,
                    "template_version": "chat"})
    assert load_decoder(folder).config.kv_heads == 3
    assert load_decoder(folder).config.rope_theta == 10_000
    assert len(load_bridge("cogvlm", folder).experts) == 2


VISION, LANGUAGE = (f"model.layers.1.self_attn.{kind}_expert_dense.weight" for kind in ("vision", "language"))


@pytest.mark.parametrize("config, drop, add, bridge, decoder", [
    ({}, VISION, {}, "", None),                     # a layer fewer than the config has
    ({}, "model.layers.1.mlp.vision_mlp.up_proj.weight", {}, "up_proj.weight", None),
    ({}, LANGUAGE, {}, None, LANGUAGE),
    ({}, "", {"model.layers.0.mlp.vision_mlp.odd.weight": torch.ones(2)}, "odd.weight", "odd.weight"),
    ({}, "", {"model.vision.linear_proj.norm2.weight": torch.ones(2)}, "norm2.weight", "norm2.weight"),
    ({}, "", {"model.vision.boi": torch.ones(1, 1, 23)}, "model.vision.boi", None),
    ({}, "", {VISION: torch.full((24, 24), torch.nan)}, "not finite", None),
    (dict(hidden_size=25), "", {}, "hidden_size is 25", ""),
    (dict(vision_config={"hidden_size": 21}), "", {}, "hidden_size is 21", None),
    (dict(vision_expert_bias=True), "", {}, "vision_expert_bias is true", None),
    (dict(num_multi_query_heads=2), "", {}, None, "evenly"),
    (dict(num_multi_query_heads=0), "", {}, "num_multi_query_heads", "num_multi_query_heads"),
    (dict(cross_size=1024), "", {}, "cross_size", "cross_size"),
])
def test_what_does_not_fit_is_refused_by_name(folder, config, drop, add, bridge, decoder):
    """bridge, decoder: what the sentence names; None: this half of the folder is not concerned and loads."""
    change(folder, config, drop, add)
    loads = ((bridge, lambda: load_bridge("cogvlm", folder)), (decoder, lambda: load_decoder(folder)))
    for words, load in loads:
        if words is None:
            load()
            continue
        with pytest.raises(UserError) as e:
            load()
        assert words in str(e.value) and "\n" not in str(e.value)


def test_the_whole_model_is_refused_in_one_sentence(folder):
    with pytest.raises(UserError, match="CogVLM's ViT is not computed here; load_decoder"):
        load_vlm(folder)
