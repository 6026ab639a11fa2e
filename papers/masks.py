"""Who may attend to whom: one rule for the masks of decoders, Q-Formers and mixed streams of text and images.

Show-o (2408.12528) and Transfusion (2408.11039) write text left to right and let the tokens of an image see
each other; document 3 names both masks in a line, and calls both systems discrete: Transfusion's patches are
continuous. The other masks are those of papers that stand in this house. All follow from one rule:

    symbol   shape     here                meaning
    r_s      (…, S)    rank                when a key is there to be seen
    R_t      (…, T)    reach               up to which rank a query sees
    g        (…, T|S)  group, key_group    queries and keys of different groups never meet

    (K1)  visible(t, s) = [g_t = g_s and r_s ≤ R_t]

A mask of a stream has one number per position, r = R = place, and its name says which:

    kind           place of position t             where it is used
    causal         t                               GPT, Chameleon, DALL-E
    all            0                               BERT, ViT; Q-Former's ITM
    prefix         max(t, T_p − 1)                 SimVLM, UnifiedIO-2; Q-Former's ITG and GIT: T_p = Q, the
                                                   queries are the prefix; Show-o, when it answers
    apart          0, in the group of its modality     Q-Former's ITC
    transfusion    the last position of its image, t of a word
    show-o         t, but an image reaches the end: it sees the text behind it, too
    cm3            where the infilled sequence (papers/cm3.py) has it: then a span sees both of its sides, and
                   nothing but spans sees a span

`document` (…, T) packs several texts into a row: each is a group. Padding is group 0 and sees padding: no
softmax has an empty row, and what it makes there is never read. Flamingo's words see latents of images:
there keys are not queries, see `image_mask`.

Paper and code: Show-o's builder counts the marks at both ends of an image as image, and hides padding on
request only. Transfusion's loss is L_LM + 5 · L_DDPM; here is its mask alone.
"""
from __future__ import annotations

import torch
from torch import Tensor

from model import Bridge, visible_to_bias

KINDS = ("causal", "all", "prefix", "apart", "transfusion", "show-o", "cm3")


def visible(rank: Tensor, reach: Tensor, group: Tensor | None = None,
            key_group: Tensor | None = None) -> Tensor:
    """(…, T, S) bool, True = may attend, from rank (…, S), reach (…, T), group (…, T), key_group (…, S)."""
    sees = rank[..., None, :] <= reach[..., :, None]
    if group is None:
        return sees
    key_group = group if key_group is None else key_group
    return sees & (group[..., :, None] == key_group[..., None, :])                      #           (K1)


def stream_mask(kind: str, image: Tensor, document: Tensor | None = None, prefix: Tensor | int | None = None,
                order: Tensor | None = None) -> Tensor:
    """(…, T, T) bool, True = may attend.

    image (…, T) int64: the number of the image that a position belongs to, from 1; 0 = a word
    document (…, T) int64: the number of its document, from 1; 0 = padding. None: one document, no padding
    prefix (…,), for "prefix": T_p, how many positions from the first of the row; or (…, T) bool, which
    order (…, T), for "cm3": the place of each position in the infilled sequence
    """
    if kind not in KINDS:
        raise ValueError(f'there is no mask "{kind}"; known: {", ".join(KINDS)}.')
    t = torch.arange(image.shape[-1], device=image.device).expand_as(image)
    place, reach = t, None
    if kind == "cm3":
        place = order
    elif kind in ("all", "apart"):
        place = torch.zeros_like(t)
    elif kind == "prefix":
        first = prefix if torch.is_tensor(prefix) else torch.tensor(prefix, device=image.device)
        inside = first if first.dtype == torch.bool else t < first[..., None]
        place = t.masked_fill(inside, -1)               # below every word: the same rule as max(t, T_p − 1)
    elif kind == "transfusion":
        last = (image[..., :, None] == image[..., None, :]) * t[..., None, :]
        place = torch.where(image > 0, last.amax(-1), t)
    elif kind == "show-o":
        reach = t.masked_fill(image > 0, image.shape[-1])
    group = torch.zeros_like(t) if document is None else document
    if kind == "apart":
        group = 2 * group + (image > 0)
    return visible(place, place if reach is None else reach, group)


def image_mask(last: Tensor, image: Tensor, see_all: bool = False) -> Tensor:
    """Flamingo: (…, T, S) bool between words and the latents of images; a word before the first sees none.

    last (…, T): the number φ of the last image at or before a word, 0 = none; image (…, S): of which image
    a latent is, from 1. see_all: all images up to it instead.
    """
    return visible(image, last) if see_all else visible(0 * image, 0 * last, last, image)


class MaskedStream(Bridge):
    """A decoder under a mask (B, T, T), given as `visual`; one token more at a time sees all that is there.

    Rotary positions stay 0, 1, 2, …
    """
    name = "masked_stream"

    def around(self, layer: int, part: str, f, visual: Tensor, *x: Tensor) -> Tensor:
        if part != "attend" or x[1].shape[2] != visual.shape[2]:                # q, k, v, bias, causal
            return f(*x)
        return f(*x[:3], visible_to_bias(visual, x[0].dtype)[:, None], False)
