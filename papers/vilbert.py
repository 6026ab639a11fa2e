"""ViLBERT (1908.02265v1): words and regions in TWO streams, which exchange keys and values.

Document 3 calls it "WiLBert", whose streams "max information in co-attention blocks": nothing is maximised,
each stream reads the other by cross-attention. Document 4 credits its figure to CM3.

    symbol    shape                      here             meaning
    T, V      (B, T, D), (B, R, Dv)      t, v             the streams, 768 and 1024 wide
    f, l      (B, R, 2048), (B, R, 5)    features, boxes  a detector's vector; x1/W, y1/H, x2/W, y2/H, area
    q, d      (B, R, 1601)               target, logits   the detector's distribution over classes, and ours

    (Y1)  V_0 = LN(W f + W_p l); row 0 is the picture: the mean of its regions, with the whole box
    (Y2)  c_T = softmax(Q_T K_Vᵀ/√E) V_V,   c_V = softmax(Q_V K_Tᵀ/√E) V_T      both of the layer's INPUT
    (Y3)  T ← LN(T + W c_T),  V ← LN(V + W c_V);  then each its own feed-forward, post-norm as BERT's
    (Y4)  L_regions = Σ_classes q (log q − log d), mean over the masked regions
    (Y5)  r = W_r (h_T ⊙ h_V), h = ReLU(W · + b) of each stream's first row: class 0 = aligned, 1 = not
    (Y6)  L = L_mlm + L_regions + CE(r, class), unweighted

A co-attention layer stands AHEAD of text layers 6 to 11 (of 12) and of region layers 0 to 5 (of 6): words
have six layers of their own first, regions none, because a detector has read them already. 15 % of the
regions are masked: the vector is 0 (9 of 10) or stays.

Paper and code: the co-attention is 1024 wide, 8 heads, whatever the streams are; W maps back to each width.
The regions' feed-forward is 1024, not 4 · 1024. In files, suffix 1 is the regions', 2 the words'; the context
that the words' queries read has suffix 1 and goes to stream 2; `q_dense1` and `q_dense2` are never read, and
with them there are 250,044,029 parameters. Text starts from BERT-base, the rest from N(0, 0.02).

The toy has no detector: q is the answer of a random linear classifier to a cell of the frozen ViT. Its masked
losses are those of pairs that belong together. The claim: the streams want unequal depths (VQA 70.55).
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridges import PostNormMLP
from model import IGNORE, Attend, merge_heads, split_heads, visible_to_bias
from papers.masked import (BertLayer, PairsTask, WordEmbedding, WordHead, embedding, init_bert, word_loss)
from papers.recipe import Ingredients, Numbers, Recipe


@dataclass(frozen=True)
class ViLBertConfig:
    vocab_size: int = 30522
    width: int = 768                # D, of the words' stream
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    region: int = 2048              # width of a region's vector
    classes: int = 1601             # of the detector
    region_width: int = 1024        # Dv
    region_layers: int = 6
    region_heads: int = 8
    region_hidden: int = 1024
    shared: int = 1024              # width of the co-attention and of h
    shared_heads: int = 8
    connect: tuple[tuple[int, int], ...] = tuple((n, 6 + n) for n in range(6))      # (region, text) layers
    dropout: float = 0.1            # BERT's inside its layers; BERT's behind the embeddings is not here


class Side(nn.Module):
    """One stream's half of a co-attention layer."""

    def __init__(self, width: int, hidden: int, shared: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v = (nn.Linear(width, shared) for _ in range(3))
        self.o, self.norm = nn.Linear(shared, width), nn.LayerNorm(width, eps=1e-12)
        self.mlp, self.attend = PostNormMLP(width, hidden, dropout), Attend()

    def project(self, x: Tensor) -> list[Tensor]:
        return [split_heads(f(x), self.heads) for f in (self.q, self.k, self.v)]

    def read(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        c = self.attend(q, k, v, bias, dropout=self.dropout if self.training else 0.0)          # (Y2)
        c = F.dropout(self.o(merge_heads(c)), self.dropout, self.training)
        return self.mlp(self.norm(x + c))                                                       # (Y3)


class CoAttention(nn.Module):
    def __init__(self, c: ViLBertConfig):
        super().__init__()
        self.text = Side(c.width, c.hidden, c.shared, c.shared_heads, c.dropout)
        self.regions = Side(c.region_width, c.region_hidden, c.shared, c.shared_heads, c.dropout)

    def forward(self, t: Tensor, v: Tensor, see_text: Tensor, see_regions: Tensor) -> tuple[Tensor, Tensor]:
        (q_t, k_t, v_t), (q_v, k_v, v_v) = self.text.project(t), self.regions.project(v)
        return (self.text.read(t, q_t, k_v, v_v, see_regions),
                self.regions.read(v, q_v, k_t, v_t, see_text))


class ViLBert(nn.Module):
    def __init__(self, config: ViLBertConfig):
        super().__init__()
        c = self.config = config
        self.text = WordEmbedding(c.vocab_size, c.width, c.positions)
        self.features, self.boxes = nn.Linear(c.region, c.region_width), nn.Linear(5, c.region_width)
        self.region_norm = nn.LayerNorm(c.region_width, eps=1e-12)
        words, regions = (c.width, c.heads, c.hidden), (c.region_width, c.region_heads, c.region_hidden)
        self.text_layers = nn.ModuleList(BertLayer(*words, c.dropout) for _ in range(c.layers))
        self.region_layers = nn.ModuleList(BertLayer(*regions, c.dropout) for _ in range(c.region_layers))
        self.connections = nn.ModuleList(CoAttention(c) for _ in c.connect)
        self.text_pool, self.region_pool = nn.Linear(c.width, c.shared), nn.Linear(c.region_width, c.shared)
        self.word_head = WordHead(c.width, c.vocab_size)
        self.region_head = WordHead(c.region_width, c.classes)
        self.classes = embedding(c.classes, c.region_width)
        self.match_head = nn.Linear(c.shared, 2)
        init_bert(self)

    def forward(self, tokens: Tensor, features: Tensor, boxes: Tensor, mask: Tensor | None = None,
                segments: Tensor | None = None, region_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The last states of words (B, T, D) and of regions (B, R, Dv); False in the masks is padding."""
        t = self.text(tokens, segments)
        v = self.region_norm(self.features(features) + self.boxes(boxes))                       # (Y1)
        see_t, see_v = (None if m is None else visible_to_bias(m[:, None, None], t.dtype)
                        for m in (mask, region_mask))
        first_v = first_t = 0
        for connection, (at_v, at_t) in zip((*self.connections, None), (*self.config.connect, (None, None))):
            for layer in self.region_layers[first_v:at_v]:
                v = layer(v, see_v)
            for layer in self.text_layers[first_t:at_t]:
                t = layer(t, see_t)
            if connection is not None:
                t, v = connection(t, v, see_t, see_v)
            first_v, first_t = at_v, at_t
        return t, v

    def match_logits(self, t: Tensor, v: Tensor) -> Tensor:         # (B, 2): [aligned, not]
        h_t, h_v = self.text_pool(t[:, 0]).relu(), self.region_pool(v[:, 0]).relu()
        return self.match_head(F.dropout(h_t * h_v, self.config.dropout, self.training))        # (Y5)

    def word_logits(self, t: Tensor) -> Tensor:
        return self.word_head(t, self.text.words.weight)


def region_loss(logits: Tensor, target: Tensor, chosen: Tensor) -> Tensor:
    """(B, R, classes) both, and (B, R) bool: the masked regions; 0 where there is none."""
    kl = F.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1)
    return (kl * chosen).sum() / chosen.sum().clamp(min=1)                                      # (Y4)


HOW = dict(data="Conceptual Captions, 3.1M pairs, 10 epochs", trained=("bert",),
           paper=Numbers(1e-4, 512, 60500, 0.1, "linear", beta2=0.999),
           toy=Numbers(1.5e-3, 32, 1000, 0.1, "linear"))
RECIPES = {
    "vilbert": Recipe("ViLBERT (1908.02265v1): two streams, co-attention; masked words, masked regions, "
                      "aligned or not", task="vilbert", **HOW),
    "vilbert-equal": Recipe("ViLBERT whose words have no layer of their own", task="vilbert-equal", **HOW)}


class ViLBertTask(PairsTask):
    """Recipe `vilbert`: (Y6) on captions and the cells of a frozen ViT."""
    own = 1                         # text layers ahead of the first co-attention

    def __init__(self, given: Ingredients):
        super().__init__(given)
        width = given.vit.config.width
        config = ViLBertConfig(self.vocab_size, 96, self.own + 2, 4, 192, self.context, width, 24,
                               96, 2, 4, 192, 96, 4, tuple((n, self.own + n) for n in range(2)), 0.0)
        self.module = nn.ModuleDict({"vit": given.vit, "bert": ViLBert(config)}).to(given.device)
        given.begin(self.module)
        self.detector = torch.randn(width, config.classes, generator=torch.Generator().manual_seed(0))

    def states(self, cells: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Words and regions; the picture's row and the boxes of a square grid are added."""
        B, R, side = *cells.shape[:2], math.isqrt(cells.shape[1])
        y, x = torch.arange(R, device=cells.device) // side, torch.arange(R, device=cells.device) % side
        boxes = torch.stack((x, y, x + 1, y + 1, torch.full_like(x, 1) / side), dim=-1) / side      # (R, 5)
        boxes = torch.cat((boxes.new_tensor([[0, 0, 1, 1, 1]]), boxes)).expand(B, -1, -1)
        return self.module["bert"](tokens, torch.cat((cells.mean(1, keepdim=True), cells), 1), boxes, mask)

    def loss(self, pixels: Tensor, mask: Tensor, masked: Tensor, labels: Tensor, other: Tensor,
             **_) -> Tensor:
        bert, aligned = self.module["bert"], other == torch.arange(len(other), device=other.device)
        cells = self.cells(pixels[other])
        draw = torch.rand(2, *cells.shape[:2], device=cells.device)
        hidden = draw[0] < 0.15                                                 # (B, R)
        t, v = self.states(cells.masked_fill((hidden & (draw[1] < 0.9))[..., None], 0), masked, mask)
        chosen = (labels != IGNORE) & aligned[:, None]
        target = (6 * F.normalize(cells, dim=-1) @ self.detector.to(cells)).softmax(-1)
        self.last = {"words": word_loss(bert.word_logits(t[chosen]), labels[chosen]),
                     "regions": region_loss(bert.region_head(v[:, 1:], bert.classes.weight), target,
                                            hidden & aligned[:, None]),
                     "pairs": F.cross_entropy(bert.match_logits(t, v), (~aligned).long())}
        return sum(self.last.values())                                                          # (Y6)

    def word_logits(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.module["bert"].word_logits(self.states(self.cells(pixels), tokens, mask)[0])

    def match_scores(self, piece: dict) -> Tensor:
        cells = self.cells(piece["pixels"][piece["other"]])
        states = self.states(cells, piece["tokens"], piece["mask"])
        return self.module["bert"].match_logits(*states) @ cells.new_tensor([1, -1])


TASKS = {"vilbert": ViLBertTask, "vilbert-equal": type("EqualDepths", (ViLBertTask,), {"own": 0})}
