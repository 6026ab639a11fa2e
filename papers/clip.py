"""papers/clip.py: CLIP (2103.00020v1): two towers and a contrast."""
from __future__ import annotations

from typing import TYPE_CHECKING
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import data
from model import EncoderBlock, ViT, ViTConfig
from papers.recipe import Recipe, Task

if TYPE_CHECKING:
    from support.plumbing.ranks import Ranks
    from train import Settings


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 512       # V
    width: int = 128
    layers: int = 2
    heads: int = 4
    hidden: int = 512
    context: int = 77           # longest text in tokens
    act: str = "quick_gelu"
    norm_eps: float = 1e-5
    end: int | None = None      # id of the end-of-text token; None = the largest id of each row


class TextTransformer(nn.Module):
    """CLIP's text tower: a causal pre-norm transformer whose state at the end-of-text token stands for the text."""

    def __init__(self, config: TextConfig):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.positions = nn.Parameter(torch.randn(c.context, c.width) * 0.01)
        self.blocks = nn.ModuleList(EncoderBlock(c.width, c.heads, c.hidden, c.act, c.norm_eps) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        nn.init.normal_(self.embed.weight, 0.0, 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, width), after the final norm. Padding follows the end token, so causality hides it."""
        x = self.embed(tokens) + self.positions[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        return self.norm(x)

    def pool(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(B, width): the state at the FIRST end-of-text token."""
        at = tokens.argmax(-1) if self.config.end is None else (tokens == self.config.end).int().argmax(-1)
        return x[torch.arange(len(x), device=x.device), at]


class CLIP(nn.Module):
    """Two towers and a temperature (2103.00020v1, Figure 3); the loss stands in train.ClipTask.

    (I3)  S_ij = e^s cos(image_i, text_j)
    (I4)  loss = ½ (mean_i −log softmax_j(S_i·)_i + mean_j −log softmax_i(S_·j)_j)
    """

    def __init__(self, vit: ViT, text: TextTransformer, width: int):
        super().__init__()
        self.vit, self.text = vit, text
        self.image_projection = nn.Linear(vit.config.width, width, bias=False)
        self.text_projection = nn.Linear(text.config.width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))       # s; logits are e^s · cosine

    def embed_images(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.image_projection(self.vit.pool(self.vit(pixels))), dim=-1)          # (B, width)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text_projection(self.text.pool(self.text(tokens), tokens)), dim=-1)  # (B, width)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """(B_images, B_texts): scaled cosine similarities."""
        return self.logit_scale.exp() * self.embed_images(pixels) @ self.embed_texts(tokens).T      # (I3)


class ClipTask(Task):
    """Recipe `clip`: CLIP's symmetric contrast (2103.00020v1, Figure 3), with hard negative captions beside the batch's own."""

    def __init__(self, s: Settings, recipe: Recipe, ranks: Ranks):
        from support.formats.tokenizer_files import load_tokenizer
        from support.plumbing.ranks import require_one_process
        from support.worlds import open_data
        from support.worlds.text import shapes_tokenizer
        from train import resolve_folder
        require_one_process(ranks, s)
        self.s, self.device = s, ranks.device
        self.world = open_data(s.data, s.seed, s.strict, s.share / 100)
        self.tokenizer = shapes_tokenizer() if s.data.startswith("shapes") else load_tokenizer(resolve_folder(s.lm))
        size = self.world.size
        vit = ViT(ViTConfig(image_size=size))
        nn.init.normal_(vit.positions, std=0.5)         # at CLIP's 0.01 the patches forget where they are: 0.2 % of their variance,
                                                        # a probe finds the cell of 25 %, and every bridge fails on "where is …?"
        text = TextTransformer(TextConfig(self.tokenizer.vocab_size, context=64, end=self.tokenizer.eos))
        self.module = CLIP(vit, text, width=128).to(self.device)
        self.expect = f"(a uniform guess: (ln {3 * s.batch} + ln {s.batch})/2 = {(math.log(3 * s.batch) + math.log(s.batch)) / 2:.2f})"

    def freeze(self, learning, stored) -> None:
        pass

    def read(self, step: int) -> list[dict]:
        images, texts, negatives = [], [], []
        for i in range(step * self.s.batch, (step + 1) * self.s.batch):
            image, text, wrong = self.world.pair(i)
            images.append(image)
            texts.append(text)
            negatives += wrong
        pixels = data.to_pixels(images, self.module.vit.config.image_size)
        limit = self.module.text.config.context - 1
        ids = [self.tokenizer.encode(t)[:limit] + [self.tokenizer.eos] for t in texts + negatives]
        tokens = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
        for row, t in zip(tokens, ids):
            row[:len(t)] = torch.tensor(t)
        return [dict(pixels=pixels, tokens=tokens, set=0, weight=1.0, count=1)]

    def loss(self, pixels: Tensor, tokens: Tensor, **_) -> Tensor:
        """½ (CE over the texts of each image + CE over the images of each true text); the hard negatives only add texts."""
        S = self.module(pixels, tokens).float()                                 # (B, B + negatives)
        target = torch.arange(len(S), device=S.device)
        return (F.cross_entropy(S, target) + F.cross_entropy(S[:, :len(S)].T, target)) / 2      # (I4)

    def after_step(self) -> None:
        with torch.no_grad():
            self.module.logit_scale.clamp_(max=math.log(100))                   # CLIP §2.5: logits scaled by at most 100

    def vitals(self) -> dict:
        return {"scale": self.module.logit_scale.exp().item()}

    def save(self, out: Path, facts: dict) -> None:
        from support.formats.files import write_json
        from support.formats.vision import save_vit
        save_vit(self.module.vit, out / "vit")
        write_json(out / "config.json", facts)

    def check(self) -> dict:
        from support.lab.probe import linear_probe
        return linear_probe(self.module.vit, train=1000, test=500) if self.world.name == "shapes" else {}

    def report(self, out: Path) -> None:
        """The gate: one token at the layer that bridges read names colour, shape and place of a held-out pair above 95 %."""
        from support.formats.files import write_json
        from support.lab.probe import linear_probe
        if self.world.name != "shapes":
            return
        result = linear_probe(self.module.vit)
        write_json(out / "vit" / "probe.json", result)
        print("probe    one token at layer -2, held-out pairs, %: " + "  ".join(f"{k} {100 * v:.1f}" for k, v in result.items()))
        worst = min(result[k] for k in ("color", "shape", "place"))
        print(f"gate     {'PASSED' if worst > 0.95 else 'NOT PASSED'}: the lowest of colour, shape and place is {100 * worst:.1f} %, the gate is 95 %")
