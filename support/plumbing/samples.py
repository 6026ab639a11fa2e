"""plumbing/samples.py: a page of pictures and answers."""
from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from string import Template
from typing import NamedTuple

from PIL import Image

from support.formats.files import atomically

PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>$title</title>
<style>
body { margin: 1rem; font: 1rem/1.4 sans-serif; color: #1b1b1b; background: #fff; overflow-wrap: anywhere }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)) }
article { border: 1px solid #999; border-radius: .4rem; padding: .8rem; break-inside: avoid }
h2 { font-size: 1rem } img { max-width: 100% } img:not(.zoom1) { image-rendering: pixelated }
ul { list-style: none; padding: 0 }
.right b { color: #0b5d1e } .wrong b { color: #b3140c } .partly b { color: #7a4a00 }
pre { font-size: .75rem; overflow-x: auto } @media print { html { font-size: 8pt } }</style></head>
<body><h1>$title</h1><p>$summary</p><pre>$text</pre><main>$cards</main></body></html>
""")


class JudgedItem(NamedTuple):
    """A picture of an evaluation with what the model wrote about it."""
    item: object                                        # data.Item with one picture
    caption: str | None
    verdicts: list[tuple[str, str]]                     # ("right", "is it red? yes") for each question


def print_samples(judged: list[JudgedItem], split: str) -> None:
    for item, caption, verdicts in judged:
        print(f"\n{split} {item.id}")
        if caption is not None:
            print(f"  reference  {item.captions[0]}\n  caption    {caption}")
        for verdict, line in verdicts:
            print(f"  {verdict:10s} {line}")


def write_samples_page(file: Path, title: str, judged: list[JudgedItem], text: str,
                       split: str = "held-out") -> None:
    """One HTML page of pictures, captions and verdicts below `text`; it needs no other file and no script.

    split: what the pictures are to the run, held-out or trained-on.
    """
    words = [word for _, _, verdicts in judged for word, _ in verdicts]
    right = f"; {words.count('right')} of {len(words)} answers are right" if words else ""
    cards = "\n".join(line for sample in judged for line in card_lines(*sample))
    page = dict(title=html.escape(title), summary=f"{len(judged)} {split} pictures{right}.",
                text=html.escape(text), cards=cards)
    with atomically(file) as tmp:
        tmp.write_text(PAGE.substitute(page), encoding="utf-8")


def card_lines(item, caption: str | None, verdicts: list[tuple[str, str]]) -> list[str]:
    """One item of the page; a small picture is enlarged by a whole number, so that it stays sharp."""
    lines = [f"<article><h2>{html.escape(item.id)}</h2>"]
    if item.image is not None:
        picture, png = Image.fromarray(item.image), io.BytesIO()
        picture.thumbnail((384, 384))
        picture.save(png, "png")
        zoom = max(1, 192 // max(picture.size))
        lines += [f'<img class="zoom{zoom}" width="{zoom * picture.width}" alt=""',
                  f'src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">']
    if caption is not None:
        lines.append(f"<p>reference: {html.escape(item.captions[0])}</p>"
                     f"<p>our caption: {html.escape(caption)}</p>")
    rows = [f'<li class="{word.split()[0].lower()}"><b>{word}</b> {html.escape(line)}</li>'
            for word, line in verdicts]
    return [*lines, "<ul>", *rows, "</ul></article>"]
