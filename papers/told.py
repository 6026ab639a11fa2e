"""papers/told.py: a picture told to a frozen language model in the model's own words.

A mapper (MAPL's, or BLIP-2's Q-Former) writes one vector per word, and the nearest word of a vocabulary takes
its place: the words are text, and can be read. The model reads them as a prefix between a few learned vectors
(prompt tuning), or by Flamingo's layers. Quantised by a language model's table, pictures are in LQAE
(2302.00902) and SPAE (2306.17842), too; both are named from memory, and the training here is not theirs.

    symbol    shape            here          meaning
    f(x)      (ΣM, S·k, D)     soft          the mapper's: S slots of k tokens, a name each, left to right
    e_v       (V', D)          writer.words  rows of the decoder's table: tokens of all names, the line end
    P         (a + b, D)       prompts       learned: a in front of the words, b behind them
    p         (S·k, D)         places        learned: the place of a word

    (T1)  L = − mean log softmax_v(β cos(f(x), e_v))_w       stage 1: w are the names, then line ends; β = 30
    (T2)  y(x) = e_n,  n = argmax_v cos(f(x), e_v)           a word, and nothing between words
    (T3)  prefix = [P_1…a ; y(x) ; P_a+1…a+b]                stage 2: captions and answers train P alone
    (T4)  x_f = LN y(x) + p                                  or: what the layers (F3), (F4) read, which train

Why words: with a mapper's own f(x) in their place a small model does not read them. Where a name is right by
(T2), its first tokens have a cosine of 0.53 with their rows and half their length. Why P: behind "Question:
What is this? Answer:" SmolLM2-135M repeats none of 8 names that stand in front of it, with P it does after 40
steps. No gradient passes (T2), so each stage trains one part.

Flamingo's layers begin open here, and by copying: W_v is orthogonal, W_o = W_vᵀ and tanh α_x = 0.3, so that
the words a layer looks at are added to the stream as they are; where to look is left to learn. copy=False is
the paper's start: after as many steps 87.0 instead of 93.5 % of names are told (support/results/pictures.md).

Run       python train.py --recipe told --data emoji --vit weights/vit-pictures --lm SMOLLM2       both stages
          … --recipe told-flamingo                                                  words by Flamingo's layers
Content   Told, ToldFlamingo; their training: told_task.py
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridges import MAPL, Flamingo, QFormer
from model import Bridge, DecoderConfig, ImagePositions

GAIN = 16                               # P is GAIN times a parameter: a step of P is GAIN times the rate
OPEN = math.atanh(0.3)                  # α_x at the start


class Writer(nn.Module):
    """Names of what a picture shows: S of up to k tokens. mapper: mapl or qformer."""

    def __init__(self, decoder: DecoderConfig, vision_width: int, K: int, vocabulary: int, mapper: str,
                 width: int, layers: int, heads: int):
        super().__init__()
        if mapper not in ("mapl", "qformer"):
            raise ValueError(f"told's mapper is mapl or qformer, not {mapper!r}.")
        if mapper == "mapl":
            self.mapper = MAPL(decoder, vision_width, K, width, layers, heads)
        else:
            self.mapper = QFormer(decoder, vision_width, K, width, layers, heads, 4 * width, cross_every=1,
                                  dropout=0.0)          # small, and every layer looks
        self.words = nn.Parameter(0.02 * torch.randn(vocabulary, decoder.width))        # stage 1 writes them
        self.requires_grad_(False)                      # no gradient passes (T2)

    def soft(self, visual: Tensor) -> Tensor:
        return self.mapper.prefix(visual).float()                               # (ΣM, S·k, D)   f(x)

    def nearest(self, soft: Tensor) -> Tensor:
        """(…, D) → (…) numbers of words; a row of zeros is none."""
        words = self.words.float()
        cosines = F.normalize(soft, dim=-1) @ F.normalize(words, dim=-1).T      # (…, V')
        return cosines.masked_fill(~words.any(-1), -2.0).argmax(-1)

    def forward(self, visual: Tensor) -> Tensor:
        return self.words[self.nearest(self.soft(visual))]                      # (ΣM, S·k, D)   (T2)


class Told(Bridge):
    """The words as a prefix, between learned vectors."""
    name, soft_tokens, reads, reads_cls = "told", True, -1, True

    def __init__(self, decoder: DecoderConfig, vision_width: int, slots: int = 3, tokens: int = 6,
                 ahead: int = 2, behind: int = 6, vocabulary: int = 2048, mapper: str = "mapl",
                 width: int = 256, layers: int = 4, heads: int = 8):
        super().__init__()
        self.slots, self.tokens, self.ahead = slots, tokens, ahead
        self.writer = Writer(decoder, vision_width, slots * tokens, vocabulary, mapper, width, layers, heads)
        self.prompts = nn.Parameter(torch.empty(ahead + behind, decoder.width).uniform_(-0.5, 0.5) / GAIN)

    def requires_grad_(self, requires_grad: bool = True) -> Told:
        self.prompts.requires_grad_(requires_grad)
        return self

    def see(self, features: Tensor, where: ImagePositions | None = None) -> Tensor:
        return self.writer.mapper.see(features, where)

    def prefix(self, visual: Tensor) -> Tensor:
        y = self.writer(visual)                                                 # (ΣM, S·k, D)
        P = (GAIN * self.prompts).to(y.dtype).expand(len(y), -1, -1)
        return torch.cat((P[:, :self.ahead], y, P[:, self.ahead:]), dim=1)      #                (T3)


class Places(nn.Module):
    """In the place of Flamingo's resampler."""

    def __init__(self, K: int, width: int):
        super().__init__()
        self.places = nn.Parameter(0.5 * torch.randn(K, width))

    def forward(self, y: Tensor, time: Tensor) -> Tensor:
        return F.layer_norm(y, y.shape[-1:]) + self.places                      # (ΣM, S·k, D)   (T4)


class ToldFlamingo(Bridge):
    """The words by Flamingo's layers, ahead of the last layer of the decoder and of every so many below."""
    name, reads, reads_cls = "told_flamingo", -1, True

    def __init__(self, decoder: DecoderConfig, vision_width: int, every: int = 5, slots: int = 3,
                 tokens: int = 6, vocabulary: int = 2048, mapper: str = "mapl", width: int = 256,
                 layers: int = 4, heads: int = 8, copy: bool = True):
        super().__init__()
        K = slots * tokens
        self.writer = Writer(decoder, vision_width, K, vocabulary, mapper, width, layers, heads)
        self.reader = Flamingo(decoder, decoder.width, every, (decoder.layers - 1) % every, K, 1,
                               decoder.heads, decoder.head_width, mult=1)
        self.reader.resampler = Places(K, decoder.width)
        for block in self.reader.blocks if copy else ():        # heads × head_width = D: W_o W_v = 1
            nn.init.orthogonal_(block.v.weight)
            block.o.weight.data.copy_(block.v.weight.T)
            nn.init.constant_(block.attention_gate, OPEN)

    def requires_grad_(self, requires_grad: bool = True) -> ToldFlamingo:
        self.reader.requires_grad_(requires_grad)
        return self

    def see(self, features: Tensor, where: ImagePositions) -> dict:
        return self.reader.see(self.writer(self.writer.mapper.see(features)), where)

    def before(self, layer: int, x: Tensor, visual: dict | None) -> Tensor:
        return self.reader.before(layer, x, visual)

    def gates(self) -> Tensor:
        return self.reader.gates()

    @property
    def gated_layers(self) -> list[int]:
        return self.reader.gated_layers
