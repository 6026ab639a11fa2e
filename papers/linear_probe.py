"""Linear probes (1610.01644): what ONE token of a ViT holds, read by a classifier without hidden layers."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from model import ViT


def linear_probe(vit: ViT, layer: int = -2, train: int = 3000, test: int = 1500) -> dict[str, float]:
    """Linear probe of ONE token: logistic regression from the token of an object's cell to its attributes.

    Trained on seen pairs of colour and shape, tested on held-out ones. Needs a ViT with one patch per cell.
    layer: the hidden state that is read; train, test: numbers of scenes.
    Returns the accuracy of color, shape, size and place.
    """
    x, seen = tokens_of_things(vit, layer, "val", train)
    y, held_out = tokens_of_things(vit, layer, "test", test)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, y = (x - mean) / std, (y - mean) / std
    result = {}
    for attribute, names in (("color", list(data.COLORS)), ("shape", list(data.SHAPES)),
                             ("size", list(data.SIZES)), ("place", list(data.PLACES))):
        target = torch.tensor([names.index(getattr(t, attribute)) for t in seen])
        truth = torch.tensor([names.index(getattr(t, attribute)) for t in held_out])
        head = fit_logistic_regression(x, target, len(names))
        result[attribute] = (head(y).argmax(1) == truth).float().mean().item()
    return result


def tokens_of_things(vit: ViT, layer: int, split: str, count: int) -> tuple[Tensor, list[data.Thing]]:
    """(n, Di): the token of each thing's cell in `count` scenes; and the things (of "test": held-out)."""
    world = data.Shapes(split, seed=2)
    scenes = [(world.scene(rng), rng) for rng in map(world.rng, range(count))]
    with torch.no_grad():
        parts = []
        for i in range(0, count, 250):
            images = [data.draw_scene(things, rng) for things, rng in scenes[i:i + 250]]
            parts.append(vit.features(data.to_pixels(images, world.size), layer))
        x = torch.cat(parts)                            # (count, 9, Di)
    things = [(n, t) for n, (things, _) in enumerate(scenes) for t in things
              if split == "val" or t.pair in data.HELD_OUT]
    return torch.stack([x[n, t.cell] for n, t in things]), [t for _, t in things]


def fit_logistic_regression(x: Tensor, target: Tensor, classes: int) -> nn.Linear:
    """Cross-entropy with 1e-4 · |W|², minimised by L-BFGS from zero; x (n, Di), target (n,)."""
    head = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(head.weight)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=100)

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(head(x), target) + 1e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return head
