"""lab/masks.py: the masks of papers/masks.py as one picture.

    python -m support.lab.masks                         writes papers/masks.svg

A row is a query, a column a key. A filled cell is a key that the query sees, in the colour of what it is.
"""
from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from papers.masks import image_mask, stream_mask
from support.formats.files import atomically

PICTURE = Path("papers/masks.svg")
CELL, COLUMNS, LEFT, TOP, ACROSS, DOWN = 17, 4, 34, 30, 250, 236                # pixels
COLORS = {"w": "#d9532c", "i": "#2f6fa8", "0": "#e1e5ea"}                       # word, image, not seen


@dataclass
class Panel:
    """A mask with its names; a letter for each row and column: w a word, i an image's."""
    title: str
    note: str
    mask: Tensor            # (T, S) bool
    rows: str
    columns: str


def numbers(letters: str) -> Tensor:
    """"wwiiwi" → 0, 0, 1, 1, 0, 2: the number of each position's image."""
    found, last, n = [], "", 0
    for letter in letters:
        n += letter == "i" != last
        found.append(n if letter == "i" else 0)
        last = letter
    return torch.tensor(found)


def panels() -> list[Panel]:
    mixed, first = "wwiiiiwww", "iiiiwwwww"

    def stream(title: str, note: str, kind: str, letters: str = mixed, **more) -> Panel:
        return Panel(title, note, stream_mask(kind, numbers(letters), **more), letters, letters)

    last, latents = torch.tensor([0, 1, 1, 1, 2, 2, 2]), torch.tensor([1, 1, 1, 2, 2, 2])
    return [
        stream("causal", "GPT, Chameleon, DALL-E", "causal"),
        stream("causal, packed", "two texts in a row", "causal",
               document=torch.tensor([1, 1, 1, 1, 1, 2, 2, 2, 2]), letters="iiiwwiiww"),
        stream("prefix", "SimVLM: T_p = 6", "prefix", first, prefix=6),
        stream("transfusion", "an image sees itself", "transfusion"),
        stream("show-o", "an image sees the row", "show-o"),
        stream("cm3", "the image is written last", "cm3", order=torch.tensor([0, 1, 7, 8, 9, 10, 3, 4, 5])),
        stream("prefix: ITG", "Q-Former, GIT: T_p = Q", "prefix", first, prefix=4),
        stream("all: ITM", "Q-Former, BERT, ViT", "all", first),
        stream("apart: ITC", "Q-Former", "apart", first),
        Panel("last image", "Flamingo: words, latents", image_mask(last, latents), "w" * 7, "i" * 6),
        Panel("all images so far", "Flamingo's ablation", image_mask(last, latents, True), "w" * 7, "i" * 6),
    ]


def squares(letter: str, places: list[tuple[float, float]], size: float = CELL - 2) -> str:
    """Squares of one colour, by their top left corners."""
    outline = "".join(f"M{x:g} {y:g}h{size:g}v{size:g}h-{size:g}z" for x, y in places)
    return f'<path fill="{COLORS[letter]}" d="{outline}"/>'


def draw_panel(panel: Panel, x: float, y: float) -> list[str]:
    """The names, what the rows and columns are (small squares), the cells."""
    shapes = [f'<text class="name" x="{x}" y="{y}">{escape(panel.title)}</text>',
              f'<text x="{x}" y="{y + 15}">{escape(panel.note)}</text>']
    x, y = x + 14, y + 40
    for letter in "wi":
        top = [(x + n * CELL + 4, y - 11) for n, kind in enumerate(panel.columns) if kind == letter]
        left = [(x - 11, y + n * CELL + 4) for n, kind in enumerate(panel.rows) if kind == letter]
        shapes.append(squares(letter, top + left, 7))
    cells: dict[str, list] = {letter: [] for letter in COLORS}
    for t, row in enumerate(panel.mask.tolist()):
        for s, seen in enumerate(row):
            cells[panel.columns[s] if seen else "0"].append((x + s * CELL, y + t * CELL))
    return shapes + [squares(letter, places) for letter, places in cells.items()]


def draw_masks() -> str:
    shapes, drawn = [], panels()
    for n, panel in enumerate(drawn):
        shapes += draw_panel(panel, LEFT + n % COLUMNS * ACROSS, TOP + n // COLUMNS * DOWN)
    x, y = LEFT + len(drawn) % COLUMNS * ACROSS, TOP + len(drawn) // COLUMNS * DOWN
    legend = {"w": "a word that is seen", "i": "an image's position that is seen", "0": "not seen"}
    for n, (letter, words) in enumerate(legend.items()):
        shapes += [squares(letter, [(x, y + 30 + 24 * n)]),
                   f'<text x="{x + 24}" y="{y + 42 + 24 * n}">{words}</text>']
    shapes.append(f'<text x="{x}" y="{y + 118}">row: the query; column: the key</text>')
    width, height = LEFT + COLUMNS * ACROSS - 10, TOP - 20 + -(-len(drawn) // COLUMNS) * DOWN
    lines = "\n  ".join(shapes)
    return f'''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
  <title>Who may attend to whom: the masks of decoders, Q-Formers and mixed streams</title>
  <style>
    text {{ font: 12px "DejaVu Sans", Verdana, Helvetica, Arial, sans-serif; fill: #57606a }}
    .name {{ font-weight: bold; font-size: 14px; fill: #24292f }}
  </style>
  <rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>
  {lines}
</svg>
'''


if __name__ == "__main__":
    with atomically(PICTURE) as tmp:
        tmp.write_text(draw_masks(), encoding="utf-8")
