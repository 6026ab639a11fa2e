"""The training of FLAVA (flava.py): a batch of pairs, one of pictures alone, one of texts alone, and again.

The codes of (V1) and (V4) are those of a tokenizer of pictures (papers/vq.py, dvae.py). It reads the picture
so small that it gives one code for each of the ViT's patches: half the side here, as in the paper (112 of 224
pixels). The paper's three kinds are three data sets; here they are one, read without its other half.

    step 3n      (V3), (V4), (V5)     half of the pictures beside the text of another item, for (V5)
    step 3n + 1  (V1)
    step 3n + 2  (V2)

A head that a step does not use has gradient 0, not none: AdamW's means go on, and processes agree on what
there is to average.

The miniature asks what of this a pair needs (the paper's Table 3): recipe `flava-contrast` has (V3) alone,
`flava-pairs` no pictures or texts alone, `flava-local` a contrast of each half of the batch: what two
processes compute that do not gather.                                    python train.py --recipe flava
"""
from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

import data
from model import IGNORE, ViT, ViTConfig
from papers.albef_task import AlignTask
from papers.flava import Flava
from papers.masked import SPECIAL, init_bert
from papers.recipe import Ingredients
from papers.scene_reader import UNIT
from papers.short import block_mask

KINDS = ("pairs", "pictures", "texts")
TOY_VIT = ViTConfig(image_size=48, patch=8, width=128, layers=4, heads=4, hidden=512, act="gelu",
                    norm_eps=1e-12, pre_norm=False, patch_bias=True)


class FlavaTask(AlignTask):
    """Recipe `flava-2`: (V6). Takes tokenizer and images (a trained tokenizer of pictures)."""
    kinds, losses, local = KINDS, ("contrast", "itm", "mmm_image", "mmm_text"), False

    def __init__(self, given: Ingredients):
        given.vit, std = ViT(TOY_VIT), TOY_VIT.width**-0.5
        init_bert(given.vit, std)
        nn.init.normal_(given.vit.positions, std=0.5)           # see papers/clip.py
        super().__init__(given)
        V, K = self.words + SPECIAL, len(given.images.codes)
        self.module = Flava(given.vit, V, K, layers=4, heads=4, hidden=512, fusion=2, fusion_hidden=512,
                            positions=self.context, joint=64, std=std).to(given.device)
        guess = math.log(given.batch) + math.log(2) + math.log(K) + math.log(V)
        self.expect = (f"(uniform guesses: contrast ln {given.batch} + matching ln 2 + codes ln {K} + words "
                       f"ln {V} = {guess:.2f})")

    # the batch

    def piece(self, items: list[data.Item], seed: tuple[int, ...], paired: bool = True) -> dict:
        """And hidden (B, N) bool, codes (B, N)."""
        side = self.module.vit.config.side
        rng = np.random.default_rng((*seed, len(KINDS)))
        hidden = [block_mask(side, rng, share=75 / 196, least=4).flatten() for _ in items]
        small = data.to_pixels([item.image for item in items], side * self.given.images.config.patch, UNIT)
        codes = self.given.images.encode(small.to(self.given.device)).cpu()
        masks = dict(hidden=torch.from_numpy(np.stack(hidden)), codes=codes)
        return super().piece(items, seed, paired) | masks

    def row(self, i: int, seed: tuple[int, ...]) -> dict:
        """A picture with its own text, or in half of the cases with one outside the batch; match says which.

        One inside would be the right text of another row's picture, which (V3) would count as wrong.
        """
        item, match = self.world.item(i), bool(np.random.default_rng((*seed, 0)).random() < 0.5)
        text = item if match else self.world.item(i + self.given.batch)
        return self.piece([replace(item, captions=text.captions)], seed) | {"match": torch.tensor([match])}

    def batch(self, step: int) -> list[dict]:
        return [piece | {"kind": self.kinds[step % len(self.kinds)]} for piece in super().batch(step)]

    # the losses

    def loss(self, kind: str, pixels: Tensor, hidden: Tensor, codes: Tensor, tokens: Tensor, masked: Tensor,
             labels: Tensor, mask: Tensor, match: Tensor, **_) -> Tensor:
        model, (number, _), gather = self.module, self.given.part, self.given.gather
        if kind == "pictures":
            self.last = {"mim": model.image_loss(pixels, hidden, codes, gather)}
        elif kind == "texts":
            self.last = {"mlm": model.text_loss(masked, labels, mask, gather)}
        else:
            pairs = (pixels, hidden, codes, tokens, masked, labels, mask, match)
            found = self.local_losses(pairs) if self.local else model.pair_losses(*pairs, number, gather)
            self.last = {name: found[name] for name in self.losses}
        unused = sum(p.sum() for p in model.parameters() if p.requires_grad)
        return sum(self.last.values()) + 0 * unused                             #               (V6)

    def local_losses(self, pairs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Their mean over both halves of the batch; of two processes each has its half."""
        halves = 2 // min(2, self.given.part[1])
        parts = [self.module.pair_losses(*half) for half in zip(*(x.chunk(halves) for x in pairs))]
        return {name: sum(part[name] for part in parts) / halves for name in self.losses}

    def after_step(self) -> None:
        with torch.no_grad():
            self.module.logit_scale.clamp_(0, math.log(100))

    # what is measured

    def word_logits(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        image = self.module.image(pixels)
        joined = self.module.join(image, self.module.text(tokens, mask), mask)
        return self.module.mmm_text_head(joined[:, 1 + image.shape[1]:])

    def match_scores(self, piece: dict) -> Tensor:
        model, mask = self.module, piece["mask"]
        image, text = model.image(piece["pixels"][piece["other"]]), model.text(piece["tokens"], mask)
        no, yes = model.match_logits(model.join(image, text, mask)).T
        return yes - no

    def embed(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.module.embed(self.module.image(pixels), self.module.text(tokens, mask))

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """And of up to 100 held-out items: codes of hidden patches named right from the picture alone, beside
        the commonest code; masked words from the text alone."""
        g, model = self.given, self.module
        items = [item for item in g.take_items(g.open_held_out(), 100) if item.captions]
        piece, = self.to_device([self.piece(items, (g.seed, 3), paired=False)])
        hidden, chosen = piece["hidden"], piece["labels"] != IGNORE
        patches = model.vit.post_norm(model.image(piece["pixels"], hidden))[:, 1:][hidden]
        words = model.text_norm(model.text(piece["masked"], piece["mask"]))[chosen]
        codes = piece["codes"][hidden]
        named = {"of codes, picture alone": model.mim_head(patches).argmax(-1) == codes,
                 "of codes, the commonest": codes == codes.mode().values,
                 "of words, text alone": model.mlm_head(words).argmax(-1) == piece["labels"][chosen]}
        return super().check() | {name: right.float().mean().item() for name, right in named.items()}


ARMS = {"flava-2": {}, "flava-pairs": {"kinds": KINDS[:1]},
        "flava-contrast": {"kinds": KINDS[:1], "losses": ("contrast",)},
        "flava-local": {"kinds": KINDS[:1], "local": True}}
TASKS = {name: type(name, (FlavaTask,), change) for name, change in ARMS.items()}
