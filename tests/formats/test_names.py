"""Claim: a table of names says how each of our tensors is made of published ones, there and back; and
where the math refuses a number, the loader's error names the file."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import support.formats
from conftest import golden, tiny_vlm
from support.formats import load_bridge, load_clip, load_decoder, load_vit, load_vlm, save_vlm
from support.formats.checkpoint import Checkpoint, fill, published_tensors
from support.formats.files import UserError, write_tensors
from support.formats.names import (Joined, Part, Rotary, Rows, ZerosLike, as_source, expand, parameters,
                                   split_qkv)


@pytest.fixture
def stored(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {
        "qkv.weight": torch.arange(18.0).view(6, 3), "qkv.bias": torch.arange(6.0), "one": torch.tensor(5.0),
        "wide": torch.ones(1, 4)})
    return Checkpoint(tmp_path / "a.safetensors")


def test_a_source_builds_its_tensor_and_knows_what_it_reads(stored):
    weight = stored.get("qkv.weight")
    assert torch.equal(Part("qkv.weight", 1, 3).build(stored), weight[2:4])
    assert torch.equal(Rows("qkv.weight", 2).build(stored), weight.view(3, 2, 3))
    assert torch.equal(ZerosLike("qkv.bias").build(stored), torch.zeros(6))
    # one head of three pairs: the first of each pair, then the second
    assert torch.equal(Rotary("qkv.bias", 1).build(stored), torch.tensor([0.0, 2.0, 4.0, 1.0, 3.0, 5.0]))
    joined = Joined(("qkv.bias", Part("qkv.bias", 2, 3), ZerosLike("qkv.bias")))
    assert joined.names == ["qkv.bias"] * 3 and joined.build(stored).shape == (14,)
    with pytest.raises(UserError, match=r'a.safetensors: tensor "wide" has shape \(1, 4\), but \(6, 3\)'):
        Joined(("qkv.weight", "wide")).build(stored)


@pytest.mark.parametrize("source", [Part("qkv.bias", 0, 4), Part("one", 0, 2), Rows("qkv.bias", 4),
                                    Rotary("qkv.bias", 2), Rotary("one", 1)])
def test_what_cannot_be_cut_comes_back_whole_so_that_its_shape_is_reported(stored, source):
    assert torch.equal(source.build(stored), stored.get(source.name))


def test_a_table_is_expanded_over_layers_and_prefixes():
    table = {"norm": "ln", **parameters({"o": "proj"}, "blocks.{i}.", "h.{i}.", ("bias",)),
             **split_qkv("blocks.{i}.", "h.{i}.qkv_", ("bias",)), "both": Joined(("a", ZerosLike("b")))}
    assert expand(table, [3, 7], "model.", "vit.") == {
        "vit.norm": "model.ln",
        "vit.blocks.0.o.bias": "model.h.3.proj.bias",
        "vit.blocks.1.o.bias": "model.h.7.proj.bias",
        **{f"vit.blocks.{i}.{p}.bias": Part(f"model.h.{n}.qkv_bias", k, 3)
           for i, n in enumerate([3, 7]) for k, p in enumerate("qkv")},
        "vit.both": Joined(("model.a", ZerosLike("model.b"))),
    }
    own_prefixes = expand({"q": "to_q"}, 2, "h.{i}.", "blocks.{i}.")
    assert own_prefixes == {"blocks.0.q": "h.0.to_q", "blocks.1.q": "h.1.to_q"}


def test_published_tensors_is_the_inverse_of_fill(tmp_path):
    module = nn.ModuleDict({p: nn.Linear(4, 4) for p in "vqk"})     # the order is ours
    names = split_qkv("", "attn.qkv.")
    write_tensors(tmp_path / "m.safetensors", published_tensors(module, names))
    again = nn.ModuleDict({p: nn.Linear(4, 4) for p in "qkv"})
    fill(again, Checkpoint(tmp_path / "m.safetensors"), names)
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in module.named_parameters())
    assert as_source(names["k.bias"]).names == ["attn.qkv.bias"]


def test_a_part_of_the_wrong_size_is_named_with_the_part(tmp_path):
    write_tensors(tmp_path / "m.safetensors", {"qkv.weight": torch.ones(6, 4), "qkv.bias": torch.ones(6)})
    module = nn.ModuleDict({p: nn.Linear(4, 4) for p in "qkv"})
    with pytest.raises(UserError, match=r'"qkv.weight" \(part 1 of 3\) has shape \(2, 4\), .* \(4, 4\)'):
        fill(module, Checkpoint(tmp_path / "m.safetensors"), split_qkv("", "qkv."))


def changed(tmp_path, case: str, name: str = "config.json", part: str | None = None, **values):
    """A golden folder with other values in (a part of) its config."""
    shutil.copytree(golden(case)[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / name).read_text())
    (config[part] if part else config).update(values)
    (tmp_path / name).write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("load, case, part, values", [
    (load_decoder, "llama-mha", None, dict(num_attention_heads=3, num_key_value_heads=2)),
    (load_decoder, "llama-mha", None, dict(head_dim=7)),
    (load_vit, "clip-vision-gelu", None, dict(num_attention_heads=5)),
    (load_vit, "clip-vision-gelu", None, dict(hidden_act="swish")),
    (load_clip, "clip-model", "text_config", dict(hidden_act="swish")),
    (load_clip, "clip-model", "text_config", dict(num_attention_heads=5)),
    (load_vlm, "llava-hf", "text_config", dict(head_dim=7)),
    (load_vlm, "llava-hf", "vision_config", dict(num_attention_heads=5)),
    (load_vlm, "instructblip-llama", "qformer_config", dict(num_attention_heads=5)),
    (load_vlm, "idefics-resampler-qknorm", None, dict(cross_layer_interval=9)),
    (load_vlm, "mllama", "vision_config", dict(vision_output_dim=5)),
])
def test_a_config_that_the_math_refuses_is_named_at_the_door(tmp_path, load, case, part, values):
    with pytest.raises(UserError, match="config.json"):
        load(changed(tmp_path, case, part=part, **values))


def test_a_run_whose_config_lacks_a_key_or_has_an_unknown_option_is_named(tmp_path):
    save_vlm(tiny_vlm("linear"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("vit", "decoder", "bridge_options"):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        with pytest.raises(UserError, match=f"config.json: the key '{key}' is missing"):
            load_vlm(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "bridge_options": {"width": 3}}))
    with pytest.raises(UserError, match='config.json: linear has no option "width"'):
        load_vlm(tmp_path)


def test_a_bridge_file_that_the_math_refuses_is_named(tmp_path):
    tensors = load_file(golden("mapl-mapper")[0] / "model.safetensors")
    write_tensors(tmp_path / "mapl.safetensors", tensors)
    with pytest.raises(UserError, match="mapl.safetensors: .*5 heads"):
        load_bridge("mapl", tmp_path / "mapl.safetensors", heads=5)


def test_the_front_door_is_what_the_readme_lists():
    assert sorted(support.formats.__all__) == [
        "load_bridge", "load_clip", "load_decoder", "load_processor", "load_tokenizer", "load_vit",
        "load_vlm", "read_image", "save_vlm"]
    assert all(callable(getattr(support.formats, name)) for name in support.formats.__all__)
