"""lab/alone.py: soft tokens that read no word before them.

A bridge that was trained with the picture at the head of every text has soft tokens that never had a word
before them. Behind examples, a system prompt or another picture the frozen decoder lets them read those
words, and the answers get worse (results/examples.md). Alone, the soft tokens of a picture read what
they read in training:

    may read(t, s) = s ≤ t ∧ (t is a word ∨ s is the first of its text ∨ s and t belong to the same picture)

Words read all as ever, and positions stay as they are. No paper of the six does this; with the published
weights nothing here is switched on.
"""
from __future__ import annotations

import torch
from torch import Tensor

import data
from eval import vision_features
from model import VLM, Bridge, ImagePositions, causal_mask, visible_to_bias
from papers.cogvlm import has_images, image_numbers
from support.formats.tokenizers import Tokenizer


def keys_alone(keys: Tensor, where: ImagePositions, who: str = "pictures") -> Tensor:
    """keys (B, T, T) bool, True = may read → (B, T, T): for soft tokens without the words before them.

    who = "words" is the control: words do not read the words ahead of a picture that they follow. Padding
    reads itself alone and so counts as a first token; nothing else may read it.
    """
    picture = image_numbers(where)                                              # (B, T)  0 at words
    word, first = picture == 0, keys.sum(-1) == 1                               # first: reads itself alone
    if who == "words":
        ahead = where.last[:, :, None] > where.last[:, None]                    # (B, T, T) a picture between
        return keys & ~(ahead & word[:, :, None] & (word & ~first)[:, None])
    same = picture[:, :, None] == picture[:, None]                              # (B, T, T)
    return keys & (word[:, :, None] | first[:, None] | same)


def read_alone(bridge: Bridge, who: str = "pictures") -> None:
    """From now on soft tokens (or words, see `keys_alone`) of texts with this bridge read no word before a
    picture. ValueError for a bridge without soft tokens.
    """
    if not bridge.soft_tokens:
        raise ValueError(f"{bridge.name} has no soft tokens that could be read alone: its pictures stand "
                         "beside the text.")
    around = bridge.around

    def alone(layer: int, part: str, f, visual: ImagePositions | None, *x: Tensor) -> Tensor:
        if part == "attend" and has_images(visual, x[1].shape[2]):              # the prompt; later come words
            q, k, v, bias, _ = x
            keys = causal_mask(k.shape[2], k.device)[None] if bias is None else bias[:, 0] == 0
            bias = visible_to_bias(keys_alone(keys, visual, who), q.dtype)
            return around(layer, part, f, visual, q, k, v, bias[:, None], False)
        return around(layer, part, f, visual, *x)
    bridge.around = alone


@torch.no_grad()
def moved_by_words(vlm: VLM, tokenizer: Tokenizer, items: list[data.Item],
                   examples: list[data.Item]) -> list[float]:
    """How far a question and its answer ahead of the picture move the states of its soft tokens.

    Item i stands behind the first question of example i, without that one's picture. L+1 numbers, one per
    state (the soft tokens themselves, then after each layer): the mean over tokens and items of ‖h − h₀‖ /
    ‖h₀‖, where h₀ is the state with the picture at the head.
    """
    features, moved = vision_features(vlm, items, blind=False), []
    for i, example in enumerate(examples):
        q, states = example.qas[0], []
        for document in (data.Document(tokenizer),
                         data.Document(tokenizer).turn(data.QUESTION.format(q.question), q.answer)):
            inputs, _ = vlm.prepare(torch.tensor([document.image().tokens]), features[i:i + 1])
            soft = torch.stack(vlm.decoder.states(**inputs))[:, inputs["visual"].image]     # (L+1, K, D)
            states.append(soft)
        head, behind = states
        moved.append(((behind - head).norm(dim=-1) / head.norm(dim=-1)).mean(-1))
    return torch.stack(moved).mean(0).tolist()
