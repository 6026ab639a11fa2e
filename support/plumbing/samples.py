"""plumbing/samples.py: a page of pictures and answers."""
from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from string import Template

from support.formats.files import atomically

PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>$title</title>
<style>body { margin: 1rem; font: 1rem/1.4 sans-serif; color: #1b1b1b; background: #fff; overflow-wrap: anywhere }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem }
article { border: 1px solid #999; border-radius: .4rem; padding: .8rem; break-inside: avoid } h2 { font-size: 1rem }
img { max-width: 100% } img:not(.zoom1) { image-rendering: pixelated } ul { list-style: none; padding: 0 }
.right b { color: #0b5d1e } .wrong b { color: #b3140c } .partly b { color: #7a4a00 }
pre { font-size: .75rem; overflow-x: auto } @media print { html { font-size: 8pt } }</style></head>
<body><h1>$title</h1><p>$summary</p><pre>$text</pre><main>$cards</main></body></html>
""")


def write_samples_page(file: Path, title: str, told: list[tuple], text: str) -> None:
    """One page that needs no other file and no script; told: (item, our caption or None, verdicts) per picture."""
    from PIL import Image
    show, cards, words = html.escape, [], [word for *_, asked in told for word, _ in asked]
    for item, caption, asked in told:
        picture, png = Image.fromarray(item.image), io.BytesIO()
        picture.thumbnail((384, 384))
        picture.save(png, "png")
        zoom = max(1, 192 // max(picture.size))         # a small one is enlarged by a whole number and stays sharp
        cards += [f"<article><h2>{show(item.id)}</h2>", f'<img class="zoom{zoom}" width="{zoom * picture.width}" alt=""',
                  f'src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">']
        if caption is not None:
            cards.append(f"<p>reference: {show(item.captions[0])}</p><p>our caption: {show(caption)}</p>")
        lines = [f'<li class="{word.split()[0].lower()}"><b>{word}</b> {show(line)}</li>' for word, line in asked]
        cards += ["<ul>", *lines, "</ul></article>"]
    counted = f"; {words.count('right')} of {len(words)} answers are right" if words else ""
    page = dict(title=show(title), summary=f"{len(told)} held-out pictures{counted}.", text=show(text), cards="\n".join(cards))
    with atomically(file) as tmp:
        tmp.write_text(PAGE.substitute(page), encoding="utf-8")
