"""plumbing/doctor.py: what to look at before a run spends the evening."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import data
from model import Bridge, IGNORE, IMAGE, VLM, next_token_loss
from support.plumbing.ranks import full_tensor


@torch.no_grad()
def blind_loss(vlm: VLM, piece: dict) -> Tensor:
    """The summed loss of a piece for the decoder alone: what a bridge that says nothing would score."""
    tokens, labels, mask = piece["tokens"], piece["labels"], piece["mask"]
    inputs, labels = VLM(vlm.vit, Bridge(), vlm.decoder).prepare(tokens, tokens.new_zeros(int((tokens == IMAGE).sum()), 0, 0), mask, labels)
    return next_token_loss(vlm.decoder, labels, **inputs)[0]


def gradient_norms(trained) -> str:
    """|g| of each part, two names deep: a part that is stuck at zero is seen at the first step."""
    norms: dict[str, float] = {}
    for n, p in trained:
        if p.grad is not None:
            name = ".".join(n.split(".")[:2])
            norms[name] = norms.get(name, 0.0) + full_tensor(p.grad.float().square().sum()).item()
    return "  ".join(f"{name} {math.sqrt(v):.2g}" for name, v in norms.items())


def align_tokens(document: data.Document, tokenizer, width: int = 110) -> list[str]:
    """Tokens in one line, below each what is learned there (a blank is ~), in pairs of lines of at most `width` columns."""
    say = lambda t: "<image>" if t == IMAGE else "" if t == IGNORE else tokenizer.decode([t], special=True).replace(" ", "~").replace("\n", "↵")
    lines, top, low = [], "", ""
    for t, l in zip(document.tokens, document.labels):
        n = max(len(say(t)), len(say(l))) + 1
        if top and len(top) + n > width:
            lines, top, low = [*lines, top, low], "", ""
        top, low = top + say(t).ljust(n), low + say(l).ljust(n)
    return [*lines, top, low]


def print_modules(module: nn.Module) -> None:
    """The first thing to check of a run: what is trained and what is frozen."""
    rows = [(n, sum(p.numel() for p in m.parameters()), sum(p.numel() for p in m.parameters() if p.requires_grad),
             sum(p.numel() * p.element_size() for p in m.parameters())) for n, m in module.named_children()]
    rows += [(n, p.numel(), p.numel() * p.requires_grad, p.numel() * p.element_size()) for n, p in module.named_parameters(recurse=False)]
    print(f"{'module':18s}{'parameters':>14s}{'trained':>14s}{'MB':>9s}")
    for name, total, trained, size in rows:
        print(f"{name:18s}{total:14,d}{trained:14,d}{size / 1e6:9.1f}   {'trained' if trained else 'frozen'}")
