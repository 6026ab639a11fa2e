"""formats/llava.py: LLaVA in its authors' layout and in transformers', read and written."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from model import Decoder, VLM, ViT
from papers import make_bridge
from support.formats.checkpoint import Checkpoint, Fills, WB, expand, published_tensors
from support.formats.files import UserError, read_json, write_json, write_tensors
from support.formats.hub import tower_folder
from support.formats.llama import LLAMA_DEFAULTS, decoder_config, decoder_names, hf_decoder_config
from support.formats.vision import CLIP_DEFAULTS, VIT_NAMES, hf_vit_config, vit_config, vit_file


def read_llava_model(c: dict, path: Path) -> tuple[VLM, Fills]:
    """LLaVA in the authors' layout (Llama's names, model.mm_projector, the ViT in a folder of its own) or in transformers'."""
    return (llava_hf if "text_config" in c else llava_original)(c, path)


def llava_hf(c: dict, path: Path) -> tuple[VLM, Fills]:
    """Three generations of transformers put different prefixes in front of the same names; the file tells which."""
    where, file = f"{path}/config.json", Checkpoint(path)
    layer, keep = c.get("vision_feature_layer", -2), c.get("vision_feature_select_strategy", "default") == "full"
    if not isinstance(layer, int) or c.get("projector_hidden_act", "gelu") != "gelu" or not c.get("multimodal_projector_bias", True):
        raise UserError(f"{where}: features of several layers and projectors other than Linear, GELU, Linear are not supported.")
    decoder = Decoder(decoder_config({"tie_word_embeddings": c.get("tie_word_embeddings", False), **LLAMA_DEFAULTS, **c["text_config"]}, where))
    vit = ViT(vit_config({**CLIP_DEFAULTS, **c["vision_config"]}, where)[0])
    vlm = VLM(vit, make_bridge("mlp", decoder.config, vit.config.width, reads=layer, reads_cls=keep), decoder)
    tower = file.prefix("vision_tower.vision_model.", "model.vision_tower.vision_model.", "model.vision_tower.", "vision_tower.")
    trunk = file.prefix("language_model.model.", "model.language_model.")
    head = "language_model." if trunk == "language_model.model." else ""
    map = file.prefix("model.multi_modal_projector.", "multi_modal_projector.")
    names = {**expand(VIT_NAMES, vit.config.layers, tower, "vit."),
             **decoder_names(decoder.config, trunk, head, "decoder."),
             **{f"bridge.{a}.{w}": f"{map}linear_{b}.{w}" for w in WB for a, b in (("up", 1), ("down", 2))}}
    return vlm, [(vlm, file, names, (head + "lm_head.",) if decoder.config.tied else ())]


def llava_original(c: dict, path: Path) -> tuple[VLM, Fills]:
    where, kind = f"{path}/config.json", c.get("mm_projector_type", "linear")
    ours = {"linear": {"map": ""}, "mlp2x_gelu": {"up": "0.", "down": "2."}}    # mm_projector_type → our layer → theirs
    if kind not in ours:
        raise UserError(f'{where}: mm_projector_type "{kind}" is not supported; known: {", ".join(ours)}.')
    tower = tower_folder(path, c["mm_vision_tower"])
    config, family = vit_config(read_json(tower / "config.json"), f"{tower}/config.json")
    decoder = Decoder(decoder_config(c, where))
    bridge = make_bridge("linear" if kind == "linear" else "mlp", decoder.config, config.width,
                         reads=c.get("mm_vision_select_layer", -2), reads_cls=c.get("mm_vision_select_feature", "patch") == "cls_patch")
    vlm = VLM(ViT(config), bridge, decoder)
    names = {**decoder_names(decoder.config, ours="decoder."),
             **{f"bridge.{a}.{w}": f"model.mm_projector.{b}{w}" for w in WB for a, b in ours[kind].items()}}
    return vlm, [(vlm.vit, *vit_file(tower, config, family)),
                 (nn.ModuleDict({"bridge": bridge, "decoder": decoder}), Checkpoint(path), names, ("model.vision_tower.",))]


def save_llava(vlm: VLM, path: Path) -> None:
    """A folder that transformers' LlavaForConditionalGeneration opens, in the layout of the hub's files.

    Its projector is always Linear, GELU, Linear of the decoder's width. A linear bridge fits exactly where 2 Di ≤ D, because
    GELU(x) − GELU(−x) = x Φ(x) + x Φ(−x) = x:  W_1 = [1 ; −1 ; 0],  W_2 = [W, −W, 0].
    """
    bridge, c, Di = vlm.bridge, vlm.decoder.config, vlm.vit.config.width
    if bridge.name == "mlp":
        if len(bridge.up.weight) != c.width:
            raise UserError(f"{path}: LLaVA's projector has the decoder's width, {c.width}, inside, this mlp bridge has {len(bridge.up.weight)}.")
        maps = (bridge.up, bridge.down)
    else:
        if 2 * Di > c.width:
            raise UserError(f"{path}: transformers' LLaVA has no linear projector, and its two-layer one can only act as this {Di} → {c.width} map "
                            f"where the decoder is at least {2 * Di} wide; train --bridge mlp to export.")
        maps = nn.Linear(Di, c.width), nn.Linear(c.width, c.width)
        with torch.no_grad():
            maps[0].weight.copy_(torch.cat((torch.eye(Di), -torch.eye(Di), torch.zeros(c.width - 2 * Di, Di))))
            maps[1].weight.copy_(torch.cat((bridge.map.weight, -bridge.map.weight, torch.zeros(c.width, c.width - 2 * Di)), 1))
            maps[0].bias.zero_()
            maps[1].bias.copy_(torch.zeros(c.width) if bridge.map.bias is None else bridge.map.bias)
    theirs = {**expand(VIT_NAMES, vlm.vit.config.layers, "vision_tower.vision_model.", "vit."),
              **decoder_names(c, "language_model.model.", "language_model.", "decoder.")}
    tensors = published_tensors(nn.ModuleDict({"vit": vlm.vit, "decoder": vlm.decoder}), theirs)
    tensors |= {f"multi_modal_projector.linear_{n}.{w}": getattr(m, w) for n, m in enumerate(maps, 1) for w in WB}
    image, rows = vlm.image_token, c.vocab_size
    if image is None:                                   # transformers marks the places of an image by a word of its own
        image, rows = rows, rows + 1
        for n in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            if n in tensors:
                tensors[n] = torch.cat((tensors[n], torch.zeros(1, c.width, dtype=tensors[n].dtype)))
    write_tensors(path / "model.safetensors", tensors)
    write_json(path / "config.json", {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": image,
        "image_seq_length": vlm.vit.config.tokens - (vlm.vit.config.cls and not bridge.reads_cls), "projector_hidden_act": "gelu",
        "vision_feature_layer": bridge.reads, "tie_word_embeddings": c.tied,
        "vision_feature_select_strategy": "full" if bridge.reads_cls or not vlm.vit.config.cls else "default",
        "text_config": {**hf_decoder_config(c), "vocab_size": rows}, "vision_config": hf_vit_config(vlm.vit.config)})
