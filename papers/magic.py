"""MAGiC (2205.02655v2): a language model that cannot see writes, and CLIP steers each of its tokens.

Document 4 says: guided decoding by a CLIP score, without finetuning, decent among unsupervised methods, far
behind supervised ones. "Without finetuning" is half true. No part learns from pictures with captions, but
the language model is GPT-2 tuned on the CAPTIONS of the target set, with the contrastive term (MG4).

    symbol     shape      here          meaning
    V^(k)      (k,)       candidates    the k likeliest next tokens, the likeliest first
    p          (k,)       confidence    probability of each, of a softmax over the WHOLE vocabulary
    h          (·, D)     hidden        last hidden state, after the final norm; known: of all earlier
                                        positions, the prompt included, of length 1
    c          (k,)       match         e^s · cos(picture, text): CLIP's scaled similarity; e^s is about 100,
                                        so f is sharp
    f          (k,)       magic         which candidate fits the picture best, among the k alone
    x_t        ()         ids           the token that is written

    (MG1)  x_t = argmax_{v ∈ V^(k)} (1 − α) p(v | x_{<t}) − α max_{j<t} cos(h_v, h_j) + β f(v)
    (MG2)  f(v) = e^{c(v)} / Σ_{z ∈ V^(k)} e^{c(z)}
    (MG3)  c(v) = e^s cos(CLIP(picture), CLIP([written tokens : v]))        without the prompt
    (MG4)  L = −Σ log p  +  mean over i ≠ j of max(0, ρ − cos(h_i, h_i) + cos(h_i, h_j))            ρ = 0.5

α = β = 0 is greedy decoding, β = 0 is contrastive search, and k = 1 leaves nothing to choose. With
p = (.6, .3), penalties (.9, .5), c = (1, 2), α = .1 and β = 2 the scores are (.9879, 1.6821): the second
token is written though it is half as likely.

A step costs one forward of k rows, which share the past (`Cache.take` forks it), and a batch of k texts in
CLIP. The tokens are decoded and CLIP's own tokenizer reads the text, of the last 60 tokens at most.

Paper     COCO: k 45, α 0.1, β 2, 16 tokens with the start token; Flickr30k: k 25, 20 tokens; stories: k 5,
          α 0.6, β 0.15, 100 tokens; CLIP ViT-B/32. GPT-2: 20,000 steps of 128 captions, learning rate 2e-5.
          About 27 times as fast as the baseline that follows CLIP's gradient (abstract). On the 100 COCO
          pictures of Socratic Models: CIDEr 56.2, BLEU-4 11.4.
Slips     The published loop catches every error, so a picture that fails leaves the score; here it raises.
Claim     A decoder tuned on the captions of a world, and CLIP of that world; β in {0, 0.5, 2}.
          β > 0 recalls far more attributes than β = 0, which is blind, and far fewer than a trained linear
          bridge. The toy's decoder (recipe lm-prompts) is tuned without (MG4). python eval.py claims magic
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import CAPTION, Document, Item
from model import Cache, Decoder

LONGEST = 60                    # tokens of a text that CLIP is given, the last ones


class Step(NamedTuple):
    """The terms of (MG1) for the k candidates of one token."""
    candidates: Tensor          # (k,) int64
    confidence: Tensor          # (k,)
    penalty: Tensor             # (k,)
    magic: Tensor               # (k,)
    score: Tensor               # (k,)


@dataclass(frozen=True)
class Settings:
    """Of the search; the defaults are the paper's on COCO."""
    k: int = 45                 # candidates
    alpha: float = 0.1          # α: weight of the penalty on repetition, and what p loses
    beta: float = 2.0           # β: weight of the picture
    steps: int = 15             # new tokens at most; the paper's 16 count the start token

    def __post_init__(self):
        if self.k < 1 or self.steps < 1:
            raise ValueError(f"k is {self.k}, steps {self.steps}; the search needs a candidate and a token.")
        if not (0 <= self.alpha <= 1 and 0 <= self.beta < math.inf):
            raise ValueError(f"alpha is {self.alpha}, beta {self.beta}; give an alpha from 0 to 1 and a "
                             "finite beta from 0.")


def magic_score(confidence: Tensor, penalty: Tensor, match: Tensor, alpha: float,
                beta: float) -> tuple[Tensor, Tensor]:
    """f and the score that is maximised, (k,) each."""
    magic = match.softmax(0)                                                                    # (MG2)
    return magic, (1 - alpha) * confidence - alpha * penalty + beta * magic                     # (MG1)


@torch.no_grad()
def magic_search(decoder: Decoder, prompt: Tensor, match: Callable[[Tensor], Tensor],
                 settings: Settings = Settings(), stop: tuple[int, ...] = ()) -> tuple[Tensor, list[Step]]:
    """The new tokens (T_new,) after prompt (1, T), up to a stop id, and the terms of each.

    match(ids (k, n)) → (k,): CLIP's scaled similarity of the picture with each of k continuations, which do
    not hold the prompt. Where β = 0 it is not called, and f is 1/k.
    """
    config, steps = decoder.config, settings.steps
    k = min(settings.k, config.vocab_size)
    if not 0 < prompt.shape[1] <= config.context - steps:
        raise ValueError(f"a prompt of {prompt.shape[1]} tokens and {steps} new ones do not fit this "
                         f"decoder, which reads 1 to {config.context}.")
    weight = decoder.embed.weight
    cache = Cache(config, 1, prompt.shape[1] + steps, weight.device, weight.dtype)
    hidden = decoder.states(prompt, cache=cache)[-1][0]                                         # (T, D)
    known, written, trace = F.normalize(hidden.float(), dim=-1), prompt.new_zeros(0), []
    rows = prompt.new_zeros(k)                  # the one row of the past serves all k candidates
    for _ in range(steps):
        p = decoder.head(hidden[-1]).float().softmax(-1)                                        # (V,)
        confidence, candidates = p.topk(k)
        cache.take(rows)
        states = decoder.states(candidates[:, None], cache=cache)[-1][:, 0]                     # (k, D)
        directions = F.normalize(states.float(), dim=-1)
        penalty = (directions @ known.T).amax(1)                # (k,)  largest cosine with an earlier state
        texts = torch.cat((written.expand(k, -1), candidates[:, None]), dim=1)                  # (k, n)
        similarity = match(texts).float() if settings.beta else torch.zeros_like(penalty)       # (MG3)
        magic, score = magic_score(confidence, penalty, similarity, settings.alpha, settings.beta)
        trace.append(Step(candidates, confidence, penalty, magic, score))
        best = score.argmax()
        hidden, written = states[best][None], texts[best]
        known, rows = torch.cat((known, directions[best][None])), best.expand(k)
        if written[-1] in stop:
            break
    return written, trace


def contrastive_loss(hidden: Tensor, real: Tensor | None = None, margin: float = 0.5) -> Tensor:
    """The second term of (MG4): states of a text that are alike cost, so that (MG1)'s penalty can tell.

    hidden (B, T, D): last states; real (B, T) bool, False = padding. The mean runs over all pairs of
    different real positions of a text, of all texts; it is 0 where there is no pair.
    """
    B, T = hidden.shape[:2]
    real = torch.ones(B, T, dtype=torch.bool, device=hidden.device) if real is None else real
    directions = F.normalize(hidden, dim=-1)
    s = directions @ directions.transpose(1, 2)                                                 # (B, T, T)
    pairs = real[:, :, None] & real[:, None] & ~torch.eye(T, dtype=torch.bool, device=hidden.device)
    cost = (margin - s.diagonal(dim1=1, dim2=2)[..., None] + s).clamp_min(0)                    # (MG4)
    return (cost * pairs).sum() / pairs.sum().clamp_min(1)


@dataclass
class MAGiC:
    """Captions pictures with a decoder that cannot see: one text per item."""
    decoder: Decoder                                        # tuned on captions
    tokenizer: object                                       # the decoder's
    embed_images: Callable[[list[Item]], Tensor]            # → (B, De), of length 1
    embed_texts: Callable[[list[str]], Tensor]              # → (k, De), of length 1
    scale: float = 100.0                                    # CLIP's e^s
    settings: Settings = Settings()
    prompt: str = CAPTION                                   # what stands ahead of the caption

    def answer(self, items: list[Item]) -> list[str]:
        if not items:
            return []
        ids = Document(self.tokenizer).add(self.prompt).tokens
        prompt = torch.tensor([ids], device=self.decoder.embed.weight.device)                   # (1, T)
        return [self.caption(prompt, picture) for picture in self.embed_images(items)]

    def caption(self, prompt: Tensor, picture: Tensor) -> str:
        """picture (De,)."""
        def match(ids: Tensor) -> Tensor:
            texts = [self.tokenizer.decode(row) for row in ids[:, -LONGEST:].tolist()]
            return self.scale * self.embed_texts(texts) @ picture                               # (MG3)
        ids, _ = magic_search(self.decoder, prompt, match, self.settings, self.tokenizer.stop)
        return self.tokenizer.answer_text(ids)
