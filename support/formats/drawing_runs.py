"""formats/drawing_runs.py: a run that draws pictures of texts (glide, dalle-2, chameleon-2), read back."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import Shapes
from papers.chameleon_task import ChameleonTask
from papers.dalle import DalleTask
from papers.recipe import Ingredients, Task
from support.formats.checkpoint import Checkpoint, fill
from support.formats.files import RUN, UserError, read_json
from support.formats.glide import load_painter
from support.formats.hub import tower_folder
from support.formats.llama import load_decoder
from support.formats.picture_runs import PICTURES, open_picture_tokenizer
from support.formats.tokenizer_files import load_tokenizer

CODES = {"dalle-2": DalleTask, "chameleon-2": ChameleonTask}            # recipe → what draws by codes
READS = {"glide": ("scale", "steps"), **{recipe: ("temperature",) for recipe in CODES}}
Drawer = Callable[[list[str], int], list[np.ndarray]]                   # texts, seed → uint8 (S, S, 3) each


def drawing_recipe(run: Path) -> str:
    """The recipe of a run that draws. A UserError where it draws nothing."""
    config = read_json(run / "config.json", RUN)
    recipe = config.object("settings").text("recipe") if "settings" in config else ""
    if recipe not in READS:
        raise UserError(f"{run}: draws no pictures; give a run of recipe {', '.join(READS)}.")
    return recipe


def load_drawer(run: Path, device=None, **how) -> Drawer:
    """how: scale and steps of glide, temperature of the others; None leaves the default."""
    recipe, how = drawing_recipe(run), {name: value for name, value in how.items() if value is not None}
    if unread := sorted({*how} - {*READS[recipe]}):
        raise UserError(f"--{unread[0]}: a run of recipe {recipe} does not read it; it reads "
                        f"{' and '.join('--' + name for name in READS[recipe])}.")
    if recipe == "glide":
        painter = load_painter(run, device)
        return lambda texts, seed: painter.draw(texts, seed=seed, **how)
    task = load_code_task(run, recipe, device)
    return lambda texts, seed: to_arrays(task.draw(texts, seed=seed, **how))


def to_arrays(pictures: Tensor) -> list[np.ndarray]:
    """(n, 3, S, S) in 0 … 1 → n of (S, S, 3) uint8."""
    return [*(255 * pictures).round().byte().movedim(1, -1).numpy()]


def load_code_task(run: Path, recipe: str, device=None) -> Task:
    """Its module with what was trained; the words are those of the decoder that the run began with."""
    config = read_json(run / "config.json")
    folder = tower_folder(run, config.object("settings").text("lm"))
    given = Ingredients(torch.device(device or "cpu"), seed=0, batch=1, steps=1, world=Shapes(),
                        tokenizer=load_tokenizer(folder), decoder=load_decoder(folder),
                        images=open_picture_tokenizer(config.text("pictures"), run, run / PICTURES, device))
    task = CODES[recipe](given)
    fill(task.module, Checkpoint(run / "model.safetensors"), {}, device=device)
    task.module.requires_grad_(False).eval()
    return task
