"""papers/mllama.py: Llama 3.2 Vision (2407.21783v3, §7): whole layers between the decoder's."""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridges import Flamingo
from model import (Block, Bridge, DecoderConfig, EncoderBlock, ImagePositions, RMSNorm, ViTConfig,
                   merge_heads, split_heads, visible_to_bias)


@dataclass
class Tiles:
    """Images cut into squares: stand in for the pixels of a VLM, and for the features that a TiledViT makes
    of them."""
    pixels: Tensor  # (ΣM, tiles, 3, S, S), as features (ΣM, tiles, N, Di); an absent tile holds what zeros become
    aspect: Tensor      # (ΣM,) int64: which arrangement of tiles, from 1 (aspect_ratio_ids)
    mask: Tensor        # (ΣM, tiles) bool: True = a tile

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows) -> Tiles:
        return Tiles(self.pixels[rows], self.aspect[rows], self.mask[rows])

    def to(self, device) -> Tiles:
        return Tiles(self.pixels.to(device), self.aspect.to(device), self.mask.to(device))


@dataclass(frozen=True)
class TiledViTConfig(ViTConfig):
    """Defaults: Llama-3.2-Vision, as transformers' configuration class has them (the released files say 560
    pixels)."""
    image_size: int = 448       # S of one tile
    patch: int = 14
    width: int = 7680           # Di, what a bridge reads: inner · (1 + number of taps)
    layers: int = 32            # local blocks
    heads: int = 16
    hidden: int = 5120
    act: str = "gelu"
    pool: str = "tiles"
    inner: int = 1280           # width of the blocks
    global_layers: int = 8      # gated blocks after them
    taps: tuple[int, ...] = (3, 7, 15, 23, 30)      # local blocks, from 0, whose outputs are features too
    tiles: int = 4              # most tiles of an image
    aspects: int = 8            # arrangements of tiles, counted from 1

    def __post_init__(self):
        super().__post_init__()
        if self.width != self.inner * (1 + len(self.taps)) or not all(0 <= i < self.layers for i in self.taps):
            raise ValueError(f"features of width {self.width} are not {self.inner} times one more than the "
                            f"{len(self.taps)} tapped blocks {list(self.taps)}, or one of these is not among the {self.layers}.")


class GatedEncoderBlock(EncoderBlock):
    """An EncoderBlock without biases in its attention, whose two terms are multiplied by tanh of a gate."""

    def __init__(self, width: int, heads: int, hidden: int, act: str, eps: float):
        super().__init__(width, heads, hidden, act, eps, attention_bias=False)
        self.attention_gate, self.mlp_gate = (nn.Parameter(torch.full((1,), math.pi / 4)) for _ in range(2))

    def forward(self, x: Tensor, causal: bool = False, bias: Tensor | None = None) -> Tensor:
        x = x + self.attention_gate.tanh() * self.attention(self.norm1(x), causal, bias)
        return x + self.mlp_gate.tanh() * self.mlp(self.norm2(x))


class TiledViT(nn.Module):
    """Mllama's vision tower (Llama 3, 2407.21783v3, §7; transformers' mllama): the tiles of an image in one
    sequence.

                         ViT                     TiledViT
        an image         one square              up to `tiles` squares, and which arrangement of them it is (aspect)
        positions p      one table               (1 − tanh g) p + tanh g · p[aspect, tile]
        a tile's place   –                       tanh g' · e'[aspect, tile] on patches, tanh g" · e"[…] after post_norm
        padding          –                       zeros behind each tile, up to a multiple of 8 tokens, after pre_norm
        mask             none                    padding (zeros,
                                                          absent tiles) does not see padding; the rest sees all
        attention        biases                  no biases
        blocks           L                       L, post_norm, then `global_layers` with two tanh gates each
        ε of the norms   norm_eps                norm_eps in the blocks, 1e-5 in pre_norm and post_norm
        features         one hidden state        the last one, then the outputs of the blocks `taps`, channel by channel
    """

    def __init__(self, config: TiledViTConfig):
        super().__init__()
        c = self.config = config
        sizes = c.inner, c.heads, c.hidden, c.act, c.norm_eps

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * c.inner**-0.5)

        self.patch = nn.Conv2d(3, c.inner, c.patch, stride=c.patch, bias=False)
        self.cls, self.positions = table(c.inner), table(c.tokens, c.inner)                            # p
        self.tile_positions = table(c.aspects + 1, c.tiles * c.tokens * c.inner)        # p[aspect, tile]
        self.before, self.after = (table(c.aspects + 1, c.tiles * c.inner) for _ in range(2))   # e', e"
        self.gate, self.before_gate, self.after_gate = (nn.Parameter(torch.zeros(1)) for _ in range(3))  # g, g', g"
        self.pre_norm, self.post_norm = nn.LayerNorm(c.inner, eps=1e-5), nn.LayerNorm(c.inner, eps=1e-5)
        self.blocks = nn.ModuleList(EncoderBlock(*sizes, attention_bias=False) for _ in range(c.layers))
        self.global_blocks = nn.ModuleList(GatedEncoderBlock(*sizes) for _ in range(c.global_layers))

    def forward(self, images: Tiles) -> Tensor:
        """(ΣM, tiles, 3, S, S) → (ΣM, tiles, N, Di), absent tiles too; each tile's class token stands at
        index 0."""
        c, gate, zeros = self.config, self.gate.tanh(), -self.config.tokens % 8

        def of(table: Tensor) -> Tensor:
            """The rows of each image's arrangement: (ΣM, tiles, 1 or N, inner)."""
            return table[images.aspect].unflatten(1, (c.tiles, -1, c.inner))

        x = self.patch(images.pixels.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (-1, c.tiles))
        x = x + self.before_gate.tanh() * of(self.before)                       # (ΣM, tiles, N−1, inner)
        x = torch.cat((self.cls.expand(*x.shape[:2], 1, -1), x), dim=2)
        x = self.pre_norm(x + (1 - gate) * self.positions + gate * of(self.tile_positions))
        x = F.pad(x, (0, 0, 0, zeros)).flatten(1, 2)                            # (ΣM, tiles·N', inner)
        real = F.pad(images.mask.bool()[..., None].expand(-1, -1, c.tokens), (0, zeros)).flatten(1)
        bias = visible_to_bias(real[:, None, :, None] | real[:, None, None],
                               x.dtype)  # (ΣM, 1, tiles·N', tiles·N')
        taps = {}
        for i, block in enumerate(self.blocks):
            x = block(x, bias=bias)
            if i in c.taps:
                taps[i] = x
        x = (self.post_norm(x).unflatten(1,
                                         (c.tiles, -1)) + self.after_gate.tanh() * of(self.after)).flatten(1,
                                                                                                           2)
        for block in self.global_blocks:
            x = block(x, bias=bias)
        x = torch.cat((x, torch.stack([taps[i] for i in c.taps], -1).flatten(2)), dim=-1)
        return x.unflatten(1, (c.tiles, -1))[:, :, :c.tokens]                           # (ΣM, tiles, N, Di)

    def features(self, pixels: Tiles, layer: int = -1, cls: bool = True) -> Tiles:
        """What a bridge reads: the features of every tile, with the aspect and the mask they belong to."""
        c = self.config
        if layer != -1 or not cls:
            raise ValueError(f"a tower of tiles is read with reads=-1, reads_cls=True, not {layer} and {cls}.")
        if not isinstance(pixels, Tiles) or pixels.pixels.shape[1:] != (c.tiles, 3, c.image_size,
                                                                        c.image_size):
            got = f"Tiles of shape {tuple(pixels.pixels.shape)}" if isinstance(pixels,
                                                                               Tiles) else type(pixels).__name__
            raise ValueError(f"this tower reads Tiles of shape (images, {c.tiles}, 3, {c.image_size}, {c.image_size}), "
                            f"not {got}; make them with Tiles(*data.tile_pixels(images, …)).")
        return Tiles(self(pixels), pixels.aspect, pixels.mask)


class CrossLayer(Block):
    """A layer of the decoder's kind that reads images where the others read the text, behind two gates; no
    RoPE."""

    def __init__(self, c: DecoderConfig):
        super().__init__(c)
        self.q_norm, self.k_norm = RMSNorm(c.head_width, c.norm_eps), RMSNorm(c.head_width, c.norm_eps)
        self.attention_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def project(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """media (B, M·K, D) → keys, values (B, G, M·K, E): computed once per image."""
        a = self.attention
        return self.k_norm(split_heads(a.k(media), a.kv_heads)), split_heads(a.v(media), a.kv_heads)    # (X2)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, visible: Tensor, sees: Tensor) -> Tensor:
        """x (B, T, D), visible (B, T, M·K) bool, sees (B, T, 1) bool. An empty row of `visible` reads exactly
        0."""
        a = self.attention
        q = self.q_norm(split_heads(a.q(self.norm1(x)), a.heads))               # (B, H, T, E) (X2)
        y = a.o(merge_heads(a.attend(q, a.widen(k), a.widen(v), visible_to_bias(visible[:, None], q.dtype))))
        x = x + (self.attention_gate.tanh() * y * visible.any(-1, keepdim=True)).to(x.dtype)           # (X3)
        return x + (self.ff_gate.tanh() * self.mlp(self.norm2(x)) * sees).to(x.dtype)                   # (X4)


class Mllama(Bridge):
    """Llama-3.2-Vision (Llama 3, 2407.21783v3, §7; code: transformers' mllama): whole layers between the
    decoder's.

    symbol   shape                  here              meaning
    z        (ΣM, tiles, N, Di)     features.pixels   of a TiledViT, class tokens kept, absent tiles too
    m        (B, M·K, D)            media             the images: no resampler, K = tiles · N
    α, β     (1,)                   attention_gate, ff_gate     per inserted layer, ZERO at the start
    φ(ℓ)     (B,
              T)                 where.last        number of the last image at or before position ℓ; 0 = none

    (X1)  m = W_p z + b_p
    (X2)  q = RMS(W_q RMS(y)),  k = RMS(W_k m),  v = W_v m      the outer RMS over each head; keys shared by H/G heads
    (X3)  y ← y + tanh(α) · W_o Attn(q, k, v)                   over the tiles of the images that ℓ sees
    (X4)  y ← y + tanh(β) · SwiGLU(RMS(y))                      nothing where ℓ sees no image

    ℓ sees image φ(ℓ) and those directly before it, with no word between them; an image's own token sees it.
    Codes differ where φ = 0: Meta's adds nothing, transformers' leaves out (X4) alone, so that words before
    the first image read every tile of the row's images, absent ones too. leak=True follows transformers, and
    so does load_vlm. (In a batch its leak also reads the empty images with which it pads other rows; ours
    stays with a row's own.)

    `layers` counts OUR decoder's layers: what published files have at 3, 8, 13, … of 40 stands before 3, 7,
    11, … of 32.
    """
    name, reads, reads_cls = "mllama", -1, True

    def __init__(self, decoder: DecoderConfig, vision_width: int, layers: list[int] | None = None,
                 leak: bool = False):
        super().__init__()
        self.layers, self.leak = list(range(3, decoder.layers, 4) if layers is None else layers), leak
        self.map = nn.Linear(vision_width, decoder.width)
        self.blocks = nn.ModuleList(CrossLayer(decoder) for _ in self.layers)

    def see(self, features: Tiles, where: ImagePositions) -> dict:
        z, last, image = self.map(features.pixels), where.last, where.order - 1     # (ΣM, tiles, N, D) (X1)
        B, M, (tiles, N) = len(last), int(image.max()) + 1 if len(image) else 0, z.shape[1:3]

        def by_row(t: Tensor) -> Tensor:
            """(ΣM, K, …) → (B, M·K, …): the patches of each row's images, image-major."""
            return t.new_zeros(B, M, *t.shape[1:]).index_put((where.row, image), t).flatten(1, 2)

        def shift(t: Tensor) -> Tensor:
            """What stands one position to the left."""
            return F.pad(t, (1, 0))[:, :-1]

        is_image = last > shift(last)                                           # (B, T)
        first = (last * (is_image & ~shift(is_image))).cummax(1).values[is_image]  # (ΣM,) first neighbour's number
        media = by_row(z.flatten(1, 2))
        return {"kv": [block.project(media) for block in self.blocks], "where": where,
                "image": by_row(where.order[:, None].expand(-1,
                                                            tiles * N)),  # whose patch a key is; 0 = nobody's
                "tile": by_row(features.mask.bool().repeat_interleave(N,
                                                                      1)),  # False = the patch of an absent tile
                "first": last.new_zeros(B, M + 1).index_put((where.row, where.order), first)}

    def before(self, layer: int, x: Tensor, visual: dict | None) -> Tensor:
        if visual is None or layer not in self.layers or not visual["image"].shape[1]:
            return x
        phi = visual["where"].columns(x.shape[1])                               # (B, T)       φ(ℓ)
        first, sees = visual["first"].gather(1, phi)[..., None], (phi > 0)[..., None]
        image = visual["image"][:, None]                                        # (B, 1, M·K)
        visible = (first <= image) & (image <= phi[..., None]) & visual["tile"][:,
                                                                                None]  # (B, T, M·K) True = attend
        if self.leak:
            visible = visible | (image > 0) & ~sees
        for n, at in enumerate(self.layers):
            if at == layer:
                x = self.blocks[n](x, *visual["kv"][n], visible, sees)
        return x

    gates = Flamingo.gates

    @property
    def gated_layers(self) -> list[int]:
        return self.layers
