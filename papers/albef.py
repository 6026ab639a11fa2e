"""ALBEF (2107.07651v2): align the pictures' and the texts' vectors first, then fuse; a slow copy teaches.

Document 3 tells it inside its section on FLAVA: fusing at once is hard, because the states of a ViT and of
BERT lie in spaces of their own. So a contrast (ITC) aligns them ahead of the cross-attention, and finds the
pairs that matching (ITM) should be asked about. A copy whose weights follow slowly (the teacher) gives soft
targets, because captions of the web describe a picture badly.

    symbol   shape          here             meaning
    V        (B, N, D)      picture          last states of the ViT after its norm, class token first
    T        (B, T, D)      text             states behind the first half of BERT's layers, no picture
    H        (B, T, D)      fuse             states behind the other half, which read V by cross-attention
    f, g     (B, E)         embed            unit(W_v V_cls), unit(W_t T_cls); f', g' are the teacher's
    F, G     (K, E)         image_queue, …   the teacher's vectors of earlier batches, K = 65,536
    τ        ()             temperature      0.07 at the start, learned, within 0.001 … 0.5; it divides
    α        ()             alpha            weight of the teacher: from 0 to 0.4 in the first epoch
    m        ()             momentum         0.995

    (A1)  x ← LN(x + MHA(x, x, x));  x ← LN(x + MHA(x, V, V));  x ← LN(x + W_2 GELU(W_1 x))      fusion
    (A2)  s_i = f_i·[g'; G] / τ,  and with the teacher s'_i = f'_i·[g'; G] / τ;  texts likewise, [f'; F]
    (A3)  L_itc = ½ Σ_directions −mean_i Σ_k q_ik log softmax(s_i)_k,   q = α softmax(s') + (1 − α) [own pair]
    (A4)  L_itm = CE(W H_cls, 1 for the own pair, 0 for (V⁻, T) and (V, T⁻))      mean over 3B pairs
    (A5)  V⁻, T⁻ ~ softmax(s) over the other rows of the batch
    (A6)  L_mlm = mean over masked words of (1 − α) CE + α (−Σ p' log p),   p' the teacher's prediction
    (A7)  θ' ← m θ' + (1 − m) θ                    ahead of a step; behind it f', g' enter the queues (A8)

L = L_itc + L_itm + L_mlm. Gradients reach the online vectors alone: no column of (A2) is theirs.

Paper and code. The code warms up for 2,000 steps, the paper says 1,000. Its processes share the queue but see
only their own g' and draw (A5) from their own rows; here the whole batch counts (Ingredients.gather), so that
two processes are one. It sets the diagonal of (A5) to 0 behind the softmax, we to −∞ ahead of it: the same
draw. It updates inside the forward pass, we in `after_step`, so that a run that resumes does nothing twice:
the copy starts equal, so its first update does nothing.

The claim: each of ITC, hard negatives and the teacher helps; VQA test-dev 75.8 with 14M pictures. The recipes
albef-fused, albef-easy and albef-untaught leave one of them out.
"""
from __future__ import annotations

import copy
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridges import PostNormAttention, PostNormMLP
from model import IGNORE, ViT, visible_to_bias
from papers.contrasts import hard_negatives, mean_count
from papers.masked import BertLayer, WordEmbedding, WordHead, init_bert
from papers.recipe import Numbers, Recipe


class FusionLayer(nn.Module):
    def __init__(self, width: int, source: int, heads: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.attention = PostNormAttention(width, width, heads, dropout)
        self.cross = PostNormAttention(width, source, heads, dropout)
        self.mlp = PostNormMLP(width, hidden, dropout)

    def forward(self, x: Tensor, picture: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.mlp(self.cross(self.attention(x, x, bias), picture))        # (A1)


class Towers(nn.Module):
    """What the teacher is a copy of: ViT, BERT in two halves, projections, the head for words."""

    def __init__(self, vit: ViT, vocab_size: int, width: int = 768, layers: int = 12, heads: int = 12,
                 hidden: int = 3072, positions: int = 512, joint: int = 256, dropout: float = 0.0,
                 text_layers: int | None = None, std: float = 0.02):
        super().__init__()
        self.embedding = WordEmbedding(vocab_size, width, positions)
        below = layers // 2 if text_layers is None else text_layers
        self.layers = nn.ModuleList(BertLayer(width, heads, hidden, dropout) for _ in range(below))
        self.fusion = nn.ModuleList(FusionLayer(width, vit.config.width, heads, hidden, dropout)
                                    for _ in range(layers - below))
        self.word_head = WordHead(width, vocab_size)
        self.image_projection = nn.Linear(vit.config.width, joint)              # W_v
        self.text_projection = nn.Linear(width, joint)                          # W_t
        init_bert(self, std)
        self.vit = vit

    def picture(self, pixels: Tensor) -> Tensor:
        return self.vit.post_norm(self.vit(pixels))                             # V

    def text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x, bias = self.embedding(tokens), text_bias(mask)
        for layer in self.layers:
            x = layer(x, bias)
        return x                                                                # T

    def fuse(self, text: Tensor, picture: Tensor, mask: Tensor) -> Tensor:
        for layer in self.fusion:
            text = layer(text, picture, text_bias(mask))
        return text                                                             # H

    def embed(self, picture: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return (F.normalize(self.image_projection(picture[:, 0]).float(), dim=-1),
                F.normalize(self.text_projection(text[:, 0]).float(), dim=-1))

    def word_logits(self, picture: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, T, V)."""
        hidden = self.fuse(self.text(tokens, mask), picture, mask)
        return self.word_head(hidden, self.embedding.words.weight)


def text_bias(mask: Tensor) -> Tensor:
    return visible_to_bias(mask[:, None, None], torch.float32)                  # (B, 1, 1, T)


class Albef(nn.Module):
    def __init__(self, towers: Towers, queue: int = 65536, momentum: float = 0.995):
        super().__init__()
        self.towers, self.momentum = towers, momentum
        self.teacher = copy.deepcopy(towers).requires_grad_(False)
        self.match_head = nn.Linear(towers.text_projection.in_features, 2)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        for name in ("image_queue", "text_queue"):
            vectors = torch.randn(queue, towers.text_projection.out_features)
            self.register_buffer(name, F.normalize(vectors, dim=-1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))        # where the next row goes

    @torch.no_grad()
    def update_teacher(self) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.towers.parameters(), strict=True):
            slow.mul_(self.momentum).add_(fast, alpha=1 - self.momentum)        # (A7)

    @torch.no_grad()
    def enqueue(self, f: Tensor, g: Tensor) -> None:
        """(B, E) each; a queue is a ring, and its oldest rows go."""
        f, g = f[-len(self.image_queue):], g[-len(self.text_queue):]
        at = (self.place + torch.arange(len(f), device=f.device)) % len(self.image_queue)
        self.image_queue[at], self.text_queue[at] = f, g                        # (A8)
        self.place.copy_((self.place + len(f)) % len(self.image_queue))

    def match_logits(self, text: Tensor, picture: Tensor, mask: Tensor) -> Tensor:
        """(B, 2): does not match, matches."""
        return self.match_head(self.towers.fuse(text, picture, mask)[:, 0])

    def losses(self, pixels: Tensor, tokens: Tensor, mask: Tensor, masked: Tensor, labels: Tensor,
               alpha: float = 0.4, wrong: tuple[Tensor, Tensor] | None = None,
               gather: Callable[[Tensor], Tensor] = lambda x: x, number: int = 0) -> dict[str, Tensor]:
        """{"itc", "itm", "mlm"} of pairs (b): part `number` of the B that `gather` puts together.

        tokens, masked (the ids with masked words), labels (b, T), mask bool. wrong = (the pictures V⁻, the
        texts T⁻) as rows of the B fixes (A5). `entering` keeps f' and g' of all for the queues.
        """
        tau = self.temperature
        picture, text = self.towers.picture(pixels), self.towers.text(tokens, mask)
        with torch.no_grad():
            picture_t = self.teacher.picture(pixels)
            vectors = self.teacher.embed(picture_t, self.teacher.text(tokens, mask))            # f', g'
            self.entering = tuple(map(gather, vectors))
            columns = [torch.cat((new, queue)) for new, queue in
                       zip(self.entering[::-1], (self.text_queue, self.image_queue))]
        B, own = len(self.entering[0]), torch.arange(len(tokens), device=tokens.device) + number * len(tokens)
        itc, s = 0.0, []
        for online, slow, column in zip(self.towers.embed(picture, text), vectors, columns):
            s.append(online @ column.T / tau)                                   # (b, B + K)    (A2)
            target = alpha * (slow @ column.T / tau.detach()).softmax(1)
            target = target + (1 - alpha) * F.one_hot(own, target.shape[1])
            itc = itc - (target * s[-1].log_softmax(1)).sum(1).mean() / 2       #               (A3)
        if wrong is None:
            wrong = [hard_negatives(gather(x[:, :B].detach()), gather) for x in s[::-1]]        # (A5)
        i, y = torch.cat((own, wrong[0][own], own)), torch.cat((own, own, wrong[1][own]))
        match = self.match_logits(gather(text)[y], gather(picture)[i], gather(mask)[y])
        itm = F.cross_entropy(match, (i == y).long())                           #               (A4)
        chosen = labels != IGNORE
        logits = self.towers.word_logits(picture, masked, mask)[chosen]
        with torch.no_grad():
            soft = self.teacher.word_logits(picture_t, masked, mask)[chosen].softmax(-1)
        mlm = ((1 - alpha) * F.cross_entropy(logits, labels[chosen], reduction="sum")
               - alpha * (soft * logits.log_softmax(-1)).sum()) / mean_count(chosen.sum(), gather)      # (A6)
        return {"itc": itc, "itm": itm, "mlm": mlm}


RECIPES = {
    name: Recipe(
        f"ALBEF (2107.07651v2): {summary}", "14.1M pictures with captions, 30 epochs",
        Numbers(1e-4, 512, 826000, 1000, weight_decay=0.02, beta2=0.999, clip=0, floor=0.1),
        Numbers(5e-4, 32, 500, weight_decay=0.02), trained=("towers", "match_head"), task=name)
    for name, summary in (
        ("albef", "contrast, then fusion: matching and masked words; a slow copy teaches"),
        ("albef-fused", "matching and masked words, without a contrast ahead of them"),
        ("albef-easy", "matching is asked about the next row's picture and text"),
        ("albef-untaught", "no slow copy teaches"))}
