"""The photographs among Tux Paint's stamps, with their English names, as a captioned folder.

    apt-get install tuxpaint-stamps-default         GPL-2, and what holds them is GPL-2, too
    python data.py stamps /usr/share/tuxpaint/stamps out/stamps
    python train.py --recipe clip --data "emoji + folder:out/stamps" --augment

Beside each crow.png lies crow.txt, and its first line is English. Folders of drawings (cartoon, roadsigns)
and of letters, digits and money (symbols) are left out, and so are names of more than WORDS words.
"""
from __future__ import annotations

import json
import re
from pathlib import Path

from PIL import Image

from support.formats.files import UserError, atomically

INSTALLED = "/usr/share/tuxpaint/stamps"
DRAWN = {"symbols", "roadsigns", "cartoon", "cartoons"}             # folders without photographs
WORDS, SIDE = 8, 160                                    # longest name; longer side in pixels


def stamp_name(text: str) -> str:
    """The first sentence of a description as a name: "A race car." → "a race car"."""
    sentence = re.split(r"(?<=\w\w\w)[.!](?:\s|$)", text.strip())[0].strip(".! “”")
    article = re.match(r"(A|An|The|Some|Our|This) ", sentence)
    return sentence[:1].lower() + sentence[1:] if article else sentence


def find_stamps(folder: Path) -> list[tuple[Path, str]]:
    """(picture, name) of each photograph, in the order of their paths."""
    found = []
    for file in sorted(folder.rglob("*.png")):
        told = file.with_suffix(".txt")
        if DRAWN.isdisjoint(part.lower() for part in file.relative_to(folder).parts[:-1]) and told.exists():
            lines = told.read_text(encoding="utf-8", errors="replace").splitlines()
            name = stamp_name(lines[0]) if lines else ""
            if 0 < len(name.split()) <= WORDS:
                found.append((file, name))
    return found


def on_white(file: Path) -> Image.Image:
    """A stamp without its transparent margin, on white, its longer side at most SIDE."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            image = image.convert("RGBA")
    except Exception as e:                              # Pillow raises OSError, SyntaxError, ValueError …
        raise UserError(f"{file}: not a picture that Pillow can read ({type(e).__name__}); "
                        "install the stamps again.") from None
    image = image.crop(image.getchannel("A").getbbox() or (0, 0, *image.size))
    image.thumbnail((SIDE, SIDE))
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def write_stamps(folder: Path, out: Path) -> None:
    """OUT/captions.jsonl and OUT/images/ from an installed copy; prints how many."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; the stamps come with the package "
                        "tuxpaint-stamps-default, give the folder `stamps` that it has installed.")
    found = find_stamps(folder)
    if not found:
        raise UserError(f"{folder}: holds no photograph NAME.png with NAME.txt beside it; give the folder "
                        "`stamps` of Tux Paint.")
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for file, name in found:
        image = "-".join(file.relative_to(folder).parts)
        with atomically(out / "images" / image) as unfinished:
            on_white(file).save(unfinished, "PNG")
        rows.append(json.dumps({"image": image, "text": name}, ensure_ascii=False))
    with atomically(out / "captions.jsonl") as unfinished:
        Path(unfinished).write_text("\n".join(rows) + "\n", encoding="utf-8")
    different = len({json.loads(row)["text"] for row in rows})
    print(f"{len(rows)} photographs with {different} names in {out}: --data folder:{out}")
    print("They are Tux Paint's, under the GNU GPL, version 2: what you pass on of them is, too.")
