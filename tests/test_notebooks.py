"""The course: notebooks and solutions run from a clean kernel with all assertions.

Without --slow one of them is executed; of all, every cell is parsed, every imported name exists and is used.
"""
from __future__ import annotations

import ast
import asyncio
import importlib
import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from support.lab import claims_list

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "notebooks"
NOTEBOOKS = sorted(p for p in COURSE.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
SOLUTIONS = [p for p in NOTEBOOKS if p.parent.name == "solutions"]
LESSONS = [p for p in NOTEBOOKS if p.parent.name == "notebooks"]
QUICK = {COURSE / "solutions" / "0_map.ipynb"}      # 4 seconds; the others run with --slow
TAG = re.compile(r"\([A-Z][0-9]\)")


def name(file: Path) -> str:
    return str(file.relative_to(COURSE).with_suffix(""))


def cells(file: Path, kind: str | None = None) -> list[str]:
    """The source of all cells, or of the cells of a kind: code or markdown."""
    stored = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in stored if kind in (None, c["cell_type"])]


def code(file: Path) -> str:
    return "\n".join(cells(file, "code"))


def text(file: Path) -> str:
    return "\n".join(cells(file))


def execute(file: Path) -> list[str]:
    """Runs a notebook from a clean kernel, one thread: what each cell printed. An assertion may raise."""
    import nbformat
    from nbclient import NotebookClient
    asyncio.set_event_loop(asyncio.new_event_loop())            # of this thread of the pool
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(file.parent)}})
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}    # plots are drawn, too
    client.execute(env={**environment, "OMP_NUM_THREADS": "1"})
    return ["".join(o.get("text", "") for o in c.get("outputs", []))
            for c in notebook.cells if c.cell_type == "code"]


@pytest.fixture(scope="module")
def running(request):
    """The notebooks that this session executes, two at a time: {file: future of what it printed}."""
    pytest.importorskip("nbclient", reason="pip install -r notebooks/requirements.txt")
    pytest.importorskip("matplotlib", reason="pip install -r notebooks/requirements.txt")
    files = [item.callspec.params["file"] for item in request.session.items
             if item.name.startswith("test_it_runs_from") and not item.get_closest_marker("skip")]
    pool = ThreadPoolExecutor(2)
    yield {file: pool.submit(execute, file) for file in files}
    pool.shutdown(cancel_futures=True)


def test_the_course_is_complete():
    assert [p.name[0] for p in LESSONS] == list("0123456789")
    assert [p.name for p in SOLUTIONS] == [p.name for p in LESSONS]


def modules_and_names(file: Path) -> list[tuple[str, str]]:
    """(module, name) of everything of ours that the notebook imports or reads from an imported module."""
    found, modules = [], {}
    for cell in cells(file, "code"):
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.Import):
                modules |= {alias.asname or alias.name: alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found += [(node.module, alias.name) for alias in node.names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in modules:
                    found.append((modules[node.value.id], node.attr))
    ours = {p.stem for p in (*ROOT.glob("*.py"), *COURSE.glob("*.py"))} | {"papers", "support"}
    return [(module, name) for module, name in found if module.split(".")[0] in ours]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=name)
def test_what_it_imports_exists(file, monkeypatch):
    """Also that every cell parses, and that `data.X` is a name of data.py."""
    pytest.importorskip("matplotlib", reason="pip install -r notebooks/requirements.txt")
    monkeypatch.syspath_prepend(str(COURSE))
    for module, name in modules_and_names(file):
        owner: ModuleType = importlib.import_module(module)
        assert hasattr(owner, name), f"{module} has no {name}"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=name)
def test_it_uses_what_it_imports(file):
    nodes = [node for cell in cells(file, "code") for node in ast.walk(ast.parse(cell))]
    imported = {alias.asname or alias.name for node in nodes
                if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    assert not imported - {node.id for node in nodes if isinstance(node, ast.Name)}


def executed(file: Path):
    return pytest.param(file, marks=() if file in QUICK else pytest.mark.slow, id=name(file))


@pytest.mark.parametrize("file", [executed(file) for file in NOTEBOOKS])
def test_it_runs_from_a_clean_kernel(file, running):
    printed = "\n".join(running[file].result())
    if file in SOLUTIONS:
        assert "not answered yet" not in printed and ": right" in printed


@pytest.mark.parametrize("file", LESSONS, ids=name)
def test_a_lesson_asserts_equalities_and_has_three_to_five_exercises_with_solutions(file):
    def exercises(file: Path) -> list[str]:
        return sorted(set(re.findall(r'check\("([0-9.]+)', code(file))))

    asked = exercises(file)
    assert "assert_close(" in code(file)
    assert 3 <= len(asked) <= 5 and all(e.startswith(f"{file.name[0]}.") for e in asked)
    assert exercises(file.parent / "solutions" / file.name) == asked
    assert "What to remember" in text(file)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=name)
def test_it_is_stored_stripped_small_and_without_this_machine(file, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install -r notebooks/requirements.txt")
    monkeypatch.syspath_prepend(str(COURSE))
    from course import strip
    raw = file.read_text(encoding="utf-8")
    stripped = json.dumps(strip(json.loads(raw)), indent=1, ensure_ascii=False) + "\n"
    assert raw == stripped, "run python notebooks/course.py"
    assert len(raw.encode()) < 200_000
    assert not re.search(r"(?<![\w.])/(?:home|work|tmp|root|Users|usr|mnt)/|!\s*pip", raw)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=name)
def test_its_equations_carry_the_tags_of_the_code(file):
    files = (ROOT / "model.py", ROOT / "bridges.py", *ROOT.glob("papers/*.py"))
    known = {tag for f in files for tag in TAG.findall(f.read_text(encoding="utf-8"))}
    assert set(TAG.findall(text(file))) <= known


@pytest.mark.parametrize("claim", claims_list.CLAIMS)
def test_a_lesson_can_read_every_claim_of_the_report(claim, monkeypatch):
    """A report that is written in another way fails here, and not in the middle of a lesson."""
    pytest.importorskip("matplotlib", reason="pip install -r notebooks/requirements.txt")
    monkeypatch.syspath_prepend(str(COURSE))
    from course import stored_claim
    section, arms = stored_claim(claim)
    assert claims_list.CLAIMS[claim].says in section and {*arms} == {*claims_list.CLAIMS[claim].arms}
    assert all(len(cell) == 2 for cells in arms.values() for cell in cells.values())    # (mean, spread)


# ---- the syllabus ------------------------------------------------------------------------------------------

def test_the_syllabus_has_a_row_and_a_figure_of_every_lesson():
    page = (COURSE / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[.*?\]\((\w+\.ipynb)\) \| (\d+\.\d) \| .+ \| .+ \|$", page, re.M)
    assert [file for file, _ in rows] == [p.name for p in LESSONS]
    assert all(0 < float(minutes) < 30 for _, minutes in rows)
    figures = re.findall(r'<img src="(figures/\w+\.png)" width="\d+"\s+alt="[^"]+">', page)
    assert figures == [f"figures/{p.stem}.png" for p in LESSONS]
    assert sorted(p.name for p in (COURSE / "figures").iterdir()) == [f"{p.stem}.png" for p in LESSONS]
    assert sum((COURSE / figure).stat().st_size for figure in figures) < 300_000


def test_each_figure_comes_from_one_cell_of_its_lesson(monkeypatch, capsys):
    pytest.importorskip("nbclient", reason="pip install -r notebooks/requirements.txt")
    monkeypatch.syspath_prepend(str(COURSE))
    figures = importlib.import_module("figures")
    assert [*figures.FIGURES] == [p.stem for p in LESSONS]
    for lesson in figures.FIGURES:
        stored = json.loads((COURSE / f"{lesson}.ipynb").read_text(encoding="utf-8"))["cells"]
        assert len(figures.figure_cells(lesson, stored)) == 1, lesson
    with pytest.raises(SystemExit) as e:
        figures.main(["10_none"])
    said = capsys.readouterr().err
    assert e.value.code == 2 and "no lesson 10_none" in said and said.count("\n") == 1


@pytest.mark.slow
def test_the_first_figure_is_drawn_again(monkeypatch):
    pytest.importorskip("nbclient", reason="pip install -r notebooks/requirements.txt")
    from PIL import Image
    monkeypatch.syspath_prepend(str(COURSE))
    drawn = Image.open(io.BytesIO(importlib.import_module("figures").draw("0_map")))
    assert drawn.size == Image.open(COURSE / "figures" / "0_map.png").size
