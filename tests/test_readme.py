"""What the README prints is what runs: its commands exist, its files and line counts are true, and its numbers stand in a results file."""

import re
from pathlib import Path

from support.lab.claims_list import CLAIMS
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_screen_has_the_two_commands():
    first = "\n".join(README.splitlines()[:40])
    assert "pip install -r requirements.txt && python train.py" in first
    assert "pip install -r requirements.txt && python -m pytest" in first


def test_every_flag_in_a_command_of_the_readme_exists():
    help = {"train.py": (ROOT / "train.py").read_text(), "eval.py": (ROOT / "eval.py").read_text()}
    known = {
        "train.py": {"--" + f.replace("_", "-") for f in train.Settings.__dataclass_fields__}
        | {"--resume", "--list", "--curves"},
        "eval.py": set(re.findall(r'"(--[a-z-]+)"', help["eval.py"])),
    }
    commands = re.findall(r"python (train|eval)\.py([^\n`#]*)", README)
    assert len(commands) > 8
    for program, rest in commands:
        for flag in re.findall(r"--[a-z-]+", rest):
            assert flag in known[program + ".py"], (program, flag)


def test_the_table_of_the_readme_is_the_one_in_the_results_file():
    """support/results/bridges.txt is what `python eval.py out/…` printed; the README quotes it."""
    printed = (ROOT / "support" / "results" / "bridges.txt").read_text(encoding="utf-8")
    rows = [
        line for line in printed.splitlines() if ", held-out" in line or line.startswith(("chance", "oracle"))
    ]
    assert len(rows) >= 8 and all(row.strip() in README for row in rows)


def test_the_table_of_protocols_is_the_one_in_its_file():
    """support/results/protocols.txt is what `python eval.py out/… --table` printed; the README quotes all of it."""
    rows = [
        line.strip()
        for line in (ROOT / "support" / "results" / "protocols.txt").read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert sum(", blind" in row for row in rows) == 6 and all(row in README for row in rows)


def test_the_verdicts_of_the_readme_are_those_of_the_claims_file():
    """support/results/claims.txt is what `python eval.py --claim all` wrote; the README quotes its verdicts."""
    head, verdicts = (ROOT / "support" / "results" / "claims.txt").read_text(encoding="utf-8").split("\n\n")[:2]
    assert "seeds 0 to 2" in head and len(verdicts.splitlines()) == len(CLAIMS)
    assert all(line.strip() in README for line in verdicts.splitlines())
