"""Do questions look at what they ask about, and do soft tokens spell what they stand for?

    python eval.py targets out/mapl-shapes out/zero_init-shapes
    python eval.py targets out/linear-shapes --items 100

On held-out pictures of `shapes`: the share of attention that the thing asked about gets, in each layer. Of
bridges with soft tokens also: how often the words of a thing are near to the soft token in its place.
"""
from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from eval import format_table, generate_texts, vision_features
from model import VLM
from support.formats.files import UserError
from support.formats.tokenizers import Tokenizer
from support.formats.vlm import open_run
from support.lab.attention import attention_to_patches
from support.lab.words import nearest_words
from support.plumbing.flags import Parser, add_machine_flags, number, use_machine


def require_cell_patches(vlm: VLM) -> None:
    grid = vlm.vit.config.image_size // vlm.vit.config.patch
    if grid != 3:
        raise UserError("this takes a ViT with 3 x 3 patches, one for a cell of `shapes`, not "
                        f"{grid} x {grid}; use weights/vit.")


@dataclass(frozen=True)
class TargetQuestion:
    """A question about one thing of a scene."""
    qa: data.QA
    picture: int                            # number of the item
    target: data.Thing                      # the thing asked about
    others: list[data.Thing]


def target_questions(world: data.Shapes, count: int) -> list[TargetQuestion]:
    """The questions about colour and position in the first `count` pictures that hold more than one thing."""
    questions = []
    for i in range(count):
        things = world.scene(world.rng(i))
        for q in world.item(i).qas if len(things) > 1 else ():
            if q.kind in ("color", "position"):
                named = [2 * (t.place in q.question) + (t.color in q.question) + (t.shape in q.question)
                         for t in things]
                target = things[named.index(max(named))]
                questions.append(TargetQuestion(q, i, target, [t for t in things if t is not target]))
    return questions


def attention_on_target(vlm: VLM, tokenizer: Tokenizer, count: int = 200, split: str = "test") -> list[dict]:
    """Does a question look at what it asks about? Rows for `format_table`: attention in each reading layer.

    Mean over heads and over right answers to questions about colour and position, on scenes of 2 to 4 things:

        question: asked, another, picture   from the last word of the question ("what color is the RING?") to
                                            the cell of the thing asked about, of another thing, to all nine
        answer: asked, another, picture     the same from the last word of the prompt, where the answer begins
        all words: picture                  about 1 where the picture has a softmax of its own

    By chance a cell has a ninth of the picture's. Needs one patch per cell.
    """
    require_cell_patches(vlm)
    world = data.Shapes(split)
    questions = target_questions(world, count)
    features = vision_features(vlm, [world.item(i) for i in range(count)], blind=False)
    documents = [data.Document(tokenizer).image().add(data.QUESTION.format(q.qa.question)) for q in questions]
    own = features[[q.picture for q in questions]]
    answers, found = generate_texts(vlm, documents, tokenizer, 12, features=own), []
    for q, document, answer in zip(questions, documents, answers):
        if answer == q.qa.answer:
            tokens = torch.tensor([document.tokens], device=features.device)
            words, patches = attention_to_patches(vlm, tokens, features[q.picture:q.picture + 1])
            cells = (words.mean(1) @ patches)[..., -9:]                     # (L, T', 9)
            found.append(target_shares(cells, q, ends=len(tokenizer.encode("? Answer:"))))
    if not found:
        return []
    names = [f"{word}: {cell}" for word in ("question", "answer") for cell in ("asked", "another", "picture")]
    shares = torch.stack(found).mean(0).tolist()                            # 7 lists of L
    return [{"row": row, **{f"layer {l}": x for l, x in enumerate(share)}}
            for row, share in zip((*names, "all words: picture"), shares)]


def target_shares(cells: Tensor, question: TargetQuestion, ends: int) -> Tensor:
    """(7, L): the rows of `attention_on_target` for one question.

    cells (L, T', 9): attention to the cells; ends: tokens of "? Answer:".
    """
    others = cells[..., [t.cell for t in question.others]].mean(-1)
    x = torch.stack((cells[..., question.target.cell], others, cells.sum(-1)))      # (3, L, T')
    return torch.stack((*x[..., -1 - ends], *x[..., -1], x[2].mean(-1)))


def thing_words(t: data.Thing) -> tuple[str, ...]:
    return t.color, t.shape, t.size, *t.place.split()


@torch.no_grad()
def words_on_target(vlm: VLM, tokenizer: Tokenizer, count: int = 200, split: str = "test") -> list[dict]:
    """Do soft tokens spell what they stand for? Rows for `format_table`, over the things in pictures.

    own: how often a thing's colour, shape, … is among the 5 words nearest to the soft token that holds most
    of its cell. another's: how often another thing's is, where the two differ. Needs one patch per cell.
    """
    require_cell_patches(vlm)
    world, hits = data.Shapes(split), {"own": [], "another's": []}
    caption = torch.tensor([data.Document(tokenizer).image().add(data.CAPTION).tokens])
    pictures = vision_features(vlm, [world.item(i) for i in range(count)], blind=False)
    for i, features in enumerate(pictures.split(1)):
        near = nearest_words(vlm, tokenizer, features)
        patches = attention_to_patches(vlm, caption.to(features.device), features)[1]
        for thing, other in itertools.product(world.scene(world.rng(i)), repeat=2):
            token = int(patches[:, thing.cell - 9].argmax())
            words = {word.strip() for word, _ in near[token]}
            hit = [word in words if other is thing or word != own else math.nan
                   for word, own in zip(thing_words(other), thing_words(thing))]
            hits["own" if other is thing else "another's"].append(hit)
    kinds = ("color", "shape", "size", "top/middle/bottom", "left/center/right")
    return [{"row": row, **dict(zip(kinds, np.nanmean(x, 0).tolist()))} for row, x in hits.items() if x]


def main(argv: list[str]) -> None:
    parser = Parser("eval.py targets", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py, with weights/vit")
    parser.add_argument("--items", "--limit", type=number(least=1, most=10**6), default=400, metavar="N",
                        help="pictures (400)")
    add_machine_flags(parser)
    args = parser.parse_args(argv)
    device = use_machine(args)
    for run in args.runs:
        vlm, tokenizer, _ = open_run(run, device)
        rows = attention_on_target(vlm, tokenizer, args.items)
        table = format_table(rows) if rows else "no question was answered right"
        print(f"{Path(run).name}: attention in %, by chance a cell has a ninth of the picture's\n{table}\n")
        if vlm.bridge.soft_tokens:
            table = format_table(words_on_target(vlm, tokenizer, args.items))
            print(f"its words among the 5 nearest to the soft token of a thing, in %\n{table}\n")
