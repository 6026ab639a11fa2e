"""GLIGEN (2301.07093v2): boxes with names enter a frozen transformer over VISUAL tokens, by gated
self-attention.

Document 3 prints v = v + β tanh(γ)) * TS(SelfAttn([v, h^e])), with one bracket too many, and compares:
Flamingo's gated CROSS-attention reads the new tokens, self-attention blends them with the visual ones,
ControlNet adds. The paper's transformer is Stable Diffusion's U-Net; here it is any ViT, whose blocks get one
more layer between their two residuals.

    symbol      shape        here            meaning
    v           (B, N, Di)   v               visual tokens
    e, l        (B, M, ·)    phrases, boxes  the text vector of each object, its box x0 y0 x1 y1 in 0 … 1
    h^e         (B, M, C)    return          grounding tokens; of padding, made from two learned null vectors
    α_a, α_d    ()           attention_gate, ff_gate      per layer, ZERO at the start
    β                        beta            1 in training; at inference it may fall to 0

    (E1)  h^e = MLP([f_text(e) ; Fourier(l)])               832, 512, 512, 768 with SiLU
    (E2)  v ← v + β tanh(α_a) · TS(SelfAttn(LN[v ; W h^e + b]))       TS keeps the visual tokens
          v ← v + β tanh(α_d) · W_2(a ⊙ GELU(g)),   [a ; g] = W_1 LN v + b_1
    (E3)  β = 1 for the first share of the steps, falls for the second, is 0 for the rest
    (E4)  Fourier(l) = [sin f_0 l ; cos f_0 l ; sin f_1 l ; …],   f_i = 100^(i/8), i < 8

Paper and code differ. The paper's Eq. 8 has one gate γ, the code two, the second with a whole feed-forward
behind it. (E4) has no π. q, k and v have no bias. Every visual token sees padding, as null tokens: there is
no mask, so how much padding stands there matters once α is not 0. The code calls β `scale` and γ `alpha`.

With both gates at 0, or β = 0, the transformer is the frozen one to the bit. The gated layers and the net of
(E1) learn, by the loss of the diffusion (AdamW 5e-5, no weight decay, 500,000 steps, 10,000 of warm-up).
`GatedCross` is the authors' other variant, Flamingo-like, `DenseGatedSelfAttention` the one for maps in the
place of boxes; a comment in their config says that self-attention was better than cross-attention.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Bridge, DecoderConfig, EncoderBlock, ViT, merge_heads, split_heads
from papers.recipe import MUON, Numbers, Recipe


def fourier(boxes: Tensor, frequencies: int = 8) -> Tensor:
    """(B, M, 4) → (B, M, 8·frequencies)."""
    f = 100 ** (torch.arange(frequencies, device=boxes.device) / frequencies)
    angle = f[:, None] * boxes[..., None, :]                                    # (B, M, frequencies, 4)
    return torch.cat((angle.sin(), angle.cos()), dim=-1).flatten(-2)            # (E4)


class PositionNet(nn.Module):
    """1,083,968 parameters at the published sizes."""

    def __init__(self, phrase_width: int = 768, context: int = 768, hidden: int = 512, frequencies: int = 8):
        super().__init__()
        self.frequencies = frequencies
        self.null_phrase = nn.Parameter(torch.zeros(phrase_width))
        self.null_box = nn.Parameter(torch.zeros(8 * frequencies))
        widths = [phrase_width + 8 * frequencies, hidden, hidden, context]
        self.maps = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, boxes: Tensor, phrases: Tensor, real: Tensor) -> Tensor:
        """boxes (B, M, 4), phrases (B, M, ·), real (B, M) bool, False = padding → (B, M, C)."""
        real = real[..., None]
        x = torch.cat((torch.where(real, phrases, self.null_phrase),
                       torch.where(real, fourier(boxes, self.frequencies), self.null_box)), dim=-1)
        for n, map in enumerate(self.maps):
            x = map(F.silu(x) if n else x)                                      # (E1)
        return x


class GatedSelfAttention(EncoderBlock):
    """The authors' `fuser`: 1,888,962, 7,054,722 and 27,216,642 parameters at Di 320, 640, 1280."""

    def __init__(self, width: int, context: int, heads: int):
        super().__init__(width, heads, 4 * width, "gelu", 1e-5, attention_bias="o")
        self.up = nn.Linear(width, 8 * width)
        self.linear = nn.Linear(context, width)
        self.attention_gate, self.ff_gate = (nn.Parameter(torch.zeros(())) for _ in range(2))

    def read(self, v: Tensor, h: Tensor) -> Tensor:
        both = torch.cat((v, self.linear(h)), dim=1)                            # (B, N+M, Di)
        return self.attention(self.norm1(both))[:, :v.shape[1]]

    def mlp(self, x: Tensor) -> Tensor:
        a, g = self.up(x).chunk(2, dim=-1)
        return self.down(a * F.gelu(g))

    def forward(self, v: Tensor, h: Tensor, beta: float = 1.0) -> Tensor:
        """v (B, N, Di), h (B, M, C) → (B, N, Di)."""
        v = v + beta * self.attention_gate.tanh() * self.read(v, h)             # (E2)
        return v + beta * self.ff_gate.tanh() * self.mlp(self.norm2(v))


class GatedCross(GatedSelfAttention):
    """The visual tokens read the grounding tokens and not each other."""

    def __init__(self, width: int, context: int, heads: int):
        super().__init__(width, context, heads)
        self.linear = None
        self.k, self.v = (nn.Linear(context, width, bias=False) for _ in range(2))

    def read(self, v: Tensor, h: Tensor) -> Tensor:
        q, k, u = (split_heads(x, self.heads) for x in (self.q(self.norm1(v)), self.k(h), self.v(h)))
        return self.o(merge_heads(self.attend(q, k, u)))


class DenseGatedSelfAttention(GatedSelfAttention):
    """For a map with a grounding token per cell: v gets what these read, resized to its own grid."""

    def read(self, v: Tensor, h: Tensor) -> Tensor:
        both = torch.cat((v, self.linear(h)), dim=1)
        y = self.attention(self.norm1(both))[:, v.shape[1]:].transpose(1, 2)    # (B, Di, M)
        side, mine = math.isqrt(v.shape[1]), math.isqrt(h.shape[1])
        y = F.interpolate(y.unflatten(2, (mine, mine)), size=(side, side), mode="bicubic")
        return y.flatten(2).transpose(1, 2)


def grounded_state(vit: ViT, layers: nn.ModuleList, pixels: Tensor, h: Tensor,
                   beta: Tensor | float = 1.0) -> Tensor:
    """The state (B, N, Di) of a frozen ViT behind as many blocks as there are gated layers.

    Each gated layer works between the two residuals of its block. beta: one for all, or (B, 1, 1).
    """
    v = vit.embed(pixels)
    for block, layer in zip(vit.blocks, layers):
        v = v + block.attention(block.norm1(v))
        v = layer(v, h, beta)                                                   # (E2)
        v = v + block.mlp(block.norm2(v))
    return v


class Gligen(Bridge):
    """A linear map behind a ViT, and what lets boxes into that ViT; without boxes it is the linear map.

    layers: gated layers, one for each of the first blocks of the ViT; the map reads the state behind them.
    cross: gated cross-attention in the place of gated self-attention.
    tuned: whether the map learns, too; the paper locks the model that it starts from.
    """
    name, soft_tokens = "gligen", True

    def __init__(self, decoder: DecoderConfig, vision_width: int, layers: int = 3, heads: int = 4,
                 context: int = 768, hidden: int = 512, cross: bool = False, tuned: bool = False):
        super().__init__()
        self.reads, self.tuned = layers, tuned
        self.map = nn.Linear(vision_width, decoder.width)
        self.net = PositionNet(decoder.width, context, hidden)
        kind = GatedCross if cross else GatedSelfAttention
        self.layers = nn.ModuleList(kind(vision_width, context, heads) for _ in range(layers))
        self.requires_grad_()

    def requires_grad_(self, requires_grad: bool = True) -> Gligen:
        super().requires_grad_(requires_grad)
        self.map.requires_grad_(requires_grad and self.tuned)
        return self

    def prefix(self, visual: Tensor) -> Tensor:
        return self.map(visual)                                                 # (ΣM, N, D)

    def grounded_features(self, vit: ViT, pixels: Tensor, boxes: Tensor, phrase: Tensor,
                          beta: Tensor | float = 1.0) -> Tensor:
        """Features (B, N, Di) of pictures with a box each, boxes (B, 4), and one phrase (D,) for all."""
        boxes = torch.stack((boxes, torch.zeros_like(boxes)), dim=1)            # (B, 2, 4)  one is padding
        real = torch.tensor([True, False], device=boxes.device).expand(len(boxes), -1)
        h = self.net(boxes, phrase.expand(*boxes.shape[:2], -1), real)          # (B, 2, C)
        v = grounded_state(vit, self.layers, pixels, h, beta)
        return v if self.reads_cls else v[:, vit.config.first:]

    def gates(self) -> Tensor:
        gates = [torch.stack((layer.attention_gate, layer.ff_gate)) for layer in self.layers]
        return torch.stack(gates).detach().float().tanh()                       # (layers, 2)

    @property
    def gated_layers(self) -> list[int]:
        return [*range(len(self.layers))]


def beta_schedule(steps: int, full: float, falling: float = 0.0) -> list[float]:
    """β of each step of the sampling (E3): 1 for the share `full`, then down to 0 over `falling`, then 0."""
    if not (0 <= full and 0 <= falling and full + falling <= 1):
        raise ValueError(f"shares {full} and {falling} of the steps are negative or more than all.")
    a, b = int(full * steps), int(falling * steps)
    return [1.0] * a + [1 - (i + 1) / b for i in range(b)] + [0.0] * (steps - a - b)


RECIPES = {"gligen": Recipe(
    "GLIGEN (2301.07093v2): gated layers in a frozen ViT learn to answer about a box, a linear map beside",
    "Flickr, VG, O365, SBU, CC3M: boxes with names",
    Numbers(5e-5, None, 500_000, 10_000, "constant", 0.0, 0.999, 0), Numbers(2e-3, 32, 600, **MUON), "gligen",
    task="gligen", options=dict(context=128, hidden=128, tuned=True), captions=0.0,
    toy_data="shapes-places")}
