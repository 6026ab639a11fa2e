"""What the readers of pictures and captions share: BERT's parts (1810.04805v2), masked words, swapped pairs.

    symbol   shape        here        meaning
    y        (B, T)       tokens      ids of [CLS] words [SEP], padding behind them
    E        (V, D)       words       word embeddings, again the output matrix of the head
    m        (B, T)       labels      the ids that stood at the chosen places, IGNORE elsewhere

    (W1)  x = LN(E_y + position + segment)
    (W2)  x ← LN(x + MHA(x, x, x));   x ← LN(x + W_2 GELU(W_1 x))
    (W3)  logits = E LN GELU(W h + b) + c
    (W4)  every word is chosen with probability 0.15; 80 % of the chosen become [MASK], 10 % a random word,
          10 % stay
    (W5)  L_mlm = −mean over the chosen of log softmax(logits)_m
    (W6)  pair i is (text i, picture i) with probability ½, else (text i, picture j), j ≠ i drawn evenly

BERT draws the share of a whole sequence, and in every sequence at least one word; here a batch may have texts
without a masked word, and (W5) divides by what the batch has.
"""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from bridges import PostNormAttention, PostNormMLP
from model import IGNORE
from papers.recipe import Ingredients, Task

SPECIAL = 3                     # ids behind the tokenizer's own: [CLS], [SEP], [MASK]


def embedding(rows: int, width: int) -> nn.Embedding:
    """As BERT starts: N(0, 0.02)."""
    return nn.Embedding.from_pretrained(0.02 * torch.randn(rows, width), freeze=False)


class WordEmbedding(nn.Module):
    """Words, positions, segments and the norm of their sum."""

    def __init__(self, vocab_size: int, width: int, positions: int = 512, segments: int = 2):
        super().__init__()
        self.words = embedding(vocab_size, width)
        self.positions, self.segments = embedding(positions, width), embedding(segments, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def sum(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """(B, T) ids, and (B, T) which sentence each belongs to (None: all to the first) → (B, T, D)."""
        T, longest = tokens.shape[1], len(self.positions.weight)
        if T > longest:
            raise ValueError(f"a text of {T} tokens is longer than the {longest} positions; cut it.")
        segments = torch.zeros_like(tokens) if segments is None else segments
        return self.words(tokens) + self.positions.weight[:T] + self.segments(segments)

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        return self.norm(self.sum(tokens, segments))                            # (W1)


class BertLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.attention = PostNormAttention(width, width, heads, dropout)
        self.mlp = PostNormMLP(width, hidden, dropout)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.mlp(self.attention(x, x, bias))                             # (W2)


class WordHead(nn.Module):
    """BERT's head for words: the output matrix is the word embeddings, which stay with their owner."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.map, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab_size))                       # c

    def forward(self, h: Tensor, words: Tensor) -> Tensor:
        """(B, T, D) → (B, T, V)."""
        return F.linear(self.norm(F.gelu(self.map(h))), words, self.bias)       # (W3)


@torch.no_grad()
def init_bert(module: nn.Module, std: float = 0.02) -> None:
    """Matrices N(0, std²), biases 0; norms begin at 1.

    BERT's 0.02 is for a width of 768. An output is std √D times as large as its input, so 0.02 at D = 128 is
    two and a half times smaller in every layer. FLAVA's toy would then stay at ln B in its contrast, for all
    pictures have nearly one vector; it and ALBEF's begin at 1/√D.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.copy_(std * torch.randn_like(part.weight))
            nn.init.zeros_(part.bias)


def mask_words(tokens: Tensor, may: Tensor, mask_id: int, vocab_size: int,
               generator: torch.Generator | None = None, share: float = 0.15,
               word: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """tokens (B, T) → the masked ids and the labels, both (B, T).

    may (B, T) bool: what can be chosen, so no special token and no padding. A random word is one of the ids
    0 … vocab_size − 1. word (B, T) int64, the place where each token's word begins: a word of several
    tokens is then chosen as a whole, and each of them becomes [MASK], random, or stays on its own.
    """
    choice, how = (torch.rand(tokens.shape, generator=generator, device=tokens.device) for _ in range(2))
    if word is not None:
        choice = choice.gather(1, word)                     # one draw per word
    chosen = may & (choice < share)
    random = torch.randint(vocab_size, tokens.shape, generator=generator, device=tokens.device)
    masked = torch.where(chosen & (how < 0.8), mask_id, tokens)
    masked = torch.where(chosen & (how >= 0.9), random, masked)                 # (W4)
    return masked, tokens.masked_fill(~chosen, IGNORE)


def word_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """(W5): (…, V), (…) → the mean over the places with a label; 0 where there is none."""
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


def swap_pairs(B: int, generator: torch.Generator | None = None, share: float = 0.5) -> Tensor:
    """(B,) int64: the row that each row is paired with, its own or, for a `share` of them, another."""
    own = torch.arange(B)
    other = (own + torch.randint(1, max(B, 2), (B,), generator=generator)) % B
    return torch.where(torch.rand(B, generator=generator) < share, other, own)              # (W6)


class PairsTask(Task):
    """Pictures with captions. A paper's task makes `module`, with its parts as children, and defines loss,

        word_logits(pixels, tokens, mask)   (B, T, V)
        match_scores(piece)                 (B,) log-odds that the pairs of (W6) belong together

    Takes everything but decoder and bridge. Behind the tokenizer's words stand [CLS], [SEP], [MASK].
    """
    context = 64                    # longest text in tokens

    def __init__(self, given: Ingredients):
        self.given, self.world, self.tokenizer = given, given.world, given.tokenizer
        self.words = self.tokenizer.vocab_size              # ids of words; the special ones follow
        self.vocab_size = V = self.words + SPECIAL
        self.cls, self.sep, self.mask_id = range(self.words, V)
        self.expect = f"(uniform guesses of words and pairs: ln {V} + ln 2 = {math.log(2 * V):.2f})"

    def cells(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, R, Di): the regions, of the ViT, which is frozen."""
        vit = self.module["vit"]
        return vit.features(pixels.to(next(vit.parameters()).dtype))

    def rows(self, captions: list[list[str]], other: Tensor | None) -> list[list[int]]:
        """The ids of each text, out of the captions of every item in random order; other None: no pairs."""
        return [[self.cls, *self.tokenizer.encode(own[0])[:self.context - 2], self.sep] for own in captions]

    def piece(self, items: list[data.Item], seed: tuple[int, ...], paired: bool = True) -> dict:
        """pixels (B, 3, S, S) · tokens, masked, labels (B, T) · mask (B, T) bool · other (B,) of (W6)."""
        rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        other = swap_pairs(len(items), generator)
        captions = [[item.captions[i] for i in rng.permutation(len(item.captions))] for item in items]
        rows = [torch.tensor(row) for row in self.rows(captions, other if paired else None)]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.sep)
        mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        masked, labels = mask_words(tokens, tokens < self.words, self.mask_id, self.words, generator)
        size = self.given.vit.config.image_size
        pixels = data.to_pixels([item.image for item in items], size, self.given.processor)
        return dict(pixels=pixels, tokens=tokens, mask=mask, masked=masked, labels=labels, other=other)

    def batch(self, step: int) -> list[dict]:
        items = [self.world.item(i) for i in self.given.indices(step)]
        return [self.piece(items, (self.given.seed, 1, step)) | dict(set=0, weight=1.0, count=1)]

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Shares of masked words named right, with their picture and with another; of pairs judged right."""
        g, right = self.given, {"words": [], "words, another picture": [], "pairs": []}
        items = [item for item in g.take_items(g.open_held_out(), g.eval_items) if item.captions]
        for n in range(0, len(items), 100):
            words, pairs = (self.to_device([self.piece(items[n:n + 100], (g.seed, 2, n), paired)])[0]
                            for paired in (False, True))
            chosen = words["labels"] != IGNORE
            for shift, key in enumerate(("words", "words, another picture")):
                pixels = words["pixels"].roll(shift, 0)
                found = self.word_logits(pixels, words["masked"], words["mask"]).argmax(-1)
                right[key] += (found == words["labels"])[chosen].tolist()
            own = pairs["other"] == torch.arange(len(pairs["other"]), device=g.device)
            right["pairs"] += ((self.match_scores(pairs) > 0) == own).tolist()
        return {key: float(np.mean(value or [0.0])) for key, value in right.items()}

    def report(self, out: Path) -> dict[str, dict]:
        result, split = self.check(), self.given.name_split(self.given.open_held_out())
        own, another, pairs, *more = (f"{100 * value:.0f} %" for value in result.values())
        print(f"words    masked ones, {split}: {own} right, {another} beside another picture\n"
              f"pairs    {pairs} judged right, as belonging together or not; chance is 50 %")
        for what, share in zip([*result][3:], more):                            # what a paper adds in `check`
            print(f"also     {share} {what}")
        return {"results.json": result}
