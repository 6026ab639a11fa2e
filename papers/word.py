"""papers/word.py: a picture as one word of a frozen language model (lesson 9 of notebooks/, for any picture).

A prefix bridge writes one soft token per picture, and that token shall be the row of the embedding table of
the word that names it. Then the decoder reads "What is a⟨picture⟩?" as it reads the sentence with the word in
it, and tells what it knows of the thing, though no step of training held more than the name.

    symbol    shape      here       meaning
    f(x)      (B, K, D)  soft       the bridge's soft tokens; K = 1, or as many as a name may have
    w         (K,)       targets    of the thing: its name, one token with a blank before it; K > 1: up to K
                                    tokens, then line ends
    e_w       (K, D)     rows       rows of the embedding table
    s         ()         scale      mean over the run's words of (e_w − mean)²

    (W1)  L = mean |f(x) − e_w|² / s  −  mean log softmax_v(β cos(f(x), e_v))_w             β = 30
    (W2)  read(x) = argmax_v cos(f(x), e_v)                 over all V words of the vocabulary; K > 1: over
                                                            the tokens of all names

The first part is lesson 9's; 1 is what the mean of all names gets. Alone it writes a blend of the names that
may be meant, and the nearest word to a blend is often a third one: the second part asks for (W2) itself.

No decoder runs in the loss, so a minute trains it. Names of more than K tokens are left out. A training on
captions may begin where this one ends (--init).

Run       python train.py --recipe word --data emoji --examples 50 --vit weights/vit-pictures \
              --lm HuggingFaceTB/SmolLM2-135M-Instruct          whole names: --option constants=8 width=256
Content   WordTask, RECIPES
"""
from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import Document, to_pixels
from papers.recipe import MUON, Numbers, Recipe

ASK = "What is a<image>? Answer in one sentence."
BETA = 30
RENDERINGS = 4                                          # of each thing in the report
SHOWN = 6                                               # things that are asked about, and as many failures
LISTED = 200                                            # names that are printed


class WordTask:
    """What recipe `word` changes of train.py's answer task, in front of which this class stands.

    Takes things_with_names; --examples is the number of names.
    """
    def __init__(self, *given):
        super().__init__(*given)
        g = self.given
        self.slots, K = self.shape()
        if not self.module.bridge.soft_tokens:
            raise ValueError("recipe word trains a bridge that writes soft tokens, and "
                             f"{g.bridge.name} writes none; give --bridge mapl.")
        self.things = g.things_with_names(self.world, lambda name: len(self.ids(name)) <= K, K > 1,
                                          g.examples, g.track)
        self.words = [*dict.fromkeys(self.things.words)]
        tokens = "one token" if K == 1 else f"at most {K} tokens"
        if len(self.words) < 2:
            raise ValueError(f"of {self.world.name} this language model writes {len(self.words)} names as "
                             f"{tokens}, and recipe word needs two; give other data (captions that "
                             'are names: "a dog"), or another --lm.')
        table, rest = self.module.decoder.embed.weight.detach(), [self.line_end()] * K
        ids = [(self.ids(word) + rest)[:K] for word in self.things.words] + [rest]
        ids = torch.tensor(ids, device=table.device)                            # (things + 1, K); −1: none
        self.rows = table[ids].float()                                          # (things, K, D)
        self.read_ids = torch.arange(len(table), device=table.device) if K == 1 else ids.unique()   # (V')
        self.table = F.normalize(table[self.read_ids].float(), dim=-1)          # (V', D)
        self.targets = torch.searchsorted(self.read_ids, ids)                   # (things, K): numbers of (W2)
        own = self.rows[[self.things.words.index(w) for w in self.words]]
        self.scale = (own - own.mean(0)).square().mean()
        V = len(self.read_ids)
        self.expect = f"(the mean of all names gets 1 + at most ln {V} = {np.log(V):.2f})"
        shown = sorted(self.words)[:LISTED] + ["…"] * (len(self.words) > LISTED)
        print(f"words    {len(self.words)} names of {len(self.things.words)} things, of {self.things.total} "
              f"in {self.world.name}; each name is {tokens} of {len(table):,}")
        print(textwrap.fill(", ".join(shown), 110, initial_indent=" " * 9, subsequent_indent=" " * 9))

    def ids(self, word: str) -> list[int]:
        return self.tokenizer.encode(" " + word, preceded_by="text")

    def shape(self) -> tuple[int, int]:
        """How many names a picture has at most, and how many tokens a name."""
        return 1, self.visual_tokens

    def line_end(self) -> int:
        return self.tokenizer.encode("\n", preceded_by="text")[-1]

    def batch(self, step: int) -> list[dict]:
        """pixels (B, 3, S, S) of things drawn at random; tokens (B, slots): their numbers, then −1."""
        given, things = self.given, self.things
        chosen = [things.scene(np.random.default_rng((given.seed, 4, i)), self.slots)
                  for i in self.indices(step)]
        images = [things.draw(numbers, i, False) for numbers, i in zip(chosen, self.indices(step))]
        tokens = torch.tensor([numbers + [-1] * (self.slots - len(numbers)) for numbers in chosen])
        return [dict(pixels=self.pixels(images), known=None, cut=0, tokens=tokens, set=0, weight=1.0,
                     count=len(chosen))]

    def indices(self, step: int) -> range:
        number, parts = self.given.part
        count = self.given.batch // parts
        return range(step * self.given.batch + number * count, step * self.given.batch + (number + 1) * count)

    def pixels(self, images: list[np.ndarray]) -> Tensor:
        return to_pixels(images, self.module.vit.config.image_size, self.given.processor)

    def features_of(self, images: list[np.ndarray]) -> Tensor:
        return self.features(self.pixels(images).to(self.given.device))         # (B, N, Di)

    def soft(self, features: Tensor) -> Tensor:
        """(B, N, Di) → (B, K, D)."""
        bridge = self.module.bridge
        return bridge.prefix(bridge.see(features)).float()

    def loss(self, tokens: Tensor, features: Tensor, **_) -> Tensor:
        self.last = self.losses(self.soft(features), tokens)
        return len(tokens) * sum(self.last.values())                            # (W1)

    def losses(self, soft: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """The two parts of (W1); soft (B, slots·K, D), numbers (B, slots) of things."""
        return {"distance": (soft - self.rows[numbers].flatten(1, 2)).square().mean() / self.scale,
                "words": self.words_loss(soft, numbers)}

    def words_loss(self, soft: Tensor, numbers: Tensor) -> Tensor:
        near = BETA * F.normalize(soft, dim=-1) @ self.table.T                  # (B, slots·K, V')
        return F.cross_entropy(near.mT, self.targets[numbers].flatten(1))

    def first_step(self, *_) -> None:
        """No document is trained on."""

    def flops_per_position(self) -> float:
        return 0.0

    def read_slots(self, features: Tensor) -> list[list[str]]:
        """(W2): the words that each slot of a picture is nearest to, up to the first line end."""
        nearest = (F.normalize(self.soft(features), dim=-1) @ self.table.T).argmax(-1)  # (B, slots·K)
        nearest = self.read_ids[nearest].unflatten(-1, (self.slots, -1)).tolist()
        return [[self.tokenizer.decode(ids).partition("\n")[0].strip() for ids in slots] for slots in nearest]

    def read(self, features: Tensor) -> list[str]:
        return [", ".join(filter(None, names)) for names in self.read_slots(features)]

    @torch.no_grad()
    def name_new(self, renderings: int) -> tuple[list[np.ndarray], Tensor, list[str], list[str]]:
        """Pictures of new renderings of every thing, their features, their words, and what is read."""
        numbers = [n for n in range(len(self.things.words)) for _ in range(renderings)]
        track = self.given.track
        images = [self.things.draw([n], i, True) for i, n in track([*enumerate(numbers)], "renderings")]
        parts = [self.features_of(images[i:i + 128]) for i in track(range(0, len(images), 128), "renderings")]
        read = [word for part in parts for word in self.read(part)]
        return images, torch.cat(parts), [self.things.words[n] for n in numbers], read

    def check(self) -> dict[str, float]:
        _, _, words, read = self.name_new(1)
        return {"named": float(np.mean([a == b for a, b in zip(words, read)]))}

    def ask(self, features: Tensor) -> list[str]:
        """What the language model says of these pictures."""
        documents = [Document(self.tokenizer).chat(ASK) for _ in features]
        return self.given.generate_texts(self.module, documents, self.tokenizer, 40, features=features)

    def report(self, out: Path) -> dict[str, dict]:
        """The rate of new renderings, blind and chance; then the language model is asked about those of
        words.png: first SHOWN at equal distances, then some of those that were not read right."""
        images, features, words, read = self.name_new(RENDERINGS)
        right = [a == b for a, b in zip(words, read)]
        blind = self.read(self.features(torch.zeros_like(self.pixels(images[:1])).to(self.given.device)))[0]
        V, K = len(self.read_ids), self.shape()[1]
        among = f"all {V:,} words" if K == 1 else f"{V:,} tokens for {K} places"
        scores = {"named": float(np.mean(right)), "blind": float(np.mean([w == blind for w in words])),
                  "chance": 1 / (V if K == 1 else len(self.words)), "words": len(self.words),
                  "pictures": len(words)}
        print(f"words    {len(words)} new renderings of training's pictures, {len(self.words)} names: "
              f"{100 * scores['named']:.1f} % are read as their own among {among}; blind "
              f"{100 * scores['blind']:.1f} %, chance {100 * scores['chance']:.3f} %")
        shown = [*range(0, len(words), RENDERINGS * -(-len(self.things.words) // SHOWN))]
        failed = [i for i, ok in enumerate(right) if not ok and i not in shown]
        failed = failed[::1 + len(failed) // SHOWN][:SHOWN]
        asked = shown + failed
        told = self.ask(features[asked])
        self.given.save_grid(out / "first.png", images[:1], 1, 1)               # for eval.py chat
        self.given.save_grid(out / "words.png", [images[i] for i in asked], SHOWN)
        lines = [dict(shows=words[i], read=read[i], right=right[i], told=text)
                 for i, text in zip(asked, told)]
        for i, line in enumerate(lines):
            title = ("asked" if i == 0 else "not read right" if i == len(shown) else "")
            verdict = "" if line["right"] else f" (it shows {line['shows']})"
            print(f"{title:15} ⟨picture⟩ → {line['read']}{verdict} → {line['told']}")
        return {"words.json": {"scores": scores, "asked": lines}}


RECIPES = {"word": Recipe(
    "a picture as a word: the bridge's one soft token becomes a row of the frozen embedding table",
    "named pictures; no paper's recipe", None, Numbers(2e-3, 32, 300, **MUON), "mapl", task="word",
    options=dict(reads=-2, constants=1, width=64, layers=1, heads=4), toy_data="emoji")}
