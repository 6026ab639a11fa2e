"""Two papers in short: FPT (2103.05247v2) and BEiT (2106.08254v2).

FPT, pretrained transformers as universal computation engines. Document 3, on Frozen: a language model serves
other tasks (bit memory, lists, MNIST, proteins) when only its input, output and layer norms learn, "<0.1 % of
network parameters". That number is of the norms alone: 38,400 of GPT-2's 124.4M, 0.03 %. Its positions, which
the paper trains, too, are another 0.6 %, and input and output are new.

    (T1)  learn: W_in, W_out, positions, γ and β of each norm; frozen: attention and feed-forward

Here W_in is the bridge (a linear map), and a LLaMA has no β and no learned positions: 0.004 % of 7B. The
words that are written are the decoder's own, so W_out stays, too. Recipe `fpt-random` begins with a decoder
that has learned nothing, the paper's comparison; there the words learn with the norms. The claim (document 3:
a few tuned norms suffice): fpt > linear, which trains the map alone, and fpt > fpt-random.

BEiT. Document 3: masked patches → visual tokens. A picture's codes (papers/vq.py; DALL-E's in the paper) are
the words of a masked language model whose text is patches.

    symbol   shape         here      meaning
    x        (B, 3, S, S)  pixels    a patch per code
    M        (B, N)        masked    True: the patch is replaced by a learned vector e; about 40 %
    q        (B, N)        codes     the codes of the picture

    (T2)  M: blocks of at least 16 patches, sides in a ratio of 0.3 to 1/0.3, until 40 % are masked
    (T3)  L = −mean_{i in M} log softmax(W h_i)_{q_i}                  h: the last state of the ViT

It has no recipe: FLAVA's masked image modelling is the same loss, and no bridge here reads such a ViT.
"""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Decoder, RMSNorm, ViT
from papers.recipe import Numbers, Recipe, Task


# FPT --------------------------------------------------------------------------------------------------------

def freeze_all_but_norms(model: nn.Module, words: bool = False) -> tuple[int, int]:
    """(T1) of a decoder or ViT; words: embedding and head learn, too. Returns (numbers that learn, all)."""
    model.requires_grad_(False)
    for part in model.modules():
        if isinstance(part, (RMSNorm, nn.LayerNorm)) or words and isinstance(part, nn.Embedding):
            part.requires_grad_()
    if words and model.lm_head is not None:
        model.lm_head.requires_grad_()
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


class FptTask(Task):
    """What FPT changes of train.py's answer task, in front of which this class stands: who learns."""
    random = False

    def __init__(self, given, *others):
        if self.random:
            given.decoder = Decoder(given.decoder.config).init_weights().to(given.device)
        super().__init__(given, *others)

    def freeze(self, trained: tuple[str, ...], stored: torch.dtype) -> None:
        super().freeze(trained, stored)
        self.share = freeze_all_but_norms(self.module.decoder, words=self.random)

    def report(self, out: Path) -> dict[str, dict]:
        files, (learned, total) = super().report(out), self.share
        print(f"norms    {learned:,} of the decoder's {total:,} parameters: {100 * learned / total:.2g} %")
        return files


# BEiT -------------------------------------------------------------------------------------------------------

def block_mask(side: int, rng: np.random.Generator, share: float = 0.4, least: int = 16) -> np.ndarray:
    """(side, side) bool, True = masked, about `share` of it in blocks of at least `least` patches."""
    masked, wanted = np.zeros((side, side), bool), math.ceil(share * side * side)
    least = min(least, wanted)
    while masked.sum() < wanted:
        area = rng.uniform(least, max(least, wanted - masked.sum()))
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = (min(side, max(1, round(n))) for n in (math.sqrt(area * ratio), math.sqrt(area / ratio)))
        top, left = rng.integers(0, side - h + 1), rng.integers(0, side - w + 1)
        masked[top:top + h, left:left + w] = True                               # (T2)
    return masked


class Beit(nn.Module):
    """A ViT with a vector for masked patches and a head over K codes."""

    def __init__(self, vit: ViT, codes: int):
        super().__init__()
        if vit.pre_norm is not None:
            raise ValueError("BEiT's ViT has no norm in front of its blocks; give pre_norm=False.")
        self.vit, self.head = vit, nn.Linear(vit.config.width, codes)           # W
        self.mask_token = nn.Parameter(torch.randn(vit.config.width) * 0.02)    # e

    def loss(self, pixels: Tensor, masked: Tensor, codes: Tensor) -> Tensor:
        """(B, 3, S, S), (B, N) bool, (B, N) int64 → (T3).

        A masked patch has pixels of 0, the mean colour, which are embedded as 0, or as the bias.
        """
        c = self.vit.config
        hidden = F.interpolate(masked.view(-1, 1, c.side, c.side).float(), scale_factor=c.patch) > 0
        z = self.vit.embed(pixels.masked_fill(hidden, 0))                       # (B, N, Di)
        z = z + F.pad(masked, (c.first, 0))[..., None] * self.mask_token
        for block in self.vit.blocks:
            z = block(z)
        logits = self.head(self.vit.post_norm(z[:, c.first:])[masked])          # (masked, K)
        return F.cross_entropy(logits, codes[masked])                           # (T3)


TASKS = {"fpt": FptTask, "fpt-random": type("fpt-random", (FptTask,), {"random": True})}
RECIPES = {
    name: Recipe(summary, "CIFAR-10, say; the paper's numbers are not in our sources", None,
                 Numbers(6e-3, 64, 800), "linear", ("bridge", "decoder"), task=name, options=dict(reads=-2))
    for name, summary in (
        ("fpt", "FPT (2103.05247v2): a linear map and the decoder's norms learn, all else is frozen"),
        ("fpt-random", "FPT's comparison: the same with a decoder that has learned nothing"))}
