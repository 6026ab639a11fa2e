"""formats/flamingo.py: OpenFlamingo's trained part and IDEFICS."""
from __future__ import annotations

from pathlib import Path

from model import Decoder, DecoderConfig, VLM, ViT
from papers import make_bridge
from support.formats.checkpoint import BridgeFile, Checkpoint, Fills, WB, expand
from support.formats.files import UserError
from support.formats.llama import LLAMA_DEFAULTS, decoder_config, decoder_names
from support.formats.vision import VIT_NAMES, vit_config

RESAMPLER_NAMES = {     # OpenFlamingo's PerceiverResampler
    "latents": "latents", **{f"norm.{w}": f"norm.{w}" for w in WB},
    **{f"layers.{{i}}.{n}.{w}": f"layers.{{i}}.0.{n}.{w}" for n in ("norm_media", "norm_latents") for w in WB},
    **{f"layers.{{i}}.{p}.weight": f"layers.{{i}}.0.to_{t}.weight{part}" for p, t, part in (
        ("q", "q", ""), ("k", "kv", "[0/2]"), ("v", "kv", "[1/2]"), ("o", "out", ""))},
    **{f"layers.{{i}}.ff.norm.{w}": f"layers.{{i}}.1.0.{w}" for w in WB},
    "layers.{i}.ff.up.weight": "layers.{i}.1.1.weight", "layers.{i}.ff.down.weight": "layers.{i}.1.3.weight",
}
XATTN_NAMES = {         # OpenFlamingo's GatedCrossAttentionBlock
    **{f"norm.{w}": f"attn.norm.{w}" for w in WB}, "q.weight": "attn.to_q.weight", "k.weight": "attn.to_kv.weight[0/2]",
    "v.weight": "attn.to_kv.weight[1/2]", "o.weight": "attn.to_out.weight", **{f"ff.norm.{w}": f"ff.0.{w}" for w in WB},
    "ff.up.weight": "ff.1.weight", "ff.down.weight": "ff.3.weight", "attention_gate": "attn_gate", "ff_gate": "ff_gate",
}


def openflamingo_file(file: Checkpoint, beside: dict, **options) -> BridgeFile:
    """OpenFlamingo's trained part: resampler and gated blocks. Its new rows of the word embeddings are the decoder's and left over."""
    inside = file.prefix("lang_encoder.model.layers.", "lang_encoder.transformer.blocks.", "lang_encoder.gpt_neox.layers.")
    held = sorted({int(n[len(inside):].split(".")[0]) for n in file.where if n.startswith(inside) and "gated_cross_attn_layer" in n})
    if not held:
        raise UserError(f"{file.path}: holds no gated_cross_attn_layer, so this is no OpenFlamingo checkpoint.")
    block = f"{inside}{held[0]}.gated_cross_attn_layer."
    (R, Di), (D, _) = file.shape("perceiver.latents"), file.shape(block + "attn.to_out.weight")
    depth = file.count("perceiver.layers.{}.0.norm_media.weight")
    E, E_resampler = (beside.get(part, {}).get("dim_head", 64) for part in ("gated_cross_attention", "perceiver"))
    sizes = dict(every=held[0] + 1, first=held[0], latents=R, depth=depth, head_width=E, heads=file.shape(block + "attn.to_q.weight")[0] // E,
                 resampler_head_width=E_resampler, resampler_heads=file.shape("perceiver.layers.0.0.to_q.weight")[0] // E_resampler,
                 mult=file.shape(block + "ff.1.weight")[0] // D)
    bridge = make_bridge("flamingo", DecoderConfig(width=D, layers=held[-1] + 1), Di, **{**sizes, **options})
    names = {f"resampler.{a}": f"perceiver.{b}" for a, b in expand(RESAMPLER_NAMES, depth).items()}
    names |= {f"blocks.{n}.{a}": f"{inside}{l}.gated_cross_attn_layer.{b}" for n, l in enumerate(held) for a, b in XATTN_NAMES.items()}
    return bridge, names, tuple(n for n in file.where if "embed_tokens" in n or ".wte." in n or ".embed_in." in n)


IDEFICS_NAMES = {       # below "model."
    **{f"blocks.{{i}}.{a}": f"gated_cross_attn_layers.{{i}}.{b}" for a, b in (
        ("attention_gate", "alpha_cross_attn"), ("ff_gate", "alpha_dense"), ("norm.weight", "input_layernorm.weight"),
        ("ff.norm.weight", "post_attention_layernorm.weight"), *((f"{p}.weight", f"cross_attn.{p}_proj.weight") for p in "qkvo"),
        *((f"{p}_norm.weight", f"cross_attn.{p}_layer_norm.weight") for p in "qk"),
        *((f"ff.{p}.weight", f"mlp.{p}_proj.weight") for p in ("gate", "up", "down")))},
    "resampler.latents": "perceiver_resampler.latents",
    **{f"resampler.norm.{w}": f"perceiver_resampler.layer_norm.{w}" for w in WB},
    **{f"resampler.layers.{{i}}.{a}.{w}": f"perceiver_resampler.blocks.{{i}}.{b}.{w}" for w in WB for a, b in (
        ("norm_media", "0.context_layer_norm"), ("norm_latents", "0.latents_layer_norm"), ("o", "0.output_proj"),
        *((p, f"0.{p}_proj") for p in "qkv"), *((f"{p}_norm", f"0.{p}_layer_norm") for p in "qk"),
        ("ff.norm", "1.ln"), ("ff.up", "1.fc"), ("ff.down", "1.c_proj"))},
}
IDEFICS_DEFAULTS = dict(                                # what a config.json leaves out, each part of it by itself
    LLAMA_DEFAULTS, additional_vocab_size=0, cross_layer_interval=1, qk_layer_norms=False, alpha_type="float", use_resampler=False,
    vision_config=dict(embed_dim=768, image_size=224, intermediate_size=5120, patch_size=14, num_hidden_layers=32,
                       num_attention_heads=16, hidden_act="gelu"),
    perceiver_config=dict(resampler_n_latents=64, resampler_depth=6, resampler_n_heads=16, resampler_head_dim=96,
                          qk_layer_norms_perceiver=False))


def read_idefics(c: dict, path: Path) -> tuple[VLM, Fills]:
    """IDEFICS in transformers' layout; words beyond Llama's vocabulary lie in matrices of their own.

    The published ones begin with <fake_token_around_image> and <image>, in this order; the latter is `image_token`.
    """
    where = f"{path}/config.json"
    v, r = ({**IDEFICS_DEFAULTS[part], **(c.get(part) or {})} for part in ("vision_config", "perceiver_config"))
    c = {**IDEFICS_DEFAULTS, **c}
    extra = c["additional_vocab_size"]
    decoder = Decoder(decoder_config({**c, "vocab_size": c["vocab_size"] + extra}, where))
    vit = ViT(vit_config({**v, "model_type": "clip_vision_model", "hidden_size": v["embed_dim"]}, where)[0])
    bridge = make_bridge("idefics", decoder.config, vit.config.width, every=c["cross_layer_interval"], depth=r["resampler_depth"],
                         latents=r["resampler_n_latents"] if c["use_resampler"] else 0, qk_norm=c["qk_layer_norms"],
                         vector_gates=c["alpha_type"] == "vector", resampler_heads=r["resampler_n_heads"],
                         resampler_head_width=r["resampler_head_dim"], resampler_qk_norm=r["qk_layer_norms_perceiver"])
    names = {**expand(VIT_NAMES, vit.config.layers, "model.vision_model.", "vit."), **decoder_names(decoder.config, ours="decoder."),
             **expand(IDEFICS_NAMES, max(len(bridge.blocks), r["resampler_depth"]), "model.", "bridge.")}
    if extra:
        names["decoder.embed.weight"] += " & model.embed_tokens.additional_embedding.weight"
        names["decoder.lm_head.weight"] += " & lm_head.additional_fc.weight"
    vlm = VLM(vit, bridge, decoder, c["vocab_size"] + 1 if extra > 1 else None)
    return vlm, [(vlm, Checkpoint(path), names, ("lm_head.",) if decoder.config.tied else ())]
