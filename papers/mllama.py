"""Llama 3.2 Vision (Llama 3, 2407.21783v3, §7; code: transformers' mllama): layers between the decoder's.

Its tower of tiles stands in papers/mllama_vit.py.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridges import Flamingo
from model import (Block, Bridge, DecoderConfig, ImagePositions, RMSNorm, merge_heads, split_heads,
                   visible_to_bias)
from papers.mllama_vit import Tiles


class CrossLayer(Block):
    """A layer of the decoder's kind that reads images instead of the text: two gates, no RoPE."""

    def __init__(self, c: DecoderConfig):
        super().__init__(c)
        self.q_norm, self.k_norm = RMSNorm(c.head_width, c.norm_eps), RMSNorm(c.head_width, c.norm_eps)
        self.attention_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def project(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """media (B, M·K, D) → keys, values (B, G, M·K, E): computed once per image."""
        a = self.attention
        return self.k_norm(split_heads(a.k(media), a.kv_heads)), split_heads(a.v(media), a.kv_heads)    # (X2)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, visible: Tensor, sees: Tensor) -> Tensor:
        """x (B, T, D); visible (B, T, M·K), sees (B, T, 1) bool. An empty row of `visible` reads exactly
        0."""
        a = self.attention
        q = self.q_norm(split_heads(a.q(self.norm1(x)), a.heads))               # (B, H, T, E) (X2)
        y = a.o(merge_heads(a.attend(q, k, v, visible_to_bias(visible[:, None], q.dtype))))
        x = x + (self.attention_gate.tanh() * y * visible.any(-1, keepdim=True)).to(x.dtype)           # (X3)
        return x + (self.ff_gate.tanh() * self.mlp(self.norm2(x)) * sees).to(x.dtype)                   # (X4)


class Mllama(Bridge):
    """Llama-3.2-Vision's bridge (Llama 3, 2407.21783v3, §7): gated layers of cross-attention.

    symbol   shape                  here              meaning
    z        (ΣM, tiles, N, Di)     features.pixels   of a TiledViT, class tokens kept, absent tiles too
    m        (B, M·K, D)            media             the images: no resampler, K = tiles · N
    α, β     (1,)                   attention_gate, ff_gate     per inserted layer, ZERO at the start
    φ(ℓ)     (B, T)                 where.last        number of the last image up to position ℓ; 0 = none

    (X1)  m = W_p z + b_p
    (X2)  q = RMS(W_q RMS(y)),  k = RMS(W_k m),  v = W_v m      outer RMS over each head; keys shared by H/G
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
        if not self.layers or max(self.layers) >= decoder.layers:
            raise ValueError(f"mllama has a layer or more before layers 0 to {decoder.layers - 1} of the "
                             f"decoder, not {self.layers}; change its cross-attention layers.")
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
        # (ΣM,) for each image the number of the first one in its run of neighbours
        first = (last * (is_image & ~shift(is_image))).cummax(1).values[is_image]
        media = by_row(z.flatten(1, 2))
        return {"kv": [block.project(media) for block in self.blocks], "where": where,
                "image": by_row(where.order[:, None].expand(-1, tiles * N)),    # whose patch; 0 = nobody's
                "tile": by_row(features.mask.bool().repeat_interleave(N, 1)),   # False = of an absent tile
                "first": last.new_zeros(B, M + 1).index_put((where.row, where.order), first)}

    def before(self, layer: int, x: Tensor, visual: dict | None) -> Tensor:
        if visual is None or layer not in self.layers or not visual["image"].shape[1]:
            return x
        phi = visual["where"].columns(x.shape[1])                               # (B, T)       φ(ℓ)
        first, sees = visual["first"].gather(1, phi)[..., None], (phi > 0)[..., None]
        image = visual["image"][:, None]                                        # (B, 1, M·K)
        visible = (first <= image) & (image <= phi[..., None])          # (B, T, M·K) True = may attend
        visible = visible & visual["tile"][:, None]
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
