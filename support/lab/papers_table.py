"""lab/papers_table.py: what the papers' miniatures found, as a table of papers/README.md.

    python eval.py claims papers --seeds 5 --kept --out support/results/papers.txt
    python -m support.lab.papers_table                  writes the table again

A row per measured paper of the report, in the order of the first table there. Claims `NAME` and `NAME-…` are
of one paper: the cells are the first one's, the verdicts those of all.
"""
from __future__ import annotations

import re
from pathlib import Path

from support.formats.files import atomically
from support.lab.claims import PAPER_COLUMNS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "papers/README.md"
REPORT = ROOT / "support/results/papers.txt"
BEGIN, END = "<!-- python -m support.lab.papers_table: from here -->", "<!-- to here -->"


def measured(report: str) -> dict[str, list[str]]:
    """{claim: its cells under PAPER_COLUMNS} of the summary of a report."""
    head = re.escape("  ".join(PAPER_COLUMNS).strip()).replace(r"\ \ ", " +")
    table = re.split(rf"^ +{head}\n", report, maxsplit=1, flags=re.MULTILINE)[1]
    rows = [re.split(r" {2,}", line.strip()) for line in table.split("\n\n")[0].splitlines()]
    return {row[0]: row for row in rows}


def count_verdicts(verdicts: str) -> str:
    """"shown, shown, opposite" → "2 of 3, 1 opposite"."""
    each = verdicts.split(", ")
    if "one seed" in each:
        return "one seed"
    opposite = f", {each.count('opposite')} opposite" if "opposite" in each else ""
    return f"{each.count('shown')} of {len(each)}{opposite}"


def papers_rows(page: str, report: str) -> list[str]:
    """Lines of the table: a heading, then a row for each measured file of the page's first table."""
    found = measured(report)
    lines = ["| file | seeds | trained | held-out | blind | minutes | shown |", f"|{7 * '---|'}"]
    for file in re.findall(r"^\| \[(\w+)\.py\]\(\w+\.py\) \| [^|]+\| ", page.split(BEGIN)[0], re.MULTILINE):
        paper = file.replace("_", "-")
        if paper in found:
            cells = " | ".join(found[paper][1:-1])
            verdicts = [row[-1] for name, row in found.items() if f"{name}-".startswith(f"{paper}-")]
            lines.append(f"| [{file}.py]({file}.py) | {cells} | {count_verdicts(', '.join(verdicts))} |")
    return lines


def papers_page(page: str, report: str) -> str:
    """The page with its table made again."""
    before, _, after = page.partition(BEGIN)
    table = "\n".join(papers_rows(page, report))
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after.partition(END)[2]}"


if __name__ == "__main__":
    text = papers_page(PAGE.read_text(encoding="utf-8"), REPORT.read_text(encoding="utf-8"))
    with atomically(PAGE) as tmp:
        tmp.write_text(text, encoding="utf-8")
