"""formats/mllama.py: Llama 3.2 Vision as it is published."""
from __future__ import annotations

from pathlib import Path

from model import Decoder, VLM
from papers.mllama import Mllama
from papers.mllama_vit import TiledViT, TiledViTConfig
from support.formats.checkpoint import Checkpoint, Fills, WB, expand
from support.formats.files import UserError
from support.formats.llama import DECODER_NAMES, decoder_config
from support.formats.vision import HF_ACT

TILED_VIT_NAMES = {     # Mllama's vision model
    "patch.weight": "patch_embedding.weight", "cls": "class_embedding",
    **{f"{a}_norm.{w}": f"layernorm_{a}.{w}" for a in ("pre", "post") for w in ("weight", "bias")},
    "positions": "gated_positional_embedding.embedding", "gate": "gated_positional_embedding.gate",
    "tile_positions": "gated_positional_embedding.tile_embedding.weight",
    "before": "pre_tile_positional_embedding.embedding.weight", "before_gate": "pre_tile_positional_embedding.gate",
    "after": "post_tile_positional_embedding.embedding.weight", "after_gate": "post_tile_positional_embedding.gate",
}
TILED_BLOCK_NAMES = {   # its blocks; "global_" stands in front of both names for the gated ones
    **{f"blocks.{{i}}.{p}.weight": f"transformer.layers.{{i}}.self_attn.{p}_proj.weight" for p in "qkvo"},
    **{f"blocks.{{i}}.{a}.{w}": f"transformer.layers.{{i}}.{b}.{w}" for w in ("weight", "bias") for a, b in (
        ("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm"), ("up", "mlp.fc1"), ("down", "mlp.fc2"))},
    "blocks.{i}.attention_gate": "transformer.layers.{i}.gate_attn",
    "blocks.{i}.mlp_gate": "transformer.layers.{i}.gate_ffn",
}


def tiled_vit_config(c: dict, where: str = "config.json") -> TiledViTConfig:
    """Mllama's vision_config; what it leaves out has transformers' default, as in TiledViTConfig."""
    known = dict(image_size="image_size", patch="patch_size", width="vision_output_dim", layers="num_hidden_layers",
                 heads="attention_heads", hidden="intermediate_size", norm_eps="norm_eps", inner="hidden_size",
                 global_layers="num_global_layers", tiles="max_num_tiles", taps="intermediate_layers_indices",
                 aspects="supported_aspect_ratios", act="hidden_act")
    given = {ours: c[theirs] for ours, theirs in known.items() if c.get(theirs) is not None}
    if given.get("act", "gelu") not in HF_ACT:
        raise UserError(f'{where}: activation "{given["act"]}" is not supported; known: {", ".join(HF_ACT)}.')
    change = dict(taps=tuple, aspects=len, act=HF_ACT.get)
    return TiledViTConfig(**{k: change[k](v) if k in change else v for k, v in given.items()})


MLLAMA_NAMES = {        # a cross-attention layer; the others have Llama's names
    **{a.replace("layers", "blocks"): b.replace("self", "cross") for a, b in DECODER_NAMES.items() if "{i}" in a},
    **{f"blocks.{{i}}.{n}_norm.weight": f"layers.{{i}}.cross_attn.{n}_norm.weight" for n in "qk"},
    "blocks.{i}.attention_gate": "layers.{i}.cross_attn_attn_gate",
    "blocks.{i}.ff_gate": "layers.{i}.cross_attn_mlp_gate",
}
MLLAMA_DEFAULTS = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=40,
                       rope_theta=5e5, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
                       max_position_embeddings=131072, cross_attention_layers=[3, 8, 13, 18, 23, 28, 33, 38])


def read_mllama(c: dict, path: Path) -> tuple[VLM, Fills]:
    """Llama-3.2-Vision as published, or by the names that transformers 5 has in memory (model.…).

    All layers are numbered through: those of self-attention are our decoder's, those of cross-attention our bridge's.
    """
    where, file = f"{path}/config.json", Checkpoint(path)
    t = {**MLLAMA_DEFAULTS, **{k: v for k, v in (c.get("text_config") or {}).items() if v is not None}}
    cross = [n for n in range(t["num_hidden_layers"]) if n in t["cross_attention_layers"]]
    own = [n for n in range(t["num_hidden_layers"]) if n not in cross]
    if not own or cross and cross[-1] > own[-1]:
        raise UserError(f"{where}: cross-attention layer {cross[-1]} is the last; one of self-attention must follow.")
    t |= dict(num_hidden_layers=len(own), tie_word_embeddings=False, extra_tokens=8)    # 8 stands in their code alone
    decoder = Decoder(decoder_config(t, where))
    vit = TiledViT(tiled_vit_config(c.get("vision_config") or {}, f"{where}: vision_config"))
    bridge = Mllama(decoder.config, vit.config.width, [sum(n < m for n in own) for m in cross], leak=True)
    trunk = file.prefix("language_model.model.", "model.language_model.")
    head = file.prefix("language_model.lm_head.", "lm_head.")
    tower, map = (file.prefix(n, "model." + n) for n in ("vision_model.", "multi_modal_projector."))
    names = {ours + a.format(i=i): trunk + b.format(i=n)
             for ours, table, held in (("decoder.", DECODER_NAMES, own), ("bridge.", MLLAMA_NAMES, cross))
             for a, b in table.items() for i, n in enumerate(held)}
    names = {**names, **{f"bridge.map.{w}": map + w for w in WB}, "decoder.lm_head.weight": head + "weight",
             **expand(TILED_VIT_NAMES, 0, tower, "vit."), **expand(TILED_BLOCK_NAMES, vit.config.layers, tower, "vit."),
             **expand(TILED_BLOCK_NAMES, vit.config.global_layers, tower + "global_", "vit.global_")}
    vlm = VLM(vit, bridge, decoder, c.get("image_token_index", 128256))
    return vlm, [(vlm, file, names, ())]
