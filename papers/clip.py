"""papers/clip.py: CLIP (2103.00020v1): two towers and a contrast.

Run      python train.py --recipe clip            makes the bundled ViT again and prints its gate
         python train.py --recipe clip-text       a text tower for a ViT: weights/clip-text after 300 steps
Content  TextTransformer, CLIP                    the model
         ClipTask, RECIPES                        the training
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from model import EncoderBlock, ViT, ViTConfig
from papers.contrasts import clip_loss
from papers.linear_probe import linear_probe
from papers.naming import item_of_turn, report_naming
from papers.recipe import Ingredients, Numbers, Recipe, Task


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
    """CLIP's text tower: a pre-norm transformer, causal, read at the end-of-text token."""

    def __init__(self, config: TextConfig, causal: bool = True):
        super().__init__()
        c = self.config = config
        self.causal = causal
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.positions = nn.Parameter(torch.randn(c.context, c.width) * 0.01)
        self.blocks = nn.ModuleList(EncoderBlock(c.width, c.heads, c.hidden, c.act, c.norm_eps)
                                    for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        nn.init.normal_(self.embed.weight, 0.0, 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, width), after the final norm. Padding follows the end token: causality hides it."""
        self.check_length(tokens)
        x = self.embed(tokens) + self.positions[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x, self.causal)
        return self.norm(x)

    def check_length(self, tokens: Tensor) -> None:
        longest = self.config.context
        if tokens.shape[1] > longest:
            raise ValueError(f"a text of {tokens.shape[1]} tokens is longer than the {longest} that this "
                             "text tower reads; cut it.")

    def pool(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(B, width): the state at the FIRST end-of-text token."""
        at = tokens.argmax(-1) if self.config.end is None else (tokens == self.config.end).int().argmax(-1)
        return x[torch.arange(len(x), device=x.device), at]


class CLIP(nn.Module):
    """Two towers and a temperature (2103.00020v1, Figure 3); the loss stands in ClipTask.

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
        """(B, 3, S, S) → (B, width), of length 1."""
        return F.normalize(self.image_projection(self.vit.pool(self.vit(pixels))), dim=-1)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, width), of length 1."""
        return F.normalize(self.text_projection(self.text.pool(self.text(tokens), tokens)), dim=-1)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """(B_images, B_texts): scaled cosine similarities."""
        return self.logit_scale.exp() * self.embed_images(pixels) @ self.embed_texts(tokens).T      # (I3)


PICTURES = dict(width=160, heads=5, hidden=640)         # of a new ViT for pictures other than scenes
PAPER = Numbers(5e-4, 32768, 390000, 2000, weight_decay=0.2, clip=0)
RECIPES = {
    "clip": Recipe(
        "CLIP (2103.00020v1 §2): both towers, symmetric contrast", "400M pairs, 32 epochs", PAPER,
        Numbers(1.5e-3, 96, 2500, weight_decay=0.05), trained=("vit", "text"), task="clip"),
    "clip-text": Recipe(
        "LiT (2111.07991v3): a text tower learns beside a locked ViT, by CLIP's contrast",
        "pairs; LiT's numbers are not in our sources, here stand CLIP's", PAPER,
        Numbers(1.5e-3, 32, 1200, weight_decay=0.05), trained=("text", "image_projection", "text_projection"),
        task="clip-text", toy_data="shapes-phrases")}


def text_tokens(texts: list[str], tokenizer, longest: int, begin: tuple[int, ...] = (),
                pad: int = 0) -> Tensor:
    """(n, T) int64: each text's ids, cut to `longest` with the end token, and padding, which is not read."""
    rows = [[*begin, *tokenizer.encode(t)][:longest - 1] + [tokenizer.eos] for t in texts]
    tokens = torch.full((len(rows), max(map(len, rows))), pad)
    for row, ids in zip(tokens, rows):
        row[:len(ids)] = torch.tensor(ids)
    return tokens


class ClipTask(Task):
    """Recipe `clip`: CLIP's symmetric contrast; of scenes with hard negative captions beside the batch's own.

    Takes worlds (their items take turns), tokenizer, batch. Both towers are new and both learn, unless a ViT
    is given: recipe `clip-text` locks it, and what learns beside it is new.
    """
    splits = True

    def __init__(self, given: Ingredients):
        self.given, self.world, self.tokenizer = given, given.world, given.tokenizer
        self.locked, vit = given.vit is not None, given.vit
        if not self.locked:
            vit = ViT(ViTConfig(self.world.size, **({} if self.world.says_scenes else PICTURES)))
            # At CLIP's 0.01 the positions are 0.2 % of the patches' variance. A probe then finds the cell of
            # 25 % of the things, and every bridge fails on "where is …?".
            nn.init.normal_(vit.positions, std=0.5)
        text = TextTransformer(TextConfig(self.tokenizer.vocab_size, context=64, end=self.tokenizer.eos))
        self.module = (given.clip or CLIP(vit, text, width=128)).to(given.device)
        B = given.batch
        texts = 3 * B if self.world.says_scenes else B
        self.expect = f"(a uniform guess: (ln {texts} + ln {B})/2 = {math.log(texts * B) / 2:.2f})"

    def freeze(self, trained: tuple[str, ...], stored: torch.dtype) -> None:
        """A ViT that was given is locked; all else learns, the temperature too."""
        self.module.requires_grad_(True).vit.requires_grad_(not self.locked)

    def batch(self, step: int) -> list[dict]:
        images, texts, negatives = [], [], []
        for i in self.given.indices(step):
            image, text, wrong = self.given.contrastive_pair(*item_of_turn(self.given.worlds, i))
            images.append(image)
            texts.append(text)
            negatives += wrong if self.world.says_scenes else []    # of names the batch's own are enough
        pixels = data.to_pixels(images, self.module.vit.config.image_size, self.given.processor)
        return [dict(pixels=pixels, tokens=self.tokens(texts + negatives), set=0, weight=1.0, count=1)]

    def tokens(self, texts: list[str]) -> Tensor:
        return text_tokens(texts, self.tokenizer, self.module.text.config.context)

    def loss(self, pixels: Tensor, tokens: Tensor, **_) -> Tensor:
        """½ (CE over each image's texts + CE over each true text's images). Hard negatives only add texts.

        Both are over the whole batch, whichever process has read a row (see Ingredients.gather).
        """
        clip, gather = self.module, self.given.gather
        images, texts = clip.embed_images(pixels), clip.embed_texts(tokens)
        true, false = (gather(part) for part in texts.tensor_split([len(images)]))
        S = (clip.logit_scale.exp() * gather(images) @ torch.cat((true, false)).T).float()
        return clip_loss(S)                             # S (B, B + negatives)                  # (I4)

    def after_step(self) -> None:
        with torch.no_grad():
            self.module.logit_scale.clamp_(max=math.log(100))       # §2.5: logits scaled by at most 100

    def metrics(self) -> dict[str, float]:
        return {"scale": self.module.logit_scale.exp().item()} | super().metrics()

    def check(self) -> dict[str, float]:
        probed = self.world.says_scenes and not self.locked
        return linear_probe(self.module.vit, train=1000, test=500) if probed else {}

    def report(self, out: Path) -> dict[str, dict]:
        """The gate: one token at layer −2 names colour, shape and place of a held-out pair above 95 %."""
        if self.locked or not self.world.says_scenes:
            return {} if self.locked else {"naming.json": report_naming(self)}
        result = linear_probe(self.module.vit)
        scores = "  ".join(f"{k} {100 * v:.1f}" for k, v in result.items())
        split = self.given.name_split(data.Shapes("test"))
        print(f"probe    one token at layer -2, {split} pairs, %: {scores}")
        worst = min(result[k] for k in ("color", "shape", "place"))
        verdict = "PASSED" if worst > 0.95 else "NOT PASSED"
        print(f"gate     {verdict}: the lowest of colour, shape and place is {100 * worst:.1f} %, "
              "the gate is 95 %")
        return {"vit/probe.json": result}


TASKS = {"clip": ClipTask, "clip-text": ClipTask}
