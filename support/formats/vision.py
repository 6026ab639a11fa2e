"""formats/vision.py: CLIP's, SigLIP's and BLIP-2's vision towers and CLIP's text tower as they are published."""
from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.utils.checkpoint

from model import ViT, ViTConfig
from papers.clip import CLIP, TextConfig, TextTransformer
from support.formats.checkpoint import Checkpoint, expand, fill, published_tensors
from support.formats.files import UserError, read_json, write_json, write_tensors

ENCODER_NAMES = {       # a block of CLIP's or SigLIP's towers; the prefix is put in front
    **{f"blocks.{{i}}.{a}.{w}": f"encoder.layers.{{i}}.{b}.{w}" for w in ("weight", "bias") for a, b in (
        ("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("v", "self_attn.v_proj"), ("o", "self_attn.out_proj"),
        ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("up", "mlp.fc1"), ("down", "mlp.fc2"))},
}
VIT_NAMES = {           # CLIP and SigLIP
    "cls": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding.weight",
    **{f"patch.{w}": f"embeddings.patch_embedding.{w}" for w in ("weight", "bias")},
    **{f"pre_norm.{w}": f"pre_layrnorm.{w}" for w in ("weight", "bias")},       # sic
    **{f"post_norm.{w}": f"post_layernorm.{w}" for w in ("weight", "bias")},
    **ENCODER_NAMES,
    "map.probe": "head.probe",
    **{f"map.{p}.{w}": f"head.attention.in_proj_{w}[{n}/3]" for n, p in enumerate("qkv") for w in ("weight", "bias")},
    **{f"map.{a}.{w}": f"head.{b}.{w}" for w in ("weight", "bias") for a, b in (
        ("o", "attention.out_proj"), ("norm", "layernorm"), ("up", "mlp.fc1"), ("down", "mlp.fc2"))},
}
EVA_NAMES = {           # BLIP-2's vision model: fused qkv, bare parameters for the embeddings
    **VIT_NAMES,
    "positions": "embeddings.position_embedding",
    **{f"blocks.{{i}}.{p}.{w}": f"encoder.layers.{{i}}.self_attn.qkv.{w}[{n}/3]" for n, p in enumerate("qkv") for w in ("weight", "bias")},
    **{f"blocks.{{i}}.o.{w}": f"encoder.layers.{{i}}.self_attn.projection.{w}" for w in ("weight", "bias")},
}
OPENAI_NAMES = {        # CLIP's image tower as its authors store it, below "visual."
    "cls": "class_embedding", "positions": "positional_embedding", "patch.weight": "conv1.weight",
    **{f"{a}.{w}": f"{b}.{w}" for w in ("weight", "bias") for a, b in (("pre_norm", "ln_pre"), ("post_norm", "ln_post"))},
    **{f"blocks.{{i}}.{p}.{w}": f"transformer.resblocks.{{i}}.attn.in_proj_{w}[{n}/3]" for w in ("weight", "bias")
       for n, p in enumerate("qkv")},
    **{f"blocks.{{i}}.{a}.{w}": f"transformer.resblocks.{{i}}.{b}.{w}" for w in ("weight", "bias") for a, b in (
        ("o", "attn.out_proj"), ("norm1", "ln_1"), ("norm2", "ln_2"), ("up", "mlp.c_fc"), ("down", "mlp.c_proj"))},
}
TEXT_NAMES = {
    "embed.weight": "embeddings.token_embedding.weight",
    "positions": "embeddings.position_embedding.weight",
    **{f"norm.{w}": f"final_layer_norm.{w}" for w in ("weight", "bias")},
    **ENCODER_NAMES,
}
CLIP_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=32)
CLIP_TEXT_DEFAULTS = dict(vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
                          max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5)
VIT_DEFAULTS = {
    "clip": dict(CLIP_DEFAULTS, hidden_act="quick_gelu", layer_norm_eps=1e-5),
    "siglip": dict(CLIP_DEFAULTS, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
    "eva": dict(hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16, image_size=224,
                patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6),
}
HF_ACT = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def vit_config(c: dict, where: str = "config.json") -> tuple[ViTConfig, str]:
    """(our config, family: clip | siglip | eva) from a CLIP, SigLIP or BLIP-2 vision config.json, alone or in a dual encoder's."""
    nested, kind = c.get("vision_config"), (c.get("vision_config") or c).get("model_type") or c.get("model_type", "")
    families = {"clip": "clip", "siglip": "siglip", "blip_2": "eva", "instructblip": "eva"}
    family = families.get(kind.removesuffix("_vision_model"))
    if family is None:
        raise UserError(f'{where}: model_type "{kind}" is no vision tower that is known here ({", ".join(families)}).')
    defaults = VIT_DEFAULTS[family]
    if nested is None:                                  # a config of its own says all of its sizes
        defaults, nested = {k: defaults[k] for k in ("hidden_act", "layer_norm_eps")}, c
    c = {**defaults, **nested}
    flags = {"clip": {}, "siglip": dict(cls=False, pre_norm=False, patch_bias=True, pool="map" if c.get("vision_use_head", True) else "all"),
             "eva": dict(pre_norm=False, patch_bias=True, pool="all")}[family]
    act = HF_ACT.get(c["hidden_act"])
    if act is None:
        raise UserError(f'{where}: activation "{c["hidden_act"]}" is not supported; known: {", ".join(HF_ACT)}.')
    try:
        return ViTConfig(image_size=c["image_size"], patch=c["patch_size"], width=c["hidden_size"], layers=c["num_hidden_layers"],
                         heads=c["num_attention_heads"], hidden=c["intermediate_size"], act=act, norm_eps=c["layer_norm_eps"],
                         **flags), family
    except KeyError as e:
        raise UserError(f"{where}: the key {e} is missing; a {kind} config.json has it.") from None
    except ValueError as e:
        raise UserError(f"{where}: {e}") from None


def openai_vit_config(checkpoint: Checkpoint, heads: int | None = None) -> ViTConfig:
    """CLIP's image tower by the shapes in its authors' file, as their build_model has it; heads are 64 wide unless given."""
    file, at = checkpoint.path, checkpoint.prefix("clip.visual.", "visual.")
    if at + "conv1.weight" not in checkpoint.where:
        raise UserError(f'{file}: without a config.json only CLIP\'s own layout is read, and tensor "{at}conv1.weight" is missing.')
    width, *_, patch = checkpoint.shape(at + "conv1.weight")
    if not heads and width % 64:
        raise UserError(f"{file}: a tower of width {width} has no heads of width 64, CLIP's; say how many there are with heads=….")
    side = round((checkpoint.shape(at + "positional_embedding")[0] - 1) ** 0.5)
    at += "transformer.resblocks."
    blocks = {n.removeprefix(at).split(".")[0] for n in checkpoint.where if n.startswith(at)}
    return ViTConfig(side * patch, patch, width, len(blocks), heads or width // 64, checkpoint.shape(at + "0.mlp.c_fc.weight")[0])


def hf_vit_config(c: ViTConfig) -> dict:
    family = "siglip" if not c.cls else "clip" if c.pre_norm and c.pool == "cls" else ""
    act = {ours: theirs for theirs, ours in HF_ACT.items()}.get(c.act)
    if not family or act is None:
        raise UserError("only CLIP- and SigLIP-style towers can be written; a BLIP-2 tower stays in the folder it was loaded from.")
    return dict(architectures=[{"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}[family]], model_type=f"{family}_vision_model",
                image_size=c.image_size, patch_size=c.patch, hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
                intermediate_size=c.hidden, hidden_act=act, layer_norm_eps=c.norm_eps, num_channels=3,
                **({} if c.cls else {"vision_use_head": c.pool == "map"}))


def load_vit(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None, heads: int | None = None) -> ViT:
    """A CLIP, SigLIP or BLIP-2 vision folder, alone or inside a dual encoder → ViT in eval mode; dtype None = float32.

    Or CLIP as its authors store it (visual.*, clip.visual.*): a file, or a folder without a config.json. heads: how many, if
    not 64 wide.
    """
    path = Path(path)
    if path.is_file() or path.is_dir() and not (path / "config.json").exists():
        config, family = openai_vit_config(Checkpoint(path), heads), "openai"
    else:
        config, family = vit_config(read_json(path / "config.json"), f"{path}/config.json")
    with torch.device("meta"):
        vit = ViT(config)
    fill(vit, *vit_file(path, config, family), device=device, dtype=dtype or torch.float32)
    return vit.eval()


def vit_file(path: str | os.PathLike, config: ViTConfig, family: str) -> tuple[Checkpoint, dict[str, str], tuple[str, ...]]:
    """The checkpoint of a vision tower, the names in it, and what else may lie there; arguments for `fill`."""
    checkpoint = Checkpoint(path)
    if family == "openai":                              # the rest is the text tower, and what both project with
        root = checkpoint.prefix("clip.visual.", "visual.").removesuffix("visual.")
        others = ("visual.proj", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection",
                  "logit_scale", "input_resolution", "context_length", "vocab_size")
        return checkpoint, expand(OPENAI_NAMES, config.layers, root + "visual."), tuple(root + n for n in others)
    prefix = checkpoint.prefix("vision_model.", "")
    names = expand(EVA_NAMES if family == "eva" else VIT_NAMES, config.layers, prefix)
    return checkpoint, names, ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias") if prefix else ()


def load_clip(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> CLIP:
    """A Hugging Face CLIPModel folder → both towers; clip(pixels, tokens) → scaled cosine similarities."""
    c = read_json(Path(path) / "config.json")
    config, family = vit_config(c, f"{path}/config.json")
    if "text_config" not in c or family != "clip":
        raise UserError(f"{path}/config.json: has no text_config of CLIP's, so this is no CLIPModel; load_vit reads a vision tower alone.")
    t = {**CLIP_TEXT_DEFAULTS, **c["text_config"]}
    end = t.get("eos_token_id", 2)
    text = TextConfig(t["vocab_size"], t["hidden_size"], t["num_hidden_layers"], t["num_attention_heads"], t["intermediate_size"],
                      t["max_position_embeddings"], HF_ACT[t["hidden_act"]], t["layer_norm_eps"],
                      end=None if end == 2 else end)        # OpenAI's files say 2, which is wrong: then the largest id is the end
    with torch.device("meta"):
        clip = CLIP(ViT(config), TextTransformer(text), c.get("projection_dim", 512))
    names = {**expand(VIT_NAMES, config.layers, "vision_model.", "vit."), **expand(TEXT_NAMES, text.layers, "text_model.", "text."),
             "image_projection.weight": "visual_projection.weight"}
    fill(clip, Checkpoint(path), names, (), device, dtype or torch.float32)
    return clip.eval()


def save_vit(vit: ViT, path: str | os.PathLike) -> None:
    """Write a Hugging Face CLIPVisionModel or SiglipVisionModel folder."""
    config = hf_vit_config(vit.config)
    write_tensors(Path(path) / "model.safetensors", published_tensors(vit, expand(VIT_NAMES, vit.config.layers, "vision_model.")))
    write_json(Path(path) / "config.json", config)
