"""MAGMA (2112.05253v2): soft tokens of a picture, and small adapters inside a decoder that is otherwise
frozen.

Document 1 has it in one line, "insert and train adapter layers in the language model", beside Flamingo, and
as a row of its table: 243M parameters, 3.8M pairs, VQAv2 36.9 without an example and 45.4 with four, OK-VQA
13.9 and 23.4, VizWiz 5.6 and 10.6. It has no equation. The adapters of the first published version have
235,024,384 parameters; with a map from 2048 to 4096, which the release does not have, they make 243.4M.

    symbol   shape           here           meaning
    Z        (ΣM, N, Di)     visual         cells of the image encoder's grid
    W        (D, Di)         map            the prefix, trained
    f                        f              the frozen attention (with W_o) or feed-forward of a layer
    n        (B, T, D)       n              what f receives: the normalised stream
    W↓, W↑   (D/r, D)        down, up       the bottleneck, with biases; W↑ is (D, D/r)
    r                        factor         4 in the first published version, 8 in the second
    s        (1,)            scale          learned in the form scaled_parallel, else 1

    (A1)  H_v = LN(Drop_0.1(W Z + b))                               LiMBeR's map, and a LayerNorm
    (A2)  A(h) = W↑ ReLU(W↓ h + b↓) + b↑                            adapter_norm: A(LN h)
    (A3)  normal      y = f(n);   y ← y + A(y)
    (A4)  parallel    y = f(n) + s A(n)

The result stands in the place of f(n) and is added to the stream. Words and pictures are treated alike. All
four tensors of A start at N(0, 0.001), cut at ±0.002, biases too, so the decoder begins almost, but not
exactly, as it was. The paper's own numbers of equations are not in our sources.

Paper and published code: the first version has (A3) at the feed-forward with r = 4, the second at both with
r = 8; parallel and scaled_parallel are in the code and in no published configuration. The code's freezing
loop switches the gradients of the adapters on and those of the decoder never off, so the groups of its
optimiser decide what is frozen; here the decoder is. Their decoder is GPT-J, whose attention and feed-forward
work side by side on one norm; in a LLaMA the adapter of the feed-forward receives a later stream. D / r is
floored. The authors train the image encoder, too, at 1/400 of the rate; here it is frozen. Their filter of
the likeliest tokens keeps the tail and can drop the head, so compare greedy texts.

The claim: adapters inside are worth more than a prefix alone. Document 1's table has no such pair; its
nearest are MAGMA's 36.9 on VQAv2 and LiMBeR's 33.33. And the decoder keeps its language: with the adapters
its loss on text lies between the frozen decoder's and a tuned one's. In miniature: the prefix alone, adapters
in two forms at two places, and a tuned decoder, at equal steps.

    python train.py --bridge magma --option attention=normal factor=8           the second version
    python train.py --bridge magma --option mlp=none                            the prefix alone
"""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn

from model import DecoderConfig
from papers.limber import Limber
from papers.recipe import Numbers, Recipe

FORMS = ("none", "normal", "parallel", "scaled_parallel")


class Adapter(nn.Module):
    """A bottleneck behind or beside one part of a layer."""

    def __init__(self, width: int, factor: int, form: str, norm: bool):
        super().__init__()
        self.form = form
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.down, self.up = nn.Linear(width, width // factor), nn.Linear(width // factor, width)
        self.scale = nn.Parameter(torch.ones(1)) if form == "scaled_parallel" else None
        with torch.no_grad():
            for p in (*self.down.parameters(), *self.up.parameters()):
                p.normal_(0.0, 1e-3).clamp_(-2e-3, 2e-3)

    def forward(self, f: Callable[[Tensor], Tensor], n: Tensor) -> Tensor:
        y = f(n)                                                                # (B, T, D)
        h = self.norm(y if self.form == "normal" else n)                        #              (A3), (A4)
        a = self.up(self.down(h).relu())                                        # (B, T, D)    (A2)
        a = a if self.scale is None else self.scale * a                         #              (A4)
        return y + a.to(y.dtype)


class Magma(Limber):
    """235,024,384 parameters of adapters at D 4096, 28 layers, r 4; 12,595,200 of the prefix from Di 3072."""
    name = "magma"

    def __init__(self, decoder: DecoderConfig, vision_width: int, mlp: str = "normal",
                 attention: str = "none", factor: int = 4, adapter_norm: bool = False, tokens: int = 1,
                 dropout: float = 0.1):
        super().__init__(decoder, vision_width, tokens, dropout)
        for part, form in (("mlp", mlp), ("attention", attention)):
            if form not in FORMS:
                raise ValueError(f'magma\'s option {part} is one of {", ".join(FORMS)}, not "{form}".')
        if factor > decoder.width:
            raise ValueError(f"magma's option factor is {factor}, more than the width {decoder.width}.")
        self.norm = nn.LayerNorm(decoder.width)
        self.adapters = nn.ModuleDict({
            part: nn.ModuleList(Adapter(decoder.width, factor, form, adapter_norm)
                                for _ in range(decoder.layers))
            for part, form in (("mlp", mlp), ("attention", attention)) if form != "none"})

    def prefix(self, visual: Tensor) -> Tensor:
        return self.norm(super().prefix(visual))                                # (ΣM, N, D)   (A1)

    def around(self, layer: int, part: str, f: Callable[..., Tensor], visual, *x: Tensor) -> Tensor:
        return self.adapters[part][layer](f, *x) if part in self.adapters else f(*x)


# The paper decays to 0 over 300,000 steps and stops halfway; this column reaches 0 where it stops.
PAPER = Numbers(8e-4, 256, 150_000, 100, "linear", 0.0, 0.95)
RECIPES = {
    "magma": Recipe(
        "MAGMA (2112.05253v2): a linear prefix and adapters in the decoder learn", "CC12M, 3.8M pairs",
        PAPER, Numbers(6e-3, 64, 1000), "magma", options=dict(reads=-2)),
    "magma-tuned": Recipe(
        "beside MAGMA: the prefix and the whole decoder learn, without adapters", "CC12M, 3.8M pairs",
        PAPER, Numbers(1e-3, 64, 600), "magma", ("bridge", "decoder"),
        options=dict(reads=-2, mlp="none"), paper_options=dict(mlp="none")),
}
