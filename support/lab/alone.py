"""lab/alone.py: soft tokens that read no word before them.

A bridge that was trained with the picture at the head of every text has soft tokens that never had a word
before them. Behind examples, a system prompt or another picture the frozen decoder lets them read those
words, and then understands them less (results/examples.md). Alone, the soft tokens of a picture read what
they read in training:

    may read(t, s) = s ≤ t ∧ (t is a word ∨ s is the first of its text ∨ s and t belong to the same picture)

Words read all as ever, and positions stay as they are. No paper of the six does this; with the published
weights nothing here is switched on.
"""
from __future__ import annotations

from torch import Tensor

from model import Bridge, ImagePositions, causal_mask, visible_to_bias
from papers.cogvlm import has_images, image_numbers


def keys_alone(keys: Tensor, where: ImagePositions) -> Tensor:
    """keys (B, T, T) bool, True = may read → (B, T, T): for soft tokens without the words before them.

    Padding reads itself alone and so counts as a first token; nothing else may read it.
    """
    picture = image_numbers(where)                                              # (B, T)  0 at words
    first = keys.sum(-1) == 1                                                   # (B, T)  reads itself alone
    same = picture[:, :, None] == picture[:, None]                              # (B, T, T)
    return keys & ((picture == 0)[:, :, None] | first[:, None] | same)


def read_pictures_alone(bridge: Bridge) -> None:
    """From now on this bridge's soft tokens read no word before them; ValueError where it has none."""
    if not bridge.soft_tokens:
        raise ValueError(f"{bridge.name} has no soft tokens that could be read alone: its pictures stand "
                         "beside the text.")
    around = bridge.around

    def alone(layer: int, part: str, f, visual: ImagePositions | None, *x: Tensor) -> Tensor:
        if part == "attend" and has_images(visual, x[1].shape[2]):              # the prompt; later come words
            q, k, v, bias, _ = x
            keys = causal_mask(k.shape[2], k.device)[None] if bias is None else bias[:, 0] == 0
            bias = visible_to_bias(keys_alone(keys, visual), q.dtype)
            return around(layer, part, f, visual, q, k, v, bias[:, None], False)
        return around(layer, part, f, visual, *x)
    bridge.around = alone
