"""ClipCap is the authors' mapper in both forms and reads one pooled vector of a picture.

That it beats its blind twin is measured with all bridges, in tests/test_train.py.
"""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from conftest import TINY, TINY_VIT, check, fixed_loss, golden, tiny_vlm
from model import IMAGE, DecoderConfig
from papers import make_bridge

MLP = {f"{a}.{w}": f"clip_project.model.{b}.{w}" for a,
       b in (("up", 0), ("down", 2)) for w in ("weight", "bias")}


def transformer_names(layers: int) -> dict[str, str]:
    names = {"constants": "clip_project.prefix_const", "map.weight": "clip_project.linear.weight",
             "map.bias": "clip_project.linear.bias"}
    for l in range(layers):
        ours, theirs = f"blocks.{l}", f"clip_project.transformer.layers.{l}"
        pairs = {"norm1": "norm1", "norm2": "norm2", "o": "attn.project", "up": "mlp.fc1", "down": "mlp.fc2"}
        names |= {f"{ours}.{a}.{w}": f"{theirs}.{b}.{w}" for a,
                  b in pairs.items() for w in ("weight", "bias")}
        names[f"{ours}.q.weight"] = f"{theirs}.attn.to_queries.weight"
    return names


def fill_mapper(bridge: torch.nn.Module, tensors: dict, names: dict) -> torch.nn.Module:
    """Every parameter gets the authors' tensor; their keys and values are one matrix, keys first."""
    used = set()
    with torch.no_grad():
        for ours, p in bridge.named_parameters():
            if ours.endswith((".k.weight", ".v.weight")):
                l = ours.split(".")[1]
                theirs = f"clip_project.transformer.layers.{l}.attn.to_keys_values.weight"
                p.copy_(tensors[theirs].chunk(2)[ours.endswith(".v.weight")])
            else:
                theirs = names[ours]
                p.copy_(tensors[theirs])
            used.add(theirs)
    assert used == set(tensors)
    return bridge


def test_the_mlp_is_the_authors():
    folder, case, x, expected = golden("clipcap-mlp")
    bridge = make_bridge("clipcap", DecoderConfig(width=12), 20, tokens=7)
    fill_mapper(bridge, load_file(folder / "model.safetensors"), MLP)
    y = bridge.prefix(x["x"][:, None])
    check(case, "prefix", y, expected["prefix"])
    check(case, "y", y.flatten(1), expected["y"])
    loss = fixed_loss(y)
    loss.backward()
    check(case, "grad.loss", loss.detach(), expected["grad.loss"])
    for ours, theirs in MLP.items():
        check(case, f"grad.{theirs}", bridge.get_parameter(ours).grad, expected[f"grad.{theirs}"])


def test_the_transformer_is_the_authors_and_is_split_behind_the_image_tokens():
    folder, case, x, expected = golden("clipcap-transformer")
    bridge = make_bridge("clipcap_transformer", DecoderConfig(width=24), 20, tokens=6, image_tokens=3,
                         layers=3)
    names = transformer_names(3)
    fill_mapper(bridge, load_file(folder / "model.safetensors"), names)
    y = bridge.prefix(x["x"][:, None])
    check(case, "y", y, expected["y"])
    loss = fixed_loss(y)
    loss.backward()
    check(case, "grad.loss", loss.detach(), expected["grad.loss"])
    for ours, theirs in names.items():
        check(case, f"grad.{theirs}", bridge.get_parameter(ours).grad, expected[f"grad.{theirs}"])
    for l in range(3):
        both = torch.cat([bridge.get_parameter(f"blocks.{l}.{p}.weight").grad for p in "kv"])
        key = f"grad.clip_project.transformer.layers.{l}.attn.to_keys_values.weight"
        check(case, key, both, expected[key])


def test_the_published_sizes():
    with torch.device("meta"):
        mlp = make_bridge("clipcap", DecoderConfig(width=768), 512)
        transformer = make_bridge("clipcap_transformer", DecoderConfig(width=768), 640)
    assert sum(p.numel() for p in mlp.parameters()) == 31_468_800
    assert sum(p.numel() for p in transformer.parameters()) == 42_728_448


@pytest.mark.parametrize("name", ["clipcap", "clipcap_transformer"])
def test_it_reads_the_pooled_vector_and_nothing_else(name):
    vlm = tiny_vlm(name)
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    features = vlm.features(pixels)
    assert features.shape == (2, *vlm.features(None).shape[1:]) == (2, 1, TINY_VIT.width)
    torch.testing.assert_close(features[:, 0], vlm.vit.pool(vlm.vit(pixels)))
    tokens = torch.tensor([[3, IMAGE, 5], [4, IMAGE, 6]])
    assert vlm(tokens, pixels).shape == (2, 2 + 3, TINY.vocab_size)
