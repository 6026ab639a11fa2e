"""lab/tree.py: the family tree of the bridges, drawn from the table of papers/README.md.

    python -m support.lab.tree                          writes papers/tree.svg

A row of the table is a box: to the right by its date, in the lane of the place where it touches the model. A
line comes from each paper of its column "from".
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from support.formats.files import atomically

TABLE, PICTURE = Path("papers/README.md"), Path("papers/tree.svg")
CHAPTERS = """
| `ViT` | ViT, 2010.11929v2 | | a ViT | |
| `Flamingo` | Flamingo, 2204.14198v2 | Frozen | before | |
| `MAPL` | MAPL, 2210.07179v2 | Frozen | prefix | |
| `Linear` | LLaVA, 2304.08485v2 | Frozen | prefix | |
"""                                                     # chapters of model.py and bridges.py, as rows
LANES = {                                               # a row's lane: the first whose word its seam has
    "The encoder of the picture": ("ViT", "EncoderBlock"),
    "No training: words, or a choice of words": ("none",),
    "Inside the layers, and behind them": ("before", "beside", "between", "around", "finish"),
    "Soft tokens in the text": ("prefix", "no decoder"),
    "Pictures as words, and out of noise": ("codes", "draws", "noise"),
    "One model for words and pictures, without a decoder": ("stream",),
}
WIDTH, LEFT, RIGHT, BOX, ROW, HEAD = 1180, 30, 144, 136, 34, 34     # pixels
FIRST, LAST = 12 * 19 + 8, 12 * 24 + 8                              # months of 1908.…, 2408.…


@dataclass
class Row:
    """A paper of the table."""
    name: str               # as the table writes it
    month: int              # 12 · year + month of its arXiv number
    parents: list[str]
    lane: str


def read_rows(markdown: str) -> list[Row]:
    """The rows of a table | file | paper | from | seam | … | that have an arXiv number and a lane."""
    rows: dict[str, Row] = {}
    for line in markdown.splitlines():
        cells = [re.sub(r"\]\([^)]*\)|[\[\]`]", "", cell).strip() for cell in line.split("|")[1:-1]]
        date = re.search(r"(\d\d)(\d\d)\.\d{5}", cells[1]) if len(cells) >= 4 else None
        lane = next((lane for lane, words in LANES.items() if any(word in cells[3] for word in words)),
                    "") if date else ""
        if lane:
            name = cells[1].split(",")[0]
            parents = [parent.strip() for parent in cells[2].split(",") if parent.strip()]
            rows.setdefault(name, Row(name, 12 * int(date[1]) + int(date[2]), parents, lane))
    return list(rows.values())


def draw_tree(rows: list[Row]) -> str:
    """The SVG. A box stands in the first line of its lane without an overlap and without a parent of it."""
    rows = sorted(rows, key=lambda row: row.month)
    at, y, shapes = {}, HEAD, []
    for lane in reversed(LANES):
        ends: list[float] = []                          # where the last box of each line ends
        shapes.append(f'<text class="lane" x="{LEFT}" y="{y + 14}">{lane}</text>')
        for row in (row for row in rows if row.lane == lane):
            x = LEFT + (row.month - FIRST) / (LAST - FIRST) * (WIDTH - LEFT - RIGHT)
            taken = {at[parent][1] for parent in row.parents if parent in at}       # no line through boxes
            line = next((n for n, end in enumerate(ends) if end + 6 < x and y + 24 + ROW * n not in taken),
                        len(ends))
            ends[line:line + 1] = [x + BOX]
            at[row.name] = x, y + 24 + ROW * line
        y += 24 + ROW * max(len(ends), 1) + 14
    for row in rows:
        x, top = at[row.name]
        for parent in row.parents:
            px, py = at[parent]
            end = f"{x:.0f} {top + 13:.0f}"
            if px + BOX + 10 < x:                       # from the right side of the parent, or from its edge
                shapes.append(f'<path d="M{px + BOX:.0f} {py + 13:.0f} C{px + BOX + 40:.0f} {py + 13:.0f} '
                              f'{x - 40:.0f} {top + 13:.0f} {end}"/>')
            else:
                shapes.append(f'<path d="M{px + 9:.0f} {py + 13:.0f} Q{px + 9:.0f} {top + 13:.0f} {end}"/>')
    for row in rows:
        x, top = at[row.name]
        year = f"20{row.month // 12 if row.month % 12 else row.month // 12 - 1}"
        shapes.append(f'<rect class="box" x="{x:.0f}" y="{top:.0f}" width="{BOX}" height="26" rx="5"/>'
                      f'<text x="{x + 6:.0f}" y="{top + 17:.0f}">{escape(row.name)}</text>'
                      f'<text class="year" x="{x + BOX - 4:.0f}" y="{top + 17:.0f}">{year}</text>')
    drawn = "\n  ".join(shapes)
    return f'''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img">
  <title>Who takes what from whom: the papers by date and by the place where they touch the model</title>
  <style>
    text {{ font: 11px "DejaVu Sans", Verdana, Helvetica, Arial, sans-serif; fill: #24292f }}
    .lane {{ font-weight: bold; font-size: 13px; fill: #bc3d1f }}
    .year {{ text-anchor: end; fill: #6e7781; font-size: 9px }}
    .box {{ fill: #f6ede9; stroke: #d9532c }}
    path {{ fill: none; stroke: #8c96a0; stroke-width: 1.3 }}
  </style>
  <rect width="{WIDTH}" height="{y}" rx="10" fill="#ffffff"/>
  {drawn}
</svg>
'''


def tree() -> str:
    return draw_tree(read_rows(CHAPTERS + TABLE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    with atomically(PICTURE) as tmp:
        tmp.write_text(tree(), encoding="utf-8")
