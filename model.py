"""model.py: a LLaMA-style decoder, a ViT, CLIP's text tower, and the VLM that joins them through a bridge.

Papers   LLaMA 2302.13971v1 · RoPE 2104.09864v5 · GQA 2305.13245v3 · SwiGLU 2002.05202v1 · ViT 2010.11929v2 · CLIP 2103.00020v1
Chapters 1 attention · 2 the decoder and its three seams · 3 generation · 4 ViT · 5 CLIP's text tower · 6 VLM · 7 weights on disk
Run      nothing here runs by itself: `python train.py` trains, `python eval.py` answers

The alphabet of shapes, used in every file, test and notebook:
    B batch          T text tokens            D decoder width     L decoder layers    V vocabulary
    H query heads    G key/value heads        E head width        K visual tokens the decoder receives per image
    M images in a sequence                    N ViT tokens        Di ViT width        Q learned queries / prompts
    S side of the (square) image in pixels; inside attention, the number of keys
"""
from __future__ import annotations

import contextlib
import difflib
import functools
import itertools
import json
import math
import os
import pickle
import re
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

IGNORE = -100  # label of a position that carries no loss
IMAGE = -200   # stands in `tokens` where an image stands in the text (LLaVA's sentinel id)


class UserError(ValueError):
    """A mistake of the user's: one sentence that says what is wrong, where, and what to do. The CLIs exit with code 2."""


def nearest(wrong: str, known) -> str:
    """The end of a message about a name that nobody knows."""
    near = difflib.get_close_matches(wrong, known, 1)
    return (f'did you mean "{near[0]}"? ' if near else "") + f"Known: {', '.join(known)}."


# ------------------------------------------------------------------------------------------------------------------
# 1. Attention, twice
# ------------------------------------------------------------------------------------------------------------------

def attend_explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Attention spelled out (Attention is all you need, 1706.03762v7, Eq. 1).

    (D1)  y = softmax(q kᵀ / √E + bias) v

    q (B, H, T, E); k, v (B, H, S, E); bias broadcastable to (B, H, T, S): 0 where a query may look, very negative
    where not. Returns (B, H, T, E). The softmax runs in float32 whatever the dtype of q.
    """
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5      # (B, H, T, S)  scaled by the HEAD width   (D1)
    if bias is not None:
        scores = scores + bias
    weights = shown(scores.softmax(-1, dtype=torch.float32))    # (B, H, T, S)  each row sums to 1
    return F.dropout(weights, dropout).to(v.dtype) @ v          # (B, H, T, E)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False, dropout: float = 0.0) -> Tensor:
    """The same function by the faster road for the device; a test holds the two equal.

    `causal` (query t sees keys 0..t; T == S) and `bias` exclude each other. With gradients on a CPU the explicit form
    wins up to EXPLICIT keys (forward and backward in bf16: 4 times at 64, 1.2 at 260, 0.8 at 512, 0.3 at 1,024), everywhere
    else PyTorch's fused kernel does. Only lengths have a say, so that a frozen decoder rounds alike with a trained bridge and without.
    """
    assert not (causal and bias is not None), "one mask, not two"
    if SHOW or q.device.type == "cpu" and torch.is_grad_enabled() and k.shape[2] <= EXPLICIT:
        return attend_explicit(q, k, v, visible_to_bias(causal_mask(q.shape[2], q.device), q.dtype) if causal else bias, dropout)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, dropout_p=dropout)


EXPLICIT = 384                                                  # keys
SHOW: list[Callable[[Tensor, str], None]] = []                  # empty, except while somebody is `watching`


def shown(weights: Tensor, beside: str = "") -> Tensor:
    """The softmax weights themselves, on their way to the values; whoever is watching sees them."""
    for show in SHOW:
        show(weights, beside)
    return weights


@contextlib.contextmanager
def watching(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects the softmax weights (B, H, T, S) of every attention inside `module`, under the name of who computes them.

        decoder.layers.L.attention            words, and the soft tokens among them, on each other
        decoder.layers.L.attention.prompts    zero_init: words on prompts, a softmax of its own
        bridge.blocks.L                       mapl: [features ; constants] on each other; zero_init: [queries ; features];
                                              flamingo, idefics, mllama: words on latents or patches
        bridge.layers.L.attention, .cross     qformer: queries on each other, on the features
        bridge.resampler.layers.L             flamingo, idefics: latents on [features ; latents]

    While it lasts attention takes the explicit road; a later forward overwrites an earlier one. A row that may look
    nowhere is uniform, and its module multiplies what it read by 0.
    """
    kept, running, names = {}, [], {m: name for name, m in module.named_modules()}

    def leave(*_) -> None:                                      # a hook that returned something would replace the output
        running.pop()
    hooks = [m.register_forward_pre_hook(lambda m, _: running.append(names[m])) for m in names]
    hooks += [m.register_forward_hook(leave) for m in names]
    show = lambda weights, beside: kept.__setitem__(running[-1] + beside, weights)
    SHOW.append(show)
    try:
        yield kept
    finally:
        SHOW.remove(show)
        for h in hooks:
            h.remove()


def causal_mask(T: int, device=None) -> Tensor:
    """(T, T) bool, True = may attend: query t (row) sees key s (column) when s <= t."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


def visible_to_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """True → 0, False → half the most negative number: adding a score to it cannot overflow, and exp() of it is 0."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min / 2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)         # (B, T, H·E) → (B, H, T, E)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)                         # (B, H, T, E) → (B, T, H·E)


# ------------------------------------------------------------------------------------------------------------------
# 2. The decoder and its three seams
# ------------------------------------------------------------------------------------------------------------------

class Bridge(nn.Module):
    """Between the features of a ViT and a decoder; this base class does nothing, so a decoder with it is a plain LLaMA.

        see(features)             → visual      once per image: whatever the bridge needs to remember
        prefix(visual)            → (M, K, D)   soft tokens that take the place of each image in the text
        beside(layer, …, visual)  → a term added to the heads of layer ℓ before W_o, or None
        before(layer, x, visual)  → x after a block that runs before layer ℓ

    A bridge owns all of its parameters and the decoder owns none of them: `bridge.state_dict()` is what a run saves.
    `reads_layer` is the ViT hidden state it wants (−2: the input of the last block), `reads_cls` whether the class token
    comes along.
    """
    name = "none"
    reads_layer, reads_cls = -2, False
    looks = "decoder.layers.*.attention"    # the names in `watching` of the words' attention to the visual tokens
    options: dict = {}                      # keyword arguments it was built with, for config.json

    def see(self, features: Tensor, where: Where | None = None) -> object:
        """features (ΣM, N, Di) of all images of the batch, `where` they stand → visual."""
        return features

    def prefix(self, visual) -> Tensor | None:
        return None

    def beside(self, layer: int, q: Tensor, project: Callable[[Tensor], tuple[Tensor, Tensor]], visual) -> Tensor | None:
        """q (B, H, T, E) after RoPE; project(p (·, Q, D)) → the layer's own keys and values of p, (·, H, Q, E) each."""
        return None

    def before(self, layer: int, x: Tensor, visual) -> Tensor:
        return x

    def made_of(self, attention: dict[str, Tensor], features: Tensor) -> Tensor:
        """(ΣM, K, N): of which ViT tokens each visual token is made, rows sum to 1; attention as `watching` names it.

        Here token k IS patch k; where layers lie between, see bridges.rolled.
        """
        return torch.eye(features.shape[1], device=features.device).expand(len(features), -1, -1)

    def vitals(self) -> dict[str, float]:
        """The bridge's own numbers for the line of progress (mean |gate|, …)."""
        return {}


@dataclass
class Where:
    """Where the images of a batch stand. Images are counted row by row, from left to right.

    `last` is laid out anew when the images are expanded, after `see` and before the decoder runs.
    """
    row: Tensor         # (ΣM,) int64: the row of `tokens` that image m belongs to
    order: Tensor       # (ΣM,) int64: its number inside that row, from 1
    last: Tensor        # (B, T) int64: how many images stand at or before each position of the text; 0 = none yet

    def columns(self, T: int) -> Tensor:
        """(B, T) of `last` for a chunk of T positions; a chunk generated after the prompt follows all of its images."""
        return self.last if T == self.last.shape[1] else self.last[:, -1:].expand(-1, T)


@dataclass(frozen=True)
class DecoderConfig:
    vocab_size: int = 512             # V
    width: int = 128                  # D
    layers: int = 4                   # L
    heads: int = 4                    # H query heads
    kv_heads: int = 4                 # G key/value heads; each serves H/G query heads
    head_width: int = 32              # E
    hidden: int = 384                 # width of the SwiGLU feed-forward
    rope_theta: float = 10000.0       # base of the rotary frequencies
    rope_scaling: dict | None = None  # {"rope_type", …}, see ROPES
    norm_eps: float = 1e-5            # ε of RMSNorm; always from the checkpoint, never a default
    tied: bool = True                 # the output projection is the embedding matrix
    attention_bias: bool | str = False    # biases on q, k, v and o, or on those that it names: "qkv" in Qwen2
    mlp_bias: bool = False            # biases in the feed-forward
    context: int = 2048               # longest sequence the decoder was trained on
    extra_tokens: int = 0             # ids from V on that are read, never written: rows of the embedding alone (Mllama)

    def __post_init__(self):
        if self.tied and self.extra_tokens:
            raise UserError(f"a tied output projection has a row for every id: {self.extra_tokens} ids cannot be read only.")
        if self.heads % self.kv_heads:
            raise UserError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly; "
                            "num_attention_heads must be a multiple of num_key_value_heads.")
        if self.head_width % 2:
            raise UserError(f"RoPE rotates pairs, so the head width must be even, not {self.head_width}.")


def rope_frequencies(config: DecoderConfig, device=None) -> Tensor:
    """(E/2,) float32: angle per position of each rotated pair (RoPE, 2104.09864v5, Eq. 15).

    (D3)  θ_i = base^(−2i/E)

    With `rope_scaling` of type linear, all are divided by `factor` (Position Interpolation, 2306.15595v2). With type llama3
    so are wavelengths λ = 2π/θ_i above `original/low`, those below `original/high` stay, and the band between is interpolated
    (Llama 3.1; the rule is in its published code only).
    """
    i = torch.arange(0, config.head_width, 2, dtype=torch.float32, device=device)
    theta = 1.0 / config.rope_theta ** (i / config.head_width)              # (D3)
    s = config.rope_scaling
    if not s:
        return theta
    if s.get("rope_type") == "linear":
        return theta / s["factor"]
    factor, low, high = s["factor"], s["low_freq_factor"], s["high_freq_factor"]
    turns = s["original_max_position_embeddings"] * theta / (2 * math.pi)    # how often the pair turns in the old context
    keep = ((turns - low) / (high - low)).clamp(0, 1)                        # 1: fast pair, unchanged; 0: slow, ÷ factor
    return theta * (keep + (1 - keep) / factor)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i+E/2}) of x (B, H, T, E): the half-split layout of Hugging Face checkpoints.

    (D4)  (a, b) ← (a cos tθ_i − b sin tθ_i,  b cos tθ_i + a sin tθ_i)      at position t, for each pair i (Eq. 34)

    Meta's files pair neighbours (x_2i, x_2i+1) instead; the two are the same function after a permutation of the rows of
    W_q and W_k. cos, sin: (B or 1, 1, T, E).
    """
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin           # (D4)


class RMSNorm(nn.Module):
    """Root mean square norm (1910.07467v1, Eq. 4); in float32, cast back, and only then multiplied by the weight.

    (D2)  y = x / √(mean x² + ε) · weight
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)       # (D2)
        return self.weight * y.to(x.dtype)


class Cache:
    """Keys and values of the positions seen so far, one pair (B, G, S, E) per layer, and which of them are real tokens."""

    def __init__(self, config: DecoderConfig, batch: int, longest: int, device, dtype):
        shape = (config.layers, batch, config.kv_heads, longest, config.head_width)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.real = torch.ones(batch, longest, dtype=torch.bool, device=device)     # False = padding
        self.padded = False
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end], self.v[layer, :, :, self.length:end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def take(self, rows: Tensor) -> None:
        """Keep these rows, in this order (repeats allowed): how beams fork."""
        self.k, self.v, self.real = self.k[:, rows], self.v[:, rows], self.real[rows]


class Attention(nn.Module):
    """Grouped-query self-attention with RoPE (2305.13245v3); the seam `beside` adds its term to the heads before W_o.

    (D5)  query head h reads key and value head ⌊h·G/H⌋
    """

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.heads, self.kv_heads = c.heads, c.kv_heads
        biased = "qkvo" if c.attention_bias is True else c.attention_bias or ""
        self.q = nn.Linear(c.width, c.heads * c.head_width, bias="q" in biased)
        self.k = nn.Linear(c.width, c.kv_heads * c.head_width, bias="k" in biased)
        self.v = nn.Linear(c.width, c.kv_heads * c.head_width, bias="v" in biased)
        self.o = nn.Linear(c.heads * c.head_width, c.width, bias="o" in biased)

    def widen(self, x: Tensor) -> Tensor:
        """(B, G, S, E) → (B, H, S, E)."""
        return x if self.heads == self.kv_heads else x.repeat_interleave(self.heads // self.kv_heads, dim=1)   # (D5)

    def project(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (·, H, Q, E) of vectors (·, Q, D) that have no position: no RoPE."""
        return self.widen(split_heads(self.k(prompts), self.kv_heads)), self.widen(split_heads(self.v(prompts), self.kv_heads))

    def qkv(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, (H+2G)·E): the three projections side by side; `packed` makes them one product."""
        return torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, causal: bool, layer: int,
                cache: Cache | None, bridge: Bridge, visual) -> Tensor:
        H, G = self.heads, self.kv_heads
        qk, v = split_heads(self.qkv(x), H + 2 * G).split((H + G, G), dim=1)
        q, k = rope(qk, cos, sin).split((H, G), dim=1)                          # (B, H, T, E), (B, G, T, E); v as k
        if cache is not None:
            k, v = cache.append(layer, k, v)                                    # (B, G, S, E)
        y = attend(q, self.widen(k), self.widen(v), bias, causal)               # (B, H, T, E)
        term = bridge.beside(layer, q, self.project, visual)
        if term is not None:
            y = y + term
        return self.o(merge_heads(y))                                           # (B, T, D)


class SwiGLU(nn.Module):
    """The gated feed-forward (2002.05202v1, Eq. 6).

    (D6)  y = W_down( SiLU(W_gate x) ⊙ W_up x )
    """

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.gate = nn.Linear(c.width, c.hidden, bias=c.mlp_bias)
        self.up = nn.Linear(c.width, c.hidden, bias=c.mlp_bias)
        self.down = nn.Linear(c.hidden, c.width, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))                     # (D6)


class Block(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.norm1 = RMSNorm(c.width, c.norm_eps)
        self.attention = Attention(c)
        self.norm2 = RMSNorm(c.width, c.norm_eps)
        self.mlp = SwiGLU(c)

    def forward(self, x, cos, sin, bias, causal, layer, cache, bridge, visual) -> Tensor:
        x = bridge.before(layer, x, visual)                                     # Flamingo: a block ahead of the layer
        x = x + self.attention(self.norm1(x), cos, sin, bias, causal, layer, cache, bridge, visual)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """LLaMA (2302.13971v1): embeddings → L pre-norm blocks → RMSNorm → logits. No bridge parameter lives in here."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        # as nn.Embedding starts; spelled out because its normal_ on the meta device, where we load, imports 37 MB more
        rows = torch.randn(config.vocab_size + config.extra_tokens, config.width)
        self.embed = nn.Embedding.from_pretrained(rows, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.checkpoint = False             # True: keep no activations inside the layers; less memory, a third more time

    def init_weights(self, generator: torch.Generator | None = None) -> Decoder:
        """N(0, 0.02) everywhere, as Hugging Face's random models; a tied embedding with a larger std starts above ln V."""
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, 0.0, 0.02, generator=generator)
        return self

    def head(self, x: Tensor) -> Tensor:
        """Final hidden states (…, D) → logits (…, V)."""
        return F.linear(x, self.embed.weight) if self.lm_head is None else self.lm_head(x)

    def states(self, tokens: Tensor | None = None, mask: Tensor | None = None, *, embeds: Tensor | None = None,
               cache: Cache | None = None, bridge: Bridge | None = None, visual=None) -> list[Tensor]:
        """L+1 hidden states (B, T, D): the embeddings, then after each layer; the last one after the final norm.

        tokens (B, T) int64 or embeds (B, T, D); mask (B, T) bool, False = padding, left or right; positions count real
        tokens only. An integer mask packs several documents into a row: its number for each token, 0 = padding; none sees
        another. With a cache, tokens continue what the cache holds.
        """
        bridge = bridge or NO_BRIDGE
        x = self.embed(tokens) if embeds is None else embeds
        B, T, _ = x.shape
        past = cache.length if cache is not None else 0

        real = mask
        if cache is not None:
            cache.padded = cache.padded or mask is not None
            if mask is not None:
                cache.real[:, past:past + T] = mask
            real = cache.real[:, :past + T] if cache.padded else None           # (B, S) of all keys

        document = None
        if mask is not None and mask.dtype != torch.bool:                       # several documents in a row, numbered from 1
            assert cache is None, "packed rows are for training"
            document, real = mask, mask > 0
        if real is None:
            positions = torch.arange(past, past + T, device=x.device)[None]     # (1, T)
        elif document is None:
            positions = (real.cumsum(-1) - 1).clamp(min=0)[:, past:]            # (B, T)
        else:                                                                   # each document counts from 0
            t = torch.arange(T, device=x.device).expand(B, T)
            positions = t - t.masked_fill(document == F.pad(document, (1, 0))[:, :-1], 0).cummax(1).values
        angle = positions[:, None, :, None] * rope_frequencies(self.config, x.device)       # (B or 1, 1, T, E/2)
        angle = torch.cat((angle, angle), dim=-1)
        dtype = self.layers[0].attention.q.weight.dtype
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else dtype
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

        causal, bias = real is None and past == 0 and T > 1, None
        if not causal and (real is not None or T > 1):
            t, s = torch.arange(past, past + T, device=x.device), torch.arange(past + T, device=x.device)
            visible = (s <= t[:, None])[None, None]                             # (1, 1, T, S)  True = may attend
            if real is not None:
                visible = visible & real[:, None, None] | (s == t[:, None])     # padding sees itself: no empty softmax row
            if document is not None:
                visible = visible & (document[:, None, :, None] == document[:, None, None])     # a wall between documents
            bias = visible_to_bias(visible, dtype)

        hidden = [x]
        for l, layer in enumerate(self.layers):
            inputs = (x, cos, sin, bias, causal, l, cache, bridge, visual)
            again = self.checkpoint and torch.is_grad_enabled()                 # compute the layer again in the backward pass
            x = torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False) if again else layer(*inputs)
            hidden.append(x)
        hidden[-1] = self.norm(x)
        if cache is not None:
            cache.length = past + T
        return hidden

    def forward(self, tokens: Tensor | None = None, mask: Tensor | None = None, *, return_hidden: bool = False, **kw):
        """(B, T) int64 → logits (B, T, V), and the L+1 hidden states when asked."""
        hidden = self.states(tokens, mask, **kw)
        logits = self.head(hidden[-1])
        return (logits, hidden) if return_hidden else logits

    # --------------------------------------------------------------------------------------------------------------
    # 3. Generation
    # --------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def stream(self, tokens: Tensor | None = None, max_new_tokens: int = 32, temperature: float = 0.0, top_k: int = 0,
               top_p: float = 1.0, stop: tuple[int, ...] = (), generator: torch.Generator | None = None,
               mask: Tensor | None = None, embeds: Tensor | None = None, bridge: Bridge | None = None,
               visual=None) -> Iterator[Tensor]:
        """Yields the next token of every row, (B,) int64, until all rows have stopped.

        temperature 0 is greedy; top_k keeps the k likeliest tokens, top_p the smallest set whose probability reaches p.
        A row that has emitted a stop id repeats it. Padding, if any, stands on the left.
        """
        B, T = (tokens.shape if embeds is None else embeds.shape[:2])
        weight = self.embed.weight
        cache = Cache(self.config, B, T + max_new_tokens, weight.device, weight.dtype)
        stops = torch.tensor(stop, dtype=torch.long, device=weight.device)
        done = torch.zeros(B, dtype=torch.bool, device=weight.device)
        token = None
        for _ in range(max_new_tokens):
            hidden = self.states(tokens, mask, embeds=embeds, cache=cache, bridge=bridge, visual=visual)[-1]
            chosen = sample(self.head(hidden[:, -1]), temperature, top_k, top_p, generator)     # (B,)
            token = chosen if token is None else torch.where(done, token, chosen)
            yield token
            done = done | torch.isin(token, stops)
            if len(stop) and bool(done.all()):
                return
            tokens, mask, embeds = token[:, None], None, None

    @torch.no_grad()
    def generate(self, tokens: Tensor | None = None, max_new_tokens: int = 32, temperature: float = 0.0, beams: int = 1,
                 length_penalty: float = 1.0, **kw) -> Tensor:
        """The new tokens only, (B, T_new) int64; arguments as in `stream`. beams > 1: beam search (no sampling)."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; at least one token must be asked for.")
        with packed(self) if max_new_tokens >= 16 else contextlib.nullcontext():
            if beams > 1:
                return self.beam_search(tokens, max_new_tokens, beams, length_penalty, **kw)
            return torch.stack(list(self.stream(tokens, max_new_tokens, temperature, **kw)), dim=1)

    @torch.no_grad()
    def beam_search(self, tokens: Tensor | None, max_new_tokens: int, beams: int, length_penalty: float = 1.0,
                    stop: tuple[int, ...] = (), mask: Tensor | None = None, embeds: Tensor | None = None,
                    bridge: Bridge | None = None, visual=None) -> Tensor:
        """The sequence of largest log p / length^penalty among `beams` kept per row; (B, T_new), ended rows repeat the stop id."""
        B, T = (tokens.shape if embeds is None else embeds.shape[:2])
        W, V, weight = min(beams, self.config.vocab_size), self.config.vocab_size, self.embed.weight
        cache = Cache(self.config, B, T + max_new_tokens, weight.device, weight.dtype)
        logits = self.head(self.states(tokens, mask, embeds=embeds, cache=cache, bridge=bridge, visual=visual)[-1][:, -1])
        total, first = logits.float().log_softmax(-1).topk(W)                   # (B, W) log p of the W best first tokens
        rows = torch.arange(B, device=weight.device).repeat_interleave(W)       # beams of one row stand side by side
        cache.take(rows)
        visual = take_rows(visual, rows)
        written = first.reshape(B * W, 1)
        stops = torch.tensor(stop, dtype=torch.long, device=weight.device)
        done = torch.isin(first, stops)                                         # (B, W)
        length = torch.ones_like(total)
        for _ in range(max_new_tokens - 1):
            if bool(done.all()):
                break
            hidden = self.states(written[:, -1:], cache=cache, bridge=bridge, visual=visual)[-1]
            logp = self.head(hidden[:, -1]).float().log_softmax(-1).view(B, W, V)
            last = written[:, -1].view(B, W, 1)
            frozen = torch.full_like(logp, -torch.inf).scatter_(2, last, 0.0)   # an ended beam repeats its stop id for free
            logp = torch.where(done[..., None], frozen, logp)
            longer = length + (~done).float()                                   # (B, W)
            score = (total[..., None] + logp) / longer[..., None] ** length_penalty
            best = score.flatten(1).topk(W).indices                             # (B, W) in W·V
            parent, token = best // V, best % V
            total = (total[..., None] + logp).flatten(1).gather(1, best)
            length, done = longer.gather(1, parent), done.gather(1, parent) | torch.isin(token, stops)
            rows = (parent + W * torch.arange(B, device=parent.device)[:, None]).flatten()
            cache.take(rows)
            written = torch.cat((written[rows], token.reshape(-1, 1)), dim=1)
        best = (total / length ** length_penalty).argmax(1)                     # (B,)
        return written.view(B, W, -1)[torch.arange(B, device=best.device), best]


NO_BRIDGE = Bridge()
PACKED = range(10**7, 10**9)            # weights of a decoder: below, packing costs more than it saves; above, two copies might not fit


@contextlib.contextmanager
def packed(decoder: Decoder) -> Iterator[None]:
    """While it lasts, a bfloat16 decoder on a CPU multiplies with copies of its matrices in the order in which oneDNN reads them.

    A step of one token is bound by reading every weight once; as they are stored, oneDNN reorders them in each product, which
    is half of the time. Sums run in another order, nothing else changes. `generate` does it for itself; around several calls it saves
    packing again (about 0.7 s per GB). Nothing happens on a GPU, in float32 (measured: no gain), under autocast, outside `PACKED`, or where it is on.
    """
    linears, weight = [m for m in decoder.modules() if isinstance(m, nn.Linear)], decoder.embed.weight
    attentions = [layer.attention for layer in decoder.layers]
    if (weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
            or torch.is_autocast_enabled("cpu") or sum(m.weight.numel() for m in linears) not in PACKED or "head" in vars(decoder)):
        yield
        return

    def product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)               # for one row at a time
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, ordered, bias, "none", [], "")
    try:
        for m in linears:
            m.forward = product(m.weight, m.bias)
        for a in attentions:
            together = [a.q, a.k, a.v]
            bias = [m.weight.new_zeros(len(m.weight)) if m.bias is None else m.bias for m in together]
            a.qkv = product(torch.cat([m.weight for m in together]), torch.cat(bias) if any(m.bias is not None for m in together) else None)
        decoder.head = product(weight) if decoder.lm_head is None else decoder.lm_head.forward
        yield
    finally:
        for m, name in [*((m, "forward") for m in linears), *((a, "qkv") for a in attentions), (decoder, "head")]:
            vars(m).pop(name, None)


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """(B, V) → (B,): argmax at temperature 0, else a draw from the truncated distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        drop = p.cumsum(-1) - p >= top_p                # the token that crosses p is kept, so at least one remains
        logits = logits.masked_fill(torch.zeros_like(drop).scatter_(1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def take_rows(visual, rows: Tensor):
    """The memory of a bridge for these rows of the batch: tensors are indexed, containers are walked."""
    if isinstance(visual, Tensor):
        return visual[rows]
    if isinstance(visual, dict):
        return {k: take_rows(v, rows) for k, v in visual.items()}
    if isinstance(visual, (list, tuple)):
        return type(visual)(take_rows(v, rows) for v in visual)
    if isinstance(visual, Where):
        return replace(visual, last=visual.last[rows])
    return visual


# ------------------------------------------------------------------------------------------------------------------
# 4. ViT: CLIP, SigLIP and EVA (BLIP-2) in one class, Mllama's tower of tiles in another
# ------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ViTConfig:
    """What differs between the towers stands in this table, and nowhere else.

                      CLIP            SigLIP        EVA-g (BLIP-2)
        cls           yes             no            yes
        pre_norm      yes             no            no
        patch_bias    no              yes           yes
        act           quick_gelu      gelu_tanh     gelu
        norm_eps      1e-5            1e-6          1e-6
        pool          cls             map           all        (see ViT.pool)
    """
    image_size: int = 48        # S, pixels
    patch: int = 16             # side of a patch, pixels
    width: int = 128            # Di
    layers: int = 4             # blocks
    heads: int = 4              # attention heads
    hidden: int = 512           # width of the feed-forward
    act: str = "quick_gelu"     # quick_gelu | gelu | gelu_tanh
    norm_eps: float = 1e-5      # ε of LayerNorm
    cls: bool = True            # a class token at index 0
    pre_norm: bool = True       # a LayerNorm before the first block
    patch_bias: bool = False    # a bias in the patch embedding
    pool: str = "cls"           # what `pool` does: cls | map (attention pooling) | all (normalise every token)

    def __post_init__(self):
        if self.image_size < self.patch:            # a remainder is allowed: SigLIP so400m has 384 pixels and patches of 14
            raise UserError(f"a {self.image_size}-pixel image has no room for a {self.patch}-pixel patch.")
        if self.width % self.heads:
            raise UserError(f"a ViT of width {self.width} does not divide into {self.heads} heads.")
        if self.act not in ACTIVATIONS:
            raise UserError(f'unknown activation "{self.act}"; known: {", ".join(ACTIVATIONS)}.')

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2 + self.cls                  # N; the convolution drops the remainder


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),                       # OpenAI's CLIP
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),                               # Flamingo's paper
}


class EncoderBlock(nn.Module):
    """A pre-norm block (ViT, 2010.11929v2, Eq. 2 and 3); gated: each term times tanh of a gate.

    (I2)  x ← x + Attn(LN x);   x ← x + W_down act(W_up LN x)
    """

    def __init__(self, width: int, heads: int, hidden: int, act: str, eps: float, attention_bias: bool = True,
                 gated: bool = False):
        super().__init__()
        if width % heads:
            raise UserError(f"a block of width {width} does not divide into {heads} heads.")
        self.heads, self.act = heads, ACTIVATIONS[act]
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=attention_bias) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        gate = lambda: nn.Parameter(torch.full((1,), math.pi / 4)) if gated else None
        self.attention_gate, self.mlp_gate = gate(), gate()

    def forward(self, x: Tensor, causal: bool = False, bias: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        q, k, v = (split_heads(f(y), self.heads) for f in (self.q, self.k, self.v))     # (B, H, N, E)
        y = self.o(merge_heads(attend(q, k, v, bias, causal)))
        x = x + (y if self.attention_gate is None else self.attention_gate.tanh() * y)          # (I2)
        y = self.down(self.act(self.up(self.norm2(x))))                                         # (I2)
        return x + (y if self.mlp_gate is None else self.mlp_gate.tanh() * y)


class AttentionPool(nn.Module):
    """SigLIP's head: one learned probe attends to all tokens, then a residual feed-forward."""

    def __init__(self, c: ViTConfig):
        super().__init__()
        self.heads, self.act = c.heads, ACTIVATIONS[c.act]
        self.probe = nn.Parameter(torch.randn(1, 1, c.width))
        self.q, self.k, self.v, self.o = (nn.Linear(c.width, c.width) for _ in range(4))
        self.norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.up, self.down = nn.Linear(c.width, c.hidden), nn.Linear(c.hidden, c.width)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(self.q(self.probe).expand(x.shape[0], -1, -1), self.heads)
        k, v = (split_heads(f(x), self.heads) for f in (self.k, self.v))
        y = self.o(merge_heads(attend(q, k, v)))                                # (B, 1, Di)
        return (y + self.down(self.act(self.up(self.norm(y)))))[:, 0]


class ViT(nn.Module):
    """pixels (B, 3, S, S) → tokens (B, N, Di). The class token, where there is one, stands at index 0.

    (I1)  z = [class; W patch_1; …; W patch_N] + positions          (ViT, 2010.11929v2, Eq. 1)
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        c = self.config = config
        self.patch = nn.Conv2d(3, c.width, c.patch, stride=c.patch, bias=c.patch_bias)
        self.cls = nn.Parameter(torch.randn(c.width) * c.width**-0.5) if c.cls else None
        self.positions = nn.Parameter(torch.randn(c.tokens, c.width) * c.width**-0.5)
        self.pre_norm = nn.LayerNorm(c.width, eps=c.norm_eps) if c.pre_norm else None
        self.blocks = nn.ModuleList(EncoderBlock(c.width, c.heads, c.hidden, c.act, c.norm_eps) for _ in range(c.layers))
        self.post_norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.map = AttentionPool(c) if c.pool == "map" else None

    def positions_for(self, rows: int, columns: int) -> Tensor:
        """(rows·columns + cls, Di): the learned grid, resized bicubically (no antialias) when the image has another size."""
        first = int(self.config.cls)
        side = self.config.image_size // self.config.patch
        if (rows, columns) == (side, side):
            return self.positions
        grid = self.positions[first:].T.reshape(1, -1, side, side)
        grid = F.interpolate(grid.float(), size=(rows, columns), mode="bicubic", align_corners=False).to(grid.dtype)
        return torch.cat((self.positions[:first], grid[0].flatten(1).T))

    def forward(self, pixels: Tensor, return_hidden: bool = False, depth: int | None = None):
        """Last state (B, N, Di) before any final norm, or all L+1 of them: [0] enters block 1, [i] leaves block i.

        depth: run only so many blocks.
        """
        patches = self.patch(pixels)                                            # (B, Di, S/p, S/p)
        x = patches.flatten(2).transpose(1, 2)                                  # (B, N, Di)  row by row, from the top left
        if self.cls is not None:
            x = torch.cat((self.cls.expand(x.shape[0], 1, -1), x), dim=1)
        x = x + self.positions_for(*patches.shape[2:])                          # (I1)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        hidden = [x]
        for block in self.blocks[:depth]:
            hidden.append(block(hidden[-1]))
        return hidden if return_hidden else hidden[-1]

    def pool(self, x: Tensor) -> Tensor:
        """One vector per image (B, Di) from the last state: CLIP norms the class token, SigLIP lets a probe attend."""
        if self.config.pool == "map":
            return self.map(self.post_norm(x))
        return self.post_norm(x[:, 0] if self.config.pool == "cls" else self.post_norm(x)[:, 0])   # BLIP-2's is normalised twice

    def features(self, pixels: Tensor, layer: int = -2, cls: bool = False) -> Tensor:
        """What a bridge reads: hidden state `layer`, with or without the class token; blocks after it are not run."""
        n = self.config.layers
        layer = layer if layer >= 0 else n + 1 + layer
        if not 0 <= layer <= n:
            raise UserError(f"this ViT has hidden states 0 to {n}, there is no state {layer}.")
        x = self(pixels, depth=layer)
        return x if cls or not self.config.cls else x[:, 1:]


@dataclass
class Tiles:
    """Images cut into squares: stand in for the pixels of a VLM, and for the features that a TiledViT makes of them."""
    pixels: Tensor      # (ΣM, tiles, 3, S, S), as features (ΣM, tiles, N, Di); an absent tile holds what zeros become
    aspect: Tensor      # (ΣM,) int64: which arrangement of tiles, from 1 (aspect_ratio_ids)
    mask: Tensor        # (ΣM, tiles) bool: True = a tile

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows) -> Tiles:
        return Tiles(self.pixels[rows], self.aspect[rows], self.mask[rows])

    def to(self, device) -> Tiles:
        return Tiles(self.pixels.to(device), self.aspect.to(device), self.mask.to(device))


@dataclass(frozen=True)
class TiledViTConfig(ViTConfig):
    """Defaults: Llama-3.2-Vision, as transformers' configuration class has them (the released files say 560 pixels)."""
    image_size: int = 448       # S of one tile
    patch: int = 14
    width: int = 7680           # Di, what a bridge reads: inner · (1 + number of taps)
    layers: int = 32            # local blocks
    heads: int = 16
    hidden: int = 5120
    act: str = "gelu"
    pool: str = "tiles"
    inner: int = 1280           # width of the blocks
    global_layers: int = 8      # gated blocks after them
    taps: tuple[int, ...] = (3, 7, 15, 23, 30)      # local blocks, from 0, whose outputs are features too
    tiles: int = 4              # most tiles of an image
    aspects: int = 8            # arrangements of tiles, counted from 1

    def __post_init__(self):
        super().__post_init__()
        if self.width != self.inner * (1 + len(self.taps)) or not all(0 <= i < self.layers for i in self.taps):
            raise UserError(f"features of width {self.width} are not {self.inner} times one more than the "
                            f"{len(self.taps)} tapped blocks {list(self.taps)}, or one of these is not among the {self.layers}.")


class TiledViT(nn.Module):
    """Mllama's vision tower (Llama 3, 2407.21783v3, §7; transformers' mllama): the tiles of an image in one sequence.

                         ViT                     TiledViT
        an image         one square              up to `tiles` squares, and which arrangement of them it is (aspect)
        positions p      one table               (1 − tanh g) p + tanh g · p[aspect, tile]
        a tile's place   –                       tanh g' · e'[aspect, tile] on patches, tanh g" · e"[…] after post_norm
        padding          –                       zeros behind each tile, up to a multiple of 8 tokens, after pre_norm
        mask             none                    padding (zeros, absent tiles) does not see padding; the rest sees all
        attention        biases                  no biases
        blocks           L                       L, post_norm, then `global_layers` with two tanh gates each
        ε of the norms   norm_eps                norm_eps in the blocks, 1e-5 in pre_norm and post_norm
        features         one hidden state        the last one, then the outputs of the blocks `taps`, channel by channel
    """

    def __init__(self, config: TiledViTConfig):
        super().__init__()
        c = self.config = config
        block = lambda gated: EncoderBlock(c.inner, c.heads, c.hidden, c.act, c.norm_eps, False, gated)
        table = lambda *shape: nn.Parameter(torch.randn(*shape) * c.inner**-0.5)
        self.patch = nn.Conv2d(3, c.inner, c.patch, stride=c.patch, bias=False)
        self.cls, self.positions = table(c.inner), table(c.tokens, c.inner)                            # p
        self.tile_positions = table(c.aspects + 1, c.tiles * c.tokens * c.inner)                       # p[aspect, tile]
        self.before, self.after = (table(c.aspects + 1, c.tiles * c.inner) for _ in range(2))          # e', e"
        self.gate, self.before_gate, self.after_gate = (nn.Parameter(torch.zeros(1)) for _ in range(3))    # g, g', g"
        self.pre_norm, self.post_norm = nn.LayerNorm(c.inner, eps=1e-5), nn.LayerNorm(c.inner, eps=1e-5)
        self.blocks = nn.ModuleList(block(False) for _ in range(c.layers))
        self.global_blocks = nn.ModuleList(block(True) for _ in range(c.global_layers))

    def forward(self, images: Tiles) -> Tensor:
        """(ΣM, tiles, 3, S, S) → (ΣM, tiles, N, Di), absent tiles too; each tile's class token stands at index 0."""
        c, gate, zeros = self.config, self.gate.tanh(), -self.config.tokens % 8
        of = lambda table: table[images.aspect].unflatten(1, (c.tiles, -1, c.inner))    # (ΣM, tiles, 1 or N, inner)
        x = self.patch(images.pixels.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (-1, c.tiles))
        x = x + self.before_gate.tanh() * of(self.before)                               # (ΣM, tiles, N−1, inner)
        x = torch.cat((self.cls.expand(*x.shape[:2], 1, -1), x), dim=2)
        x = self.pre_norm(x + (1 - gate) * self.positions + gate * of(self.tile_positions))
        x = F.pad(x, (0, 0, 0, zeros)).flatten(1, 2)                                    # (ΣM, tiles·N', inner)
        real = F.pad(images.mask.bool()[..., None].expand(-1, -1, c.tokens), (0, zeros)).flatten(1)
        bias = visible_to_bias(real[:, None, :, None] | real[:, None, None], x.dtype)   # (ΣM, 1, tiles·N', tiles·N')
        taps = {}
        for i, block in enumerate(self.blocks):
            x = block(x, bias=bias)
            if i in c.taps:
                taps[i] = x
        x = (self.post_norm(x).unflatten(1, (c.tiles, -1)) + self.after_gate.tanh() * of(self.after)).flatten(1, 2)
        for block in self.global_blocks:
            x = block(x, bias=bias)
        x = torch.cat((x, torch.stack([taps[i] for i in c.taps], -1).flatten(2)), dim=-1)
        return x.unflatten(1, (c.tiles, -1))[:, :, :c.tokens]                           # (ΣM, tiles, N, Di)

    def features(self, pixels: Tiles, layer: int = -1, cls: bool = True) -> Tiles:
        """What a bridge reads: the features of every tile, with the aspect and the mask they belong to."""
        c = self.config
        if layer != -1 or not cls:
            raise UserError(f"a tower of tiles is read with reads_layer=-1, reads_cls=True, not {layer} and {cls}.")
        if not isinstance(pixels, Tiles) or pixels.pixels.shape[1:] != (c.tiles, 3, c.image_size, c.image_size):
            got = f"Tiles of shape {tuple(pixels.pixels.shape)}" if isinstance(pixels, Tiles) else type(pixels).__name__
            raise UserError(f"this tower reads Tiles of shape (images, {c.tiles}, 3, {c.image_size}, {c.image_size}), "
                            f"not {got}; make them with Tiles(*data.tile_pixels(images, …)).")
        return Tiles(self(pixels), pixels.aspect, pixels.mask)


# ------------------------------------------------------------------------------------------------------------------
# 5. CLIP's text tower, and both towers together
# ------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 512       # V
    width: int = 128
    layers: int = 2
    heads: int = 4
    hidden: int = 512
    context: int = 77           # longest text in tokens
    act: str = "quick_gelu"
    norm_eps: float = 1e-5
    end: int | None = None      # id of the end-of-text token; None = the largest id of each row


class TextTransformer(nn.Module):
    """CLIP's text tower: a causal pre-norm transformer whose state at the end-of-text token stands for the text."""

    def __init__(self, config: TextConfig):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.positions = nn.Parameter(torch.randn(c.context, c.width) * 0.01)
        self.blocks = nn.ModuleList(EncoderBlock(c.width, c.heads, c.hidden, c.act, c.norm_eps) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        nn.init.normal_(self.embed.weight, 0.0, 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, width), after the final norm. Padding follows the end token, so causality hides it."""
        x = self.embed(tokens) + self.positions[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        return self.norm(x)

    def pool(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(B, width): the state at the FIRST end-of-text token."""
        at = tokens.argmax(-1) if self.config.end is None else (tokens == self.config.end).int().argmax(-1)
        return x[torch.arange(len(x), device=x.device), at]


class CLIP(nn.Module):
    """Two towers and a temperature (2103.00020v1, Figure 3); the loss stands in train.ClipTask.

    (I3)  S_ij = e^s cos(image_i, text_j)
    (I4)  loss = ½ (mean_i −log softmax_j(S_i·)_i + mean_j −log softmax_i(S_·j)_j)
    """

    def __init__(self, vit: ViT, text: TextTransformer, width: int):
        super().__init__()
        self.vit, self.text = vit, text
        self.image_projection = nn.Linear(vit.config.width, width, bias=False)
        self.text_projection = nn.Linear(text.config.width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))       # s; logits are e^s · cosine

    def embed_images(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.image_projection(self.vit.pool(self.vit(pixels))), dim=-1)          # (B, width)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text_projection(self.text.pool(self.text(tokens), tokens)), dim=-1)  # (B, width)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """(B_images, B_texts): scaled cosine similarities."""
        return self.logit_scale.exp() * self.embed_images(pixels) @ self.embed_texts(tokens).T      # (I3)


# ------------------------------------------------------------------------------------------------------------------
# 6. VLM: pixels → features → see → prefix in the place of the image → decoder → logits
# ------------------------------------------------------------------------------------------------------------------

class VLM(nn.Module):
    """ViT, bridge and decoder. `image_token`: the id that stands for an image when the bridge has no prefix (None: nothing)."""

    def __init__(self, vit: ViT, bridge: Bridge, decoder: Decoder, image_token: int | None = None):
        super().__init__()
        self.vit, self.bridge, self.decoder = vit, bridge, decoder
        self.image_token = image_token
        self.processor = None                           # how pictures become pixels (data.load_processor); None: as CLIP's do

    def features(self, pixels: Tensor) -> Tensor:
        """(ΣM, 3, S, S) → (ΣM, N, Di): the hidden state that this bridge reads."""
        return self.vit.features(pixels, self.bridge.reads_layer, self.bridge.reads_cls)

    def prepare(self, tokens: Tensor, features: Tensor, mask: Tensor | None = None, labels: Tensor | None = None,
                left: bool | None = None, bridge_tokens: Tensor | None = None, bridge_mask: Tensor | None = None):
        """Put the images into the text: what the decoder needs, and the labels that moved with the expansion.

        tokens (B, T) with one IMAGE per image → dict(embeds (B, T', D), mask, bridge, visual), labels (B, T').
        An IMAGE becomes the bridge's K soft tokens, or the ordinary token `image_token`, or nothing. Padding stays on the
        side it came from, on the right where rows of one length unfold to several; left=True puts it in front.
        bridge_tokens (ΣM, T) and their bridge_mask go to the bridge's `see`: an instruction for the Q-Former itself.
        """
        is_image = tokens == IMAGE
        if int(is_image.sum()) != len(features):
            raise UserError(f"the text has {int(is_image.sum())} image placeholders but {len(features)} images were given.")
        real = torch.ones_like(is_image) if mask is None else mask.bool()
        row, column = is_image.nonzero(as_tuple=True)                           # (ΣM,) row by row, from left to right
        seen = is_image.cumsum(1)                                               # (B, T) images at or before each position
        where = Where(row, seen[row, column], seen)
        visual = self.bridge.see(features, where, **({} if bridge_tokens is None else dict(text=bridge_tokens, text_mask=bridge_mask)))
        soft = self.bridge.prefix(visual)                                       # (ΣM, K, D) or None
        inputs = dict(bridge=self.bridge, visual=visual if soft is None else None)      # of a prefix nothing else is read
        if soft is None and self.image_token is not None:                       # the image is an ordinary word
            labels = None if labels is None else labels.masked_fill(is_image, IGNORE)
            return dict(embeds=self.decoder.embed(tokens.masked_fill(is_image, self.image_token)), mask=mask, **inputs), labels

        K = 0 if soft is None else soft.shape[1]
        width = torch.where(is_image, K, real.long())                           # (B, T) positions that each token becomes
        length = width.sum(1)                                                   # (B,)
        longest = int(length.max())
        left = bool((~real[:, 0]).any()) if left is None else left
        gap = (longest - length)[:, None] if left else 0                        # padding in front of each row
        start = width.cumsum(1) - width + gap                                   # (B, T) first position of each token
        r, c = (real & ~is_image).nonzero(as_tuple=True)                        # the words
        word = lambda new, old: new.index_put((r, start[r, c]), old[r, c])
        embeds = self.decoder.embed(tokens.masked_fill(is_image, 0))            # (B, T, D)
        new = word(embeds.new_zeros(*length.shape, longest, embeds.shape[-1]), embeds)
        if K:
            at = start[row, column][:, None] + torch.arange(K, device=tokens.device)        # (ΣM, K)
            new = new.to(soft.dtype).index_put((row[:, None].expand_as(at), at), soft)
        where.last = word(seen.new_zeros(*length.shape, longest), seen)         # a soft token's own entry is never read
        if labels is not None:
            labels = word(labels.new_full((*length.shape, longest), IGNORE), labels)
        position = torch.arange(longest, device=tokens.device)
        there = position >= gap if left else position < length[:, None]         # (B, T')
        if mask is not None and mask.dtype != torch.bool:                       # packed: an image belongs to its placeholder's document
            there = word(mask.new_zeros(*length.shape, longest), mask)
            if K:
                there.index_put_((row[:, None].expand_as(at), at), mask[row, column][:, None].expand_as(at))
        return dict(embeds=new, mask=None if there.dtype == torch.bool and bool(there.all()) else there, **inputs), labels

    def forward(self, tokens: Tensor, pixels: Tensor | None = None, mask: Tensor | None = None, *, features: Tensor | None = None,
                return_hidden: bool = False, return_attention: bool = False, **text):
        """Logits (B, T', V) over the expanded sequence; with return_attention that and {name: weights}, see `watching`.

        `features` (ΣM, N, Di) may be given instead of pixels (cached); text: bridge_tokens, bridge_mask as in `prepare`.
        """
        features = self.features(pixels) if features is None else features
        if return_attention:
            with watching(self) as attention:
                return self(tokens, None, mask, features=features, return_hidden=return_hidden, **text), attention
        inputs, _ = self.prepare(tokens, features, mask, **text)
        return self.decoder(return_hidden=return_hidden, **inputs)

    def loss(self, tokens: Tensor, labels: Tensor, pixels: Tensor | None = None, mask: Tensor | None = None,
             features: Tensor | None = None, **text) -> tuple[Tensor, int]:
        """Σ −log p(y_t | y_<t, image) over the supervised tokens, and their number.

        labels (B, T): the token itself where it is supervised, IGNORE elsewhere; the shift happens here. Logits are
        computed at supervised positions only: the vocabulary projection dominates a small decoder.
        """
        features = self.features(pixels) if features is None else features
        inputs, labels = self.prepare(tokens, features, mask, labels, **text)
        return next_token_loss(self.decoder, labels, **inputs)

    @torch.no_grad()
    def generate(self, tokens: Tensor, pixels: Tensor | None = None, max_new_tokens: int = 32, temperature: float = 0.0,
                 mask: Tensor | None = None, features: Tensor | None = None, bridge_tokens: Tensor | None = None,
                 bridge_mask: Tensor | None = None, **kw) -> Tensor:
        """New tokens (B, T_new); arguments as in Decoder.generate. Padding may stand on either side."""
        features = self.features(pixels) if features is None else features
        inputs, _ = self.prepare(tokens, features, mask, left=True, bridge_tokens=bridge_tokens, bridge_mask=bridge_mask)
        return self.decoder.generate(max_new_tokens=max_new_tokens, temperature=temperature, **inputs, **kw)


def next_token_loss(decoder: Decoder, labels: Tensor, **inputs) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of labels (B, T) under the decoder's predictions one position earlier, and the count."""
    hidden = decoder.states(**inputs)[-1]
    target = labels[:, 1:]
    keep = target != IGNORE
    logits = decoder.head(hidden[:, :-1][keep])                                 # (supervised, V)
    return F.cross_entropy(logits.float(), target[keep], reduction="sum"), int(keep.sum())


# ------------------------------------------------------------------------------------------------------------------
# 7. Weights on disk
# ------------------------------------------------------------------------------------------------------------------

# ours → theirs; {i} counts layers. "name[1/3]" is the second third of the rows of a fused matrix; "name[rope/H]" has the rows of each
# of H heads reordered from Meta's RoPE to ours; "name[zero]" is zeros of that shape, "name[rows/n]" (m·n, …) seen as
# (m, n, …); "a & b" has the rows of b after those of a.
DECODER_NAMES = {       # Hugging Face Llama, below "model."; the head stands beside it
    "embed.weight": "embed_tokens.weight",
    "norm.weight": "norm.weight",
    "layers.{i}.norm1.weight": "layers.{i}.input_layernorm.weight",
    "layers.{i}.norm2.weight": "layers.{i}.post_attention_layernorm.weight",
    **{f"layers.{{i}}.attention.{p}.{w}": f"layers.{{i}}.self_attn.{p}_proj.{w}" for p in "qkvo" for w in ("weight", "bias")},
    **{f"layers.{{i}}.mlp.{p}.{w}": f"layers.{{i}}.mlp.{p}_proj.{w}" for p in ("gate", "up", "down") for w in ("weight", "bias")},
}
META_NAMES = {          # Llama as Meta publishes it; H query heads, G key/value heads
    "embed.weight": "tok_embeddings.weight", "lm_head.weight": "output.weight",
    "layers.{i}.norm1.weight": "layers.{i}.attention_norm.weight", "layers.{i}.norm2.weight": "layers.{i}.ffn_norm.weight",
    **{f"layers.{{i}}.attention.{p}.{w}": f"layers.{{i}}.attention.w{p}.{w}{order}" for w in ("weight", "bias") for p, order in (
        ("q", "[rope/{H}]"), ("k", "[rope/{G}]"), ("v", ""), ("o", ""))},
    **{f"layers.{{i}}.mlp.{p}.{w}": f"layers.{{i}}.feed_forward.w{n}.{w}" for w in ("weight", "bias") for p, n in (
        ("gate", 1), ("down", 2), ("up", 3))},
}
ENCODER_NAMES = {       # a block of CLIP's or SigLIP's towers; the prefix is put in front
    **{f"blocks.{{i}}.{a}.{w}": f"encoder.layers.{{i}}.{b}.{w}" for w in ("weight", "bias") for a, b in (
        ("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("v", "self_attn.v_proj"), ("o", "self_attn.out_proj"),
        ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("up", "mlp.fc1"), ("down", "mlp.fc2"))},
}
VIT_NAMES = {           # CLIP and SigLIP
    "cls": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding.weight",
    **{f"patch.{w}": f"embeddings.patch_embedding.{w}" for w in ("weight", "bias")},
    **{f"pre_norm.{w}": f"pre_layrnorm.{w}" for w in ("weight", "bias")},       # sic
    **{f"post_norm.{w}": f"post_layernorm.{w}" for w in ("weight", "bias")},
    **ENCODER_NAMES,
    "map.probe": "head.probe",
    **{f"map.{p}.{w}": f"head.attention.in_proj_{w}[{n}/3]" for n, p in enumerate("qkv") for w in ("weight", "bias")},
    **{f"map.{a}.{w}": f"head.{b}.{w}" for w in ("weight", "bias") for a, b in (
        ("o", "attention.out_proj"), ("norm", "layernorm"), ("up", "mlp.fc1"), ("down", "mlp.fc2"))},
}
EVA_NAMES = {           # BLIP-2's vision model: fused qkv, bare parameters for the embeddings
    **VIT_NAMES,
    "positions": "embeddings.position_embedding",
    **{f"blocks.{{i}}.{p}.{w}": f"encoder.layers.{{i}}.self_attn.qkv.{w}[{n}/3]" for n, p in enumerate("qkv") for w in ("weight", "bias")},
    **{f"blocks.{{i}}.o.{w}": f"encoder.layers.{{i}}.self_attn.projection.{w}" for w in ("weight", "bias")},
}
TILED_VIT_NAMES = {     # Mllama's vision model
    "patch.weight": "patch_embedding.weight", "cls": "class_embedding",
    **{f"{a}_norm.{w}": f"layernorm_{a}.{w}" for a in ("pre", "post") for w in ("weight", "bias")},
    "positions": "gated_positional_embedding.embedding", "gate": "gated_positional_embedding.gate",
    "tile_positions": "gated_positional_embedding.tile_embedding.weight",
    "before": "pre_tile_positional_embedding.embedding.weight", "before_gate": "pre_tile_positional_embedding.gate",
    "after": "post_tile_positional_embedding.embedding.weight", "after_gate": "post_tile_positional_embedding.gate",
}
TILED_BLOCK_NAMES = {   # its blocks; "global_" stands in front of both names for the gated ones
    **{f"blocks.{{i}}.{p}.weight": f"transformer.layers.{{i}}.self_attn.{p}_proj.weight" for p in "qkvo"},
    **{f"blocks.{{i}}.{a}.{w}": f"transformer.layers.{{i}}.{b}.{w}" for w in ("weight", "bias") for a, b in (
        ("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm"), ("up", "mlp.fc1"), ("down", "mlp.fc2"))},
    "blocks.{i}.attention_gate": "transformer.layers.{i}.gate_attn",
    "blocks.{i}.mlp_gate": "transformer.layers.{i}.gate_ffn",
}
OPENAI_NAMES = {        # CLIP's image tower as its authors store it, below "visual."
    "cls": "class_embedding", "positions": "positional_embedding", "patch.weight": "conv1.weight",
    **{f"{a}.{w}": f"{b}.{w}" for w in ("weight", "bias") for a, b in (("pre_norm", "ln_pre"), ("post_norm", "ln_post"))},
    **{f"blocks.{{i}}.{p}.{w}": f"transformer.resblocks.{{i}}.attn.in_proj_{w}[{n}/3]" for w in ("weight", "bias")
       for n, p in enumerate("qkv")},
    **{f"blocks.{{i}}.{a}.{w}": f"transformer.resblocks.{{i}}.{b}.{w}" for w in ("weight", "bias") for a, b in (
        ("o", "attn.out_proj"), ("norm1", "ln_1"), ("norm2", "ln_2"), ("up", "mlp.c_fc"), ("down", "mlp.c_proj"))},
}
TEXT_NAMES = {
    "embed.weight": "embeddings.token_embedding.weight",
    "positions": "embeddings.position_embedding.weight",
    **{f"norm.{w}": f"final_layer_norm.{w}" for w in ("weight", "bias")},
    **ENCODER_NAMES,
}
IGNORED = ("rotary_emb.inv_freq", "rope.freqs", "position_ids")         # buffers of older files: recomputed, never read


PICKLES = (".pth", ".pt", ".bin")


def open_tensors(file: Path):
    """A file by its ending: safe_open, or the same two methods for a pickle, of which nothing but tensors is read, and mapped."""
    try:
        if file.suffix not in PICKLES:
            return safe_open(file, framework="pt")
        print(f"{file}: a pickle; only its tensors are read (torch.load, weights_only=True).", file=sys.stderr)
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        held = {n: t for n, t in held.get("model", held).items() if isinstance(t, Tensor)}      # some keep a config beside "model"
        return SimpleNamespace(keys=held.keys, get_tensor=held.__getitem__)
    except (SafetensorError, OSError, EOFError, RuntimeError, AttributeError, pickle.UnpicklingError) as e:
        kind = "PyTorch" if file.suffix in PICKLES else "safetensors"
        raise UserError(f"{file}: not a readable {kind} file ({(str(e) or 'empty').splitlines()[0]}); it may be truncated, "
                        "copy or download it again.") from None


class Checkpoint:
    """The tensors of a file or a folder (model.safetensors, shards with an index, Meta's consolidated files), read one by one.

    where: tensor → the files that hold it: several for Meta's model-parallel files only, of which each has a block of every
    matrix, rows or columns, and a copy of every norm.
    """

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; give a folder with config.json and *.safetensors.")
        files = [path] if path.is_file() else []
        for name in () if files else ("model.safetensors", "*.safetensors", "pytorch_model.bin", "consolidated.*.pth", "*.pth"):
            index = path / f"{name}.index.json"
            files = sorted({path / f for f in read_json(index)["weight_map"].values()} if index.exists() else path.glob(name))
            if files:
                break
        if not files:
            raise UserError(f"{path}: holds no .safetensors file (nor pytorch_model.bin or .pth), so no weights.")
        self.path, self.where, self.files = path, {}, {}
        for file in files:
            if not file.exists():
                raise UserError(f"{index}: names the shard {file.name}, which is missing; download it again.")
            self.files[file] = open_tensors(file)
            for name in self.files[file].keys():
                self.where.setdefault(name, []).append(file)

    def missing(self, name: str) -> list[str]:
        """The tensors that a name of the tables speaks of and that are not here."""
        return [n for n in pieces(name) if n not in self.where]

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored. Its file is opened anew: what is read through a mapping stays in memory as long as that."""
        parts = [(self.files[f] if f.suffix in PICKLES else open_tensors(f)).get_tensor(name) for f in self.where[name]]
        if len(parts) == 1:
            return parts[0]
        if len(parts) < len(self.files) or len({p.shape for p in parts}) > 1:
            raise UserError(f'{self.path}: tensor "{name}" is in {len(parts)} of {len(self.files)} files, with shapes '
                            f'{", ".join(str(tuple(p.shape)) for p in parts)}; model-parallel files hold equal parts of each.')
        if parts[0].ndim == 1:
            return parts[0]
        # (out, in) is cut along `out`, or along `in` where its input is cut: W_o, W_down, the embeddings of Llama 1 and 2
        table = name == "tok_embeddings.weight" and parts[0].shape[1] < self.shape("norm.weight")[0]
        return torch.cat(parts, int(table or name.endswith(("wo.weight", "w2.weight"))))

    def get(self, name: str) -> Tensor:
        """The tensor, or what "&" and brackets make of it and others (see the tables of names)."""
        if " & " in name:
            parts = [self.get(n) for n in name.split(" & ")]
            for n, t in zip(pieces(name), parts):
                if t.shape[1:] != parts[0].shape[1:]:
                    raise UserError(f'{self.where[n][0]}: tensor "{n}" has shape {tuple(t.shape)}, but {tuple(parts[0].shape)} is that of '
                                    f'"{pieces(name)[0]}", with which it belongs together.')
            return torch.cat(parts)
        name, _, part = name.partition("[")
        tensor = self.read(name)
        if not part or not tensor.ndim:
            return tensor
        what, _, n = part.rstrip("]").partition("/")
        if what == "zero":
            return torch.zeros_like(tensor)
        if what == "rows":
            return tensor if len(tensor) % int(n) else tensor.unflatten(0, (-1, int(n)))
        if what == "rope":                              # (E/2, 2) of Meta's neighbours → (2, E/2): firsts, then seconds
            pairs = (int(n), -1, 2)
            return tensor if len(tensor) % (2 * int(n)) else tensor.unflatten(0, pairs).transpose(1, 2).flatten(0, 2)
        return tensor.tensor_split(int(n))[int(what)]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.where:
            raise UserError(f'{self.path}: tensor "{name}" is missing, so this is not the layout that was expected here.')
        return tuple(self.files[self.where[name][0]].get_tensor(name).shape)

    def count(self, pattern: str) -> int:
        """How many layers there are: the smallest i for which pattern.format(i) is no tensor."""
        return next(i for i in itertools.count() if pattern.format(i) not in self.where)

    def prefix(self, *candidates: str) -> str:
        """The first of these with which the name of some tensor starts; the last one where none does."""
        return next((c for c in candidates if any(n.startswith(c) for n in self.where)), candidates[-1])


def pieces(name: str) -> list[str]:
    """The plain names in one of the tables' names: "a[1/3] & b" → ["a", "b"]."""
    return [n.split("[")[0] for n in name.split(" & ")]


def expand(names: dict[str, str], layers: int, prefix: str = "", ours: str = "", **heads: int) -> dict[str, str]:
    """The table for so many layers, with a prefix on their names and on ours; heads: what stands in for {H} and {G}."""
    return {ours + a.format(i=i): prefix + b.format(i=i, **heads)
            for a, b in names.items() for i in (range(layers) if "{i}" in a else (0,))}


def decoder_names(config: DecoderConfig, trunk: str = "model.", head: str = "", ours: str = "") -> dict[str, str]:
    """Hugging Face's names of a decoder that lies below `trunk`, with its output projection at head + "lm_head"."""
    return {**expand(DECODER_NAMES, config.layers, trunk, ours), ours + "lm_head.weight": head + "lm_head.weight"}


def fill(module: nn.Module, checkpoint: Checkpoint, names: dict[str, str], optional: tuple[str, ...] = (), device=None,
         dtype=None) -> None:
    """Give every parameter of a module (built on the meta device) its tensor; strict in both directions.

    names: ours → theirs. A tensor that is missing, has another shape, or that nobody asked for is a UserError naming it.
    Tensors whose name starts with `optional` may be left over (the other tower of a dual encoder).
    """
    used, file = set(), checkpoint.path
    for ours, parameter in list(module.named_parameters()):
        theirs = names.get(ours, ours)
        for missing in checkpoint.missing(theirs):
            raise UserError(f'{file}: tensor "{missing}" is missing; this model needs it'
                            + (f" with shape {tuple(parameter.shape)}." if theirs == missing else "."))
        tensor = checkpoint.get(theirs)
        if tensor.numel() != parameter.numel() or [n for n in tensor.shape if n > 1] != [n for n in parameter.shape if n > 1]:
            where = checkpoint.where[pieces(theirs)[0]][0]
            raise UserError(f'{where}: tensor "{theirs}" has shape {tuple(tensor.shape)}, '
                            f"this model expects {tuple(parameter.shape)}; the config.json beside it may belong to another model.")
        used.update(pieces(theirs))
        owner, _, leaf = ours.rpartition(".")
        tensor = tensor.reshape(parameter.shape).to(device=device, dtype=dtype or tensor.dtype, copy=True)      # off the file
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    extra = [n for n in checkpoint.where if n not in used and not n.endswith(IGNORED) and not n.startswith(optional)]
    if extra:
        raise UserError(f'{file}: {len(extra)} tensors are not part of this model (first: "{extra[0]}"); '
                        "the config.json beside it may belong to another model.")


def read_json(path: Path) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a model folder needs config.json beside its weights.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid JSON ({e}).") from None


@contextlib.contextmanager
def atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Write to a temporary name, flush to the disk, rename: a reader or a crash sees the old file or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    finally:
        Path(name).unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value) -> None:
    with atomically(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with atomically(path) as tmp:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, tmp, {"format": "pt", **(metadata or {})})


# Hugging Face's config.json ↔ our fields.
LLAMAS = ("llama", "qwen2", "mistral", "llava", "llava_llama", "idefics", "mllama_text_model")  # model_types with Llama's fields
ROPES = {               # rope_type → the numbers it needs
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def decoder_config(c: dict, where: str = "config.json") -> DecoderConfig:
    """A Llama config.json, as published (rope_theta, rope_scaling) or as transformers 5 writes it (rope_parameters).

    Or Qwen2's, whose q, k and v have biases, or Mistral's where no sliding window narrows the context. Whatever would make it
    another function (another family, activation, RoPE scaling) is a UserError.
    """
    ropes = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind, scaling = c.get("model_type") or "llama", ropes.get("rope_type", ropes.get("type", "default"))
    context = c.get("max_position_embeddings", 2048)
    windowed = kind == "mistral" or c.get("use_sliding_window")                 # Qwen2's files name a window and do not use it
    window = c.get("sliding_window", 4096) if windowed else None
    if kind not in LLAMAS:
        raise UserError(f'{where}: model_type "{kind}" is no decoder that is known here; {nearest(kind, LLAMAS)}')
    if window and window < context:
        raise UserError(f'{where}: a sliding window of {window} tokens ("{kind}", context {context}) is not supported; here '
                        "every token sees its whole past.")
    if c.get("hidden_act", "silu") != "silu":
        raise UserError(f'{where}: activation "{c["hidden_act"]}" is not supported in a decoder; known: silu.')
    if scaling not in ROPES:
        raise UserError(f'{where}: RoPE scaling "{scaling}" is not supported; known: {", ".join(ROPES)}.')
    try:
        return DecoderConfig(
            vocab_size=c["vocab_size"], width=c["hidden_size"], layers=c["num_hidden_layers"], heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            head_width=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"], hidden=c["intermediate_size"],
            rope_theta=ropes.get("rope_theta") or c.get("rope_theta") or 10000.0,
            rope_scaling={"rope_type": scaling, **{k: ropes[k] for k in ROPES[scaling]}} if ROPES[scaling] else None,
            norm_eps=c["rms_norm_eps"], tied=c.get("tie_word_embeddings", False),
            attention_bias="qkv" if kind == "qwen2" else c.get("attention_bias", False),
            mlp_bias=c.get("mlp_bias", False), context=context, extra_tokens=c.get("extra_tokens", 0))
    except KeyError as e:
        raise UserError(f"{where}: the key {e} is missing; a Llama config.json has it.") from None


def meta_decoder_config(path: Path, checkpoint: Checkpoint) -> DecoderConfig:
    """Meta's params.json, and what it leaves to the tensors beside it: the vocabulary (-1), whether the output is tied."""
    p = read_json(path / "params.json")
    wq, table, head = "layers.0.attention.wq.weight", "tok_embeddings.weight", "output.weight"
    try:
        D, H, theta, step = p["dim"], p["n_heads"], p.get("rope_theta", 10000.0), p["multiple_of"]
        parts = max(1, D // checkpoint.shape(wq)[0])                            # W_q (H·E, D) is cut along its rows
        for file in (f"consolidated.{i:02d}" for i in range(parts if parts > 1 else 0)):
            if file not in {f.stem for f in checkpoint.files}:
                raise UserError(f'{path}: {file} is missing; "{wq}" has {D // parts} of {D} rows in each file, so there are {parts}.')
        V = p["vocab_size"] if p.get("vocab_size", -1) > 0 else checkpoint.shape(head)[0] * parts
        hidden = int(int(8 * D / 3) * (p.get("ffn_dim_multiplier") or 1))       # ⅔ of 4 D: three matrices weigh as much as two
        tied = parts == 1 and checkpoint.shape(head) == checkpoint.shape(table) and (
            torch.equal(checkpoint.read(head), checkpoint.read(table)))         # Llama 3.2 1B and 3B store it twice
        # Llama 3.1's scaling. Its factor stands nowhere: 8, but 32 in the two tied models (llama-models, issue 241)
        numbers = dict(zip(ROPES["llama3"], (32.0 if tied else 8.0, 1.0, 4.0, 8192)))
        return DecoderConfig(
            V, D, p["n_layers"], H, p.get("n_kv_heads") or H, D // H, -(-hidden // step) * step, theta,
            {"rope_type": "llama3", **numbers} if p.get("use_scaled_rope") else None, p["norm_eps"], tied,
            context=131072 if p.get("use_scaled_rope") else 8192 if theta > 1e4 else 2048)
    except KeyError as e:
        raise UserError(f"{path}/params.json: the key {e} is missing; Meta's params.json has it.") from None


def hf_decoder_config(c: DecoderConfig, **extra) -> dict:
    if c.attention_bias == "qkv":
        llama = hf_decoder_config(replace(c, attention_bias=False), **extra)
        return {**llama, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    scaling = {"rope_scaling": c.rope_scaling} if c.rope_scaling else {}
    extra |= {"extra_tokens": c.extra_tokens} if c.extra_tokens else {}         # ours alone; transformers has no such Llama
    return dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", vocab_size=c.vocab_size, hidden_size=c.width,
                num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_width,
                intermediate_size=c.hidden, rope_theta=c.rope_theta, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
                attention_bias=c.attention_bias, mlp_bias=c.mlp_bias, max_position_embeddings=c.context, **scaling, **extra)


# What transformers assumes where a config inside another config is silent: published LLaVA files leave most of Llama's fields out.
LLAMA_DEFAULTS = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                      max_position_embeddings=2048, rms_norm_eps=1e-6)
CLIP_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=32)
CLIP_TEXT_DEFAULTS = dict(vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
                          max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5)
VIT_DEFAULTS = {
    "clip": dict(CLIP_DEFAULTS, hidden_act="quick_gelu", layer_norm_eps=1e-5),
    "siglip": dict(CLIP_DEFAULTS, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
    "eva": dict(hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16, image_size=224,
                patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6),
}
HF_ACT = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def vit_config(c: dict, where: str = "config.json") -> tuple[ViTConfig, str]:
    """(our config, family: clip | siglip | eva) from a CLIP, SigLIP or BLIP-2 vision config.json, alone or in a dual encoder's."""
    nested, kind = c.get("vision_config"), (c.get("vision_config") or c).get("model_type") or c.get("model_type", "")
    families = {"clip": "clip", "siglip": "siglip", "blip_2": "eva", "instructblip": "eva"}
    family = families.get(kind.removesuffix("_vision_model"))
    if family is None:
        raise UserError(f'{where}: model_type "{kind}" is no vision tower that is known here ({", ".join(families)}).')
    defaults = VIT_DEFAULTS[family]
    if nested is None:                                  # a config of its own says all of its sizes
        defaults, nested = {k: defaults[k] for k in ("hidden_act", "layer_norm_eps")}, c
    c = {**defaults, **nested}
    flags = {"clip": {}, "siglip": dict(cls=False, pre_norm=False, patch_bias=True, pool="map" if c.get("vision_use_head", True) else "all"),
             "eva": dict(pre_norm=False, patch_bias=True, pool="all")}[family]
    act = HF_ACT.get(c["hidden_act"])
    if act is None:
        raise UserError(f'{where}: activation "{c["hidden_act"]}" is not supported; known: {", ".join(HF_ACT)}.')
    try:
        return ViTConfig(image_size=c["image_size"], patch=c["patch_size"], width=c["hidden_size"], layers=c["num_hidden_layers"],
                         heads=c["num_attention_heads"], hidden=c["intermediate_size"], act=act, norm_eps=c["layer_norm_eps"],
                         **flags), family
    except KeyError as e:
        raise UserError(f"{where}: the key {e} is missing; a {kind} config.json has it.") from None


def openai_vit_config(checkpoint: Checkpoint, heads: int | None = None) -> ViTConfig:
    """CLIP's image tower by the shapes in its authors' file, as their build_model has it; heads are 64 wide unless given."""
    file, at = checkpoint.path, checkpoint.prefix("clip.visual.", "visual.")
    if at + "conv1.weight" not in checkpoint.where:
        raise UserError(f'{file}: without a config.json only CLIP\'s own layout is read, and tensor "{at}conv1.weight" is missing.')
    width, *_, patch = checkpoint.shape(at + "conv1.weight")
    if not heads and width % 64:
        raise UserError(f"{file}: a tower of width {width} has no heads of width 64, CLIP's; say how many there are with heads=….")
    side = round((checkpoint.shape(at + "positional_embedding")[0] - 1) ** 0.5)
    at += "transformer.resblocks."
    blocks = {n.removeprefix(at).split(".")[0] for n in checkpoint.where if n.startswith(at)}
    return ViTConfig(side * patch, patch, width, len(blocks), heads or width // 64, checkpoint.shape(at + "0.mlp.c_fc.weight")[0])


def tiled_vit_config(c: dict, where: str = "config.json") -> TiledViTConfig:
    """Mllama's vision_config; what it leaves out has transformers' default, as in TiledViTConfig."""
    known = dict(image_size="image_size", patch="patch_size", width="vision_output_dim", layers="num_hidden_layers",
                 heads="attention_heads", hidden="intermediate_size", norm_eps="norm_eps", inner="hidden_size",
                 global_layers="num_global_layers", tiles="max_num_tiles", taps="intermediate_layers_indices",
                 aspects="supported_aspect_ratios", act="hidden_act")
    given = {ours: c[theirs] for ours, theirs in known.items() if c.get(theirs) is not None}
    if given.get("act", "gelu") not in HF_ACT:
        raise UserError(f'{where}: activation "{given["act"]}" is not supported; known: {", ".join(HF_ACT)}.')
    change = dict(taps=tuple, aspects=len, act=HF_ACT.get)
    return TiledViTConfig(**{k: change[k](v) if k in change else v for k, v in given.items()})


def hf_vit_config(c: ViTConfig) -> dict:
    family = "siglip" if not c.cls else "clip" if c.pre_norm and c.pool == "cls" else ""
    act = {ours: theirs for theirs, ours in HF_ACT.items()}.get(c.act)
    if not family or act is None:
        raise UserError("only CLIP- and SigLIP-style towers can be written; a BLIP-2 tower stays in the folder it was loaded from.")
    return dict(architectures=[{"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}[family]], model_type=f"{family}_vision_model",
                image_size=c.image_size, patch_size=c.patch, hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
                intermediate_size=c.hidden, hidden_act=act, layer_norm_eps=c.norm_eps, num_channels=3,
                **({} if c.cls else {"vision_use_head": c.pool == "map"}))


def load_decoder(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> Decoder:
    """A Llama folder as Hugging Face has it (config.json; one file or shards) or as Meta does (params.json; one or several
    consolidated files) → Decoder in eval mode; dtype None = float32."""
    path = Path(path)
    if (path / "params.json").exists() and not (checkpoint := Checkpoint(path)).prefix("model.", ""):
        c = meta_decoder_config(path, checkpoint)
        names = expand(META_NAMES, c.layers, H=c.heads, G=c.kv_heads)
    else:
        c = decoder_config(read_json(path / "config.json"), f"{path}/config.json")
        names, checkpoint = decoder_names(c), Checkpoint(path)
    with torch.device("meta"):
        decoder = Decoder(c)
    fill(decoder, checkpoint, names, (names["lm_head.weight"],) if c.tied else (), device, dtype or torch.float32)
    return decoder.eval()


def load_vit(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None, heads: int | None = None) -> ViT:
    """A CLIP, SigLIP or BLIP-2 vision folder, alone or inside a dual encoder → ViT in eval mode; dtype None = float32.

    Or CLIP as its authors store it (visual.*, clip.visual.*): a file, or a folder without a config.json. heads: how many, if
    not 64 wide.
    """
    path = Path(path)
    if path.is_file() or path.is_dir() and not (path / "config.json").exists():
        config, family = openai_vit_config(Checkpoint(path), heads), "openai"
    else:
        config, family = vit_config(read_json(path / "config.json"), f"{path}/config.json")
    with torch.device("meta"):
        vit = ViT(config)
    fill(vit, *vit_file(path, config, family), device=device, dtype=dtype or torch.float32)
    return vit.eval()


def vit_file(path: str | os.PathLike, config: ViTConfig, family: str) -> tuple[Checkpoint, dict[str, str], tuple[str, ...]]:
    """The checkpoint of a vision tower, the names in it, and what else may lie there; arguments for `fill`."""
    checkpoint = Checkpoint(path)
    if family == "openai":                              # the rest is the text tower, and what both project with
        root = checkpoint.prefix("clip.visual.", "visual.").removesuffix("visual.")
        others = ("visual.proj", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection",
                  "logit_scale", "input_resolution", "context_length", "vocab_size")
        return checkpoint, expand(OPENAI_NAMES, config.layers, root + "visual."), tuple(root + n for n in others)
    prefix = checkpoint.prefix("vision_model.", "")
    names = expand(EVA_NAMES if family == "eva" else VIT_NAMES, config.layers, prefix)
    return checkpoint, names, ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias") if prefix else ()


def load_clip(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> CLIP:
    """A Hugging Face CLIPModel folder → both towers; clip(pixels, tokens) → scaled cosine similarities."""
    c = read_json(Path(path) / "config.json")
    config, family = vit_config(c, f"{path}/config.json")
    if "text_config" not in c or family != "clip":
        raise UserError(f"{path}/config.json: has no text_config of CLIP's, so this is no CLIPModel; load_vit reads a vision tower alone.")
    t = {**CLIP_TEXT_DEFAULTS, **c["text_config"]}
    end = t.get("eos_token_id", 2)
    text = TextConfig(t["vocab_size"], t["hidden_size"], t["num_hidden_layers"], t["num_attention_heads"], t["intermediate_size"],
                      t["max_position_embeddings"], HF_ACT[t["hidden_act"]], t["layer_norm_eps"],
                      end=None if end == 2 else end)        # OpenAI's files say 2, which is wrong: then the largest id is the end
    with torch.device("meta"):
        clip = CLIP(ViT(config), TextTransformer(text), c.get("projection_dim", 512))
    names = {**expand(VIT_NAMES, config.layers, "vision_model.", "vit."), **expand(TEXT_NAMES, text.layers, "text_model.", "text."),
             "image_projection.weight": "visual_projection.weight"}
    fill(clip, Checkpoint(path), names, (), device, dtype or torch.float32)
    return clip.eval()


def by_their_names(module: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    """The inverse of `fill`: parameters under their published names, blocks of a fused matrix joined again."""
    tensors: dict[str, list[Tensor]] = {}
    for ours, p in module.named_parameters():           # blocks [0/3], [1/3], [2/3] come in the order in which q, k, v are defined
        tensors.setdefault(pieces(names[ours])[0], []).append(p.detach())
    return {n: torch.cat(parts) for n, parts in tensors.items()}


def save_decoder(decoder: Decoder, path: str | os.PathLike, **extra) -> None:
    """Write a Hugging Face Llama folder; `extra` goes into config.json (bos_token_id, …)."""
    write_tensors(Path(path) / "model.safetensors", by_their_names(decoder, decoder_names(decoder.config)))
    write_json(Path(path) / "config.json", hf_decoder_config(decoder.config, **extra))


def save_vit(vit: ViT, path: str | os.PathLike) -> None:
    """Write a Hugging Face CLIPVisionModel or SiglipVisionModel folder."""
    config = hf_vit_config(vit.config)
    write_tensors(Path(path) / "model.safetensors", by_their_names(vit, expand(VIT_NAMES, vit.config.layers, "vision_model.")))
    write_json(Path(path) / "config.json", config)


def save_vlm(vlm: VLM, path: str | os.PathLike, settings: dict | None = None, vit: str = "", decoder: str = "",
             layout: str = "native") -> None:
    """Write a run folder: config.json, bridge.safetensors, and each tower that is not named by its own folder.

    layout="hf" writes what other libraries open instead: transformers' LLaVA for linear and mlp, peft's AdaptionPrompt for zero_init.
    """
    path = Path(path)
    if layout == "hf":
        from bridges import SAVERS
        if vlm.bridge.name not in SAVERS:
            raise UserError(f'{path}: no other library has a class for a "{vlm.bridge.name}" bridge on a LLaMA; known: {", ".join(SAVERS)}.')
        return SAVERS[vlm.bridge.name](vlm, path)
    if layout != "native":
        raise UserError(f'unknown layout "{layout}"; known: native, hf.')
    if not decoder:
        save_decoder(vlm.decoder, path / "decoder")
    if not vit:
        save_vit(vlm.vit, path / "vit")
    write_tensors(path / "bridge.safetensors", vlm.bridge.state_dict(), {"bridge": vlm.bridge.name})
    write_json(path / "config.json", {**(settings or {}), "bridge": vlm.bridge.name, "bridge_options": vlm.bridge.options,
                                      "image_token": vlm.image_token, "vit": vit or "vit", "decoder": decoder or "decoder"})


def load_vlm(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> nn.Module:
    """A published vision-language model (bridges.LAYOUTS) or a run folder of train.py → VLM in eval mode; dtype None = float32.

    BLIP-2's first stage has no decoder: its folders give a bridges.Stage1. A run's tower paths are relative to the run, or to
    where you stand.
    """
    from bridges import LAYOUTS, make_bridge
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; `python train.py` writes a run under out/, published models have a config.json.")
    c = read_json(path / "config.json")
    if "bridge" not in c:
        kind = c.get("model_type", "")
        if kind not in LAYOUTS:
            raise UserError(f'{path}/config.json: neither a run of train.py ("bridge" is missing) nor a vision-language model that '
                            f'is known here (model_type "{kind}"); {nearest(kind, LAYOUTS)}')
        with torch.device("meta"):
            vlm, fills = LAYOUTS[kind](c, path)
        for module, checkpoint, names, optional in fills:
            fill(module, checkpoint, names, optional, device, dtype or torch.float32)
        return vlm.eval()
    vit, decoder = load_vit(tower_folder(path, c["vit"]), device, dtype), load_decoder(tower_folder(path, c["decoder"]), device, dtype)
    with torch.device("meta"):
        bridge = make_bridge(c["bridge"], decoder.config, vit.config.width, **c["bridge_options"])
    load_bridge_file(bridge, path / "bridge.safetensors", device, dtype)
    return VLM(vit, bridge, decoder, c.get("image_token")).eval()


def tower_folder(run: Path, name: str) -> Path:
    """Where a run's tower is: inside the run, beside this file (the bundled ones), at its path, or on the hub."""
    for folder in (run / name, Path(__file__).parent / name, Path(name)):
        if folder.is_dir():
            return folder
    if is_hub_name(name):
        return fetch(name)
    raise UserError(f'{run}/config.json: the tower "{name}" is neither in the run nor beside model.py; put it back or edit the path.')


# Names on the Hugging Face hub: what is fetched of a model, and what the library's exceptions mean, special ones first.
HUB_FILES = ("*config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab.*", "merges.txt",
             "added_tokens.json", "special_tokens_map.json", "chat_template.*", "README.md")
HUB_ERRORS = {
    "GatedRepoError": "its licence must be accepted first: on its page on the hub, then log in with `hf auth login`",
    "RepositoryNotFoundError": "no such model, or a private one; check the spelling, or log in with `hf auth login`",
    "RevisionNotFoundError": "the hub has no such revision of it; correct what follows the @, or leave it out",
    "HFValidationError": "this is no name of the hub; write owner/name or owner/name@revision, or give a folder",
    "LocalEntryNotFoundError": "not all of it is in the local cache, and the hub is out of reach; go online once",
}


def is_hub_name(name: str) -> bool:
    """owner/name or owner/name@revision, where `owner` is no folder here: then a folder is meant, and is missing."""
    owner = name.partition("/")[0]
    return (re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", name) is not None and owner not in ("out", "weights")
            and not any((base / owner).is_dir() for base in (Path(), Path(__file__).parent)))


def fetch(name: str | os.PathLike, offline: bool = False) -> Path:
    """The folder of a model: as given, beside this file (weights/ works from anywhere), or on the Hugging Face hub.

    offline, or HF_HUB_OFFLINE=1: a name is only looked up in the hub's local cache, the network is not touched.
    """
    for folder in (Path(name), Path(__file__).parent / name):
        if folder.is_dir():
            return folder
    if not is_hub_name(str(name)):
        raise UserError(f"{name}: no such folder; give one with config.json and *.safetensors, or a hub's owner/name.")
    repo, _, revision = str(name).partition("@")
    return from_hub(repo, revision or None, offline or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"))


@functools.cache
def from_hub(repo: str, revision: str | None, offline: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{repo}: no such folder; to fetch it from the hub: pip install huggingface_hub") from None
    others = ["*/*", "consolidated*"]                   # other formats, and second copies of the same weights
    get = lambda files, but: Path(snapshot_download(repo, revision=revision, allow_patterns=files, ignore_patterns=but, local_files_only=offline))
    try:
        folder = get(list(HUB_FILES), others)
        if not any(folder.glob("*.safetensors")):       # older models: their tensors alone are read out of the pickle (open_tensors)
            get(["pytorch_model*.bin", "pytorch_model.bin.index.json"], others)
        if (folder / "config.json").exists() and read_json(folder / "config.json").get("model_type") == "instructblip":
            get(["qformer_tokenizer/*"], [])            # the words that its Q-Former reads
        return folder
    except Exception as e:                              # of the library, of its HTTP client, of the disk
        kinds, first = [k.__name__ for k in type(e).__mro__], (str(e).splitlines() or [""])[0][:200]
        other = f"could not be fetched ({type(e).__name__}: {first}); try again, or download it and give the folder"
        why = next((why for kind, why in HUB_ERRORS.items() if kind in kinds), other)
        raise UserError(f"{repo}{'@' * bool(revision)}{revision or ''}: {why}.") from None


def pinned(name: str) -> str:
    """A hub name with the commit that it stands for now, so that a run finds the same weights again; else the name."""
    if Path(name).is_dir() or not is_hub_name(name):
        return name
    return f"{name.partition('@')[0]}@{fetch(name).name}"           # the hub's cache names a snapshot by its commit


def print_licence(name: str, folder: Path, file=None) -> None:
    if field := licence(folder):
        print(f"licence  {name}: {field}", file=file)


def licence(folder: str | os.PathLike) -> str | None:
    """The licence field at the head of a model's README.md, with its name where it is "other"; None without one."""
    file = Path(folder) / "README.md"
    text = file.read_text(encoding="utf-8-sig", errors="replace") if file.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.S)
    head = head[1] if head else ""
    fields = dict(re.findall(r"""^(license|license_name):(?: |\n *-)*["'[]*([\w.+-]+)""", head, re.M))
    name = fields.get("license_name")
    return f"{fields['license']} ({name})" if name and "license" in fields else fields.get("license")


def load_bridge_file(bridge: Bridge, file: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> None:
    """Fill a bridge (on the meta device or not) from the bridge.safetensors of a run; strict, and names the other kind if it is one.

    dtype None = float32, whatever the file holds."""
    checkpoint = Checkpoint(file)
    held = (checkpoint.files[Path(file)].metadata() or {}).get("bridge", bridge.name)
    if held != bridge.name:
        raise UserError(f'{file}: holds a "{held}" bridge, not "{bridge.name}"; use --bridge {held}.')
    fill(bridge, checkpoint, {}, (), device, dtype or torch.float32)


def load_bridge(name: str, path: str | os.PathLike, device=None, dtype: torch.dtype | None = None,
                decoder: DecoderConfig | None = None, **options) -> Bridge:
    """A published bridge alone, sizes from its shapes: mapl (the authors' mapper), qformer (BLIP-2's authors' files, transformers'
    Blip2QFormerModel), zero_init (LLaMA-Adapter's adapter or PEFT's AdaptionPrompt), flamingo (OpenFlamingo's resampler and gated blocks).

    path: the file, or a folder that holds it and perhaps a config; decoder: what it is for, so that sizes are checked against it;
    options: what no shape tells, where it is not the published value (heads=…), or which code to follow (tanh=False:
    LLaMA-Adapter's inference file). dtype None = float32.
    """
    from bridges import BRIDGE_FILES
    if name not in BRIDGE_FILES:
        raise UserError(f'no published layout of a bridge "{name}" is known; {nearest(name, BRIDGE_FILES)}')
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():                                   # the bridge, not the decoder that may lie beside it
        path = next((folder / f for f in ("adapter_model.safetensors", "adapter.safetensors", "flamingo.safetensors") if (folder / f).exists()), path)
    beside = {}
    for file in (folder / "config.json", folder / "flamingo_config.json", folder / "adapter_config.json"):
        beside |= read_json(file) if file.exists() else {}
    if decoder is not None:
        beside |= {"n_layers": decoder.layers}
    checkpoint = Checkpoint(path)
    with torch.device("meta"):
        bridge, names, optional = BRIDGE_FILES[name](checkpoint, beside, **options)
    fill(bridge, checkpoint, names, optional, device, dtype or torch.float32)
    return bridge.eval()
