"""GLIGEN's task: what is in the box? The questions of shapes-places, whose place goes into a box.

    python train.py --recipe gligen                                 the map and the gated layers learn
    python train.py --bridge linear --data shapes-places            a model, which is locked …
    python train.py --recipe gligen --init out/linear-shapes-places --option tuned=false    … and its boxes

The paper draws pictures; its loss is the diffusion's. Here the same layers sit in the ViT of a model that
answers. "what color is the object at the top left?" becomes "what color is the object there?", and the box
of that cell goes into the ViT. A box has the phrase "object"; beside it stands one padding token.
"""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data import PLACES, QUESTION, Document, Item, to_pixels
from model import VLM
from papers.recipe import Ingredients, Task

PLACE = re.compile(rf"at the ({'|'.join(PLACES)})")


@dataclass
class BoxedItem(Item):
    box: Tensor | None = None       # (4,) x0 y0 x1 y1 in 0 … 1; None: the questions say the place in words


def place_box(place: str) -> Tensor:
    y, x = divmod(PLACES.index(place), 3)
    return torch.tensor([x, y, x + 1, y + 1]) / 3


def take_place(item: Item) -> BoxedItem:
    """"there" stands in the place of "at the top left", and the box of that cell beside it."""
    found = {place for q in item.qas for place in PLACE.findall(q.question)}
    if len(found) != 1:
        raise ValueError(f"the questions of item {item.id} are about {len(found)} places, not about one; "
                         "give --data shapes-places.")
    qas = [replace(q, question=PLACE.sub("there", q.question)) for q in item.qas]
    return BoxedItem(**{**vars(item), "qas": qas}, box=place_box(found.pop()))


def phrase_vector(vlm: VLM, tokenizer) -> Tensor:
    """(D,) for f_text("object"): the mean of the decoder's rows of its tokens."""
    rows = vlm.decoder.embed.weight
    return rows[torch.tensor(tokenizer.encode(" object"), device=rows.device)].detach().float().mean(0)


def other_box(item: BoxedItem) -> Tensor | None:
    """The box of the first thing of the picture that is not asked about; None: there is no other."""
    boxes = [place_box(place) for place in PLACE.findall(item.about)]
    return next((box for box in boxes if not torch.equal(box, item.box)), None)


@torch.no_grad()
def answer_boxes(vlm: VLM, tokenizer, items: list[Item], generate_texts: Callable) -> dict[str, float]:
    """Shares of right answers, 0 … 1, on the pictures with several things; one thing needs no box.

    box, another box, no box    with the box, with that of another thing, without (β = 0)
    blind box                   with the box and a zeroed picture
    a guess                     of one who names any thing of the picture
    {} where no picture has several things.
    """
    taken = [item for item in map(take_place, items) if other_box(item) is not None]
    weight = vlm.vit.positions
    pixels = to_pixels([item.image for item in taken], vlm.vit.config.image_size, vlm.processor).to(weight)
    if not taken:
        return {}
    boxes, others = (torch.stack(some).to(weight.device)
                     for some in ([item.box for item in taken], [other_box(item) for item in taken]))
    asked = [(n, q) for n, item in enumerate(taken) for q in item.qas]
    prompts = [Document(tokenizer).image().add(QUESTION.format(q.question)) for _, q in asked]
    phrase, found = phrase_vector(vlm, tokenizer), {}
    for name, seen, shown, beta in (("box", pixels, boxes, 1.0), ("another box", pixels, others, 1.0),
                                    ("no box", pixels, boxes, 0.0), ("blind box", 0 * pixels, boxes, 1.0)):
        features = vlm.bridge.grounded_features(vlm.vit, seen, shown, phrase, beta)
        texts = generate_texts(vlm, prompts, tokenizer, 12, features=features,
                               pictures=[[n] for n, _ in asked])
        found[name] = sum(text.strip() == q.answer for (_, q), text in zip(asked, texts)) / len(asked)
    things = [(taken[n].about.split("; "), q.answer) for n, q in asked]
    guessed = [sum(f" {answer} " in thing for thing in seen) / len(seen) for seen, answer in things]
    return found | {"a guess": sum(guessed) / len(guessed)}


class GligenTask(Task):
    """What GLIGEN changes of train.py's answer task, in front of which this class stands.

    Where the map learns, too (tuned), every other picture has questions in words and no box.
    """

    def __init__(self, given: Ingredients, *others):
        super().__init__(given, *others)
        bridge = self.module.bridge
        if bridge.reads != len(bridge.layers):
            raise ValueError("the map reads the state behind the last gated layer: give the option layers, "
                             "not reads.")
        self.vit_learns = True                          # pixels go into the step: what reads them learns
        self.phrase = phrase_vector(self.module, self.tokenizer)

    def example(self, world, index: int) -> tuple[Document, Item]:
        item = world.item(index, turns=self.s.turns)
        boxed = take_place(item)
        if self.module.bridge.tuned and index % 2:
            boxed = replace(boxed, qas=item.qas, box=None)
        return self.document(boxed, index), boxed

    def piece(self, pairs: list[tuple[Document, Item]], m: int, weight: float) -> dict:
        boxes = torch.stack([torch.zeros(4) if item.box is None else item.box for _, item in pairs])
        beta = torch.tensor([float(item.box is not None) for _, item in pairs])[:, None, None]
        return super().piece(pairs, m, weight) | dict(boxes=boxes, beta=beta)

    def loss(self, tokens: Tensor, labels: Tensor, mask: Tensor | None, pixels: Tensor, boxes: Tensor,
             beta: Tensor, **_) -> Tensor:
        vlm = self.module
        pixels = pixels.to(vlm.vit.positions)           # of the ViT's dtype
        features = vlm.bridge.grounded_features(vlm.vit, pixels, boxes, self.phrase, beta)
        return vlm.loss(tokens, labels, None, mask, features)[0]

    def report(self, out: Path) -> dict[str, dict]:
        files, g = super().report(out), self.given
        items = g.take_items(g.open_held_out(), g.eval_items)
        scores = answer_boxes(self.module, self.tokenizer, items, g.generate_texts)
        text = "   ".join(f"{name} {100 * score:.1f}" for name, score in scores.items())
        print(f"what is in the box? right answers in %, pictures with several things:   {text}")
        return files | {"boxes.json": scores}
