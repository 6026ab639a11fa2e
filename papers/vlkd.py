"""VLKD (2203.06386v2): a language model learns CLIP's text space, and CLIP's picture stands for a text.

Document 1 has it among those that fine-tune the whole language model: 406M parameters trained on CC3M, COCO
BLEU-4 18.2 and CIDEr 61.1, VQAv2 38.6 and OK-VQA 10.5 without an example. 406M is BART-large whole: two
matrices are all that is added. The abstract's 44.5 on VQAv2 belongs to its best CLIP, 38.6 to another.

CLIP has learned that a picture and its caption are the same vector. If the language model's own sentence
vector is taught to be CLIP's text vector (K1, K2), CLIP's picture vector is one that it knows, and a little
captioning (K3) is enough to write from it.

    symbol    shape      here          meaning
    t         (B, De)    t             CLIP's vector of a caption, of length 1; CLIP is frozen
    v         (B, De)    visual        CLIP's vector of its picture, of length 1: unit(P z), P is CLIP's own
    s         (B, D)     hidden        the language model's sentence vector: here the last state of the
                                       caption's last token, in the paper a state of BART's encoder
    W         (De, D)    text_head     into CLIP's space
    W'        (D, De)    map           out of it, into one word for the decoder: K = 1
    τ         ()         scale         CLIP's own factor of the cosine

    (K1)  TTDM = mean ‖W s − t‖²                                text-text distance minimisation
    (K2)  ITCL = ½ (CE(τ V Sᵀ) + CE(τ S Vᵀ)),  S = unit(W s)     image-text contrastive learning
    (K3)  ICTI = −mean log p(words | W' v)                      image-conditioned text infilling
    (K4)  loss = ICTI + TTDM + ITCL

By hand: t = (1,0), (0,1) and W s = (.6,.8), (0,1) have TTDM .8 and 0, mean .4; V = (.8,.6), (.6,.8) against
t in the place of S, with τ = 1, have ITCL ln(1 + e^−.2) = .5981.

No code is published. Our sources name the losses in words, so the forms of (K1) and (K2) and their weights
are a reading. The paper's (K3) masks words of the caption and puts W' v among the outputs of BART's encoder.
A decoder alone has no masked input: here (K3) is the caption's loss, W' v one word in the picture's place.
That word enters at the BOTTOM, while (K1) and (K2) align a state at the TOP. In the paper that state is what
the decoder reads; here nothing reads it.

The claim: with all three it answers questions without having seen one (its best model: COCO CIDEr 84.6). In
miniature: (K3) alone, with (K1), with (K2), with both; answers after captions alone, and the loss of text,
because the decoder learns and may forget.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import CAPTION, Document, Item, collate
from model import Bridge, DecoderConfig, ImagePositions
from papers.clip import text_tokens
from papers.contrasts import clip_loss, mean_count
from papers.recipe import Ingredients, Numbers, Recipe, Task


def distance(projected: Tensor, t: Tensor) -> Tensor:
    """(K1). W s and t, (B, De) each."""
    return (projected - t).square().sum(-1).mean()                              #               (K1)


def contrast(projected: Tensor, v: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """(K2). W s and v, (B, De) each; v has length 1."""
    S = scale * v @ F.normalize(projected, dim=-1).T                            # (B pictures, B texts)
    return clip_loss(S)                                                         #               (K2)


class Vlkd(Bridge):
    """W, W' and CLIP's projection P, which is frozen. distance, contrast: weights of (K1) and (K2)."""
    name, soft_tokens, reads = "vlkd", True, "pooled"

    def __init__(self, decoder: DecoderConfig, vision_width: int, joint: int = 512, distance: float = 1.0,
                 contrast: float = 1.0):
        super().__init__()
        self.weights = {"distance": distance, "contrast": contrast}
        self.project = nn.Linear(vision_width, joint, bias=False)               # P
        self.map = nn.Linear(joint, decoder.width)                              # W'
        self.text_head = nn.Linear(decoder.width, joint, bias=False)            # W
        nn.init.normal_(self.text_head.weight, std=0.01)        # W s begins about as long as t: (K1) is small
        nn.init.normal_(self.map.weight, std=0.37)              # W' v begins as large as the toy's words
        self.requires_grad_()

    def requires_grad_(self, requires_grad: bool = True) -> Vlkd:
        super().requires_grad_(requires_grad)
        self.project.requires_grad_(False)                                      # CLIP's own
        return self

    def see(self, features: Tensor, where: ImagePositions | None = None) -> Tensor:
        return F.normalize(self.project(features[:, 0]), dim=-1)                # (ΣM, De)      v

    def prefix(self, visual: Tensor) -> Tensor:
        return self.map(visual)[:, None]                                        # (ΣM, 1, D)    W' v


class VlkdTask(Task):
    """(K4): what VLKD changes of train.py's answer task, in front of which this class stands.

    Takes clip, of which the ViT is one half.
    """

    def __init__(self, given: Ingredients, *others):
        super().__init__(given, *others)
        self.clip, project = given.clip.clip.requires_grad_(False), self.module.bridge.project
        theirs = self.clip.image_projection.weight
        if project.weight.shape != theirs.shape:
            raise ValueError(f"its vectors have {len(theirs)} numbers, the bridge's {len(project.weight)}; "
                             f"give --option joint={len(theirs)}.")
        with torch.no_grad():
            project.weight.copy_(theirs)

    def piece(self, pairs: list[tuple[Document, Item]], m: int, weight: float) -> dict:
        captions, c = [item.captions[0] for _, item in pairs], self.given.clip
        text, _, text_mask = collate([Document(self.tokenizer).add(f"{CAPTION} {t}") for t in captions])
        clip_text = text_tokens(captions, c.tokenizer, self.clip.text.config.context, c.begin)
        return super().piece(pairs, m, weight) | dict(text=text, text_mask=text_mask, clip_text=clip_text)

    def loss(self, tokens: Tensor, labels: Tensor, mask: Tensor | None, features: Tensor, text: Tensor,
             text_mask: Tensor, clip_text: Tensor, count: int, **_) -> Tensor:
        vlm, bridge, gather = self.module, self.module.bridge, self.given.gather
        n = mean_count(torch.tensor(count, device=tokens.device), gather)
        self.last = {"caption": vlm.loss(tokens, labels, None, mask, features)[0] / n}          # (K3)
        if any(bridge.weights.values()):
            hidden = vlm.decoder.states(text, text_mask)[-1]
            last = text_mask.sum(1) - 1
            projected = bridge.text_head(hidden[torch.arange(len(last), device=last.device), last]).float()
            with torch.no_grad():
                t, v = self.clip.embed_texts(clip_text).float(), bridge.see(features).float()
            self.last |= {"distance": distance(projected, t),
                          "contrast": contrast(gather(projected), gather(v), self.clip.logit_scale.exp())}
        weights = {"caption": 1.0, **bridge.weights}
        return n * sum(weights[name] * value for name, value in self.last.items())              # (K4)


RECIPES = {"vlkd": Recipe(
    "VLKD (2203.06386v2): the decoder learns CLIP's text space, and to write from CLIP's pictures",
    "CC3M; the paper's numbers are not in our sources, here stand ClipCap's",
    Numbers(2e-5, 40, 150_000, 5000, "linear", 0.0, 0.999, 0), Numbers(1e-3, 64, 600), "vlkd",
    ("bridge", "decoder"), task="vlkd", options=dict(joint=128), captions=1.0)}
