"""BLIP-2's first stage (2301.12597v3, §3.2): `python train.py --recipe blip2-1`, or blip2 for both stages."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from bridges import QFormer
from model import IGNORE, ViT
from papers.contrasts import clip_loss, hard_negatives, recall_at_1, mean_count
from papers.recipe import Ingredients, Numbers, Recipe, Task


class Stage1(nn.Module):
    """BLIP-2's first stage (2301.12597v3, §3.2, Figure 2): three tasks for the Q-Former beside a frozen ViT.

    symbol        shape                here                   meaning
    q(I), t(I)    (B, Q, W), (B, T, W) encode                 query and text states
    W_v, W_t      (256, W)             image_head, text_head  into the space of the contrast
    τ             ()                   temperature            0.07 at the start, learned; it divides
    W_itm         (2, W)               match_head             class 1 = the pair matches
    W_lm          (V, W)               word_matrix            the word embeddings (tied=False: its own)
    I⁻, Y⁻        (B,)                 wrong                  another text's image, another image's text

    (S1)  s(I, Y) = max_q cos(W_v q(I), W_t t(Y)_[CLS]) / τ       ITC: the two do not see each other
    (S2)  m(I, Y) = mean_q W_itm q(I, Y)                          ITM: everything sees everything
    (S3)  p(y_t | y_<t, I) = softmax(W_lm LN GELU(W t(I, Y)_{t-1}))   ITG: the text begins with [DEC]
    (S4)  I⁻ ~ softmax_I s(I, Y),  Y⁻ ~ softmax_Y s(I, Y)         hard negatives of the batch, no own pair
    (S5)  L_itc = ½ CE(s, own) + ½ CE(sᵀ, own)                    mean over the B rows, labels smoothed by 0.1
    (S6)  L_itm = CE(m, 1 for (I, Y), 0 for (I⁻, Y) and (I, Y⁻))  mean over the 3B pairs
    (S7)  L_itg = −log p(y_t | y_<t, I)                           mean over real words, labels smoothed by 0.1

    Their unweighted sum is the loss. `image` is pixels (B, 3, S, S) or features (B, N, Di); `tokens` (B, T)
    are BERT's WordPieces from [CLS] on; `mask` (B, T) bool, False = padding. As the authors do, (S4) and (S5)
    read the rows of all processes. full=False: without τ and W_lm, all that transformers keeps.
    """

    def __init__(self, vit: ViT | None, qformer: QFormer, contrast: int = 256, full: bool = True,
                 tied: bool = True, dec: int | None = None):
        super().__init__()
        vocab, width = qformer.words.weight.shape
        self.vit, self.qformer, self.full = vit, qformer, full
        self.dec = vocab - 1 if dec is None else dec    # id of [DEC], the one word that BERT does not have
        self.image_head, self.text_head = nn.Linear(width, contrast), nn.Linear(width, contrast)
        self.match_head = nn.Linear(width, 2)
        if full:
            self.temperature = nn.Parameter(torch.tensor(0.07))
            self.word_head, self.word_norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
            self.word_bias = nn.Parameter(torch.zeros(vocab))
        self.word_matrix = None if tied or not full else nn.Embedding(vocab, width)

    def features(self, image: Tensor) -> Tensor:
        """Pixels, or features, which pass → (B, N, Di)."""
        if image.ndim == 3:
            return image
        if self.vit is None:
            raise ValueError("this first stage came without its ViT; give features, or name a folder as "
                             '"vit" in its config.json.')
        return self.vit.features(image, self.qformer.reads, self.qformer.reads_cls)

    def encode(self, image: Tensor, tokens: Tensor | None = None, kind: str = "itm",
               mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Query states (B, Q, W) and text states (B, T, W); kind: itm | itg | itc, see `qformer_mask`."""
        hidden = self.qformer.encode(self.qformer.vision_norm(self.features(image)), tokens, kind, mask)[-1]
        return hidden.tensor_split([len(self.qformer.queries)], dim=1)

    def itc(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B_images, B_texts) similarities (S1); there need not be as many texts as images."""
        return self.similarities(*self.embed(image, tokens, mask))

    def embed(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries f (B_images, Q, 256) and texts g (B_texts, 256), of length 1."""
        f, g = self.encode(image)[0], self.qformer.encode(None, tokens, "itc", mask)[-1][:, 0]
        return F.normalize(self.image_head(f), dim=-1), F.normalize(self.text_head(g), dim=-1)

    def similarities(self, f: Tensor, g: Tensor) -> Tensor:
        cosine = torch.einsum("iqe,te->itq", f, g).amax(-1)
        return cosine / self.temperature if self.full else cosine               # (S1)

    def itm(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, 2): logits of "does not match" and "matches" for image i and text i."""
        return self.match_head(self.encode(image, tokens, "itm", mask)[0]).mean(1)          # (S2)

    def itg(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, V): logits of the word after each word; tokens[:, 0] is replaced by [DEC]."""
        if not self.full:
            raise ValueError("this first stage has no captioning head (transformers does not keep it); "
                             "load the authors' file.")
        tokens = torch.cat((torch.full_like(tokens[:, :1], self.dec), tokens[:, 1:]), dim=1)
        t = self.word_norm(F.gelu(self.word_head(self.encode(image, tokens, "itg", mask)[1])))
        return F.linear(t, (self.word_matrix or self.qformer.words).weight, self.word_bias)             # (S3)

    @torch.no_grad()
    def generate(self, image: Tensor, max_new_tokens: int = 30, stop: tuple[int, ...] = ()) -> Tensor:
        """Its own captions, greedy: (B, T_new) ids after [DEC]; a row repeats the stop id that ended it."""
        image = self.features(image)
        text = torch.full((len(image), 1), self.dec, device=image.device)
        stops = torch.tensor(stop, dtype=torch.long, device=image.device)
        while text.shape[1] <= max_new_tokens and not bool(torch.isin(text[:, 1:], stops).any(1).all()):
            word, last = self.itg(image, text)[:, -1].argmax(-1), text[:, -1]   # (B,)
            text = torch.cat((text, torch.where(torch.isin(last, stops), last, word)[:, None]), dim=1)
        return text[:, 1:]

    def losses(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None,
               generator: torch.Generator | None = None, wrong: tuple[Tensor, Tensor] | None = None,
               gather: Callable[[Tensor], Tensor] = lambda x: x, number: int = 0) -> dict[str, Tensor]:
        """{"itc", "itm", "itg"}: the means of (S5) to (S7) over B >= 2 pairs (image i, text i).

        wrong = (the image shown with text i, the text shown with image i), (B,) each, fixes the negatives.
        Without it `generator` draws them. These pairs may be part `number` of B pairs, see Ingredients.
        """
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        image = self.features(image)
        s = self.similarities(*map(gather, self.embed(image, tokens, mask)))    # (B images, B texts)
        if len(s) < 2:
            raise ValueError("the first stage contrasts: a batch needs 2 pairs or more, this one has 1.")
        itc = clip_loss(s, smoothing=0.1)                                       # (S5)
        if wrong is None:
            wrong = [hard_negatives(p, gather, generator) for p in (s.T, s)]    # (S4)
        own = torch.arange(len(tokens), device=tokens.device) + number * len(tokens)
        i, y = torch.cat((own, wrong[0][own], own)), torch.cat((own, own, wrong[1][own]))   # 3 per pair
        pairs = gather(image)[i], gather(tokens)[y], gather(mask)[y]
        itm = F.cross_entropy(self.itm(*pairs), (i == y).long())                # (S6)
        target = tokens.masked_fill(~mask, IGNORE)[:, 1:]
        logits = self.itg(image, tokens, mask)[:, :-1]                          # (·, T − 1, V)
        itg = F.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=0.1)      # (S7)
        n = (target != IGNORE).sum()
        return {"itc": itc, "itm": itm, "itg": itg * (n / mean_count(n, gather))}


RECIPES = {"blip2-1": Recipe(
    "BLIP-2 stage 1 (§3.2): ITC + ITM + ITG, no decoder", "129M pairs",
    Numbers(1e-4, 2320, 250000, 2000, weight_decay=0.05, clip=0), Numbers(1e-3, 64, 600), "qformer",
    task="stage1",
    options=dict(reads=-2, queries=16, width=128, layers=2, heads=4, hidden=512, dropout=0.0))}


class Stage1Task(Task):
    """Recipe `blip2-1`: ITC + ITM + ITG of a Q-Former on the frozen ViT, without any decoder.

    Takes world, open_held_out, take_items, name_split, tokenizer, processor, vit, bridge (a Q-Former with
    words), batch and seed.
    """
    splits = True

    def __init__(self, given: Ingredients):
        self.given, self.world, self.tokenizer = given, given.world, given.tokenizer
        width = min(256, given.bridge.queries.shape[1])
        self.module = Stage1(given.vit, given.bridge, width, dec=self.tokenizer.image).to(given.device)
        given.begin(self.module)
        guess = math.log(given.batch) + math.log(2) + math.log(self.tokenizer.vocab_size)
        self.expect = f"(uniform guesses: ITC ln {given.batch} + ITM ln 2 + ITG ln V = {guess:.2f})"

    def freeze(self, trained: tuple[str, ...], stored: torch.dtype) -> None:
        super().freeze(tuple(n for n, _ in self.module.named_children() if n != "vit"), stored)

    def texts(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(B, T) ids from [CLS] (the tokenizer's bos) to its eos, and the mask."""
        return data.collate([data.Document(self.tokenizer).add(c).end() for c in captions])[::2]

    def pixels(self, items: list[data.Item]) -> Tensor:
        images, size = [item.image for item in items], self.module.vit.config.image_size
        return data.to_pixels(images, size, self.given.processor)               # (B, 3, S, S)

    def batch(self, step: int) -> list[dict]:
        g = self.given
        items = [self.world.item(i) for i in g.indices(step)]
        captions = [item.captions[np.random.default_rng((g.seed, 1, step, n)).integers(len(item.captions))]
                    for n, item in enumerate(items, g.part[0] * len(items))]
        tokens, mask = self.texts(captions)
        return [dict(pixels=self.pixels(items), tokens=tokens, mask=mask, set=0, weight=1.0, count=1)]

    def loss(self, pixels: Tensor, tokens: Tensor, mask: Tensor, **_) -> Tensor:
        with torch.no_grad():
            features = self.module.features(pixels.to(next(self.module.vit.parameters()).dtype))
        g = self.given
        self.last = self.module.losses(features, tokens, mask, gather=g.gather, number=g.part[0])
        return sum(self.last.values())

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Recall@1 of n <= 100 held-out pictures and captions, both ways, by ITC; equal captions are one."""
        g, device = self.given, self.given.device
        items = [item for item in g.take_items(g.open_held_out(), 100) if item.captions]
        captions = [item.captions[0] for item in items]
        S = self.module.itc(self.pixels(items).to(device), *(x.to(device) for x in self.texts(captions)))
        own = torch.tensor([[a == b for b in captions] for a in captions], device=S.device)
        return recall_at_1(S, own)

    def report(self, out: Path) -> dict[str, dict]:
        result, split = self.check(), self.given.name_split(self.given.open_held_out())
        scores = "  ".join(f"{k} {100 * v:.0f}" for k, v in result.items())
        print(f"retrieve up to 100 {split} pictures and captions, %: {scores}")
        return {"results.json": result}
