"""support/formats/vlm.py: vision-language models, bridges alone, and our run folders."""
from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import torch
from torch import nn

from model import Bridge, DecoderConfig, VLM
from papers import make_bridge
from papers.bounds import nearest
from support.formats.adapter import adapter_file, save_peft
from support.formats.blip2 import qformer_file, read_blip2, read_lavis, read_own_stage1
from support.formats.chat import use_template
from support.formats.checkpoint import Checkpoint, fill, open_tensors
from support.formats.cogvlm import cogvlm_file, read_cogvlm
from support.formats.files import UserError, at_the_door, read_json, reading_config, write_json, write_tensors
from support.formats.flamingo import openflamingo_file, read_idefics
from support.formats.honoured import BRIDGES, refuse_unknown
from support.formats.hub import fetch, is_hub_name, print_licence, tower_folder
from support.formats.llama import LLAMAS, load_decoder, save_decoder
from support.formats.llava import read_llava, save_llava, save_llava_linear
from support.formats.magma import magma_file
from support.formats.mapl import mapl_file
from support.formats.mllama import read_mllama
from support.formats.pictures import load_processor
from support.formats.prefix_maps import (clipcap_file, clipcap_transformer_file, fromage_file, kosmos_file,
                                         limber_file, minigpt4_file, minigpt4_llama2_file)
from support.formats.tokenizer_files import load_tokenizer
from support.formats.tokenizers import Tokenizer
from support.formats.vision import load_vit, save_vit

# model_type in config.json → a function of (config, folder): the empty model, and what it is filled with
LAYOUTS = {
    "llava": read_llava, "llava_llama": read_llava, "llava_mistral": read_llava, "llava_qwen": read_llava,
    "blip-2": read_blip2, "instructblip": read_blip2, "blip2_qformer_lavis": read_lavis,
    "idefics": read_idefics, "mllama": read_mllama, "cogvlm": read_cogvlm,
    "stage1": read_own_stage1,
}
# bridge → a function of (checkpoint, config, options): the empty bridge, and what it is filled with
BRIDGE_FILES = {"mapl": mapl_file, "qformer": qformer_file, "zero_init": adapter_file,
                "flamingo": openflamingo_file, "clipcap": clipcap_file, "limber": limber_file,
                "clipcap_transformer": clipcap_transformer_file, "minigpt4": minigpt4_file,
                "minigpt4_llama2": minigpt4_llama2_file, "kosmos1": kosmos_file, "magma": magma_file,
                "cogvlm": cogvlm_file, "fromage": fromage_file}
BRIDGE_FILE_NAMES = ("adapter_model.safetensors", "adapter.safetensors", "flamingo.safetensors", "proj.ckpt",
                     "pretrained_ckpt.pth.tar")
BRIDGE_CONFIGS = ("config.json", "flamingo_config.json", "adapter_config.json", "model_args.json")
# bridge → a function of (vlm, folder) that writes what another library opens
SAVERS = {"linear": save_llava_linear, "mlp": save_llava, "zero_init": save_peft}


def save_vlm(vlm: VLM, path: str | os.PathLike, settings: dict | None = None, vit: str = "",
             decoder: str = "", layout: str = "native") -> None:
    """Write a run folder: config.json, bridge.safetensors, and each tower that has no folder of its own.

    settings: further keys of config.json; vit, decoder: where the towers are, if not in the run.
    layout="hf" writes what other libraries open instead: transformers' LLaVA for linear and mlp, peft's
    AdaptionPrompt for zero_init; a bridge that they have no class for is a UserError.
    """
    path, bridge = Path(path), vlm.bridge
    if layout == "hf":
        if bridge.name not in SAVERS:
            raise UserError(f'{path}: no other library has a class for a "{bridge.name}" bridge on a LLaMA; '
                            f'known: {", ".join(SAVERS)}.')
        return SAVERS[bridge.name](vlm, path)
    if layout != "native":
        raise UserError(f'unknown layout "{layout}"; known: native, hf.')
    if not decoder:
        save_decoder(vlm.decoder, path / "decoder")
    if not vit:
        save_vit(vlm.vit, path / "vit")
    write_tensors(path / "bridge.safetensors", bridge.state_dict(), {"bridge": bridge.name})
    write_json(path / "config.json", {
        **(settings or {}), "bridge": bridge.name, "bridge_options": bridge.options,
        "image_token": vlm.image_token, "vit": vit or "vit", "decoder": decoder or "decoder"})


def load_vlm(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> nn.Module:
    """A published vision-language model (LAYOUTS) or a run folder of train.py → VLM in eval mode.

    BLIP-2's first stage has no decoder: its folders give a papers.blip2_stage1.Stage1. The tower paths of a
    run are relative to the run, to the project or to the working directory. dtype None = float32. Whatever
    does not fit is a UserError.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; `python train.py` writes a run under out/, "
                        "published models have a config.json.")
    c = read_json(path / "config.json")
    if "bridge" in c:
        return load_run(c, path, device, dtype)
    refuse_bridgeless(c, path)
    kind = c.get("model_type", "")
    if kind not in LAYOUTS:
        raise UserError(f'{path}/config.json: neither a run of train.py ("bridge" is missing) nor a '
                        f'vision-language model that is known here (model_type "{kind}"); '
                        f"{nearest(kind, LAYOUTS)}")
    with torch.device("meta"), reading_config(f"{path}/config.json", f'the config.json of a "{kind}" model'):
        model, fillings = LAYOUTS[kind](c, path)
    for module, checkpoint, names, optional in fillings:
        fill(module, checkpoint, names, optional, device, dtype or torch.float32)
    return check_image_token(model.eval(), path)


def refuse_bridgeless(c: dict, run: str | os.PathLike) -> None:
    """A UserError for a run of train.py, with config c, that holds no bridge: nobody can ask it."""
    if "settings" not in c or "bridge" in c or "model_type" in c:       # BLIP-2's first stage has its kind
        return
    if "seconds" not in c:
        raise UserError(f"{run}: this run has not ended; go on with: "
                        f"python train.py --resume {shlex.quote(str(run))}")
    recipe = c.object("settings").text("recipe")
    raise UserError(f"{run}: its recipe, {recipe}, makes no bridge, so nobody can ask it about a picture; "
                    "its numbers are in log.jsonl and the .json files beside it.")


def check_image_token(model: nn.Module, path: Path) -> nn.Module:
    """The model; a UserError if its bridge reads a hidden state that the tower does not have.

    It is one as well if the bridge gives no soft tokens and the id of an image is no word.
    """
    if isinstance(model, VLM):
        with torch.no_grad(), at_the_door(f"{path}/config.json"):
            model.features(None)
    image = getattr(model, "image_token", None)
    words = len(model.decoder.embed.weight) if image is not None else 0
    if image is not None and not model.bridge.soft_tokens and image >= words:
        raise UserError(f"{path}/config.json: the id of an image is {image}, but the decoder has {words} "
                        "words.")
    return model


def open_run(run: str, device, dtype: torch.dtype | None = None) -> tuple[VLM, Tokenizer, dict]:
    """A run folder of train.py, or a published model by its folder or hub name, with its config.json.

    The tokenizer writes conversations in the template that the run was trained in (--template).
    """
    folder = fetch(run) if is_hub_name(run) else Path(run)
    vlm = load_vlm(folder, device, dtype)
    facts, vlm.processor = read_json(folder / "config.json"), load_processor(folder)
    towers = {facts[k]: tower_folder(folder, facts[k]) for k in ("decoder", "vit") if k in facts}
    for name, path in (towers or {run: folder}).items():        # a published model is its own tower
        print_licence(name, path, sys.stderr)
    tokenizer = load_tokenizer(towers.get(facts.get("decoder"), folder))
    with at_the_door(f"{folder}/config.json"):
        if template := facts.get("settings", {}).get("template"):
            use_template(template, tokenizer, trained=True)
    return vlm, tokenizer, facts


def load_run(c: dict, path: Path, device=None, dtype: torch.dtype | None = None) -> VLM:
    """A run folder of train.py or save_vlm with config c: its bridge between the towers that c names."""
    with reading_config(f"{path}/config.json", "the config.json of a run"):
        name, options = c["bridge"], c["bridge_options"]
        vit_folder, decoder_folder = tower_folder(path, c["vit"]), tower_folder(path, c["decoder"])
    vit, decoder = load_vit(vit_folder, device, dtype), load_decoder(decoder_folder, device, dtype)
    with at_the_door(f"{path}/config.json"):
        with torch.device("meta"):
            bridge = make_bridge(name, decoder.config, vit.config.width, **options)
        vlm = VLM(vit, bridge, decoder, c.get("image_token"))
    load_bridge_file(bridge, path / "bridge.safetensors", device, dtype)
    return check_image_token(vlm.eval(), path)


def stored_bridge(file: str | os.PathLike) -> str:
    """Of which kind the bridge.safetensors of a run says to be; "" where it does not say."""
    return (open_tensors(Path(file)).metadata() or {}).get("bridge", "")


def load_bridge_file(bridge: Bridge, file: str | os.PathLike, device=None,
                     dtype: torch.dtype | None = None) -> None:
    """Fill a bridge (on the meta device or not) from the bridge.safetensors of a run; dtype None = float32.

    Strict; a file of another kind of bridge is a UserError that names both.
    """
    checkpoint = Checkpoint(file)
    stored = stored_bridge(file) or bridge.name
    if stored != bridge.name:
        raise UserError(f'{file}: holds a "{stored}" bridge, not "{bridge.name}"; use --bridge {stored}.')
    fill(bridge, checkpoint, {}, (), device, dtype or torch.float32)


def bridge_configs(folder: Path) -> dict[Path, dict]:
    """What the configs in a folder say about a bridge; a decoder's, which may lie there too, says nothing."""
    files = (folder / name for name in BRIDGE_CONFIGS)
    configs = {file: read_json(file) for file in files if file.exists()}
    return {file: c for file, c in configs.items() if c.get("model_type") not in LLAMAS}


def load_bridge(name: str, path: str | os.PathLike, device=None, dtype: torch.dtype | None = None,
                decoder: DecoderConfig | None = None, **options) -> Bridge:
    """A published bridge alone, in eval mode, with the sizes of its tensors; dtype None = float32.

    name       mapl        the authors' mapper
               qformer     BLIP-2's authors' files, transformers' Blip2QFormerModel
               zero_init   LLaMA-Adapter's adapter, PEFT's AdaptionPrompt
               flamingo    OpenFlamingo's resampler and gated blocks
               cogvlm      CogVLM's and CogVLM2's vision experts and adapter, out of the whole model
               magma       the authors' prefix and adapters
               clipcap, clipcap_transformer, limber, minigpt4, minigpt4_llama2, kosmos1, fromage
                           prefix_maps.py
    path       the file, or a folder that holds it and perhaps a config
    decoder    what it is for: sizes are checked against it
    options    of make_bridge: what no shape tells, where it is not the published value (heads=…), or which
               code to follow (tanh=False: LLaMA-Adapter's inference file)
    """
    if name not in BRIDGE_FILES:
        raise UserError(f'no published layout of a bridge "{name}" is known; {nearest(name, BRIDGE_FILES)}')
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():                                   # the bridge, not the decoder that may lie beside it
        path = next((folder / f for f in BRIDGE_FILE_NAMES if (folder / f).exists()), path)
    configs = bridge_configs(folder)
    config = {key: value for c in configs.values() for key, value in c.items()}
    if decoder is not None:
        config |= {"n_layers": decoder.layers, "decoder_width": decoder.width}
    checkpoint = Checkpoint(path)
    with torch.device("meta"), at_the_door(str(path)):
        bridge, names, optional = BRIDGE_FILES[name](checkpoint, config, **options)
    for file, c in configs.items():
        refuse_unknown(c, str(file), BRIDGES[name])
    fill(bridge, checkpoint, names, optional, device, dtype or torch.float32)
    if left := [name for name in checkpoint.where if name in optional or name.startswith(optional)]:
        print(f"{path}: {len(left)} tensors are not the bridge's and stay where they are "
              f'(first: "{left[0]}").', file=sys.stderr)
    return bridge.eval()
