"""model.py: a LLaMA-style decoder with the seams where an image enters it, a ViT, and the VLM of both.

Papers   LLaMA 2302.13971v1 · RoPE 2104.09864v5 · GQA 2305.13245v3 · SwiGLU 2002.05202v1 · ViT 2010.11929v2
Chapters 1 attention · 2 the decoder and its seams · 3 generation · 4 ViT · 5 VLM
Run      nothing here runs by itself: `python train.py` trains, `python eval.py` answers

The alphabet of shapes, used in every file, test and notebook:
    B batch          T text tokens         D decoder width     L decoder layers    V vocabulary
    H query heads    G key/value heads     E head width        K visual tokens the decoder receives per image
    M images in a sequence                 N ViT tokens        Di ViT width        Q learned queries / prompts
    S side of the (square) image in pixels; inside attention, the number of keys

This file, bridges.py, data.py and papers/ open no file. A wrong number is a ValueError of one sentence.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

IGNORE = -100                   # label of a position that carries no loss
IMAGE = -200                    # stands in `tokens` where an image stands in the text (LLaVA's sentinel id)


# ---- 1. Attention, twice ---------------------------------------------------------------------------------

EXPLICIT = 384                  # keys: up to here a CPU computes gradients faster through the explicit form


def attend_explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None,
                    dropout: float = 0.0) -> Tensor:
    """Attention spelled out (Attention is all you need, 1706.03762v7, Eq. 1).

    (D1)  y = softmax(q kᵀ / √E + bias) v
    (D5)  query head h reads key and value head ⌊h·G/H⌋         (grouped queries, 2305.13245v3)

    q (B, H, T, E); k, v (B, G, S, E); bias broadcastable to (B, H, T, S): 0 where a query may look, very
    negative where not. Returns (B, H, T, E). The softmax runs in float32 whatever the dtype of q.
    """
    k, v = widen(k, q.shape[1]), widen(v, q.shape[1])           # (B, H, S, E)                          (D5)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5     # (B, H, T, S)  scaled by the HEAD width   (D1)
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(-1, dtype=torch.float32)           # (B, H, T, S)  each row sums to 1
    return F.dropout(weights, dropout).to(v.dtype) @ v          # (B, H, T, E)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False,
           dropout: float = 0.0) -> Tensor:
    """The same function, computed the faster way for the device; a test holds the two equal.

    `causal` (query t sees keys 0..t; T == S) and `bias` exclude each other. With gradients on a CPU the
    explicit form wins up to EXPLICIT keys (forward and backward in bf16: 4 times at 64, 1.2 at 260, 0.8 at
    512, 0.3 at 1,024). Everywhere else PyTorch's fused kernel wins. Lengths and the mode decide, not
    what learns, so that under gradients a frozen decoder rounds alike with a trained bridge and without.
    """
    assert not (causal and bias is not None), "one mask, not two"
    if q.device.type == "cpu" and torch.is_grad_enabled() and k.shape[2] <= EXPLICIT:
        if causal:
            bias = visible_to_bias(causal_mask(q.shape[2], q.device), q.dtype)
        return attend_explicit(q, k, v, bias, dropout)
    if q.device.type != "cpu":                          # there not every kernel takes fewer heads of keys
        k, v = widen(k, q.shape[1]), widen(v, q.shape[1])
    return F.scaled_dot_product_attention(q, k, v, bias, dropout, causal, enable_gqa=q.shape[1] != k.shape[1])


def widen(x: Tensor, heads: int) -> Tensor:
    """(B, G, S, E) → (B, H, S, E): each key or value head as often as there are query heads that read it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


class Attend(nn.Module):
    """`attend` as a module without parameters, so that a hook can see q, k, v and the mask."""
    forward = staticmethod(attend)


def causal_mask(T: int, device=None) -> Tensor:
    """(T, T) bool, True = may attend: query t (row) sees key s (column) when s <= t."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


def visible_to_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """True → 0, False → half the most negative number: a sum cannot overflow, its exp() is 0."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(~visible, torch.finfo(dtype).min / 2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)         # (B, T, H·E) → (B, H, T, E)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)                         # (B, H, T, E) → (B, T, H·E)


# ---- 2. The decoder and its seams ------------------------------------------------------------------------

class Bridge(nn.Module):
    """Between the features of a ViT and a decoder. This base class does nothing: with it, a plain LLaMA runs.

        see(features)                → visual      once per image: whatever the bridge needs to remember
        prefix(visual)               → (ΣM, K, D)  soft tokens that take the place of each image in the text
        beside(layer, …, visual)     → a term added to the heads of layer ℓ before W_o, or None
        before(layer, x, visual)     → x after a block that runs before layer ℓ
        between(layer, x, visual)    → x after a block between the attention and the feed-forward of layer ℓ
        around(layer, part, f, …)    → f(x), where f is a named part of layer ℓ
        rope_positions(p, visual)    → (B, T)      the positions that RoPE turns by
        finish(h, visual), head(h)   → the final states; then the logits of any selection of them

    The six bridges of bridges.py need the first four. A bridge overrides what it needs and says what it is
    by the attributes below. It owns all of its parameters and the decoder owns none of them:
    `bridge.state_dict()` is what a run trains and saves. In the layers, `visual` of a bridge with soft tokens
    is the ImagePositions: a prefix is words.
    """
    name = "none"
    soft_tokens = False         # whether `prefix` gives tokens that stand in the place of each image
    reads: int | list | str = -2    # ViT state it wants (−2: the last block's input), a list, or "pooled"
    reads_cls = False           # whether the class token comes along
    options: dict = {}          # keyword arguments it was built with, for config.json

    def adopt(self, decoder: Decoder) -> None:
        """A new bridge takes what it begins with from the decoder beside which it will be trained."""

    def see(self, features: Tensor, where: ImagePositions | None = None) -> object:
        """features (ΣM, N, Di) of all images of the batch, and where they stand → visual."""
        return features

    def prefix(self, visual) -> Tensor | None:
        return None

    def beside(self, layer: int, q: Tensor, project: Callable[[Tensor], tuple[Tensor, Tensor]],
               visual) -> Tensor | None:
        """q (B, H, T, E) after RoPE; project(p (·, Q, D)) → its keys, values (·, H, Q, E)."""
        return None

    def before(self, layer: int, x: Tensor, visual) -> Tensor:
        return x

    def between(self, layer: int, x: Tensor, visual) -> Tensor:
        return x

    def around(self, layer: int, part: str, f: Callable[..., Tensor], visual, *x: Tensor) -> Tensor:
        """part: attention or mlp (x: the normalised stream), qkv, o, or attend (x: q, k, v, bias, causal)."""
        return f(*x)

    def rope_positions(self, p: Tensor, visual) -> Tensor:
        return p

    def finish(self, h: Tensor, visual) -> Tensor:
        return h

    def head(self, h: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        return head(h)

    def gates(self) -> Tensor | None:
        """(layers, gates of a layer) float32: factors of what it adds to `gated_layers`; None: no gates."""
        return None

    @property
    def gated_layers(self) -> list[int]:
        return []


@dataclass
class ImagePositions:
    """Where the images of a batch stand. Images are counted row by row, from left to right.

    `last` and `image` are laid out anew when the images are expanded, between `see` and the decoder.
    """
    row: Tensor         # (ΣM,) int64: the row of `tokens` that image m belongs to
    order: Tensor       # (ΣM,) int64: its number inside that row, from 1
    last: Tensor    # (B, T) int64: how many images stand at or before each position of the text; 0 = none yet
    image: Tensor   # (B, T) bool: the positions that images take

    def columns(self, T: int) -> Tensor:
        """(B, T) of `last` for a chunk of T positions; one generated after the prompt follows all images."""
        return self.last if T == self.last.shape[1] else self.last.amax(1, keepdim=True).expand(-1, T)


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
    rope_scaling: Callable[..., Tensor] | None = None   # a RopeScaling of papers/rope_scaling.py
    norm_eps: float = 1e-5            # ε of RMSNorm; a checkpoint is read with its own
    tied: bool = True                 # the output projection is the embedding matrix
    attention_bias: bool | str = False    # biases on q, k, v and o, or on those that it names: "qkv" in Qwen2
    mlp_bias: bool = False            # biases in the feed-forward
    context: int = 2048               # longest sequence the decoder was trained on
    qk_norm: type[nn.Module] = nn.Identity      # of queries and keys ahead of RoPE, see papers/qk_norm.py
    window: int | None = None   # a token sees itself and the window − 1 before it (Mistral 2310.06825v1, §2)
    extra_tokens: int = 0       # ids from V on that are read, never written: rows of the embedding alone

    def __post_init__(self):
        if self.tied and self.extra_tokens:
            raise ValueError("a tied output projection has a row for every id: "
                             f"{self.extra_tokens} ids cannot be read only.")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly; "
                             "num_attention_heads must be a multiple of num_key_value_heads.")
        if self.head_width % 2:
            raise ValueError(f"RoPE rotates pairs, so the head width must be even, not {self.head_width}.")


def rope_frequencies(config: DecoderConfig, device=None, positions: Tensor | None = None) -> Tensor:
    """(E/2,) float32: angle per position of each rotated pair (RoPE, 2104.09864v5, Eq. 15).

    (D3)  θ_i = base^(−2i/E)
    """
    i = torch.arange(0, config.head_width, 2, dtype=torch.float32, device=device)
    theta = 1.0 / config.rope_theta ** (i / config.head_width)              # (D3)
    return config.rope_scaling(theta, positions) if config.rope_scaling else theta


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i+E/2}) of x (B, H, T, E): the half-split layout of Hugging Face checkpoints.

    (D4)  (a, b) ← (a cos tθ_i − b sin tθ_i,
                     b cos tθ_i + a sin tθ_i)      at position t, for each pair i (Eq. 34)

    Meta's files pair neighbours (x_2i, x_2i+1) instead; the two are the same function after a permutation of
    the rows of W_q and W_k. cos, sin: (B or 1, 1, T, E).
    """
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin           # (D4)


class RMSNorm(nn.Module):
    """Root mean square norm (1910.07467v1, Eq. 4): in float32, cast back, then multiplied by the weight.

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
    """Keys and values of earlier positions, one pair (B, G, S, E) per layer, and which are real tokens."""

    def __init__(self, config: DecoderConfig, batch: int, longest: int, device, dtype):
        shape = (config.layers, batch, config.kv_heads, longest, config.head_width)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0                     # how many positions are held
        self.real: Tensor | None = None     # (B, S) bool of these, False = padding; None: no padding so far

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end], self.v[layer, :, :, self.length:end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def extend_mask(self, mask: Tensor | None, T: int) -> Tensor | None:
        """(B, S) bool of what is held and of T new positions with this mask; None: there is no padding."""
        if mask is not None or self.real is not None:
            ones = self.k.new_ones(self.k.shape[1], self.length + T, dtype=torch.bool)
            held = ones[:, :self.length] if self.real is None else self.real
            self.real = torch.cat((held, ones[:, :T] if mask is None else mask), dim=1)
        return self.real

    def take(self, rows: Tensor) -> None:
        """Keep these rows, in this order (repeats allowed): how beams fork."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.real = None if self.real is None else self.real[rows]


@dataclass
class Context:
    """What all layers of one forward share."""
    cos: Tensor                         # (B or 1, 1, T, E) of RoPE
    sin: Tensor
    bias: Tensor | None = None          # (B or 1, 1, T, S) added to the scores, or …
    causal: bool = False                # … plain causality, which needs no tensor
    cache: Cache | None = None
    bridge: Bridge | None = None


class Attention(nn.Module):
    """Grouped-query self-attention with RoPE: `attend` has (D5). `beside` adds its term ahead of W_o."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.heads, self.kv_heads = c.heads, c.kv_heads
        biased = "qkvo" if c.attention_bias is True else c.attention_bias or ""
        self.q = nn.Linear(c.width, c.heads * c.head_width, bias="q" in biased)
        self.k = nn.Linear(c.width, c.kv_heads * c.head_width, bias="k" in biased)
        self.v = nn.Linear(c.width, c.kv_heads * c.head_width, bias="v" in biased)
        self.o = nn.Linear(c.heads * c.head_width, c.width, bias="o" in biased)
        self.qk_norm = c.qk_norm(c)
        self.attend = Attend()

    def project(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (·, H, Q, E) of vectors (·, Q, D) that have no position: no RoPE."""
        k, v = (split_heads(f(prompts), self.kv_heads) for f in (self.k, self.v))
        return widen(self.qk_norm(k), self.heads), widen(v, self.heads)

    def qkv(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, (H+2G)·E): the three projections side by side."""
        return torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)

    def forward(self, x: Tensor, visual, layer: int, c: Context) -> Tensor:
        H, G, around = self.heads, self.kv_heads, c.bridge.around
        qkv = around(layer, "qkv", self.qkv, visual, x)
        qk, v = split_heads(qkv, H + 2 * G).split((H + G, G), dim=1)
        q, k = rope(self.qk_norm(qk), c.cos, c.sin).split((H, G), dim=1)     # (B, H|G, T, E); v as k
        if c.cache is not None:
            k, v = c.cache.append(layer, k, v)                                  # (B, G, S, E)
        y = around(layer, "attend", self.attend, visual, q, k, v, c.bias, c.causal)
        term = c.bridge.beside(layer, q, self.project, visual)
        if term is not None:
            y = y + term
        return around(layer, "o", self.o, visual, merge_heads(y))               # (B, T, D)


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

    def forward(self, x: Tensor, visual, layer: int, c: Context) -> Tensor:
        def attention(n: Tensor) -> Tensor:
            return self.attention(n, visual, layer, c)

        x = c.bridge.before(layer, x, visual)                           # Flamingo: a block ahead of the layer
        x = x + c.bridge.around(layer, "attention", attention, visual, self.norm1(x))
        x = c.bridge.between(layer, x, visual)
        return x + c.bridge.around(layer, "mlp", self.mlp, visual, self.norm2(x))


def visible_keys(mask: Tensor, past: int) -> Tensor:
    """mask (B, S) → (B, T, S) bool, True = may attend: queries from `past` on see keys of their own document.

    Padding sees itself alone, so that no row is empty.
    """
    s = torch.arange(mask.shape[1], device=mask.device)
    earlier = s <= s[past:, None]                                               # (T, S)
    same = mask[:, None] == mask[:, past:, None]                                # (B, T, S)
    return earlier & same & (mask[:, None] > 0) | (s == s[past:, None])


class Decoder(nn.Module):
    """LLaMA (2302.13971v1): embeddings → L pre-norm blocks → RMSNorm → logits. It holds no bridge."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        # As nn.Embedding starts; its own normal_ imports 37 MB more on the meta device.
        rows = torch.randn(config.vocab_size + config.extra_tokens, config.width)
        self.embed = nn.Embedding.from_pretrained(rows, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.checkpoint = False             # True: recompute activations in the backward pass

    def init_weights(self, generator: torch.Generator | None = None) -> Decoder:
        """N(0, 0.02) but in norms: a tied embedding with a larger std starts above ln V."""
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                nn.init.normal_(part.weight, 0.0, 0.02, generator=generator)
        return self

    def head(self, x: Tensor) -> Tensor:
        """Final hidden states (…, D) → logits (…, V)."""
        return F.linear(x, self.embed.weight) if self.lm_head is None else self.lm_head(x)

    def logits(self, x: Tensor, bridge: Bridge | None = None) -> Tensor:
        """The same, with what the bridge adds."""
        return (bridge or NO_BRIDGE).head(x, self.head)

    def states(self, tokens: Tensor | None = None, mask: Tensor | None = None, *,
               embeds: Tensor | None = None, cache: Cache | None = None, bridge: Bridge | None = None,
               visual=None) -> list[Tensor]:
        """L+1 hidden states (B, T, D): the embeddings, then after each layer, the last after the final norm.

        tokens (B, T) int64 or embeds (B, T, D); mask (B, T) bool, False = padding, left or right; positions
        count real tokens only. An integer mask packs several documents into a row: the number of each token's
        document, 0 = padding; no document sees another. With a cache, tokens continue what the cache holds.
        """
        x = self.embed(tokens) if embeds is None else embeds
        bridge = bridge or NO_BRIDGE
        context = self.context(x, mask, cache, bridge, visual)
        hidden = [x]
        for l, layer in enumerate(self.layers):
            if self.checkpoint and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(layer, x, visual, l, context, use_reentrant=False)
            else:
                x = layer(x, visual, l, context)
            hidden.append(x)
        hidden[-1] = bridge.finish(self.norm(x), visual)
        if cache is not None:
            cache.length += x.shape[1]
        return hidden

    def context(self, x: Tensor, mask: Tensor | None, cache: Cache | None, bridge: Bridge,
                visual=None) -> Context:
        """Rotary angles and the attention mask for x (B, T, D); arguments as in `states`."""
        T, past = x.shape[1], 0 if cache is None else cache.length
        if cache is not None:
            assert mask is None or mask.dtype == torch.bool, "packed rows are for training"
            mask = cache.extend_mask(mask, T)
        dtype = self.layers[0].attention.q.weight.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        window, bias = self.config.window or math.inf, None
        positions = torch.arange(past, past + T, device=x.device)[None]         # (B or 1, T)
        if mask is not None or past + T > window or past and T > 1:             # more than plain causality
            mask = torch.ones(1, past + T, dtype=torch.bool, device=x.device) if mask is None else mask
            visible = visible_keys(mask, past)                                  # (B or 1, T, S)
            positions = visible.sum(-1) - 1
            near = past + T <= window or visible.flip(-1).cumsum(-1).flip(-1) <= window     # keys from s to t
            bias = visible_to_bias(visible & near, dtype)[:, None]
        positions = bridge.rope_positions(positions, visual)
        scaling, theta = self.config.rope_scaling, rope_frequencies(self.config, x.device, positions)
        angle, m = positions[:, None, :, None] * theta.repeat(2), scaling.cos_sin_factor if scaling else 1
        cos, sin = ((m * f(angle)).to(dtype) for f in (torch.cos, torch.sin))           # (B or 1, 1, T, E)
        return Context(cos, sin, bias, bias is None and T > 1, cache, bridge)

    def forward(self, tokens: Tensor | None = None, mask: Tensor | None = None, *,
                return_hidden: bool = False, **kw):
        """(B, T) int64 → logits (B, T, V), and the L+1 hidden states when asked; arguments as in `states`."""
        hidden = self.states(tokens, mask, **kw)
        logits = self.logits(hidden[-1], kw.get("bridge"))
        return (logits, hidden) if return_hidden else logits

    # ---- 3. Generation -----------------------------------------------------------------------------------

    def read_prompt(self, tokens: Tensor | None, max_new_tokens: int, mask: Tensor | None = None,
                    embeds: Tensor | None = None, **seams) -> tuple[Tensor, Cache]:
        """Logits (B, V) of the first new token, and a cache of the prompt with room for all new ones."""
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; at least one token must be asked for.")
        if mask is not None and (mask > 1).any():
            raise ValueError("a mask numbers several documents in a row; a prompt is one document.")
        x = self.embed(tokens) if embeds is None else embeds
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.bool()
        for n in sorted({*real.sum(1).tolist()}):
            if not 0 < n <= self.config.context:
                raise ValueError(f"a prompt has {n} tokens, soft tokens of images included; this decoder "
                                 f"reads 1 to {self.config.context}.")
        cache = Cache(self.config, len(x), x.shape[1] + max_new_tokens, x.device, self.embed.weight.dtype)
        hidden = self.states(embeds=x, mask=None if mask is None else real, cache=cache, **seams)[-1]
        last = (real * torch.arange(x.shape[1], device=x.device)).argmax(1)     # (B,) padding may follow
        return self.logits(hidden[torch.arange(len(x), device=x.device), last], seams.get("bridge")), cache

    @torch.no_grad()
    def generate(self, tokens: Tensor | None = None, max_new_tokens: int = 32, temperature: float = 0.0,
                 top_k: int = 0, top_p: float = 1.0, stop: tuple[int, ...] = (),
                 generator: torch.Generator | None = None, mask: Tensor | None = None,
                 embeds: Tensor | None = None, **seams) -> Tensor:
        """The new tokens only, (B, T_new) int64, until all rows have stopped; seams as in `states`.

        temperature 0 is greedy; top_k keeps the k likeliest tokens, top_p the smallest set whose probability
        reaches p. A row that has emitted a stop id repeats it. Padding may stand on either side.
        """
        logits, cache = self.read_prompt(tokens, max_new_tokens, mask, embeds, **seams)
        stops = torch.tensor(stop, dtype=torch.long, device=logits.device)
        new = [sample(logits, temperature, top_k, top_p, generator)]            # (B,) each
        while len(new) < max_new_tokens and not (len(stop) and torch.isin(new[-1], stops).all()):
            hidden = self.states(new[-1][:, None], cache=cache, **seams)[-1]    # (B, 1, D)
            logits = self.logits(hidden[:, -1], seams.get("bridge"))
            chosen = sample(logits, temperature, top_k, top_p, generator)
            new.append(torch.where(torch.isin(new[-1], stops), new[-1], chosen))
        return torch.stack(new, dim=1)


NO_BRIDGE = Bridge()


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float,
           generator: torch.Generator | None) -> Tensor:
    """(B, V) → (B,): argmax at temperature 0, else a draw from the truncated distribution."""
    if not (0 <= temperature < math.inf and isinstance(top_k, int) and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: give a temperature from "
                         "0, a whole top_k from 0, and a top_p above 0 and at most 1.")
    if temperature < 1e-30:                             # 0, or so small that the quotient might overflow
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        drop = p.cumsum(-1) - p >= top_p        # the token that crosses p is kept, so at least one remains
        logits = logits.masked_fill(torch.zeros_like(drop).scatter_(1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# ---- 4. ViT ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ViTConfig:
    """CLIP's ViT of the bundled size. SigLIP's, BLIP-2's and DINOv2's towers stand in papers/."""
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

    def __post_init__(self):
        if self.image_size < self.patch:    # a remainder is fine: SigLIP so400m has 384 pixels, patches of 14
            raise ValueError(f"a {self.image_size}-pixel image has no room for a {self.patch}-pixel patch.")
        if self.act not in ACTIVATIONS:
            raise ValueError(f'unknown activation "{self.act}"; known: {", ".join(ACTIVATIONS)}.')

    @property
    def side(self) -> int:                  # patches in a row; the convolution drops a remainder of pixels
        return self.image_size // self.patch

    @property
    def first(self) -> int:                 # index of the first patch
        return int(self.cls)

    @property
    def tokens(self) -> int:                # N
        return self.first + self.side**2


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),                       # OpenAI's CLIP
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),                               # Flamingo's paper
}


class EncoderBlock(nn.Module):
    """A pre-norm block (ViT, 2010.11929v2, Eq. 2 and 3).

    (I2)  x ← x + Attn(LN x);   x ← x + W_down act(W_up LN x)
    """

    def __init__(self, width: int, heads: int, hidden: int, act: str, eps: float,
                 attention_bias: str = "qkvo"):
        super().__init__()
        if width % heads:
            raise ValueError(f"a block of width {width} does not divide into {heads} heads.")
        self.heads, self.act = heads, ACTIVATIONS[act]
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=p in attention_bias) for p in "qkvo")
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.attend = Attend()

    def attention(self, x: Tensor, causal: bool = False, bias: Tensor | None = None) -> Tensor:
        q, k, v = (split_heads(f(x), self.heads) for f in (self.q, self.k, self.v))     # (B, H, N, E)
        return self.o(merge_heads(self.attend(q, k, v, bias, causal)))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))

    def forward(self, x: Tensor, causal: bool = False, bias: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), causal, bias)                     # (I2)
        return x + self.mlp(self.norm2(x))                                      # (I2)


class ViT(nn.Module):
    """pixels (B, 3, S, S) → tokens (B, N, Di). The class token, where there is one, stands at index 0.

    (I1)  z = [class; W patch_1; …; W patch_N] + positions          (ViT, 2010.11929v2, Eq. 1)
    """
    family = "clip"             # whose tower; papers/ has siglip, eva (BLIP-2) and dinov2
    antialias = False           # in resizing the positions

    def __init__(self, config: ViTConfig):
        super().__init__()
        c = self.config = config
        self.patch = nn.Conv2d(3, c.width, c.patch, stride=c.patch, bias=c.patch_bias)
        self.cls = nn.Parameter(torch.randn(c.width) * c.width**-0.5) if c.cls else None
        self.positions = nn.Parameter(torch.randn(c.cls + c.side**2, c.width) * c.width**-0.5)
        self.pre_norm = nn.LayerNorm(c.width, eps=c.norm_eps) if c.pre_norm else None
        self.blocks = nn.ModuleList(self.block(c) for _ in range(c.layers))
        self.post_norm = nn.LayerNorm(c.width, eps=c.norm_eps)

    def block(self, c: ViTConfig) -> EncoderBlock:
        return EncoderBlock(c.width, c.heads, c.hidden, c.act, c.norm_eps)

    def positions_for(self, rows: int, columns: int) -> Tensor:
        """(rows·columns + cls, Di): the learned grid, resized bicubically where it must be."""
        first, side = int(self.config.cls), self.config.side
        if (rows, columns) == (side, side):
            return self.positions
        grid = self.positions[first:].T.reshape(1, -1, side, side)
        grid = F.interpolate(grid.float(), size=(rows, columns), mode="bicubic", align_corners=False,
                             antialias=self.antialias).to(grid.dtype)
        return torch.cat((self.positions[:first], grid[0].flatten(1).T))

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, N, Di), what enters block 1."""
        patches = self.patch(pixels)                                            # (B, Di, S/p, S/p)
        x = patches.flatten(2).transpose(1, 2)                  # (B, N, Di)  row by row, from top left
        if self.cls is not None:
            x = torch.cat((self.cls.expand(x.shape[0], 1, -1), x), dim=1)
        x = x + self.positions_for(*patches.shape[2:])                          # (I1)
        return x if self.pre_norm is None else self.pre_norm(x)

    def forward(self, pixels: Tensor, return_hidden: bool = False, depth: int | None = None):
        """The state (B, N, Di) after `depth` blocks, ahead of the final norm, or all: [i] leaves block i."""
        hidden = [self.embed(pixels)]
        for block in self.blocks[:depth]:
            hidden.append(block(hidden[-1]))
        return hidden if return_hidden else hidden[-1]

    def pool(self, x: Tensor) -> Tensor:
        """(B, Di) from the last state: CLIP norms the class token."""
        return self.post_norm(x[:, 0])

    def features(self, pixels: Tensor, layer: int | list | str = -2, cls: bool = False) -> Tensor:
        """(B, N, Di) of a hidden state, of a list of them side by side, or "pooled"; cls: with the class."""
        if layer == "pooled":
            return self.pool(self(pixels))[:, None]
        n = self.config.layers
        layers = [l if l >= 0 else n + 1 + l for l in (layer if isinstance(layer, list) else [layer])]
        if min(layers) < 0 or max(layers) > n:
            raise ValueError(f"this ViT has hidden states 0 to {n}, there is no state {layer}.")
        hidden = self(pixels, return_hidden=True, depth=max(layers))
        x = hidden[-1] if len(layers) == 1 else torch.cat([hidden[l] for l in layers], dim=-1)
        return x if cls else x[:, self.config.first:]


# ---- 5. VLM: pixels → features → see → prefix in the place of the image → decoder → logits ---------------

class VLM(nn.Module):
    """ViT, bridge, decoder. `image_token`: the id of an image where the bridge has no prefix, or None."""

    def __init__(self, vit: ViT, bridge: Bridge, decoder: Decoder, image_token: int | None = None):
        super().__init__()
        self.vit, self.bridge, self.decoder = vit, bridge, decoder
        self.image_token = image_token
        self.processor = None                   # how pictures become pixels (data.Processor); None: as CLIP's

    def features(self, pixels: Tensor | None) -> Tensor:
        """(ΣM, 3, S, S) → (ΣM, N, Di): what this bridge reads; None: of a text without pictures, ΣM = 0."""
        if pixels is None:
            pixels = next(self.vit.parameters()).new_zeros(0, 3, *2 * [self.vit.config.image_size])
        return self.vit.features(pixels, self.bridge.reads, self.bridge.reads_cls)

    def prepare(self, tokens: Tensor, features: Tensor | None = None, mask: Tensor | None = None,
                labels: Tensor | None = None, pixels: Tensor | None = None,
                bridge_tokens: Tensor | None = None, bridge_mask: Tensor | None = None):
        """Put the images into the text: what the decoder needs, and the labels that moved with the expansion.

        tokens (B, T) with one IMAGE per image → dict(embeds (B, T', D), mask, bridge, visual), labels (B,
        T'). An IMAGE becomes the bridge's K soft tokens, or the ordinary token `image_token`, or nothing.
        Padding stays on the side it came from, on the right where rows of one length expand to several.
        `features` (ΣM, N, Di) may stand in for pixels; a text without images needs neither. bridge_tokens
        (ΣM, T) and bridge_mask go to the bridge's `see`: an instruction for the Q-Former itself.
        """
        if not tokens.shape[1]:
            raise ValueError("the text is empty; a prompt has one token or more.")
        features = self.features(pixels) if features is None else features
        is_image = tokens == IMAGE
        if int(is_image.sum()) != len(features):
            raise ValueError(f"the text has {int(is_image.sum())} image placeholders "
                             f"but {len(features)} images were given.")
        row, column = is_image.nonzero(as_tuple=True)                   # (ΣM,) row by row, from left to right
        seen = is_image.cumsum(1)                                       # (B, T) images up to each position
        where = ImagePositions(row, seen[row, column], seen, is_image)
        text = {} if bridge_tokens is None else {"text": bridge_tokens, "text_mask": bridge_mask}
        visual = self.bridge.see(features, where, **text)
        soft = self.bridge.prefix(visual)                                       # (ΣM, K, D) or None
        inputs = dict(bridge=self.bridge, visual=visual if soft is None else where)     # a prefix is words
        labels = None if labels is None else labels.masked_fill(is_image, IGNORE)
        if soft is None and self.image_token is not None:               # the image is an ordinary word
            words = tokens.masked_fill(is_image, self.image_token)
            return dict(embeds=self.decoder.embed(words), mask=mask, **inputs), labels

        new = Expansion(tokens, mask, 0 if soft is None else soft.shape[1])
        embeds = new.move(self.decoder.embed(tokens.masked_fill(is_image, 0)), 0)           # (B, T', D)
        if soft is not None:
            embeds = embeds.to(soft.dtype).masked_scatter(new.soft[..., None], soft)
        where.last, where.image = new.move(seen, 0), new.soft
        if mask is not None and mask.dtype != torch.bool:       # an image is its placeholder's document's
            mask = new.move(mask, 0)
        else:
            mask = None if bool(new.real.all()) else new.real
        return dict(embeds=embeds, mask=mask, **inputs), None if labels is None else new.move(labels, IGNORE)

    def forward(self, tokens: Tensor, pixels: Tensor | None = None, mask: Tensor | None = None, *,
                features: Tensor | None = None, return_hidden: bool = False, **text):
        """Logits (B, T', V) over the expanded sequence, and the L+1 hidden states when asked.

        Arguments as in `prepare`; text: its bridge_tokens and bridge_mask.
        """
        inputs, _ = self.prepare(tokens, features, mask, pixels=pixels, **text)
        return self.decoder(return_hidden=return_hidden, **inputs)

    def loss(self, tokens: Tensor, labels: Tensor, pixels: Tensor | None = None, mask: Tensor | None = None,
             features: Tensor | None = None, **text) -> tuple[Tensor, int]:
        """Σ −log p(y_t | y_<t, image) over the supervised tokens, and their number.

        labels (B, T): the token itself where it is supervised, IGNORE elsewhere; the shift happens here.
        Logits are computed at supervised positions only: the vocabulary projection dominates a small decoder.
        """
        inputs, labels = self.prepare(tokens, features, mask, labels, pixels, **text)
        return next_token_loss(self.decoder, labels, **inputs)

    @torch.no_grad()
    def generate(self, tokens: Tensor, pixels: Tensor | None = None, max_new_tokens: int = 32,
                 temperature: float = 0.0, mask: Tensor | None = None, features: Tensor | None = None,
                 bridge_tokens: Tensor | None = None, bridge_mask: Tensor | None = None, **kw) -> Tensor:
        """New tokens (B, T_new) int64; kw as in `Decoder.generate`. Padding may stand on either side."""
        inputs, _ = self.prepare(tokens, features, mask, None, pixels, bridge_tokens, bridge_mask)
        return self.decoder.generate(max_new_tokens=max_new_tokens, temperature=temperature, **inputs, **kw)


class Expansion:
    """Tokens (B, T) at their places in (B, T'), when an IMAGE takes K positions and padding none.

    source  (B, T')   the column in (B, T) that a position comes from
    real    (B, T')   False = padding, in front of each row (left) or behind it
    soft    (B, T')   True = one of the K of an image
    """

    def __init__(self, tokens: Tensor, mask: Tensor | None, K: int):
        is_image = tokens == IMAGE
        real = torch.ones_like(is_image) if mask is None else mask.bool()
        end = torch.where(is_image, K, real.long()).cumsum(1)   # (B, T) where a token's positions end
        longest = int(end[:, -1].max())                                         # T'
        at = torch.arange(longest, device=tokens.device).repeat(len(tokens), 1)             # (B, T')
        if bool((~real[:, 0]).any()):                                           # padding stands in front
            at = at - (longest - end[:, -1:])
        self.real = (at >= 0) & (at < end[:, -1:])
        self.source = torch.searchsorted(end, at, right=True).clamp(max=tokens.shape[1] - 1)
        self.soft = is_image.gather(1, self.source) & self.real

    def move(self, values: Tensor, fill) -> Tensor:
        """values (B, T, …) at their new places (B, T', …), `fill` where there is padding."""
        rows = torch.arange(len(values), device=values.device)[:, None]
        padding = ~self.real.view(*self.real.shape, *[1] * (values.ndim - 2))
        return values[rows, self.source].masked_fill(padding, fill)


def next_token_loss(decoder: Decoder, labels: Tensor, **inputs) -> tuple[Tensor, int]:
    """Σ −log p of labels (B, T) under the predictions one position earlier, and how many there are."""
    hidden = decoder.states(**inputs)[-1]
    target = labels[:, 1:]
    keep = target != IGNORE
    logits = decoder.logits(hidden[:, :-1][keep], inputs.get("bridge"))         # (supervised, V)
    return F.cross_entropy(logits.float(), target[keep], reduction="sum"), int(keep.sum())
