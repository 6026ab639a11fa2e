"""Claim: a folder of own pictures is a world; its broken records are counted, or stop a strict run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.formats.files import UserError
from support.worlds import open_data
from support.worlds.pairs import contrastive_pair


def own_pictures(folder: Path, count: int = 12) -> Path:
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(count):
        Image.fromarray(np.full((20, 30, 3), i * 20, np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "text": f"grey {i}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def test_a_folder_of_own_pictures_shows_each_once_a_pass_and_keeps_every_tenth_for_val(tmp_path):
    train, val = (open_data(f"folder:{own_pictures(tmp_path)}{split}") for split in ("", ":val"))
    first = [train.item(i).captions[0] for i in range(11)]
    assert sorted(first) == sorted(f"grey {i}" for i in range(12) if i != 9) and val.item(0).captions == [
        "grey 9"
    ]
    assert [train.item(i).captions[0] for i in range(11, 22)] != first  # another order in the second pass
    image, text, false = contrastive_pair(train, 3)
    assert image.shape == (20, 30, 3) and text not in false


def test_broken_records_of_a_folder_are_counted_or_stop_a_strict_run(tmp_path, capsys):
    folder = own_pictures(tmp_path)
    (folder / "3.png").write_text("no picture")
    with open(folder / "captions.jsonl", "a") as f:
        f.write('\nnot json\n{"image": "1.png"}\n{"image": "1.png", "text": " "}')
    world = open_data(f"folder:{folder}")
    texts = [world.item(i).captions[0] for i in range(11)]
    assert "grey 3" not in texts and len(world.broken) == 4
    assert "4 broken records" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"captions.jsonl, line 13"):
        open_data(f"folder:{folder}", strict=True)


def test_an_empty_folder_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="captions.jsonl"):
        open_data(f"folder:{tmp_path}")
    (tmp_path / "captions.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no usable record"):
        open_data(f"folder:{tmp_path}")
