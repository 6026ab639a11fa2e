"""support/formats/coca.py: CoCa as open_clip writes it."""
from __future__ import annotations

import os
from pathlib import Path

import torch

from model import ViT, ViTConfig
from papers.clip import TextConfig
from papers.coca import CoCa, LowerHalf
from support.formats.checkpoint import Checkpoint, fill
from support.formats.files import Json, at_the_door, read_json
from support.formats.honoured import COCA, COCA_PART, refuse_unknown
from support.formats.names import Names, Transposed, expand, parameters, split_qkv
from support.formats.vision import OPENAI_NAMES

BLOCK = {**split_qkv("{i}.", "{i}.attn.in_proj_"),
         **parameters({"o": "attn.out_proj", "norm1": "ln_1", "norm2": "ln_2", "up": "mlp.c_fc",
                       "down": "mlp.c_proj"}, "{i}.", "{i}.")}
CROSS = {**BLOCK, **parameters({"norm_image": "ln_1_kv"}, "{i}.", "{i}.")}


def pooler_names(ours: str, theirs: str, fused: bool) -> Names:
    """fused: its matrices are one, because queries and keys are equally wide; its biases always are."""
    weights = (split_qkv(ours, f"{theirs}attn.in_proj_", ("weight",)) if fused else
               {f"{ours}{p}.weight": f"{theirs}attn.{p}_proj_weight" for p in "qkv"})
    return {**weights, **split_qkv(ours, f"{theirs}attn.in_proj_", ("bias",)),
            f"{ours}queries": f"{theirs}query",
            **parameters({"norm_q": "ln_q", "norm_k": "ln_k", "o": "attn.out_proj"}, ours, theirs)}


def coca_names(coca: CoCa) -> Names:
    D, Di = coca.text.config.width, coca.vit.config.width
    names = {
        **expand(OPENAI_NAMES, coca.vit.config.layers, "visual.", "vit."),
        **pooler_names("pool.", "visual.attn_pool.", D == Di),
        **pooler_names("contrast_pool.", "visual.attn_pool_contrastive.", D == Di or coca.cascade),
        **parameters({"text.norm": "text.ln_final", "norm": "text_decoder.ln_final"}),
        "image_projection.weight": Transposed("visual.proj"),
        "text.embed.weight": "text.token_embedding.weight", "text.cls": "text.cls_emb",
        "text.positions": "text.positional_embedding",
        "text_projection.weight": Transposed("text.text_projection"),
        "head.weight": Transposed("text_decoder.text_projection")}
    for ours, theirs, table, layers in (
            ("text.blocks.", "text.transformer.resblocks.", BLOCK, len(coca.text.blocks)),
            ("blocks.", "text_decoder.resblocks.", BLOCK, len(coca.blocks)),
            ("cross.", "text_decoder.cross_attn.", CROSS, len(coca.cross))):
        names |= expand(table, layers, theirs, ours)
    return names


def empty_coca(c: Json, where: str) -> CoCa:
    """A model of the sizes of open_clip's config ("model_cfg")."""
    refuse_unknown(c, where, COCA)
    v, t, m = (c[name] for name in ("vision_cfg", "text_cfg", "multimodal_cfg"))
    for part in (v, t, m):
        refuse_unknown(part, where, COCA_PART)

    def hidden(part: dict) -> int:
        return int(part["width"] * part.get("mlp_ratio", 4))

    pool = {True: "one"}.get(v["attentional_pool"], v["attentional_pool"])
    with at_the_door(where):
        if (m["width"], m["heads"]) != (t["width"], t["heads"]) or t["width"] != c["embed_dim"]:
            raise ValueError("the halves of the decoder and embed_dim have one width; this config has "
                             f"{t['width']}, {m['width']} and {c['embed_dim']}.")
        vit = ViT(ViTConfig(v["image_size"], v["patch_size"], v["width"], v["layers"],
                            v["width"] // v.get("head_width", 64), hidden(v), "gelu"))
        text = LowerHalf(TextConfig(t["vocab_size"], t["width"], t["layers"], t["heads"], hidden(t),
                                    t["context_length"], "gelu"),
                         pad=0, shifted=not c.get("correct_cls_mask", False))
        return CoCa(vit, text, c["embed_dim"], m["layers"], v.get("attn_pooler_queries", 256),
                    v.get("attn_pooler_heads", 8), pool)


def load_coca(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> CoCa:
    """A folder of open_clip's (open_clip_config.json or config.json), in eval mode; None = float32."""
    where = Path(path) / "open_clip_config.json"
    where = where if where.exists() else Path(path) / "config.json"
    c = read_json(where)
    with torch.device("meta"):
        coca = empty_coca(c.get("model_cfg", c), str(where))
    fill(coca, Checkpoint(path), coca_names(coca), (), device, dtype or torch.float32)
    return coca.eval()
