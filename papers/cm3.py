"""CM3 (2201.07520v1): a causal language model that can fill a gap, in a text or in a picture.

Documents 3 and 4: spans of a document are cut out, <mask> stands in their place, and they are generated
at the end: of the document, not of the sentence. A picture is 256 codes of a VQ-GAN, written as text into
the src of an <img>; so one decoder writes captions, draws pictures, and fills gaps in either.

    symbol   shape     here       meaning
    d        (s,)      tokens     a document
    n        ()        spans      how many spans are cut out
    a, b     (n,)      spans      where each starts and where it ends, b itself left out
    <k>      ()        masks      the sentinel of span k

    (K2)  n ~ min(max(Poisson(1), 1), 16)
    (K3)  (a, b) = sorted uniforms · s, a rounded down, b to the nearest; spans do not overlap
    (K4)  d_0 … <0> … <1> … d_s   <0> span_0 end   <1> span_1 end
    (K5)  L = −Σ_t log P(x_t | x_<t) over the sequence (K4), the sentinels left out

The decoder stays causal: the order alone lets a span see both of its sides (papers/masks.py: "cm3"). The
price is a shuffled text. To fill a gap, give `prefix <0> suffix <0>` and read on up to the end mark.

Paper and code (metaseq): in the code an end mark, one for all, follows each span; the paper has one
behind the last. The code cuts spans out of a packed block of documents, so a long tail may be lost,
allows no span at all, and weighs all tokens alike; (K2) and (K5) are the paper's. A span may cover next
to nothing or all, a third on average. The paper's positions are sinusoidal; here RoPE counts the sequence
(K4).

In miniature a picture is 9 codes, one for each cell of a scene: a perfect tokenizer in the place of the
VQ-GAN (papers/vq.py is one). The document is the picture, then its caption, so that a code in the middle
of the picture is told only by what stands behind it. The code of a thing is then filled in from both sides,
guessed from the left side alone, and a whole picture is drawn from its caption.
"""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import SEEN, SIZES, Shapes, Thing, caption_scene
from model import IGNORE, Decoder, DecoderConfig, next_token_loss
from papers.recipe import Ingredients, Numbers, Recipe, Task

Spans = list[tuple[int, int]]


def draw_spans(length: int, rng: np.random.Generator, expected: float = 1.0, most: int = 16) -> Spans:
    """Spans [a, b) of a document of this length, from left to right; one that overlaps is not kept."""
    spans: Spans = []
    for _ in range(min(max(int(rng.poisson(expected)), 1), most)):              # (K2)
        low, high = sorted(rng.random(2) * length)
        a, b = int(low), int(high + 0.5)                                        # (K3)
        if a < b and all(b <= other or end <= a for other, end in spans):
            spans.append((a, b))
    return sorted(spans)


def infill(tokens: list[int], spans: Spans, masks: list[int], end: int) -> tuple[list[int], list[int]]:
    """(the document with a sentinel in the place of each span, the spans behind their sentinels)."""
    if len(spans) > len(masks):
        raise ValueError(f"{len(spans)} spans need as many sentinels; there are {len(masks)}.")
    document, tail, at = [], [], 0
    for (a, b), mask in zip(spans, masks):
        document += [*tokens[at:a], mask]
        tail += [mask, *tokens[a:b], end]
        at = b
    return document + tokens[at:], tail                                         # (K4)


def places(length: int, spans: Spans) -> Tensor:
    """(length,) int64: where the infilled sequence has each token of the document."""
    document, tail = infill([*range(length)], spans, [-1] * len(spans), -1)
    return torch.tensor(document + tail).argsort(stable=True)[-length:]


def learned(sequence: list[int], masks: list[int]) -> list[int]:
    """The labels of an infilled sequence: its tokens, IGNORE for a sentinel."""
    return [IGNORE if token in masks else token for token in sequence]          # (K5)


HOW = dict(trained=("decoder",), one_file=True,
           data="61M documents, 223B tokens; the learning rate is not in our sources", paper=None,
           toy=Numbers(2e-3, 32, 700, beta2=0.98, weight_decay=0.05))
RECIPES = {
    "cm3": Recipe("CM3 (2201.07520v1 §2): a decoder learns from documents with spans moved to the end",
                  task="cm3", **HOW),
    "cm3-causal": Recipe("CM3 without spans: a plain language model", task="cm3-causal", **HOW)}


class Cm3Task(Task):
    """Recipe `cm3`: (K5) on scenes as 9 codes and a caption. Takes world (shapes), tokenizer and batch."""
    causal = False                  # True: no spans, a plain language model

    def __init__(self, given: Ingredients):
        self.given, self.world, self.tokenizer = given, given.world, given.tokenizer
        self.things = [(color, shape, size) for color, shape in SEEN for size in SIZES]
        self.first = self.tokenizer.vocab_size                          # the code of an empty cell
        codes = self.first + 1 + len(self.things)                       # behind the words
        self.masks, self.end = [*range(codes, codes + 16)], codes + 16
        decoder = Decoder(DecoderConfig(codes + 17, layers=3, context=256)).init_weights()
        self.module = nn.ModuleDict({"decoder": decoder}).to(given.device)
        self.expect = f"(a uniform guess: ln {codes + 17} = {math.log(codes + 17):.2f})"

    def document(self, things: list[Thing]) -> list[int]:
        """9 codes, begin, the words of the caption, its end."""
        codes = [self.first] * 9
        for t in things:
            codes[t.cell] += 1 + self.things.index((t.color, t.shape, t.size))
        t = self.tokenizer
        return [*codes, t.bos, *t.encode(caption_scene(sorted(things, key=lambda t: t.cell))), t.eos]

    def batch(self, step: int) -> list[dict]:
        rows = []
        for i in self.given.indices(step):
            rng = self.world.rng(i)
            tokens = self.document(self.world.scene(rng))
            spans = [] if self.causal else draw_spans(len(tokens), rng)
            document, tail = infill(tokens, spans, self.masks, self.end)
            rows.append(torch.tensor(document + tail))
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.masks[0])
        labels = torch.tensor([learned(row, self.masks) for row in tokens.tolist()])
        count = int((labels[:, 1:] != IGNORE).sum())
        return [dict(tokens=tokens, labels=labels, set=0, weight=1.0, count=count)]

    def loss(self, tokens: Tensor, labels: Tensor, **_) -> Tensor:
        total, count = next_token_loss(self.module["decoder"], labels, tokens=tokens)
        self.last = {"words and codes": total / count}
        return total

    @torch.no_grad()
    def measure(self, count: int) -> dict[str, float]:
        """Of things in scenes that were not seen in training (split val): shares of codes named right, and
        −log P of a code behind those to its left, in nats.

        Both sides and the left side name the likeliest of the codes of things; an empty cell, which is more
        common than any of them, would win on the left side.
        """
        world, rng = Shapes("val", self.given.seed), np.random.default_rng((self.given.seed, 3))
        right: dict[str, list[bool]] = {"from both sides": [], "from the left": [], "from the caption": []}
        losses, codes = [], slice(self.first + 1, self.masks[0])
        for i in range(count):
            things = world.scene(world.rng(i))
            tokens = self.document(things)
            document, tail = infill(tokens, [(0, 9)], self.masks, self.end)
            drawn = self.next(document + tail[:1], 9)
            right["from the caption"] += [drawn[t.cell] == tail[1 + t.cell] for t in things]
            cells = [t.cell for t in things if t.cell]                  # the first has nothing to its left
            if cells:
                cell = int(rng.choice(cells))
                document, tail = infill(tokens, [(cell, cell + 1)], self.masks, self.end)
                both, left = self.log_probs(document + tail[:1]), self.log_probs(tokens[:cell])
                for name, p in (("from both sides", both), ("from the left", left)):
                    right[name].append(codes.start + int(p[codes].argmax()) == tokens[cell])
                losses.append(-left[tokens[cell]].item())
        found = {name: float(np.mean(hits or [False])) for name, hits in right.items()}
        found["chance"], found["loss from the left"] = 1 / len(self.things), float(np.mean(losses or [0.0]))
        return found

    def log_probs(self, prompt: list[int]) -> Tensor:
        """(V,) of the next token."""
        tokens = torch.tensor([prompt], device=self.given.device)
        return self.module["decoder"](tokens)[0, -1].float().log_softmax(-1)

    def next(self, prompt: list[int], count: int) -> list[int]:
        """The likeliest next tokens, one after the other."""
        tokens = torch.tensor([prompt], device=self.given.device)
        return self.module["decoder"].generate(tokens, count)[0].tolist()

    def check(self) -> dict[str, float]:
        return {name: value for name, value in self.measure(100).items() if "loss" not in name}

    def report(self, out: Path) -> dict[str, dict]:
        result = self.measure(self.given.eval_items)
        *shares, (_, loss) = result.items()
        scores = "  ".join(f"{name} {100 * share:.1f}" for name, share in shares)
        print(f"codes of things in new scenes, % right: {scores};  loss from the left {loss:.2f} nats")
        return {"results.json": result}


TASKS = {"cm3": Cm3Task, "cm3-causal": type("Causal", (Cm3Task,), {"causal": True})}
