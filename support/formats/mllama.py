"""support/formats/mllama.py: Llama 3.2 Vision, as published and as transformers 5 has it in memory."""
from __future__ import annotations

from pathlib import Path

from model import Decoder, VLM
from papers.mllama import Mllama
from papers.mllama_vit import TiledViT, TiledViTConfig
from support.formats.checkpoint import Checkpoint, Filling
from support.formats.files import UserError, at_the_door
from support.formats.honoured import MLLAMA, TILED_VIT, refuse_unknown
from support.formats.llama import DECODER_NAMES, decoder_config
from support.formats.names import Names, WB, expand, parameters, renamed
from support.formats.pictures import canvases
from support.formats.vision import activation

TILED_VIT_NAMES = {         # transformers' MllamaVisionModel
    "cls": "class_embedding",
    "patch.weight": "patch_embedding.weight",
    **parameters({"pre_norm": "layernorm_pre", "post_norm": "layernorm_post"}),
    "positions": "gated_positional_embedding.embedding",
    "gate": "gated_positional_embedding.gate",
    "tile_positions": "gated_positional_embedding.tile_embedding.weight",
    "before": "pre_tile_positional_embedding.embedding.weight",
    "before_gate": "pre_tile_positional_embedding.gate",
    "after": "post_tile_positional_embedding.embedding.weight",
    "after_gate": "post_tile_positional_embedding.gate",
}
TILED_BLOCK_NAMES = {       # its blocks; "global_" stands in front of both names for the gated ones
    **parameters({"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
                 "blocks.{i}.", "transformer.layers.{i}.self_attn.", ("weight",)),
    **parameters({"norm1": "input_layernorm", "norm2": "post_attention_layernorm",
                  "up": "mlp.fc1", "down": "mlp.fc2"}, "blocks.{i}.", "transformer.layers.{i}."),
    "blocks.{i}.attention_gate": "transformer.layers.{i}.gate_attn",
    "blocks.{i}.mlp_gate": "transformer.layers.{i}.gate_ffn",
}
CROSS_LAYER_NAMES = {       # a layer of cross-attention has Llama's names, and these
    **{ours.replace("layers", "blocks"): renamed(theirs, lambda name: name.replace("self", "cross"))
       for ours, theirs in DECODER_NAMES.items() if "{i}" in ours},
    "blocks.{i}.q_norm.weight": "layers.{i}.cross_attn.q_norm.weight",
    "blocks.{i}.k_norm.weight": "layers.{i}.cross_attn.k_norm.weight",
    "blocks.{i}.attention_gate": "layers.{i}.cross_attn_attn_gate",
    "blocks.{i}.ff_gate": "layers.{i}.cross_attn_mlp_gate",
}

TEXT_DEFAULTS = dict(       # transformers' MllamaTextConfig, where config.json is silent
    model_type="mllama_text_model", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=40, rope_theta=5e5,
    num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=131072,
    cross_attention_layers=[3, 8, 13, 18, 23, 28, 33, 38])
TILED_VIT_FIELDS = dict(    # our field → MllamaVisionConfig's
    image_size="image_size", patch="patch_size", width="vision_output_dim", layers="num_hidden_layers",
    heads="attention_heads", hidden="intermediate_size", norm_eps="norm_eps", inner="hidden_size",
    global_layers="num_global_layers", tiles="max_num_tiles", taps="intermediate_layers_indices",
    aspects="supported_aspect_ratios", act="hidden_act")


def tiled_vit_config(c: dict, where: str = "config.json") -> TiledViTConfig:
    """Mllama's vision_config; what it leaves out has transformers' default, as in TiledViTConfig."""
    refuse_unknown(c, where, TILED_VIT)
    given = {ours: c[theirs] for ours, theirs in TILED_VIT_FIELDS.items() if c.get(theirs) is not None}
    if "act" in given:
        given["act"] = activation(given["act"], where)
    if "taps" in given:
        given["taps"] = tuple(given["taps"])
    if "aspects" in given:
        tiles = given.get("tiles", TiledViTConfig.tiles)
        if [tuple(canvas) for canvas in given["aspects"]] != canvases(tiles):
            raise UserError(f"{where}: supported_aspect_ratios are not all canvases of at most {tiles} tiles "
                            "in their order, by which they are numbered.")
        given["aspects"] = len(given["aspects"])
    with at_the_door(where):
        return TiledViTConfig(**given)


def read_mllama(c: dict, path: Path) -> tuple[VLM, list[Filling]]:
    """Llama-3.2-Vision's folder → the empty model, and what fills it.

    All of their layers are numbered through: those of self-attention are our decoder's, those of
    cross-attention our bridge's.
    """
    where, file = f"{path}/config.json", Checkpoint(path)
    refuse_unknown(c, where, MLLAMA)
    text = {k: v for k, v in (c.get("text_config") or {}).items() if v is not None}
    theta = text.get("rope_parameters", {}).get("rope_theta", TEXT_DEFAULTS["rope_theta"])
    text = {**TEXT_DEFAULTS, "rope_theta": theta, **text}
    cross_layers = [n for n in range(text["num_hidden_layers"]) if n in text["cross_attention_layers"]]
    self_layers = [n for n in range(text["num_hidden_layers"]) if n not in cross_layers]
    if not self_layers or cross_layers and cross_layers[-1] > self_layers[-1]:
        raise UserError(f"{where}: cross-attention layer {cross_layers[-1]} is the last; "
                        "one of self-attention must follow.")
    if text.get("tie_word_embeddings"):
        raise UserError(f"{where}: tie_word_embeddings is true, but a Llama 3.2 Vision reads 8 ids that it "
                        "never writes, so its two matrices differ.")
    text |= dict(num_hidden_layers=len(self_layers), tie_word_embeddings=False,
                 extra_tokens=8)                        # the 8 stands in transformers' code alone
    decoder = Decoder(decoder_config(text, where))
    vit = TiledViT(tiled_vit_config(c.get("vision_config") or {}, f"{where}: vision_config"))
    places = [sum(n < m for n in self_layers) for m in cross_layers]     # our layer after each
    bridge = Mllama(decoder.config, vit.config.width, places, leak=True)
    vlm = VLM(vit, bridge, decoder, c.get("image_token_index", 128256))
    return vlm, [Filling(vlm, file, mllama_names(file, vit.config, self_layers, cross_layers))]


def mllama_names(file: Checkpoint, vit: TiledViTConfig, self_layers: list[int],
                 cross_layers: list[int]) -> Names:
    """Ours → theirs for the whole model, below the prefixes that the file has."""
    trunk = file.prefix("language_model.model.", "model.language_model.")
    head = file.prefix("language_model.lm_head.", "lm_head.")
    tower = file.prefix("vision_model.", "model.vision_model.")
    projector = file.prefix("multi_modal_projector.", "model.multi_modal_projector.")
    return {**expand(DECODER_NAMES, self_layers, trunk, "decoder."),
            "decoder.lm_head.weight": head + "weight",
            **expand(CROSS_LAYER_NAMES, cross_layers, trunk, "bridge."),
            **{f"bridge.map.{w}": projector + w for w in WB},
            **expand(TILED_VIT_NAMES, 0, tower, "vit."),
            **expand(TILED_BLOCK_NAMES, vit.layers, tower, "vit."),
            **expand(TILED_BLOCK_NAMES, vit.global_layers, tower + "global_", "vit.global_")}
