"""plumbing/stream.py: an answer while it is written, and a cache that outlives it.

`Decoder.generate` returns when all rows have stopped. A conversation has one row, shows each word as it
comes, and goes on with a text that has grown: what the decoder has read of it stays in the cache.
"""
from __future__ import annotations

from typing import Iterator

import torch
from torch import Tensor

from model import Cache, Decoder, sample


class Reader:
    """One row that a decoder reads and continues, turn by turn.

    cache, held: the keys and values of what it has read, and the embeddings (1, S, D) that they are of. A
    forward that is interrupted leaves nothing of both.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.forget()

    def forget(self) -> None:
        """Read everything again: another picture, or another conversation."""
        self.cache: Cache | None = None
        self.held: Tensor | None = None

    @torch.no_grad()
    def stream(self, embeds: Tensor, max_new_tokens: int, tail: int, temperature: float = 0.0,
               generator: torch.Generator | None = None, **seams) -> Iterator[int]:
        """The new ids after embeds (1, T, D), one at a time; greedy at temperature 0.

        tail: how many of the T positions stand behind the last picture; what is in front of them is read
        whole or not at all, as a bridge expects it. seams: bridge and visual, as in `Decoder.states`. The
        caller stops taking ids where the answer ends.
        """
        c, T = self.decoder.config, embeds.shape[1]
        known, earlier = self.known(embeds, T - tail), self.cache
        cache = Cache(c, 1, T + max_new_tokens, embeds.device, self.decoder.embed.weight.dtype)
        if known:
            cache.k[..., :known, :], cache.v[..., :known, :] = (
                x[..., :known, :] for x in (earlier.k, earlier.v))
        cache.length, held, x = known, embeds[:, :known], embeds[:, known:]
        for _ in range(max_new_tokens):
            self.forget()
            hidden = self.decoder.states(embeds=x, cache=cache, **seams)[-1]    # (1, new, D)
            self.cache, self.held = cache, torch.cat((held, x), dim=1)
            token = sample(self.decoder.logits(hidden[:, -1], seams.get("bridge")), temperature, 0, 1.0,
                           generator)                                           # (1,)
            yield int(token)
            held, x = self.held, self.decoder.embed(token[:, None])

    def known(self, embeds: Tensor, first: int) -> int:
        """How many leading positions of embeds (1, T, D) the cache holds; 0 if fewer than `first`.

        One position at least is read again: its state says what comes next.
        """
        if self.held is None:
            return 0
        S = min(self.held.shape[1], embeds.shape[1] - 1)
        equal = (self.held[0, :S] == embeds[0, :S]).all(-1)
        known = int(equal.long().cumprod(0).sum())
        return known if known >= first else 0


def stream_text(ids: Iterator[int], tokenizer) -> Iterator[str]:
    """The text of an answer in pieces, which together are tokenizer.answer_text of its ids.

    A piece waits while the next id could still change it: half of a character, a blank at the end, the
    beginning of a text that ends an answer.
    """
    taken, shown, ends = [], "", [end for end in (*tokenizer.stop_texts, tokenizer.text_end) if end]
    for i in ids:
        taken.append(i)
        text = tokenizer.answer_text(taken).rstrip("\ufffd")
        held = max((n for end in ends for n in range(1, len(end)) if text.endswith(end[:n])), default=0)
        text = text[:len(text) - held].rstrip()
        if text.startswith(shown) and text != shown:
            yield text[len(shown):]
            shown = text
        if i in tokenizer.stop or any(end in tokenizer.decode(taken).lstrip() for end in ends):
            break
    text = tokenizer.answer_text(taken)
    if text.startswith(shown) and text != shown:
        yield text[len(shown):]
