"""Prompt tuning (2104.08691v2) and prefix tuning (2101.00190v1): a frozen decoder is steered by a few learned
vectors, at its input or at every layer; and what both are when a picture makes the vectors.

Document 3 tells the two apart: prompts are "tokens added to inputs", prefixes "tokens added to inputs and all
intermediate layers", by "a separate network". Then it calls Frozen "image-conditional prefix-tuning", as the
paper does. By the document's own words that is a slip: Frozen adds 2 tokens at the INPUT, so it is prompt
tuning by a picture. Both papers have text alone; the pictures in (T1) are Frozen's.

    symbol     shape            here            meaning
    P          (Q, W)           prompts         learned; W = D of prompt tuning, G·E of prefix tuning
    z̄          (ΣM, Di)         features.mean   a picture, the mean over its patches, as Frozen pools
    A          (Q·W, Di)        map             image=True: the picture's part; without it, P alone
    H          (·, Q, W)        h               the prompts of a text
    M          W → L·2·G·E      down, up        prefix tuning's network, W → 512 → all keys and values
    K_l, V_l   (·, G, Q, E)     k, v            keys and values of layer l, for the G heads of the text's own

    (T1)  H = P + reshape(A z̄, (Q, W))                      without a picture H = P
    (T2)  prompt tuning: H are words; they take a place in the text, and positions
    (T3)  prefix tuning: [K_l ; V_l]_l = M(H) = W_2 tanh(W_1 H + b_1) + b_2
    (T4)  y = softmax( [q K_lᵀ , q kᵀ] / √E ) [V_l ; v]     ONE softmax: a prefix takes weight from the words

(T1) and (T2) with P in the place of the bias b are Frozen's H_v = reshape(W z̄ + b): a prompt is the picture
that says nothing. LLaMA-Adapter's prompts have a softmax of their own and a gate at zero; those of (T4)
change the decoder from the first step. Keys of a prefix carry no rotary turn, and words count their positions
from Q on, behind it; turns compare words with words alone, so the shift changes only how queries read the
prefix. Every word sees the whole prefix. One text takes one picture, since its prefix stands before all
words; prompts as words take any number.

The paper of prefix tuning trains P through M, because training K_l and V_l themselves was unstable and a
little worse; afterwards M can go, and 2·L·Q·G·E numbers stay (245,760 for GPT-2 medium at Q = 5).
network=False learns those directly. The published code's M is (T3); the paper says that it is a large
feed-forward network. Prompt tuning starts at U(−½, ½) here; the paper also starts at words of the vocabulary
or at the names of the classes, which helps small models. With Q = 5 a task of T5-XXL has 20,480 numbers.

The claims: prefixes at every layer beat prompts at the input alone (prefix tuning §7.2, BLEU on E2E: 69.7, at
the input 48.1 with 1, 62.2 with 10; from memory of the paper). Longer is better, up to 10 for tables and 200
for summaries (§7.1); beyond 20 prompts little is gained (prompt tuning §3.2). In miniature, with a picture:
both kinds with 8 vectors and with 1.

    python train.py --bridge prefix_tuning --option image=false         the paper's own: it learns text, blind
"""
from __future__ import annotations

import math
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridges import image_of_each_row
from model import Bridge, DecoderConfig, ImagePositions, causal_mask, visible_to_bias
from papers.recipe import MUON, Numbers, Recipe


class PromptTuning(Bridge):
    """Learned words at the place of the picture."""
    name, soft_tokens, reads = "prompt_tuning", True, -1

    def __init__(self, decoder: DecoderConfig, vision_width: int, prompts: int = 20, image: bool = True):
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(prompts, decoder.width).uniform_(-0.5, 0.5))
        self.map = nn.Linear(vision_width, prompts * decoder.width, bias=False) if image else None

    def prefix(self, visual: Tensor) -> Tensor:
        if self.map is None:
            return self.prompts.expand(len(visual), -1, -1)                     # (ΣM, Q, D)
        picture = self.map(visual.mean(1)).unflatten(-1, self.prompts.shape)    # (ΣM, Q, D)
        return self.prompts + picture                                           #              (T1), (T2)


def attend_with_prefix(f: Callable[..., Tensor], K: Tensor, V: Tensor, q: Tensor, k: Tensor, v: Tensor,
                       bias: Tensor | None, causal: bool) -> Tensor:
    """f, a layer's attention, with keys and values (B, G, Q, E) ahead of the words', in one softmax."""
    if causal:
        bias = visible_to_bias(causal_mask(q.shape[2], q.device), q.dtype)
    if bias is not None:
        bias = F.pad(bias, (K.shape[2], 0))                                 # 0: every word sees the prefix
    return f(q, torch.cat((K.to(k.dtype), k), dim=2), torch.cat((V.to(v.dtype), v), dim=2), bias, False)


class PrefixTuning(Bridge):
    """Learned keys and values in every layer, in the softmax of the words."""
    name, reads = "prefix_tuning", -1

    def __init__(self, decoder: DecoderConfig, vision_width: int, prompts: int = 10, hidden: int = 512,
                 network: bool = True, image: bool = True):
        super().__init__()
        self.shape = (decoder.layers, 2, decoder.kv_heads, decoder.head_width)
        out = math.prod(self.shape)                                             # L·2·G·E
        width = decoder.kv_heads * decoder.head_width if network else out
        self.prompts = nn.Parameter(torch.empty(prompts, width).uniform_(-0.5, 0.5))
        self.map = nn.Linear(vision_width, prompts * width, bias=False) if image else None
        self.down, self.up = (nn.Linear(width, hidden), nn.Linear(hidden, out)) if network else (None, None)

    def see(self, features: Tensor, where: ImagePositions | None = None) -> Tensor:
        """(B, Q, L, 2, G, E): keys and values of all layers; a text without a picture has those of P."""
        rows = len(features) if where is None else len(where.last)
        h = self.prompts.expand(rows, -1, -1)                                   # (B, Q, W)
        if self.map is not None:
            picture = self.map(features.mean(1)).unflatten(-1, self.prompts.shape)
            h = h + image_of_each_row(picture, where, self.name)                #              (T1)
        if self.up is not None:
            h = self.up(self.down(h).tanh())                                    # (B, Q, L·2·G·E)  (T3)
        return h.unflatten(-1, self.shape)

    def around(self, layer: int, part: str, f: Callable[..., Tensor], visual, *x) -> Tensor:
        if part != "attend" or visual is None:
            return f(*x)
        K, V = visual[:, :, layer].permute(2, 0, 3, 1, 4)                       # (B, G, Q, E) each
        return attend_with_prefix(f, K, V, *x)                                                  # (T4)

    def rope_positions(self, p: Tensor, visual: Tensor | None) -> Tensor:
        return p if visual is None else p + visual.shape[1]


# The papers' numbers are from memory. Prompt tuning's optimiser is Adafactor with a decay of 0.8.
RECIPES = {
    "prompt_tuning": Recipe(
        "Prompt tuning (2104.08691v2 §3) by a picture: words and a map from the picture to them learn",
        "SuperGLUE, no pictures", Numbers(0.3, 32, 30_000, 0, "constant", 1e-5, 0.999),
        Numbers(2e-3, 64, 1000, **MUON), "prompt_tuning", options=dict(reads=-2, prompts=8)),
    "prefix_tuning": Recipe(
        "Prefix tuning (2101.00190v1 §4) by a picture: keys and values of all layers learn through a network",
        "E2E, 42K tables, 5 epochs, no pictures", Numbers(8e-5, 10, 21_000, 0, "linear", 0.0, 0.999),
        Numbers(2e-3, 64, 1000, **MUON), "prefix_tuning", options=dict(reads=-2, prompts=8, hidden=256)),
}
