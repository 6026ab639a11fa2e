"""plumbing/doctor.py: what to look at before a run spends the evening.

Is the image used, what is learned, which parts get a gradient?
"""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from model import Bridge, IGNORE, IMAGE, VLM, next_token_loss
from support.formats.files import atomically
from support.plumbing.ranks import Ranks, full_tensor


@torch.no_grad()
def blind_loss(vlm: VLM, piece: dict) -> Tensor:
    """The summed loss of a piece for the decoder without any image: a bridge that adds nothing scores it."""
    tokens, labels, mask = piece["tokens"], piece["labels"], piece["mask"]
    nothing = tokens.new_zeros(int((tokens == IMAGE).sum()), 0, 0)
    inputs, labels = VLM(vlm.vit, Bridge(), vlm.decoder).prepare(tokens, nothing, mask, labels)
    return next_token_loss(vlm.decoder, labels, **inputs)[0]


def report_blind_loss(vlm: VLM, pieces: list[dict], scales: list[float], ranks: Ranks) -> float:
    """The blind loss of an update; the first process prints it, and the share of tokens that are learned."""
    blind = ranks.average(sum(scale * blind_loss(vlm, piece) for piece, scale in zip(pieces, scales)))
    counts = ranks.all_gather((sum(p["count"] for p in pieces), sum(p["tokens"].numel() for p in pieces)))
    learned, total = map(sum, zip(*counts))
    if ranks.first:
        print(f"doctor   the decoder without any image: loss {blind:.3f}; {learned:,} of {total:,} tokens "
              f"are learned ({100 * learned / total:.0f} %)")
    return blind


def gradient_norms(trained: list[tuple[str, nn.Parameter]]) -> str:
    """|g| of each part, two names deep: a part that is stuck at zero is seen at the first step."""
    squares: dict[str, float] = {}
    for n, p in trained:
        if p.grad is not None:
            name = ".".join(n.split(".")[:2])
            squares[name] = squares.get(name, 0.0) + full_tensor(p.grad.float().square().sum()).item()
    return "  ".join(f"{name} {math.sqrt(v):.2g}" for name, v in squares.items())


def gate_details(bridge: Bridge, heads: int) -> dict:
    """Gates (layers, gates of a layer), the layers, and whether a gate belongs to a head; {} without any."""
    gates = bridge.gates()
    if gates is None:
        return {}
    return {"gates": gates.tolist(), "layers": bridge.gated_layers, "per_head": gates.shape[1] in (1, heads)}


def print_first_document(document, pictures: list[np.ndarray], tokenizer, out: Path) -> None:
    """The first picture as first.png, and the document's tokens above what is learned of them."""
    for picture in pictures[:1]:
        with atomically(out / "first.png") as tmp:
            Image.fromarray(picture).save(tmp, "png")
    print(f"first    {out}/first.png, and its text; the second line is what is learned, ~ a blank")
    for line in align_tokens(document, tokenizer):
        print(f"         {line}")


def align_tokens(document, tokenizer, width: int = 110) -> list[str]:
    """Pairs of lines of at most `width` columns: tokens, and below each what is learned there (a blank is ~).

    document: has `tokens` and `labels` of one length.
    """
    def text(token: int) -> str:
        if token in (IMAGE, IGNORE):
            return "<image>" if token == IMAGE else ""
        return tokenizer.decode([token], special=True).replace(" ", "~").replace("\n", "↵")

    lines, top, low = [], "", ""
    for token, label in zip(document.tokens, document.labels):
        columns = max(len(text(token)), len(text(label))) + 1
        if top and len(top) + columns > width:
            lines, top, low = [*lines, top, low], "", ""
        top, low = top + text(token).ljust(columns), low + text(label).ljust(columns)
    return [*lines, top, low]


def print_modules(module: nn.Module) -> None:
    """The first thing to check of a run: what is trained and what is frozen."""
    print(f"{'module':18s}{'parameters':>14s}{'trained':>14s}{'MB':>9s}")
    parts = [(name, list(part.parameters())) for name, part in module.named_children()]
    parts += [(name, [p]) for name, p in module.named_parameters(recurse=False)]
    for name, parameters in parts:
        total = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        megabytes = sum(p.numel() * p.element_size() for p in parameters) / 1e6
        print(f"{name:18s}{total:14,d}{trained:14,d}{megabytes:9.1f}   {'trained' if trained else 'frozen'}")
