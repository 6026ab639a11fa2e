"""support/formats/flava.py: FLAVA as transformers writes it, without the codebook."""
from __future__ import annotations

import os
from pathlib import Path

import torch

from model import ViT, ViTConfig
from papers.flava import Flava
from support.formats.checkpoint import Checkpoint, fill
from support.formats.files import UserError, read_json, reading_config
from support.formats.honoured import FLAVA, FLAVA_PART, refuse_unknown
from support.formats.names import expand, parameters
from support.formats.streams import word_embedding, word_head

BLOCK = {"q": "attention.attention.query", "k": "attention.attention.key", "v": "attention.attention.value",
         "o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
         "norm1": "layernorm_before", "norm2": "layernorm_after"}
IMAGE, TEXT, BOTH = (f"flava.{kind}_model." for kind in ("image", "text", "multimodal"))


def load_flava(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> Flava:
    """A folder of a FlavaForPreTraining, in eval mode; dtype None = float32."""
    path = Path(path)
    c = read_json(path / "config.json")
    with torch.device("meta"), reading_config(f"{path}/config.json", "the config.json of a FLAVA"):
        image, text, both = (c[f"{kind}_config"] for kind in ("image", "text", "multimodal"))
        refuse_unknown(c, f"{path}/config.json", FLAVA)
        for kind, part in zip(("image", "text", "multimodal"), (image, text, both)):
            refuse_unknown(part, f"{path}/config.json: {kind}_config", FLAVA_PART)
            if part["num_attention_heads"] != text["num_attention_heads"]:
                raise UserError(f"{path}/config.json: {kind}_config has {part['num_attention_heads']} heads, "
                                f"text_config {text['num_attention_heads']}; the three are alike here.")
            if part["hidden_act"] != "gelu" or part["layer_norm_eps"] != 1e-12:
                raise UserError(f"{path}/config.json: hidden_act must be gelu and layer_norm_eps 1e-12.")
        vit = ViT(ViTConfig(image["image_size"], image["patch_size"], image["hidden_size"],
                            image["num_hidden_layers"], image["num_attention_heads"],
                            image["intermediate_size"], "gelu", 1e-12, pre_norm=False, patch_bias=True))
        model = Flava(vit, text["vocab_size"], image["vocab_size"], text["num_hidden_layers"],
                      text["num_attention_heads"], text["intermediate_size"], both["num_hidden_layers"],
                      both["intermediate_size"], text["max_position_embeddings"], c["projection_dim"])
    names = {
        "vit.cls": f"{IMAGE}embeddings.cls_token", "vit.positions": f"{IMAGE}embeddings.position_embeddings",
        "mask_patch": f"{IMAGE}embeddings.mask_token", "cls": f"{BOTH}cls_token",
        "logit_scale": "flava.logit_scale", **word_embedding("embedding.", f"{TEXT}embeddings."),
        **parameters({"vit.patch": f"{IMAGE}embeddings.patch_embeddings.projection",
                      "vit.post_norm": f"{IMAGE}layernorm", "text_norm": f"{TEXT}layernorm",
                      "fusion_norm": f"{BOTH}layernorm", "image_in": "flava.image_to_mm_projection",
                      "text_in": "flava.text_to_mm_projection", "pooler": "itm_head.pooler.dense",
                      "image_projection": "flava.image_projection", "match_head": "itm_head.seq_relationship",
                      "text_projection": "flava.text_projection"})}
    for ours, theirs, n in (("vit.blocks", IMAGE, vit.config.layers), ("layers", TEXT, len(model.layers)),
                            ("fusion", BOTH, len(model.fusion))):
        names |= expand(parameters(BLOCK, f"{ours}.{{i}}.", f"{theirs}encoder.layer.{{i}}."), n)
    for head in ("mim_head", "mlm_head", "mmm_image_head", "mmm_text_head"):
        names |= {**word_head(f"{head}.head.", f"{head}."), f"{head}.matrix": f"{head}.decoder.weight",
                  f"{head}.head.bias": f"{head}.decoder.bias"}
    unused = tuple(f"{kind}pooler." for kind in (IMAGE, TEXT, BOTH))
    copies = tuple(f"{head}.bias" for head in ("mim_head", "mlm_head", "mmm_image_head", "mmm_text_head"))
    fill(model, Checkpoint(path), names, unused + copies + ("image_codebook.",), device,
         dtype or torch.float32)
    return model.eval()
