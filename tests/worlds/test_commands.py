"""Claim: data.py's help names every kind of data set in a line: what lies in its PATH, its splits."""
from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.formats.datasets import LAYOUTS
from support.formats.files import UserError
from support.worlds import KINDS, WORLDS
from support.worlds.commands import list_kinds, main

README = Path(__file__).parents[2] / "support/formats/README.md"


def test_every_kind_has_its_line_with_its_splits(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    lines = {line.split()[0]: line for line in list_kinds().splitlines() if line.startswith("  ")}
    assert all(line in said and len(line) <= 110 for line in lines.values())
    assert lines.keys() == WORLDS.keys() | KINDS.keys() and LAYOUTS.keys() == KINDS.keys()
    for kind, line in lines.items():
        splits = KINDS[kind][1] if kind in KINDS else " ".join(WORLDS[kind].splits)
        shown = re.search(r"\[(.*)\]$", line)[1].removesuffix(" …")
        assert splits.startswith(shown) and (shown == splits or kind in ("coco", "scienceqa")), line


def test_the_readme_has_a_row_for_every_kind():
    rows = set(re.findall(r"^\| `(\w+):`", README.read_text(encoding="utf-8"), re.M))
    assert rows == KINDS.keys()


def test_every_item_that_is_shown_has_files_of_its_own(tmp_path, monkeypatch, capsys):
    names = ["cat 1", "cat_1", "x" * 100 + "a", "x" * 100 + "b", "猫" * 80]
    for grey, name in enumerate(names):
        Image.fromarray(np.full((4, 4, 3), grey, np.uint8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"grey {grey}")
    monkeypatch.chdir(tmp_path)
    main([f"folder:{tmp_path}:all", str(len(names) + 2)])            # a pass over them, no picture twice
    said = capsys.readouterr().out.splitlines()
    greys = [np.asarray(Image.open(file.strip()))[0, 0, 0] for file in said[::2]]
    assert [f"    grey {grey}" for grey in greys] == said[1::2] and {*greys} == {*range(len(names))}


@pytest.mark.parametrize("command", [[], ["generate"]])
def test_a_generated_world_follows_no_links(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data shapes:test does not read --follow-links; leave it out"):
        main([*command, "shapes:test", "--follow-links"])
