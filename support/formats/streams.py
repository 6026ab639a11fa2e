"""support/formats/streams.py: models that read words and pictures in one stream or two.

    load_visualbert     VisualBertForPreTraining, as transformers writes it and the hub has it (uclanlp/…)
    load_vilbert        the authors' BertForMultiModalPreTraining (vilbert_beta)
    load_vilt           transformers' ViLT with whichever of its heads a file has (dandelin/vilt-b32-…)
"""
from __future__ import annotations

import os
from pathlib import Path

import torch

from model import ViTConfig
from papers.vilbert import ViLBert, ViLBertConfig
from papers.vilt import PatchViT, ViLT
from papers.visualbert import VisualBert, VisualBertConfig
from support.formats.checkpoint import Checkpoint, fill
from support.formats.files import UserError, read_json, reading_config
from support.formats.honoured import VILBERT, VILT, VISUALBERT, refuse_unknown
from support.formats.names import Names, expand, parameters

def bert_layer(ours: str, theirs: str) -> Names:
    """The table of one post-norm layer, papers.masked.BertLayer."""
    return parameters({"attention.q": "attention.self.query", "attention.k": "attention.self.key",
                       "attention.v": "attention.self.value", "attention.o": "attention.output.dense",
                       "attention.norm": "attention.output.LayerNorm", "mlp.up": "intermediate.dense",
                       "mlp.down": "output.dense", "mlp.norm": "output.LayerNorm"}, ours, theirs)


def word_embedding(ours: str, theirs: str) -> Names:
    tables = {"words": "word_embeddings", "positions": "position_embeddings",
              "segments": "token_type_embeddings"}
    return {**parameters(tables, ours, theirs, ("weight",)),
            **parameters({"norm": "LayerNorm"}, ours, theirs)}


def word_head(ours: str, theirs: str) -> Names:
    return {**parameters({"map": "transform.dense", "norm": "transform.LayerNorm"}, ours, theirs),
            f"{ours}bias": f"{theirs}bias"}


def bert_config(c: dict, where: str, read: frozenset[str]) -> dict:
    """The sizes that a BERT's config names; a UserError for what we do not compute."""
    refuse_unknown(c, where, read)
    if c.get("hidden_act", "gelu") != "gelu" or c.get("layer_norm_eps", 1e-12) != 1e-12:
        raise UserError(f"{where}: hidden_act must be gelu and layer_norm_eps 1e-12, the published values.")
    vocab = c["vocab_size"] if "vocab_size" in c else c["vocab_size_or_config_json_file"]
    return dict(vocab_size=vocab, width=c["hidden_size"], layers=c["num_hidden_layers"],
                heads=c["num_attention_heads"], hidden=c["intermediate_size"],
                positions=c["max_position_embeddings"], dropout=c.get("hidden_dropout_prob", 0.1))


def load_visualbert(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> VisualBert:
    """A folder of a VisualBertForPreTraining, in eval mode; dtype None = float32."""
    path, root = Path(path), "visual_bert.embeddings."
    c = read_json(path / "config.json")
    with torch.device("meta"), reading_config(f"{path}/config.json", "the config.json of a VisualBERT"):
        config = VisualBertConfig(**bert_config(c, f"{path}/config.json", VISUALBERT),
                                  region=c["visual_embedding_dim"])
        model = VisualBert(config)
    names = {
        **word_embedding("text.", root), **word_head("word_head.", "cls.predictions."),
        **parameters({"project": f"{root}visual_projection", "pooler": "visual_bert.pooler.dense",
                      "match_head": "cls.seq_relationship"}),
        "visual_segments.weight": f"{root}visual_token_type_embeddings.weight",
        "visual_positions.weight": f"{root}visual_position_embeddings.weight",
        **expand(bert_layer("layers.{i}.", "visual_bert.encoder.layer.{i}."), config.layers)}
    tied = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    fill(model, Checkpoint(path), names, tied, device, dtype or torch.float32)
    return model.eval()


def load_vilbert(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> ViLBert:
    """A folder with a ViLBERT and its config.json, in eval mode; dtype None = float32."""
    path = Path(path)
    c, where = read_json(path / "config.json"), f"{path}/config.json"
    with torch.device("meta"), reading_config(where, "the config.json of a ViLBERT"):
        if c.get("fusion_method", "mul") != "mul" or c.get("v_hidden_act", "gelu") != "gelu":
            raise UserError(f"{where}: fusion_method must be mul and v_hidden_act gelu, as published.")
        config = ViLBertConfig(
            **bert_config(c, where, VILBERT), region=c["v_feature_size"], classes=c["v_target_size"],
            region_width=c["v_hidden_size"], region_layers=c["v_num_hidden_layers"],
            region_heads=c["v_num_attention_heads"], region_hidden=c["v_intermediate_size"],
            shared=c["bi_hidden_size"], shared_heads=c["bi_num_attention_heads"],
            connect=tuple(zip(c["v_biattention_id"], c["t_biattention_id"])))
        model = ViLBert(config)
    root, joint = "bert.v_embeddings.", "bert.encoder.c_layer.{i}."
    names = {
        **word_embedding("text.", "bert.embeddings."), **word_head("word_head.", "cls.predictions."),
        **word_head("region_head.", "cls.imagePredictions."),
        "region_head.bias": "cls.imagePredictions.decoder.bias",
        "classes.weight": "cls.imagePredictions.decoder.weight",
        **parameters({"features": f"{root}image_embeddings", "boxes": f"{root}image_location_embeddings",
                      "region_norm": f"{root}LayerNorm", "text_pool": "bert.t_pooler.dense",
                      "region_pool": "bert.v_pooler.dense", "match_head": "cls.bi_seq_relationship"}),
        **expand(bert_layer("text_layers.{i}.", "bert.encoder.layer.{i}."), config.layers),
        **expand(bert_layer("region_layers.{i}.", "bert.encoder.v_layer.{i}."), config.region_layers)}
    for side, n, letter in (("regions", 1, "v"), ("text", 2, "t")):
        table = {"q": f"biattention.query{n}", "k": f"biattention.key{n}", "v": f"biattention.value{n}",
                 "o": f"biOutput.dense{n}", "norm": f"biOutput.LayerNorm{n}",
                 "mlp.up": f"{letter}_intermediate.dense", "mlp.down": f"{letter}_output.dense",
                 "mlp.norm": f"{letter}_output.LayerNorm"}
        names |= expand(parameters(table, f"connections.{{i}}.{side}.", joint), len(config.connect))
    unread = [f"bert.encoder.c_layer.{i}.biOutput.q_dense{n}." for n in (1, 2)
              for i in range(len(config.connect))]
    fill(model, Checkpoint(path), names, ("cls.predictions.decoder.weight", *unread), device,
         dtype or torch.float32)
    return model.eval()


def load_vilt(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> ViLT:
    """A folder with a ViLT, in eval mode; a head that the file lacks is None; dtype None = float32."""
    path = Path(path)
    c, where, file = read_json(path / "config.json"), f"{path}/config.json", Checkpoint(path)
    matrix, bias = "mlm_score.decoder.weight", "mlm_score.decoder.bias"
    with torch.device("meta"), reading_config(where, "the config.json of a ViLT"):
        sizes = bert_config(c, where, VILT)
        vit = PatchViT(ViTConfig(c["image_size"], c["patch_size"], sizes["width"], sizes["layers"],
                                 sizes["heads"], sizes["hidden"], "gelu", 1e-12, pre_norm=False,
                                 patch_bias=True))
        model = ViLT(vit, sizes["vocab_size"], sizes["positions"], tied=file.missing(matrix),
                     match=1 if not file.missing("rank_output.weight") else 2)
    head = "rank_output" if model.match_head.out_features == 1 else "itm_score.fc"
    if file.missing(f"{head}.weight"):
        model.match_head = None
    if file.missing("mlm_score.transform.dense.weight"):
        model.word_head = model.word_matrix = None
    root, layer = "vilt.embeddings.", "vilt.encoder.layer.{i}."
    block = {"norm1": "layernorm_before", "norm2": "layernorm_after", "q": "attention.attention.query",
             "k": "attention.attention.key", "v": "attention.attention.value", "o": "attention.output.dense",
             "up": "intermediate.dense", "down": "output.dense"}
    names = {
        **word_embedding("text.", f"{root}text_embeddings."), **word_head("word_head.", "mlm_score."),
        "word_head.bias": "mlm_score.bias" if file.missing(bias) else bias, "word_matrix.weight": matrix,
        "vit.cls": f"{root}cls_token", "vit.positions": f"{root}position_embeddings",
        "modality.weight": f"{root}token_type_embeddings.weight",
        **parameters({"vit.patch": f"{root}patch_embeddings.projection", "vit.post_norm": "vilt.layernorm",
                      "pooler": "vilt.pooler.dense", "match_head": head}),
        **expand(parameters(block, "vit.blocks.{i}.", layer), sizes["layers"])}
    fill(model, file, names, ("mlm_score.bias",), device, dtype or torch.float32)
    return model.eval()
