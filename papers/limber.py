"""LiMBeR (2209.15162v3): ONE linear map between two frozen models, and a question to three vision encoders.

Document 1 has it as a row of a table: LiMBeR-CLIP trains 12.6M parameters on 3.3M pairs and has 33.33 on
VQAv2 without an example, 40.34 with four. The row says that a linear map is enough. The paper's question is
another one: which encoders make it enough. So it maps three of them, with more and more language in their
training: BEiT saw none, NF-ResNet-50 the names of classes, CLIP sentences.

    symbol   shape          here       meaning
    Z        (ΣM, N, Di)    visual     cells of the encoder's grid, or N = 1 pooled vector (reads = "pooled")
    W        (sD, Di)       map        all that learns; encoder and decoder (GPT-J) are frozen
    H_v      (ΣM, Ns, D)    return     s soft tokens per cell; s = 1 on a grid

    (B1)  H_v = Drop_0.1(reshape(W Z + b, (N s, D)))              the index of the token is the slow one

Paper and published code differ in one thing: the paper's map is linear, the code has dropout behind it. Its
ancestor, MAGMA's prefix, has a LayerNorm there, too; LiMBeR switches it off. The cells of CLIP are those of
RN50x16 ahead of its attention pooling, (144, 3072); BEiT-L gives 196 without its class token; NF-ResNet-50
one pooled vector, (1, 2048). In the published code, a loader for the trained NF-ResNet-50 gives the random
one.

The claim: the three encoders transfer what a thing LOOKS like (colour, size) about equally; language in
their training helps with what it IS (its category). In miniature: this bridge over three ViTs of one size,
one trained on captions (the bundled one), and two that (B2) and (B3) train, on names of shapes and on no word
at all; size, colour and shape in the captions, apart. Expected: shapes captions > names > none, colours and
sizes about equal. Of the paper's numbers for it our sources have the direction alone; VQAv2 33.33 is CLIP's.

    (B2)  names:   L = −mean log softmax(A z_c)_shape             z_c: the last state at the cell c of a thing
    (B3)  pixels:  L = mean (A z_c − x_c)²                        x_c: the pixels of c, any cell

    python train.py --recipe limber-names && python train.py --bridge limber --init out/limber-names-shapes
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from bridges import Linear
from model import IGNORE, DecoderConfig, ViT, ViTConfig
from papers.linear_probe import linear_probe
from papers.recipe import Ingredients, Numbers, Recipe, Task


class Limber(Linear):
    """12,587,008 parameters from CLIP RN50x16 (Di 3072) to GPT-J (D 4096): document 1's 12.6M."""
    name = "limber"

    def __init__(self, decoder: DecoderConfig, vision_width: int, tokens: int = 1, dropout: float = 0.1):
        super().__init__(replace(decoder, width=tokens * decoder.width), vision_width)
        self.tokens, self.dropout = tokens, dropout

    def prefix(self, visual: Tensor) -> Tensor:
        y = super().prefix(visual)                                              # (ΣM, N, s·D)
        y = y.unflatten(-1, (self.tokens, -1)).flatten(1, 2)                    # (ΣM, N·s, D)
        return F.dropout(y, self.dropout, self.training)                        #               (B1)


class NamesTask(Task):
    """Recipe `limber-names`: a new ViT learns the name of the shape in each cell. Takes batch."""
    answers = len(data.SHAPES)      # numbers that A makes of a token
    expect = "(a uniform guess: ln 6 = 1.79)"

    def __init__(self, given: Ingredients):
        self.given, self.world = given, data.Shapes(seed=given.seed)
        vit = ViT(ViTConfig(image_size=self.world.size))
        nn.init.normal_(vit.positions, std=0.5)                                 # see papers/clip.py
        head = nn.Linear(vit.config.width, self.answers)                        # A
        self.module = nn.ModuleDict({"vit": vit, "head": head}).to(given.device)

    def batch(self, step: int) -> list[dict]:
        """tokens (B, 9): the number of a cell's shape, IGNORE where it is empty."""
        B = self.given.batch
        images, names = [], torch.full((B, 9), IGNORE)
        for row, i in zip(names, range(step * B, (step + 1) * B)):
            rng = self.world.rng(i)
            things = self.world.scene(rng)
            images.append(data.draw_scene(things, rng))
            for t in things:
                row[t.cell] = data.SHAPES.index(t.shape)
        pixels = data.to_pixels(images, self.world.size)
        return [dict(pixels=pixels, tokens=names, set=0, weight=1.0, count=1)]

    def answer(self, pixels: Tensor) -> Tensor:
        """A z_c of every cell: (B, 9, answers)."""
        return self.module["head"](self.module["vit"](pixels)[:, 1:])

    def loss(self, pixels: Tensor, tokens: Tensor, **_) -> Tensor:
        y = self.answer(pixels)
        return F.cross_entropy(y.flatten(0, 1), tokens.flatten(), ignore_index=IGNORE)          #     (B2)

    def report(self, out: Path) -> dict[str, dict]:
        result = linear_probe(self.module["vit"], train=1000, test=500)
        scores = "  ".join(f"{k} {100 * v:.1f}" for k, v in result.items())
        print(f"probe    one token at layer -2, held-out pairs, %: {scores}")
        return {"vit/probe.json": result}


class PixelsTask(NamesTask):
    """Recipe `limber-pixels`: a new ViT learns to give the pixels of each patch back. Takes batch."""
    answers, expect = 3 * data.CELL**2, ""

    def loss(self, pixels: Tensor, **_) -> Tensor:
        patches = F.unfold(pixels, data.CELL, stride=data.CELL).transpose(1, 2)                 # (B, 9, 768)
        return F.mse_loss(self.answer(pixels), patches)                                         #     (B3)


TASKS = {"names": NamesTask, "pixels": PixelsTask}
VIT = dict(paper=None, toy=Numbers(1.5e-3, 64, 1000, weight_decay=0.05), trained=("vit", "head"))
# 2,048 pairs per update follow from the published settings. Their decay ends at step 300,000, which is as
# good as none in 15,000 steps; which schedule the released runs had is unknown.
RECIPES = {
    "limber": Recipe(
        "LiMBeR (2209.15162v3): a linear map learns from captions, both towers are frozen",
        "CC3M, 3.3M pairs", Numbers(8e-4, 2048, 15000, 100, "constant", 0.0, 0.95), Numbers(6e-3, 64, 1600),
        "limber", options=dict(reads=-2)),
    "limber-names": Recipe(
        "LiMBeR's classifier in miniature: a ViT learns names of shapes", "NF-ResNet-50 as published",
        task="names", **VIT),
    "limber-pixels": Recipe(
        "LiMBeR's encoder without language in miniature: a ViT learns pixels", "BEiT-L as published",
        task="pixels", **VIT),
}
