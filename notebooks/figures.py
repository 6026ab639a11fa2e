"""figures.py: one figure of each lesson for README.md, taken from the lesson as it runs.

    python notebooks/figures.py                 all ten, a few minutes on one core
    python notebooks/figures.py 1_decoder       one of them

A lesson runs from a clean kernel up to the cell that draws its figure; the cell is found by a piece of its
text. The picture has 64 colours, so that all ten stay below 300 kB.
"""
from __future__ import annotations

import asyncio
import base64
import io
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

COURSE = Path(__file__).resolve().parent
FIGURES = {                     # lesson → text that stands in the cell of its figure, and in no other
    "0_map": "import FancyArrowPatch",
    "1_decoder": 'kept["layers.1.attention"][0, 3]',
    "2_vit_and_clip": "tiles = torch.from_numpy(images[0])",
    "3_linear": "for axis, (name, strip) in zip(axes, strips.items())",
    "4_mapl": "width_ratios=[1.1, 1, 1, 1]",
    "5_qformer": 'titles = {"itm"',
    "6_zero_init": '"apart, tanh g = 0.5"',
    "7_flamingo": '"all before (see_all=True)"',
    "8_side_by_side": "for (name, seed), (count, mean) in results.items()",
    "9_published_weights": 'vlm, tokenizer = trained("mlp")',
}


def figure_cells(lesson: str, cells: list[dict]) -> list[int]:
    """The numbers of the cells that hold the text of the lesson's figure: one."""
    return [n for n, cell in enumerate(cells) if FIGURES[lesson] in "".join(cell["source"])]


def draw(lesson: str) -> bytes:
    """The last picture that the figure's cell shows, as PNG."""
    notebook = nbformat.read(COURSE / f"{lesson}.ipynb", as_version=4)
    last, = figure_cells(lesson, notebook.cells)
    notebook.cells = notebook.cells[:last + 1]
    asyncio.set_event_loop(asyncio.new_event_loop())
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    NotebookClient(notebook, timeout=1200, kernel_name="python3",
                   resources={"metadata": {"path": str(COURSE)}}).execute(env=environment)
    shown = [o.data["image/png"] for o in notebook.cells[last].outputs if "image/png" in o.get("data", {})]
    picture = Image.open(io.BytesIO(base64.b64decode(shown[-1]))).convert("RGB")
    buffer = io.BytesIO()
    picture.quantize(64, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        buffer, "png", optimize=True)
    return buffer.getvalue()


def main(lessons: list[str]) -> None:
    unknown = [lesson for lesson in lessons if lesson not in FIGURES]
    if unknown:
        print(f"there is no lesson {unknown[0]}; known: {', '.join(FIGURES)}.", file=sys.stderr)
        sys.exit(2)
    (COURSE / "figures").mkdir(exist_ok=True)
    for lesson in lessons or FIGURES:
        file = COURSE / "figures" / f"{lesson}.png"
        file.write_bytes(draw(lesson))
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
