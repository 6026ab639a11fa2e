"""ViLT (2102.03334v2): words and raw patches in ONE stream. No detector, no CNN: a ViT that also reads words.

    symbol     shape          here       meaning
    t          (B, T)         tokens     [CLS] words [SEP], at most 40
    v          (B, P+1, D)    vit.embed  a class token v_cls and P patches of 32 × 32 pixels
    t_type     (2, D)         modality   row 0 for words, row 1 for patches
    C, T*      (B, T, P), (B, P, T)   cost, plan   word-patch cost; how much of each patch goes to each word

    (H1)  t̄ = LN(E_t + position + segment),   v̄ = [v_cls; V patches] + position
    (H2)  z^0 = [t̄ + t_type_0 ; v̄ + t_type_1];  then the ViT's D pre-norm blocks and its last LayerNorm
    (H3)  p = tanh(W z^D_0)                                  z^D_0: the first WORD's state, [CLS]
    (H4)  L_itm = CE(W_itm p, 1 = the picture is the text's, 0 = swapped, with probability ½)
    (H5)  C = 1 − cos(z_word, z_patch);   A = exp(−C/β),   T ← 1,   σ ← 1/n;   50 times:
          Q = A ⊙ T;   δ = 1 / (m Q σ);   σ = 1 / (n Qᵀ δ);   T = diag(δ) Q diag(σ)
    (H6)  L_wpa = 0.1 · (Σ_matching ⟨C, T*⟩ − Σ_others ⟨C, T*⟩) / B,   T* constant, β = 0.5
    (H7)  L = L_itm + L_wpa + L_mlm

Document 3 asks two things. *What does the pooling layer do?* It is (H3): one matrix and a tanh on the state
of the first word make the vector of the PAIR, which every head reads. Nothing is averaged and v_cls is not
read: by the last block, [CLS] has seen words and patches. *How is word-patch alignment trained without
labels?* The transport plan is the label. (H5) computes, from the model's own cosines and without a gradient,
the cheapest way to carry the mass of m patches (1/m each) to n words (1/n each); (H6) then lowers the cost of
that plan where text and picture belong together and raises it where they do not. That they belong together is
the only label. [CLS], [SEP], v_cls and padding carry no mass. IPOT (1802.04307) is exact in the limit for any
β: the plan enters its own kernel. Sinkhorn's, with A alone, would stay blurred.

Paper and code: words pass a LayerNorm before t_type comes, patches do not. The paper masks whole words, the
code's default does not. The MLM matrix is a parameter of its own in the authors' files (`tied=False`);
transformers 5 ties it to E, and shuffles patches, which changes nothing but their order. Positions of other
sizes are bilinear with aligned corners; of large pictures 200 patches are drawn in training (not here). A
head for ranking begins as row 1 of W_itm. Masking patches (MPP) was tried and gained nothing.

ViT-B/32 from ImageNet; the words from N(0, 0.02), not BERT's. 111,595,008 parameters without heads; the
paper's 87.4M are the ViT alone. The toy begins with the bundled ViT. The claim: 15 ms in the place of
900 ms, and a longer training still helps (100k → 200k steps: VQA 70.33 → 71.26, zero-shot text R@1 on
Flickr30k 69.7 → 73.2). In miniature: with word-patch alignment and without.
"""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from model import IGNORE, ViT, visible_to_bias
from papers.masked import PairsTask, WordEmbedding, WordHead, embedding, init_bert, word_loss
from papers.recipe import Ingredients, Numbers, Recipe


class PatchViT(ViT):
    """A ViT whose positions are resized as ViLT's."""

    def positions_for(self, rows: int, columns: int) -> Tensor:
        first, side = self.config.first, self.config.side
        grid = self.positions[first:].T.reshape(1, -1, side, side)
        grid = F.interpolate(grid, size=(rows, columns), mode="bilinear", align_corners=True)
        return torch.cat((self.positions[:first], grid[0].flatten(1).T))


class ViLT(nn.Module):
    """match: 2 classes of (H4), or 1 score for ranking."""

    def __init__(self, vit: ViT, vocab_size: int = 30522, positions: int = 40, tied: bool = False,
                 match: int = 2):
        super().__init__()
        width = vit.config.width
        self.vit, self.modality = vit, embedding(2, width)
        self.text = WordEmbedding(vocab_size, width, positions)
        self.pooler, self.match_head = nn.Linear(width, width), nn.Linear(width, match)
        self.word_head = WordHead(width, vocab_size)
        self.word_matrix = None if tied else embedding(vocab_size, width)
        for part in (self.pooler, self.match_head, self.word_head):
            init_bert(part)

    def forward(self, tokens: Tensor, pixels: Tensor, mask: Tensor | None = None,
                segments: Tensor | None = None) -> list[Tensor]:
        """z^0 … z^D (B, T+1+P, D), words first, ahead of the last norm; mask (B, T) bool, False = padding."""
        t = self.text(tokens, segments) + self.modality.weight[0]
        v = self.vit.embed(pixels) + self.modality.weight[1]                    # (H1)
        hidden, bias = [torch.cat((t, v), dim=1)], None                         # (H2)
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(v.shape[:2])), dim=1)
            bias = visible_to_bias(mask[:, None, None], v.dtype)
        for block in self.vit.blocks:
            hidden.append(block(hidden[-1], bias=bias))
        return hidden

    def states(self, *inputs: Tensor) -> Tensor:                    # behind the last norm
        return self.vit.post_norm(self(*inputs)[-1])

    def pool(self, z: Tensor) -> Tensor:
        return self.pooler(z[:, 0]).tanh()                                      # (H3)

    def word_logits(self, z: Tensor) -> Tensor:
        return self.word_head(z, (self.word_matrix or self.text.words).weight)


def transport_cost(words: Tensor, patches: Tensor, real: Tensor) -> Tensor:
    """(B, T, D), (B, P, D), real (B, T, P) bool → the cost (B, T, P), 0 at what is left out."""
    cosine = F.normalize(words, dim=-1, eps=1e-5) @ F.normalize(patches, dim=-1, eps=1e-5).mT
    return (1 - cosine) * real


@torch.no_grad()
def transport_plan(cost: Tensor, words: Tensor, patches: Tensor, beta: float = 0.5,
                   steps: int = 50) -> Tensor:
    """cost (B, T, P); words (B, T), patches (B, P) bool: what carries mass → the plan (B, P, T)."""
    real = (patches[:, :, None] & words[:, None]).to(cost)                      # (B, P, T)
    n, m = (x.sum(1)[:, None, None].clamp(min=1) for x in (words, patches))
    no_word, no_patch = (~words)[..., None].to(cost), (~patches)[..., None].to(cost)        # against 1/0
    A, plan, sigma = (-cost.mT / beta).exp() * real, real, (1 - no_word) / n    # sigma (B, T, 1)
    for _ in range(steps):
        Q = A * plan
        delta = 1 / (m * (Q @ sigma) + no_patch)                                # (B, P, 1)
        sigma = 1 / (n * (Q.mT @ delta) + no_word)
        plan = delta * Q * sigma.mT                                             # (H5)
    return plan


def alignment_loss(words: Tensor, patches: Tensor, real_words: Tensor, real_patches: Tensor,
                   match: Tensor) -> Tensor:
    """(H6); match (B,) bool."""
    with torch.autocast(words.device.type, enabled=False):          # 50 divisions want float32
        cost = transport_cost(words.float(), patches.float(), real_words[:, :, None] & real_patches[:, None])
        distance = (cost * transport_plan(cost.detach(), real_words, real_patches).mT).sum((1, 2))      # (B,)
    return 0.1 * (distance * (2 * match - 1)).sum() / len(match)


HOW = dict(data="COCO, VG, GCC, SBU: 4.0M pictures, 9.9M captions", trained=("vilt",),
           paper=Numbers(1e-4, 4096, 200000, 0.1, "linear", 0.01), toy=Numbers(1e-3, 32, 500, 0.1, "linear"))
RECIPES = {
    "vilt": Recipe("ViLT (2102.03334v2): patches and words in one stream; masked words, matching, "
                   "word-patch alignment", task="vilt", **HOW),
    "vilt-unaligned": Recipe("ViLT without word-patch alignment", task="vilt-unaligned", **HOW)}


class ViLTTask(PairsTask):
    """Recipe `vilt`: (H7), two passes a step: masked words with their picture, whole texts with (W6)'s."""
    alignment = 1.0                 # weight of (H6)

    def __init__(self, given: Ingredients):
        super().__init__(given)
        self.module = nn.ModuleDict({"vilt": ViLT(given.vit, self.vocab_size, self.context)}).to(given.device)
        given.begin(self.module)

    def loss(self, pixels: Tensor, tokens: Tensor, mask: Tensor, masked: Tensor, labels: Tensor,
             other: Tensor, **_) -> Tensor:
        vilt, chosen, T = self.module["vilt"], labels != IGNORE, tokens.shape[1]
        match = other == torch.arange(len(other), device=other.device)
        words = vilt.states(masked, pixels, mask)[:, :T]
        z = vilt.states(tokens, pixels[other], mask)
        patches = z[:, T + vilt.vit.config.first:]                              # without v_cls
        real = torch.ones_like(patches[..., 0], dtype=torch.bool)
        self.last = {"words": word_loss(vilt.word_logits(words[chosen]), labels[chosen]),
                     "pairs": F.cross_entropy(vilt.match_head(vilt.pool(z)), match.long()),
                     "alignment": alignment_loss(z[:, :T], patches, tokens < self.words, real, match)}
        return self.last["words"] + self.last["pairs"] + self.alignment * self.last["alignment"]       # (H7)

    def word_logits(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        vilt = self.module["vilt"]
        return vilt.word_logits(vilt.states(tokens, pixels, mask)[:, :tokens.shape[1]])

    def match_scores(self, piece: dict) -> Tensor:
        vilt = self.module["vilt"]
        z = vilt.states(piece["tokens"], piece["pixels"][piece["other"]], piece["mask"])
        return vilt.match_head(vilt.pool(z)) @ z.new_tensor([-1, 1])

    @torch.no_grad()
    def align(self, item: data.Item, caption: str) -> tuple[Tensor, float]:
        """The plan (P, n), how much of each patch goes to each word of the caption, and its distance."""
        g, ids = self.given, [self.cls, *self.tokenizer.encode(caption), self.sep]
        pixels = data.to_pixels([item.image], g.vit.config.image_size, g.processor).to(g.device)
        z = self.module["vilt"].states(torch.tensor([ids], device=g.device), pixels)
        words, patches = z[:, 1:len(ids) - 1], z[:, len(ids) + g.vit.config.first:]
        real = [torch.ones_like(x[..., 0], dtype=torch.bool) for x in (words, patches)]
        plan = transport_plan(cost := transport_cost(words, patches, real[0][0, 0]), *real)
        return plan[0], (cost.mT * plan).sum().item()

    def check(self) -> dict[str, float]:
        """Also, on shapes: words whose largest patch is their thing's, pictures nearer their caption (H5)."""
        result, hits, nearer, g = super().check(), [], [], self.given
        if not self.world.says_scenes or g.vit.config.side != 3:
            return result
        items = g.take_items(g.open_held_out(), min(100, g.eval_items))
        for item, other in zip(items, items[1:] + items[:1]):
            cells = [data.PLACES.index(" ".join(phrase.split()[-2:])) for phrase in item.about.split("; ")]
            caption, thing = item.captions[1], 0                                # in the order of `about`
            plan, distance = self.align(item, caption)
            nearer.append(distance < self.align(item, other.captions[1])[1])
            for patches, i in zip(plan.T, self.tokenizer.encode(caption)):
                word = self.tokenizer.decode([i]).strip()
                if word in (*data.COLORS, *data.SHAPES):
                    hits.append(int(patches.argmax()) == cells[thing])
                thing += word in data.COLUMNS                                   # the last word of a thing
        found = {"words on their cell, of 9": hits, "nearer than another's": nearer}
        return result | {name: float(np.mean(right)) for name, right in found.items()}


TASKS = {"vilt": ViLTTask, "vilt-unaligned": type("Unaligned", (ViLTTask,), {"alignment": 0.0})}
