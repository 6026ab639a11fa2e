"""FLAVA (2112.04482v3, CVPR 2022): one model for pictures, texts and both, each batch of one kind.

Document 3 dates it 2024, and calls the input of the dVAE a text: a picture goes in and codes come out. The
losses of a picture alone and of a text alone are BEiT's and BERT's; a pair has four others.

    symbol      shape          here        meaning
    h_I         (B, 1+N, D)    image       states of the ViT, class token first, before its final norm
    h_T         (B, T, D)      text        states of the text encoder, [CLS] first, before its final norm
    h_M         (B, 2+N+T, D)  join        states behind 6 layers over [CLS_M; W_I h_I; W_T h_T], normed
    c           (B, N)         codes       the dVAE's code of every patch, of 8192
    p           (B, N) bool    hidden      the patches that the mask token replaces: 75 of 196, in blocks
    s           ()             logit_scale ln(1/0.07) at the start, within 0 … ln 100
    pair        (B,) bool      match       does the text belong to the picture?

    (V1)  mim = CE(head LN h_I, c) at hidden patches                    batches of pictures alone
    (V2)  mlm = CE(head LN h_T, y) at masked words                      batches of texts alone
    (V3)  contrast = ½ [CE(S) + CE(Sᵀ)],  S = e^s cos(W LN h_I[CLS], W LN h_T[CLS]);  rows of matching pairs
          alone, columns of all pairs of ALL processes, with gradients: global, not local
    (V4)  mmm = CE of hidden patches and of masked words, from h_M by heads of their own; matching pairs alone
    (V5)  itm = CE(W tanh(W' h_M[CLS_M]), match)
    (V6)  the loss of a batch is the sum of its own losses, all with weight 1

(V3) reads whole pictures and texts; (V4) and (V5) read masked ones, in which p and (W4) of masked.py hide
something. Every layer is pre-norm, which the paper found steadier at a large rate than BERT's. The three
encoders must have one width.

Slip of the paper: rows 3 to 6 of its Table 3 have the columns vision and NLP exchanged against rows 1 and 2
and the text. The claims: contrast alone, then (V4) and (V5), then pictures and texts alone, then encoders
that were trained alone before: 66.25, 69.11, 67.32, 69.92 on the pairs' tasks; the global contrast +1.65 of
the macro average. It is the third row that is below the second: the batches alone pay only with the fourth.
"""
from __future__ import annotations

import math
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import IGNORE, EncoderBlock, ViT, visible_to_bias
from papers.contrasts import mean_count
from papers.masked import WordEmbedding, WordHead, init_bert
from papers.recipe import Numbers, Recipe


class MaskedHead(nn.Module):
    """BERT's head with an output matrix of its own: states (…, D) → (…, V) of words or of codes."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.head, self.matrix = WordHead(width, classes), nn.Parameter(torch.randn(classes, width) * 0.02)

    def forward(self, h: Tensor) -> Tensor:
        return self.head(h, self.matrix)


class Flava(nn.Module):
    """Its ViT has no norm ahead of the first block: ViTConfig(pre_norm=False, patch_bias=True)."""

    def __init__(self, vit: ViT, vocab_size: int, codes: int = 8192, layers: int = 12, heads: int = 12,
                 hidden: int = 3072, fusion: int = 6, fusion_hidden: int = 3072, positions: int = 512,
                 joint: int = 768, std: float = 0.02):
        super().__init__()
        D = vit.config.width

        def blocks(n: int, inner: int) -> nn.ModuleList:
            return nn.ModuleList(EncoderBlock(D, heads, inner, "gelu", 1e-12) for _ in range(n))

        self.mask_patch = nn.Parameter(torch.zeros(D))
        self.embedding, self.layers = WordEmbedding(vocab_size, D, positions), blocks(layers, hidden)
        self.text_norm = nn.LayerNorm(D, eps=1e-12)
        self.cls = nn.Parameter(torch.zeros(D))                                 # CLS_M
        self.fusion, self.fusion_norm = blocks(fusion, fusion_hidden), nn.LayerNorm(D, eps=1e-12)
        self.image_in, self.text_in = nn.Linear(D, D), nn.Linear(D, D)          # W_I, W_T
        self.image_projection, self.text_projection = nn.Linear(D, joint), nn.Linear(D, joint)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))       # s
        self.mim_head, self.mlm_head = MaskedHead(D, codes), MaskedHead(D, vocab_size)
        self.mmm_image_head, self.mmm_text_head = MaskedHead(D, codes), MaskedHead(D, vocab_size)
        self.pooler, self.match_head = nn.Linear(D, D), nn.Linear(D, 2)
        init_bert(self, std)
        self.vit = vit                                                          # as it was given

    def image(self, pixels: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = self.vit.embed(pixels)
        if hidden is not None:
            masked = self.mask_patch + self.vit.positions[1:]                   # (N, D)
            x = torch.cat((x[:, :1], torch.where(hidden[..., None], masked, x[:, 1:])), dim=1)
        for block in self.vit.blocks:
            x = block(x)
        return x                                                                # h_I

    def text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x, bias = self.embedding(tokens), visible_to_bias(mask[:, None, None], torch.float32)
        for block in self.layers:
            x = block(x, bias=bias)
        return x                                                                # h_T

    def join(self, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        x = torch.cat((self.cls.expand(len(image), 1, -1), self.image_in(image), self.text_in(text)), dim=1)
        real = torch.cat((mask.new_ones(len(mask), 1 + image.shape[1]), mask), dim=1)
        bias = visible_to_bias(real[:, None, None], torch.float32)
        for block in self.fusion:
            x = block(x, bias=bias)
        return self.fusion_norm(x)                                              # h_M

    def embed(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, joint) of h_I and h_T, of length 1."""
        return (F.normalize(self.image_projection(self.vit.post_norm(image[:, 0])), dim=-1),
                F.normalize(self.text_projection(self.text_norm(text[:, 0])), dim=-1))

    def match_logits(self, joined: Tensor) -> Tensor:
        """(B, 2): does not match, matches."""
        return self.match_head(self.pooler(joined[:, 0]).tanh())

    def pair_losses(self, pixels: Tensor, hidden: Tensor, codes: Tensor, tokens: Tensor, masked: Tensor,
                    labels: Tensor, mask: Tensor, match: Tensor, number: int = 0,
                    gather: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
        """(V3) to (V5) of pairs (b): part `number` of the B that `gather` puts together.

        Where no pair of the B matches, all count.
        """
        keep = match if bool(gather(match).any()) else torch.ones_like(match)
        u, v = self.embed(self.image(pixels), self.text(tokens, mask))
        own = torch.arange(len(u), device=u.device) + number * len(u)
        target = own.masked_fill(~keep, IGNORE)
        scale = self.logit_scale.exp()
        contrast = (mean_over(scale * u @ gather(v).T, target, gather) +
                    mean_over(scale * v @ gather(u).T, target, gather)) / 2     #               (V3)
        x = self.join(self.image(pixels, hidden), self.text(masked, mask), mask)
        N = codes.shape[1]
        codes = codes.masked_fill(~(hidden & keep[:, None]), IGNORE)
        labels = labels.masked_fill(~keep[:, None], IGNORE)
        return {"contrast": contrast,
                "itm": F.cross_entropy(self.match_logits(x), match.long()),     #               (V5)
                "mmm_image": masked_loss(self.mmm_image_head, x[:, 2:2 + N], codes, gather),
                "mmm_text": masked_loss(self.mmm_text_head, x[:, 2 + N:], labels, gather)}      # (V4)

    def image_loss(self, pixels: Tensor, hidden: Tensor, codes: Tensor, gather=lambda x: x) -> Tensor:
        h = self.vit.post_norm(self.image(pixels, hidden))[:, 1:]
        return masked_loss(self.mim_head, h, codes.masked_fill(~hidden, IGNORE), gather)        # (V1)

    def text_loss(self, masked: Tensor, labels: Tensor, mask: Tensor, gather=lambda x: x) -> Tensor:
        h = self.text_norm(self.text(masked, mask))
        return masked_loss(self.mlm_head, h, labels, gather)                    #               (V2)


def mean_over(logits: Tensor, target: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """This part's share of the mean CE over the rows of all parts that have a target."""
    total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    return total / mean_count((target != IGNORE).sum(), gather)


def masked_loss(head: MaskedHead, h: Tensor, target: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """h (B, n, D), target (B, n): the head runs only where there is a target."""
    chosen = target != IGNORE
    return mean_over(head(h[chosen]), target[chosen], gather)


PARTS = ("vit", "embedding", "layers", "text_norm", "fusion", "fusion_norm", "image_in", "text_in",
         "image_projection", "text_projection", "mim_head", "mlm_head", "mmm_image_head", "mmm_text_head",
         "pooler", "match_head")
# The paper's second beta and its steps stand here as we remember them.
RECIPES = {
    name: Recipe(f"FLAVA (2112.04482v3): {summary}", "70M pairs; ImageNet; CCNews and BookCorpus",
                 Numbers(1e-3, 8192, 150_000, 10_000, weight_decay=0.1, beta2=0.999),
                 Numbers(1e-3, 32, 600, weight_decay=0.05), trained=PARTS, task=name, start="vq")
    for name, summary in (
        ("flava-2", "pairs, pictures alone and texts alone in turn, six losses"),
        ("flava-pairs", "the same without pictures and texts alone"),
        ("flava-contrast", "the contrast of pairs alone"),
        ("flava-local", "pairs, contrasted in each half of the batch"))}
