"""Claim: data.py's help names every kind of data set in a line: what lies in its PATH, its splits."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.formats.datasets import LAYOUTS
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
