"""CoCa's training (papers/coca.py): both losses beside a ViT that stays, or one of them from scratch.

CLIP (2103.00020v1, §2.3, Fig. 2) reports how many pictures a new encoder needs: a contrast learned 12 times
as fast as a language model over captions. Recipes `coca-contrast` and `coca-caption` teach a new ViT by one
loss each, in the same parts; a linear probe then says what the ViT has learned to see.
"""
from __future__ import annotations

import math

from torch import Tensor, nn

from model import ViT
from papers.choices import ChoiceTask
from papers.clip import ClipTask, TextConfig, text_tokens
from papers.coca import CoCa, LowerHalf
from papers.linear_probe import linear_probe
from papers.recipe import Ingredients


class CocaTask(ChoiceTask, ClipTask):
    """Recipe `coca`: (P8). Takes what recipe `clip-text` does; false texts are contrasted, too.

    With one loss alone (recipes `coca-contrast`, `coca-caption`) the ViT is new and learns.
    """
    queries, weights = 16, {"contrast": 1, "caption": 2}                        # of (P8)

    def __init__(self, given: Ingredients):
        self.given, self.world, self.tokenizer = given, given.world, given.tokenizer
        self.locked = len(self.weights) == 2
        V, self.image_size = given.tokenizer.vocab_size, given.vit.config.image_size
        vit = given.vit if self.locked else ViT(given.vit.config)
        if not self.locked:
            nn.init.normal_(vit.positions, std=0.5)                             # see papers/clip.py
        text, n = LowerHalf(TextConfig(V + 1, context=64), pad=V), self.queries
        self.module = CoCa(vit, text, joint=128, layers=2, queries=n, pool_heads=4).to(given.device)
        guesses = {"contrast": math.log(given.batch) + math.log(3) / 2, "caption": math.log(V)}
        terms = (f"{weight} · {name} {guesses[name]:.2f}" for name, weight in self.weights.items())
        self.expect = f"(uniform guesses: {' + '.join(terms)})"

    def tokens(self, texts: list[str]) -> Tensor:
        t, context = self.tokenizer, self.module.text.config.context
        return text_tokens(texts, t, context, (t.bos,), pad=t.vocab_size)

    def loss(self, pixels: Tensor, tokens: Tensor, **_) -> Tensor:
        self.last = self.module.losses(pixels, tokens, self.given.gather)
        return sum(weight * self.last[name] for name, weight in self.weights.items())       #   (P8)

    def scores(self, pixels: Tensor, texts: list[str]) -> dict[str, Tensor]:
        """Of n texts for one picture: their cosines, and their likelihoods as captions."""
        tokens = self.tokens(texts).to(pixels.device)
        (u, G), (w, h) = self.module.see(pixels), self.module.read(tokens)
        words = self.module.word_losses(tokens, h, G.expand(len(h), -1, -1))
        found = {"contrast": ("by contrast", w @ u[0]), "caption": ("as caption", -words.sum(1))}
        return dict(found[name] for name in self.weights)

    def check(self, count: int = 100) -> dict[str, float]:
        """Of a new ViT also what a linear probe reads off one token: colour, shape and place of a thing."""
        found = super().check(count)
        if not self.locked:
            read = linear_probe(self.module.vit, train=1000, test=500)
            found["probe"] = (read["color"] + read["shape"] + read["place"]) / 3
        return found


TASKS = {"coca": CocaTask, **{name: type(name, (CocaTask,), change) for name, change in {
    "coca-1": {"queries": 1}, "coca-contrast": {"weights": {"contrast": 1}},
    "coca-caption": {"weights": {"caption": 1}}}.items()}}
