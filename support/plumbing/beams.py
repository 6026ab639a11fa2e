"""plumbing/beams.py: beam search, several texts of each row grown side by side."""
from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from model import Bridge, Decoder, ImagePositions


@torch.no_grad()
def beam_search(decoder: Decoder, tokens: Tensor | None = None, max_new_tokens: int = 32, beams: int = 4,
                length_penalty: float = 1.0, stop: tuple[int, ...] = (), *, bridge: Bridge | None = None,
                visual=None, **prompt) -> Tensor:
    """The new tokens (B, T_new) of the best text of each row; arguments as in `Decoder.generate`.

    symbol   here      meaning
    W        beams     how many texts of a row grow, and how many ended ones are kept
    s(y)     total     log p of text y under the decoder, from the prompt on
    n        n         new tokens of the texts, all equally many
    α        length_penalty     0: log p decides; 1: log p per token; larger favours longer texts

    (G1)  candidates: the W(1 + number of stop ids) best s(y) + log p(token | y), at least 2 W, of growing y
    (G2)  one of the best W that ends is an ended text with s / n^α; the W best ended texts are kept
    (G3)  the W best candidates that do not end grow on: an ended text takes no place of a growing one
    (G4)  a row is finished when it has W ended texts and its best growing one has s / n^α <= their worst

    At max_new_tokens the growing texts end, too. These are transformers' rules with its defaults
    (early_stopping=False); (G4) is its heuristic, which for α > 0 can stop before a longer text would win. A
    row that has ended repeats its stop id.
    """
    if not isinstance(beams, int) or beams < 1 or not math.isfinite(length_penalty):
        raise ValueError(f"beams {beams}, length_penalty {length_penalty}: give 1 beam or more, and a finite "
                         "number.")
    logits, cache = decoder.read_prompt(tokens, max_new_tokens, bridge=bridge, visual=visual, **prompt)
    (B, V), W, device = logits.shape, beams, logits.device
    row = torch.arange(B, device=device)[:, None]                               # (B, 1)
    beam_rows = row.expand(B, W).flatten()                  # growing texts of one row stand side by side
    cache.take(beam_rows)
    visual, logits = select_rows(visual, beam_rows), logits[beam_rows]
    stops = torch.tensor(stop, dtype=torch.long, device=device)
    total = torch.zeros(B, W, device=device).index_fill_(1, torch.arange(1, W, device=device), -torch.inf)
    growing, ended = (torch.zeros(B, W, 1, dtype=torch.long, device=device) for _ in range(2))  # [0]: prompt
    ended_score = torch.full((B, W), -torch.inf, device=device)
    improvable = torch.ones(B, 1, dtype=torch.bool, device=device)
    for n in range(1, max_new_tokens + 1):
        logp = total[..., None] + logits.float().log_softmax(-1).view(B, W, V)
        score, best = logp.flatten(1).topk(min(W * max(2, 1 + len(stop)), W * V))       # (B, C)        (G1)
        parent, token = best // V, best % V
        text = torch.cat((growing[row, parent], token[..., None]), dim=-1)              # (B, C, 1+n)
        ends = torch.isin(token, stops) | (n == max_new_tokens)
        final = (score / n ** length_penalty).masked_fill(~(ends & improvable), -torch.inf)[:, :W]
        ended = torch.cat((ended, ended[..., -1:]), dim=-1)                             # repeats its stop id
        ended_score, kept = torch.cat((ended_score, final), dim=1).topk(W)              # (B, W)        (G2)
        ended = torch.cat((ended, text[:, :W]), dim=1)[row, kept]
        total, kept = score.masked_fill(ends, -torch.inf).topk(W)                       #               (G3)
        improvable &= total[:, :1] / n ** length_penalty > ended_score[:, -1:]          #               (G4)
        if n == max_new_tokens or not bool(improvable.any()):
            break
        growing, beam_rows = text[row, kept], (parent.gather(1, kept) + W * row).flatten()
        cache.take(beam_rows)
        last = growing[..., -1:].flatten(0, 1)                                          # (B·W, 1)
        hidden = decoder.states(last, cache=cache, bridge=bridge, visual=visual)[-1]     # (B·W, 1, D)
        logits = decoder.logits(hidden[:, -1], bridge)
    ids = ended[:, 0, 1:]
    over = torch.isin(ids, stops).cumsum(1) > torch.isin(ids, stops).long()     # behind the first stop id
    return ids[:, ~over.all(0)]


def select_rows(visual, rows: Tensor):
    """What a bridge remembers, for these rows of the batch: tensors are indexed, containers are walked."""
    if isinstance(visual, Tensor):
        return visual[rows]
    if isinstance(visual, dict):
        return {k: select_rows(v, rows) for k, v in visual.items()}
    if isinstance(visual, (list, tuple)):
        return type(visual)(select_rows(v, rows) for v in visual)
    if isinstance(visual, ImagePositions):
        return dataclasses.replace(visual, last=visual.last[rows], image=visual.image[rows])
    return visual
