"""A run of a tokenizer of pictures is read back as it was trained; what is none says so in one sentence."""
from __future__ import annotations

import pytest
import torch

import train
from support.formats.files import UserError, write_json
from support.formats.picture_runs import load_picture_tokenizer

QUICK = ["--steps", "2", "--batch", "2", "--dtype", "float32", "--eval-items", "4"]


@pytest.mark.parametrize("recipe", ["vq", "dvae"])
def test_a_tokenizer_of_pictures_is_read_back(recipe, tmp_path):
    module = train.main(["--recipe", recipe, *QUICK, "--out", str(tmp_path / "run")])
    again = load_picture_tokenizer(tmp_path / "run")
    pixels = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ids = module.encode(pixels)
        assert torch.equal(again.encode(pixels), ids) and torch.equal(again.decode(ids), module.decode(ids))
    assert not any(p.requires_grad for p in again.parameters())


def test_another_run_is_no_tokenizer_and_drawing_needs_one(tmp_path):
    write_json(tmp_path / "config.json", {"settings": {"recipe": "mlp"}})
    with pytest.raises(UserError, match="a run of recipe mlp, not of vq or dvae"):
        load_picture_tokenizer(tmp_path)
    with pytest.raises(UserError, match="recipe begins with a trained tokenizer"):
        train.main(["--recipe", "dalle-2", "--init", "none", *QUICK, "--out", str(tmp_path / "out")])
