"""lab/probe.py: what a decoder reads from words and a ViT's token holds."""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

import data
from eval import generate_texts
from model import Decoder, ViT
from support.formats.tokenizers import Tokenizer


def measure_reading(decoder: Decoder, tokenizer: Tokenizer, count: int = 400, styles=("at", "in", "terse")) -> dict:
    """How well a decoder reads scenes in words: exact answers per kind of question, and per number of objects.

    The style "place" ("top left: a small red circle; …") is measured apart: at the distance where "at" has a thing's place, it has
    the next thing's, and a decoder of this size mixes them up when there are three or four.
    """
    world, hits = data.Shapes("all", seed=1), {}
    for style in styles:
        documents, facts = [], []
        for i in range(count):
            rng = world.rng(10_000_000 + i)
            things = world.scene(rng)
            for q in world.questions(things, rng):
                documents.append(data.Document(tokenizer).add(data.describe_scene(things, style)).add(data.QUESTION.format(q.question)))
                facts.append((q, len(things)))
        for (q, n), a in zip(facts, generate_texts(decoder, documents, tokenizer, 6)):
            for key in (q.kind, f"{n} objects"):
                hits.setdefault(key, []).append(a == q.answer)
    return {k: float(np.mean(v)) for k, v in sorted(hits.items())}


def linear_probe(vit: ViT, layer: int = -2, train: int = 3000, test: int = 1500) -> dict:
    """Linear probe of ONE token: logistic regression from the token of an object's cell to its colour, shape, size and place.

    Trained on seen colour-shape pairs, tested on held-out ones; accuracies. Needs one patch per cell.
    """
    def tokens(split: str, count: int):
        world = data.Shapes(split, seed=2)
        scenes = [(world.scene(rng), rng) for rng in map(world.rng, range(count))]
        with torch.no_grad():
            x = torch.cat([vit.features(data.to_pixels([data.draw_scene(t, r) for t, r in scenes[i:i + 250]], world.size), layer)
                           for i in range(0, count, 250)])                      # (count, 9, Di)
        things = [(n, t) for n, (ts, _) in enumerate(scenes) for t in ts if split == "val" or t.pair in data.HELD_OUT]
        return torch.stack([x[n, t.cell] for n, t in things]), [t for _, t in things]
    (x, seen), (y, held) = tokens("val", train), tokens("test", test)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, y = (x - mean) / std, (y - mean) / std
    result = {}
    for attribute, names in (("color", list(data.COLORS)), ("shape", list(data.SHAPES)), ("size", list(data.SIZES)),
                             ("place", list(data.PLACES))):
        target, truth = (torch.tensor([names.index(getattr(t, attribute)) for t in ts]) for ts in (seen, held))
        head = torch.nn.Linear(x.shape[1], len(names))
        torch.nn.init.zeros_(head.weight)
        solver = torch.optim.LBFGS(head.parameters(), max_iter=100)

        def closure():
            solver.zero_grad()
            loss = F.cross_entropy(head(x), target) + 1e-4 * head.weight.square().sum()
            loss.backward()
            return loss
        solver.step(closure)
        result[attribute] = (head(y).argmax(1) == truth).float().mean().item()
    return result
