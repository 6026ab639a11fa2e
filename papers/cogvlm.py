"""CogVLM (2311.03079v2): a picture's tokens stand among the words and pass through matrices of their own.

Document 3 names it in one line under feature-level fusion, "visual expert modules (CogVLM)", without an
equation. Words keep the frozen decoder's q, k, v, o and feed-forward; the tokens of a picture get copies of
them that learn. All attend to each other in one causal sequence, so a text without a picture is the
decoder's own, to the bit.

    symbol      shape          here        meaning
    z           (ΣM, N, Di)    features    ViT tokens ahead of its last block, no class token
    u           (ΣM, N, D)                 mapped, normed, GELU
    [b; ·; e]   (ΣM, N+2, D)   prefix      soft tokens between two learned vectors, boi and eoi, zero at first
    X           (B, T, D)      x[0]        the stream, normed; I: its positions of boi and image, NOT of eoi
    W_I, FFN_I                 experts     the expert's matrices; W_T, FFN_T: the decoder's

    (X1)  Attention = softmax(Tril(Q Kᵀ) / √E) V            under the paper's root stands D, the HEAD width
    (X2)  Q = X_I W_I^Q at I, X_T W_T^Q elsewhere; K, V and the output projection alike
    (X3)  FFN(X) = FFN_I(X_I) at I, FFN_T(X_T) elsewhere
    (X4)  soft tokens: W_down( SiLU(W_gate u) ⊙ W_up u ),   u = GELU(LN(W z))
    (X5)  the tokens between boi and eoi share ONE position: [bos, boi, i, i, i, eoi, t, t] → 0 1 2 2 2 3 4 5

Paper and code differ. Eq. 2-5 and the text double q, k, v and the feed-forward; the code doubles the output
projection, too, and Table 4's 6.6B parameters need it (without it they are 6.08B). "Two-layer MLP (SwiGLU)"
is four matrices with a LayerNorm and a GELU ahead (X4). eoi is a visual parameter, yet the decoder's own
matrices read it. The two norms of a layer are shared. CogVLM2 (bias=True, stride=2) has biases on the
expert's q, k, v and a convolution of stride 2 ahead of (X4).

Both matrices work at every position, then (X2) and (X3) choose. The published code gathers the positions
first, which is half the work; but how a row rounds depends on how many rows there are, and equality to the
bit would be gone.

The claim (Table 4: COCO CIDEr / VQAv2): all experts 142.8 / 80.0; none ("adapter only") 131.2 / 73.8; the
decoder tuned instead 140.3 / 78.9; feed-forwards only 140.0 / 78.6; every 4th layer 138.7 / 77.6; experts
that start at random 138.0 / 79.1; a full mask inside a picture 141.0 / 79.6. In miniature: these rows
without the full mask, and every 2nd layer instead of every 4th; expected: experts over none, copies over
random, and the loss of text unchanged, exactly, unless the decoder is tuned.
"""
from __future__ import annotations

import math
from dataclasses import replace
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import (Attention, Bridge, Decoder, DecoderConfig, ImagePositions, SwiGLU, causal_mask,
                   visible_to_bias)
from papers.recipe import Numbers, Recipe


class Expert(nn.Module):
    """The matrices of one layer of the decoder once more."""

    def __init__(self, c: DecoderConfig, attention: bool, mlp: bool):
        super().__init__()
        self.attention = Attention(c) if attention else None
        self.mlp = SwiGLU(c) if mlp else None

    def part(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """What stands in for a part of the layer (qkv, o, mlp); None where the decoder's own works."""
        owner = self if name == "mlp" else self.attention
        return getattr(owner, name, None) if name in ("qkv", "o", "mlp") else None

    @torch.no_grad()
    def copy(self, layer: nn.Module) -> None:
        """A bias that the layer does not have starts at zero."""
        theirs = dict(layer.named_parameters())
        for name, p in self.named_parameters():
            p.copy_(theirs.get(name, torch.zeros_like(p)))


class CogVLM(Bridge):
    """At CogVLM's sizes (D 4096, feed-forward 11008, 32 layers, Di 1792): 6,618,628,096 parameters. Without
    boi and eoi: feed-forwards alone 4,471,136,256, every 4th layer 1,761,615,872, (X4) alone 142,614,528.

        attention, mlp   whether those matrices have an expert
        every            layers 0, every, 2·every, … have one
        copied           experts start as the decoder's matrices (`adopt`), not at random
        full_mask        the tokens of a picture see all of it
    """
    name, soft_tokens, reads = "cogvlm", True, -2

    def __init__(self, decoder: DecoderConfig, vision_width: int, attention: bool = True, mlp: bool = True,
                 every: int = 1, copied: bool = True, full_mask: bool = False, bias: bool = False,
                 stride: int = 1):
        super().__init__()
        self.every, self.copied, self.full_mask = every, copied, full_mask
        self.conv = nn.Conv2d(vision_width, vision_width, stride, stride) if stride > 1 else None
        self.map = nn.Linear(vision_width, decoder.width, bias=False)
        self.norm = nn.LayerNorm(decoder.width)
        self.glu = SwiGLU(replace(decoder, mlp_bias=False))
        self.boi, self.eoi = (nn.Parameter(torch.zeros(decoder.width)) for _ in range(2))
        biased = decoder.attention_bias or (bias and "qkv")
        c = replace(decoder, qk_norm=nn.Identity, attention_bias=biased)
        layers = range(0, decoder.layers if attention or mlp else 0, every)
        self.experts = nn.ModuleList(Expert(c, attention, mlp) for _ in layers)

    def adopt(self, decoder: Decoder) -> None:
        for n, expert in enumerate(self.experts if self.copied else ()):
            expert.copy(decoder.layers[n * self.every])

    def see(self, features: Tensor, where: ImagePositions | None = None) -> Tensor:
        if self.conv is None:
            return features
        side, stride = math.isqrt(features.shape[1]), self.conv.stride[0]
        if side**2 != features.shape[1] or side % stride:
            raise ValueError(f"{features.shape[1]} tokens of the ViT are no square whose side is a multiple "
                             f"of {stride}; change the option stride.")
        grid = features.transpose(1, 2).unflatten(2, (side, side))              # (ΣM, Di, side, side)
        return self.conv(grid).flatten(2).transpose(1, 2)

    def prefix(self, visual: Tensor) -> Tensor:
        u = F.gelu(self.norm(self.map(visual)))                                 # (ΣM, N, D)
        boi, eoi = (v.expand(len(u), 1, -1) for v in (self.boi, self.eoi))
        return torch.cat((boi, self.glu(u), eoi), dim=1)                        # (ΣM, N+2, D)  (X4)

    def around(self, layer: int, part: str, f: Callable[..., Tensor], visual: ImagePositions | None,
               *x: Tensor) -> Tensor:
        if not has_images(visual, x[0].shape[-2]):
            return f(*x)
        if part == "attend" and self.full_mask:
            return attend_within_images(f, visual, *x)
        n, rest = divmod(layer, self.every)
        expert = None if rest or not self.experts else self.experts[n].part(part)
        if expert is None:
            return f(*x)
        image = (visual.image & ~ends(visual)[1])[..., None]                    # (B, T, 1)     I: not eoi
        return torch.where(image, expert(*x), f(*x))                            # (B, T, ·)     (X2), (X3)

    def rope_positions(self, p: Tensor, visual: ImagePositions | None) -> Tensor:
        if visual is None:
            return p
        boi, eoi = ends(visual)
        again = visual.image & ~boi & ~eoi & ~F.pad(boi, (1, 0))[:, :-1]        # a repeated position
        count = again.cumsum(1)                                                 # (B, T)
        if p.shape[1] != count.shape[1]:                                        # generated: behind all images
            return p - count[:, -1:]
        start = count.masked_fill(p != 0, 0).cummax(1).values                   # before its document began
        return p - (count - start)                                              # (B, T)        (X5)


def has_images(where: ImagePositions | None, T: int) -> bool:
    """Whether pictures may stand in these T positions: they all stand in the prompt."""
    return where is not None and len(where.row) > 0 and T == where.image.shape[1]


def image_numbers(where: ImagePositions) -> Tensor:
    """(B, T): the number of the picture whose token stands there, from 1; 0 at words."""
    return where.last * where.image


def ends(where: ImagePositions) -> tuple[Tensor, Tensor]:
    """(B, T) bool each: the first and the last token of every picture, boi and eoi."""
    n = image_numbers(where)
    return where.image & (n != F.pad(n, (1, 0))[:, :-1]), where.image & (n != F.pad(n, (0, 1))[:, 1:])


def attend_within_images(f: Callable[..., Tensor], where: ImagePositions, q: Tensor, k: Tensor, v: Tensor,
                         bias: Tensor | None, causal: bool) -> Tensor:
    """Attention in which every token of a picture sees the whole picture, ahead of it, too."""
    if causal:
        bias = visible_to_bias(causal_mask(q.shape[2], q.device), q.dtype)
    n = image_numbers(where)
    same = (n[:, :, None] == n[:, None]) & where.image[:, None]                 # (B, T, T)
    return f(q, k, v, bias.masked_fill(same[:, None], 0), False)


# Three stages: 120,000 steps of 8,192, 60,000 of 1,024, then fine-tuning, whose rate alone is in our sources.
# The authors train the ViT, too, at a tenth of the rate.
PAPER = Numbers(1e-5, 1024, 6000)
TOY = Numbers(2e-3, 64, 800, optimizer="muon", muon_lr=0.04)
NO_EXPERTS = dict(attention=False, mlp=False)
RECIPES = {
    "cogvlm": Recipe(
        "CogVLM's fine-tuning (2311.03079v2 §2.3): experts and adapter learn, the decoder is frozen",
        "VQA and conversations; before, 1.5B pairs", PAPER, TOY, "cogvlm"),
    "cogvlm-tuned": Recipe(
        "CogVLM's ablation (Table 4): no experts, the decoder learns instead", "as cogvlm",
        PAPER, TOY, "cogvlm", ("bridge", "decoder"), options=NO_EXPERTS, paper_options=NO_EXPERTS),
}
