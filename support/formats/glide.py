"""formats/glide.py: a run of recipe glide, and pictures side by side in one file."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model import ViTConfig
from papers.ddpm import Diffusion, cosine_betas
from papers.glide import Denoiser, Painter
from support.formats.checkpoint import Checkpoint, fill
from support.formats.files import UserError, atomically, reading_config, read_json, write_json, write_tensors
from support.formats.hub import tower_folder
from support.formats.llama import load_decoder
from support.formats.tokenizer_files import load_tokenizer


def save_painter(painter: Painter, out: Path, facts: dict, decoder: str) -> None:
    """The network; of the decoder that reads the texts its name."""
    write_tensors(out / "model.safetensors", painter.denoiser.state_dict())
    sizes = dataclasses.asdict(painter.denoiser.config)
    write_json(out / "config.json", {**facts, "model_type": "glide", "denoiser": sizes, "decoder": decoder})


def load_painter(run: Path, device=None) -> Painter:
    """A run that save_painter wrote. A UserError says what does not fit."""
    c = read_json(run / "config.json")
    if c.get("model_type") != "glide":
        raise UserError(f"{run}: draws no pictures; give a run of recipe glide.")
    folder = tower_folder(run, c.text("decoder"))
    decoder = load_decoder(folder, device)
    with reading_config(f"{run}/config.json", "the config.json of a run of recipe glide"):
        config = ViTConfig(**c["denoiser"])
        with torch.device("meta"):
            denoiser = Denoiser(config, decoder.config.width)
    fill(denoiser, Checkpoint(run / "model.safetensors"), {}, device=device)
    return Painter(denoiser.eval(), decoder, load_tokenizer(folder), Diffusion(cosine_betas(1000)))


def save_grid(file: Path, pictures: list[np.ndarray], columns: int, zoom: int = 3) -> None:
    """Pictures (h, w, 3) uint8 of one size in rows of `columns`, `zoom` times larger, with a gap between."""
    h, w = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    canvas = np.full((rows * (h + 2) - 2, columns * (w + 2) - 2, 3), 255, np.uint8)
    for n, picture in enumerate(pictures):
        top, left = n // columns * (h + 2), n % columns * (w + 2)
        canvas[top:top + h, left:left + w] = picture
    image = Image.fromarray(canvas)
    with atomically(file) as tmp:
        image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST).save(tmp, "png")
