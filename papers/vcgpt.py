"""VC-GPT (2201.12723v3): a second reader above the decoder sees the picture, and their logits are added.

Document 4 says: CLIP's ViT and GPT-2 are pre-trained; the vanilla connection puts cross-attention into the
layers of GPT-2, where it disturbs what GPT-2 knows; VC-GPT keeps vision out and adds the two sets of logits,
a self-ensemble that matters for the score. It has no formula. The one that is known comes from a survey, and
no code is published:

    symbol   shape        here         meaning
    h^G      (B, T, D)    h            final states of the decoder, after its last norm
    z        (ΣM, N, Di)  features     tokens of the ViT, class token kept
    h^fuse   (B, T, D)    fused        the same words after `layers` fusion layers that read the picture
    W^G      (V, D)       head         the decoder's own projection onto its vocabulary
    W^fuse   (V, D)       vocabulary   a second one, random at the start

    (V1)  logits = W^G h^G + W^fuse h^fuse
    (V2)  x ← x + W_o Attn(W_q LN x, W_k z, W_v z)                  x = h^G ahead of the first layer
    (V3)  x ← x + W_down GELU(W_up LN x)                            h^fuse = x behind the last

Two seams: `finish` makes [h^G | h^fuse] of the final states, `head` adds the logits. Nothing enters the
layers, so at W^fuse = 0 the logits are the plain decoder's to the bit, and with a frozen decoder the first
term never changes. A word reads patches and no other word: causal for free, nothing to cache.

Not in our sources, so ours: the form of the fusion layers (pre-norm, as above; a projection of z is absorbed
into W_k and W_v), and their number. W^G starts as the word embeddings of GPT-2; here it is the decoder's head
and learns with the decoder. A word reads the last picture at or before it. Where it has none, there is no
second reader and (V1) is W^G h^G: text without pictures has the decoder's own perplexity.

fuse="alone" leaves W^G h^G out: the paper's ablation without the self-ensemble, whose numbers are not in our
sources. fuse="inside" is the vanilla connection: the same layers, ungated, ahead of the decoder's topmost
ones.

By hand: D = V = 2, W^G = 1, W^fuse = ½, one layer without norms, projections or (V3), z = 1 (the identity):
h = (1, 2) reads (0.3302, 0.6698), h^fuse = (1.3302, 2.6698), logits (1.6651, 3.3349), p = (0.1585, 0.8415);
alone (0.3385, 0.6615), the decoder without it (0.2689, 0.7311).

The claim in miniature: captions by ensemble, alone and inside, and the loss on text without pictures.
"""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn

from bridges import Flamingo
from model import Bridge, DecoderConfig, EncoderBlock, merge_heads, split_heads, visible_to_bias
from papers.clipcap import PAPER
from papers.idefics import NoResampler
from papers.recipe import Numbers, Recipe

FUSE = ("ensemble", "alone", "inside")


class FusionLayer(EncoderBlock):
    """(V2) and (V3): a block of a transformer whose keys and values are those of the picture."""

    def __init__(self, width: int, vision_width: int, heads: int, hidden: int):
        super().__init__(width, heads, hidden, "gelu", 1e-5)
        self.k, self.v = nn.Linear(vision_width, width), nn.Linear(vision_width, width)

    def project(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M·N, Di) → keys, values (B, H, M·N, E)."""
        return split_heads(self.k(media), self.heads), split_heads(self.v(media), self.heads)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """x (B, T, D), visible (B, T, M·N) bool. A word without a picture reads exactly 0."""
        if k.shape[2]:
            q = split_heads(self.q(self.norm1(x)), self.heads)                  # (B, H, T, E)
            y = self.attend(q, k, v, visible_to_bias(visible[:, None], q.dtype))
            y = self.o(merge_heads(y)) * visible.any(-1, keepdim=True)          # (B, T, D)
            x = x + y.to(x.dtype)                                               #              (V2)
        return x + self.mlp(self.norm2(x)).to(x.dtype)                          #              (V3)


class VCGPT(Bridge):
    """`see` and the call of a layer are Flamingo's, without a resampler; fuse: ensemble | alone | inside."""
    name, reads, reads_cls = "vcgpt", -1, True
    see = Flamingo.see

    def __init__(self, decoder: DecoderConfig, vision_width: int, layers: int = 1, heads: int = 12,
                 hidden: int | None = None, fuse: str = "ensemble"):
        super().__init__()
        D = decoder.width
        if fuse not in FUSE:
            raise ValueError(f'vcgpt has fuse {", ".join(FUSE)}, not "{fuse}".')
        if fuse == "inside" and layers > decoder.layers:
            raise ValueError(f"vcgpt: {layers} fusion layers inside a decoder of {decoder.layers} layers; "
                             f"give layers=1..{decoder.layers}.")
        self.fuse, self.resampler = fuse, NoResampler()
        self.first, self.every, self.see_all = max(0, decoder.layers - layers), 1, False
        self.blocks = nn.ModuleList(FusionLayer(D, vision_width, heads, hidden or 4 * D)
                                    for _ in range(layers))
        if fuse != "inside":
            self.vocabulary = nn.Linear(D, decoder.vocab_size, bias=False)
            nn.init.normal_(self.vocabulary.weight, 0.0, 0.02)

    def before(self, layer: int, x: Tensor, visual: dict | None) -> Tensor:
        return Flamingo.before(self, layer, x, visual) if self.fuse == "inside" else x

    def finish(self, h: Tensor, visual: dict | None) -> Tensor:
        """(B, T, D) → (B, T, 2D): [h^G | h^fuse]."""
        if self.fuse == "inside":
            return h
        fused = h
        for n in range(len(self.blocks)):
            fused = Flamingo.before(self, self.first + n, fused, visual)        # block n   (V2), (V3)
        if self.fuse == "ensemble":
            sees = 0 if visual is None else visual["where"].columns(h.shape[1])[..., None] > 0
            fused = fused * sees
        return torch.cat((h, fused), dim=-1)

    def head(self, h: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        if self.fuse == "inside":
            return head(h)
        h, fused = h.chunk(2, dim=-1)
        second = self.vocabulary(fused)                                         # (…, V)
        return second if self.fuse == "alone" else head(h) + second             #              (V1)


# The paper's numbers are not in our sources; those of ClipCap, GPT-2 tuned on the same captions, stand here.
OPTIONS = dict(reads=-2, reads_cls=False, layers=4, heads=4, hidden=256)
RECIPES = {
    "vcgpt": Recipe(
        "VC-GPT (2201.12723v3): fusion layers, their logits and the decoder learn from captions",
        "COCO or Flickr30k; by ClipCap's numbers, the paper's are not in our sources",
        PAPER, Numbers(1e-3, 64, 800), "vcgpt", ("bridge", "decoder"), options=OPTIONS),
    "vcgpt-frozen": Recipe(
        "VC-GPT with a frozen decoder: its own logits never change",
        "no run of the paper's", PAPER, Numbers(2e-3, 64, 800), "vcgpt", options=OPTIONS),
}
