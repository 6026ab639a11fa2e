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
import math
from dataclasses import dataclass
import difflib
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn


def nearest(wrong: str, known) -> str:
    """The end of a message about an unknown name: the most similar known one, then all of them."""
    near = difflib.get_close_matches(wrong, known, 1)
    return (f'did you mean "{near[0]}"? ' if near else "") + f"Known: {', '.join(known)}."


IGNORE = -100  # label of a position that carries no loss
IMAGE = -200   # stands in `tokens` where an image stands in the text (LLaVA's sentinel id)


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
    `reads` is the ViT hidden state it wants (−2: the input of the last block), `reads_cls` whether the class token
    comes along.
    """
    name = "none"
    soft_tokens = False                     # True: `prefix` gives the tokens that stand in the place of each image
    reads, reads_cls = -2, False
    looks = "decoder.layers.*.attention"    # the names in `watching` of the words' attention to the visual tokens
    options: dict = {}                      # keyword arguments it was built with, for config.json

    def see(self, features: Tensor, where: ImagePositions | None = None) -> object:
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

    def gates(self) -> Tensor | None:
        """(layers, gates of a layer) float32: what multiplies the bridge's terms, a row per layer of `gated_layers`; None: no gate."""
        return None

    @property
    def gated_layers(self) -> list[int]:
        """The decoder's layers that the rows of `gates` belong to."""
        return []


@dataclass
class ImagePositions:
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
            raise ValueError(f"a tied output projection has a row for every id: {self.extra_tokens} ids cannot be read only.")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly; "
                            "num_attention_heads must be a multiple of num_key_value_heads.")
        if self.head_width % 2:
            raise ValueError(f"RoPE rotates pairs, so the head width must be even, not {self.head_width}.")


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

    # --------------------------------------------------------------------------------------------------------
    # 3. Generation
    # --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def stream(self, tokens: Tensor | None = None, max_new_tokens: int = 32, temperature: float = 0.0,
               top_k: int = 0, top_p: float = 1.0, stop: tuple[int, ...] = (),
               generator: torch.Generator | None = None, mask: Tensor | None = None, embeds: Tensor | None = None,
               bridge: Bridge | None = None, visual=None) -> Iterator[Tensor]:
        """Yields the next token of every row, (B,) int64, until all rows have stopped.

        temperature 0 is greedy; top_k keeps the k likeliest tokens, top_p the smallest set whose probability
        reaches p. A row that has emitted a stop id repeats it. Padding, if any, stands on the left.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; at least one token must be asked for.")
        B, T = tokens.shape if embeds is None else embeds.shape[:2]
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

    def generate(self, tokens: Tensor | None = None, max_new_tokens: int = 32, temperature: float = 0.0,
                 **kw) -> Tensor:
        """The new tokens only, (B, T_new) int64; arguments as in `stream`."""
        return torch.stack(list(self.stream(tokens, max_new_tokens, temperature, **kw)), dim=1)


NO_BRIDGE = Bridge()


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float,
           generator: torch.Generator | None) -> Tensor:
    """(B, V) → (B,): argmax at temperature 0, else a draw from the truncated distribution."""
    if temperature == 0:
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
            raise ValueError(f"a {self.image_size}-pixel image has no room for a {self.patch}-pixel patch.")
        if self.width % self.heads:
            raise ValueError(f"a ViT of width {self.width} does not divide into {self.heads} heads.")
        if self.act not in ACTIVATIONS:
            raise ValueError(f'unknown activation "{self.act}"; known: {", ".join(ACTIVATIONS)}.')

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
            raise ValueError(f"a block of width {width} does not divide into {heads} heads.")
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
            raise ValueError(f"this ViT has hidden states 0 to {n}, there is no state {layer}.")
        x = self(pixels, depth=layer)
        return x if cls or not self.config.cls else x[:, 1:]


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
        return self.vit.features(pixels, self.bridge.reads, self.bridge.reads_cls)

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
            raise ValueError(f"the text has {int(is_image.sum())} image placeholders but {len(features)} images were given.")
        real = torch.ones_like(is_image) if mask is None else mask.bool()
        row, column = is_image.nonzero(as_tuple=True)                           # (ΣM,) row by row, from left to right
        seen = is_image.cumsum(1)                                               # (B, T) images at or before each position
        where = ImagePositions(row, seen[row, column], seen)
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
        """The new tokens only, (B, T_new) int64; kw as in `Decoder.stream`. Padding may stand on either side."""
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
