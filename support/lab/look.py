"""Where the words of a prompt look in a picture, and which words are nearest to its visual tokens.

    python eval.py look out/mapl-shapes --image scene.png --prompt "where is the red ring?"
    python eval.py look out/flamingo-shapes --image scene.png --out out/maps

Writes words.png (a column per word, a row per layer) and tokens.png (the patches behind each visual token) to
--out, and prints the answer, a legend and tables.
"""
from __future__ import annotations

from pathlib import Path

from eval import generate_texts
from support.formats.files import UserError
from support.formats.vlm import open_run
from support.lab.ask import read_question
from support.lab.protocols import learned_chat
from support.lab.attention import draw_attention
from support.plumbing.flags import Parser, add_machine_flags, use_machine


def make_parser() -> Parser:
    parser = Parser("eval.py look", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder of train.py")
    parser.add_argument("--image", default="", metavar="FILE", help="a picture file")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="a question; without it a caption")
    parser.add_argument("--out", default="out/look", metavar="FOLDER", help="of the maps (out/look)")
    add_machine_flags(parser)
    return parser


def main(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    if not args.image:
        raise UserError("look needs --image FILE: the picture to look at.")
    device = use_machine(args)
    vlm, tokenizer, facts = open_run(args.run, device)
    chat = learned_chat(facts, tokenizer)
    pixels, document = read_question(vlm, tokenizer, args.image, args.prompt, chat)
    features = vlm.features(pixels.to(device))
    print(generate_texts(vlm, [document], tokenizer, 64, features=features)[0])
    print(draw_attention(vlm, tokenizer, pixels, features, document, Path(args.out)))
