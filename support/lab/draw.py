"""A trained model draws pictures of texts.

    python eval.py draw out/glide-shapes "a large red ring at the top left"
    python eval.py draw out/glide-shapes "a white circle at the top left" --each 8 --scale 6 --out circles.png

RUN is a run of recipe glide. Every text gets a row of pictures; --scale says how far they follow it.
"""
from __future__ import annotations

from pathlib import Path

from support.formats.glide import load_painter, save_grid
from support.plumbing.flags import Parser, add_machine_flags, number, use_machine


def main(argv: list[str]) -> None:
    parser = Parser("eval.py draw", __doc__)
    parser.add_argument("run", metavar="RUN", help="run folder of train.py --recipe glide")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="what to draw")
    parser.add_argument("--each", type=number(least=1, most=64), default=4, metavar="N",
                        help="pictures of each text (4)")
    parser.add_argument("--scale", type=number(float, least=0, most=100), default=3.0, metavar="S",
                        help="of the guidance; 1 is none (3)")
    parser.add_argument("--steps", type=number(least=1, most=1000), default=25, metavar="N",
                        help="steps from noise to picture (25)")
    parser.add_argument("--seed", type=number(least=0), default=0, metavar="N", help="of the noise (0)")
    parser.add_argument("--out", default="pictures.png", metavar="FILE",
                        help="the picture file (pictures.png)")
    add_machine_flags(parser)
    args = parser.parse_args(argv)
    device = use_machine(args)
    painter = load_painter(Path(args.run), device)
    texts = [text for text in args.texts for _ in range(args.each)]
    save_grid(Path(args.out), painter.draw(texts, args.scale, args.steps, args.seed), args.each)
    print(f"{args.out}: {len(args.texts)} rows of {args.each} pictures")
