"""support/formats/streams.py: VisualBERT as transformers writes it and as the hub has it (uclanlp/…)."""
from __future__ import annotations

import os
from pathlib import Path

import torch

from papers.visualbert import VisualBert, VisualBertConfig
from support.formats.checkpoint import Checkpoint, fill
from support.formats.files import UserError, read_json, reading_config
from support.formats.honoured import VISUALBERT, refuse_unknown
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
    return dict(vocab_size=c["vocab_size"], width=c["hidden_size"], layers=c["num_hidden_layers"],
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
