"""SimVLM (2108.10904v3): one objective, a prefix language model on pictures with captions and on plain text.

Document 4: the prefix sees itself in both directions and the rest is causal; patches come from the first
three blocks of a ResNet instead of a linear map; data are ALIGN's pairs and C4's texts. It draws one stack;
the paper has an encoder, which reads the prefix, and a decoder, which writes the rest.

    symbol   shape            here         meaning
    v        (B, P, D)        patches      of a picture; P = (S/16)², none for a text
    x        (B, P + T)       tokens       [v ; words ; end], or [begin ; words ; end] of a text
    T_p      (B,)             prefix       how many positions are given: all patches, some words
    m        (B, P+T, P+T)    mask         who sees whom, papers/masks.py
    k        (B,)             length       P + T without padding

    (V1)  v = Stem(pixels) + row + column
    (V2)  m(t, s) = [s < T_p or s ≤ t]
    (V3)  L = −Σ_{t ≥ T_p} log P(x_t | x_{[T_p, t)}, x_{<T_p})                            (paper: Eq. 3)
    (V4)  T_p ~ Uniform{P, …, k − 1} for a pair, Uniform{1, …, k − 1} for a text

A patch is never predicted, a word of the prefix neither. With T_p = P it is captioning; with T_p = 1 and no
picture it is a plain language model.

Paper and this file: nobody has released the paper's code. Here one stack under the mask (V2) takes the place
of encoder and decoder; who sees whom is equal, but the two share their weights. The paper's patches have
relative positions in two dimensions; here rows and columns are added and RoPE counts the row of tokens. Its
law of T_p is not in our sources beyond "at random"; (V4) is the usual reading. Its stem is three blocks of
ResNet-101, stride 16; ours is four convolutions of stride 2, each with a residual one behind it.

The point: pairs and texts are both needed; the convolutions beat linear patches (stem="linear"); a prefix
beats a plain causal mask (kind="causal"). The paper has VQA test-dev 80.0 and, tuned, COCO CIDEr 143.3 for
the largest; our sources have no numbers of its ablations.
"""
from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import to_pixels
from model import Decoder, DecoderConfig
from papers.choices import ChoiceTask
from papers.clip import text_tokens
from papers.masks import MaskedStream, stream_mask
from papers.recipe import MUON, Ingredients, Numbers, Recipe

STRIDE = 16                     # pixels from patch to patch


class Residual(nn.Module):
    """x + Conv ReLU Norm x, in the size of x."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(1, width), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv.weight)                # a token begins with its own cell alone

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(self.norm(x)))


def conv_stem(width: int) -> nn.Sequential:
    """(B, 3, S, S) → (B, width, S/16, S/16): four times half the size and twice the channels."""
    channels = [3, *(width // 2**n for n in (3, 2, 1, 0))]
    return nn.Sequential(*(layer for a, b in zip(channels, channels[1:])
                           for layer in (nn.Conv2d(a, b, 2, 2), Residual(b))))


class SimVLM(nn.Module):
    def __init__(self, config: DecoderConfig, image_size: int, stem: str = "conv"):
        super().__init__()
        stems = {"conv": conv_stem, "linear": lambda width: nn.Conv2d(3, width, STRIDE, STRIDE)}
        if stem not in stems or image_size % STRIDE:
            raise ValueError(f'a SimVLM has the stem conv or linear, not "{stem}", and reads pictures of a '
                             f"multiple of {STRIDE} pixels, not {image_size}.")
        self.stem, side = stems[stem](config.width), image_size // STRIDE
        self.rows, self.columns = (nn.Parameter(torch.randn(side, config.width) * 0.02) for _ in range(2))
        self.decoder, self.stream = Decoder(config).init_weights(), MaskedStream()

    def patches(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) → v (B, P, D), row by row."""
        x = self.stem(pixels).permute(0, 2, 3, 1) + self.rows[:, None] + self.columns           # (V1)
        return x.flatten(1, 2)

    def word_losses(self, tokens: Tensor, mask: Tensor, prefix: Tensor, patches: Tensor | None = None,
                    kind: str = "prefix") -> Tensor:
        """−log P of every word from T_p on, (B, T), 0 elsewhere.

        tokens (B, T), mask (B, T) bool with padding on the right, prefix (B,) = T_p, patches (B, P, D).
        kind: of papers/masks.py; "causal" is the plain language model, with the same words predicted.
        """
        P, embeds = 0 if patches is None else patches.shape[1], self.decoder.embed(tokens)
        if patches is not None:
            embeds, mask = torch.cat((patches, embeds), dim=1), F.pad(mask, (P, 0), value=True)
        image = F.pad(torch.zeros_like(tokens), (P, 0), value=1)
        sees = stream_mask(kind, image, mask.long(), prefix)                    # (V2)
        h = self.decoder.states(embeds=embeds, bridge=self.stream, visual=sees)[-1]
        t = torch.arange(mask.shape[1], device=tokens.device)
        learned = (mask & (t >= prefix[:, None]) & (t > 0))[:, -tokens.shape[1]:]           # (B, T)
        before = F.pad(h, (0, 0, 1, 0))[:, -tokens.shape[1] - 1:-1]             # one position earlier
        losses = torch.zeros(tokens.shape, device=tokens.device)
        words = F.cross_entropy(self.decoder.logits(before[learned]).float(), tokens[learned],
                                reduction="none")
        return losses.masked_scatter(learned, words)                            # (V3)

    @torch.no_grad()
    def generate(self, pixels: Tensor, max_new_tokens: int, stop: tuple[int, ...] = ()) -> Tensor:
        """Greedy captions (B, T_new): T_p = P."""
        v = self.patches(pixels)
        sees = torch.ones(len(v), v.shape[1], v.shape[1], dtype=torch.bool, device=v.device)
        return self.decoder.generate(embeds=v, max_new_tokens=max_new_tokens, stop=stop, bridge=self.stream,
                                     visual=sees)


HOW = dict(
    trained=("stem", "decoder"), one_file=True,
    data="4,096 of ALIGN's pairs and 512 of C4's texts per update",
    paper=Numbers(5e-4, 4096, 1_000_000, 0.02, "linear", 0.01, 0.999), toy=Numbers(2e-3, 32, 600, **MUON))
RECIPES = {
    "simvlm": Recipe("SimVLM (2108.10904v3 §3): a prefix language model on pairs and texts, from scratch",
                     task="simvlm", **HOW),
    "simvlm-causal": Recipe("SimVLM under a causal mask", task="simvlm-causal", **HOW),
    "simvlm-pairs": Recipe("SimVLM without texts", task="simvlm-pairs", **HOW),
    "simvlm-linear": Recipe("SimVLM with linear patches", task="simvlm-linear", **HOW)}


class SimvlmTask(ChoiceTask):
    """Recipe `simvlm`: (V3) on pairs and, one to eight of them, on texts. Takes world, tokenizer, batch."""
    stem, kind, texts = "conv", "prefix", 8             # one text per so many pairs; 0: none

    def __init__(self, given: Ingredients):
        self.given, self.world, self.tokenizer = given, given.world, given.tokenizer
        self.image_size = STRIDE * max(1, round(given.world.size / STRIDE))
        V = self.tokenizer.vocab_size
        config = DecoderConfig(V, width=128, layers=3, context=256)
        self.module = SimVLM(config, self.image_size, self.stem).to(given.device)
        self.P, self.expect = (self.image_size // STRIDE)**2, f"(a uniform guess: ln {V} = {math.log(V):.2f})"

    def piece(self, texts: list[str], rng: np.random.Generator, pictures: list | None = None) -> dict:
        """tokens, mask (B, T), prefix (B,), with pictures pixels; count: how many words are predicted."""
        t = self.tokenizer
        tokens = text_tokens(texts, t, 64, () if pictures else (t.bos,), pad=-1)
        mask, P = tokens >= 0, self.P if pictures else 0
        length = P + mask.sum(1)
        prefix = torch.tensor([int(rng.integers(P or 1, int(k))) for k in length])          # (V4)
        pixels = to_pixels(pictures, self.image_size, self.given.processor) if pictures else None
        return dict(tokens=tokens.clamp(min=0), mask=mask, prefix=prefix, pixels=pixels, set=0, weight=1.0,
                    count=int((length - prefix).sum()))

    def batch(self, step: int) -> list[dict]:
        g, rng = self.given, np.random.default_rng((self.given.seed, 1, step))
        pairs = [g.contrastive_pair(self.world, i)[:2] for i in g.indices(step)]
        pieces = [self.piece([text for _, text in pairs], rng, [image for image, _ in pairs])]
        if self.texts:                                  # of other items, whose pictures are not shown
            count = max(1, g.batch // self.texts)
            others = range(10**6 + step * count, 10**6 + (step + 1) * count)
            pieces.append(self.piece([g.contrastive_pair(self.world, i)[1] for i in others], rng))
        return pieces

    def loss(self, tokens: Tensor, mask: Tensor, prefix: Tensor, pixels: Tensor | None = None, count: int = 1,
             **_) -> Tensor:
        patches = None if pixels is None else self.module.patches(pixels)
        total = self.module.word_losses(tokens, mask, prefix, patches, self.kind).sum()
        self.last = {**self.last, "pairs" if pixels is not None else "texts": total / count}
        return total

    def scores(self, pixels: Tensor, texts: list[str]) -> dict[str, Tensor]:
        """Of n texts for one picture: their likelihoods, given the picture alone."""
        tokens = text_tokens(texts, self.tokenizer, 64, pad=-1).to(pixels.device)
        patches = self.module.patches(pixels).expand(len(texts), -1, -1)
        prefix = torch.full((len(texts),), self.P, device=pixels.device)
        losses = self.module.word_losses(tokens.clamp(min=0), tokens >= 0, prefix, patches, self.kind)
        return {"as caption": -losses.sum(1)}


TASKS = {"simvlm": SimvlmTask, "simvlm-causal": type("Causal", (SimvlmTask,), {"kind": "causal"}),
         "simvlm-pairs": type("PairsAlone", (SimvlmTask,), {"texts": 0}),
         "simvlm-linear": type("LinearPatches", (SimvlmTask,), {"stem": "linear"})}
