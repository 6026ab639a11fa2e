"""worlds/clicks.py: a toy web of pages with a text, a screenshot and a place to click (WebGUM, 2305.11854v4).

The text says which shape stands where, the goal names a colour that one thing alone has, and the answer is
its place. Only the screenshot shows colours, so by the text alone a click is a guess among the page's things:

    page: a ring at the top left, a square at the bottom right. click the red one       top left
"""
from __future__ import annotations

import numpy as np

from data import KINDS, QA, Item, Shapes, Thing, choose, unique, with_article


class ShapesClicks(Shapes):
    """Pages with their own screenshots."""
    name, says_scenes = "shapes-clicks", False

    def scene(self, rng: np.random.Generator) -> list[Thing]:
        """Two to four things, one of them with a colour of its own (of `test` a held-out pair)."""
        while True:
            things = super().scene(rng)
            if len(things) > 1 and self.goals(things):
                return things

    def goals(self, things: list[Thing]) -> list[Thing]:
        return unique(things, [t for t in things if t.pair in self.asked], lambda t: t.color)

    def questions(self, things: list[Thing], rng: np.random.Generator, kinds=KINDS) -> list[QA]:
        goal = choose(self.goals(things), rng)
        text = ", ".join(f"{with_article(t.shape)} at the {t.place}" for t in things)
        return [QA("click", f"page: {text}. click the {goal.color} one", goal.place)]

    def item(self, index: int, turns: int | None = None) -> Item:
        item = super().item(index, turns)
        item.image, item.captions = self.screenshot(item.image, index), []
        return item

    def screenshot(self, image: np.ndarray, index: int) -> np.ndarray | None:
        return image


class ShapesClicksWhite(ShapesClicks):
    """The same pages, each with a white screenshot."""
    name = "shapes-clicks-white"

    def screenshot(self, image: np.ndarray, index: int) -> np.ndarray | None:
        return np.full_like(image, 255)


class ShapesClicksNoise(ShapesClicks):
    """The same pages, each with random pixels."""
    name = "shapes-clicks-noise"

    def screenshot(self, image: np.ndarray, index: int) -> np.ndarray | None:
        rng = np.random.default_rng((self.seed, self.splits.index(self.split), index, 1))
        return rng.integers(0, 256, image.shape, dtype=image.dtype)


class ShapesClicksText(ShapesClicks):
    """The same pages without a screenshot."""
    name = "shapes-clicks-text"

    def screenshot(self, image: np.ndarray, index: int) -> np.ndarray | None:
        return None
