"""GLIDE (2112.10741v3): pictures out of noise, led by a text. The chain of noises stands in papers/ddpm.py.

Document 4 has two words on it: "Diffusion Based". New in the paper is how the text enters: as the network's
time, as keys and values of every attention, and twice, with the text and without, for the guidance (G3). It
compares that guidance with one by CLIP's gradients.

    symbol   shape          here      meaning
    x_t      (B, 3, S, S)   x         the picture under noise of time t (B,)
    c        (B, n, Dt)     states    states of the text's n tokens; ∅, the empty text, has its end token
    z        (B, N, Di)     z         the network's tokens, one per patch

    (G2)  L = ‖x_0 − x̂_0‖², c = ∅ in a fifth of the batch       = (1 − ᾱ_t)/ᾱ_t ‖ε − ε_θ‖²
    (G7)  y = LN(z) (1 + a) + b,   [a; b] = W silu(emb(t) + W' c_n)       in the place of each norm
    (G8)  softmax(q [k_c; k]ᵀ / √E) [v_c; v]                    q, k, v of y; k_c, v_c of the states c
    (G9)  c_n = s_n + b + Σ_{m<8} V_m s_{n−m}               s: the frozen decoder's states; V, b = 0 at first

GLIDE's network is a U-Net of 2.3B for 64 pixels, its text transformer another 1.2B, and a second model makes
256 pixels of 64. Here a ViT whose tokens are the cells draws 48 pixels, and the text is read by the frozen
decoder: c are its states before the last layer. A token of width 192 cannot carry the noise of 768 numbers,
so the network forecasts x̂_0, from which ε_θ follows by (G1). GLIDE pads every text to 128 tokens, all of
which are read; here padding is hidden. Its norms are GroupNorms, its fifth of empty texts came in a second
training.

What makes the toy learn. Its decoder is frozen, and the state behind "the top left" does not always tell what
shape was named before; (G9) learns that. The patches begin at the places that texts name (start_at_places in
glide_task.py), and noisy times are drawn more often, t = T (1 − u²), for there the text decides. Of noise
alone, the loss (0.107 without a text) was 0.102 after 2,000 steps without all three, and 0.065 after 350 with
them.

The claim: guidance buys what the text says with variety (Fig. 6), and people prefer it to CLIP's (Elo +82.7
against −73.2 for looks, +110.9 against +29.3 for the caption; zero-shot FID on COCO 12.24). It is not
measured here: a run reports how many of the named things are found in its pictures, at one guidance (s = 3).

    python train.py --recipe glide && python eval.py draw out/glide-shapes "a large red ring at the top left"
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from model import Decoder, EncoderBlock, ViT, ViTConfig, merge_heads, split_heads, visible_to_bias
from papers.ddpm import Diffusion, guide
from papers.recipe import Numbers, Recipe

CONFIG = ViTConfig(image_size=48, patch=16, width=192, layers=4, heads=6, hidden=768, act="gelu", cls=False,
                   pre_norm=False, patch_bias=True)
PHRASE = 8                      # tokens that the learned part of the text's reader puts together


class TextBlock(EncoderBlock):
    """A ViT's block that knows the time and reads the text."""

    def __init__(self, c: ViTConfig, text_width: int):
        super().__init__(c.width, c.heads, c.hidden, c.act, c.norm_eps)
        self.words, self.adapt = nn.Linear(text_width, 2 * c.width), nn.Linear(c.width, 4 * c.width)
        nn.init.zeros_(self.adapt.weight)               # W: at first a plain block
        nn.init.zeros_(self.adapt.bias)

    def forward(self, z: Tensor, emb: Tensor, states: Tensor, bias: Tensor) -> Tensor:
        a, b, a2, b2 = self.adapt(F.silu(emb))[:, None].chunk(4, dim=-1)        # (B, 1, Di) each
        y = self.norm1(z) * (1 + a) + b                                         # (G7)
        k_c, v_c = self.words(states).chunk(2, dim=-1)                          # (B, n, Di)
        k, v = torch.cat((k_c, self.k(y)), dim=1), torch.cat((v_c, self.v(y)), dim=1)
        q, k, v = (split_heads(part, self.heads) for part in (self.q(y), k, v))
        z = z + self.o(merge_heads(self.attend(q, k, v, bias)))                 # (G8)
        return z + self.mlp(self.norm2(z) * (1 + a2) + b2)                      # (G7)


class Denoiser(ViT):
    """x_t (B, 3, S, S), t (B,) and a text → the forecast x̂_0."""

    def __init__(self, config: ViTConfig, text_width: int):
        self.text_width = text_width
        super().__init__(config)
        D = config.width
        self.time = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.last = nn.Linear(text_width, D)                                    # W'
        self.phrase = nn.Conv1d(text_width, text_width, PHRASE)
        nn.init.zeros_(self.phrase.weight)                                      # V
        nn.init.zeros_(self.phrase.bias)
        self.pixels = nn.ConvTranspose2d(D, 3, config.patch, stride=config.patch)       # a token → its patch
        nn.init.normal_(self.positions, std=0.5)                                # see papers/clip.py
        nn.init.zeros_(self.pixels.weight)

    def block(self, c: ViTConfig) -> TextBlock:
        return TextBlock(c, self.text_width)

    def forward(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        c, rows = self.config, torch.arange(len(x), device=x.device)
        states = states + self.phrase(F.pad(states.mT, (PHRASE - 1, 0))).mT     # (G9)
        f = torch.exp(-math.log(10_000) * torch.arange(c.width // 2, device=x.device) / (c.width // 2))
        waves = torch.cat(((t[:, None] * f).sin(), (t[:, None] * f).cos()), dim=-1)
        emb = self.time(waves) + self.last(states[rows, mask.sum(1) - 1])       # (B, Di)
        z = self.embed(x)                                                       # (B, N, Di)
        bias = visible_to_bias(F.pad(mask, (0, z.shape[1]), value=True)[:, None, None], z.dtype)
        for block in self.blocks:
            z = block(z, emb, states, bias)
        grid = self.post_norm(z).transpose(1, 2).unflatten(2, (c.side, c.side))         # (B, Di, S/p, S/p)
        return self.pixels(grid)


def text_rows(tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens (B, n) and mask (B, n) of texts, each with its end token."""
    documents = [data.Document(tokenizer) for _ in texts]
    tokens, _, mask = data.collate([(d.add(" " + t) if t else d).end() for d, t in zip(documents, texts)])
    return tokens, mask


@torch.no_grad()
def read_texts(decoder: Decoder, tokens: Tensor, mask: Tensor) -> Tensor:
    """The states (B, n, Dt) that enter the decoder's last layer."""
    states = decoder.states(tokens, mask)[-2].float()
    return F.layer_norm(states, states.shape[-1:])


@dataclass
class Painter:
    """A trained network with its decoder: draws pictures of texts."""
    denoiser: Denoiser
    decoder: Decoder
    tokenizer: object
    diffusion: Diffusion

    @torch.no_grad()
    def draw(self, texts: list[str], scale: float = 3.0, steps: int = 25, seed: int = 0) -> list[np.ndarray]:
        """A picture (S, S, 3) uint8 of each text. (G3) is applied to x̂_0, which by (G1) is the same."""
        B, device, S = len(texts), self.decoder.embed.weight.device, self.denoiser.config.image_size
        tokens, mask = (x.to(device) for x in text_rows(self.tokenizer, texts + [""] * B))
        states = read_texts(self.decoder, tokens, mask)
        x = torch.randn(B, 3, S, S, generator=torch.Generator().manual_seed(seed)).to(device)
        times = torch.linspace(len(self.diffusion.betas) - 1, 0, steps, device=device).round().long()
        for t, u in zip(times, F.pad(times[1:], (0, 1), value=-1)):
            both = self.denoiser(x.repeat(2, 1, 1, 1), t.expand(2 * B), states, mask)
            x0 = guide(*both.chunk(2), scale).clamp(-1, 1)                      # (G3)
            x = self.diffusion.jump(x0, u.expand(B), self.diffusion.noise_of(x, t.expand(B), x0))
        return [*((x.movedim(1, -1) + 1) * 127.5).round().byte().cpu().numpy()]


RECIPES = {"glide": Recipe(
    "GLIDE (2112.10741v3): a denoiser learns to draw from captions, the decoder that reads them is frozen",
    "DALL-E's 250M pairs", Numbers(1e-4, 2048, 2_500_000, 0.0, "constant", 0.0, 0.999, 0),
    Numbers(1e-3, 32, 1500, weight_decay=0.0), trained=("denoiser",), task="glide")}
