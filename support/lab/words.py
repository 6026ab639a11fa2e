"""lab/words.py: the words nearest to soft tokens, and both in one plane."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model import VLM
from support.formats.files import UserError
from support.formats.tokenizers import Tokenizer


@torch.no_grad()
def nearest_words(vlm: VLM, tokenizer: Tokenizer, features: Tensor, k: int = 5,
                  bridge_tokens: Tensor | None = None) -> list[list[tuple[str, float]]]:
    """The k words nearest to each soft token h of a picture (1, N, Di): K lists of (word, cosine).

    (A1)  cos(h, e_v) = h · e_v / (‖h‖ ‖e_v‖)        e_v: row v of the embedding matrix

    Lengths are left out because soft tokens are far longer than words. bridge_tokens: as in VLM.prepare.
    """
    if not vlm.bridge.soft_tokens:
        raise UserError(f"a {vlm.bridge.name} bridge puts no soft tokens among the words, so none has a "
                        "nearest word.")
    text = {} if bridge_tokens is None else {"text": bridge_tokens}
    soft = vlm.bridge.prefix(vlm.bridge.see(features, **text))[0].float()       # (K, D)
    words = vlm.decoder.embed.weight[:vlm.decoder.config.vocab_size].float()
    near = (F.normalize(soft, dim=-1) @ F.normalize(words, dim=-1).T).topk(k)   # (K, k) (A1)
    return [[(tokenizer.decode([v], special=True), c) for v, c in zip(*row)]
            for row in zip(near.indices.tolist(), near.values.tolist())]


def joint_projection(visual: Tensor, words: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Visual tokens (K, D) and words (V, D) in one plane: (K, 2), (V, 2), and each axis's share of variance.

    The plane spans the first two principal components of all directions h / ‖h‖. An axis points to its
    largest coordinate.
    """
    x = F.normalize(torch.cat((visual, words)).detach().double(), dim=-1)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    plane = u[:, :2] * s[:2]
    plane = plane * plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()
    return *plane.float().tensor_split([len(visual)]), (s[:2].square() / s.square().sum()).tolist()
