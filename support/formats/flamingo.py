"""support/formats/flamingo.py: OpenFlamingo's trained part, and IDEFICS."""
from __future__ import annotations

from pathlib import Path

from model import Decoder, DecoderConfig, VLM
from papers import make_bridge
from support.formats.checkpoint import BridgeFile, Checkpoint, Filling
from support.formats.files import UserError
from support.formats.honoured import BRIDGES, PERCEIVER, refuse_contradiction, refuse_unknown
from support.formats.llama import LLAMA_DEFAULTS, decoder_config, decoder_names, tie_head
from support.formats.names import Joined, Part, expand, parameters
from support.formats.vision import VIT_NAMES, empty_vit, vit_config

# ---- 1. OpenFlamingo -------------------------------------------------------------------------------------

RESAMPLER_NAMES = {         # PerceiverResampler (github.com/mlfoundations/open_flamingo, helpers.py)
    "latents": "latents",
    **parameters({"norm": "norm"}),
    **parameters({"norm_media": "0.norm_media", "norm_latents": "0.norm_latents", "ff.norm": "1.0"},
                 "layers.{i}.", "layers.{i}."),
    "layers.{i}.q.weight": "layers.{i}.0.to_q.weight",
    "layers.{i}.k.weight": Part("layers.{i}.0.to_kv.weight", 0, 2),
    "layers.{i}.v.weight": Part("layers.{i}.0.to_kv.weight", 1, 2),
    "layers.{i}.o.weight": "layers.{i}.0.to_out.weight",
    "layers.{i}.ff.up.weight": "layers.{i}.1.1.weight",
    "layers.{i}.ff.down.weight": "layers.{i}.1.3.weight",
}
XATTN_NAMES = {             # GatedCrossAttentionBlock, in the same file
    **parameters({"norm": "attn.norm", "ff.norm": "ff.0"}),
    "q.weight": "attn.to_q.weight",
    "k.weight": Part("attn.to_kv.weight", 0, 2),
    "v.weight": Part("attn.to_kv.weight", 1, 2),
    "o.weight": "attn.to_out.weight",
    "ff.up.weight": "ff.1.weight",
    "ff.down.weight": "ff.3.weight",
    "attention_gate": "attn_gate",
    "ff_gate": "ff_gate",
}
DECODER_LAYERS = (          # of the decoders that OpenFlamingo wraps: LLaMA, MPT, GPT-NeoX
    "lang_encoder.model.layers.", "lang_encoder.transformer.blocks.", "lang_encoder.gpt_neox.layers.")
NEW_WORDS = ("embed_tokens", ".wte.", ".embed_in.")     # new word embeddings: the decoder's, left over


def openflamingo_file(file: Checkpoint, config: dict, **options) -> BridgeFile:
    """OpenFlamingo's resampler and gated blocks; sizes from the shapes, head widths from its config or 64."""
    layers = file.prefix(*DECODER_LAYERS)
    gated = sorted({int(name[len(layers):].split(".")[0]) for name in file.where
                    if name.startswith(layers) and "gated_cross_attn_layer" in name})
    if not gated:
        raise UserError(f"{file.path}: holds no gated_cross_attn_layer, "
                        "so this is no OpenFlamingo checkpoint.")
    block = f"{layers}{gated[0]}.gated_cross_attn_layer."
    (R, Di), (D, _) = file.shape("perceiver.latents"), file.shape(block + "attn.to_out.weight")
    depth = file.count("perceiver.layers.{}.0.norm_media.weight")
    xattn, perceiver = config.get("gated_cross_attention", {}), config.get("perceiver", {})
    head_width, resampler_head_width = xattn.get("dim_head", 64), perceiver.get("dim_head", 64)
    sizes = dict(
        every=gated[0] + 1, first=gated[0], latents=R, depth=depth,
        mult=file.shape(block + "ff.1.weight")[0] // D,
        head_width=head_width, heads=file.shape(block + "attn.to_q.weight")[0] // head_width,
        resampler_head_width=resampler_head_width,
        resampler_heads=file.shape("perceiver.layers.0.0.to_q.weight")[0] // resampler_head_width)
    where = f"{file.path}'s config"
    for part in (xattn, perceiver):
        refuse_unknown(part, where, BRIDGES["flamingo"])
    refuse_contradiction(config, where, vis_dim=Di, cross_attn_every_n_layers=gated[0] + 1)
    refuse_contradiction(xattn, where, heads=sizes["heads"], ff_mult=sizes["mult"])
    refuse_contradiction(perceiver, where, heads=sizes["resampler_heads"], num_latents=R, depth=depth,
                         ff_mult=file.shape("perceiver.layers.0.1.1.weight")[0] // Di)
    bridge = make_bridge("flamingo", DecoderConfig(width=D, layers=gated[-1] + 1), Di, **{**sizes, **options})
    names = {**expand(RESAMPLER_NAMES, depth, "perceiver.", "resampler."),
             **expand(XATTN_NAMES, gated, layers + "{i}.gated_cross_attn_layer.", "blocks.{i}.")}
    words = tuple(name for name in file.where if any(part in name for part in NEW_WORDS))
    return BridgeFile(bridge, names, words)


# ---- 2. IDEFICS ------------------------------------------------------------------------------------------

IDEFICS_NAMES = {           # transformers' IdeficsModel, below "model."
    "blocks.{i}.attention_gate": "gated_cross_attn_layers.{i}.alpha_cross_attn",
    "blocks.{i}.ff_gate": "gated_cross_attn_layers.{i}.alpha_dense",
    **parameters({"norm": "input_layernorm", "ff.norm": "post_attention_layernorm",
                  "q": "cross_attn.q_proj", "k": "cross_attn.k_proj", "v": "cross_attn.v_proj",
                  "o": "cross_attn.o_proj",
                  "q_norm": "cross_attn.q_layer_norm", "k_norm": "cross_attn.k_layer_norm",
                  "ff.gate": "mlp.gate_proj", "ff.up": "mlp.up_proj", "ff.down": "mlp.down_proj"},
                 "blocks.{i}.", "gated_cross_attn_layers.{i}.", ("weight",)),
    "resampler.latents": "perceiver_resampler.latents",
    **parameters({"resampler.norm": "perceiver_resampler.layer_norm"}),
    **parameters({"norm_media": "0.context_layer_norm", "norm_latents": "0.latents_layer_norm",
                  "q": "0.q_proj", "k": "0.k_proj", "v": "0.v_proj", "o": "0.output_proj",
                  "q_norm": "0.q_layer_norm", "k_norm": "0.k_layer_norm",
                  "ff.norm": "1.ln", "ff.up": "1.fc", "ff.down": "1.c_proj"},
                 "resampler.layers.{i}.", "perceiver_resampler.blocks.{i}."),
}
IDEFICS_DEFAULTS = dict(    # transformers' IdeficsConfig and its two parts, where config.json is silent
    LLAMA_DEFAULTS, additional_vocab_size=0, cross_layer_interval=1, qk_layer_norms=False, alpha_type="float",
    use_resampler=False)
IDEFICS_VISION_DEFAULTS = dict(
    embed_dim=768, image_size=224, intermediate_size=5120, patch_size=14, num_hidden_layers=32,
    num_attention_heads=16, hidden_act="gelu")
IDEFICS_PERCEIVER_DEFAULTS = dict(
    resampler_n_latents=64, resampler_depth=6, resampler_n_heads=16, resampler_head_dim=96,
    qk_layer_norms_perceiver=False)


def read_idefics(c: dict, path: Path) -> tuple[VLM, list[Filling]]:
    """IDEFICS's folder → the empty model, and what fills it.

    Words beyond Llama's vocabulary lie in matrices of their own. The published ones begin with
    <fake_token_around_image> and <image>, in this order; the latter is `image_token`.
    """
    where = f"{path}/config.json"
    v = {**IDEFICS_VISION_DEFAULTS, **(c.get("vision_config") or {})}
    r = {**IDEFICS_PERCEIVER_DEFAULTS, **(c.get("perceiver_config") or {})}
    refuse_unknown(r, f"{where}: perceiver_config", PERCEIVER)
    c = {**IDEFICS_DEFAULTS, **c}
    new_words = c["additional_vocab_size"]
    decoder = Decoder(decoder_config({**c, "vocab_size": c["vocab_size"] + new_words}, where))
    tower = {**v, "model_type": "clip_vision_model", "hidden_size": v["embed_dim"]}
    vit = empty_vit(*vit_config(tower, where))
    bridge = make_bridge(
        "idefics", decoder.config, vit.config.width, every=c["cross_layer_interval"],
        latents=r["resampler_n_latents"] if c["use_resampler"] else 0, depth=r["resampler_depth"],
        qk_norm=c["qk_layer_norms"], vector_gates=c["alpha_type"] == "vector",
        resampler_heads=r["resampler_n_heads"], resampler_head_width=r["resampler_head_dim"],
        resampler_qk_norm=r["qk_layer_norms_perceiver"])
    names = {**expand(VIT_NAMES, vit.config.layers, "model.vision_model.", "vit."),
             **decoder_names(decoder.config, ours="decoder."),
             **expand(IDEFICS_NAMES, max(len(bridge.blocks), r["resampler_depth"]), "model.", "bridge.")}
    if new_words:
        for ours, theirs in (("decoder.embed.weight", "model.embed_tokens.additional_embedding.weight"),
                             ("decoder.lm_head.weight", "lm_head.additional_fc.weight")):
            names[ours] = Joined((names[ours], theirs))
    vlm = VLM(vit, bridge, decoder, c["vocab_size"] + 1 if new_words > 1 else None)
    file = Checkpoint(path)
    optional = tie_head(decoder.config, names, file, "decoder.")
    return vlm, [Filling(vlm, file, names, optional)]
