"""ClipCap is the authors' mapper in both forms and reads one pooled vector of a picture.

That it beats its blind twin is measured with all bridges, in tests/test_train.py.
"""
from __future__ import annotations

import json

import pytest
import torch

from conftest import TINY, TINY_VIT, check, fixed_loss, golden, tiny_vlm
from model import IMAGE, DecoderConfig
from papers import make_bridge
from support.formats import load_bridge
from support.formats.checkpoint import Checkpoint, published_tensors
from support.formats.prefix_maps import clipcap_file, clipcap_transformer_file


def check_mapper(name: str, case_name: str) -> None:
    """Prefix, loss and all gradients, by the authors' names."""
    folder, case, x, expected = golden(case_name)
    file = clipcap_file if name == "clipcap" else clipcap_transformer_file
    names = file(Checkpoint(folder), json.loads((folder / "config.json").read_text())).names
    bridge = load_bridge(name, folder)
    y = bridge.prefix(bridge.see(x["x"][:, None]))
    loss = fixed_loss(y)
    loss.backward()
    for p in bridge.parameters():
        p.data = p.grad                                 # published_tensors joins keys and values again
    found = {f"grad.{n}": g for n, g in published_tensors(bridge, names).items()}
    found |= {"y": y.view_as(expected["y"]), "prefix": y, "grad.loss": loss.detach()}
    for key in expected:
        check(case, key, found[key], expected[key])


def test_the_mlp_is_the_authors():
    check_mapper("clipcap", "clipcap-mlp")


def test_the_transformer_is_the_authors_and_is_split_behind_the_image_tokens():
    check_mapper("clipcap_transformer", "clipcap-transformer")


@pytest.mark.parametrize("name", ["clipcap", "clipcap_transformer"])
def test_a_vector_is_read_as_it_comes_or_at_length_one(name):
    c = torch.randn(2, 1, 20, generator=torch.Generator().manual_seed(0))
    plain, normal = (tiny_vlm(name, normalize=n).bridge for n in (False, True))
    one = c / c.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(normal.prefix(normal.see(3 * c)), plain.prefix(plain.see(one)))
    assert not torch.allclose(plain.prefix(plain.see(3 * c)), plain.prefix(plain.see(c)))


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
