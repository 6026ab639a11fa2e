"""VQ-VAE (1711.00937v2) and VQ-GAN (2012.09841v3): a picture becomes whole numbers, and a picture again.

An encoder turns a picture into a grid of vectors; each vector is replaced by the nearest of K codes, and a
decoder paints from the codes. The numbers of the codes are words: a decoder of text can read and write them
(papers/dalle.py, papers/chameleon.py). Document 3: the re-parameterisation of a variational autoencoder fails
for discrete codes. VQ-VAE takes the nearest neighbour instead; the dVAE of DALL-E takes Gumbel-softmax, which
the document leaves out.

    symbol   shape              here        meaning
    x, x̂     (B, 3, S, S)       pixels      in −1 … 1, and painted again
    z        (B, E, s, s)       prequant    quant_conv(encoder(x)); every level but the last halves the side
    e        (K, E)             codes       the codebook, U(−1/K, 1/K) at first
    q        (B, s, s) int64    ids         q = argmin_k ‖z − e_k‖²
    z_q      (B, E, s, s)       quantised   e_q forward; backward its gradient passes to z as it is

    (V1)  q = argmin_k ‖z − e_k‖² = argmin_k ‖e_k‖² − 2 z·e_k
    (V2)  z_q = z + sg[e_q − z],  x̂ = painter(post_quant_conv(z_q))            straight through
    (V3)  L_vq = mean(e_q − sg z)² + β mean(sg e_q − z)²                       β = 0.25
    (V4)  L = mean(x̂ − x)² + L_vq (+ perceptual + λ GAN),  λ = ‖∂L_rec/∂W‖ / (‖∂L_GAN/∂W‖ + 1e-4)

The first term of (V3) pulls the code to z, the second holds z to the code.

Paper and published code: taming-transformers (and diffusers after it) puts β on the OTHER term by default,
"legacy": mean(sg e_q − z)² + β mean(e_q − sg z)². The value is the same, the gradients are not. W in (V4)
is the last layer of the painter; λ is at most 1e4, times 0.8, and 0 for the first 250,001 steps. VQ-GAN's
L_rec is |x̂ − x| + LPIPS, a distance in the features of a VGG network. The toy has neither a perceptual nor a
GAN term, for `shapes` has no texture that they could sharpen. Nor has it convolutions: one linear map of each
patch of 4 × 4 pixels is its encoder and one its painter, so that the codes are what learns: in 40 seconds,
where the networks of papers/vq_nets.py need minutes.

In the toy a code that nobody takes begins again, for the first half of the steps, at some z of the batch
that is far from its code; from U(−1/K, 1/K) alone, a handful of codes would take all. (VQ-VAE's appendix A.1
moves the codes by a running mean of their z instead of the first term of (V3).)

The claim in miniature (document 3; Chameleon reads text badly): codes lose what is small. The report gives
the error beside that of one colour for all, and what share of SMALL and of LARGE things a reader still
finds in the painted pictures.                                          python train.py --recipe vq
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.picture_task import PictureTask
from papers.recipe import Ingredients, Numbers, Recipe
from papers.vq_nets import Encoder, Painter, PatchEncoder, PatchPainter, VQConfig, conv1

TOY = VQConfig(patch=4, latent=48, width=48, codes=512)


def vq_loss(z: Tensor, e: Tensor, beta: float = 0.25, legacy: bool = False) -> Tensor:
    """(V3) of equal shapes; legacy: β on the codebook's term, as the published code has it."""
    to_code, to_z = (e.detach() - z).square().mean(), (e - z.detach()).square().mean()
    return to_code + beta * to_z if legacy else to_z + beta * to_code                           # (V3)


class VQ(nn.Module):
    """A picture to codes and back; `painter` is None in files that hold the encoder alone (Chameleon)."""

    def __init__(self, config: VQConfig, paints: bool = True):
        super().__init__()
        c = self.config = config
        encoder, painter = (PatchEncoder, PatchPainter) if c.patch else (Encoder, Painter)
        self.encoder, self.painter = encoder(c), painter(c) if paints else None
        self.codes = nn.Parameter(torch.empty(c.codes, c.width).uniform_(-1 / c.codes, 1 / c.codes))    # e
        self.quant, self.post_quant = conv1(c.latent, c.width), conv1(c.width, c.latent)

    def prequant(self, pixels: Tensor) -> Tensor:
        return self.quant(self.encoder(pixels)).float()                         # z (B, E, s, s)

    def nearest(self, z: Tensor) -> Tensor:
        """(B, E, s, s) → (B, s, s) int64. In float32: a difference of squares loses bfloat16's few digits."""
        flat = z.movedim(1, -1).float()
        with torch.autocast(z.device.type, enabled=False):
            return (self.codes.square().sum(1) - 2 * flat @ self.codes.T).argmin(-1)            # (V1)

    def look_up(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.codes).movedim(-1, 1)                      # e_q (B, E, s, s)

    def paint(self, z: Tensor) -> Tensor:
        return self.painter(self.post_quant(z))

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) in 0 … 1 → (B, s·s) int64, row by row."""
        return self.nearest(self.prequant(2 * pixels - 1)).flatten(1)

    def decode(self, ids: Tensor) -> Tensor:
        """(B, s·s) int64 → (B, 3, S, S) in 0 … 1."""
        side = int(ids.shape[1] ** 0.5)
        return (self.paint(self.look_up(ids.unflatten(1, (side, side)))) / 2 + 0.5).clamp(0, 1)

    def forward(self, pixels: Tensor, legacy: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """pixels −1 … 1 → x̂, L_vq, z, q."""
        z = self.prequant(pixels)
        ids = self.nearest(z)
        e = self.look_up(ids)
        return self.paint(z + (e - z).detach()), vq_loss(z, e, self.config.beta, legacy), z, ids        # (V2)


def adaptive_weight(rec: Tensor, gan: Tensor, step: int, start: int = 250_001) -> Tensor:
    """λ of (V4), from the gradients of both losses at the painter's last layer."""
    return (rec.norm() / (gan.norm() + 1e-4)).clamp(max=1e4) * 0.8 * (step >= start)            # (V4)


# Of the paper's numbers our sources have none: rate (times pictures in a batch) and betas are those that we
# remember of the published configuration, whose first beta is 0.5.
RECIPES = {"vq": Recipe(
    "VQ-GAN (2012.09841v3 §3.1) without perceptual and GAN terms: encoder, codes, painter learn",
    "ImageNet", Numbers(4.5e-6, None, 600000, 0, "constant", 0.0, 0.9, 0),
    Numbers(3e-3, 16, 3000, weight_decay=0.0), task="vq",
    trained=("encoder", "painter", "quant", "post_quant", "codes"))}


class VQTask(PictureTask):
    """Recipe `vq`: (V4) with squared errors; `after_step` revives codes."""

    def __init__(self, given: Ingredients):
        super().__init__(given, VQ(TOY))

    def loss(self, pixels: Tensor, tokens: Tensor, **_) -> Tensor:
        x = 2 * pixels - 1
        painted, loss, *self.coded = self.module(x)
        self.step = int(tokens[0]) // self.given.batch
        return F.mse_loss(painted.float(), x) + loss                                            # (V4)

    @torch.no_grad()
    def after_step(self) -> None:
        """Codes that the batch did not use begin again at vectors far from theirs."""
        if self.step % 20 or 2 * self.step > self.given.steps:
            return
        z, ids = self.coded[0].movedim(1, -1).flatten(0, 2), self.coded[1].flatten()
        codes = self.module.codes
        unused = torch.bincount(ids, minlength=len(codes)) == 0
        if not unused.any():
            return
        far = (z - codes[ids]).square().sum(1)                                  # (B·s·s,)
        codes[unused] = z[far.multinomial(int(unused.sum()), replacement=True)]


TASKS = {"vq": VQTask}
