"""eval.py draw: every recipe that draws is read back from its run, and its pictures are counted by rule."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import train
from support.formats.drawing_runs import load_code_task, load_drawer, to_arrays
from support.formats.files import UserError, read_json
from support.lab import draw
from support.lab.draw import SPLITS, System, best_by_clip, count_drawings, count_report

QUICK = ["--steps", "1", "--batch", "2", "--dtype", "float32", "--eval-items", "2"]
TEXTS = ["a large red ring at the top left", "a small blue cross at the bottom right"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """{recipe: (its run, its task's module)} of both that draw by codes."""
    out = tmp_path_factory.mktemp("draw")
    train.main(["--recipe", "vq", *QUICK, "--out", str(out / "vq")])
    return {recipe: (out / recipe, train.main(["--recipe", recipe, "--init", str(out / "vq"), *QUICK,
                                               "--out", str(out / recipe)]))
            for recipe in ("dalle-2", "chameleon-2")}


@pytest.mark.parametrize("recipe", ["dalle-2", "chameleon-2"])
def test_a_run_that_draws_by_codes_is_read_back_without_what_it_began_with(recipe, runs):
    run, module = runs[recipe]
    assert read_json(run / "config.json")["pictures"] == "vq"
    learned = dict(load_code_task(run, recipe).module.named_parameters())
    assert learned.keys() == dict(module.named_parameters()).keys()
    assert all(torch.equal(p, learned[name]) for name, p in module.named_parameters())
    pictures = load_drawer(run)(TEXTS, 0)
    assert [p.shape for p in pictures] == [(48, 48, 3)] * 2 and pictures[0].dtype == np.uint8
    assert all(np.array_equal(a, b) for a, b in zip(pictures, load_drawer(run)(TEXTS, 0)))
    hot = load_drawer(run, temperature=5.0)
    assert not np.array_equal(hot(TEXTS, 0)[0], hot(TEXTS, 1)[0])
    with pytest.raises(UserError, match="--scale: a run of .* does not read it; it reads --temperature"):
        load_drawer(run, scale=2.0)


def draw_truth(texts: list[str], seed: int) -> list[np.ndarray]:
    """Draws what a text says; the seed moves the things about in their cells."""
    pictures, rng = [], np.random.default_rng(seed)
    for text in texts:
        words = [part.split() for part in text.replace(" and ", ", ").split(", ")]
        things = [data.Thing(w[2], w[3], w[1], data.PLACES.index(f"{w[-2]} {w[-1]}")) for w in words]
        pictures.append(data.draw_scene(things, rng))
    return pictures


def test_all_is_found_in_true_pictures_and_next_to_nothing_in_the_next_one_s():
    found = count_drawings(draw_truth, "test", 30, 0)
    assert found["pictures"] == found["things"] == found["exact"] == 1
    assert found["chance"] < 0.3 and found["chance, things"] < 0.1
    report = count_report([System("truth", draw_truth, 1.5)], ["RUN", "--count", "8"], 8, 0)
    assert report.startswith("python eval.py draw RUN --count 8\n")
    rows = [line.split() for line in report.splitlines()[-2:]]
    assert [row[:2] for row in rows] == [["truth,", split] for split in SPLITS]
    assert all(row[2:5] == ["100.0"] * 3 and row[-1] == "1.5" for row in rows)


def test_clip_chooses_among_the_samples_of_each_text():
    class Clip:
        embed_texts = staticmethod(lambda texts: torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        embed_images = staticmethod(lambda arrays: torch.tensor(
            [[float(a.mean()), -float(a.mean())] for a in arrays]))             # a bright, a dark one

    def shades(texts, seed):
        return [np.full((48, 48, 3), 10 * n, np.uint8) for n in range(len(texts))]

    assert [p[0, 0, 0] for p in best_by_clip(shades, Clip, 3)(TEXTS, 0)] == [40, 10]


def test_systems_stand_row_by_row_and_are_counted(runs, tmp_path, capsys, monkeypatch):
    first, second = (str(run) for run, _ in runs.values())
    grid = tmp_path / "grid.png"
    evaluation.main(["draw", first, *TEXTS, "--also", second, "--temperature", "0", "--out", str(grid)])
    drawn = np.asarray(Image.open(grid))[1::3, 1::3]
    assert drawn.shape == (98, 98, 3)
    assert np.array_equal(drawn[50:, :48], load_drawer(runs["chameleon-2"][0], temperature=0.0)(TEXTS, 0)[0])
    monkeypatch.setattr(draw, "load_drawer", lambda *_, **__: draw_truth)
    evaluation.main(["draw", first, "--count", "4", "--report", str(tmp_path / "drawings.txt")])
    text = (tmp_path / "drawings.txt").read_text()
    assert text in capsys.readouterr().out and "dalle-2, val" in text
    with pytest.raises(UserError, match="give TEXTs to draw, or --count"):
        evaluation.main(["draw", first])
    assert to_arrays(torch.ones(1, 3, 2, 2))[0].max() == 255


@pytest.mark.parametrize("recipe, flags, words", [
    ("chameleon-2", ["a", "--best-of", "8"], "--best-of: .* at temperature 0; give --temperature"),
    ("chameleon-2", ["a", "--each", "8"], "--each: .* at temperature 0; give --temperature"),
    ("chameleon-2", ["a", "--seed", "3"], "--seed: .* at temperature 0; give --temperature"),
    ("dalle-2", ["--count", "4", "--temperature", "0", "--best-of", "2", "--seed", "3"],
     "--best-of, --seed: .*; give --temperature"),
    ("dalle-2", ["a", "--also", "chameleon-2", "--best-of", "2"], "--best-of: .*chameleon-2 draws"),
    ("dalle-2", ["a", "--also", "chameleon-2", "--each", "8"], "--also does not read --each"),
    ("dalle-2", ["--count", "5", "--each", "8", "--out", "y.png"], "--count does not read --each, --out"),
    ("dalle-2", ["a", "--report", "t.txt"], "a picture of TEXTs does not read --report")], ids=str)
def test_a_flag_that_changes_nothing_is_refused(recipe, flags, words, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as e:
        evaluation.main(["draw", str(runs[recipe][0]), *(str(runs[f][0]) if f in runs else f for f in flags)])
    assert "\n" not in str(e.value)


def test_at_temperature_0_a_text_has_one_picture_and_else_four(runs, tmp_path, capsys):
    for recipe, flags, columns in (("chameleon-2", [], 1), ("chameleon-2", ["--each", "1"], 1),
                                   ("chameleon-2", ["--temperature", "1", "--seed", "3"], 4),
                                   ("dalle-2", ["--each", "2"], 2)):
        evaluation.main(["draw", str(runs[recipe][0]), TEXTS[0], "--out", str(tmp_path / "g.png"), *flags])
        assert f"1 rows of {columns} pictures" in capsys.readouterr().out
