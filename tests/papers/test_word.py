"""Claim: recipe word makes one soft token a word of the frozen language model, in seconds."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from support.formats.files import UserError

COLORS = {"red": (220, 30, 30), "green": (30, 170, 50), "blue": (40, 60, 230), "yellow": (240, 220, 40),
          "white": (250, 250, 250), "purple": (160, 60, 200)}


def draw_squares(folder: Path) -> str:
    """A square of each colour that the bundled decoder has a word for, and one whose name it spells."""
    (folder / "images").mkdir()
    rows = []
    for word, color in {**COLORS, "xylophone": (0, 0, 0)}.items():
        picture = np.full((48, 48, 3), (24, 24, 32), np.uint8)
        picture[12:36, 12:36] = color
        Image.fromarray(picture).save(folder / "images" / f"{word}.png")
        rows.append(json.dumps({"image": f"{word}.png", "text": f"something {word}"}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return f"folder:{folder}:all"


@pytest.fixture
def squares(tmp_path):
    return draw_squares(tmp_path)


def test_a_short_run_reads_new_renderings_among_all_words(squares, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(["--recipe", "word", "--data", squares, "--steps", "40", "--batch", "16", "--threads", "1",
                "--log-every", "60", "--out", str(out)])
    result = json.loads((out / "words.json").read_text())
    scores = result["scores"]
    assert scores["words"] == 6 and scores["pictures"] == 24          # a xylophone is several tokens
    assert scores["named"] > 0.5 and scores["chance"] < 0.003 and scores["blind"] <= 1 / 6
    printed = capsys.readouterr().out
    assert f"6 names of 6 things, of 7 in {squares.removesuffix(':all')}; each name is one token" in printed
    assert "\n         blue, green, purple, red, white, yellow\n" in printed
    assert "new renderings of training's pictures" in printed and printed.count("⟨picture⟩ →") >= 6
    assert "next     python eval.py chat" in printed and Image.open(out / "first.png").size == (48, 48)
    assert all(row["right"] == (row["shows"] == row["read"]) for row in result["asked"])


def test_names_of_several_tokens_are_read_word_for_word(squares, tmp_path, capsys):
    """The bundled decoder spells "xylophone"; behind a shorter name are line ends."""
    out = tmp_path / "run"
    train.main(["--recipe", "word", "--data", squares, "--option", "constants=16", "width=64", "--steps",
                "80", "--batch", "8", "--threads", "1", "--log-every", "60", "--out", str(out)])
    scores = json.loads((out / "words.json").read_text())
    assert scores["scores"]["words"] == 7 and scores["scores"]["named"] > 0.5
    assert all(row["shows"].startswith("something ") for row in scores["asked"])
    assert "7 names of 7 things" in capsys.readouterr().out


def test_a_run_goes_on_to_the_same_bits(squares, tmp_path):
    flags = ["--recipe", "word", "--data", squares, "--batch", "4", "--threads", "1"]
    train.main([*flags, "--steps", "3", "--save-every", "2", "--out", str(tmp_path / "a")])
    whole = (tmp_path / "a" / "bridge.safetensors").read_bytes()
    (tmp_path / "a" / "bridge.safetensors").unlink()
    train.main(["--resume", str(tmp_path / "a")])
    assert (tmp_path / "a" / "bridge.safetensors").read_bytes() == whole


@pytest.mark.parametrize("flags, why", [
    (["--bridge", "flamingo"], "writes soft tokens, and flamingo writes none"),
    (["--examples", "1"], "recipe word needs two"),
    (["--augment"], "does not read --augment"),
    (["--data", "shapes"], "no thing there has a name")])
def test_what_makes_no_word_is_refused_in_one_sentence(squares, tmp_path, flags, why):
    with pytest.raises(UserError, match=why):
        train.main(["--recipe", "word", "--data", squares, "--out", str(tmp_path / "run"), *flags])
