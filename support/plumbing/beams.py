"""plumbing/beams.py: beam search, several texts of each row grown side by side."""
from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from model import Bridge, Cache, Decoder, ImagePositions


@torch.no_grad()
def beam_search(decoder: Decoder, tokens: Tensor | None = None, max_new_tokens: int = 32, beams: int = 4,
                length_penalty: float = 1.0, stop: tuple[int, ...] = (), *, bridge: Bridge | None = None,
                visual=None, **prompt) -> Tensor:
    """The new tokens (B, T_new): `beams` sequences per row are kept, the best log p / length^penalty wins.

    Arguments as in `Decoder.stream`; prompt: embeds in place of tokens, and mask. A sequence that has ended
    repeats the stop id.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; at least one token must be asked for.")
    B, T = tokens.shape if tokens is not None else prompt["embeds"].shape[:2]
    W, V, weight = min(beams, decoder.config.vocab_size), decoder.config.vocab_size, decoder.embed.weight
    cache = Cache(decoder.config, B, T + max_new_tokens, weight.device, weight.dtype)
    hidden = decoder.states(tokens, cache=cache, bridge=bridge, visual=visual, **prompt)[-1]
    logp = decoder.head(hidden[:, -1]).float().log_softmax(-1)
    total, first = logp.topk(W)                                         # (B, W) the W best first tokens
    rows = torch.arange(B, device=weight.device).repeat_interleave(W)   # beams of one row stand side by side
    cache.take(rows)
    visual = select_rows(visual, rows)
    written = first.reshape(B * W, 1)
    stops = torch.tensor(stop, dtype=torch.long, device=weight.device)
    done = torch.isin(first, stops)                                     # (B, W)
    length = torch.ones_like(total)
    for _ in range(max_new_tokens - 1):
        if bool(done.all()):
            break
        hidden = decoder.states(written[:, -1:], cache=cache, bridge=bridge, visual=visual)[-1]
        logp = decoder.head(hidden[:, -1]).float().log_softmax(-1).view(B, W, V)
        last = written[:, -1].view(B, W, 1)
        repeat = torch.full_like(logp, -torch.inf).scatter_(2, last, 0.0)
        logp = torch.where(done[..., None], repeat, logp)               # an ended beam repeats its stop id
        longer = length + (~done).float()                               # (B, W)
        score = (total[..., None] + logp) / longer[..., None] ** length_penalty
        best = score.flatten(1).topk(W).indices                         # (B, W) in W·V
        parent, token = best // V, best % V
        total = (total[..., None] + logp).flatten(1).gather(1, best)
        length, done = longer.gather(1, parent), done.gather(1, parent) | torch.isin(token, stops)
        rows = (parent + W * torch.arange(B, device=parent.device)[:, None]).flatten()
        cache.take(rows)
        written = torch.cat((written[rows], token.reshape(-1, 1)), dim=1)
    best = (total / length ** length_penalty).argmax(1)                 # (B,)
    return written.view(B, W, -1)[torch.arange(B, device=best.device), best]


def select_rows(visual, rows: Tensor):
    """What a bridge remembers, for these rows of the batch: tensors are indexed, containers are walked."""
    if isinstance(visual, Tensor):
        return visual[rows]
    if isinstance(visual, dict):
        return {k: select_rows(v, rows) for k, v in visual.items()}
    if isinstance(visual, (list, tuple)):
        return type(visual)(select_rows(v, rows) for v in visual)
    if isinstance(visual, ImagePositions):
        return dataclasses.replace(visual, last=visual.last[rows])
    return visual
