"""lab/targets.py: do questions look at what they ask about, and do soft tokens spell what they stand for?"""
from __future__ import annotations

import itertools
import math

import numpy as np
import torch

import data
from eval import generate_texts, vision_features
from model import VLM
from support.formats.files import UserError
from support.formats.tokenizers import Tokenizer
from support.lab.attention import attention_to_patches
from support.lab.words import nearest_words


def require_cell_patches(vlm: VLM) -> None:
    if (grid := vlm.vit.config.image_size // vlm.vit.config.patch) != 3:
        raise UserError(f"this takes a ViT with 3 x 3 patches, one for a cell of `shapes`, not {grid} x {grid}; use weights/vit.")


def attention_on_target(vlm: VLM, tokenizer: Tokenizer, count: int = 200, split: str = "test") -> list[dict]:
    """Does a question look at what it asks about? Rows for `table`: attention in each layer that reads the picture.

    Mean over heads and over questions about colour and position that were answered right, on `shapes` of 2 to 4 things:

        question: asked, another, picture   to the cell of the thing asked about, of another thing, to all nine cells;
                                            from the last word of the question (ring in "what color is the ring?")
        answer: asked, another, picture     the same from the last word of the prompt, behind which the answer comes
        all words: picture                  about 1 where the picture has a softmax of its own

    By chance a cell has a ninth of the picture's. Needs one patch per cell.
    """
    require_cell_patches(vlm)
    world, ends = data.Shapes(split), len(tokenizer.encode("? Answer:"))
    named = lambda q, t: 2 * (t.place in q) + (t.color in q) + (t.shape in q)
    asked = [(q, i, max(things, key=lambda t: named(q.question, t)), things) for i in range(count)
             if len(things := world.scene(world.rng(i))) > 1
             for q in world.item(i).qas if q.kind in ("color", "position")]
    features = vision_features(vlm, [world.item(i) for i in range(count)], blind=False)
    documents = [data.Document(tokenizer).image().add(data.QUESTION.format(q.question)) for q, *_ in asked]
    answers, found = generate_texts(vlm.generate, documents, tokenizer, 12, features=features[[i for _, i, *_ in asked]]), []
    for (q, i, target, things), document, answer in zip(asked, documents, answers):
        if answer == q.answer:
            words, patches = attention_to_patches(vlm, torch.tensor([document.tokens], device=features.device), features[i:i + 1])
            x = (words.mean(1) @ patches)[..., -9:]                             # (L, T', 9)
            others = x[..., [t.cell for t in things if t is not target]]
            x = torch.stack((x[..., target.cell], others.mean(-1), x.sum(-1)))  # (3, L, T')
            found.append(torch.stack((*x[..., -1 - ends], *x[..., -1], x[2].mean(-1))))     # (7, L)
    names = [f"{word}: {cell}" for word in ("question", "answer") for cell in ("asked", "another", "picture")]
    shares = torch.stack(found).mean(0).tolist() if found else []               # 7 lists of L
    return [{"row": row, **{f"layer {l}": x for l, x in enumerate(share)}}
            for row, share in zip((*names, "all words: picture"), shares)]


@torch.no_grad()
def words_on_target(vlm: VLM, tokenizer: Tokenizer, count: int = 200, split: str = "test") -> list[dict]:
    """Do soft tokens spell what they stand for? Rows for `table`, over the things in pictures of `shapes`.

    own: how often a thing's colour, shape, … is among the 5 words nearest to the soft token that holds most of its
    cell; another's: how often another thing's in the picture is, where the two differ. Needs one patch per cell.
    """
    require_cell_patches(vlm)
    world, hits = data.Shapes(split), {"own": [], "another's": []}
    says = lambda t: (t.color, t.shape, t.size, *t.place.split())
    start = torch.tensor([data.Document(tokenizer).image().add(data.CAPTION).tokens])
    for i, features in enumerate(vision_features(vlm, [world.item(i) for i in range(count)], blind=False).split(1)):
        near, patches = nearest_words(vlm, tokenizer, features), attention_to_patches(vlm, start.to(features.device), features)[1]
        for t, o in itertools.product(world.scene(world.rng(i)), repeat=2):
            words = {word.strip() for word, _ in near[int(patches[:, t.cell - 9].argmax())]}
            hit = [w in words if o is t or w != own else math.nan for w, own in zip(says(o), says(t))]
            hits["own" if o is t else "another's"].append(hit)
    kinds = ("color", "shape", "size", "top/middle/bottom", "left/center/right")
    return [{"row": row, **dict(zip(kinds, np.nanmean(x, 0).tolist()))} for row, x in hits.items() if x]
