"""bridges.py: every way by which an image enters the decoder, one chapter each, complete in itself.

Chapters 1 linear, mlp (LLaVA 2304.08485v2, LLaVA-1.5 2310.03744v2) · 2 MAPL (2210.07179v2) ·
         3 Q-Former (BLIP-2 2301.12597v3, InstructBLIP 2305.06500v2) ·
         4 zero-init gated attention (LLaMA-Adapter 2303.16199v3, V2 2304.15010v1) ·
         5 gated cross-attention (Flamingo 2204.14198v2)
The base class `Bridge` and its seams see · prefix · beside · before stand in model.py, where the decoder
calls them. The relatives of these six, and `make_bridge`, which builds any of them by name, stand in papers/.

Shapes as in model.py; ΣM is the number of images of a batch. Equation tags like (Q2) stand in the docstring
and at the end of the line that computes them.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import (ACTIVATIONS, Bridge, DecoderConfig, EncoderBlock, ImagePositions, Attend, causal_mask,
                   merge_heads, split_heads, visible_to_bias)


# ---- 1. linear and mlp: a word for every patch -----------------------------------------------------------

class Linear(Bridge):
    """A linear map from each patch to one soft token (LLaVA, 2304.08485v2, §4.1, Eq. 1).

    symbol   shape         here        meaning
    Z_v      (ΣM, N, Di)   features    CLIP's grid features before the last block, class token dropped
    W        (D, Di)       map.weight  all that stage 1 trains (LiMBeR, 2209.15162v3, trains nothing else)
    H_v      (ΣM, N, D)    return      soft tokens in the space of word embeddings

    (L1)  H_v = W · Z_v

    Paper and published code differ: the code adds a bias. bias=True follows the code.
    """
    name, soft_tokens = "linear", True

    def __init__(self, decoder: DecoderConfig, vision_width: int, bias: bool = True):
        super().__init__()
        self.map = nn.Linear(vision_width, decoder.width, bias=bias)

    def prefix(self, visual: Tensor) -> Tensor:
        return self.map(visual)                                                 # (ΣM, N, D)   (L1)


class MLP(Bridge):
    """Two linear maps with an exact GELU between (LLaVA-1.5, 2310.03744v2, §3.3); symbols as in `Linear`.

    (L2)  H_v = W_2 · GELU(W_1 · Z_v + b_1) + b_2          middle=n: n more maps, a GELU ahead of each
    """
    name, soft_tokens = "mlp", True

    def __init__(self, decoder: DecoderConfig, vision_width: int, hidden: int | None = None,
                 bias: bool = True, middle: int = 0):
        super().__init__()
        hidden = hidden or decoder.width
        self.up = nn.Linear(vision_width, hidden, bias)
        self.middle = nn.ModuleList(nn.Linear(hidden, hidden, bias) for _ in range(middle))
        self.down = nn.Linear(hidden, decoder.width, bias)

    def prefix(self, visual: Tensor) -> Tensor:
        x = self.up(visual)
        for map in self.middle:
            x = map(F.gelu(x))
        return self.down(F.gelu(x))                                             # (ΣM, N, D)   (L2)


# ---- 2. MAPL: a narrow transformer that pours N patches into K slots -------------------------------------

class MAPL(Bridge):
    """MAPL's mapping network (2210.07179v2, §3.2; published code mair-lab/mapl).

    symbol   shape        here       meaning
    x        (ΣM, N, Di)  features   last hidden state of CLIP, class token KEPT, no post-norm
    C        (K, W)       const      learned constants, one copy for all images; they come AFTER the features
    W↓, W↑                down, up   into the bottleneck of width W and out of it

    (M1)  x ← W↓ x + b↓                                       Di → W = 256
    (M2)  x ← [x ; C]
    (M3)  x ← x + MHA(LN x);  x ← x + W_2 ReLU(W_1 LN x)      4 pre-norm layers, 8 heads, width 2W, no mask
    (M4)  y = W↑ x_{last K} + b↑                              W → D; no final norm, no positions

    At the published sizes (Di 1024, D 4096) this has 3,431,680 parameters. Where the code and we differ: it
    deep-copies one layer, so its layers start equal; ours start apart. Its training branch has dropout 0.1,
    its release none; so have we.
    """
    name, soft_tokens, reads, reads_cls = "mapl", True, -1, True

    def __init__(self, decoder: DecoderConfig, vision_width: int, constants: int = 32, width: int = 256,
                 layers: int = 4, heads: int = 8, hidden: int | None = None):
        super().__init__()
        self.down = nn.Linear(vision_width, width)
        self.const = nn.Parameter(torch.randn(constants, width))                # C ~ N(0, 1)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, hidden or 2 * width, "relu", 1e-5)
                                    for _ in range(layers))
        self.up = nn.Linear(width, decoder.width)
        for block in self.blocks:       # as nn.MultiheadAttention: Xavier on the packed (3W, W), biases zero
            for p in (block.q, block.k, block.v):
                nn.init.uniform_(p.weight, -math.sqrt(6 / (4 * width)), math.sqrt(6 / (4 * width)))
                nn.init.zeros_(p.bias)
            nn.init.zeros_(block.o.bias)

    def prefix(self, visual: Tensor) -> Tensor:
        x = self.down(visual)                                                   # (ΣM, N, W)   (M1)
        x = torch.cat((x, self.const.expand(len(x), -1, -1)), dim=1)            # (ΣM, N+K, W) (M2)
        for block in self.blocks:
            x = block(x)                                                        #              (M3)
        return self.up(x[:, -len(self.const):])                                 # (ΣM, K, D)   (M4)


# ---- 3. Q-Former: a BERT whose learned queries read the image --------------------------------------------

class PostNormAttention(nn.Module):
    """x ← LN(x + Drop(W_o MHA(x, y, y))): BERT's sub-layer, with y = x (self) or y = the image (cross)."""

    def __init__(self, width: int, source: int, heads: int, dropout: float):
        super().__init__()
        if width % heads:
            raise ValueError(f"a Q-Former of width {width} does not divide into {heads} heads.")
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)
        self.o, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.attend = Attend()

    def forward(self, x: Tensor, source: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (split_heads(y, self.heads) for y in (self.q(x), self.k(source), self.v(source)))
        y = self.attend(q, k, v, bias, dropout=self.dropout if self.training else 0.0)
        y = self.o(merge_heads(y))
        return self.norm(x + F.dropout(y, self.dropout, self.training))


class PostNormMLP(nn.Module):
    """x ← LN(x + Drop(W_2 GELU(W_1 x)))"""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training))


class QFormerLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, source: int | None, text: bool, dropout: float):
        super().__init__()
        self.attention = PostNormAttention(width, width, heads, dropout)
        self.cross = PostNormAttention(width, source, heads, dropout) if source else None
        self.query_mlp = PostNormMLP(width, hidden, dropout)
        self.text_mlp = PostNormMLP(width, hidden, dropout) if text else None

    def forward(self, x: Tensor, queries: int, image: Tensor | None, bias: Tensor | None,
                image_bias: Tensor | None) -> Tensor:
        x = self.attention(x, x, bias)                                          # (·, Q+T, W)  (Q2)
        q, t = x[:, :queries], x[:, queries:]
        if self.cross is not None and queries:
            q = self.cross(q, image, image_bias)                                #              (Q3)
        parts = ([self.query_mlp(q)] if queries else []) + ([self.text_mlp(t)] if t.shape[1] else [])
        return torch.cat(parts, dim=1)                                          #              (Q4)


def qformer_mask(kind: str, queries: int, text: Tensor) -> Tensor:
    """(·, 1, Q+T, Q+T) bool, True = may attend (row attends to column); text (·, T) bool, False = padding.

                 itm          itg           itc
               q   t        q   t         q   t
          q    1   1        1   0         1   0
          t    1   1        1  tril       0   1        (BLIP-2, Figure 2)
    """
    B, T = text.shape
    n = queries + T
    visible = torch.ones(n, n, dtype=torch.bool, device=text.device)
    if kind != "itm":
        visible[:queries, queries:] = False
    if kind == "itc":
        visible[queries:, :queries] = False
    if kind == "itg":
        visible[queries:, queries:] = causal_mask(T, text.device)
    columns = torch.cat((text.new_ones(B, queries), text), dim=1)
    return visible & columns[:, None, None]


class QFormer(Bridge):
    """The Querying Transformer (BLIP-2, 2301.12597v3, §3.1, Figure 2; stage 2: §3.3, Figure 3).

    symbol   shape        here          meaning
    I        (ΣM, N, Di)  image         frozen ViT tokens, class token kept, after a trained LayerNorm
    Q        (Q, W)       queries       learned, no positions; they pass BERT's embedding LayerNorm like words
    Y        (ΣM, T, W)   words         text: word + position, no token type; vocab=0 leaves this branch out
    P        (ΣM, Q, D)   return        the K = Q soft tokens

    (Q1)  X = LN([Q ; Y])
    (Q2)  X = LN(X + MHA(X, X, X; mask))              self-attention shared by queries and text
    (Q3)  Q' = LN(Q' + MHA(Q', I, I))                 in every `cross_every`-th layer, queries only
    (Q4)  Q = LN(Q' + FFN_q(Q'));  Y = LN(Y' + FFN_t(Y'))      two feed-forwards per layer
    (Q5)  P = W_p Q + b_p                             stage 2; with text (InstructBLIP), only the first Q rows

    Queries start at N(0, 0.02): equal queries give equal outputs, and nothing in the Q-Former itself would
    part them. Sizes: BERT-base. Trainable in stage 2 with ViT-L and OPT-2.7B: 103,593,984 (the "104M"), text
    branch stripped. ln_vision's ε is 1e-5 in the authors' code, 1e-6 in transformers; decoder=None leaves
    (Q5) out: the first stage has no decoder. A bare Q-Former (queries=0, vision_eps=None) has no queries and
    no ln_vision of its own.
    """
    name, soft_tokens, reads, reads_cls = "qformer", True, -1, True

    def __init__(self, decoder: DecoderConfig | None, vision_width: int, queries: int = 32, width: int = 768,
                 layers: int = 12, heads: int = 12, hidden: int = 3072, cross_every: int = 2, vocab: int = 0,
                 positions: int = 512, dropout: float = 0.1, vision_eps: float | None = 1e-5):
        super().__init__()
        self.dropout = dropout
        self.vision_norm = nn.LayerNorm(vision_width, eps=vision_eps) if vision_eps else nn.Identity()
        self.queries = nn.Parameter(torch.empty(queries, width)) if queries else None
        self.words = nn.Embedding(vocab, width) if vocab else None
        self.positions = nn.Embedding(positions, width) if vocab else None
        self.norm = nn.LayerNorm(width, eps=1e-12)
        sources = [vision_width if l % cross_every == 0 else None for l in range(layers)]
        self.layers = nn.ModuleList(QFormerLayer(width, heads, hidden, source, bool(vocab), dropout)
                                    for source in sources)
        for module in self.modules():                                   # BERT's init: N(0, 0.02), biases zero
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)
        if queries:
            nn.init.normal_(self.queries, 0.0, 0.02)
        self.project = nn.Linear(width, decoder.width) if decoder else None

    def encode(self, image: Tensor | None, text: Tensor | None = None, mask: str = "itm",
               text_mask: Tensor | None = None, image_mask: Tensor | None = None,
               queries: Tensor | None = None) -> list[Tensor]:
        """Hidden states (·, Q+T, W): after (Q1), then after each layer.

        image (·, N, Di) after `vision_norm`, or None: text alone. text (·, T) ids; mask: itm | itg | itc, see
        `qformer_mask`; text_mask (·, T), image_mask (·, N) bool, False = padding; queries replaces the
        learned ones (·, Q, W).
        """
        parts = []
        if image is not None:
            parts.append(self.queries.expand(len(image), -1, -1) if queries is None else queries)
        if text is not None:
            if self.words is None:
                raise ValueError("this Q-Former has no text branch; build it with vocab=30523 (BERT's + 1).")
            if text.shape[1] > len(self.positions.weight):
                raise ValueError(f"a text of {text.shape[1]} tokens, but this Q-Former has "
                                 f"{len(self.positions.weight)} positions; cut it.")
            parts.append(self.words(text) + self.positions.weight[:text.shape[1]])
        Q = parts[0].shape[1] if image is not None else 0
        x = F.dropout(self.norm(torch.cat(parts, dim=1)), self.dropout, self.training)      # (Q1)
        bias = image_bias = None
        if text is not None:
            text_mask = torch.ones_like(text, dtype=torch.bool) if text_mask is None else text_mask
            bias = visible_to_bias(qformer_mask(mask, Q, text_mask), x.dtype)
        if image_mask is not None:
            image_bias = visible_to_bias(image_mask[:, None, None], x.dtype)
        hidden = [x]
        for layer in self.layers:
            hidden.append(layer(hidden[-1], Q, image, bias, image_bias))
        return hidden

    def see(self, features: Tensor, where: ImagePositions | None = None, text: Tensor | None = None,
            text_mask: Tensor | None = None) -> Tensor:
        """Query states (ΣM, Q, W). With `text` they read the instruction, too (InstructBLIP, §2.3)."""
        return self.encode(self.vision_norm(features), text, "itm", text_mask)[-1][:, :len(self.queries)]

    def prefix(self, visual: Tensor) -> Tensor:
        return self.project(visual)                                             # (ΣM, Q, D)   (Q5)


# ---- 4. Zero-init gated attention: prompts beside the words ----------------------------------------------

class ZeroInit(Bridge):
    """Zero-init attention over learned prompts (LLaMA-Adapter, 2303.16199v3, §3.1 and 3.2).

    symbol   shape           here          meaning
    P_l      (Q, D)          prompts[l]    learned prompts of the l-th of the topmost `adapted` layers
    S^K      (B, H, T, Q)    scores        scores of the words on the prompts
    g_l      (H,)            gate[layer]   one gate per head (gate_per="head") or per layer, ZERO at the start
    I        (B, 1|Q, D)     visual        the image, added to the prompts of every adapted layer; here none

    (Z1)  S^K = q · k(P_l + I)ᵀ / √E                 k, v: the layer's own, frozen; no RoPE
    (Z2)  y  += tanh(g_l) · softmax(S^K) v(P_l + I)  a softmax of its own: the words' weights stay

    At g = 0 the branch adds exactly 0 and ∂/∂P = 0: the first step moves the gates alone.
    """
    name, reads, reads_cls, sees = "zero_init", -1, True, False     # sees: an image is added to the prompts

    def __init__(self, decoder: DecoderConfig, vision_width: int, prompts: int = 10, adapted: int = 30,
                 tanh: bool = True, gate_per: str = "head", gate_init: str = "zero"):
        super().__init__()
        check_zero_init(decoder, adapted, gate_per, gate_init)
        self.first, self.tanh = decoder.layers - adapted, tanh
        self.prompts = nn.Parameter(torch.randn(adapted, prompts, decoder.width))
        shape = (decoder.layers, decoder.heads if gate_per == "head" else 1)
        self.gate = nn.Parameter(torch.randn(shape) if gate_init == "random" else torch.zeros(shape))
        self.softmax = nn.Softmax(-1)       # no parameters; a hook sees its weights

    def see(self, features: Tensor, where: ImagePositions | None = None) -> Tensor | None:
        return None

    def beside(self, layer: int, q: Tensor, project, visual: Tensor | None) -> Tensor | None:
        if layer < self.first:
            return None
        p = self.prompts[layer - self.first]                                    # (Q, D)
        k, v = project(p[None] if visual is None else p + visual)               # (1|B, H, Q, E) each
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5                  # (B, H, T, Q) (Z1)
        weights = self.softmax(scores.float())                                  # (B, H, T, Q)
        gate = self.gate[layer].tanh() if self.tanh else self.gate[layer]
        return gate.view(-1, 1, 1).to(v.dtype) * (weights.to(v.dtype) @ v)      # (B, H, T, E) (Z2)

    def gates(self) -> Tensor:
        g = self.gate[self.first:].detach().float()
        return g.tanh() if self.tanh else g

    @property
    def gated_layers(self) -> list[int]:
        return list(range(self.first, len(self.gate)))


# What the sources do differently. (Z2) equals the paper's concatenation [softmax(S^K)·g ; softmax(S^{M+1})] V
# (Eq. 8), since the two softmaxes are separate and W_o is linear; a test proves it. Paper and published codes
# differ: the paper divides by √C, meaning one head, the code by √E; paper v1 and the inference file use g
# itself, the training file tanh(g), and tanh=True follows the training file. PEFT's AdaptionPrompt is
# gate_per="layer", tanh=False. Gates are kept for all L layers, as in the published files.
# gate_init="random", g ~ N(0, 1), is our reading of the rand-init ablation, which the paper does not define.

def check_zero_init(decoder: DecoderConfig, adapted: int, gate_per: str, gate_init: str) -> None:
    if not 0 < adapted <= decoder.layers:
        raise ValueError(f"zero_init adapts the topmost {adapted} layers, but the decoder has "
                         f"{decoder.layers}; give adapted=1..{decoder.layers}.")
    if gate_per not in ("head", "layer") or gate_init not in ("zero", "random"):
        raise ValueError(f'zero_init has gate_per "head" or "layer", not "{gate_per}", and gate_init "zero" '
                         f'or "random", not "{gate_init}".')


def image_of_each_row(image: Tensor, where: ImagePositions | None, name: str = "zero_init") -> Tensor:
    """image (ΣM, 1|Q, D) → (B, 1|Q, D), zero for a row without an image; one row takes one image."""
    if where is None:
        return image
    if len(where.order) and int(where.order.max()) > 1:
        raise ValueError(f"{name} takes one image per text: its prompts have no place for a second; use "
                         "another bridge for several.")
    return image.new_zeros(len(where.last), *image.shape[1:]).index_put((where.row,), image)


class ZeroInitV2(ZeroInit):
    """LLaMA-Adapter V2's image (2304.15010v1; published code): a vector for every prompt.

    symbol   shape           here          meaning
    z        (ΣM, N, Di)     features      ViT tokens, class token kept
    Q        (Q, W)          queries       learned, one for each prompt
    I        (B, Q, D)       visual        what `see` returns, added to the prompts in (Z1) and (Z2)

    (Z3)  [I ; ·] = Blocks([queries ; LN(W_c z)]);   I = LN(W_p I)          `depth` pre-norm blocks

    Every prompt gets a vector of its own, so the question chooses among them. One vector for all prompts, as
    in the first version (papers/llama_adapter.py), cannot be steered by the question.
    """
    sees = True

    def __init__(self, decoder: DecoderConfig, vision_width: int, prompts: int = 10, adapted: int = 30,
                 tanh: bool = True, gate_per: str = "head", width: int = 768, depth: int = 8, heads: int = 16,
                 mlp: int = 4, gate_init: str = "zero"):
        super().__init__(decoder, vision_width, prompts, adapted, tanh, gate_per, gate_init)
        self.queries = nn.Parameter(torch.randn(prompts, width))
        self.vision, self.vision_norm = nn.Linear(vision_width, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, mlp * width, "gelu", 1e-5)
                                    for _ in range(depth))
        self.project, self.project_norm = nn.Linear(width, decoder.width), nn.LayerNorm(decoder.width)

    def see(self, features: Tensor, where: ImagePositions | None = None) -> Tensor:
        z = self.vision_norm(self.vision(features))                             # (ΣM, N, W)
        x = torch.cat((self.queries.expand(len(z), -1, -1).to(z.dtype), z), dim=1)
        for block in self.blocks:
            x = block(x)
        image = self.project_norm(self.project(x[:, :len(self.queries)]))       # (ΣM, Q, D)   (Z3)
        return image_of_each_row(image, where)


# ---- 5. Flamingo: gated cross-attention ahead of frozen layers -------------------------------------------

class FeedForward(nn.Module):
    """LN → up → act → down, without biases: the feed-forward of the resampler and of the gated blocks."""

    def __init__(self, width: int, mult: int, act: str):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), ACTIVATIONS[act]
        self.up = nn.Linear(width, mult * width, bias=False)
        self.down = nn.Linear(mult * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.norm(x))))


class ResamplerLayer(nn.Module):
    def __init__(self, width: int, heads: int, head_width: int, mult: int, act: str):
        super().__init__()
        self.heads = heads
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, heads * head_width, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * head_width, width, bias=False)
        self.attend = Attend()
        self.ff = FeedForward(width, mult, act)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        latents = latents + self.attention(self.norm_media(x), self.norm_latents(latents))      # (F1)
        return latents + self.ff(latents)                                       # (F2)

    def attention(self, x: Tensor, latents: Tensor) -> Tensor:
        kv = torch.cat((x, latents), dim=1)                             # keys: features AND current latents
        q, k, v = (split_heads(y, self.heads) for y in (self.q(latents), self.k(kv), self.v(kv)))
        return self.o(merge_heads(self.attend(q, k, v)))


class Resampler(nn.Module):
    """Perceiver Resampler (Flamingo §2.1, Appendix A.1.1, Figure 5): N features → R latent vectors.

    (F1)  x ← x + Attn(q = x, kv = [x_f ; x])
    (F2)  x ← x + FFW(x)
    Spatial cells carry no position. x_f gets a learned time embedding per frame, or per image of the
    sequence, when times > 0 (the paper has 8 frames; OpenFlamingo's default is none). The final norm stands
    in every code, not in the paper.
    """

    def __init__(self, width: int, latents: int, layers: int, heads: int, head_width: int, mult: int,
                 act: str, times: int, layer: type[ResamplerLayer] = ResamplerLayer):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.times = nn.Parameter(torch.randn(times, 1, width)) if times else None
        self.layers = nn.ModuleList(layer(width, heads, head_width, mult, act) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (ΣM, N, Di), time (ΣM,) from 0 → (ΣM, R, Di)."""
        if self.times is not None and time is not None:
            if len(time) and int(time.max()) >= len(self.times):
                raise ValueError(f"image number {int(time.max()) + 1} of a text, but the resampler has "
                                 f"{len(self.times)} time embeddings; build it with times=0 or more of them.")
            x = x + self.times[time]
        latents = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm(latents)


class GatedCrossAttention(nn.Module):
    """GATED XATTN-DENSE (Flamingo §2.2, Figure 4): two gated steps ahead of a layer, nothing at the start."""

    def __init__(self, width: int, vision_width: int, heads: int, head_width: int, mult: int, act: str,
                 norm_media: bool):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.norm_media = nn.LayerNorm(vision_width) if norm_media else None
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.k, self.v = (nn.Linear(vision_width, heads * head_width, bias=False) for _ in range(2))
        self.o = nn.Linear(heads * head_width, width, bias=False)
        self.attend = Attend()
        self.ff = FeedForward(width, mult, act)
        self.attention_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def project(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """media (B, M·R, Di) → keys, values (B, H, M·R, E): computed once per image."""
        media = media if self.norm_media is None else self.norm_media(media)
        return split_heads(self.k(media), self.heads), split_heads(self.v(media), self.heads)

    def attention(self, x: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """x (B, T, D), visible (B, T, M·R). Without an image a word reads exactly 0."""
        q = split_heads(self.q(self.norm(x)), self.heads)                       # (B, H, T, E)
        y = self.attend(q, k, v, visible_to_bias(visible[:, None], q.dtype))    # (B, H, T, E)
        return self.o(merge_heads(y)) * visible.any(-1, keepdim=True)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        if k.shape[2]:                                                          # some image in the batch
            x = x + (self.attention_gate.tanh() * self.attention(x, k, v, visible)).to(x.dtype)         # (F3)
        return x + (self.ff_gate.tanh() * self.ff(x)).to(x.dtype)       # (F4)  the decoder's dtype stays


class Flamingo(Bridge):
    """Flamingo (2204.14198v2, §2.1 to 2.3, Eq. 1): p(y | x) = Π_ℓ p(y_ℓ | y_<ℓ, x_≤ℓ) by cross-attention.

    symbol    shape            here              meaning
    x_f       (ΣM, N, Di)      features          ViT tokens
    x         (ΣM, R, Di)      latents           the resampled image, R = 64
    α_x, α_d  (1,)             attention_gate, ff_gate      per inserted block, ZERO at the start
    φ(ℓ)      (B, T)           where.last        index of the last image at or before position ℓ; 0 = none

    (F1), (F2)  Perceiver Resampler, see `Resampler`
    (F3)  y ← y + tanh(α_x) · XAttn(LN y, x_φ(ℓ))       each word sees the latents of image φ(ℓ) only
    (F4)  y ← y + tanh(α_d) · FFW(LN y)

    inserted before the decoder's layers `first`, first + every, …: the paper and IDEFICS start at 0,
    OpenFlamingo at every−1. The paper leaves open whether the <image> tag sees its own image; as in
    OpenFlamingo, it does. see_all=True is the paper's ablation "all previous images". Paper: heads × 128 = D,
    squared ReLU, LN on the keys too (norm_media=True); OpenFlamingo: 8 × 64, GELU, no LN on the keys; those
    are the defaults. Reads the last state without the class token, before CLIP's post-norm.
    """
    name, reads, reads_cls = "flamingo", -1, False

    def __init__(self, decoder: DecoderConfig, vision_width: int, every: int = 4, first: int = 0,
                 latents: int = 64, depth: int = 6, heads: int = 8, head_width: int = 64, mult: int = 4,
                 act: str = "gelu", times: int = 0, norm_media: bool = False, see_all: bool = False,
                 resampler_heads: int | None = None, resampler_head_width: int | None = None):
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f'flamingo knows no activation "{act}"; known: {", ".join(ACTIVATIONS)}.')
        if first >= decoder.layers:
            raise ValueError(f"flamingo's first={first} is above the decoder; give 0..{decoder.layers - 1}.")
        self.every, self.first, self.see_all = every, first, see_all
        self.resampler = Resampler(vision_width, latents, depth, resampler_heads or heads,
                                   resampler_head_width or head_width, mult, act, times)
        self.blocks = nn.ModuleList(
            GatedCrossAttention(decoder.width, vision_width, heads, head_width, mult, act, norm_media)
            for _ in range(first, decoder.layers, every))

    def see(self, features: Tensor, where: ImagePositions) -> dict:
        latents = self.resampler(features, where.order - 1)                     # (ΣM, R, Di)
        B, M, R = len(where.last), int(where.order.max()) if len(where.order) else 0, latents.shape[1]
        media = latents.new_zeros(B, M, *latents.shape[1:]).index_put((where.row, where.order - 1), latents)
        media = media.flatten(1, 2)                                             # (B, M·R, Di) image-major
        image = torch.arange(1, M + 1, device=media.device).repeat_interleave(R)   # (M·R,) whose latent it is
        return {"kv": [block.project(media) for block in self.blocks], "where": where,
                "image": image.expand(B, -1)}

    def before(self, layer: int, x: Tensor, visual: dict | None) -> Tensor:
        if visual is None or layer < self.first or (layer - self.first) % self.every:
            return x
        n = (layer - self.first) // self.every
        phi = visual["where"].columns(x.shape[1])[..., None]                    # (B, T, 1)   φ(ℓ)
        image = visual["image"][:, None]                                        # (B, 1, M·R)
        visible = (image <= phi) if self.see_all else (image == phi)    # (B, T, M·R) True = may attend
        k, v = visual["kv"][n]
        return self.blocks[n](x, k, v, visible)

    def gates(self) -> Tensor:
        """(inserted blocks, 2, or 2·D with a gate per channel): of attention, then of feed-forward."""
        gates = [torch.cat((b.attention_gate, b.ff_gate)) for b in self.blocks]
        return torch.stack(gates).detach().float().tanh()

    @property
    def gated_layers(self) -> list[int]:
        return [self.first + n * self.every for n in range(len(self.blocks))]


BRIDGES: dict[str, type[Bridge]] = {b.name: b for b in (Linear, MLP, MAPL, QFormer, ZeroInitV2, Flamingo)}
