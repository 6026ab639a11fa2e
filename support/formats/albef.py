"""support/formats/albef.py: ALBEF as its authors write it, the teacher and the queues with it."""
from __future__ import annotations

import os
from pathlib import Path

import torch

from model import ViT, ViTConfig
from papers.albef import Albef, Towers
from support.formats.checkpoint import Checkpoint, fill
from support.formats.files import read_json, reading_config
from support.formats.honoured import ALBEF
from support.formats.names import Names, expand, parameters, split_qkv
from support.formats.streams import bert_config, bert_layer, word_embedding, word_head

TIMM = {                        # a ViT of timm, below "visual_encoder."
    "cls": "cls_token", "positions": "pos_embed",
    **parameters({"patch": "patch_embed.proj", "post_norm": "norm"}),
    **split_qkv("blocks.{i}.", "blocks.{i}.attn.qkv."),
    **parameters({"o": "attn.proj", "norm1": "norm1", "norm2": "norm2", "up": "mlp.fc1", "down": "mlp.fc2"},
                 "blocks.{i}.", "blocks.{i}.")}
CROSS = parameters({"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense",
                    "norm": "output.LayerNorm"}, "fusion.{i}.cross.", "encoder.layer.{i}.crossattention.")


def tower_names(ours: str, m: str, depth: int, text: int, layers: int) -> Names:
    """Of ViT and BERT below `ours`; the teacher's modules have m = "_m" behind their names."""
    bert, theirs = f"text_encoder{m}.bert.", "encoder.layer.{i}."
    return {**expand(TIMM, depth, f"visual_encoder{m}.", f"{ours}vit."),
            **word_embedding(f"{ours}embedding.", f"{bert}embeddings."),
            **expand(bert_layer("layers.{i}.", theirs), text, bert, ours),
            **expand({**bert_layer("fusion.{i}.", theirs), **CROSS}, range(text, layers), bert, ours),
            **word_head(f"{ours}word_head.", f"text_encoder{m}.cls.predictions."),
            **parameters({"image_projection": f"vision_proj{m}", "text_projection": f"text_proj{m}"}, ours)}


def load_albef(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> Albef:
    """A folder of the authors' ALBEF, in eval mode; dtype None = float32. Row 0 of the queues goes first."""
    path, file = Path(path), Checkpoint(Path(path))
    c = read_json(path / "config.json")
    with torch.device("meta"), reading_config(f"{path}/config.json", "the config.json of an ALBEF"):
        b = bert_config(c, f"{path}/config.json", ALBEF)
        rows = len(file.get("visual_encoder.blocks.0.mlp.fc1.bias"))
        vit = ViT(ViTConfig(c["image_res"], c["patch_size"], c["encoder_width"], c["vision_depth"],
                            b["heads"], rows, "gelu", 1e-6, pre_norm=False, patch_bias=True))
        towers = Towers(vit, joint=c["embed_dim"], text_layers=c["fusion_layer"], **b)
        model = Albef(towers, c["queue_size"], c["momentum"])
    names = {"temperature": "temp", **parameters({"match_head": "itm_head"})}
    for ours, m in (("towers.", ""), ("teacher.", "_m")):
        names |= tower_names(ours, m, c["vision_depth"], c["fusion_layer"], b["layers"])
    fill(model, file, names, ("image_queue", "text_queue", "queue_ptr"), device, dtype or torch.float32)
    model.image_queue, model.text_queue = (file.get(f"{kind}_queue").T.contiguous().to(device)
                                           for kind in ("image", "text"))
    model.place = torch.zeros((), dtype=torch.long, device=device)
    return model.eval()
