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
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import EncoderBlock, ViT, ViTConfig, merge_heads, split_heads


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


@dataclass
class Grounded:
    """Pixels and the grounding tokens of each picture; stands in for the pixels of a ViT."""
    pixels: Tensor      # (B, 3, S, S)
    tokens: Tensor      # (B, M, C)
    beta: float = 1.0

    def __len__(self) -> int:
        return len(self.pixels)


class GroundedBlock(EncoderBlock):
    """A block of the frozen ViT, and the gated layer between its two residuals."""

    def __init__(self, c: ViTConfig, fuser: GatedSelfAttention):
        super().__init__(c.width, c.heads, c.hidden, c.act, c.norm_eps)
        self.fuser = fuser

    def forward(self, x: Tensor, given: Grounded | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x))
        if given is not None:
            x = self.fuser(x, given.tokens, given.beta)
        return x + self.mlp(self.norm2(x))


class GroundedViT(ViT):
    """A ViT whose features know what is asked of the picture; of plain pixels they are the frozen ViT's.

    kind: GatedSelfAttention, or GatedCross to compare.
    """

    def __init__(self, config: ViTConfig, context: int, kind: type[GatedSelfAttention] = GatedSelfAttention):
        self.context, self.kind = context, kind
        super().__init__(config)

    def adopt(self, vit: ViT) -> GroundedViT:
        """Take the weights of a ViT and freeze them; the gated layers learn."""
        left = self.load_state_dict(vit.state_dict(), strict=False)
        if left.unexpected_keys or any(".fuser." not in name for name in left.missing_keys):
            raise ValueError("this ViT has other parts than the grounded one.")
        for name, p in self.named_parameters():
            p.requires_grad_(".fuser." in name)
        return self

    def block(self, c: ViTConfig) -> EncoderBlock:
        return GroundedBlock(c, self.kind(c.width, self.context, c.heads))

    def forward(self, pixels: Tensor | Grounded, return_hidden: bool = False, depth: int | None = None):
        if isinstance(pixels, Tensor):
            return super().forward(pixels, return_hidden, depth)
        hidden = [self.embed(pixels.pixels)]
        for block in self.blocks[:depth]:
            hidden.append(block(hidden[-1], pixels))
        return hidden if return_hidden else hidden[-1]


def beta_schedule(steps: int, full: float, falling: float = 0.0) -> list[float]:
    """β of each step of the sampling (E3): 1 for the share `full`, then down to 0 over `falling`, then 0."""
    if not (0 <= full and 0 <= falling and full + falling <= 1):
        raise ValueError(f"shares {full} and {falling} of the steps are negative or more than all.")
    a, b = int(full * steps), int(falling * steps)
    return [1.0] * a + [1 - (i + 1) / b for i in range(b)] + [0.0] * (steps - a - b)
