"""The family tree of papers/README.md is drawn from the table beside it."""
from __future__ import annotations

from support.lab.tree import CHAPTERS, PICTURE, TABLE, draw_tree, read_rows, tree


def test_the_picture_is_the_tables():
    assert PICTURE.read_text(encoding="utf-8") == tree(), "draw it again: python -m support.lab.tree"


def test_every_parent_is_an_earlier_paper_of_the_table():
    rows = {row.name: row for row in read_rows(CHAPTERS + TABLE.read_text(encoding="utf-8"))}
    for row in rows.values():
        for parent in row.parents:
            assert rows[parent].month <= row.month, (row.name, parent)


def test_boxes_do_not_overlap_and_a_row_without_a_lane_is_no_box():
    rows = read_rows("| a | A, 2101.00001 | | prefix |\n| b | B, 2101.00002 | A | prefix |\n"
                     "| c | C, 2301.00001 | A, B | before |\n| d | D, 2301.00001 | | makes data |\n")
    assert [(row.name, row.month, row.parents) for row in rows] == [
        ("A", 12 * 21 + 1, []), ("B", 12 * 21 + 1, ["A"]), ("C", 12 * 23 + 1, ["A", "B"])]
    svg = draw_tree(rows)
    assert svg.count('class="box"') == 3 and svg.count("<path") == 3
    tops = [part.split('y="')[1].split('"')[0] for part in svg.split('class="box"')[1:]]
    assert len(set(tops)) == 3
