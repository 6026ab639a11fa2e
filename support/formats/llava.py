"""support/formats/llava.py: LLaVA in its authors' layout and in transformers', read and written."""
from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from model import Decoder, VLM
from papers import make_bridge
from support.formats.checkpoint import Checkpoint, Filling, published_tensors
from support.formats.files import UserError, at_the_door, read_json, write_json, write_tensors
from support.formats.honoured import LLAVA, refuse_unknown
from support.formats.hub import tower_folder
from support.formats.llama import (decoder_config, decoder_names, hf_decoder_config,
                                   inner_decoder_config, tie_head)
from support.formats.names import expand, parameters
from support.formats.vision import (VIT_NAMES, empty_vit, hf_vit_config, vit_config, vit_file,
                                    vit_names)


def projector(kind: str, where: str) -> tuple[str, dict, dict[str, str]]:
    """mm_projector_type of the authors → our bridge, its options, and its maps in their nn.Sequential."""
    if kind == "linear":
        return "linear", {}, {"map": "mm_projector"}
    deep = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind)
    if deep is None:
        raise UserError(f'{where}: mm_projector_type "{kind}" is not supported; known: linear, mlp2x_gelu, '
                        "mlp3x_gelu and so on.")
    last = int(deep[1]) - 1                             # every second module of theirs is a GELU
    if not last:
        return "linear", {}, {"map": "mm_projector.0"}
    maps = {f"middle.{n - 1}": f"mm_projector.{2 * n}" for n in range(1, last)}
    return "mlp", {"middle": last - 1}, {"up": "mm_projector.0", "down": f"mm_projector.{2 * last}", **maps}


def read_llava(c: dict, path: Path) -> tuple[VLM, list[Filling]]:
    """A LLaVA folder → the empty model, and what fills it; the config.json tells whose layout it is."""
    return (read_hf if "text_config" in c else read_original)(c, path)


def read_hf(c: dict, path: Path) -> tuple[VLM, list[Filling]]:
    """transformers' LlavaForConditionalGeneration.

    Three generations of transformers put different prefixes before the same names; the file tells which.
    """
    where, file = f"{path}/config.json", Checkpoint(path)
    refuse_unknown(c, where, LLAVA)
    if c.get("projector_hidden_act", "gelu") != "gelu":
        raise UserError(f'{where}: projector_hidden_act "{c["projector_hidden_act"]}" is not supported; '
                        "known: gelu.")
    decoder = Decoder(inner_decoder_config(c["text_config"], c, where))
    tower = {"model_type": "clip_vision_model", **c["vision_config"]}
    tower_config, family = vit_config({"vision_config": tower}, where)
    vit = empty_vit(tower_config, family)
    class_token = c.get("vision_feature_select_strategy", "default") == "full"
    if not class_token and vit.config.first != 1:
        raise UserError(f'{where}: vision_feature_select_strategy "default" drops the first token, but in '
                        f'this tower {vit.config.first} tokens come before the patches; say "full".')
    options = dict(reads=c.get("vision_feature_layer", -2), reads_cls=class_token)
    if not c.get("multimodal_projector_bias", True):
        options["bias"] = False
    with at_the_door(where):
        bridge = make_bridge("mlp", decoder.config, vit.config.width, **options)
    tower = file.prefix("vision_tower.vision_model.", "model.vision_tower.vision_model.",
                        "model.vision_tower.", "vision_tower.")
    trunk = file.prefix("language_model.model.", "model.language_model.")
    head = "language_model." if trunk == "language_model.model." else ""
    maps = file.prefix("model.multi_modal_projector.", "multi_modal_projector.")
    names = {**expand(vit_names(vit.config, family), vit.config.layers, tower, "vit."),
             **decoder_names(decoder.config, trunk, head, "decoder."),
             **parameters({"up": "linear_1", "down": "linear_2"}, "bridge.", maps)}
    optional = tie_head(decoder.config, names, file, "decoder.")
    vlm = VLM(vit, bridge, decoder)
    return vlm, [Filling(vlm, file, names, optional)]


def read_original(c: dict, path: Path) -> tuple[VLM, list[Filling]]:
    """The authors' layout (github.com/haotian-liu/LLaVA): Llama's names, a ViT of its own."""
    where = f"{path}/config.json"
    name, options, maps = projector(c.get("mm_projector_type", "linear"), where)
    if c["mm_vision_tower"] is None:
        raise UserError(f"{where}: mm_vision_tower is null, so this is a language model alone.")
    tower = tower_folder(path, c["mm_vision_tower"])
    vit, family = vit_config(read_json(tower / "config.json"), f"{tower}/config.json")
    decoder = Decoder(decoder_config(c, where))
    bridge = make_bridge(name, decoder.config, vit.width, reads=c.get("mm_vision_select_layer", -2),
                         reads_cls=c.get("mm_vision_select_feature", "patch") == "cls_patch", **options)
    vlm, file = VLM(empty_vit(vit, family), bridge, decoder), Checkpoint(path)
    names = {**decoder_names(decoder.config, ours="decoder."), **parameters(maps, "bridge.", "model.")}
    optional = tie_head(decoder.config, names, file, "decoder.")
    inside = file.prefix("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.", "")
    if inside:                                          # the ViT was trained along and lies in the file
        names |= expand(vit_names(vit, family), vit.layers, inside, "vit.")
        return vlm, [Filling(vlm, file, names, optional)]
    if c.get("unfreeze_mm_vision_tower"):
        raise UserError(f"{where}: unfreeze_mm_vision_tower is true, but {file.path} holds no "
                        "model.vision_tower.*; without the ViT that was trained along this is another model.")
    without_vit = nn.ModuleDict({"bridge": bridge, "decoder": decoder})
    return vlm, [Filling(vlm.vit, *vit_file(tower, vit, family)),
                 Filling(without_vit, file, names, optional)]


def save_llava(vlm: VLM, path: Path) -> None:
    """Write an mlp bridge between its towers as transformers' LlavaForConditionalGeneration opens it.

    LLaVA's projector has the decoder's width inside and two maps; another mlp is a UserError.
    """
    D, up, down = vlm.decoder.config.width, vlm.bridge.up, vlm.bridge.down
    if len(vlm.bridge.middle):
        raise UserError(f"{path}: transformers' LLaVA has a projector of two maps, "
                        f"this mlp bridge has {2 + len(vlm.bridge.middle)}.")
    if len(up.weight) != D:
        raise UserError(f"{path}: LLaVA's projector has the decoder's width, {D}, inside, "
                        f"this mlp bridge has {len(up.weight)}.")
    maps = {"linear_1.": up, "linear_2.": down}
    write_llava(vlm, path, {n + w: tensor for n, m in maps.items() for w, tensor in m.named_parameters()})


def save_llava_linear(vlm: VLM, path: Path) -> None:
    """The same for a linear bridge, as a two-layer projector; a UserError where the decoder is too narrow."""
    D, Di = vlm.decoder.config.width, vlm.bridge.map.in_features
    if 2 * Di > D:
        raise UserError(f"{path}: transformers' LLaVA has no linear projector, and its two-layer one can "
                        f"only act as this {Di} → {D} map where the decoder is at least {2 * Di} wide; "
                        "train --bridge mlp to export.")
    write_llava(vlm, path, linear_as_mlp(vlm.bridge.map))


@torch.no_grad()
def linear_as_mlp(map: nn.Linear) -> dict[str, Tensor]:
    """W x + b as W_2 GELU(W_1 x) + b, exact where 2 Di ≤ D.

    GELU(x) − GELU(−x) = x Φ(x) + x Φ(−x) = x, where Φ is the normal distribution function. So
    W_1 = [1 ; −1 ; 0] of shape (D, Di) and W_2 = [W, −W, 0] of shape (D, D).
    """
    D, Di = map.weight.shape
    identity, unused = torch.eye(Di), D - 2 * Di
    return {"linear_1.weight": torch.cat((identity, -identity, torch.zeros(unused, Di))),
            "linear_1.bias": torch.zeros(D),
            "linear_2.weight": torch.cat((map.weight, -map.weight, torch.zeros(D, unused)), 1),
            "linear_2.bias": torch.zeros(D) if map.bias is None else map.bias}


def write_llava(vlm: VLM, path: Path, projector: dict[str, Tensor]) -> None:
    """The folder: both towers, the projector, and a config.json, in the layout of the hub's files."""
    c, vit, bridge = vlm.decoder.config, vlm.vit.config, vlm.bridge
    names = {**expand(VIT_NAMES, vit.layers, "vision_tower.vision_model.", "vit."),
             **decoder_names(c, "language_model.model.", "language_model.", "decoder.")}
    tensors = published_tensors(nn.ModuleDict({"vit": vlm.vit, "decoder": vlm.decoder}), names)
    tensors |= {f"multi_modal_projector.{name}": tensor for name, tensor in projector.items()}
    image, vocab_size = vlm.image_token, c.vocab_size
    if image is None:                                   # transformers marks an image's place by a word
        image, vocab_size = vocab_size, vocab_size + 1
        for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            if name in tensors:
                row = torch.zeros(1, c.width, dtype=tensors[name].dtype)
                tensors[name] = torch.cat((tensors[name], row))
    all_tokens = bridge.reads_cls or not vit.cls
    write_tensors(path / "model.safetensors", tensors)
    write_json(path / "config.json", {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image,
        "image_seq_length": vlm.features(None).shape[1],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": "linear_1.bias" in projector,
        "vision_feature_layer": bridge.reads,
        "tie_word_embeddings": c.tied,
        "vision_feature_select_strategy": "full" if all_tokens else "default",
        "text_config": {**hf_decoder_config(c), "vocab_size": vocab_size},
        "vision_config": hf_vit_config(vlm.vit)})
