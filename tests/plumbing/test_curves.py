"""Curves hold the numbers of the log, are drawn where matplotlib is installed, and are missed by nobody
elsewhere."""
from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from support.formats.files import UserError
from support.plumbing.curves import draw_curves
from support.plumbing.log import read_log

RUN = ["--steps", "4", "--batch", "8", "--dtype", "float32", "--log-every", "1", "--samples", "0",
       "--eval-items", "2"]


def test_without_matplotlib_a_run_works_prints_nothing_of_it_and_curves_asked_for_name_the_pip_command(
        tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        train.main(["--bridge", "mlp", "--out", str(tmp_path), *RUN])
    files = {"bridge.safetensors", "config.json", "first.png", "log.jsonl", "results.json", "samples.html",
             "state.safetensors"}
    assert errors.getvalue() == "" and {p.name for p in tmp_path.iterdir()} == files
    with pytest.raises(UserError, match="pip install matplotlib"):
        train.main(["--curves", str(tmp_path)])


@pytest.mark.parametrize("bridge, options, panels", [
    ("mlp", [], 0), ("flamingo", ["--option", "every=2"], 2),
    pytest.param("zero_init", [], 1, marks=pytest.mark.slow),
    pytest.param("zero_init", ["--option", "gate_per=layer"], 1, marks=pytest.mark.slow),
    pytest.param("idefics", ["--option", "vector_gates=true"], 2, marks=pytest.mark.slow),
])
def test_with_matplotlib_a_run_draws_its_curves(bridge, options, panels, tmp_path):
    """And the same file again from the log alone; the log's layers are those that have gates."""
    pytest.importorskip("matplotlib")
    train.main(["--bridge", bridge, *options, "--out", str(tmp_path), *RUN])
    names = ["loss.png", "gates.png"][:1 + bool(panels)]
    first = {name: np.asarray(Image.open(tmp_path / name)) for name in names}
    assert {p.name for p in tmp_path.glob("*s.png")} == set(names)
    for name in names:
        (tmp_path / name).unlink()
    with pytest.raises(SystemExit):
        train.main(["--curves", str(tmp_path)])
    for name, picture in first.items():
        assert picture.std() > 10                       # not an empty sheet
        np.testing.assert_array_equal(picture, np.asarray(Image.open(tmp_path / name)))
    if panels:
        last = read_log(tmp_path / "log.jsonl")[-1]
        assert last["layers"] == ([0, 2] if "every=2" in options else [0, 1, 2, 3])
        assert len(last["gates"]) == len(last["layers"]) and last["per_head"] == (panels == 1)


def write_run(folder: Path, per_head: bool, gates: list) -> None:
    """A run of two logged steps: the settings and the log that curves are drawn from."""
    lines = [{"step": 0, "blind": 2.5},
             *({"step": t, "loss": 3.0 / t, "ema": 2.9 / t, "lr": 0.1 * t, "gates": g, "layers": [1, 2, 3],
                "per_head": per_head} for t, g in zip((1, 2), gates)),
             {"step": 2, "color": 0.5}]
    (folder / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 3, "lo')
    settings = {"recipe": "mlp", "bridge": "mlp", "data": "shapes", "batch": 8}
    (folder / "config.json").write_text(json.dumps({"settings": settings}))


def test_the_figures_hold_the_numbers_of_the_log(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn, save = [], figure.Figure.savefig

    def savefig(self, *args, **keywords):
        drawn.append(self)
        save(self, *args, **keywords)

    monkeypatch.setattr(figure.Figure, "savefig", savefig)
    gates = [[[-0.1 * t * (n + 1), 0.2 * t] for n in range(3)] for t in (1, 2)]
    for per_head in (True, False):
        write_run(tmp_path, per_head, gates)
        draw_curves(tmp_path)
    for loss in (drawn[0], drawn[2]):
        raw, mean, blind = loss.axes[0].lines
        assert list(raw.get_ydata()) == [3.0, 1.5] and list(mean.get_ydata()) == [2.9, 1.45]
        assert set(blind.get_ydata()) == {2.5} and blind.get_linestyle() == "--" and raw.get_alpha() < 0.5
        assert list(loss.axes[1].lines[0].get_ydata()) == [0.1, 0.2]
        assert all(axis.get_ylabel() for axis in loss.axes)
        assert "nats" in loss.axes[0].get_ylabel() and "step" in loss.axes[1].get_xlabel()
    heads, blocks = drawn[1], drawn[3]
    means = [[0.15, 0.3], [0.2, 0.4], [0.25, 0.5]]      # of two heads' |gate|, a line per layer
    np.testing.assert_allclose([x.get_ydata() for x in heads.axes[0].lines], means)
    np.testing.assert_allclose(heads.axes[1].images[0].get_array(), np.abs(gates[1]))
    np.testing.assert_allclose([x.get_ydata() for x in blocks.axes[0].lines],
                               [[0.1, 0.2], [0.2, 0.4], [0.3, 0.6]])
    np.testing.assert_allclose([x.get_ydata() for x in blocks.axes[1].lines], [[.2, .4]] * 3)
    for f in (heads, blocks):
        assert [t.get_text() for t in f.legends[0].get_texts()] == ["layer 1", "layer 2", "layer 3"]


def test_curves_that_are_drawn_on_demand_name_their_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_run(tmp_path, True, [[[0.1]] * 3] * 2)
    with pytest.raises(SystemExit) as e:
        train.main(["--curves", str(tmp_path)])
    assert e.value.code == 0 and capsys.readouterr().out == f"{tmp_path}/loss.png\n{tmp_path}/gates.png\n"


def test_a_loss_that_is_no_mean_over_tokens_does_not_claim_to_be_one(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    labels = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, file,
                        **k: labels.append(self.axes[0].get_ylabel()))
    write_run(tmp_path, True, [[[0.1]] * 3] * 2)
    for per_token in (True, False):
        draw_curves(tmp_path, per_token)
    assert labels[0] == "loss (nats per learned token)" and labels[2] == "loss (nats)"


def test_a_new_run_in_an_old_folder_leaves_nothing_of_the_old_one_to_be_mistaken_for_its_own(tmp_path):
    (tmp_path / "config.json").write_text('{"settings": {}}')
    for name in ("gates.png", "loss.png", "samples.html"):
        (tmp_path / name).write_text("old")
    train.main(["--bridge", "linear", "--out", str(tmp_path), *RUN])
    assert not (tmp_path / "gates.png").exists() and "old" != (tmp_path / "samples.html").read_text()[:3]
    assert read_log(tmp_path / "log.jsonl")[0].keys() == {"step", "blind"}
    if (tmp_path / "loss.png").exists():
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_a_folder_without_a_run_or_a_log_are_refused_in_one_sentence(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "config.json").write_text('{"settings": {"recipe": "mlp", "batch": 8}}')
    with pytest.raises(UserError, match="log.jsonl: no step is logged"):
        train.main(["--curves", str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json: the key 'settings' is missing"):
        train.main(["--curves", str(tmp_path)])
    for flag in ("--curves", "--resume"):
        with pytest.raises(UserError, match="typo/config.json: no such file; give a run folder of train.py"):
            train.main([flag, str(tmp_path / "typo")])
