"""A toy web: the goal's colour is one thing's alone, the text shows none, and only screenshots differ."""
from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import eval
import train
from conftest import ROOT
from data import COLORS, HELD_OUT, SHAPES
from support.formats import load_decoder
from support.worlds import open_data

KINDS = ("shapes-clicks", "shapes-clicks-white", "shapes-clicks-noise", "shapes-clicks-text")


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_thing_alone_has_the_goal_s_color_and_stands_where_the_answer_says(split):
    for index in range(200):
        item = open_data(f"shapes-clicks:{split}").item(index)
        things = {(color, shape, place) for color, shape, place
                  in re.findall(r"(\w+) (\w+) at the (\w+ \w+)", item.about)}
        (q,), text = item.qas, item.qas[0].question.partition(" click the ")[0]
        goal = q.question.split()[-2]
        (color, shape, place), = [thing for thing in things if thing[0] == goal]
        assert place == q.answer and 2 <= len(things) <= 4
        assert ((color, shape) in HELD_OUT) == (split == "test")
        said = re.findall(r"an? (\w+) at the (\w+ \w+)", text)
        assert sorted(said) == sorted((shape, place) for _, shape, place in things)
        assert not {*COLORS} & {*text.split()} and {shape for shape, _ in said} <= {*SHAPES}


def test_the_four_kinds_are_the_same_pages_with_other_screenshots():
    real, white, noise, none = ([open_data(kind).item(i) for i in range(20)] for kind in KINDS)
    for pages in (white, noise, none):
        assert [page.qas for page in pages] == [page.qas for page in real]
    assert all((page.image == 255).all() for page in white) and all(page.image is None for page in none)
    assert all(page.image.shape == other.image.shape for page, other in zip(noise, real))
    assert len({page.image.tobytes() for page in noise}) == len({page.image.tobytes() for page in real}) == 20
    assert np.mean([page.image.mean() for page in noise]) == pytest.approx(127.5, abs=1)
    assert (noise[3].image == open_data(KINDS[2]).item(3).image).all()                      # drawn again


def test_pages_without_a_screenshot_teach_the_decoder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    train.main(["--recipe", "llava-2", "--init", "none", "--data", KINDS[3], "--steps", "2", "--batch", "4",
                "--warmup", "0", "--out", str(tmp_path)])
    assert "held-out loss" in capsys.readouterr().out
    eval.main([str(tmp_path)])
    assert "loss" in capsys.readouterr().out
    before, after = load_decoder("weights/decoder"), load_decoder(tmp_path / "decoder")
    assert not torch.equal(before.layers[0].mlp.up.weight, after.layers[0].mlp.up.weight)
