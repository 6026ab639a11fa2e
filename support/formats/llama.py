"""formats/llama.py: decoders as Hugging Face and Meta publish them: names of tensors, config.json, params.json."""
from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.utils.checkpoint

from model import Decoder, DecoderConfig
from support.formats.checkpoint import Checkpoint, expand, fill, published_tensors
from support.formats.files import UserError, nearest, read_json, write_json, write_tensors

# ours → theirs; {i} counts layers. "name[1/3]" is the second third of the rows of a fused matrix; "name[rope/H]" has the rows of each
# of H heads reordered from Meta's RoPE to ours; "name[zero]" is zeros of that shape, "name[rows/n]" (m·n, …) seen as
# (m, n, …); "a & b" has the rows of b after those of a.
DECODER_NAMES = {       # Hugging Face Llama, below "model."; the head stands beside it
    "embed.weight": "embed_tokens.weight",
    "norm.weight": "norm.weight",
    "layers.{i}.norm1.weight": "layers.{i}.input_layernorm.weight",
    "layers.{i}.norm2.weight": "layers.{i}.post_attention_layernorm.weight",
    **{f"layers.{{i}}.attention.{p}.{w}": f"layers.{{i}}.self_attn.{p}_proj.{w}" for p in "qkvo" for w in ("weight", "bias")},
    **{f"layers.{{i}}.mlp.{p}.{w}": f"layers.{{i}}.mlp.{p}_proj.{w}" for p in ("gate", "up", "down") for w in ("weight", "bias")},
}
META_NAMES = {          # Llama as Meta publishes it; H query heads, G key/value heads
    "embed.weight": "tok_embeddings.weight", "lm_head.weight": "output.weight",
    "layers.{i}.norm1.weight": "layers.{i}.attention_norm.weight", "layers.{i}.norm2.weight": "layers.{i}.ffn_norm.weight",
    **{f"layers.{{i}}.attention.{p}.{w}": f"layers.{{i}}.attention.w{p}.{w}{order}" for w in ("weight", "bias") for p, order in (
        ("q", "[rope/{H}]"), ("k", "[rope/{G}]"), ("v", ""), ("o", ""))},
    **{f"layers.{{i}}.mlp.{p}.{w}": f"layers.{{i}}.feed_forward.w{n}.{w}" for w in ("weight", "bias") for p, n in (
        ("gate", 1), ("down", 2), ("up", 3))},
}


def decoder_names(config: DecoderConfig, trunk: str = "model.", head: str = "", ours: str = "") -> dict[str, str]:
    """Hugging Face's names of a decoder that lies below `trunk`, with its output projection at head + "lm_head"."""
    return {**expand(DECODER_NAMES, config.layers, trunk, ours), ours + "lm_head.weight": head + "lm_head.weight"}


# Hugging Face's config.json ↔ our fields.
LLAMAS = ("llama", "qwen2", "mistral", "llava", "llava_llama", "idefics", "mllama_text_model")  # model_types with Llama's fields
ROPES = {               # rope_type → the numbers it needs
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def decoder_config(c: dict, where: str = "config.json") -> DecoderConfig:
    """A Llama config.json, as published (rope_theta, rope_scaling) or as transformers 5 writes it (rope_parameters).

    Or Qwen2's, whose q, k and v have biases, or Mistral's where no sliding window narrows the context. Whatever would make it
    another function (another family, activation, RoPE scaling) is a UserError.
    """
    ropes = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind, scaling = c.get("model_type") or "llama", ropes.get("rope_type", ropes.get("type", "default"))
    context = c.get("max_position_embeddings", 2048)
    windowed = kind == "mistral" or c.get("use_sliding_window")                 # Qwen2's files name a window and do not use it
    window = c.get("sliding_window", 4096) if windowed else None
    if kind not in LLAMAS:
        raise UserError(f'{where}: model_type "{kind}" is no decoder that is known here; {nearest(kind, LLAMAS)}')
    if window and window < context:
        raise UserError(f'{where}: a sliding window of {window} tokens ("{kind}", context {context}) is not supported; here '
                        "every token sees its whole past.")
    if c.get("hidden_act", "silu") != "silu":
        raise UserError(f'{where}: activation "{c["hidden_act"]}" is not supported in a decoder; known: silu.')
    if scaling not in ROPES:
        raise UserError(f'{where}: RoPE scaling "{scaling}" is not supported; known: {", ".join(ROPES)}.')
    try:
        return DecoderConfig(
            vocab_size=c["vocab_size"], width=c["hidden_size"], layers=c["num_hidden_layers"], heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            head_width=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"], hidden=c["intermediate_size"],
            rope_theta=ropes.get("rope_theta") or c.get("rope_theta") or 10000.0,
            rope_scaling={"rope_type": scaling, **{k: ropes[k] for k in ROPES[scaling]}} if ROPES[scaling] else None,
            norm_eps=c["rms_norm_eps"], tied=c.get("tie_word_embeddings", False),
            attention_bias="qkv" if kind == "qwen2" else c.get("attention_bias", False),
            mlp_bias=c.get("mlp_bias", False), context=context, extra_tokens=c.get("extra_tokens", 0))
    except KeyError as e:
        raise UserError(f"{where}: the key {e} is missing; a Llama config.json has it.") from None
    except ValueError as e:
        raise UserError(f"{where}: {e}") from None


def meta_decoder_config(path: Path, checkpoint: Checkpoint) -> DecoderConfig:
    """Meta's params.json, and what it leaves to the tensors beside it: the vocabulary (-1), whether the output is tied."""
    p = read_json(path / "params.json")
    wq, table, head = "layers.0.attention.wq.weight", "tok_embeddings.weight", "output.weight"
    try:
        D, H, theta, step = p["dim"], p["n_heads"], p.get("rope_theta", 10000.0), p["multiple_of"]
        parts = max(1, D // checkpoint.shape(wq)[0])                            # W_q (H·E, D) is cut along its rows
        for file in (f"consolidated.{i:02d}" for i in range(parts if parts > 1 else 0)):
            if file not in {f.stem for f in checkpoint.files}:
                raise UserError(f'{path}: {file} is missing; "{wq}" has {D // parts} of {D} rows in each file, so there are {parts}.')
        V = p["vocab_size"] if p.get("vocab_size", -1) > 0 else checkpoint.shape(head)[0] * parts
        hidden = int(int(8 * D / 3) * (p.get("ffn_dim_multiplier") or 1))       # ⅔ of 4 D: three matrices weigh as much as two
        tied = parts == 1 and checkpoint.shape(head) == checkpoint.shape(table) and (
            torch.equal(checkpoint.read(head), checkpoint.read(table)))         # Llama 3.2 1B and 3B store it twice
        # Llama 3.1's scaling. Its factor stands nowhere: 8, but 32 in the two tied models (llama-models, issue 241)
        numbers = dict(zip(ROPES["llama3"], (32.0 if tied else 8.0, 1.0, 4.0, 8192)))
        return DecoderConfig(
            V, D, p["n_layers"], H, p.get("n_kv_heads") or H, D // H, -(-hidden // step) * step, theta,
            {"rope_type": "llama3", **numbers} if p.get("use_scaled_rope") else None, p["norm_eps"], tied,
            context=131072 if p.get("use_scaled_rope") else 8192 if theta > 1e4 else 2048)
    except KeyError as e:
        raise UserError(f"{path}/params.json: the key {e} is missing; Meta's params.json has it.") from None


def hf_decoder_config(c: DecoderConfig, **extra) -> dict:
    if c.attention_bias == "qkv":
        llama = hf_decoder_config(replace(c, attention_bias=False), **extra)
        return {**llama, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    scaling = {"rope_scaling": c.rope_scaling} if c.rope_scaling else {}
    extra |= {"extra_tokens": c.extra_tokens} if c.extra_tokens else {}         # ours alone; transformers has no such Llama
    return dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", vocab_size=c.vocab_size, hidden_size=c.width,
                num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_width,
                intermediate_size=c.hidden, rope_theta=c.rope_theta, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
                attention_bias=c.attention_bias, mlp_bias=c.mlp_bias, max_position_embeddings=c.context, **scaling, **extra)


# What transformers assumes where a config inside another config is silent: published LLaVA files leave most of Llama's fields out.
LLAMA_DEFAULTS = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                      max_position_embeddings=2048, rms_norm_eps=1e-6)


def load_decoder(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> Decoder:
    """A Llama folder as Hugging Face has it (config.json; one file or shards) or as Meta does (params.json; one or several
    consolidated files) → Decoder in eval mode; dtype None = float32."""
    path = Path(path)
    if (path / "params.json").exists() and not (checkpoint := Checkpoint(path)).prefix("model.", ""):
        c = meta_decoder_config(path, checkpoint)
        names = expand(META_NAMES, c.layers, H=c.heads, G=c.kv_heads)
    else:
        c = decoder_config(read_json(path / "config.json"), f"{path}/config.json")
        names, checkpoint = decoder_names(c), Checkpoint(path)
    with torch.device("meta"):
        decoder = Decoder(c)
    fill(decoder, checkpoint, names, (names["lm_head.weight"],) if c.tied else (), device, dtype or torch.float32)
    return decoder.eval()


def save_decoder(decoder: Decoder, path: str | os.PathLike, **extra) -> None:
    """Write a Hugging Face Llama folder; `extra` goes into config.json (bos_token_id, …)."""
    write_tensors(Path(path) / "model.safetensors", published_tensors(decoder, decoder_names(decoder.config)))
    write_json(Path(path) / "config.json", hf_decoder_config(decoder.config, **extra))
