"""support/formats/vision.py: CLIP, SigLIP with their text towers; BLIP-2's and DINOv2's vision towers."""
from __future__ import annotations

import os
from pathlib import Path

import torch

from model import ViT, ViTConfig
from papers.blip2_vit import Blip2ViT, Blip2ViTConfig
from papers.clip import CLIP, TextConfig, TextTransformer
from papers.dinov2 import DINOv2, DINOv2Config
from papers.siglip import Siglip, SiglipConfig, SiglipText, SiglipViT
from support.formats.checkpoint import Checkpoint, fill, published_tensors
from support.formats.files import (UserError, at_the_door, read_json, reading_config, write_json,
                                   write_tensors)
from support.formats.honoured import CLIP_TEXT, DUAL_ENCODER, VIT, refuse_unknown
from support.formats.names import WB, Names, Part, expand, parameters, split_qkv

# ---- 1. Names of tensors, ours → theirs ------------------------------------------------------------------

ENCODER_NAMES = parameters(         # a block of CLIP's and SigLIP's towers in transformers
    {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj",
     "norm1": "layer_norm1", "norm2": "layer_norm2", "up": "mlp.fc1", "down": "mlp.fc2"},
    "blocks.{i}.", "encoder.layers.{i}.")
VIT_NAMES = {                       # transformers' CLIPVisionModel and SiglipVisionModel; head: SigLIP's
    "cls": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding.weight",
    **parameters({"patch": "embeddings.patch_embedding",
                  "pre_norm": "pre_layrnorm",                       # sic
                  "post_norm": "post_layernorm"}),
    **ENCODER_NAMES,
    "head.probe": "head.probe",
    **split_qkv("head.", "head.attention.in_proj_"),
    **parameters({"o": "attention.out_proj", "norm": "layernorm", "up": "mlp.fc1", "down": "mlp.fc2"},
                 "head.", "head."),
}
EVA_NAMES = {                       # transformers' Blip2VisionModel: q, k, v fused, positions bare
    **VIT_NAMES,
    "positions": "embeddings.position_embedding",
    **split_qkv("blocks.{i}.", "encoder.layers.{i}.self_attn.qkv."),
    **parameters({"o": "self_attn.projection"}, "blocks.{i}.", "encoder.layers.{i}."),
}
DINOV2_NAMES = {                    # transformers' Dinov2Model, with registers and without
    "cls": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "registers": "embeddings.register_tokens",
    **parameters({"patch": "embeddings.patch_embeddings.projection", "post_norm": "layernorm"}),
    **parameters({"q": "attention.attention.query", "k": "attention.attention.key",
                  "v": "attention.attention.value", "o": "attention.output.dense",
                  "norm1": "norm1", "norm2": "norm2", "up": "mlp.fc1", "down": "mlp.fc2"},
                 "blocks.{i}.", "encoder.layer.{i}."),
    **{f"blocks.{{i}}.scale{n}": f"encoder.layer.{{i}}.layer_scale{n}.lambda1" for n in (1, 2)},
}
SWIGLU_NAMES = {                    # its giant tower: W_gate over W_up in one matrix
    **{f"blocks.{{i}}.{ours}.{w}": Part(f"encoder.layer.{{i}}.mlp.weights_in.{w}", n, 2)
       for n, ours in enumerate(("gate", "up")) for w in WB},
    **parameters({"down": "mlp.weights_out"}, "blocks.{i}.", "encoder.layer.{i}."),
}
OPENAI_NAMES = {                    # CLIP's authors' image tower (github.com/openai/CLIP), below "visual."
    "cls": "class_embedding",
    "positions": "positional_embedding",
    "patch.weight": "conv1.weight",
    **parameters({"pre_norm": "ln_pre", "post_norm": "ln_post"}),
    **split_qkv("blocks.{i}.", "transformer.resblocks.{i}.attn.in_proj_"),
    **parameters({"o": "attn.out_proj", "norm1": "ln_1", "norm2": "ln_2",
                  "up": "mlp.c_fc", "down": "mlp.c_proj"}, "blocks.{i}.", "transformer.resblocks.{i}."),
}
OPENAI_OTHERS = (                   # and what else its file holds: the text tower, the projections, sizes
    "visual.proj", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection",
    "logit_scale", "input_resolution", "context_length", "vocab_size")
TEXT_NAMES = {                      # transformers' CLIPTextModel and SiglipTextModel; head: SigLIP's
    "embed.weight": "embeddings.token_embedding.weight",
    "positions": "embeddings.position_embedding.weight",
    **parameters({"norm": "final_layer_norm", "head": "head"}),
    **ENCODER_NAMES,
}

# ---- 2. Configs ------------------------------------------------------------------------------------------

# transformers' defaults, for the configs inside another config.json, which leave out what is equal to them
CLIP_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                     image_size=224, patch_size=32)
CLIP_TEXT_DEFAULTS = dict(vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                          num_attention_heads=8, max_position_embeddings=77, hidden_act="quick_gelu",
                          layer_norm_eps=1e-5)
SIGLIP_TEXT_DEFAULTS = dict(vocab_size=32000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                            num_attention_heads=12, max_position_embeddings=64,
                            hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
VIT_DEFAULTS = {
    "clip": dict(CLIP_DEFAULTS, hidden_act="quick_gelu", layer_norm_eps=1e-5),
    "siglip": dict(CLIP_DEFAULTS, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
    "eva": dict(hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16,
                image_size=224, patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6),
    "dinov2": dict(CLIP_DEFAULTS, patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6),
}
TOWERS = {                          # family → the tower and its config
    "clip": (ViT, ViTConfig), "openai": (ViT, ViTConfig),
    "siglip": (SiglipViT, SiglipConfig), "eva": (Blip2ViT, Blip2ViTConfig), "dinov2": (DINOv2, DINOv2Config)}
FAMILIES = {                        # by model_type
    "clip": "clip", "siglip": "siglip", "blip_2": "eva", "instructblip": "eva", "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2"}
HF_ACT = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}     # theirs → ours


def activation(name: str, where: str) -> str:
    """Our name of an activation in transformers' words."""
    if name not in HF_ACT:
        raise UserError(f'{where}: activation "{name}" is not supported; known: {", ".join(HF_ACT)}.')
    return HF_ACT[name]


def vit_config(c: dict, where: str = "config.json") -> tuple[ViTConfig, str]:
    """(our config, family) from a vision config.json, alone or in a dual encoder's.

    family: clip | siglip | eva | dinov2. An unknown model_type, activation or a missing key is a UserError.
    """
    nested = c.get("vision_config")
    kind = (nested or c).get("model_type") or c.get("model_type", "")
    family = FAMILIES.get(kind.removesuffix("_vision_model"))
    if family is None:
        raise UserError(f'{where}: model_type "{kind}" is no vision tower that is known here '
                        f'({", ".join(FAMILIES)}).')
    defaults = VIT_DEFAULTS[family]
    refuse_unknown(c if nested is None else nested, where, VIT)
    refuse_second_config(c, "vision_config", defaults, where)
    if nested is None:                                  # a config of its own says all of its sizes
        defaults = {k: defaults[k] for k in ("hidden_act", "layer_norm_eps")}
    c = {**defaults, **(c if nested is None else nested)}
    form = {"head": c.get("vision_use_head", True)} if family == "siglip" else {}
    act = activation(c["hidden_act"], where)
    with reading_config(where, f"a {kind} config.json"):
        if family == "dinov2":
            c, form = dinov2_fields(c, where, kind)
        config = TOWERS[family][1](
            image_size=c["image_size"], patch=c["patch_size"], width=c["hidden_size"],
            layers=c["num_hidden_layers"], heads=c["num_attention_heads"], hidden=c["intermediate_size"],
            act=act, norm_eps=c["layer_norm_eps"], **form)
    return config, family


def vit_names(config: ViTConfig, family: str) -> Names:
    """The table of a tower in transformers' layout, {i} for the number of a block."""
    if family == "dinov2":
        return DINOV2_NAMES | (SWIGLU_NAMES if config.swiglu else {})
    return EVA_NAMES if family == "eva" else VIT_NAMES


def refuse_second_config(c: dict, part: str, defaults: dict, where: str) -> None:
    """A UserError where an old CLIP's part + "_dict" says something else than the part itself.

    transformers lets it, and the defaults where it is silent, replace the part.
    """
    second = c.get(f"{part}_dict") or {}
    if not isinstance(second, dict):
        raise UserError(f"{where}: the key '{part}_dict' is {second!r:.40}, not an object.")
    for key, value in {**defaults, **second}.items() if second else ():
        if key in defaults and value != c[part].get(key, defaults[key]):
            raise UserError(f'{where}: {part} and {part}_dict give two values of "{key}", '
                            f"{c[part].get(key, defaults[key])} and {value}; leave one of them out.")


def dinov2_fields(c: dict, where: str, kind: str) -> tuple[dict, dict]:
    """A Dinov2Config with the width of its feed-forward, and what no other tower has."""
    hidden, swiglu = int(c["hidden_size"] * c.get("mlp_ratio", 4)), c.get("use_swiglu_ffn", False)
    if swiglu:                                          # ⅔ of it: 3 matrices, not 2; up to a multiple of 8
        hidden = -(-int(hidden * 2 / 3) // 8) * 8
    registers = c.get("num_register_tokens", 4) if kind == "dinov2_with_registers" else 0
    return {**c, "intermediate_size": hidden}, {"swiglu": swiglu, "registers": registers}


def empty_vit(config: ViTConfig, family: str) -> ViT:
    """The tower of what `vit_config` returns."""
    return TOWERS[family][0](config)


def hf_vit_config(vit: ViT) -> dict:
    """The config.json of a CLIPVisionModel or SiglipVisionModel; a UserError where the tower is neither."""
    c, architecture = vit.config, {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}.get(vit.family)
    act = {ours: theirs for theirs, ours in HF_ACT.items()}.get(c.act)
    if architecture is None or act is None:
        raise UserError("only CLIP- and SigLIP-style towers can be written; "
                        "another tower stays in the folder it was loaded from.")
    head = {"vision_use_head": c.head} if vit.family == "siglip" else {}
    return dict(architectures=[architecture], model_type=f"{vit.family}_vision_model",
                image_size=c.image_size, patch_size=c.patch, hidden_size=c.width, num_hidden_layers=c.layers,
                num_attention_heads=c.heads, intermediate_size=c.hidden, hidden_act=act,
                layer_norm_eps=c.norm_eps, num_channels=3, **head)


def openai_vit_config(checkpoint: Checkpoint, heads: int | None = None) -> ViTConfig:
    """CLIP's image tower by the shapes in its authors' file, as their build_model does; heads are 64 wide."""
    file, root = checkpoint.path, checkpoint.prefix("clip.visual.", "visual.")
    if not checkpoint.missing(root + "layer1.0.conv1.weight"):
        raise UserError(f"{file}: holds a ResNet of CLIP's; of its towers only ViTs are read.")
    if checkpoint.missing(root + "conv1.weight"):
        raise UserError(f"{file}: without a config.json only CLIP's own layout is read, "
                        f'and tensor "{root}conv1.weight" is missing.')
    width, *_, patch = checkpoint.shape(root + "conv1.weight")
    if not heads and width % 64:
        raise UserError(f"{file}: a tower of width {width} has no heads of width 64, CLIP's; "
                        "say how many there are with heads=….")
    side = round((checkpoint.shape(root + "positional_embedding")[0] - 1) ** 0.5)
    blocks = root + "transformer.resblocks."
    layers = {n.removeprefix(blocks).split(".")[0] for n in checkpoint.where if n.startswith(blocks)}
    with at_the_door(str(file)):
        return ViTConfig(image_size=side * patch, patch=patch, width=width, layers=len(layers),
                         heads=heads or width // 64, hidden=checkpoint.shape(blocks + "0.mlp.c_fc.weight")[0])


def text_config(c: dict, where: str) -> TextConfig:
    """CLIP's or SigLIP's text_config in transformers' words."""
    end = c.get("eos_token_id", 2)                      # OpenAI's files say 2, which is wrong …
    if isinstance(end, list):
        raise UserError(f"{where}: eos_token_id is {end!r:.40}, but one token of a caption is read out.")
    with at_the_door(where):
        return TextConfig(c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"],
                          c["intermediate_size"], c["max_position_embeddings"],
                          activation(c["hidden_act"], where), c["layer_norm_eps"],
                          end=None if end == 2 else end)            # … None: the largest id is the end


# ---- 3. Folders ------------------------------------------------------------------------------------------

def load_vit(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None,
             heads: int | None = None) -> ViT:
    """A CLIP, SigLIP, BLIP-2 or DINOv2 vision folder, alone or inside a dual encoder → ViT in eval mode.

    Or CLIP as its authors store it (visual.*, clip.visual.*): a file, or a folder without a config.json.
    heads: how many, where they are not 64 wide. dtype None = float32. Whatever does not fit is a UserError.
    """
    path = Path(path)
    where = path / "config.json"
    if path.is_file() or path.is_dir() and not where.exists():
        where, family = path, "openai"
        config = openai_vit_config(Checkpoint(path), heads)
    else:
        config, family = vit_config(read_json(where), str(where))
    with torch.device("meta"), at_the_door(str(where)):
        vit = empty_vit(config, family)
    fill(vit, *vit_file(path, config, family), device=device, dtype=dtype or torch.float32)
    return vit.eval()


def vit_file(path: str | os.PathLike, config: ViTConfig,
             family: str) -> tuple[Checkpoint, Names, tuple[str, ...]]:
    """A vision tower's checkpoint, its names, the starts of what may be left over: arguments of `fill`."""
    checkpoint = Checkpoint(path)
    if family == "openai":
        root = checkpoint.prefix("clip.visual.", "visual.").removesuffix("visual.")
        names = expand(OPENAI_NAMES, config.layers, root + "visual.")
        return checkpoint, names, tuple(root + name for name in OPENAI_OTHERS)
    if family == "dinov2":
        prefix = checkpoint.prefix("dinov2.", "dinov2_with_registers.", "")
        names = expand(vit_names(config, family), config.layers, prefix)
        return checkpoint, names, (prefix + "embeddings.mask_token", "classifier.")
    prefix = checkpoint.prefix("vision_model.", "")
    names = expand(vit_names(config, family), config.layers, prefix)
    others = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
    return checkpoint, names, others if prefix else ()


def load_clip(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> CLIP | Siglip:
    """A Hugging Face CLIPModel or SiglipModel folder → both towers; clip(pixels, tokens) → (images, texts).

    CLIP's numbers are scaled cosine similarities, SigLIP's the logits of a match. dtype None = float32.
    The key "vision_folder" (ours) names another folder, relative to this one, that holds the vision tower.
    Whatever does not fit is a UserError.
    """
    where = f"{path}/config.json"
    c = read_json(where)
    config, family = vit_config(c, where)
    defaults = {"clip": CLIP_TEXT_DEFAULTS, "siglip": SIGLIP_TEXT_DEFAULTS}.get(family)
    if "text_config" not in c or defaults is None:
        raise UserError(f"{where}: has no text_config of CLIP's or SigLIP's, so this is no dual encoder; "
                        "load_vit reads a vision tower alone.")
    given = {**defaults, **c["text_config"]}
    refuse_unknown(c, where, DUAL_ENCODER)
    refuse_unknown(given, f"{where}: text_config", CLIP_TEXT)
    refuse_second_config(c, "text_config", defaults, where)
    text = text_config(given, f"{where}: text_config")
    with torch.device("meta"), at_the_door(where):
        vit = empty_vit(config, family)
        if family == "clip":
            clip = CLIP(vit, TextTransformer(text), c.get("projection_dim", 512))
        else:
            clip = Siglip(vit, SiglipText(text, given.get("projection_size") or text.width))
    checkpoint = Checkpoint(path)
    if c.get("vision_folder"):
        checkpoint.include(Checkpoint(Path(path) / c["vision_folder"]))
    fill(clip, checkpoint, clip_names(clip), (), device, dtype or torch.float32)
    clip.text.register_forward_pre_hook(refuse_long_text)
    return clip.eval()


def clip_names(clip: CLIP | Siglip) -> Names:
    return {**expand(VIT_NAMES, clip.vit.config.layers, "vision_model.", "vit."),
            **expand(TEXT_NAMES, clip.text.config.layers, "text_model.", "text."),
            "image_projection.weight": "visual_projection.weight"}


def refuse_long_text(text: TextTransformer, args: tuple) -> None:
    """The door of a published text tower: a text that is too long is its user's mistake."""
    with at_the_door("CLIP"):
        text.check_length(*args)


def save_vit(vit: ViT, path: str | os.PathLike) -> None:
    """Write a Hugging Face CLIPVisionModel or SiglipVisionModel folder."""
    config = hf_vit_config(vit)                  # first: a tower that is neither writes nothing
    names = expand(VIT_NAMES, vit.config.layers, "vision_model.")
    write_tensors(Path(path) / "model.safetensors", published_tensors(vit, names))
    write_json(Path(path) / "config.json", config)


def save_clip(clip: CLIP, path: str | os.PathLike) -> None:
    """Write a Hugging Face CLIPModel folder."""
    t, act = clip.text.config, {ours: theirs for theirs, ours in HF_ACT.items()}
    text = dict(model_type="clip_text_model", vocab_size=t.vocab_size, hidden_size=t.width,
                intermediate_size=t.hidden, num_hidden_layers=t.layers, num_attention_heads=t.heads,
                max_position_embeddings=t.context, hidden_act=act[t.act], layer_norm_eps=t.norm_eps)
    config = dict(architectures=["CLIPModel"], model_type="clip",
                  projection_dim=len(clip.text_projection.weight), vision_config=hf_vit_config(clip.vit),
                  text_config=text | ({} if t.end is None else {"eos_token_id": t.end}))
    names = {**clip_names(clip), **{name: name for name in ("text_projection.weight", "logit_scale")}}
    write_tensors(Path(path) / "model.safetensors", published_tensors(clip, names))
    write_json(Path(path) / "config.json", config)
