"""The course: every notebook and every solution runs from a clean kernel with all its assertions, and is stored to be read and diffed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
SOLUTIONS = [p for p in NOTEBOOKS if p.parent.name == "solutions"]
LESSONS = [p for p in NOTEBOOKS if p.parent.name == "notebooks"]
TAG = re.compile(r"\([A-Z][0-9]\)")
name = lambda p: str(p.relative_to(ROOT / "notebooks").with_suffix(""))


def code(file: Path) -> str:
    """All code of a notebook."""
    return "\n".join(
        "".join(c["source"])
        for c in json.loads(file.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "code"
    )


def text(file: Path) -> str:
    return "\n".join("".join(c["source"]) for c in json.loads(file.read_text(encoding="utf-8"))["cells"])


def execute(file: Path) -> list[str]:
    """Runs a notebook from a clean kernel with one thread; everything it printed, cell by cell. An assertion that fails raises."""
    import nbformat
    from nbclient import NotebookClient
    asyncio.set_event_loop(asyncio.new_event_loop())                            # of this thread of the pool
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(file.parent)}}
    )
    client.execute(
        env={**{k: v for k, v in os.environ.items() if k != "MPLBACKEND"}, "OMP_NUM_THREADS": "1"}
    )  # plots are drawn, too
    return [
        "".join(o.get("text", "") for o in c.get("outputs", []))
        for c in notebook.cells
        if c.cell_type == "code"
    ]


@pytest.fixture(scope="module")
def running():
    """Every notebook, two at a time: {file: future of what it printed}."""
    pytest.importorskip("nbclient", reason="pip install -r notebooks/requirements.txt")
    pytest.importorskip("matplotlib", reason="pip install -r notebooks/requirements.txt")
    pool = ThreadPoolExecutor(2)
    yield {file: pool.submit(execute, file) for file in NOTEBOOKS}
    pool.shutdown(cancel_futures=True)


def test_the_course_is_complete():
    assert [p.name[0] for p in LESSONS] == list("0123456789")
    assert [p.name for p in SOLUTIONS] == [p.name for p in LESSONS]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=name)
def test_it_runs_from_a_clean_kernel(file, running):
    printed = "\n".join(running[file].result())
    if file in SOLUTIONS:
        assert "not answered yet" not in printed and ": right" in printed


@pytest.mark.parametrize("file", LESSONS, ids=name)
def test_a_lesson_asserts_equalities_and_has_three_to_five_exercises_with_solutions(file):
    exercises = lambda f: re.findall(r'check\("([0-9.]+)', code(f))
    asked = sorted(set(exercises(file)))
    assert "assert_close(" in code(file)
    assert 3 <= len(asked) <= 5 and all(e.startswith(f"{file.name[0]}.") for e in asked)
    assert sorted(set(exercises(file.parent / "solutions" / file.name))) == asked
    assert "What to remember" in text(file)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=name)
def test_it_is_stored_stripped_small_and_without_this_machine(file):
    sys.path.insert(0, str(ROOT / "notebooks"))
    pytest.importorskip("matplotlib", reason="pip install -r notebooks/requirements.txt")
    from course import strip
    raw = file.read_text(encoding="utf-8")
    assert raw == json.dumps(strip(json.loads(raw)), indent=1, ensure_ascii=False) + "\n", (
        "run python notebooks/course.py"
    )
    assert len(raw.encode()) < 200_000
    assert not re.search(r"(?<![\w.])/(?:home|work|tmp|root|Users|usr|mnt)/|!\s*pip", raw)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=name)
def test_its_equations_carry_the_tags_of_the_code(file):
    known = {
        tag for f in ("model.py", "bridges.py") for tag in TAG.findall((ROOT / f).read_text(encoding="utf-8"))
    }
    assert set(TAG.findall(text(file))) <= known
