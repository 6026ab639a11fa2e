"""papers/documents.md: what the five documents explain has a row, a file, a name in it and a test.

papers/README.md: each file of the folder is named, and where a bridge touches the decoder is said in full.
"""
from __future__ import annotations

import importlib
import re

import pytest

from conftest import ROOT
from model import Bridge

PAGE, README = ROOT / "papers" / "documents.md", ROOT / "papers" / "README.md"
SEAMS = {"prefix": "prefix", "beside": "beside", "before": "before", "between": "between", "around": "around",
         "rope": "rope_positions", "finish": "finish", "head": "head"}          # word → method
ROWS = [[cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
ROWS = [row for row in ROWS if row[0] != "id"]                                  # without the heads
TESTS = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
# What a document explains or gives the equations of: all that it writes out, the systems, all objectives.
EXPLAINED = {*(f"E{n}" for n in range(1, 35)), *(f"L{n}" for n in range(1, 26)),
             *(f"S{n}" for n in (*range(1, 12), 23, 24, 27, 28, 29, 31, 33, 34, 36, 37, 38, 40, 41, 42, 47,
                                 49, 53, 60))}


def test_nothing_that_a_document_explains_is_missing():
    listed = [name for row in ROWS for name in row[0].split(", ")]
    assert EXPLAINED <= {*listed}, sorted(EXPLAINED - {*listed})
    assert all(re.fullmatch(r"[ESLC]\d+", name) for name in listed), listed


@pytest.mark.parametrize("what,code,test", [row[-3:] for row in ROWS], ids=[row[-3][:40] for row in ROWS])
def test_what_a_document_says_stands_in_code_and_is_tested(what, code, test):
    [(text, path)] = re.findall(r"\[([\w.]+)\]\(([\w./]+\.(?:py|md))\)", code)
    file = (PAGE.parent / path).resolve()
    name = code.split("`")[1] if "`" in code else None
    assert file.is_file() and file.name == text, code
    if file.suffix == ".md":                            # without code, and it is said why
        assert f"- **{name}**" in file.read_text(encoding="utf-8").split("## What has no code, and why")[1]
    else:
        module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
        assert name is None or hasattr(module, name), f"{text} has no {name}"
    assert f"test_{test}" in TESTS, test


def test_every_file_of_the_folder_is_named_in_its_readme():
    text = README.read_text(encoding="utf-8")
    assert [file.name for file in sorted(PAGE.parent.glob("*.py")) if file.name not in text] == []


def test_the_table_names_the_seams_that_a_paper_s_bridges_fill():
    rows = [line.split("|") for line in README.read_text(encoding="utf-8").splitlines()
            if line[:3] == "| [" and line.count("|") == 6]
    told = {row[1].split("]")[0].strip(" ["): re.findall(r"\w+", row[4]) for row in rows}
    told = {file: {*words} & {*SEAMS} for file, words in told.items() if words and words[0] in SEAMS}
    assert len(told) >= 15
    for file, seams in told.items():
        module = importlib.import_module(f"papers.{file.removesuffix('.py')}")
        own = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Bridge)
               and kind.__module__ == module.__name__ and kind.__name__ != "OneSoftmax"]        # an ablation
        assert seams == {word for word, method in SEAMS.items()
                         for kind in own if getattr(kind, method) is not getattr(Bridge, method)}, file
