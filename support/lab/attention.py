"""lab/attention.py: where words look in a picture."""
from __future__ import annotations

import fnmatch
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from model import IMAGE, VLM
from support.formats.files import UserError
from support.formats.pictures import PROCESSORS
from support.formats.tokenizers import Tokenizer
from support.lab.words import nearest_words


# A map of attention shows what was read, not what was made of it; so a measured number goes with the pictures.

@torch.no_grad()
def attention_to_patches(vlm: VLM, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Where one text (1, T) about one picture (1, N, Di) looks: words (L, H, T', K) and patches (K, N), float32.

    words[l, h, t]: attention of the t-th of the T' words behind the picture to its K visual tokens, in the l-th layer
    that reads them. Soft tokens share a softmax with the words: a row sums to the picture's share. Prompts and latents
    have one of their own: a row sums to 1, and a gate decides. patches[k]: of which ViT tokens visual token k is made
    (Bridge.made_of). words @ patches (L, H, T', N) leads from the words to the picture.
    """
    at = (tokens == IMAGE).nonzero()
    if len(tokens) != 1 or len(at) != 1:
        raise UserError(f"gaze reads one text about one picture, not {len(tokens)} about {len(at)}; call it for each.")
    first = int(at[0, 1])
    behind = tokens.shape[1] - first - 1                                        # T'
    _, attention = vlm(tokens, features=features, return_attention=True)
    patches = vlm.bridge.made_of(attention, features)[0]
    looks = [w for name, w in attention.items() if fnmatch.fnmatch(name, vlm.bridge.looks)]
    words = torch.stack([w[0, :, w.shape[2] - behind:] for w in looks])
    return words if words.shape[-1] == len(patches) else words[..., first:first + len(patches)], patches


def gate_history(run: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps (S,) and gates (S, layers, heads) of a run, signed, after tanh; of flamingo (S, blocks, 2)."""
    file = Path(run) / "log.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    logged = [(line["step"], line["gates"]) for line in lines if "gates" in line]
    if not logged:
        raise UserError(f"{file}: holds no gates; give the run of a zero_init, flamingo or idefics bridge.")
    return tuple(np.array(column) for column in zip(*logged))


def overlay_attention(picture: np.ndarray, weights, top: float | None = None, side: int = 144) -> np.ndarray:
    """(side, side, 3) uint8: the square picture (S, S, 3) in grey, redder where its weights (g·g,) are large.

    top: the weight of full red (None: the largest). Of g·g + 1 weights the first is the class token's and has no place.
    """
    from PIL import Image
    grow = lambda x: np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.NEAREST))[..., None]
    g, weights = math.isqrt(len(weights)), np.asarray(weights, np.float32)
    heat = 0.7 * grow((weights[len(weights) - g * g:] / (top or weights.max() or 1)).clip(0, 1).reshape(g, g))
    return ((1 - heat) * grow(picture.mean(-1, dtype=np.float32)) + heat * (255, 40, 0)).round().astype(np.uint8)


@torch.no_grad()
def draw_attention(vlm: VLM, tokenizer: Tokenizer, pixels: Tensor, prompt: str, out: Path) -> str:
    """Where a prompt looks in a picture (1, 3, S, S): words.png, tokens.png in `out`; returns a legend and tables."""
    from PIL import Image, ImageDraw
    document, features = data.Document(tokenizer).image().add(prompt), vlm.features(pixels)
    words, patches = attention_to_patches(vlm, torch.tensor([document.tokens], device=pixels.device), features)
    p, prefix = vlm.processor or PROCESSORS["clip"], vlm.bridge.soft_tokens
    picture = pixels[0].cpu().movedim(0, -1) * torch.tensor(p.std) + torch.tensor(p.mean)   # as the ViT sees it
    picture = (255 * picture).clip(0, 255).numpy()
    gates = vlm.bridge.gates()
    gates = [None] * len(words) if gates is None else gates.abs().mean(-1)
    said = [ascii(tokenizer.decode([t])) for t in document.tokens[-words.shape[2]:]]
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for file, says, heads, maps in (
            ("words.png", "a column per word, a row per layer", said, (words.mean(1) @ patches).cpu()),
            ("tokens.png", "of which patches each visual token is made", range(len(patches)), patches[None].cpu())):
        canvas, top = Image.new("RGB", (150 * maps.shape[1], 150 * len(maps) + 20), "white"), float(maps.max())
        for column, head in enumerate(heads):
            ImageDraw.Draw(canvas).text((150 * column + 4, 4), str(head), "black")
            for row, weights in enumerate(maps[:, column]):
                canvas.paste(Image.fromarray(overlay_attention(picture, weights, top)), (150 * column + 3, 150 * row + 20))
        canvas.save(out / file)
        lines.append(f"{out / file}: {says}; full red = {top:.2f}")
    for l, (w, gate) in enumerate(zip(words, gates)):
        lines.append(f"layer {l:3d}  attention to the picture {100 * float(w.sum(-1).mean()):5.1f} %")
        lines[-1] += "" if gate is None else f"  mean |gate| {gate:.3f}"
    for n, row in enumerate(nearest_words(vlm, tokenizer, features) if prefix else ()):
        lines.append(f"token {n:3d}  nearest words  " + "  ".join(f"{w!r} {c:.2f}" for w, c in row))
    return "\n".join(lines)
