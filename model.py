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
import json
import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
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
    """softmax(QKᵀ/√E + bias) V, spelled out (Attention is all you need, 1706.03762v7, Eq. 1).

    q (B, H, T, E); k, v (B, H, S, E); bias broadcastable to (B, H, T, S): 0 where a query may look, very negative
    where not. Returns (B, H, T, E). The softmax runs in float32 whatever the dtype of q.
    """
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5      # (B, H, T, S)  scaled by the HEAD width
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(-1, dtype=torch.float32)           # (B, H, T, S)  each row sums to 1
    return F.dropout(weights, dropout).to(v.dtype) @ v          # (B, H, T, E)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False, dropout: float = 0.0) -> Tensor:
    """The same function by the faster road for the device; a test holds the two equal.

    `causal` (query t sees keys 0..t; T == S) and `bias` exclude each other. With gradients on a CPU the explicit form
    wins (measured 3 to 6 times in bf16), everywhere else PyTorch's fused kernel does. The tensors themselves have no say, so that
    a frozen decoder rounds alike with a trained bridge and without.
    """
    assert not (causal and bias is not None), "one mask, not two"
    if q.device.type == "cpu" and torch.is_grad_enabled():
        return attend_explicit(q, k, v, visible_to_bias(causal_mask(q.shape[2], q.device), q.dtype) if causal else bias, dropout)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, dropout_p=dropout)


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
    rope_scaling: dict | None = None  # llama3: {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    norm_eps: float = 1e-5            # ε of RMSNorm; always from the checkpoint, never a default
    tied: bool = True                 # the output projection is the embedding matrix
    attention_bias: bool = False      # biases on q, k, v and o
    mlp_bias: bool = False            # biases in the feed-forward
    context: int = 2048               # longest sequence the decoder was trained on

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise UserError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly; "
                            "num_attention_heads must be a multiple of num_key_value_heads.")
        if self.head_width % 2:
            raise UserError(f"RoPE rotates pairs, so the head width must be even, not {self.head_width}.")


def rope_frequencies(config: DecoderConfig, device=None) -> Tensor:
    """(E/2,) float32: angle per position of each rotated pair, θ_i = base^(−2i/E) (RoPE, 2104.09864v5, Eq. 15).

    With `rope_scaling` of type llama3, wavelengths λ = 2π/θ_i above `original/low` are slowed down by `factor`, those below
    `original/high` stay, and the band between is interpolated (Llama 3.1; the rule is in its published code only).
    """
    i = torch.arange(0, config.head_width, 2, dtype=torch.float32, device=device)
    theta = 1.0 / config.rope_theta ** (i / config.head_width)
    s = config.rope_scaling
    if not s:
        return theta
    factor, low, high = s["factor"], s["low_freq_factor"], s["high_freq_factor"]
    turns = s["original_max_position_embeddings"] * theta / (2 * math.pi)    # how often the pair turns in the old context
    keep = ((turns - low) / (high - low)).clamp(0, 1)                        # 1: fast pair, unchanged; 0: slow, ÷ factor
    return theta * (keep + (1 - keep) / factor)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i+E/2}) of x (B, H, T, E): the half-split layout of Hugging Face checkpoints.

    Meta's files pair neighbours (x_2i, x_2i+1) instead; the two are the same function after a permutation of the rows of
    W_q and W_k. cos, sin: (B or 1, 1, T, E).
    """
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight (1910.07467v1, Eq. 4); in float32, cast back, and only then multiplied by the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
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
    """Grouped-query self-attention with RoPE (2305.13245v3); the seam `beside` adds its term to the heads before W_o."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.heads, self.kv_heads = c.heads, c.kv_heads
        self.q = nn.Linear(c.width, c.heads * c.head_width, bias=c.attention_bias)
        self.k = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.attention_bias)
        self.v = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.attention_bias)
        self.o = nn.Linear(c.heads * c.head_width, c.width, bias=c.attention_bias)

    def widen(self, x: Tensor) -> Tensor:
        """(B, G, S, E) → (B, H, S, E): query head h reads key head ⌊h·G/H⌋."""
        return x if self.heads == self.kv_heads else x.repeat_interleave(self.heads // self.kv_heads, dim=1)

    def project(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (·, H, Q, E) of vectors (·, Q, D) that have no position: no RoPE."""
        return self.widen(split_heads(self.k(prompts), self.kv_heads)), self.widen(split_heads(self.v(prompts), self.kv_heads))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, causal: bool, layer: int,
                cache: Cache | None, bridge: Bridge, visual) -> Tensor:
        q = rope(split_heads(self.q(x), self.heads), cos, sin)                  # (B, H, T, E)
        k = rope(split_heads(self.k(x), self.kv_heads), cos, sin)               # (B, G, T, E)
        v = split_heads(self.v(x), self.kv_heads)                               # (B, G, T, E)
        if cache is not None:
            k, v = cache.append(layer, k, v)                                    # (B, G, S, E)
        y = attend(q, self.widen(k), self.widen(v), bias, causal)               # (B, H, T, E)
        term = bridge.beside(layer, q, self.project, visual)
        if term is not None:
            y = y + term
        return self.o(merge_heads(y))                                           # (B, T, D)


class SwiGLU(nn.Module):
    """W_down( SiLU(W_gate x) ⊙ W_up x ) (2002.05202v1, Eq. 6)."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.gate = nn.Linear(c.width, c.hidden, bias=c.mlp_bias)
        self.up = nn.Linear(c.width, c.hidden, bias=c.mlp_bias)
        self.down = nn.Linear(c.hidden, c.width, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


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
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)

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
        tokens only. With a cache, tokens continue what the cache holds.
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

        if real is None:
            positions = torch.arange(past, past + T, device=x.device)[None]     # (1, T)
        else:
            positions = (real.cumsum(-1) - 1).clamp(min=0)[:, past:]            # (B, T)
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
            bias = visible_to_bias(visible, dtype)

        hidden = [x]
        for l, layer in enumerate(self.layers):
            x = layer(x, cos, sin, bias, causal, l, cache, bridge, visual)
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
# 4. ViT: CLIP, SigLIP and EVA (BLIP-2) in one class
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
    """x += Attn(LN x); x += W_down act(W_up LN x) (ViT, 2010.11929v2, Eq. 2 and 3); biases everywhere."""

    def __init__(self, width: int, heads: int, hidden: int, act: str, eps: float):
        super().__init__()
        if width % heads:
            raise UserError(f"a block of width {width} does not divide into {heads} heads.")
        self.heads, self.act = heads, ACTIVATIONS[act]
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        y = self.norm1(x)
        q, k, v = (split_heads(f(y), self.heads) for f in (self.q, self.k, self.v))     # (B, H, N, E)
        x = x + self.o(merge_heads(attend(q, k, v, causal=causal)))
        return x + self.down(self.act(self.up(self.norm2(x))))


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
    """pixels (B, 3, S, S) → tokens (B, N, Di). The class token, where there is one, stands at index 0."""

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
        x = x + self.positions_for(*patches.shape[2:])
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
    """Two towers and a temperature (2103.00020v1, Figure 3)."""

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
        return self.logit_scale.exp() * self.embed_images(pixels) @ self.embed_texts(tokens).T


# ------------------------------------------------------------------------------------------------------------------
# 6. VLM: pixels → features → see → prefix in the place of the image → decoder → logits
# ------------------------------------------------------------------------------------------------------------------

class VLM(nn.Module):
    """ViT, bridge and decoder. `image_token`: the id that stands for an image when the bridge has no prefix (None: nothing)."""

    def __init__(self, vit: ViT, bridge: Bridge, decoder: Decoder, image_token: int | None = None):
        super().__init__()
        self.vit, self.bridge, self.decoder = vit, bridge, decoder
        self.image_token = image_token

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
        real = torch.ones_like(is_image) if mask is None else mask
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
        return dict(embeds=new, mask=None if bool(there.all()) else there, **inputs), labels

    def forward(self, tokens: Tensor, pixels: Tensor | None = None, mask: Tensor | None = None, *, features: Tensor | None = None,
                return_hidden: bool = False, **text):
        """Logits (B, T', V) over the expanded sequence.

        `features` (ΣM, N, Di) may be given instead of pixels (cached); text: bridge_tokens, bridge_mask as in `prepare`.
        """
        features = self.features(pixels) if features is None else features
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

# ours → theirs; {i} counts layers; "name[1/3]" is the second third of the rows of a fused matrix, "name[rope/H]" has the rows of
# each of H heads reordered from Meta's RoPE to ours, "name[T]" is transposed.
DECODER_NAMES = {       # Hugging Face Llama, below "model."; the head stands beside it
    "embed.weight": "embed_tokens.weight",
    "norm.weight": "norm.weight",
    "layers.{i}.norm1.weight": "layers.{i}.input_layernorm.weight",
    "layers.{i}.norm2.weight": "layers.{i}.post_attention_layernorm.weight",
    **{f"layers.{{i}}.attention.{p}.{w}": f"layers.{{i}}.self_attn.{p}_proj.{w}" for p in "qkvo" for w in ("weight", "bias")},
    **{f"layers.{{i}}.mlp.{p}.{w}": f"layers.{{i}}.mlp.{p}_proj.{w}" for p in ("gate", "up", "down") for w in ("weight", "bias")},
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
TEXT_NAMES = {
    "embed.weight": "embeddings.token_embedding.weight",
    "positions": "embeddings.position_embedding.weight",
    **{f"norm.{w}": f"final_layer_norm.{w}" for w in ("weight", "bias")},
    **ENCODER_NAMES,
}
IGNORED = ("rotary_emb.inv_freq", "position_ids")       # buffers of older files: recomputed, never read


class Checkpoint:
    """The tensors of a folder (model.safetensors, or shards with an index), mapped into memory and read one by one."""

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; give a folder with config.json and *.safetensors.")
        index = path / "model.safetensors.index.json"
        if path.is_file():
            files = [path]
        elif index.exists():
            files = sorted({path / f for f in read_json(index)["weight_map"].values()})
        else:
            files = sorted(path.glob("*.safetensors"))
            files = [path / "model.safetensors"] if path / "model.safetensors" in files else files
        if not files:
            raise UserError(f"{path}: holds no .safetensors file; only safetensors weights are read.")
        self.path, self.where, self.files = path, {}, {}
        for file in files:
            if not file.exists():
                raise UserError(f"{index}: names the shard {file.name}, which is missing; download it again.")
            try:
                self.files[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as e:
                raise UserError(f"{file}: not a readable safetensors file ({e}); it may be truncated, copy or download it again.") from None
            self.where.update(dict.fromkeys(self.files[file].keys(), file))

    def missing(self, name: str) -> list[str]:
        """The tensors that a name of the tables speaks of and that are not here."""
        return [n for n in pieces(name) if n not in self.where]

    def get(self, name: str) -> Tensor:
        """The tensor, or what "&" and brackets make of it and others (see the tables of names)."""
        if " & " in name:
            return torch.cat([self.get(n) for n in name.split(" & ")])
        name, _, part = name.partition("[")
        tensor = self.files[self.where[name]].get_tensor(name)
        if not part:
            return tensor
        what, _, n = part.rstrip("]").partition("/")
        if what == "T":
            return tensor.T.contiguous()
        if what == "rope":                              # (E/2, 2) of Meta's neighbours → (2, E/2): all firsts, then all seconds
            return tensor.unflatten(0, (int(n), -1, 2)).transpose(1, 2).flatten(0, 2)
        return tensor.chunk(int(n))[int(what)].clone()

    def prefix(self, *candidates: str) -> str:
        """The first of these with which the name of some tensor starts; the last one where none does."""
        return next((c for c in candidates if any(n.startswith(c) for n in self.where)), candidates[-1])


def pieces(name: str) -> list[str]:
    """The plain names in one of the tables' names: "a[1/3] & b" → ["a", "b"]."""
    return [n.split("[")[0] for n in name.split(" & ")]


def expand(names: dict[str, str], layers: int, prefix: str = "", ours: str = "") -> dict[str, str]:
    """The table for so many layers, with a prefix on their names and on ours."""
    return {ours + a.format(i=i): prefix + b.format(i=i) for a, b in names.items() for i in (range(layers) if "{i}" in a else (0,))}


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
            raise UserError(f'{checkpoint.where[pieces(theirs)[0]]}: tensor "{theirs}" has shape {tuple(tensor.shape)}, '
                            f"this model expects {tuple(parameter.shape)}; the config.json beside it may belong to another model.")
        used.update(pieces(theirs))
        owner, _, leaf = ours.rpartition(".")
        tensor = tensor.view(parameter.shape).to(device=device, dtype=dtype or tensor.dtype)
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
def decoder_config(c: dict, where: str = "config.json") -> DecoderConfig:
    """A Llama config.json, as published (rope_theta, rope_scaling) or as transformers 5 writes it (rope_parameters)."""
    try:
        ropes = c.get("rope_parameters") or c.get("rope_scaling") or {}
        kind = ropes.get("rope_type", ropes.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise UserError(f'{where}: RoPE scaling "{kind}" is not supported; known: default, llama3.')
        return DecoderConfig(
            vocab_size=c["vocab_size"], width=c["hidden_size"], layers=c["num_hidden_layers"], heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            head_width=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"], hidden=c["intermediate_size"],
            rope_theta=ropes.get("rope_theta") or c.get("rope_theta") or 10000.0, rope_scaling=ropes if kind == "llama3" else None,
            norm_eps=c["rms_norm_eps"], tied=c.get("tie_word_embeddings", False), attention_bias=c.get("attention_bias", False),
            mlp_bias=c.get("mlp_bias", False), context=c.get("max_position_embeddings", 2048))
    except KeyError as e:
        raise UserError(f"{where}: the key {e} is missing; a Llama config.json has it.") from None


def hf_decoder_config(c: DecoderConfig, **extra) -> dict:
    scaling = {"rope_scaling": c.rope_scaling} if c.rope_scaling else {}
    return dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", vocab_size=c.vocab_size, hidden_size=c.width,
                num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_width,
                intermediate_size=c.hidden, rope_theta=c.rope_theta, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
                attention_bias=c.attention_bias, mlp_bias=c.mlp_bias, max_position_embeddings=c.context, **scaling, **extra)


# What transformers assumes where a config inside another config is silent: published LLaVA files leave most of Llama's fields out.
LLAMA_DEFAULTS = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                      max_position_embeddings=2048, rms_norm_eps=1e-6)
CLIP_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=32)
HF_ACT = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def vit_config(c: dict, where: str = "config.json") -> tuple[ViTConfig, str]:
    """(our config, family: clip | siglip | eva) from a CLIP, SigLIP or BLIP-2 vision config.json, alone or in a dual encoder's."""
    c = c.get("vision_config", c)
    kind = c.get("model_type", "")
    family = "siglip" if kind.startswith("siglip") else "eva" if kind.startswith(("blip_2", "instructblip")) else "clip"
    if family == "clip" and not kind.startswith("clip"):
        raise UserError(f'{where}: model_type "{kind}" is no vision tower that is known here (clip, siglip, blip_2).')
    flags = {"clip": {}, "siglip": dict(cls=False, pre_norm=False, patch_bias=True, pool="map" if c.get("vision_use_head", True) else "all"),
             "eva": dict(pre_norm=False, patch_bias=True, pool="all")}[family]
    act = HF_ACT.get(c.get("hidden_act", "quick_gelu" if family == "clip" else "gelu"))
    if act is None:
        raise UserError(f'{where}: activation "{c["hidden_act"]}" is not supported; known: {", ".join(HF_ACT)}.')
    try:
        return ViTConfig(image_size=c["image_size"], patch=c["patch_size"], width=c["hidden_size"], layers=c["num_hidden_layers"],
                         heads=c["num_attention_heads"], hidden=c["intermediate_size"], act=act,
                         norm_eps=c.get("layer_norm_eps", 1e-5 if family == "clip" else 1e-6), **flags), family
    except KeyError as e:
        raise UserError(f"{where}: the key {e} is missing; a {kind} config.json has it.") from None


def hf_vit_config(c: ViTConfig) -> dict:
    return dict(architectures=["CLIPVisionModel"], model_type="clip_vision_model", image_size=c.image_size, patch_size=c.patch,
                hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads, intermediate_size=c.hidden,
                hidden_act=c.act, layer_norm_eps=c.norm_eps, num_channels=3)


def load_decoder(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> Decoder:
    """A Hugging Face Llama folder (one file or shards) → Decoder in eval mode; dtype None = float32."""
    config = decoder_config(read_json(Path(path) / "config.json"), f"{path}/config.json")
    with torch.device("meta"):
        decoder = Decoder(config)
    fill(decoder, Checkpoint(path), decoder_names(config), ("lm_head.",) if config.tied else (), device, dtype or torch.float32)
    return decoder.eval()


def load_vit(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> ViT:
    """A CLIP, SigLIP or BLIP-2 vision folder, alone or inside a dual encoder → ViT in eval mode; dtype None = float32."""
    config, family = vit_config(read_json(Path(path) / "config.json"), f"{path}/config.json")
    with torch.device("meta"):
        vit = ViT(config)
    fill(vit, *vit_file(path, config, family), device=device, dtype=dtype or torch.float32)
    return vit.eval()


def vit_file(path: str | os.PathLike, config: ViTConfig, family: str) -> tuple[Checkpoint, dict[str, str], tuple[str, ...]]:
    """The checkpoint of a vision tower, the names in it, and what else may lie there; arguments for `fill`."""
    checkpoint = Checkpoint(path)
    prefix = checkpoint.prefix("vision_model.", "")
    names = expand(EVA_NAMES if family == "eva" else VIT_NAMES, config.layers, prefix)
    return checkpoint, names, ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias") if prefix else ()


def load_clip(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> CLIP:
    """A Hugging Face CLIPModel folder → both towers; clip(pixels, tokens) → scaled cosine similarities."""
    c = read_json(Path(path) / "config.json")
    config, _ = vit_config(c, f"{path}/config.json")
    if "text_config" not in c:
        raise UserError(f"{path}/config.json: has no text_config, so this is no CLIPModel; load_vit reads a vision tower alone.")
    t = c["text_config"]
    end = t.get("eos_token_id", 2)
    text = TextConfig(t["vocab_size"], t["hidden_size"], t["num_hidden_layers"], t["num_attention_heads"], t["intermediate_size"],
                      t["max_position_embeddings"], HF_ACT[t["hidden_act"]], t["layer_norm_eps"],
                      end=None if end == 2 else end)        # OpenAI's files say 2, which is wrong: then the largest id is the end
    with torch.device("meta"):
        clip = CLIP(ViT(config), TextTransformer(text), c["projection_dim"])
    names = {**expand(VIT_NAMES, config.layers, "vision_model.", "vit."), **expand(TEXT_NAMES, text.layers, "text_model.", "text."),
             "image_projection.weight": "visual_projection.weight"}
    fill(clip, Checkpoint(path), names, (), device, dtype or torch.float32)
    return clip.eval()


def save_decoder(decoder: Decoder, path: str | os.PathLike, **extra) -> None:
    """Write a Hugging Face Llama folder; `extra` goes into config.json (bos_token_id, …)."""
    names = decoder_names(decoder.config)
    write_tensors(Path(path) / "model.safetensors", {names[k]: v for k, v in decoder.state_dict().items()})
    write_json(Path(path) / "config.json", hf_decoder_config(decoder.config, **extra))


def save_vit(vit: ViT, path: str | os.PathLike) -> None:
    """Write a Hugging Face CLIPVisionModel folder (CLIP-style towers only)."""
    if not vit.config.pre_norm or vit.config.pool != "cls" or vit.config.act not in HF_ACT:
        raise UserError(f"{path}: only CLIP-style towers can be written; a SigLIP or BLIP-2 tower stays in the folder it was loaded from.")
    names = expand(VIT_NAMES, vit.config.layers, "vision_model.")
    write_tensors(Path(path) / "model.safetensors", {names[k]: v for k, v in vit.state_dict().items()})
    write_json(Path(path) / "config.json", hf_vit_config(vit.config))


def save_vlm(vlm: VLM, path: str | os.PathLike, settings: dict | None = None, vit: str = "", decoder: str = "") -> None:
    """Write a run folder: config.json, bridge.safetensors, and each tower that is not named by its own folder."""
    path = Path(path)
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
    load_bridge_file(bridge, path / "bridge.safetensors", device)
    return VLM(vit, bridge, decoder, c.get("image_token")).eval()


def tower_folder(run: Path, name: str) -> Path:
    """Where a run's tower is: inside the run, beside this file (the bundled ones), or at an absolute path."""
    for folder in (run / name, Path(__file__).parent / name, Path(name)):
        if folder.is_dir():
            return folder
    raise UserError(f'{run}/config.json: the tower "{name}" is neither in the run nor beside model.py; put it back or edit the path.')


def load_bridge_file(bridge: Bridge, file: str | os.PathLike, device=None) -> None:
    """Fill a bridge (on the meta device or not) from the bridge.safetensors of a run; strict, and names the other kind if it is one."""
    checkpoint = Checkpoint(file)
    held = (checkpoint.files[Path(file)].metadata() or {}).get("bridge", bridge.name)
    if held != bridge.name:
        raise UserError(f'{file}: holds a "{held}" bridge, not "{bridge.name}"; use --bridge {held}.')
    fill(bridge, checkpoint, {}, (), device)
