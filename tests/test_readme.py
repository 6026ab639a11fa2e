"""What the READMEs say is so: commands exist, the map is the tree, numbers stand in results files."""
from __future__ import annotations

import contextlib
import importlib
import io
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "papers/README.md", *sorted((ROOT / "support").rglob("*.md"))]
RESULTS = ROOT / "support/results"
FIRST_FILES = ["model.py", "bridges.py", "data.py", "train.py", "eval.py"]
NUMBER = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w,]*\d)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def help_text(*command: str) -> str:
    """What `python PROGRAM [SUBCOMMAND] --help` prints."""
    program = importlib.import_module(command[0].removesuffix(".py"))
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as end:
        program.main([*command[1:], "--help"])
    assert not end.value.code
    return printed.getvalue()


def commands(page: Path) -> list[tuple[str, str]]:
    """(program, arguments) of every command of train.py and eval.py in a page."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"python (train|eval)\.py([^\n`#&]*)", text)
    found += [("train", rest) for rest in re.findall(r"torchrun [^\n`]*? train\.py([^\n`#&]*)", text)]
    return [(program + ".py", rest.strip()) for program, rest in found]


def subcommands() -> list[str]:
    import eval as evaluation
    return list(evaluation.SUBCOMMANDS)


def test_the_first_screen_has_the_two_commands():
    first = README.splitlines()[:15]
    for command in ("pip install -r requirements.txt && python train.py",
                    "pip install -r requirements.txt && python -m pytest"):
        assert any(line.split("#")[0].strip() == command for line in first)


def test_the_readme_fits_its_page():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert [n for n, line in enumerate(lines, 1) if len(line) > 110] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_flag_of_a_command_exists(page):
    for program, rest in commands(page):
        words = rest.split()
        sub = words[:1] if program == "eval.py" and words and words[0] in subcommands() else []
        known = set(FLAG.findall(help_text(program, *sub)))
        for flag in FLAG.findall(rest):
            assert flag in known, f"{page.name}: python {program} {rest}: {flag} is not in the help text"


def test_the_readme_names_subcommands_that_exist():
    named = {rest.split()[0] for program, rest in commands(ROOT / "README.md")
             if program == "eval.py" and not rest.startswith(("out/", "RUN"))}
    assert {"ask", "look", "claims"} <= named <= set(subcommands())


def test_the_readme_has_enough_commands():
    assert len(commands(ROOT / "README.md")) > 8


def rows_of_the_map(heading: str) -> list[str]:
    """The first column of the table under the row of headings that begins with `heading`."""
    block = README.split(f"| {heading} |")[1].split("\n\n")[0].splitlines()[2:]
    return [re.match(r"\| `([^`]+)`", row)[1] for row in block]


def test_the_map_is_the_tree():
    """Five files in the order of reading, then every folder that is tracked, those of support/ one by one."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout
    tracked = listed.strip("\0").split("\0")
    folders = {name.split("/")[0] + "/" for name in tracked if "/" in name} - {".ci/", "support/"}
    folders |= {"/".join(name.split("/")[:2]) + "/" for name in tracked if name.count("/") > 1
                and name.startswith("support/")}
    assert rows_of_the_map("file") == FIRST_FILES
    assert {name for name in tracked if name.endswith(".py") and "/" not in name} == set(FIRST_FILES)
    assert sorted(rows_of_the_map("folder")) == sorted(folders)


def tables(page: Path) -> list[tuple[list[str], list[Path]]]:
    """(rows, results files linked in the section above the table) of every table of a page.

    A table is a block of lines that begin with |, or an indented block with a line of column names.
    """
    found, links, block = [], [], []
    for line in [*page.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|") or line.startswith("    "):
            block.append(line)
            continue
        if block:
            found.append((block, list(links)))
            block = []
        if line.startswith("#"):
            links = []
        links += [(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+)\)", line)
                  if "results/" in link]
    return found


@cache
def numbers(file: Path) -> frozenset[str]:
    return frozenset(NUMBER.findall(file.read_text(encoding="utf-8")))


def test_every_number_in_a_table_of_the_readme_stands_in_the_results_file_that_is_linked_above_it():
    checked = 0
    for block, links in tables(ROOT / "README.md"):
        if not any(re.search(r"\d\.\d", line) for line in block):
            continue
        assert links, f"no results file is linked above {block[0]}"
        known = frozenset().union(*map(numbers, links))
        for line in block:
            if re.search(r"python|\.py", line):
                continue
            for number in NUMBER.findall(re.sub(r"`[^`]*`", "", line)):
                assert number in known, f"{number} of {line!r} is in none of {[f.name for f in links]}"
                checked += 1
    assert checked > 60


def cells_of_a_bridge(bridge: str) -> list[str]:
    """Trained parameters; right, blind and CIDEr of seeds 0, 1, 2, as bridges.txt has them."""
    lines = (RESULTS / "bridges.txt").read_text(encoding="utf-8").splitlines()

    def of_seeds(kind: str, column: int) -> str:
        """One number of all three seeds."""
        rows = [next(x for x in lines if x.startswith(f"{bridge}-s{seed}, {kind}")) for seed in range(3)]
        return ", ".join(row.split()[column] for row in rows)

    trained = of_seeds("held-out", 2).split(", ")[0]
    return [trained, of_seeds("held-out", -3), of_seeds("blind", -3), of_seeds("held-out", -2)]


@pytest.mark.parametrize("bridge", ["linear", "mlp", "mapl", "qformer", "zero_init", "flamingo"])
def test_the_row_of_a_bridge_is_the_one_in_the_results_file(bridge):
    row = next(line for line in README.splitlines() if line.startswith(f"| `{bridge}` ("))
    assert [cell.strip() for cell in row.strip("|").split("|")][5:] == cells_of_a_bridge(bridge)


def test_the_table_of_seams_is_what_the_bridges_override():
    from bridges import BRIDGES
    from model import Bridge
    seams = ("see", "prefix", "beside", "before")
    for name in ("linear", "mlp", "mapl", "qformer", "zero_init", "flamingo"):
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` ("))
        marked = [cell.strip() == "●" for cell in row.strip("|").split("|")[1:5]]
        assert marked == [getattr(BRIDGES[name], s) is not getattr(Bridge, s) for s in seams], name


def test_what_the_first_command_prints_is_what_was_kept():
    """Each indented line of the first screen stands in first_run.txt. Its scores with one thread, chance and
    oracle are those of the table."""
    kept = (RESULTS / "first_run.txt").read_text(encoding="utf-8").splitlines()
    screen = README.split("The first command prints")[1].split("Six bridges")[0].splitlines()
    printed = [line[4:] for line in screen if line.startswith("    ")]
    assert len(printed) >= 10 and all(line in kept for line in printed)
    bridges = (RESULTS / "bridges.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.replace("mlp-s0,", "mlp,").split() for line in bridges]
    one_thread = [line for line in kept[:10] if line.startswith("mlp,")]
    bounds = [line for line in kept if line.startswith(("chance (", "oracle ("))]
    assert (len(one_thread), len(bounds)) == (3, 2)
    assert all(line.split() in rows for line in one_thread + bounds)
    assert all(any(line.startswith(word) for line in printed) for word in ("forecast", "saved", "next"))


def test_the_lines_of_the_decoder_are_the_lines_of_the_decoder():
    def statements(text: str) -> list[str]:
        return [line.split("  #")[0].strip() for line in text.splitlines()]

    source = statements((ROOT / "model.py").read_text(encoding="utf-8"))
    quoted = statements(README.split("```python")[1].split("```")[0])
    assert all(line in source for line in quoted if line)
    assert all(f"{seam}(" in "\n".join(quoted) for seam in ("see", "prefix", "beside", "before"))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.md")), ids=lambda f: f.name)
def test_a_page_of_results_begins_with_its_command(file):
    if file.name != "README.md":
        head = "\n".join(file.read_text(encoding="utf-8").splitlines()[:8])
        assert re.search(r"Commands?[: ]", head) and "python " in head
