"""formats/towers.py: where a run's decoder and ViT come from, what a task of training gets of them, and how
the run's config.json names them."""
from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import Processor, to_pixels
from model import Bridge, Decoder, VLM, ViT, ViTConfig
from papers import chameleon_task, cm3, coca_task, dpo, flava_task, round_robin, short, simvlm
from papers.clip import CLIP, text_tokens
from papers.gligen_task import take_place
from papers.recipe import Ingredients, Task
from papers.unread import PAIR_TASKS
from support.formats.blip2 import fill_from_stage1, save_stage1
from support.formats.checkpoint import Checkpoint, Source, fill, tensor_for
from support.formats.files import UserError, at_the_door, read_json, write_json, write_tensors
from support.formats.glide import save_grid, save_painter
from support.formats.hub import fetch, is_hub_name, tower_folder
from support.formats.llama import load_decoder
from support.formats.picture_runs import load_picture_tokenizer, save_picture_tokenizer
from support.formats.pictures import load_processor
from support.formats.tokenizer_files import copy_tokenizer, load_tokenizer
from support.formats.tokenizers import Tokenizer
from support.formats.vision import load_clip, load_vit, save_clip, save_vit
from support.formats.vlm import load_bridge_file, save_vlm, stored_bridge

TEXT_TOWER = "weights/clip-text"                        # beside the bundled ViT
HERE = Path(__file__).parents[2]
BEHIND_QFORMER = ("minigpt4",)                          # bridges that take a finished Q-Former
# … or a part of a finished bridge: bridge → (the other, the part's name in both, what else that one has)
AROUND = {"gligen": ("linear", "map", ()), "told_flamingo": ("told", "writer", ("prompts",))}
WEIGHTS = "weights"                                     # the bundled towers: weights/decoder, weights/vit
FLAGS = {"decoder": "lm", "vit": "vit"}                 # a part of a run → the flag that names another one


def resolve_folder(name: str) -> Path:
    """The folder of a tower: a path, a bundled tower, or a name on the hub that is fetched."""
    if name.startswith(f"{WEIGHTS}/") and not (Path(name).is_dir() or (HERE / name).is_dir()):
        raise UserError(f"{name}: no such folder; make the bundled towers again: "
                        "python train.py --recipe lm and --recipe clip.")
    return fetch(name)


def portable_name(name: str, out: Path) -> str:
    """How config.json in `out` names a tower: its name on the hub, else its path, relative if it can be."""
    if not Path(name).is_dir() and is_hub_name(name):
        return name
    folder = resolve_folder(name).resolve()
    for base in (out.resolve(), HERE.resolve()):
        if folder.is_relative_to(base):
            return str(folder.relative_to(base))
    return str(folder)


def tower_names(lm: str, vit: str, init: str = "") -> dict[str, str]:
    """{"decoder": …, "vit": …}: from the run folder `init` where it trained them, else lm and vit.

    A flag that names one beside such a run is a UserError.
    """
    names = {"decoder": lm, "vit": vit}
    for part, name in names.items():
        if init and (Path(init) / part / "config.json").exists():
            if name != f"{WEIGHTS}/{part}":
                raise UserError(f"--{FLAGS[part]} {name}: training goes on with the {part} of {init}; leave "
                                "one of the two out.")
            names[part] = str(Path(init) / part)
    return names


def load_words(lm: str) -> Tokenizer:
    """The tokenizer that a training writes its documents with: it has a token that ends an answer."""
    tokenizer = load_tokenizer(resolve_folder(lm))
    if tokenizer.eos is None:
        raise UserError(f"{lm}: its tokenizer names no token that ends a text; write one as eos_token into "
                        "its tokenizer_config.json.")
    return tokenizer


def load_answer_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    """Tokenizer, decoder, ViT and image processor, on given.device; vit "random" is a new ViT."""
    names = tower_names(lm, vit, init)
    given.tokenizer = load_words(names["decoder"])
    given.decoder = load_decoder(resolve_folder(names["decoder"]), given.device)
    if names["vit"] == "random":
        given.vit = ViT(ViTConfig()).to(given.device)
    else:
        given.vit = load_vit(resolve_folder(names["vit"]), given.device)
    pictures = f"{WEIGHTS}/vit" if names["vit"] == "random" else names["vit"]
    given.processor = load_processor(resolve_folder(pictures))


def load_stage1_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    """Tokenizer, ViT and its image processor, and how the run is written."""
    name = tower_names(lm, vit, init)["vit"]
    given.tokenizer = load_words(lm)
    given.vit = load_vit(resolve_folder(name), given.device)
    given.processor = load_processor(resolve_folder(name))

    def save(task: Task, out: Path, facts: dict) -> None:
        save_stage1(task.module, out, facts, portable_name(name, out))

    given.save = save
    if init:
        given.begin = functools.partial(begin_module, run=Path(init))


def load_pair_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    """The same for a model that is neither a bridge nor a tower; its run is one file of what learned."""
    load_stage1_parts(given, lm, vit, init)
    given.save = save_module_run


def load_clip_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    """A tokenizer, unless the world brought its own, and how the run is written.

    Both towers are new, or go on from the run `init` and its words.
    """
    if lm != f"{WEIGHTS}/decoder" and (init or given.tokenizer):
        raise UserError(f"--lm {lm}: the words are those of {init or given.world.name}; leave --lm out.")
    given.tokenizer = given.tokenizer or load_tokenizer(resolve_folder(lm))
    if init:
        opened = open_clip(init, given.device)
        given.clip, given.tokenizer = opened.clip, opened.tokenizer
        lm = f"{init}/clip" if (Path(init) / "clip").is_dir() else init
    given.save = functools.partial(save_clip_run, lm=lm)


def load_clip_text_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    """The same, and the ViT that is locked with its image processor."""
    load_clip_parts(given, lm, vit)
    given.save = functools.partial(save_clip_run, lm=lm, vit=vit)
    given.vit = load_vit(resolve_folder(vit), given.device)
    given.processor = load_processor(resolve_folder(vit))
    if given.vit.family != "clip":
        raise UserError(f"{vit}: only beside a ViT of CLIP's kind a text tower is trained, not beside "
                        f"{given.vit.family}'s; give --vit another.")


def load_no_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    """How a run is written that trains a new ViT on nothing but the world."""
    given.save = save_vit_run


def load_picture_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    """How a run is written that trains a new tokenizer of pictures on nothing but the world."""
    given.save = save_module_run


def load_new_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    """A tokenizer, unless the world brought its own: all else is new. A run is one file of what learned."""
    load_clip_parts(given, lm, vit)
    given.save = save_module_run


def load_drawing_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    """The tokenizer of pictures that the run `init` trained, decoder and words, and CLIP to choose by."""
    given.images = load_picture_tokenizer(Path(init), given.device)
    given.tokenizer, given.decoder = load_words(lm), load_decoder(resolve_folder(lm), given.device)
    given.clip = open_clip(TEXT_TOWER, given.device)

    def save(task: Task, out: Path, facts: dict) -> None:
        save_module_run(task, out, {**facts, "pictures": save_picture_tokenizer(task.images, out)})

    given.save = save


def load_flava_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    """A tokenizer, unless the world brought its own, and the tokenizer of pictures of the run `init`."""
    load_new_parts(given, lm, vit)
    given.images = load_picture_tokenizer(Path(init), given.device)


def load_text_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    """A decoder that is trained further, if there is one."""
    if init:
        given.decoder = load_decoder(Path(init) / "decoder")


def load_prompt_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    given.decoder = load_decoder(resolve_folder(lm))


def load_vlkd_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    """An answer task's, and the CLIP that the ViT is half of: the bundled text tower, or the ViT's folder."""
    load_answer_parts(given, lm, vit, init)
    given.clip = open_clip(TEXT_TOWER if vit == f"{WEIGHTS}/vit" else vit, given.device)


def load_gligen_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    """An answer task's, for a world whose questions are about places."""
    with at_the_door(f"--data {given.world.name}"):
        for index in range(8):
            take_place(given.world.item(index, turns=5))
    load_answer_parts(given, lm, vit, init)


def load_word_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    """An answer task's, and how the pictures of the report are written."""
    load_answer_parts(given, lm, vit, init)
    given.save_grid = save_grid


def load_glide_parts(given: Ingredients, lm: str, vit: str, init: str = "") -> None:
    """The decoder that reads the texts, its tokenizer, and how the run is written."""
    given.tokenizer = load_words(lm)
    given.decoder = load_decoder(resolve_folder(lm), given.device)
    given.save_grid = save_grid

    def save(task: Task, out: Path, facts: dict) -> None:
        save_painter(task.painter, out, facts, portable_name(lm, out))

    given.save = save


# task of a recipe → what loads its ingredients
LOADERS = {"answer": load_answer_parts, "stage1": load_stage1_parts, "clip": load_clip_parts,
           "clip-text": load_clip_text_parts, "lm": load_text_parts,
           **dict.fromkeys(("lm-prompts", "lm-reader"), load_prompt_parts),
           **dict.fromkeys(coca_task.TASKS, load_pair_parts),
           **dict.fromkeys((*simvlm.TASKS, *cm3.TASKS), load_new_parts),
           **dict.fromkeys((*dpo.TASKS, *short.TASKS, *round_robin.TASKS, "fromage"), load_answer_parts),
           "glide": load_glide_parts, "word": load_word_parts, "told-1": load_word_parts,
           "vlkd": load_vlkd_parts, "gligen": load_gligen_parts,
           "names": load_no_parts, "pixels": load_no_parts, "vq": load_picture_parts,
           "dvae": load_picture_parts, "dalle": load_drawing_parts,
           **dict.fromkeys(chameleon_task.TASKS, load_drawing_parts),
           **dict.fromkeys(PAIR_TASKS, load_pair_parts), **dict.fromkeys(flava_task.TASKS, load_flava_parts)}


def save_answer_run(vlm: VLM, trained: tuple[str, ...], out: Path, facts: dict, lm: str, vit: str,
                    init: str = "") -> None:
    """The bridge, and every part that learned or is new; of the others the names."""
    names = tower_names(lm, vit, init)
    words = names["decoder"]
    for part, name in names.items():
        new = part in trained or name == "random"
        names[part] = "" if new else portable_name(name, out)
    save_vlm(vlm, out, facts, names["vit"], names["decoder"])
    if not names["decoder"]:
        copy_tokenizer(resolve_folder(words), out / "decoder")


def save_module_run(task: Task, out: Path, facts: dict) -> None:
    """Every parameter that learned, by its name in the task's module."""
    learned = {name: p.detach() for name, p in task.module.named_parameters() if p.requires_grad}
    write_tensors(out / "model.safetensors", learned)
    write_json(out / "config.json", facts)


def save_vit_run(task: Task, out: Path, facts: dict) -> None:
    save_vit(task.module.vit, out / "vit")
    write_json(out / "config.json", facts)


def save_clip_run(task: Task, out: Path, facts: dict, lm: str, vit: str = "") -> None:
    """A CLIP and its tokenizer in `clip`; its ViT, if it learned, in `vit` too, else the name of it (vit)."""
    save_clip(task.module, out / "clip")
    if task.world.says_scenes:                          # its words have a tokenizer of their own
        task.tokenizer.save(out / "clip")
    else:
        copy_tokenizer(resolve_folder(lm), out / "clip")
    if not vit:
        save_vit(task.module.vit, out / "vit")
    write_json(out / "config.json", {**facts, "vit": portable_name(vit, out) if vit else "vit"})


@dataclass
class OpenedClip:
    """Both towers with what they read: pictures by `processor`, texts by `tokenizer`."""
    clip: CLIP
    tokenizer: Tokenizer
    processor: Processor
    begin: tuple[int, ...]                              # ids in front of a text

    @torch.no_grad()
    def embed_images(self, pictures: list[np.ndarray], batch: int = 128) -> Tensor:
        """(n, De), of length 1."""
        weight, size = self.clip.image_projection.weight, self.clip.vit.config.image_size
        parts = [to_pixels(pictures[i:i + batch], size, self.processor)
                 for i in range(0, len(pictures), batch)]
        return torch.cat([self.clip.embed_images(pixels.to(weight)) for pixels in parts])

    @torch.no_grad()
    def embed_texts(self, texts: list[str], batch: int = 1024) -> Tensor:
        """(n, De), of length 1. A text that is too long loses its end."""
        device, longest = self.clip.logit_scale.device, self.clip.text.config.context
        parts = [text_tokens(texts[i:i + batch], self.tokenizer, longest, self.begin)
                 for i in range(0, len(texts), batch)]
        return torch.cat([self.clip.embed_texts(tokens.to(device)) for tokens in parts])

    @property
    def scale(self) -> float:
        return self.clip.logit_scale.exp().item()


def open_clip(name: str, device: str | None = None) -> OpenedClip:
    """A run of recipe clip or clip-text, or a published CLIP (folder, hub name)."""
    folder = resolve_folder(name)
    c = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if "settings" not in c:
        clip, tokenizer = load_clip(folder, device), load_tokenizer(folder)
        if not isinstance(clip, CLIP) or tokenizer.eos is None:
            raise UserError(f"{name}: no CLIP whose texts end with a token; give a CLIPModel's folder.")
        return OpenedClip(clip, tokenizer, load_processor(folder), tuple(tokenizer.begin))
    if not (folder / "clip" / "config.json").exists():
        raise UserError(f"{name}: holds no CLIP; train one: python train.py --recipe clip-text (a text tower "
                        "for the bundled ViT) or --recipe clip (both towers).")
    clip, tokenizer = load_clip(folder / "clip", device), load_tokenizer(folder / "clip")
    # A published config cannot name token 2 as the end (it means: the largest id); ours ends with eos.
    clip.text.config = replace(clip.text.config, end=tokenizer.eos)
    return OpenedClip(clip, tokenizer, load_processor(tower_folder(folder, c.text("vit"))), ())


@torch.no_grad()
def begin_module(module: nn.Module, run: Path) -> None:
    """A new model begins as a run of its own kind left it; after a run that made a ViT alone it stays new.

    Strict both ways, as `fill`. A ViT that was frozen and ALBEF's teacher are not in the file.
    """
    file = next((run / name for name in ("model.safetensors", "stage1.safetensors") if (run / name).exists()),
                None)
    if file is None and (run / "vit" / "config.json").exists():
        return
    if file is None:
        raise UserError(f"--init {run}: neither a run of this recipe nor one that made a ViT; leave it out "
                        "to start fresh.")
    checkpoint, parameters = Checkpoint(file), dict(module.named_parameters())
    parts = {name.partition(".")[0] for name in checkpoint.where}
    if extra := [name for name in checkpoint.where if name not in parameters]:
        raise UserError(f'--init {run}: tensor "{extra[0]}" is not part of this recipe\'s model; give a run '
                        "of this recipe, or leave it out to start fresh.")
    for name, parameter in parameters.items():
        part = name.partition(".")[0]
        if part in parts or part not in ("vit", "teacher"):
            parameter.copy_(tensor_for(parameter, Source(name), checkpoint))


def start_bridge(bridge: Bridge, decoder: Decoder, init: str) -> None:
    """How a new bridge begins: with what it takes from the decoder, or as the run `init` left it."""
    bridge.adopt(decoder)
    if init:
        fill_from_run(bridge, Path(init))


def fill_from_run(bridge: Bridge, run: Path) -> None:
    """A bridge begins as another run's, and stays new where that run made a ViT alone (recipe clip, say).

    After blip2-1 it is that Q-Former and only the projection is new; so it is for MiniGPT-4 after any run of
    a Q-Former.
    """
    stage1, file = run / "stage1.safetensors", run / "bridge.safetensors"
    other, part, left_over = AROUND.get(bridge.name, ("", "", ()))
    if stage1.exists():
        fill_from_stage1(bridge, stage1)
    elif bridge.name in BEHIND_QFORMER and stored_bridge(file) == "qformer":
        fill_from_stage1(bridge, file)
    elif other and file.exists() and stored_bridge(file) == other:
        module = bridge.get_submodule(part)
        names = {name: f"{part}.{name}" for name, _ in module.named_parameters()}
        fill(module, Checkpoint(file), names, optional=left_over)
    elif file.exists() or not (run / "vit" / "config.json").exists():
        load_bridge_file(bridge, file, next(bridge.parameters()).device)
