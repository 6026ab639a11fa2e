"""KOSMOS-1 (2302.14045v2): one attention of learned queries brings a picture into a decoder that is trained
from scratch.

Document 2 names it in one line, with BLIP-2 and FROMAGe, among models that learn from pairs of a picture and
a text, without an equation. What sets it apart is not the way in: the decoder (24 layers, 1.3B parameters,
1.6B with CLIP) is never a finished language model that is later shown pictures. It learns text, pairs and
interleaved documents at once, a picture standing in the text between <image> and </image>; of CLIP ViT-L/14
only the last layer learns.

The paper says that a resampler pools the picture and publishes no weights. What is here is the connector that
KOSMOS-2 (2306.14824) publishes:

    symbol   shape             here          meaning
    z        (ΣM, N, Di)       features      CLIP's last state of ALL tokens, class token too, before its norm
    u        (ΣM, N, D)        dense         tokens as unit vectors, then in the decoder's width
    q        (K, D)            queries       learned; K = 64
    p        (ΣM, K, D)        return        soft tokens

    (K1)  z ← LN(z);   z ← z / ‖z‖                                per token
    (K2)  u = W z + b
    (K3)  p = W_o MHA(q, [u ; q], [u ; q]) + b_o                  32 heads, biases on q, k, v and o

There is no residual, norm or feed-forward: p is made of values alone, and Flamingo's resampler, of which this
is one bare layer, has them all. In (K3) a bias of the keys adds the same to all scores of a query, and the
softmax takes it away again. LN is CLIP's own post-norm; a vision tower hands over its last state without it,
so the bridge owns one. Theirs drops 10 % of the attention weights in training, ours none. As z has length 1,
W starts at N(0, 1) here, where u is as large as q. At PyTorch's own start it is a twentieth of q, and 150 toy
steps taught nothing of the picture.

The claim: interleaved documents are what makes few-shot work, and text what keeps the language. In miniature:
three mixtures (pairs; and interleaved documents; and text), decoder trained too; accuracy with examples and
perplexity of text. Expected: only with interleaved documents do examples help. Our sources have no number of
the paper for it.

    python train.py --bridge kosmos1 --data "shapes + shapes-pages * 0.2"       pairs and interleaved
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Attend, Bridge, DecoderConfig, ImagePositions, merge_heads, split_heads
from papers.recipe import Numbers, Recipe


class Connector(nn.Module):
    """W_o MHA(q, [u ; q], [u ; q]) + b_o"""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"a connector of width {width} does not divide into {heads} heads.")
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.attend = Attend()

    def forward(self, u: Tensor, queries: Tensor) -> Tensor:
        source = torch.cat((u, queries), dim=1)                                 # (ΣM, N+K, D)
        q, k, v = (split_heads(y, self.heads) for y in (self.q(queries), self.k(source), self.v(source)))
        return self.o(merge_heads(self.attend(q, k, v)))                        # (ΣM, K, D)   (K3)


class Kosmos1(Bridge):
    """19,015,680 parameters from Di 1024 to D 2048, and 2,048 of CLIP's post-norm."""
    name, soft_tokens, reads, reads_cls = "kosmos1", True, -1, True

    def __init__(self, decoder: DecoderConfig, vision_width: int, queries: int = 64, heads: int = 32,
                 vision_eps: float | None = 1e-5):
        super().__init__()
        self.vision_norm = nn.LayerNorm(vision_width, eps=vision_eps) if vision_eps else nn.Identity()
        self.dense = nn.Linear(vision_width, decoder.width)
        nn.init.normal_(self.dense.weight)              # u as large as q, see above
        self.queries = nn.Parameter(torch.randn(queries, decoder.width))        # q ~ N(0, 1)
        self.connector = Connector(decoder.width, heads)

    def see(self, features: Tensor, where: ImagePositions | None = None) -> Tensor:
        return F.normalize(self.vision_norm(features), dim=-1)                  # (ΣM, N, Di)  (K1)

    def prefix(self, visual: Tensor) -> Tensor:
        u = self.dense(visual)                                                  # (ΣM, N, D)   (K2)
        return self.connector(u, self.queries.expand(len(u), -1, -1))           # (ΣM, K, D)


# 1.2M tokens per update, so no number of pictures.
RECIPES = {"kosmos1": Recipe(
    "KOSMOS-1 (2302.14045v2): connector and decoder learn together; the paper's decoder starts from nothing",
    "text, pairs and interleaved documents",
    Numbers(2e-4, None, 300_000, 375, "linear", 0.01, 0.98),
    Numbers(2e-3, 64, 600, optimizer="muon", muon_lr=0.01), "kosmos1",
    ("bridge", "decoder"), options=dict(reads=-2, queries=16, heads=4))}
