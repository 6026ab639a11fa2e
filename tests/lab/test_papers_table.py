"""What papers/README.md says of the miniatures is what support/results/papers.txt holds."""
from __future__ import annotations

import pytest

from support.lab.papers_table import PAGE, REPORT, count_verdicts, measured, papers_page, papers_rows

SUMMARY = """python eval.py claims papers: seeds 0 to 2

                seeds  trained    held-out       blind  minutes  verdicts
    clipcap         3   16,512  4.29 CIDEr  0.31 CIDEr      3.4  shown, not shown, opposite
    prompt-tuning   1        0        85 %           -      0.0  one seed

clipcap: It is.
"""
ROW = SUMMARY.splitlines()[3] + "\n"
BEFORE = ("| file | paper | from |\n|---|---|---|\n| [clipcap.py](clipcap.py) | ClipCap | Frozen |\n"
          "| [prompt_tuning.py](prompt_tuning.py) | Prompt tuning | |\n"
          "| [new.py](new.py) | A new one | |\n\n")


def test_a_row_for_each_measured_paper():
    rows = papers_rows(BEFORE, SUMMARY)
    assert rows[2:] == ["| [clipcap.py](clipcap.py) | 3 | 16,512 | 4.29 CIDEr | 0.31 CIDEr | 3.4 | 1 of 3, "
                        "1 opposite |",
                        "| [prompt_tuning.py](prompt_tuning.py) | 1 | 0 | 85 % | - | 0.0 | one seed |"]
    page = f"{BEFORE}{PAGE.read_text(encoding='utf-8').split('|')[0]}"
    both = SUMMARY.replace(ROW, ROW + ROW.replace("clipcap", "new    "))
    assert papers_rows(BEFORE, both)[2:] == [*rows[2:], rows[2].replace("clipcap", "new")]
    again = papers_page(papers_page(page, SUMMARY), SUMMARY)
    assert again == papers_page(page, SUMMARY) and all(row in again for row in rows)


def test_a_papers_row_counts_the_verdicts_of_all_of_its_claims():
    second = ROW.replace("    clipcap      ", "    clipcap-tuned").replace("4.29", "2.11")
    [row] = [row for row in papers_rows(BEFORE, SUMMARY.replace(ROW, ROW + second)) if "clipcap.py" in row]
    assert "4.29 CIDEr" in row and row.endswith("| 2 of 6, 2 opposite |")


@pytest.mark.parametrize("verdicts, count", [("shown", "1 of 1"), ("not shown, shown", "1 of 2"),
                                             ("opposite, opposite", "0 of 2, 2 opposite")])
def test_verdicts_are_counted(verdicts, count):
    assert count_verdicts(verdicts) == count


def test_the_table_of_the_page_is_the_reports():
    page, report = (file.read_text(encoding="utf-8") for file in (PAGE, REPORT))
    assert page == papers_page(page, report), "write the table again: python -m support.lab.papers_table"
    named = [name for name in measured(report) if (PAGE.parent / f"{name.replace('-', '_')}.py").exists()]
    assert len(papers_rows(page, report)) - 2 == len(named) > 3     # a second claim has no row of its own
