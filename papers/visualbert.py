"""VisualBERT (1908.03557v1): words and regions in ONE stream, one BERT over both.

Document 4 has f = f_o + f_s + f_p for a region and two objectives, and slips twice. f_p is for "aligning the
order of bounding regions": regions have no order. It is the position of the WORDS that a region is known to
belong to (VCR has such links); of captions nobody knows them, and every region has the same f_p. And the
model is trained "to predict text captions": it fills words in, from both sides; it is no captioner.

    symbol      shape             here               meaning
    y           (B, T)            tokens             [CLS] caption 1 [SEP] caption 2 [SEP], 15 % masked
    f           (B, R, 2048)      features           a detector's vector of each of R regions; never masked
    W           (D, 2048)         project            f_o = W f + b
    s, p        (2, D), (S, D)    visual_segments,   f_s, f_p: the regions' own tables, at the start copies of
                                  visual_positions   the words' tables
    a           (B, R, A)         aligned            places of the words of each region, −1 = none
    x_n         (B, T+R, D)       hidden             words first, regions behind them

    (J1)  e_t = word + segment + position                  of words
    (J2)  f_k = W f + s_1 + p_0 + mean over a_k of the position table OF THE WORDS
    (J3)  x_0 = LN [e ; f];   x_n = BERT layer n of x_{n−1}: every place sees every other
    (J4)  logits = E LN GELU(W h + b) + c  over the words (papers/masked.py)
    (J5)  r = W_r tanh(W_p x_[CLS] + b) : class 0 = caption 2 belongs to the picture, 1 = it is a random one
    (J6)  L = L_mlm + CE(r, class), unweighted; caption 1 always belongs

Paper and published code differ. The paper sums f_p over the aligned words, the code takes their mean and adds
row 0 of the visual table (`sum_aligned` follows the paper). So without links all regions share p_0 and a
permutation of them changes nothing but their own order. Class 0 is the match, as in BERT's next sentence; in
ViLT and ALBEF 1 is.

The second objective can be solved from the words alone: two captions of one picture agree. Our toy measures
it (pairs), and the words beside their picture and beside another.

112,074,812 parameters with both heads. Everything learns but the detector, from BERT-base. Then comes
task-specific MLM, then fine-tuning. The toy's regions are the 9 cells of the frozen ViT.

The claim (NLVR² dev, 66.7 in full): most of it is early fusion (without: 61.4) and COCO (without pre-training
62.9, on COCO's text alone 63.9); objective 2 and BERT's start matter less (64.9, 64.7). `join` = L makes late
fusion: the regions come in ahead of one more layer only.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Item
from model import IGNORE, visible_to_bias
from papers.masked import (BertLayer, PairsTask, WordEmbedding, WordHead, embedding, init_bert, word_loss)
from papers.recipe import Ingredients, Numbers, Recipe


@dataclass(frozen=True)
class VisualBertConfig:
    """dropout: BERT's inside its layers; BERT has another behind the embeddings, which is not here."""
    vocab_size: int = 30522     # V
    width: int = 768            # D
    layers: int = 12
    heads: int = 12
    hidden: int = 3072          # width of the feed-forward
    positions: int = 512        # longest text, and rows of the regions' own table
    region: int = 2048          # width of a region's vector
    dropout: float = 0.1        # in the layers; BERT has it behind the embeddings, too
    join: int = 0               # regions come in ahead of this layer; `layers`: of one more layer


class VisualBert(nn.Module):
    def __init__(self, config: VisualBertConfig, sum_aligned: bool = False):
        super().__init__()
        c = self.config = config
        self.sum_aligned = sum_aligned
        self.text = WordEmbedding(c.vocab_size, c.width, c.positions)
        self.project = nn.Linear(c.region, c.width)
        self.visual_segments = embedding(2, c.width)
        self.visual_positions = embedding(c.positions, c.width)
        self.layers = nn.ModuleList(BertLayer(c.width, c.heads, c.hidden, c.dropout)
                                    for _ in range(c.layers + (c.join == c.layers)))
        self.pooler = nn.Linear(c.width, c.width)
        self.word_head, self.match_head = WordHead(c.width, c.vocab_size), nn.Linear(c.width, 2)
        init_bert(self)
        self.copy_tables()

    @torch.no_grad()
    def copy_tables(self) -> None:
        """The regions' tables begin as the words'; call it again where those were loaded from a BERT."""
        self.visual_segments.weight.copy_(self.text.segments.weight)
        self.visual_positions.weight.copy_(self.text.positions.weight)

    def regions(self, features: Tensor, aligned: Tensor | None = None) -> Tensor:
        """(B, R, ·) → (B, R, D), ahead of the norm."""
        x = self.project(features) + self.visual_segments.weight[1] + self.visual_positions.weight[0]
        if aligned is not None:
            real = (aligned >= 0)[..., None]                                    # (B, R, A, 1)
            p = (self.text.positions(aligned.clamp(min=0)) * real).sum(2)       # (B, R, D)
            x = x + (p if self.sum_aligned else p / real.sum(2).clamp(min=1))   #                  (J2)
        return x

    def forward(self, tokens: Tensor, features: Tensor, mask: Tensor | None = None,
                segments: Tensor | None = None, aligned: Tensor | None = None,
                region_mask: Tensor | None = None) -> list[Tensor]:
        """The embeddings (B, T+R, D), then the states after each layer.

        False in mask (B, T) and region_mask (B, R) is padding. With late fusion the states ahead of `join`
        are those of the words alone, (B, T, D).
        """
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        if region_mask is None:
            region_mask = torch.ones_like(features[..., 0], dtype=torch.bool)
        hidden = [self.text(tokens, segments)]                                  #                  (J1)
        for n, layer in enumerate(self.layers):
            if n == self.config.join:
                regions = self.text.norm(self.regions(features, aligned))
                hidden[-1] = torch.cat((hidden[-1], regions), dim=1)            # (B, T+R, D)
                mask = torch.cat((mask, region_mask), dim=1)
            bias = visible_to_bias(mask[:, None, None], hidden[-1].dtype)
            hidden.append(layer(hidden[-1], bias))                              #                  (J3)
        return hidden

    def word_logits(self, x: Tensor) -> Tensor:
        """Last states (…, D) → (…, V)."""
        return self.word_head(x, self.text.words.weight)                        # (J4)

    def match_logits(self, x: Tensor) -> Tensor:
        """The last state → (B, 2): [caption 2 belongs, it does not]."""
        return self.match_head(self.pooler(x[:, 0]).tanh())                     # (J5)


HOW = dict(paper=Numbers(5e-5, 48, 104000, 0.1, "linear", beta2=0.999),
           toy=Numbers(1.5e-3, 32, 1000, 0.1, "linear"), trained=("bert",))
COCO = "COCO, 0.1M pictures × 5 captions, 10 epochs"
RECIPES = {
    "visualbert": Recipe("VisualBERT (1908.03557v1): one stream; masked words, and does caption 2 belong?",
                         COCO, task="visualbert", **HOW),
    "visualbert-late": Recipe("VisualBERT with late fusion: regions come in ahead of one more layer alone",
                              COCO, task="visualbert-late", **HOW),
    "visualbert-words": Recipe("VisualBERT without its second objective", COCO, task="visualbert-words",
                               **HOW),
}


class VisualBertTask(PairsTask):
    """Recipe `visualbert`: (J6) on captions and the cells of a frozen ViT."""
    context, join, second = 128, 0, 1.0             # second: the weight of objective 2

    def __init__(self, given: Ingredients):
        super().__init__(given)
        config = VisualBertConfig(self.vocab_size, 128, 2, 4, 512, self.context, given.vit.config.width, 0.0,
                                  self.join)
        self.module = nn.ModuleDict({"vit": given.vit, "bert": VisualBert(config)}).to(given.device)
        given.begin(self.module)

    def rows(self, captions: list[list[str]], other: Tensor | None) -> list[list[int]]:
        """[CLS] caption [SEP] another one of the same picture or of another's [SEP]; None: the next one's."""
        if other is None:
            other = torch.arange(len(captions)).roll(-1)
        longest, encode = (self.context - 3) // 2, self.tokenizer.encode
        return [[self.cls, *encode(own[0])[:longest], self.sep, *encode(captions[j][-1])[:longest], self.sep]
                for own, j in zip(captions, other)]

    def second_caption(self, tokens: Tensor) -> Tensor:
        """(B, T) int64: 1 behind the first [SEP]."""
        ends = (tokens == self.sep).long()
        return (ends.cumsum(1) - ends).clamp(max=1)

    def piece(self, items: list[Item], seed: tuple[int, ...], paired: bool = True) -> dict:
        """Words are asked for in caption 1, and where caption 2 is of the same picture, not at all: on shapes
        two captions of a picture have the same words, and none would be read from the picture."""
        piece = super().piece(items, seed, paired)
        same = piece["other"] == torch.arange(len(items))
        told = self.second_caption(piece["tokens"]).bool() | (same[:, None] & paired)
        return piece | {"labels": piece["labels"].masked_fill(told, IGNORE)}

    def states(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.module["bert"](tokens, self.cells(pixels), mask, self.second_caption(tokens))[-1]

    def loss(self, pixels: Tensor, mask: Tensor, masked: Tensor, labels: Tensor, other: Tensor,
             **_) -> Tensor:
        bert, x, chosen = self.module["bert"], self.states(pixels, masked, mask), labels != IGNORE
        random = (other != torch.arange(len(other), device=other.device)).long()
        self.last = {"words": word_loss(bert.word_logits(x[:, :masked.shape[1]][chosen]), labels[chosen]),
                     "pairs": F.cross_entropy(bert.match_logits(x), random)}
        return self.last["words"] + self.second * self.last["pairs"]            # (J6)

    def word_logits(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.module["bert"].word_logits(self.states(pixels, tokens, mask)[:, :tokens.shape[1]])

    def match_scores(self, piece: dict) -> Tensor:
        belongs, random = self.module["bert"].match_logits(
            self.states(piece["pixels"], piece["tokens"], piece["mask"])).T
        return belongs - random


TASKS = {"visualbert": VisualBertTask,
         "visualbert-late": type("LateFusion", (VisualBertTask,), {"join": 2}),
         "visualbert-words": type("WordsAlone", (VisualBertTask,), {"second": 0.0})}
