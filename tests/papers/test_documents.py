"""papers/documents.md: what the five documents say has a file, a name in it and a test, and all exist."""
from __future__ import annotations

import importlib
import re

import pytest

from conftest import ROOT

PAGE = ROOT / "papers" / "documents.md"
ROWS = [[cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
ROWS = [row for row in ROWS if row[0] not in ("documents", "objective")]        # without the heads
TESTS = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize("what,code,test", [row[-3:] for row in ROWS], ids=[row[-3][:40] for row in ROWS])
def test_what_a_document_says_stands_in_code_and_is_tested(what, code, test):
    [(text, path)] = re.findall(r"\[([\w.]+)\]\(([\w./]+\.py)\)", code)
    file = (PAGE.parent / path).resolve()
    name = code.split("`")[1] if "`" in code else None
    assert file.is_file() and file.name == text, code
    module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    assert name is None or hasattr(module, name), f"{text} has no {name}"
    assert f"test_{test}" in TESTS, test
