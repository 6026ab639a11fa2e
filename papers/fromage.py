"""FROMAGe (2301.13823): a frozen decoder that reads a picture as one word, and finds a picture by one.

Document 2 names it in one line, with BLIP-2 and KOSMOS-1, among models that learn from pairs of a picture and
a text, without an equation. The way in is Frozen's with K = 1 and CLIP's pooled vector. New is the way out:
a word [RET] behind a text, whose last state, projected, is compared with the pictures.

    symbol   shape        here          meaning
    z        (ΣM, 1, Di)  visual        CLIP's pooled vector of the picture (reads = "pooled")
    p        (ΣM, K, D)   prefix        W_c z + b: soft tokens; K = 1, of a second published file 4
    r        (D,)         ret           [RET]'s embedding, the one new row; the decoder's rows stay
    h        (B, D)       state         the decoder's last state at [RET]
    Ĩ, T̃     (B, 256)     embed_*       unit(W_i z + b_i) and unit(W_t h + b_t)
    λ        ()           logit_scale   ln(1/0.07) at the start

    (F1)  L_cap = −mean log p(words | p)                        [RET] and padding carry no loss
    (F2)  L_ret = ½ (CE(S) + CE(Sᵀ)),   S = e^λ Ĩ T̃ᵀ            B pictures against B captions
    (F3)  loss = L_cap + L_txt + L_ret,  L_txt = −mean log p(words, [RET])       of the caption, no picture
    (F4)  logits = [W h ; β h·r]                                r is the output's row, too: OPT is tied
    (F5)  r ← r · mean_v ‖e_v‖ / ‖r‖                            after every update, e_v the rows of the words

In half of the batches two neighbours make one text for (F1): picture, caption, picture, caption. The paper
says that this is what makes a text with several pictures work. (F2) and L_txt always read single captions.

Paper and code: (F5) is in the code alone. Training has no attention mask: padding stands on the right, where
causality hides it. To see more pictures, generation multiplies [RET]'s logit by β; one below zero then FALLS.
Here generation writes words alone; `logits` has [RET].

The claim: from one caption it retrieves below CLIP, which was trained for nothing else, and from a dialogue
above CLIP. Our sources have no numbers. In miniature: one picture among 32 from its caption, and behind
another picture with its caption; with and without concatenated pairs; few-shot accuracy.
"""
from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import CAPTION, Document, Item, collate, to_pixels
from model import IGNORE, VLM, Bridge, DecoderConfig
from papers.contrasts import clip_loss, mean_count
from papers.recipe import MUON, Numbers, Recipe, Task


class Fromage(Bridge):
    """5,513,729 parameters from CLIP ViT-L/14 (Di 1024) to OPT-6.7B (D 4096)."""
    name, soft_tokens, reads = "fromage", True, "pooled"

    def __init__(self, decoder: DecoderConfig, vision_width: int, tokens: int = 1, joint: int = 256,
                 pairs: float = 0.5):
        super().__init__()
        self.tokens, self.pairs = tokens, pairs         # pairs: share of the batches that concatenate
        self.map = nn.Linear(vision_width, tokens * decoder.width)                              # W_c
        self.image_head = nn.Linear(vision_width, joint)                                        # W_i
        self.text_head = nn.Linear(decoder.width, joint)                                        # W_t
        self.ret = nn.Parameter(torch.randn(decoder.width) * 0.02)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def prefix(self, visual: Tensor) -> Tensor:
        return self.map(visual[:, 0]).unflatten(-1, (self.tokens, -1))          # (ΣM, K, D)

    def embed_pictures(self, features: Tensor) -> Tensor:
        """(B, 1, Di) → (B, joint), of length 1."""
        return F.normalize(self.image_head(features[:, 0]).float(), dim=-1)     # Ĩ

    def embed_state(self, state: Tensor) -> Tensor:
        """The last state at [RET] (B, D) → (B, joint), of length 1."""
        return F.normalize(self.text_head(state).float(), dim=-1)               # T̃

    def logits(self, h: Tensor, head, boost: float = 1.0) -> Tensor:
        """(…, V + 1): the words, then [RET]."""
        ret = boost * (h @ self.ret.to(h.dtype))
        return torch.cat((head(h), ret[..., None]), dim=-1)                     #               (F4)


def next_word_loss(vlm: VLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """Mean −log p of labels (B, T), [RET] = V, under the last states (B, T, D) one position earlier."""
    target = labels[:, 1:]
    keep = target != IGNORE
    logits = vlm.bridge.logits(hidden[:, :-1][keep], vlm.decoder.head)
    return F.cross_entropy(logits.float(), target[keep])


def caption_loss(vlm: VLM, tokens: Tensor, labels: Tensor, features: Tensor,
                 mask: Tensor | None = None) -> Tensor:
    """(F1). tokens (B, T) with one IMAGE per picture, labels and mask as in `VLM.loss`."""
    inputs, labels = vlm.prepare(tokens, features, mask, labels)
    return next_word_loss(vlm, vlm.decoder.states(**inputs)[-1], labels)


def read_ret(vlm: VLM, tokens: Tensor, mask: Tensor | None = None,
             features: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Last states (B, T' + 1, D) of texts, padded on the right, with [RET] behind each; where it is."""
    inputs, _ = vlm.prepare(tokens, features, mask)
    x, real = inputs.pop("embeds"), inputs.pop("mask")                          # (B, T', D)
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
    is_ret = torch.arange(x.shape[1] + 1, device=x.device) == real.sum(1, keepdim=True)     # (B, T' + 1)
    x = torch.where(is_ret[..., None], vlm.bridge.ret.to(x.dtype), F.pad(x, (0, 0, 0, 1)))
    return vlm.decoder.states(embeds=x, mask=F.pad(real, (0, 1)) | is_ret, **inputs)[-1], is_ret


def retrieval_losses(vlm: VLM, tokens: Tensor, features: Tensor, mask: Tensor | None = None,
                     gather: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Tensor, Tensor]:
    """L_txt of captions without their pictures, (B, T) with mask as in `read_ret`, and L_ret (F2)."""
    hidden, is_ret = read_ret(vlm, tokens, mask, features[:0])
    words = tokens if mask is None else tokens.masked_fill(~mask, IGNORE)
    labels = F.pad(words, (0, 1), value=IGNORE).masked_fill(is_ret, vlm.decoder.config.vocab_size)
    images, texts = vlm.bridge.embed_pictures(features), vlm.bridge.embed_state(hidden[is_ret])
    S = vlm.bridge.logit_scale.exp() * gather(images) @ gather(texts).T         # (B, B)
    return next_word_loss(vlm, hidden, labels), clip_loss(S)                    #               (F2)


def concatenate(pairs: list[tuple[Document, Item]]) -> list[tuple[Document, Item]]:
    """Neighbours as one text: picture, caption, picture, caption. The last of an odd number stays alone."""
    joined = []
    for (a, item), (b, other) in zip(pairs[::2], pairs[1::2]):
        d = Document(a.tokenizer)
        d.tokens, d.labels = a.tokens + b.tokens[b.start:], a.labels + b.labels[b.start:]
        joined.append((d, replace(item, images=item.pictures + other.pictures)))
    return joined + pairs[2 * len(joined):]


@torch.no_grad()
def recall(vlm: VLM, tokenizer, items: list[Item], features: Tensor, group: int = 32) -> dict[str, float]:
    """How often the best of `group` pictures is the right one, 0 … 1; pictures of equal captions are one.

    From a caption: that is the text. From a dialogue: the item before, picture and caption, comes first.
    features (n, 1, Di) of the items, of which the last n mod `group` are left out.
    """
    group = min(group, len(items))
    z, captions = features[:len(items) // group * group], [item.captions[0] for item in items]
    captions, found = captions[:len(z)], {}
    alone = [Document(tokenizer) for _ in captions]
    before = [Document(tokenizer).image().turn(CAPTION, c) for c in captions[-1:] + captions[:-1]]
    pictures = vlm.bridge.embed_pictures(z).unflatten(0, (-1, group))           # (n/group, group, joint)
    number = torch.tensor([captions.index(c) for c in captions], device=z.device).view(-1, group)
    for name, texts, shown in (("caption", alone, z[:0]), ("dialogue", before, z.roll(1, 0))):
        tokens, _, mask = collate([d.add(f"{CAPTION} {c}") for d, c in zip(texts, captions)])
        hidden, is_ret = read_ret(vlm, tokens.to(z.device), mask.to(z.device), shown)
        state = vlm.bridge.embed_state(hidden[is_ret])
        best = (state.unflatten(0, (-1, group)) @ pictures.mT).argmax(-1)
        found[name] = (number.gather(1, best) == number).float().mean().item()
    return found


class FromageTask(Task):
    """What FROMAGe changes of train.py's answer task, in front of which this class stands: the loss."""
    joined = False                                      # whether the batch that is made concatenates

    def __init__(self, *given):
        super().__init__(*given)
        self.after_step()                               # [RET] begins as long as a word

    def batch(self, step: int) -> list[dict]:
        self.joined = np.random.default_rng((self.given.seed, 3, step)).random() < self.module.bridge.pairs
        return super().batch(step)

    def piece(self, pairs: list[tuple[Document, Item]], m: int, weight: float) -> dict:
        captions = [Document(self.tokenizer).add(f"{CAPTION} {item.captions[0]}") for _, item in pairs]
        text, _, text_mask = collate(captions)
        piece = super().piece(concatenate(pairs) if self.joined else pairs, m, weight)
        return piece | dict(text=text, text_mask=text_mask)

    def loss(self, tokens: Tensor, labels: Tensor, mask: Tensor | None, features: Tensor, text: Tensor,
             text_mask: Tensor, count: int, **_) -> Tensor:
        caption = caption_loss(self.module, tokens, labels, features, mask)
        words, contrast = retrieval_losses(self.module, text, features, text_mask, self.given.gather)
        n, m = (mean_count(x.sum(), self.given.gather) for x in (labels != IGNORE, text_mask))
        self.last = {"caption": caption * (count / n), "text": words * (text_mask.sum() / m),
                     "retrieval": contrast}
        return n * sum(self.last.values())              # the loop divides by the count         (F3)

    def after_step(self) -> None:
        with torch.no_grad():
            ret, rows = self.module.bridge.ret, self.module.decoder.embed.weight
            ret.mul_(rows.float().norm(dim=1).mean() / ret.norm())              #               (F5)

    def report(self, out: Path) -> dict[str, dict]:
        files, g = super().report(out), self.given
        try:
            items = [item for item in g.take_items(g.open_held_out(), g.eval_items) if item.captions]
        except ValueError:                              # no held-out pictures, and that was said
            return files
        pixels = to_pixels([item.image for item in items], self.module.vit.config.image_size, g.processor)
        scores = recall(self.module, self.tokenizer, items, self.features(pixels.to(g.device)))
        text = "  ".join(f"from a {name} {100 * score:.1f}" for name, score in scores.items())
        print(f"retrieve one picture among {min(32, len(items))}, %: {text}")
        return files | {"retrieval.json": scores}


RECIPES = {"fromage": Recipe(
    "FROMAGe (2301.13823): maps in and out and [RET]'s row learn from captions, both towers are frozen",
    "CC3M", Numbers(3e-4, 180, 20_000, 100, "constant", 0.0, 0.95), Numbers(3e-3, 64, 800, **MUON),
    "fromage", task="fromage", options=dict(joint=128), captions=1.0)}
