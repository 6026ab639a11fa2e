"""formats/vlm.py: whole vision-language models and bridges alone: the menus of published layouts, and our own run folders."""
from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.utils.checkpoint
from torch import nn

from model import Bridge, DecoderConfig, VLM
from papers import make_bridge
from support.formats.adapter import adapter_file, save_peft
from support.formats.blip2 import qformer_file, read_blip2, read_lavis, read_own_stage1
from support.formats.checkpoint import Checkpoint, fill
from support.formats.files import UserError, at_the_door, nearest, read_json, write_json, write_tensors
from support.formats.flamingo import openflamingo_file, read_idefics
from support.formats.hub import tower_folder
from support.formats.llama import load_decoder, save_decoder
from support.formats.llava import read_llava_model, save_llava
from support.formats.mapl import mapl_file
from support.formats.mllama import read_mllama
from support.formats.vision import load_vit, save_vit


def save_vlm(vlm: VLM, path: str | os.PathLike, settings: dict | None = None, vit: str = "", decoder: str = "",
             layout: str = "native") -> None:
    """Write a run folder: config.json, bridge.safetensors, and each tower that is not named by its own folder.

    layout="hf" writes what other libraries open instead: transformers' LLaVA for linear and mlp, peft's AdaptionPrompt for zero_init.
    """
    path = Path(path)
    if layout == "hf":
        if vlm.bridge.name not in SAVERS:
            raise UserError(f'{path}: no other library has a class for a "{vlm.bridge.name}" bridge on a LLaMA; known: {", ".join(SAVERS)}.')
        return SAVERS[vlm.bridge.name](vlm, path)
    if layout != "native":
        raise UserError(f'unknown layout "{layout}"; known: native, hf.')
    if not decoder:
        save_decoder(vlm.decoder, path / "decoder")
    if not vit:
        save_vit(vlm.vit, path / "vit")
    write_tensors(path / "bridge.safetensors", vlm.bridge.state_dict(), {"bridge": vlm.bridge.name})
    write_json(path / "config.json", {**(settings or {}), "bridge": vlm.bridge.name, "bridge_options": vlm.bridge.options,
                                      "image_token": vlm.image_token, "vit": vit or "vit", "decoder": decoder or "decoder"})


def load_vlm(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> nn.Module:
    """A published vision-language model (bridges.LAYOUTS) or a run folder of train.py → VLM in eval mode; dtype None = float32.

    BLIP-2's first stage has no decoder: its folders give a bridges.Stage1. A run's tower paths are relative to the run, or to
    where you stand.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; `python train.py` writes a run under out/, published models have a config.json.")
    c = read_json(path / "config.json")
    if "bridge" not in c:
        kind = c.get("model_type", "")
        if kind not in LAYOUTS:
            raise UserError(f'{path}/config.json: neither a run of train.py ("bridge" is missing) nor a vision-language model that '
                            f'is known here (model_type "{kind}"); {nearest(kind, LAYOUTS)}')
        with torch.device("meta"):
            with at_the_door(f"{path}/config.json"):
                vlm, fills = LAYOUTS[kind](c, path)
        for module, checkpoint, names, optional in fills:
            fill(module, checkpoint, names, optional, device, dtype or torch.float32)
        return vlm.eval()
    vit, decoder = load_vit(tower_folder(path, c["vit"]), device, dtype), load_decoder(tower_folder(path, c["decoder"]), device, dtype)
    with torch.device("meta"):
        with at_the_door(f"{path}/config.json"):
            bridge = make_bridge(c["bridge"], decoder.config, vit.config.width, **c["bridge_options"])
    load_bridge_file(bridge, path / "bridge.safetensors", device, dtype)
    return VLM(vit, bridge, decoder, c.get("image_token")).eval()


def load_bridge_file(bridge: Bridge, file: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> None:
    """Fill a bridge (on the meta device or not) from the bridge.safetensors of a run; strict, and names the other kind if it is one.

    dtype None = float32, whatever the file holds."""
    checkpoint = Checkpoint(file)
    held = (checkpoint.files[Path(file)].metadata() or {}).get("bridge", bridge.name)
    if held != bridge.name:
        raise UserError(f'{file}: holds a "{held}" bridge, not "{bridge.name}"; use --bridge {held}.')
    fill(bridge, checkpoint, {}, (), device, dtype or torch.float32)


def load_bridge(name: str, path: str | os.PathLike, device=None, dtype: torch.dtype | None = None,
                decoder: DecoderConfig | None = None, **options) -> Bridge:
    """A published bridge alone, sizes from its shapes: mapl (the authors' mapper), qformer (BLIP-2's authors' files, transformers'
    Blip2QFormerModel), zero_init (LLaMA-Adapter's adapter or PEFT's AdaptionPrompt), flamingo (OpenFlamingo's resampler and gated blocks).

    path: the file, or a folder that holds it and perhaps a config; decoder: what it is for, so that sizes are checked against it;
    options: what no shape tells, where it is not the published value (heads=…), or which code to follow (tanh=False:
    LLaMA-Adapter's inference file). dtype None = float32.
    """
    if name not in BRIDGE_FILES:
        raise UserError(f'no published layout of a bridge "{name}" is known; {nearest(name, BRIDGE_FILES)}')
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():                                   # the bridge, not the decoder that may lie beside it
        path = next((folder / f for f in ("adapter_model.safetensors", "adapter.safetensors", "flamingo.safetensors") if (folder / f).exists()), path)
    beside = {}
    for file in (folder / "config.json", folder / "flamingo_config.json", folder / "adapter_config.json"):
        beside |= read_json(file) if file.exists() else {}
    if decoder is not None:
        beside |= {"n_layers": decoder.layers}
    checkpoint = Checkpoint(path)
    with torch.device("meta"):
        with at_the_door(str(path)):
            bridge, names, optional = BRIDGE_FILES[name](checkpoint, beside, **options)
    fill(bridge, checkpoint, names, optional, device, dtype or torch.float32)
    return bridge.eval()


SAVERS = {"linear": save_llava, "mlp": save_llava, "zero_init": save_peft}      # save_vlm(…, layout="hf")
BRIDGE_FILES = {        # bridge → a function of (checkpoint, the config beside it) for a published file of that bridge alone
    "mapl": mapl_file, "qformer": qformer_file, "zero_init": adapter_file, "flamingo": openflamingo_file,
}
LAYOUTS = {             # model_type of config.json → a function of (config, folder) → the empty model, and what it is filled with
    "llava": read_llava_model, "llava_llama": read_llava_model, "instructblip": read_blip2, "blip-2": read_blip2, "blip2_qformer_lavis": read_lavis, "stage1": read_own_stage1,
    "idefics": read_idefics, "mllama": read_mllama,
}
