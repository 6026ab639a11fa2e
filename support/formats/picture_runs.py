"""support/formats/picture_runs.py: a tokenizer of pictures (recipe vq or dvae) is read back from its run."""
from __future__ import annotations

from pathlib import Path

import torch

from papers import dvae, vq
from support.formats.checkpoint import Checkpoint, fill
from support.formats.files import RUN, UserError, read_json, write_tensors

KINDS = {"vq": (vq.VQ, vq.TOY), "dvae": (dvae.DVAE, dvae.TOY)}          # recipe → class, toy sizes
PICTURES = "pictures.safetensors"                       # of a drawing model's run: its tokenizer of pictures


def load_picture_tokenizer(run: Path, device=None) -> vq.VQ | dvae.DVAE:
    if not run.name:
        raise UserError("this recipe begins with a trained tokenizer of pictures; give --init RUN, a run "
                        "of recipe vq or dvae.")
    recipe = read_json(run / "config.json", RUN).object("settings").text("recipe")
    return open_picture_tokenizer(recipe, run, run / "model.safetensors", device)


def open_picture_tokenizer(recipe: str, run: Path, file: Path, device=None) -> vq.VQ | dvae.DVAE:
    if recipe not in KINDS:
        raise UserError(f"{run}: a run of recipe {recipe}, not of vq or dvae, which train a tokenizer of "
                        "pictures.")
    kind, sizes = KINDS[recipe]
    with torch.device("meta"):
        tokenizer = kind(sizes)
    fill(tokenizer, Checkpoint(file), {}, device=device)
    return tokenizer.requires_grad_(False).eval()


def save_picture_tokenizer(tokenizer: vq.VQ | dvae.DVAE, out: Path) -> str:
    """Writes it beside the model that was trained on its codes; returns its recipe."""
    write_tensors(out / PICTURES, tokenizer.state_dict())
    return next(recipe for recipe, (kind, _) in KINDS.items() if isinstance(tokenizer, kind))
