"""bridges.py: every way by which an image enters the decoder, one chapter each, complete in itself.

Chapters 1 linear, mlp (LLaVA 2304.08485v2, LLaVA-1.5 2310.03744v2) · 2 MAPL (2210.07179v2) · 3 Q-Former (BLIP-2 2301.12597v3,
         InstructBLIP 2305.06500v2) · 4 zero-init gated attention (LLaMA-Adapter 2303.16199v3, V2 2304.15010v1) ·
         5 gated cross-attention (Flamingo 2204.14198v2, IDEFICS 2306.16527v2, Llama 3 2407.21783v3)
The base class `Bridge` and its seams see · prefix · beside · before stand in model.py, where the decoder calls them.

Shapes as in model.py: B batch, T text tokens, D decoder width, H heads, E head width, K visual tokens, ΣM images of a
batch, N ViT tokens, Di ViT width, Q learned queries / prompts / latents. Equation tags like (Q2) stand in the docstring
and at the end of the line that computes them.
"""
from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import (ACTIVATIONS, CLIP_DEFAULTS, DECODER_NAMES, EVA_NAMES, IGNORE, IGNORED, LLAMA_DEFAULTS, META_NAMES,
                   TILED_BLOCK_NAMES, TILED_VIT_NAMES, VIT_DEFAULTS, VIT_NAMES, VLM, Block, Bridge, Checkpoint,
                   Decoder, DecoderConfig, EncoderBlock, RMSNorm, SwiGLU, TiledViT, Tiles, UserError, ViT, Where,
                   attend, by_their_names, causal_mask, decoder_config, decoder_names, expand, hf_decoder_config,
                   hf_vit_config, merge_heads, nearest, read_json, save_decoder, shown, split_heads, tiled_vit_config,
                   tower_folder, visible_to_bias, vit_config, vit_file, write_json, write_tensors)


def rolled(x: Tensor, weights: Tensor, source: Tensor) -> Tensor:
    """Attention rollout (2005.00928v2, §3): x ← ½ x + ½ A · source, A the mean of weights (·, H, T, S) over heads.

    x (·, T, N): of which ViT tokens each of T vectors is made, half from its residual stream, half from what it reads.
    A reading aid: it knows no values, norms or feed-forwards, nor that a ViT token has itself looked at its neighbours.
    """
    return (x + weights.mean(1) @ source) / 2


# ------------------------------------------------------------------------------------------------------------------
# 1. linear and mlp: a word for every patch
# ------------------------------------------------------------------------------------------------------------------


class Linear(Bridge):
    """A linear map from each patch to one soft token (LLaVA, 2304.08485v2, §4.1, Eq. 1).

    symbol   shape         here        meaning
    Z_v      (ΣM, N, Di)   features    CLIP's grid features before the last block, class token dropped
    W        (D, Di)       map.weight  the only thing stage 1 trains (LiMBeR, 2209.15162v3, trains nothing else at all)
    H_v      (ΣM, N, D)    return      soft tokens in the space of word embeddings

    (L1)  H_v = W · Z_v

    Paper and published code differ: the code adds a bias. bias=True follows the code.
    """
    name = "linear"

    def __init__(self, decoder: DecoderConfig, vision_width: int, bias: bool = True):
        super().__init__()
        self.map = nn.Linear(vision_width, decoder.width, bias=bias)

    def prefix(self, visual: Tensor) -> Tensor:
        return self.map(visual)                                                 # (ΣM, N, D)   (L1)


class MLP(Bridge):
    """Two linear maps with an exact GELU between them (LLaVA-1.5, 2310.03744v2, §3.2); symbols as in `Linear`.

    (L2)  H_v = W_2 · GELU(W_1 · Z_v + b_1) + b_2
    """
    name = "mlp"

    def __init__(self, decoder: DecoderConfig, vision_width: int, hidden: int | None = None):
        super().__init__()
        self.up = nn.Linear(vision_width, hidden or decoder.width)
        self.down = nn.Linear(hidden or decoder.width, decoder.width)

    def prefix(self, visual: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(visual)))                               # (ΣM, N, D)   (L2)


class Frozen(Bridge):
    """The whole picture in a few soft tokens (Frozen, 2106.13884v2, §3.1): the ancestor, whose VISION ENCODER learns through the decoder.

    symbol   shape         here      meaning
    z        (ΣM, Di)      z         the mean over all patches, as the paper's NF-ResNet-50 pools its cells
    W        (nD, Di)      map       trained together with the whole encoder; the decoder is frozen, gradients pass through it
    H_v      (ΣM, n, D)    return    n = 2 soft tokens

    (R1)  H_v = reshape(W z + b)
    """
    name, reads_layer = "frozen", -1

    def __init__(self, decoder: DecoderConfig, vision_width: int, tokens: int = 2):
        super().__init__()
        self.tokens = tokens
        self.map = nn.Linear(vision_width, tokens * decoder.width)

    def prefix(self, visual: Tensor) -> Tensor:
        return self.map(visual.mean(1)).unflatten(-1, (self.tokens, -1))        # (ΣM, n, D)   (R1)

    def made_of(self, attention: dict[str, Tensor], features: Tensor) -> Tensor:
        return torch.full((len(features), self.tokens, features.shape[1]), 1 / features.shape[1], device=features.device)


# ------------------------------------------------------------------------------------------------------------------
# 2. MAPL: a narrow transformer that pours N patches into K slots
# ------------------------------------------------------------------------------------------------------------------


class MAPL(Bridge):
    """MAPL's mapping network (2210.07179v2, §3.2; published code mair-lab/mapl).

    symbol   shape        here       meaning
    x        (ΣM, N, Di)  features   last hidden state of CLIP, class token KEPT, no post-norm
    C        (K, W)       const      learned constants, one copy for all images; they come AFTER the features
    W↓, W↑                down, up   into the bottleneck of width W and out of it

    (M1)  x ← W↓ x + b↓                                       Di → W = 256
    (M2)  x ← [x ; C]
    (M3)  x ← x + MHA(LN x);  x ← x + W_2 ReLU(W_1 LN x)      4 pre-norm layers, 8 heads, feed-forward 2W, no mask
    (M4)  y = W↑ x_{last K} + b↑                              W → D; no final norm, no positions

    At the published sizes (Di 1024, D 4096) this has 3,431,680 parameters. Where the code and we differ: it deep-copies one
    layer, so its layers start equal; ours start apart. Its training branch has dropout 0.1, its release none; so have we.
    """
    name, reads_layer, reads_cls = "mapl", -1, True

    def __init__(self, decoder: DecoderConfig, vision_width: int, constants: int = 32, width: int = 256, layers: int = 4,
                 heads: int = 8, hidden: int | None = None):
        super().__init__()
        self.down = nn.Linear(vision_width, width)
        self.const = nn.Parameter(torch.randn(constants, width))                # C ~ N(0, 1)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, hidden or 2 * width, "relu", 1e-5) for _ in range(layers))
        self.up = nn.Linear(width, decoder.width)
        for block in self.blocks:                                               # as nn.MultiheadAttention: Xavier on the packed
            for p in (block.q, block.k, block.v):                               # (3W, W) matrix, biases zero
                nn.init.uniform_(p.weight, -math.sqrt(6 / (4 * width)), math.sqrt(6 / (4 * width)))
                nn.init.zeros_(p.bias)
            nn.init.zeros_(block.o.bias)

    def prefix(self, visual: Tensor) -> Tensor:
        x = self.down(visual)                                                   # (ΣM, N, W)   (M1)
        x = torch.cat((x, self.const.expand(len(x), -1, -1)), dim=1)            # (ΣM, N+K, W) (M2)
        for block in self.blocks:
            x = block(x)                                                        #              (M3)
        return self.up(x[:, -len(self.const):])                                 # (ΣM, K, D)   (M4)

    def made_of(self, attention: dict[str, Tensor], features: Tensor) -> Tensor:
        K, N = len(self.const), features.shape[1]
        x = torch.eye(N + K, N, device=features.device)                         # the constants hold no patch yet
        for l in range(len(self.blocks)):
            x = rolled(x, attention[f"bridge.blocks.{l}"], x)
        return F.normalize(x[:, -K:], p=1, dim=-1)


# ------------------------------------------------------------------------------------------------------------------
# 3. Q-Former: a BERT whose learned queries read the image
# ------------------------------------------------------------------------------------------------------------------


class PostNormAttention(nn.Module):
    """x ← LN(x + Drop(W_o MHA(x, y, y))): BERT's sub-layer, with y = x (self) or y = the image (cross)."""

    def __init__(self, width: int, source: int, heads: int, dropout: float):
        super().__init__()
        if width % heads:
            raise UserError(f"a Q-Former of width {width} does not divide into {heads} heads.")
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)
        self.o, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, source: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (split_heads(y, self.heads) for y in (self.q(x), self.k(source), self.v(source)))
        y = self.o(merge_heads(attend(q, k, v, bias, dropout=self.dropout if self.training else 0.0)))
        return self.norm(x + F.dropout(y, self.dropout, self.training))


class PostNormMLP(nn.Module):
    """x ← LN(x + Drop(W_2 GELU(W_1 x)))"""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.up, self.down, self.norm = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training))


class QFormerLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, source: int | None, text: bool, dropout: float):
        super().__init__()
        self.attention = PostNormAttention(width, width, heads, dropout)
        self.cross = PostNormAttention(width, source, heads, dropout) if source else None
        self.query_mlp = PostNormMLP(width, hidden, dropout)
        self.text_mlp = PostNormMLP(width, hidden, dropout) if text else None

    def forward(self, x: Tensor, queries: int, image: Tensor | None, bias: Tensor | None, image_bias: Tensor | None) -> Tensor:
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
    see = torch.ones(n, n, dtype=torch.bool, device=text.device)
    if kind != "itm":
        see[:queries, queries:] = False
    if kind == "itc":
        see[queries:, :queries] = False
    if kind == "itg":
        see[queries:, queries:] = causal_mask(T, text.device)
    columns = torch.cat((text.new_ones(B, queries), text), dim=1)
    return see & columns[:, None, None]


class QFormer(Bridge):
    """The Querying Transformer (BLIP-2, 2301.12597v3, §3.1, Figure 2; stage 2: §3.3, Figure 3).

    symbol   shape        here          meaning
    I        (ΣM, N, Di)  image         frozen ViT tokens, class token kept, after a trained LayerNorm (ln_vision)
    Q        (Q, W)       queries       learned, no positions; they pass BERT's embedding LayerNorm like words do
    Y        (ΣM, T, W)   words         text: word + position, no token-type row (the text branch; vocab=0 leaves it out)
    P        (ΣM, Q, D)   return        the K = Q soft tokens

    (Q1)  X = LN([Q ; Y])
    (Q2)  X = LN(X + MHA(X, X, X; mask))              self-attention shared by queries and text
    (Q3)  Q' = LN(Q' + MHA(Q', I, I))                 in every `cross_every`-th layer, from layer 0 on; queries only
    (Q4)  Q = LN(Q' + FFN_q(Q'));  Y = LN(Y' + FFN_t(Y'))      two feed-forwards per layer
    (Q5)  P = W_p Q + b_p                             stage 2; with text (InstructBLIP), only the first Q rows

    Queries start at N(0, 0.02): equal queries give equal outputs, and nothing in the Q-Former itself would part them.
    Sizes: BERT-base. Trainable in stage 2 with ViT-L and OPT-2.7B: 103,593,984 (the "104M"), text branch stripped. ln_vision's ε is 1e-5 in the authors' code, 1e-6 in
    transformers; decoder=None leaves (Q5) out: the first stage has no decoder. A bare Q-Former (queries=0, vision_eps=None)
    has no queries and no ln_vision of its own.
    """
    name, reads_layer, reads_cls = "qformer", -1, True

    def __init__(self, decoder: DecoderConfig | None, vision_width: int, queries: int = 32, width: int = 768, layers: int = 12,
                 heads: int = 12, hidden: int = 3072, cross_every: int = 2, vocab: int = 0, positions: int = 512,
                 dropout: float = 0.1, vision_eps: float | None = 1e-5):
        super().__init__()
        self.dropout = dropout
        self.vision_norm = nn.LayerNorm(vision_width, eps=vision_eps) if vision_eps else nn.Identity()
        self.queries = nn.Parameter(torch.empty(queries, width)) if queries else None
        self.words = nn.Embedding(vocab, width) if vocab else None
        self.positions = nn.Embedding(positions, width) if vocab else None
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(QFormerLayer(width, heads, hidden, vision_width if l % cross_every == 0 else None, bool(vocab), dropout)
                                    for l in range(layers))
        for module in self.modules():                                           # BERT's init: N(0, 0.02), biases zero
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)
        if queries:
            nn.init.normal_(self.queries, 0.0, 0.02)
        self.project = nn.Linear(width, decoder.width) if decoder else None

    def encode(self, image: Tensor | None, text: Tensor | None = None, mask: str = "itm", text_mask: Tensor | None = None,
               image_mask: Tensor | None = None, queries: Tensor | None = None) -> list[Tensor]:
        """Hidden states (·, Q+T, W): after (Q1), then after each layer.

        image (·, N, Di) after `vision_norm`, or None: text alone. text (·, T) ids; mask: itm | itg | itc, see `qformer_mask`;
        text_mask (·, T), image_mask (·, N) bool, False = padding; queries replaces the learned ones (·, Q, W).
        """
        parts = []
        if image is not None:
            parts.append(self.queries.expand(len(image), -1, -1) if queries is None else queries)
        if text is not None:
            if self.words is None:
                raise UserError("this Q-Former was built without its text branch; give vocab=30523 (BERT's words and [DEC]).")
            if text.shape[1] > len(self.positions.weight):
                raise UserError(f"a text of {text.shape[1]} tokens, but this Q-Former has {len(self.positions.weight)} positions; cut it.")
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

    def see(self, features: Tensor, where: Where | None = None, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """Query states (ΣM, Q, W); with `text` the queries also read the instruction (InstructBLIP, 2305.06500v2, §2.3)."""
        return self.encode(self.vision_norm(features), text, "itm", text_mask)[-1][:, :len(self.queries)]

    def prefix(self, visual: Tensor) -> Tensor:
        return self.project(visual)                                             # (ΣM, Q, D)   (Q5)

    def made_of(self, attention: dict[str, Tensor], features: Tensor) -> Tensor:
        Q, patches = len(self.queries), torch.eye(features.shape[1], device=features.device)
        x = torch.zeros_like(patches[:1]).expand(Q, -1)                         # the queries hold no patch yet
        for l, layer in enumerate(self.layers):
            x = rolled(x, attention[f"bridge.layers.{l}.attention"][..., :Q, :Q], x)        # without the text
            x = x if layer.cross is None else rolled(x, attention[f"bridge.layers.{l}.cross"], patches)
        return F.normalize(x, p=1, dim=-1)


class Stage1(nn.Module):
    """BLIP-2's first stage (2301.12597v3, §3.2, Figure 2): three tasks for the Q-Former beside a frozen ViT, before any decoder.

    symbol        shape                here                   meaning
    q(I), t(I)    (B, Q, W), (B, T, W) encode                 query and text states
    W_v, W_t      (256, W)             image_head, text_head  into the space of the contrast
    τ             ()                   temperature            0.07 at the start, learned; it divides
    W_itm         (2, W)               match_head             class 1 = the pair matches
    W_lm          (V, W)               word_matrix            the word embeddings, as in BERT; tied=False: a matrix of its own
    I⁻, Y⁻        (B,)                 wrong                  an image that is not the text's, a text that is not the image's

    (S1)  s(I, Y) = max_q cos(W_v q(I), W_t t(Y)_[CLS]) / τ       ITC: the two do not see each other
    (S2)  m(I, Y) = mean_q W_itm q(I, Y)                          ITM: everything sees everything
    (S3)  p(y_t | y_<t, I) = softmax(W_lm LN GELU(W t(I, Y)_{t-1}))          ITG: the text begins with [DEC] instead of [CLS]
    (S4)  I⁻ ~ softmax_I s(I, Y),  Y⁻ ~ softmax_Y s(I, Y)         hard negatives of the same batch, never the own pair
    (S5)  L_itc = ½ CE(s, own) + ½ CE(sᵀ, own)                    mean over the B rows, labels smoothed by 0.1
    (S6)  L_itm = CE(m, 1 for (I, Y), 0 for (I⁻, Y) and (I, Y⁻))  mean over the 3B pairs
    (S7)  L_itg = −log p(y_t | y_<t, I)                           mean over the real words of the batch, labels smoothed by 0.1

    The three are added up unweighted. `image` is pixels (B, 3, S, S) or the ViT's features (B, N, Di); `tokens` (B, T) are BERT's
    WordPieces from [CLS] on; `mask` (B, T) bool, False = padding. The authors draw I⁻ and Y⁻ from all GPUs' batches, we from one's.
    full=False: without τ and W_lm (s is the bare cosine), which is all that transformers keeps of a first stage.
    """

    def __init__(self, vit: ViT | None, qformer: QFormer, contrast: int = 256, full: bool = True, tied: bool = True,
                 dec: int | None = None):
        super().__init__()
        vocab, width = qformer.words.weight.shape
        self.vit, self.qformer, self.full = vit, qformer, full
        self.dec = vocab - 1 if dec is None else dec                            # id of [DEC], the one word that BERT does not have
        self.image_head, self.text_head, self.match_head = (nn.Linear(width, n) for n in (contrast, contrast, 2))
        if full:
            self.temperature = nn.Parameter(torch.tensor(0.07))
            self.word_head, self.word_norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
            self.word_bias = nn.Parameter(torch.zeros(vocab))
        self.word_matrix = None if tied or not full else nn.Embedding(vocab, width)

    def features(self, image: Tensor) -> Tensor:
        """Pixels, or features, which pass → (B, N, Di)."""
        if image.ndim == 3:
            return image
        if self.vit is None:
            raise UserError('this first stage came without its ViT; give features, or name a folder as "vit" in its config.json.')
        return self.vit.features(image, self.qformer.reads_layer, self.qformer.reads_cls)

    def encode(self, image: Tensor, tokens: Tensor | None = None, kind: str = "itm", mask: Tensor | None = None):
        """Query states (B, Q, W) and text states (B, T, W); kind: itm | itg | itc, see `qformer_mask`."""
        hidden = self.qformer.encode(self.qformer.vision_norm(self.features(image)), tokens, kind, mask)[-1]
        return hidden.tensor_split([len(self.qformer.queries)], dim=1)

    def itc(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B_images, B_texts) similarities (S1); there need not be as many texts as images."""
        text = self.qformer.encode(None, tokens, "itc", mask)[-1][:, 0]
        f, g = F.normalize(self.image_head(self.encode(image)[0]), dim=-1), F.normalize(self.text_head(text), dim=-1)
        cosine = torch.einsum("iqe,te->itq", f, g).amax(-1)
        return cosine / self.temperature if self.full else cosine               # (S1)

    def itm(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, 2): logits of "does not match" and "matches" for image i and text i."""
        return self.match_head(self.encode(image, tokens, "itm", mask)[0]).mean(1)          # (S2)

    def itg(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, V): logits of the word after each word; tokens[:, 0] is replaced by [DEC]."""
        if not self.full:
            raise UserError("this first stage has no captioning head (transformers does not keep it); load the authors' file.")
        tokens = torch.cat((torch.full_like(tokens[:, :1], self.dec), tokens[:, 1:]), dim=1)
        t = self.word_norm(F.gelu(self.word_head(self.encode(image, tokens, "itg", mask)[1])))
        return F.linear(t, (self.word_matrix or self.qformer.words).weight, self.word_bias)             # (S3)

    @torch.no_grad()
    def generate(self, image: Tensor, max_new_tokens: int = 30, stop: tuple[int, ...] = ()) -> Tensor:
        """The Q-Former's own captions, greedy: (B, T_new) ids after [DEC]; a row that has emitted a stop id repeats it."""
        image = self.features(image)
        text = torch.full((len(image), 1), self.dec, device=image.device)
        stops = torch.tensor(stop, dtype=torch.long, device=image.device)
        while text.shape[1] <= max_new_tokens and not bool(torch.isin(text[:, 1:], stops).any(1).all()):
            word, last = self.itg(image, text)[:, -1].argmax(-1), text[:, -1]   # (B,)  no cache: captions are short
            text = torch.cat((text, torch.where(torch.isin(last, stops), last, word)[:, None]), dim=1)
        return text[:, 1:]

    def losses(self, image: Tensor, tokens: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None,
               wrong: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """{"itc", "itm", "itg"}: the means of (S5) to (S7) over B >= 2 pairs (image i, text i).

        wrong = (the image shown with text i, the text shown with image i), (B,) each, fixes the negatives; else `generator` draws.
        """
        B, own = len(tokens), torch.arange(len(tokens), device=tokens.device)
        if B < 2:
            raise UserError("the first stage learns by contrast, so a batch needs 2 pairs or more; this one has 1.")
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        image = self.features(image)
        s = self.itc(image, tokens, mask)                                       # (B images, B texts)
        itc = (F.cross_entropy(s, own, label_smoothing=0.1) + F.cross_entropy(s.T, own, label_smoothing=0.1)) / 2       # (S5)
        if wrong is None:
            others = s.detach().float().fill_diagonal_(-torch.inf)
            wrong = [torch.multinomial(p.softmax(1), 1, generator=generator)[:, 0] for p in (others.T, others)]         # (S4)
        i, y = torch.cat((own, wrong[0], own)), torch.cat((own, own, wrong[1]))             # (3B,)
        itm = F.cross_entropy(self.itm(image[i], tokens[y], mask[y]), (i == y).long())      # (S6)
        target = tokens.masked_fill(~mask, IGNORE)[:, 1:]
        itg = F.cross_entropy(self.itg(image, tokens, mask)[:, :-1].flatten(0, 1), target.flatten(), label_smoothing=0.1)   # (S7)
        return {"itc": itc, "itm": itm, "itg": itg}


# ------------------------------------------------------------------------------------------------------------------
# 4. Zero-init gated attention: prompts beside the words
# ------------------------------------------------------------------------------------------------------------------


class ZeroInit(Bridge):
    """LLaMA-Adapter (2303.16199v3, §3.1 to 3.3); version=2 is the published code of V2 (2304.15010v1).

    symbol   shape           here          meaning
    P_l      (Q, D)          prompts[l]    learned prompts of the l-th of the topmost `adapted` layers, N(0, 1)
    S^K      (B, H, T, Q)    scores        scores of the words on the prompts
    g_l      (H,)            gate[layer]   one gate per head (gate_per="head") or per layer, ZERO at the start
    I        (B, 1|Q, D)     visual        the image, added to the prompts of every adapted layer

    (Z1)  S^K = q · k(P_l + I)ᵀ / √E               k, v: the layer's own frozen projections; raw prompts, no norm, no RoPE
    (Z2)  y  += tanh(g_l) · softmax(S^K) v(P_l + I)     a softmax of its own: the words' weights are not renormalised

    (Z2) equals the paper's concatenation [softmax(S^K)·g ; softmax(S^{M+1})] V (Eq. 8), since the two softmaxes are separate
    and W_o is linear; a test proves it. The paper divides by √C, meaning one head; the code by √E. Paper v1 and the
    published inference file use g itself, the training file tanh(g): tanh=True follows the training file. PEFT's
    AdaptionPrompt is gate_per="layer", tanh=False. Gates are kept for all L layers, as in the published files.

    The image, version 1 (§3.3, Eq. 10): I = W_2 SiLU(W_1 [CLS]) is ONE vector, repeated over the prompts. Its width is not
    published; hidden=114 meets the published total. THE QUESTION CANNOT STEER IT:
        softmax_k( q·k(P_k + I) ) = softmax_k( q·k(P_k) + q·k(I) ) = softmax_k( q·k(P_k) ),
    since q·k(I) is the same for every k and cancels; and the value read is Σ_k a_k v(P_k) + v(I), because Σ_k a_k = 1. The image
    adds the constant tanh(g) v(I) to every word of a layer, whatever is asked; only the frozen MLPs can then select.
    Version 2 (published code): Q learned queries are joined with all ViT tokens in `depth` pre-norm blocks,
        (Z3)  [I ; ·] = Blocks([queries ; LN(W_c z)]);   I = LN(W_p I)
    so every prompt gets a vector of its own and the question chooses among them. Version 0: prompts alone, for text.

    At g = 0 the branch adds exactly 0 and ∂/∂P = 0: the first step moves only the gates. gate_init="random" (g ~ N(0, 1)) is our reading
    of the paper's rand-init ablation, which it does not define.
    """
    name, reads_layer, reads_cls = "zero_init", -1, True
    looks = "decoder.layers.*.attention.prompts"

    def __init__(self, decoder: DecoderConfig, vision_width: int, prompts: int = 10, adapted: int = 30, version: int = 2, tanh: bool = True,
                 gate_per: str = "head", hidden: int = 114, width: int = 768, depth: int = 8, heads: int = 16, mlp: int = 4,
                 gate_init: str = "zero"):
        super().__init__()
        if not 0 < adapted <= decoder.layers:
            raise UserError(f"zero_init adapts the topmost {adapted} layers, but the decoder has {decoder.layers}; "
                            f"give adapted=1..{decoder.layers}.")
        if gate_per not in ("head", "layer") or version not in (0, 1, 2) or gate_init not in ("zero", "random"):
            raise UserError(f'zero_init has version 0, 1 and 2, not {version!r}, gate_per "head" or "layer", not "{gate_per}", and gate_init '
                            f'"zero" or "random", not "{gate_init}".')
        D = decoder.width
        self.first, self.version, self.tanh = decoder.layers - adapted, version, tanh
        self.prompts = nn.Parameter(torch.randn(adapted, prompts, D))
        shape = (decoder.layers, decoder.heads if gate_per == "head" else 1)
        self.gate = nn.Parameter(torch.randn(shape) if gate_init == "random" else torch.zeros(shape))
        if version == 1:
            self.down, self.up = nn.Linear(vision_width, hidden), nn.Linear(hidden, D)
        if version == 2:
            self.queries = nn.Parameter(torch.randn(prompts, width))
            self.vision, self.vision_norm = nn.Linear(vision_width, width), nn.LayerNorm(width)
            self.blocks = nn.ModuleList(EncoderBlock(width, heads, mlp * width, "gelu", 1e-5) for _ in range(depth))
            self.project, self.project_norm = nn.Linear(width, D), nn.LayerNorm(D)

    def see(self, features: Tensor, where: Where | None = None) -> Tensor | None:
        """(B, 1 or Q, D): what is added to the prompts of each row; zero for a row without an image."""
        if self.version == 0:
            return None
        if self.version == 1:
            image = self.up(F.silu(self.down(features[:, :1])))                 # (ΣM, 1, D)   from the class token
        else:
            z = self.vision_norm(self.vision(features))                         # (ΣM, N, W)
            x = torch.cat((self.queries.expand(len(z), -1, -1).to(z.dtype), z), dim=1)
            for block in self.blocks:
                x = block(x)
            image = self.project_norm(self.project(x[:, :len(self.queries)]))   # (ΣM, Q, D)   (Z3)
        if where is None:
            return image
        if len(where.order) and int(where.order.max()) > 1:
            raise UserError("zero_init takes one image per text: its prompts have no place for a second; use another bridge for several.")
        return image.new_zeros(len(where.last), *image.shape[1:]).index_put((where.row,), image)

    def beside(self, layer: int, q: Tensor, project, visual: Tensor | None) -> Tensor | None:
        if layer < self.first:
            return None
        p = self.prompts[layer - self.first]                                    # (Q, D)
        p = p[None] if visual is None else p + visual                           # (1|B, Q, D)
        k, v = project(p)                                                       # (1|B, H, Q, E) each
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5                  # (B, H, T, Q) (Z1)
        gate = self.gate[layer].tanh() if self.tanh else self.gate[layer]
        weights = shown(scores.softmax(-1, dtype=torch.float32), ".prompts")
        return gate.view(-1, 1, 1).to(v.dtype) * (weights.to(v.dtype) @ v)      # (B, H, T, E) (Z2)

    def made_of(self, attention: dict[str, Tensor], features: Tensor) -> Tensor:
        """What is added to prompt k; in version 1 the class token, in version 0 nothing."""
        Q, N = self.prompts.shape[1], features.shape[1]
        x = torch.eye(Q + N, N, device=features.device).roll(Q, 0)              # the queries hold no patch yet
        x = x.expand(len(features), -1, -1)
        for l in range(len(self.blocks) if self.version == 2 else 0):
            x = rolled(x, attention[f"bridge.blocks.{l}"], x)
        return F.normalize(x[:, :Q], p=1, dim=-1) if self.version != 1 else x[:, Q:Q + 1].expand(-1, Q, -1)

    def gates(self) -> Tensor:
        """(adapted, H or 1): what multiplies the prompts' branch."""
        g = self.gate[self.first:].detach().float()
        return g.tanh() if self.tanh else g

    def vitals(self) -> dict[str, float]:
        return {"gate": self.gates().abs().mean().item()}


# ------------------------------------------------------------------------------------------------------------------
# 5. Flamingo: gated cross-attention ahead of frozen layers
# ------------------------------------------------------------------------------------------------------------------


class FeedForward(nn.Sequential):
    """LN → up → act → down, without biases: the feed-forward of the resampler and of the gated blocks."""

    def __init__(self, width: int, mult: int, act: str):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), ACTIVATIONS[act]
        self.up, self.down = nn.Linear(width, mult * width, bias=False), nn.Linear(mult * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.norm(x))))


class ResamplerLayer(nn.Module):
    def __init__(self, width: int, heads: int, head_width: int, mult: int, act: str):
        super().__init__()
        self.heads = heads
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, heads * head_width, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * head_width, width, bias=False)
        self.q_norm = self.k_norm = nn.Identity()                               # IDEFICS has norms here
        self.ff = FeedForward(width, mult, act)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x, z = self.norm_media(x), self.norm_latents(latents)
        kv = torch.cat((x, z), dim=1)                                           # keys: features AND current latents
        q, k, v = split_heads(self.q(z), self.heads), split_heads(self.k(kv), self.heads), split_heads(self.v(kv), self.heads)
        y = attend(self.q_norm(q), self.k_norm(k), v)
        latents = latents + self.o(merge_heads(y))                              # (F1)
        return latents + self.ff(latents)                                       # (F2)


class Resampler(nn.Module):
    """Perceiver Resampler (Flamingo §2.1, Appendix A.1.1, Figure 5): any number of features → `latents` vectors.

    (F1)  x ← x + Attn(q = x, kv = [x_f ; x])
    (F2)  x ← x + FFW(x)
    Spatial cells carry no position. x_f gets a learned time embedding per frame, or per image of the sequence, when times > 0
    (the paper has 8 frames; OpenFlamingo's default is none). The final norm stands in every code, not in the paper.
    """

    def __init__(self, width: int, latents: int, layers: int, heads: int, head_width: int, mult: int, act: str, times: int):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.times = nn.Parameter(torch.randn(times, 1, width)) if times else None
        self.layers = nn.ModuleList(ResamplerLayer(width, heads, head_width, mult, act) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (ΣM, N, Di), time (ΣM,) from 0 → (ΣM, R, Di)."""
        if self.times is not None and time is not None:
            if len(time) and int(time.max()) >= len(self.times):
                raise UserError(f"image number {int(time.max()) + 1} of a text, but the resampler has {len(self.times)} time embeddings; "
                                "build it with times=0 or more of them.")
            x = x + self.times[time]
        latents = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm(latents)


class GatedCrossAttention(nn.Module):
    """GATED XATTN-DENSE (Flamingo §2.2, Figure 4): two gated steps ahead of a frozen layer, identity at the start."""

    def __init__(self, width: int, vision_width: int, heads: int, head_width: int, mult: int, act: str, norm_media: bool):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.norm_media = nn.LayerNorm(vision_width) if norm_media else None
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.k, self.v = (nn.Linear(vision_width, heads * head_width, bias=False) for _ in range(2))
        self.o = nn.Linear(heads * head_width, width, bias=False)
        self.q_norm = self.k_norm = nn.Identity()                               # IDEFICS has norms here
        self.ff = FeedForward(width, mult, act)
        self.attention_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def project(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """media (B, M·R, Di) → keys, values (B, H, M·R, E): computed once per image."""
        media = media if self.norm_media is None else self.norm_media(media)
        return self.k_norm(split_heads(self.k(media), self.heads)), split_heads(self.v(media), self.heads)

    def attention(self, x: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """x (B, T, D), visible (B, T, M·R) bool. A word that sees no image gets exactly nothing: an empty softmax is uniform, not zero."""
        q = self.q_norm(split_heads(self.q(self.norm(x)), self.heads))          # (B, H, T, E)
        y = attend(q, k, v, visible_to_bias(visible[:, None], q.dtype))         # (B, H, T, E)
        return self.o(merge_heads(y)) * visible.any(-1, keepdim=True)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        if k.shape[2]:                                                          # some image in the batch
            x = x + (self.attention_gate.tanh() * self.attention(x, k, v, visible)).to(x.dtype)         # (F3)
        return x + (self.ff_gate.tanh() * self.ff(x)).to(x.dtype)               # (F4)  a float32 gate leaves a bfloat16 decoder in bfloat16


class Flamingo(Bridge):
    """Flamingo (2204.14198v2, §2.1 to 2.3, Eq. 1): p(y | x) = Π_ℓ p(y_ℓ | y_<ℓ, x_≤ℓ), images x through cross-attention.

    symbol    shape            here              meaning
    x_f       (ΣM, N, Di)      features          ViT tokens
    x         (ΣM, R, Di)      latents           the resampled image, R = 64
    α_x, α_d  (1,)             attention_gate, ff_gate      per inserted block, ZERO at the start
    φ(ℓ)      (B, T)           where.last        index of the last image at or before position ℓ; 0 = none

    (F1), (F2)  Perceiver Resampler, see `Resampler`
    (F3)  y ← y + tanh(α_x) · XAttn(LN y, x_φ(ℓ))       each word sees the latents of image φ(ℓ) only
    (F4)  y ← y + tanh(α_d) · FFW(LN y)

    inserted before the decoder's layers `first`, first + every, …: the paper and IDEFICS start at 0, OpenFlamingo at every−1.
    The paper leaves open whether the <image> tag sees its own image; as in OpenFlamingo, it does. see_all=True is the paper's
    ablation "all previous images". Paper: heads × 128 = D, squared ReLU, LN on the keys too (norm_media=True); OpenFlamingo: 8 × 64, GELU,
    no LN on the keys; those are the defaults. Reads the last state without the class token, before CLIP's post-norm.
    """
    name, reads_layer, reads_cls = "flamingo", -1, False
    looks = "bridge.blocks.*"

    def __init__(self, decoder: DecoderConfig, vision_width: int, every: int = 4, first: int = 0, latents: int = 64, depth: int = 6,
                 heads: int = 8, head_width: int = 64, mult: int = 4, act: str = "gelu", times: int = 0, norm_media: bool = False,
                 see_all: bool = False, resampler_heads: int | None = None, resampler_head_width: int | None = None):
        super().__init__()
        if act not in ACTIVATIONS:
            raise UserError(f'flamingo knows no activation "{act}"; known: {", ".join(ACTIVATIONS)}.')
        self.every, self.first, self.see_all = every, first, see_all
        self.resampler = Resampler(vision_width, latents, depth, resampler_heads or heads, resampler_head_width or head_width, mult, act, times)
        self.blocks = nn.ModuleList(GatedCrossAttention(decoder.width, vision_width, heads, head_width, mult, act, norm_media)
                                    for _ in range(first, decoder.layers, every))

    def see(self, features: Tensor, where: Where) -> dict:
        latents = features if self.resampler is None else self.resampler(features, where.order - 1)         # (ΣM, R, Di)
        B, M, R = len(where.last), int(where.order.max()) if len(where.order) else 0, latents.shape[1]
        media = latents.new_zeros(B, M, *latents.shape[1:]).index_put((where.row, where.order - 1), latents).flatten(1, 2)
        image = torch.arange(1, M + 1, device=media.device).repeat_interleave(R)            # (M·R,) image-major: R latents of image 1 first
        return {"kv": [block.project(media) for block in self.blocks], "where": where, "image": image.expand(B, -1)}

    def before(self, layer: int, x: Tensor, visual: dict | None) -> Tensor:
        if visual is None or layer < self.first or (layer - self.first) % self.every:
            return x
        n = (layer - self.first) // self.every
        phi = visual["where"].columns(x.shape[1])[..., None]                    # (B, T, 1)   φ(ℓ)
        image = visual["image"][:, None]                                        # (B, 1, M·R)
        visible = (image <= phi) if self.see_all else (image == phi)            # (B, T, M·R) True = may attend
        k, v = visual["kv"][n]
        return self.blocks[n](x, k, v, visible)

    def made_of(self, attention: dict[str, Tensor], features: Tensor) -> Tensor:
        patches = super().made_of(attention, features)                          # (ΣM, N, N)
        if self.resampler is None:
            return patches
        x = torch.zeros_like(patches[:, :1]).expand(-1, len(self.resampler.latents), -1)
        for l in range(len(self.resampler.layers)):
            x = rolled(x, attention[f"bridge.resampler.layers.{l}"], torch.cat((patches, x), dim=1))
        return F.normalize(x, p=1, dim=-1)

    def gates(self) -> Tensor:
        """(inserted blocks, 2, or 2·D with a gate per channel): tanh of the attention gates and of the feed-forward gates."""
        return torch.stack([torch.cat((b.attention_gate, b.ff_gate)) for b in self.blocks]).detach().float().tanh()

    def vitals(self) -> dict[str, float]:
        return {"gate": self.gates().abs().mean().item()}


class NormedSwiGLU(SwiGLU):
    """RMSNorm → SwiGLU: the feed-forward of IDEFICS' gated blocks, as large as the decoder's own."""

    def __init__(self, c: DecoderConfig):
        super().__init__(c)
        self.norm = RMSNorm(c.width, c.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Idefics(Flamingo):
    """IDEFICS (OBELICS, 2306.16527v2; published code: transformers' idefics): (F1) to (F4) with the decoder's kind of parts.

                              Flamingo                IDEFICS
    norms of a gated block    LayerNorm               RMSNorm with the decoder's ε
    its heads                 any                     as many and as wide as the decoder's
    its queries and keys      as projected            RMSNorm over each head (qk_norm)
    its feed-forward          LN, act, 4 D            SwiGLU of the decoder's hidden width
    α_x, α_d                  one number              one number, or one per channel (vector_gates)
    queries, keys of (F1)     as projected            LayerNorm over each head (resampler_qk_norm)
    act of (F2)               squared ReLU            ReLU
    x_f                       no class token          with the class token; latents=0: read as they are, no resampler

    The defaults are the release of 9 billion parameters, 1,560,481,552 of them in here. φ(ℓ) is Flamingo's. Their processor
    also blinds the words between an end of text and the next image; a text of ours ends with its row.
    """
    name, reads_cls = "idefics", True

    def __init__(self, decoder: DecoderConfig, vision_width: int, every: int = 4, latents: int = 64, depth: int = 6,
                 qk_norm: bool = True, vector_gates: bool = False, resampler_heads: int = 16, resampler_head_width: int = 96,
                 resampler_qk_norm: bool = True):
        super().__init__(decoder, vision_width, every, 0, latents, depth, decoder.heads, decoder.head_width, act="relu",
                         resampler_heads=resampler_heads, resampler_head_width=resampler_head_width)
        D, E, eps = decoder.width, decoder.head_width, decoder.norm_eps
        for block in self.blocks:
            block.norm, block.ff = RMSNorm(D, eps), NormedSwiGLU(decoder)
            if qk_norm:
                block.q_norm, block.k_norm = RMSNorm(E, eps), RMSNorm(E, eps)
            if vector_gates:
                block.attention_gate, block.ff_gate = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
        for layer in self.resampler.layers if resampler_qk_norm else ():
            layer.q_norm, layer.k_norm = nn.LayerNorm(resampler_head_width), nn.LayerNorm(resampler_head_width)
        if not latents:
            self.resampler = None


class CrossLayer(Block):
    """A layer of the decoder's kind that reads images where the others read the text, behind two gates; no RoPE."""

    def __init__(self, c: DecoderConfig):
        super().__init__(c)
        self.q_norm, self.k_norm = RMSNorm(c.head_width, c.norm_eps), RMSNorm(c.head_width, c.norm_eps)
        self.attention_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def project(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """media (B, M·K, D) → keys, values (B, G, M·K, E): computed once per image."""
        a = self.attention
        return self.k_norm(split_heads(a.k(media), a.kv_heads)), split_heads(a.v(media), a.kv_heads)        # (X2)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, visible: Tensor, sees: Tensor) -> Tensor:
        """x (B, T, D), visible (B, T, M·K) bool, sees (B, T, 1) bool. An empty row of `visible` reads exactly 0."""
        a = self.attention
        q = self.q_norm(split_heads(a.q(self.norm1(x)), a.heads))               # (B, H, T, E) (X2)
        y = a.o(merge_heads(attend(q, a.widen(k), a.widen(v), visible_to_bias(visible[:, None], q.dtype))))
        x = x + (self.attention_gate.tanh() * y * visible.any(-1, keepdim=True)).to(x.dtype)           # (X3)
        return x + (self.ff_gate.tanh() * self.mlp(self.norm2(x)) * sees).to(x.dtype)                   # (X4)


class Mllama(Bridge):
    """Llama-3.2-Vision (Llama 3, 2407.21783v3, §7; code: transformers' mllama): whole layers between the decoder's.

    symbol   shape                  here              meaning
    z        (ΣM, tiles, N, Di)     features.pixels   of a TiledViT, class tokens kept, absent tiles too
    m        (B, M·K, D)            media             the images: no resampler, K = tiles · N
    α, β     (1,)                   attention_gate, ff_gate     per inserted layer, ZERO at the start
    φ(ℓ)     (B, T)                 where.last        number of the last image at or before position ℓ; 0 = none

    (X1)  m = W_p z + b_p
    (X2)  q = RMS(W_q RMS(y)),  k = RMS(W_k m),  v = W_v m      the outer RMS over each head; keys shared by H/G heads
    (X3)  y ← y + tanh(α) · W_o Attn(q, k, v)                   over the tiles of the images that ℓ sees
    (X4)  y ← y + tanh(β) · SwiGLU(RMS(y))                      nothing where ℓ sees no image

    ℓ sees image φ(ℓ) and those directly before it, with no word between them; an image's own token sees it.
    Codes differ where φ = 0: Meta's adds nothing, transformers' leaves out (X4) alone, so that words before the first
    image read every tile of the row's images, absent ones too. leak=True follows transformers, and so does load_vlm.
    (In a batch its leak also reads the empty images with which it pads other rows; ours stays with a row's own.)

    `layers` counts OUR decoder's layers: what published files have at 3, 8, 13, … of 40 stands before 3, 7, 11, … of 32.
    """
    name, reads_layer, reads_cls = "mllama", -1, True
    looks = "bridge.blocks.*"

    def __init__(self, decoder: DecoderConfig, vision_width: int, layers: list[int] | None = None, leak: bool = False):
        super().__init__()
        self.layers, self.leak = list(range(3, decoder.layers, 4) if layers is None else layers), leak
        self.map = nn.Linear(vision_width, decoder.width)
        self.blocks = nn.ModuleList(CrossLayer(decoder) for _ in self.layers)

    def see(self, features: Tiles, where: Where) -> dict:
        z, last, image = self.map(features.pixels), where.last, where.order - 1     # (ΣM, tiles, N, D) (X1)
        B, M, (tiles, N) = len(last), int(image.max()) + 1 if len(image) else 0, z.shape[1:3]
        lay = lambda t: t.new_zeros(B, M, *t.shape[1:]).index_put((where.row, image), t).flatten(1, 2)     # (B, M·K, …)
        left = lambda t: F.pad(t, (1, 0))[:, :-1]                               # what stands one position to the left
        is_image = last > left(last)                                            # (B, T)
        first = (last * (is_image & ~left(is_image))).cummax(1).values[is_image]    # (ΣM,) its first neighbour's number
        media = lay(z.flatten(1, 2))
        return {"kv": [block.project(media) for block in self.blocks], "where": where,
                "image": lay(where.order[:, None].expand(-1, tiles * N)),       # whose patch a key is; 0 = nobody's
                "tile": lay(features.mask.bool().repeat_interleave(N, 1)),      # False = the patch of an absent tile
                "first": last.new_zeros(B, M + 1).index_put((where.row, where.order), first)}

    def before(self, layer: int, x: Tensor, visual: dict | None) -> Tensor:
        if visual is None or layer not in self.layers or not visual["image"].shape[1]:
            return x
        phi = visual["where"].columns(x.shape[1])                               # (B, T)       φ(ℓ)
        first, sees = visual["first"].gather(1, phi)[..., None], (phi > 0)[..., None]
        image = visual["image"][:, None]                                        # (B, 1, M·K)
        visible = (first <= image) & (image <= phi[..., None]) & visual["tile"][:, None]    # (B, T, M·K) True = attend
        if self.leak:
            visible = visible | (image > 0) & ~sees
        for n, at in enumerate(self.layers):
            if at == layer:
                x = self.blocks[n](x, *visual["kv"][n], visible, sees)
        return x

    def made_of(self, attention: dict[str, Tensor], features: Tiles) -> Tensor:
        return super().made_of(attention, features.pixels.flatten(1, 2))        # (ΣM, tiles·N, tiles·N)

    gates, vitals = Flamingo.gates, Flamingo.vitals


BRIDGES: dict[str, type[Bridge]] = {b.name: b for b in (Linear, MLP, Frozen, MAPL, QFormer, ZeroInit, Flamingo, Idefics)}


def make_bridge(name: str, decoder: DecoderConfig, vision_width: int, **options) -> Bridge:
    """A bridge by name; options are the keyword arguments of its class, plus reads_layer and reads_cls. Unknown ones are refused."""
    import inspect
    if name not in BRIDGES:
        raise UserError(f'unknown bridge "{name}"; {nearest(name, BRIDGES)}')
    known = [*list(inspect.signature(BRIDGES[name]).parameters)[2:], "reads_layer", "reads_cls"]
    for key in options:
        if key not in known:
            raise UserError(f'{name} has no option "{key}"; {nearest(key, known)}')
    reads = {k: v for k, v in options.items() if k.startswith("reads_")}
    bridge = BRIDGES[name](decoder, vision_width, **{k: v for k, v in options.items() if k not in reads})
    for key, value in reads.items():
        setattr(bridge, key, value)
    bridge.options = dict(options)
    return bridge


# ------------------------------------------------------------------------------------------------------------------
# 6. Published layouts: whose tensor is which of ours
# ------------------------------------------------------------------------------------------------------------------

Fills = list[tuple[nn.Module, Checkpoint, dict[str, str], tuple[str, ...]]]     # module, its file, ours → theirs, what may be left over
WB = ("weight", "bias")


def llava(c: dict, path: Path) -> tuple[VLM, Fills]:
    """LLaVA in the authors' layout (Llama's names, model.mm_projector, the ViT in a folder of its own) or in transformers'."""
    return (llava_hf if "text_config" in c else llava_original)(c, path)


def llava_hf(c: dict, path: Path) -> tuple[VLM, Fills]:
    """Three generations of transformers put different prefixes in front of the same names; the file tells which."""
    where, file = f"{path}/config.json", Checkpoint(path)
    layer, keep = c.get("vision_feature_layer", -2), c.get("vision_feature_select_strategy", "default") == "full"
    if not isinstance(layer, int) or c.get("projector_hidden_act", "gelu") != "gelu" or not c.get("multimodal_projector_bias", True):
        raise UserError(f"{where}: features of several layers and projectors other than Linear, GELU, Linear are not supported.")
    decoder = Decoder(decoder_config({"tie_word_embeddings": c.get("tie_word_embeddings", False), **LLAMA_DEFAULTS, **c["text_config"]}, where))
    vit = ViT(vit_config({**CLIP_DEFAULTS, **c["vision_config"]}, where)[0])
    vlm = VLM(vit, make_bridge("mlp", decoder.config, vit.config.width, reads_layer=layer, reads_cls=keep), decoder)
    tower = file.prefix("vision_tower.vision_model.", "model.vision_tower.vision_model.", "model.vision_tower.", "vision_tower.")
    trunk = file.prefix("language_model.model.", "model.language_model.")
    head = "language_model." if trunk == "language_model.model." else ""
    map = file.prefix("model.multi_modal_projector.", "multi_modal_projector.")
    names = {**expand(VIT_NAMES, vit.config.layers, tower, "vit."),
             **decoder_names(decoder.config, trunk, head, "decoder."),
             **{f"bridge.{a}.{w}": f"{map}linear_{b}.{w}" for w in WB for a, b in (("up", 1), ("down", 2))}}
    return vlm, [(vlm, file, names, (head + "lm_head.",) if decoder.config.tied else ())]


def llava_original(c: dict, path: Path) -> tuple[VLM, Fills]:
    where, kind = f"{path}/config.json", c.get("mm_projector_type", "linear")
    ours = {"linear": {"map": ""}, "mlp2x_gelu": {"up": "0.", "down": "2."}}    # mm_projector_type → our layer → theirs
    if kind not in ours:
        raise UserError(f'{where}: mm_projector_type "{kind}" is not supported; known: {", ".join(ours)}.')
    tower = tower_folder(path, c["mm_vision_tower"])
    config, family = vit_config(read_json(tower / "config.json"), f"{tower}/config.json")
    decoder = Decoder(decoder_config(c, where))
    bridge = make_bridge("linear" if kind == "linear" else "mlp", decoder.config, config.width,
                         reads_layer=c.get("mm_vision_select_layer", -2), reads_cls=c.get("mm_vision_select_feature", "patch") == "cls_patch")
    vlm = VLM(ViT(config), bridge, decoder)
    names = {**decoder_names(decoder.config, ours="decoder."),
             **{f"bridge.{a}.{w}": f"model.mm_projector.{b}{w}" for w in WB for a, b in ours[kind].items()}}
    return vlm, [(vlm.vit, *vit_file(tower, config, family)),
                 (nn.ModuleDict({"bridge": bridge, "decoder": decoder}), Checkpoint(path), names, ("model.vision_tower.",))]


EVA = dict(VIT_DEFAULTS["eva"], model_type="blip_2_vision_model")               # where a config is silent
LAVIS_EVA_NAMES = {     # the authors' ViT-g; its keys have no bias: it would add the same to all scores of a query
    "cls": "cls_token", "positions": "pos_embed", **{f"patch.{w}": f"patch_embed.proj.{w}" for w in WB},
    **{f"blocks.{{i}}.{p}.weight": f"blocks.{{i}}.attn.qkv.weight[{n}/3]" for n, p in enumerate("qkv")},
    **{f"blocks.{{i}}.{p}.bias": f"blocks.{{i}}.attn.{b}" for p, b in (("q", "q_bias"), ("k", "q_bias[zero]"), ("v", "v_bias"))},
    **{f"blocks.{{i}}.{a}.{w}": f"blocks.{{i}}.{b}.{w}" for w in WB for a, b in (
        ("o", "attn.proj"), ("norm1", "norm1"), ("norm2", "norm2"), ("up", "mlp.fc1"), ("down", "mlp.fc2"))},
}
QFORMER_LAYER = {       # @: "self" in the authors' files, "attention" in transformers'
    **{f"layers.{{i}}.{a}.{x}.{w}": f"encoder.layer.{{i}}.{b}.{y}.{w}" for w in WB
       for a, b in (("attention", "attention"), ("cross", "crossattention"))
       for x, y in (("q", "@.query"), ("k", "@.key"), ("v", "@.value"), ("o", "output.dense"), ("norm", "output.LayerNorm"))},
    **{f"layers.{{i}}.{a}.{x}.{w}": f"encoder.layer.{{i}}.{y}.{w}" for w in WB
       for a, e in (("query_mlp", "_query"), ("text_mlp", ""))
       for x, y in (("up", f"intermediate{e}.dense"), ("down", f"output{e}.dense"), ("norm", f"output{e}.LayerNorm"))},
}
QFORMER_NAMES = {       # ours: the authors' (LAVIS), transformers' BLIP-2, its InstructBLIP; below the blank line what Stage1 adds
    "queries": ("query_tokens", "query_tokens", "query_tokens"),
    "vision_norm": ("ln_vision", "vision_model.post_layernorm", "vision_model.post_layernorm"),
    "norm": ("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm", "qformer.embeddings.layernorm"),
    **{a: (f"Qformer.bert.embeddings.{b}", f"embeddings.{b}", f"qformer.embeddings.{b}")
       for a, b in (("words", "word_embeddings"), ("positions", "position_embeddings"))},
    "project": ("llm_proj", "language_projection", "language_projection"),

    "image_head": ("vision_proj", "vision_projection", ""), "text_head": ("text_proj", "text_projection", ""),
    "match_head": ("itm_head", "itm_head", ""), "temperature": ("temp", "", ""),
    **{a: (f"Qformer.cls.predictions.{b}", "", "") for a, b in (
        ("word_head", "transform.dense"), ("word_norm", "transform.LayerNorm"), ("word_matrix", "decoder"), ("word_bias", "bias"))},
}


def qformer_names(layout: str, layers: int, ours: str = "") -> dict[str, str]:
    """Ours → theirs for a Q-Former below `ours` and for Stage1's own parameters; layout: lavis | blip2 | instructblip."""
    n = ("lavis", "blip2", "instructblip").index(layout)
    trunk, attention = (("Qformer.bert.", "self"), ("qformer.", "attention"))[n > 0]
    layer = {a: b.replace("@", attention) for a, b in expand(QFORMER_LAYER, layers, trunk, ours).items()}
    return layer | {a + end: theirs[n] + end for name, theirs in QFORMER_NAMES.items() for a in (name, ours + name)
                    for end in ("", ".weight", ".bias")}


def qformer_options(c: dict, where: str, text: bool) -> dict:
    """Keyword arguments of QFormer from a config of transformers or of `lavis`; what it leaves out has BERT-base's value."""
    if c.get("hidden_act", "gelu") != "gelu" or c.get("layer_norm_eps", 1e-12) != 1e-12:
        raise UserError(f"{where}: a Q-Former's hidden_act must be gelu and its layer_norm_eps 1e-12, the only published values.")
    options = dict(width=c.get("hidden_size", 768), layers=c.get("num_hidden_layers", 12), heads=c.get("num_attention_heads", 12),
                   hidden=c.get("intermediate_size", 3072), dropout=c.get("hidden_dropout_prob", 0.1),
                   cross_every=c.get("cross_attention_frequency", c.get("cross_attention_freq", 2)))
    return {**options, "vocab": c.get("vocab_size", 30522), "positions": c.get("max_position_embeddings", 512)} if text else options


def blip2(c: dict, path: Path) -> tuple[VLM | Stage1, Fills]:
    """BLIP-2 and InstructBLIP of transformers: the retrieval model is a first stage (without τ and captions), the others have a decoder.

    Their prompts hold one image token per query, ours one IMAGE for all of them.
    """
    where, text, layout = f"{path}/config.json", c.get("text_config", {}), c["model_type"].replace("-", "")
    retrieval, kind = "Blip2ForImageTextRetrieval" in (c.get("architectures") or ()), text.get("model_type", "opt")
    if not retrieval and kind != "llama":
        other = {"t5": "an encoder-decoder", "opt": "a decoder with learned positions"}.get(kind, "unknown here")
        raise UserError(f'{where}: the language model is "{kind}" ({other}), but only LLaMA decoders are read; '
                        "instructblip-vicuna-7b and -13b have one.")
    vit = ViT(vit_config({**EVA, **c.get("vision_config", {})}, where)[0])
    decoder = None if retrieval else Decoder(decoder_config(
        {"tie_word_embeddings": c.get("tie_word_embeddings", False), **LLAMA_DEFAULTS, **text}, where))
    sizes = qformer_options(c.get("qformer_config", {}), where, retrieval or layout == "instructblip")
    former = make_bridge("qformer", decoder and decoder.config, vit.config.width, queries=c.get("num_query_tokens", 32),
                         vision_eps=vit.config.norm_eps, **sizes)
    names = expand(EVA_NAMES, vit.config.layers, "vision_model.", "vit.")
    if retrieval:
        stage = Stage1(vit, former, c.get("image_text_hidden_size", 256), full=False)
        return stage, [(stage, Checkpoint(path), names | qformer_names(layout, len(former.layers), "qformer."), ())]
    names |= qformer_names(layout, len(former.layers), "bridge.")
    names |= decoder_names(decoder.config, "language_model.model.", "language_model.", "decoder.")
    vlm = VLM(vit, former, decoder, c.get("image_token_index"))
    return vlm, [(vlm, Checkpoint(path), names, ("language_model.lm_head.",) if decoder.config.tied else ())]


def lavis(c: dict, path: Path) -> tuple[Stage1, Fills]:
    """BLIP-2's first stage as its authors publish it: Qformer.*, query_tokens, ln_vision, the heads, and perhaps visual_encoder.*

    Their files have no config.json; the one we agree on says "model_type": "blip2_qformer_lavis", and of vocab_size, hidden_size,
    num_hidden_layers, num_attention_heads, intermediate_size, max_position_embeddings, encoder_width, cross_attention_freq,
    num_query_token, embed_dim, bos_token_id ([DEC]) those that differ from the release. The ViT is visual_encoder.* of the file,
    with ViT-g's sizes or those of a "vision_config" in transformers' words; else the folder "vit", which load_vit reads
    (and "vit_layer": -2 for CLIP's ViT-L, whose last block the authors drop); else there is none, and the model takes features.
    """
    where, file, config, left = f"{path}/config.json", Checkpoint(path), None, ()
    if inside := any(n.startswith("visual_encoder.") for n in file.where):
        config = vit_config({**EVA, **c.get("vision_config", {})}, where)[0]
    elif "vit" in c:
        tower = tower_folder(path, c["vit"])
        config, family = vit_config(read_json(tower / "config.json"), f"{tower}/config.json")
    vit = ViT(config) if config else None
    former = QFormer(None, config.width if config else c.get("encoder_width", 1408), c.get("num_query_token", 32),
                     **qformer_options({"vocab_size": 30523, **c}, where, True))
    former.reads_layer = c.get("vit_layer", -1)
    names = qformer_names("lavis", len(former.layers), "qformer.")
    matrix, words = names["word_matrix.weight"], names["words.weight"]
    tied = not {matrix, words} <= set(file.where) or torch.equal(file.get(matrix), file.get(words))
    stage = Stage1(vit, former, c.get("embed_dim", 256), tied=tied, dec=c.get("bos_token_id"))
    if inside:
        names |= {f"vit.post_norm.{w}": f"ln_vision.{w}" for w in WB}
        names |= expand(LAVIS_EVA_NAMES, config.layers, "visual_encoder.", "vit.")
    elif vit:
        beside, theirs, left = vit_file(tower, config, family)                  # one model out of two files
        file.where, file.files, file.path = file.where | beside.where, file.files | beside.files, f"{path} and {tower}"
        names |= {f"vit.{a}": b for a, b in theirs.items()}
    return stage, [(stage, file, names, (names["word_matrix.bias"], *left, *([matrix] if tied else ())))]


def own_stage1(c: dict, path: Path) -> tuple[Stage1, Fills]:
    """A run of train.py's recipe blip2-1: stage1.safetensors in our own names, and the folder of the ViT."""
    tower = tower_folder(path, c["vit"])
    config, family = vit_config(read_json(tower / "config.json"), f"{tower}/config.json")
    former = make_bridge("qformer", None, config.width, **c["bridge_options"])
    stage = Stage1(ViT(config), former, c["contrast"], dec=c["dec"])
    file, (beside, theirs, left) = Checkpoint(path / "stage1.safetensors"), vit_file(tower, config, family)
    file.where, file.files = file.where | beside.where, file.files | beside.files
    return stage, [(stage, file, {f"vit.{a}": b for a, b in theirs.items()}, left)]


def init_from_bert(module: QFormer | Stage1, path) -> None:
    """Start a Q-Former, or a whole first stage, from a BERT folder (BLIP-2, §3.1; LAVIS: Blip2Base.init_Qformer, Blip2Qformer).

    ours                                                                  from BERT
    words, positions, norm, attention, text_mlp, the captioning head      the tensor of that name
    query_mlp                                                             the text's feed-forward of the same layer
    cross, queries, vision_norm, project, the other heads, words beyond BERT's ([DEC])    nothing: they stay as they are

    BERT's token types, pooler and next-sentence head are left out, so that the text branch is not quite BERT even at the start.
    """
    file, former = Checkpoint(path), getattr(module, "qformer", module)
    bert, old = file.prefix("bert.", ""), any(n.endswith("LayerNorm.gamma") for n in file.where)
    names = qformer_names("lavis", len(former.layers), "" if former is module else "qformer.")
    names = {a: b for a, b in names.items() if b.startswith("Qformer.")}
    norms = (("Norm.weight", "Norm.gamma"), ("Norm.bias", "Norm.beta")) if old else ()
    for a, b in (("Qformer.bert.", bert), ("Qformer.", ""), ("_query", ""), *norms):
        names = {ours: theirs.replace(a, b) for ours, theirs in names.items()}
    unused = ("embeddings.token_type_embeddings.", "pooler.", "cls.seq_relationship.", "cls.predictions.decoder.")
    known = {*names.values(), *(n for n in file.where if n.removeprefix(bert).startswith(unused) or n.endswith(IGNORED))}
    if extra := [n for n in file.where if n not in known]:
        raise UserError(f'{file.path}: {len(extra)} tensors have no place in this Q-Former (first: "{extra[0]}"); '
                        "build it in BERT's sizes.")
    for ours, p in module.named_parameters():
        if ours in names and "cross" not in ours and ours != "word_matrix.weight":
            shape, rows = file.shape(names[ours]), len(p)
            if ours.endswith(("words.weight", "word_bias")):                    # the words that we add come last
                rows = min(shape[0], rows)
            if shape != p[:rows].shape:
                raise UserError(f'{file.path}: tensor "{names[ours]}" has shape {shape}, the Q-Former\'s {ours} {tuple(p.shape)}; '
                                "build the Q-Former in BERT's sizes.")
            p.data[:rows].copy_(file.get(names[ours]))


MAPL_NAMES = {          # the authors' MappingNetwork
    **{f"blocks.{{i}}.{p}.{w}": f"transformer.layers.{{i}}.self_attn.in_proj_{w}[{n}/3]" for n, p in enumerate("qkv") for w in WB},
    **{f"blocks.{{i}}.{a}.{w}": f"transformer.layers.{{i}}.{b}.{w}" for w in WB for a, b in (
        ("o", "self_attn.out_proj"), ("norm1", "norm1"), ("norm2", "norm2"), ("up", "linear1"), ("down", "linear2"))},
}
ADAPTER_NAMES = {       # LLaMA-Adapter V2's visual part; the blocks are timm's
    **{f"{a}.{w}": f"{b}.{w}" for w in WB for a, b in (("vision", "clip_proj"), ("vision_norm", "clip_proj_norm"),
                                                       ("project", "visual_proj"), ("project_norm", "visual_proj_norm"))},
    "queries": "visual_query.weight",
    **{f"blocks.{{i}}.{p}.{w}": f"visual_blocks.{{i}}.attn.qkv.{w}[{n}/3]" for n, p in enumerate("qkv") for w in WB},
    **{f"blocks.{{i}}.{a}.{w}": f"visual_blocks.{{i}}.{b}.{w}" for w in WB for a, b in (
        ("o", "attn.proj"), ("norm1", "norm1"), ("norm2", "norm2"), ("up", "mlp.fc1"), ("down", "mlp.fc2"))},
}
RESAMPLER_NAMES = {     # OpenFlamingo's PerceiverResampler
    "latents": "latents", **{f"norm.{w}": f"norm.{w}" for w in WB},
    **{f"layers.{{i}}.{n}.{w}": f"layers.{{i}}.0.{n}.{w}" for n in ("norm_media", "norm_latents") for w in WB},
    **{f"layers.{{i}}.{p}.weight": f"layers.{{i}}.0.to_{t}.weight{part}" for p, t, part in (
        ("q", "q", ""), ("k", "kv", "[0/2]"), ("v", "kv", "[1/2]"), ("o", "out", ""))},
    **{f"layers.{{i}}.ff.norm.{w}": f"layers.{{i}}.1.0.{w}" for w in WB},
    "layers.{i}.ff.up.weight": "layers.{i}.1.1.weight", "layers.{i}.ff.down.weight": "layers.{i}.1.3.weight",
}
XATTN_NAMES = {         # OpenFlamingo's GatedCrossAttentionBlock
    **{f"norm.{w}": f"attn.norm.{w}" for w in WB}, "q.weight": "attn.to_q.weight", "k.weight": "attn.to_kv.weight[0/2]",
    "v.weight": "attn.to_kv.weight[1/2]", "o.weight": "attn.to_out.weight", **{f"ff.norm.{w}": f"ff.0.{w}" for w in WB},
    "ff.up.weight": "ff.1.weight", "ff.down.weight": "ff.3.weight", "attention_gate": "attn_gate", "ff_gate": "ff_gate",
}
BridgeFile = tuple[Bridge, dict[str, str], tuple[str, ...]]                     # the empty bridge, ours → theirs, what may be left over


def mapl_file(file: Checkpoint, beside: dict, **options) -> BridgeFile:
    """MAPL's mapper; config.json beside it names the heads, 8 in the release, which no shape tells."""
    (K, W), (D, _), (_, Di) = (file.shape(n) for n in ("const", "up.weight", "down.weight"))
    layers = file.count("transformer.layers.{}.norm1.weight")
    options = {"heads": beside.get("num_heads", 8), "hidden": file.shape("transformer.layers.0.linear1.weight")[0], **options}
    return make_bridge("mapl", DecoderConfig(width=D), Di, constants=K, width=W, layers=layers, **options), expand(MAPL_NAMES, layers), ()


def adapter_file(file: Checkpoint, beside: dict, **options) -> BridgeFile:
    """LLaMA-Adapter as its authors publish it (prompts of all adapted layers in one matrix), with V2's visual part, or as PEFT does.

    V2's file also tunes biases and norms of the decoder: `tune_decoder` gives it those.
    """
    if peft := [n for n in file.where if n.endswith("adaption_gate")]:          # base_model.model.model.layers.30.self_attn.adaption_gate
        start, _, end = peft[0].partition(".layers.")
        held = {int(n.split(".layers.")[1].split(".")[0]) for n in peft}
        L, adapted = beside.get("n_layers") or max(held) + 1, beside.get("adapter_layers") or len(held)
        name = lambda l, what: f"{start}.layers.{l}.self_attn.adaption_{what}"
        shut = f"{name(max(held), 'gate')}[zero]"                               # below the adapted layers a gate does nothing
        names = {"gate": " & ".join([shut] * (L - adapted) + [name(l, "gate") for l in range(L - adapted, L)]),
                 "prompts": " & ".join(name(l, "prompt") for l in range(L - adapted, L))}
        _, Q, D = file.shape(name(max(held), "prompt"))
        options = {**dict(prompts=Q, adapted=adapted, version=0, tanh=False, gate_per="layer"), **options}
        return make_bridge("zero_init", DecoderConfig(width=D, layers=L), D, **options), names, ()
    start = file.prefix("llama.", "")
    L = beside.get("n_layers") or file.count(start + "layers.{}.attention.gate")
    gates = [f"{start}layers.{l}.attention.gate" for l in range(L)]
    rows, D = file.shape("adapter_query.weight")
    H = math.prod(file.shape(gates[0]))
    Q = options.pop("prompts", None) or beside.get("query_len") or beside.get("adapter_len") or 10
    options = {"prompts": Q, "adapted": rows // Q, "gate_per": "layer" if H == 1 else "head", **options}
    names, Di = {}, D
    if "visual_query.weight" in file.where:
        W, Di = file.shape("clip_proj.weight")
        depth = file.count("visual_blocks.{}.norm1.weight")
        options = {"version": 2, "width": W, "depth": depth, "heads": beside.get("v_num_heads", 16),
                   "mlp": file.shape("visual_blocks.0.mlp.fc1.weight")[0] // W, **options}
        names = expand(ADAPTER_NAMES, depth)
    names |= {"gate": " & ".join(gates), "prompts": f"adapter_query.weight[rows/{Q}]"}
    return make_bridge("zero_init", DecoderConfig(width=D, layers=L, heads=H, kv_heads=H), Di, **{"version": 0, **options}), names, ("llama.",)


def tune_decoder(decoder: Decoder, path: str | os.PathLike) -> None:
    """LLaMA-Adapter V2's bias tuning (2304.15010v1, §3.1; the code's y = W x + b on q, o and the feed-forward): the adapter file's
    own biases and norms, llama.*, go into a decoder that was loaded without them."""
    c, file, held = decoder.config, Checkpoint(path), {n for n, _ in decoder.named_parameters()}
    tuned = {ours: theirs for ours, theirs in expand(META_NAMES, c.layers, "llama.", H=c.heads, G=c.kv_heads).items() if not file.missing(theirs)}
    if not tuned:
        raise UserError(f"{file.path}: holds no bias or norm of a decoder (llama.*), so it tunes none.")
    like = decoder.embed.weight
    for ours, theirs in tuned.items():
        owner, _, leaf = ours.rpartition(".")
        value, module = file.get(theirs).to(like.device, like.dtype), decoder.get_submodule(owner)
        width = len(getattr(module, "weight"))
        if value.shape != (width,):
            raise UserError(f'{file.path}: tensor "{theirs}" has shape {tuple(value.shape)}, this decoder expects {(width,)}; is it another size?')
        setattr(module, leaf, nn.Parameter(value, requires_grad=like.requires_grad))
    decoder.config = replace(c, attention_bias="qo", mlp_bias=True) if set(tuned) - held else c


def qformer_file(file: Checkpoint, beside: dict, **options) -> BridgeFile:
    """A Q-Former out of an authors' file of any stage, or transformers' Blip2QFormerModel, which has neither queries nor ln_vision.

    The projection comes along where the file holds one, the text branch where it holds words. Sizes: config.json's, else BERT-base's.
    """
    layout = "lavis" if file.prefix("Qformer.", "") else "blip2"
    names = qformer_names(layout, beside.get("num_hidden_layers", 12))
    names = {a: b.removeprefix("qformer.") for a, b in names.items()}
    project = file.prefix("llm_proj.", "llama_proj.", "opt_proj.", "t5_proj.")
    names |= {f"project.{w}": project + w for w in WB}
    queries, words, D = (file.shape(names[n])[at] if names[n] in file.where else 0 for n, at in (
        ("queries", 1), ("words.weight", 0), ("project.weight", 0)))
    sizes = qformer_options({**beside, "vocab_size": words}, str(file.path), bool(words))
    sizes |= dict(queries=queries, vision_eps=1e-5 if "ln_vision.weight" in file.where else None)
    Di = file.shape(names["layers.0.cross.k.weight"])[1]
    bridge = make_bridge("qformer", DecoderConfig(width=D) if D else None, Di, **{**sizes, **options})
    return bridge, names, ("Qformer.cls.", "vision_proj.", "text_proj.", "itm_head.", "temp", "visual_encoder.", "llm_model.",
                           "llama_model.", "opt_model.", "t5_model.")


def openflamingo_file(file: Checkpoint, beside: dict, **options) -> BridgeFile:
    """OpenFlamingo's trained part: resampler and gated blocks. Its new rows of the word embeddings are the decoder's and left over."""
    inside = file.prefix("lang_encoder.model.layers.", "lang_encoder.transformer.blocks.", "lang_encoder.gpt_neox.layers.")
    held = sorted({int(n[len(inside):].split(".")[0]) for n in file.where if n.startswith(inside) and "gated_cross_attn_layer" in n})
    if not held:
        raise UserError(f"{file.path}: holds no gated_cross_attn_layer, so this is no OpenFlamingo checkpoint.")
    block = f"{inside}{held[0]}.gated_cross_attn_layer."
    (R, Di), (D, _) = file.shape("perceiver.latents"), file.shape(block + "attn.to_out.weight")
    depth = file.count("perceiver.layers.{}.0.norm_media.weight")
    E, E_resampler = (beside.get(part, {}).get("dim_head", 64) for part in ("gated_cross_attention", "perceiver"))
    sizes = dict(every=held[0] + 1, first=held[0], latents=R, depth=depth, head_width=E, heads=file.shape(block + "attn.to_q.weight")[0] // E,
                 resampler_head_width=E_resampler, resampler_heads=file.shape("perceiver.layers.0.0.to_q.weight")[0] // E_resampler,
                 mult=file.shape(block + "ff.1.weight")[0] // D)
    bridge = make_bridge("flamingo", DecoderConfig(width=D, layers=held[-1] + 1), Di, **{**sizes, **options})
    names = {f"resampler.{a}": f"perceiver.{b}" for a, b in expand(RESAMPLER_NAMES, depth).items()}
    names |= {f"blocks.{n}.{a}": f"{inside}{l}.gated_cross_attn_layer.{b}" for n, l in enumerate(held) for a, b in XATTN_NAMES.items()}
    return bridge, names, tuple(n for n in file.where if "embed_tokens" in n or ".wte." in n or ".embed_in." in n)


def save_llava(vlm: VLM, path: Path) -> None:
    """A folder that transformers' LlavaForConditionalGeneration opens, in the layout of the hub's files.

    Its projector is always Linear, GELU, Linear of the decoder's width. A linear bridge fits exactly where 2 Di ≤ D, because
    GELU(x) − GELU(−x) = x Φ(x) + x Φ(−x) = x:  W_1 = [1 ; −1 ; 0],  W_2 = [W, −W, 0].
    """
    bridge, c, Di = vlm.bridge, vlm.decoder.config, vlm.vit.config.width
    if bridge.name == "mlp":
        if len(bridge.up.weight) != c.width:
            raise UserError(f"{path}: LLaVA's projector has the decoder's width, {c.width}, inside, this mlp bridge has {len(bridge.up.weight)}.")
        maps = (bridge.up, bridge.down)
    else:
        if 2 * Di > c.width:
            raise UserError(f"{path}: transformers' LLaVA has no linear projector, and its two-layer one can only act as this {Di} → {c.width} map "
                            f"where the decoder is at least {2 * Di} wide; train --bridge mlp to export.")
        maps = nn.Linear(Di, c.width), nn.Linear(c.width, c.width)
        with torch.no_grad():
            maps[0].weight.copy_(torch.cat((torch.eye(Di), -torch.eye(Di), torch.zeros(c.width - 2 * Di, Di))))
            maps[1].weight.copy_(torch.cat((bridge.map.weight, -bridge.map.weight, torch.zeros(c.width, c.width - 2 * Di)), 1))
            maps[0].bias.zero_()
            maps[1].bias.copy_(torch.zeros(c.width) if bridge.map.bias is None else bridge.map.bias)
    theirs = {**expand(VIT_NAMES, vlm.vit.config.layers, "vision_tower.vision_model.", "vit."),
              **decoder_names(c, "language_model.model.", "language_model.", "decoder.")}
    tensors = by_their_names(nn.ModuleDict({"vit": vlm.vit, "decoder": vlm.decoder}), theirs)
    tensors |= {f"multi_modal_projector.linear_{n}.{w}": getattr(m, w) for n, m in enumerate(maps, 1) for w in WB}
    image, rows = vlm.image_token, c.vocab_size
    if image is None:                                   # transformers marks the places of an image by a word of its own
        image, rows = rows, rows + 1
        for n in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            if n in tensors:
                tensors[n] = torch.cat((tensors[n], torch.zeros(1, c.width, dtype=tensors[n].dtype)))
    write_tensors(path / "model.safetensors", tensors)
    write_json(path / "config.json", {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": image,
        "image_seq_length": vlm.vit.config.tokens - (vlm.vit.config.cls and not bridge.reads_cls), "projector_hidden_act": "gelu",
        "vision_feature_layer": bridge.reads_layer, "tie_word_embeddings": c.tied,
        "vision_feature_select_strategy": "full" if bridge.reads_cls or not vlm.vit.config.cls else "default",
        "text_config": {**hf_decoder_config(c), "vocab_size": rows}, "vision_config": hf_vit_config(vlm.vit.config)})


def save_peft(vlm: VLM, path: Path) -> None:
    """A folder that peft opens as AdaptionPrompt over the decoder written beside it; peft knows no image and one gate per layer."""
    bridge = vlm.bridge
    if bridge.version or bridge.gate.shape[1] > 1:
        raise UserError(f"{path}: peft's AdaptionPrompt has no image and one gate per layer; this zero_init bridge has version={bridge.version} "
                        f"and {bridge.gate.shape[1]} gates per layer, so it stays in the native layout (version=0 with gate_per=layer fits).")
    key = "base_model.model.model.layers.{}.self_attn.adaption_{}"
    gates, layers = bridge.gates(), enumerate(range(bridge.first, len(bridge.gate)))        # tanh, where there is one, is applied here
    tensors = {key.format(l, what): t for n, l in layers for what, t in (("gate", gates[n]), ("prompt", bridge.prompts[n:n + 1]))}
    write_tensors(path / "adapter_model.safetensors", tensors)
    write_json(path / "adapter_config.json", {"peft_type": "ADAPTION_PROMPT", "task_type": "CAUSAL_LM", "base_model_name_or_path": "decoder",
               "target_modules": "self_attn", "adapter_layers": len(gates), "adapter_len": bridge.prompts.shape[1], "inference_mode": True})
    save_decoder(vlm.decoder, path / "decoder")


SAVERS = {"linear": save_llava, "mlp": save_llava, "zero_init": save_peft}      # save_vlm(…, layout="hf")
BRIDGE_FILES = {        # bridge → a function of (checkpoint, the config beside it) for a published file of that bridge alone
    "mapl": mapl_file, "qformer": qformer_file, "zero_init": adapter_file, "flamingo": openflamingo_file,
}
IDEFICS_NAMES = {       # below "model."
    **{f"blocks.{{i}}.{a}": f"gated_cross_attn_layers.{{i}}.{b}" for a, b in (
        ("attention_gate", "alpha_cross_attn"), ("ff_gate", "alpha_dense"), ("norm.weight", "input_layernorm.weight"),
        ("ff.norm.weight", "post_attention_layernorm.weight"), *((f"{p}.weight", f"cross_attn.{p}_proj.weight") for p in "qkvo"),
        *((f"{p}_norm.weight", f"cross_attn.{p}_layer_norm.weight") for p in "qk"),
        *((f"ff.{p}.weight", f"mlp.{p}_proj.weight") for p in ("gate", "up", "down")))},
    "resampler.latents": "perceiver_resampler.latents",
    **{f"resampler.norm.{w}": f"perceiver_resampler.layer_norm.{w}" for w in WB},
    **{f"resampler.layers.{{i}}.{a}.{w}": f"perceiver_resampler.blocks.{{i}}.{b}.{w}" for w in WB for a, b in (
        ("norm_media", "0.context_layer_norm"), ("norm_latents", "0.latents_layer_norm"), ("o", "0.output_proj"),
        *((p, f"0.{p}_proj") for p in "qkv"), *((f"{p}_norm", f"0.{p}_layer_norm") for p in "qk"),
        ("ff.norm", "1.ln"), ("ff.up", "1.fc"), ("ff.down", "1.c_proj"))},
}
IDEFICS_DEFAULTS = dict(                                # what a config.json leaves out, each part of it by itself
    LLAMA_DEFAULTS, additional_vocab_size=0, cross_layer_interval=1, qk_layer_norms=False, alpha_type="float", use_resampler=False,
    vision_config=dict(embed_dim=768, image_size=224, intermediate_size=5120, patch_size=14, num_hidden_layers=32,
                       num_attention_heads=16, hidden_act="gelu"),
    perceiver_config=dict(resampler_n_latents=64, resampler_depth=6, resampler_n_heads=16, resampler_head_dim=96,
                          qk_layer_norms_perceiver=False))


def idefics(c: dict, path: Path) -> tuple[VLM, Fills]:
    """IDEFICS in transformers' layout; words beyond Llama's vocabulary lie in matrices of their own.

    The published ones begin with <fake_token_around_image> and <image>, in this order; the latter is `image_token`.
    """
    where = f"{path}/config.json"
    v, r = ({**IDEFICS_DEFAULTS[part], **(c.get(part) or {})} for part in ("vision_config", "perceiver_config"))
    c = {**IDEFICS_DEFAULTS, **c}
    extra = c["additional_vocab_size"]
    decoder = Decoder(decoder_config({**c, "vocab_size": c["vocab_size"] + extra}, where))
    vit = ViT(vit_config({**v, "model_type": "clip_vision_model", "hidden_size": v["embed_dim"]}, where)[0])
    bridge = make_bridge("idefics", decoder.config, vit.config.width, every=c["cross_layer_interval"], depth=r["resampler_depth"],
                         latents=r["resampler_n_latents"] if c["use_resampler"] else 0, qk_norm=c["qk_layer_norms"],
                         vector_gates=c["alpha_type"] == "vector", resampler_heads=r["resampler_n_heads"],
                         resampler_head_width=r["resampler_head_dim"], resampler_qk_norm=r["qk_layer_norms_perceiver"])
    names = {**expand(VIT_NAMES, vit.config.layers, "model.vision_model.", "vit."), **decoder_names(decoder.config, ours="decoder."),
             **expand(IDEFICS_NAMES, max(len(bridge.blocks), r["resampler_depth"]), "model.", "bridge.")}
    if extra:
        names["decoder.embed.weight"] += " & model.embed_tokens.additional_embedding.weight"
        names["decoder.lm_head.weight"] += " & lm_head.additional_fc.weight"
    vlm = VLM(vit, bridge, decoder, c["vocab_size"] + 1 if extra > 1 else None)
    return vlm, [(vlm, Checkpoint(path), names, ("lm_head.",) if decoder.config.tied else ())]


MLLAMA_NAMES = {        # a cross-attention layer; the others have Llama's names
    **{a.replace("layers", "blocks"): b.replace("self", "cross") for a, b in DECODER_NAMES.items() if "{i}" in a},
    **{f"blocks.{{i}}.{n}_norm.weight": f"layers.{{i}}.cross_attn.{n}_norm.weight" for n in "qk"},
    "blocks.{i}.attention_gate": "layers.{i}.cross_attn_attn_gate",
    "blocks.{i}.ff_gate": "layers.{i}.cross_attn_mlp_gate",
}
MLLAMA_DEFAULTS = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=40,
                       rope_theta=5e5, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
                       max_position_embeddings=131072, cross_attention_layers=[3, 8, 13, 18, 23, 28, 33, 38])


def mllama(c: dict, path: Path) -> tuple[VLM, Fills]:
    """Llama-3.2-Vision as published, or by the names that transformers 5 has in memory (model.…).

    All layers are numbered through: those of self-attention are our decoder's, those of cross-attention our bridge's.
    """
    where, file = f"{path}/config.json", Checkpoint(path)
    t = {**MLLAMA_DEFAULTS, **{k: v for k, v in (c.get("text_config") or {}).items() if v is not None}}
    cross = [n for n in range(t["num_hidden_layers"]) if n in t["cross_attention_layers"]]
    own = [n for n in range(t["num_hidden_layers"]) if n not in cross]
    if not own or cross and cross[-1] > own[-1]:
        raise UserError(f"{where}: cross-attention layer {cross[-1]} is the last; one of self-attention must follow.")
    t |= dict(num_hidden_layers=len(own), tie_word_embeddings=False, extra_tokens=8)    # 8 stands in their code alone
    decoder = Decoder(decoder_config(t, where))
    vit = TiledViT(tiled_vit_config(c.get("vision_config") or {}, f"{where}: vision_config"))
    bridge = Mllama(decoder.config, vit.config.width, [sum(n < m for n in own) for m in cross], leak=True)
    trunk = file.prefix("language_model.model.", "model.language_model.")
    head = file.prefix("language_model.lm_head.", "lm_head.")
    tower, map = (file.prefix(n, "model." + n) for n in ("vision_model.", "multi_modal_projector."))
    names = {ours + a.format(i=i): trunk + b.format(i=n)
             for ours, table, held in (("decoder.", DECODER_NAMES, own), ("bridge.", MLLAMA_NAMES, cross))
             for a, b in table.items() for i, n in enumerate(held)}
    names = {**names, **{f"bridge.map.{w}": map + w for w in WB}, "decoder.lm_head.weight": head + "weight",
             **expand(TILED_VIT_NAMES, 0, tower, "vit."), **expand(TILED_BLOCK_NAMES, vit.config.layers, tower, "vit."),
             **expand(TILED_BLOCK_NAMES, vit.config.global_layers, tower + "global_", "vit.global_")}
    vlm = VLM(vit, bridge, decoder, c.get("image_token_index", 128256))
    return vlm, [(vlm, file, names, ())]


LAYOUTS = {             # model_type of config.json → a function of (config, folder) → the empty model, and what it is filled with
    "llava": llava, "llava_llama": llava, "instructblip": blip2, "blip-2": blip2, "blip2_qformer_lavis": lavis, "stage1": own_stage1,
    "idefics": idefics, "mllama": mllama,
}
