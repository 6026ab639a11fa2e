"""support/formats/llama.py: decoders as Hugging Face and as Meta publish them."""
from __future__ import annotations

import os
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import torch
from torch import nn

from model import Decoder, DecoderConfig
from papers.bounds import nearest
from papers.qk_norm import QKNorm
from papers.rope_scaling import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling
from support.formats.checkpoint import Checkpoint, fill, published_tensors, tie
from support.formats.cogvlm import as_llama, beside_decoder, is_cogvlm, language_names
from support.formats.files import UserError, at_the_door, read_json, reading_config, write_json, write_tensors
from support.formats.honoured import (DECODER, IDEFICS, LLAVA_AUTHORS, MLLAMA_TEXT, PARAMS, PLAIN_ROPE, ROPE,
                                      refuse_unknown)
from support.formats.names import Names, Rotary, WB, expand, parameters

# ---- 1. Names of tensors, ours → theirs ------------------------------------------------------------------

DECODER_NAMES = {       # Hugging Face's LlamaModel, below "model."; the output projection stands beside it
    "embed.weight": "embed_tokens.weight",
    "norm.weight": "norm.weight",
    "layers.{i}.norm1.weight": "layers.{i}.input_layernorm.weight",
    "layers.{i}.norm2.weight": "layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.attention.qk_norm.q": "layers.{i}.self_attn.q_norm.weight",         # Qwen3
    "layers.{i}.attention.qk_norm.k": "layers.{i}.self_attn.k_norm.weight",
    **parameters({"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
                 "layers.{i}.attention.", "layers.{i}.self_attn."),
    **parameters({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
                 "layers.{i}.mlp.", "layers.{i}.mlp."),
}


def decoder_names(config: DecoderConfig, trunk: str = "model.", head: str = "", ours: str = "") -> Names:
    """Hugging Face's names of a decoder below `trunk`, with its output projection at head + "lm_head"."""
    names = expand(DECODER_NAMES, config.layers, trunk, ours)
    return {**names, ours + "lm_head.weight": head + "lm_head.weight"}


def tie_head(config: DecoderConfig, names: Names, file: Checkpoint, ours: str = "") -> tuple[str, ...]:
    """What may be left over where embeddings and output projection are one matrix (`tie`)."""
    return tie(file, names, ours + "embed.weight", ours + "lm_head.weight") if config.tied else ()


def meta_names(config: DecoderConfig, prefix: str = "") -> Names:
    """Meta's names of a decoder (github.com/meta-llama/llama); q and k are ordered for another RoPE."""
    attention = {f"layers.{{i}}.attention.{ours}.{w}": theirs for w in WB for ours, theirs in (
        ("q", Rotary(f"layers.{{i}}.attention.wq.{w}", config.heads)),
        ("k", Rotary(f"layers.{{i}}.attention.wk.{w}", config.kv_heads)),
        ("v", f"layers.{{i}}.attention.wv.{w}"),
        ("o", f"layers.{{i}}.attention.wo.{w}"))}
    return expand({
        "embed.weight": "tok_embeddings.weight",
        "norm.weight": "norm.weight",
        "lm_head.weight": "output.weight",
        "layers.{i}.norm1.weight": "layers.{i}.attention_norm.weight",
        "layers.{i}.norm2.weight": "layers.{i}.ffn_norm.weight",
        **attention,
        **parameters({"gate": "w1", "down": "w2", "up": "w3"}, "layers.{i}.mlp.", "layers.{i}.feed_forward."),
    }, config.layers, prefix)


# ---- 2. Configs ------------------------------------------------------------------------------------------

# model_types whose config.json has Llama's fields
LLAMAS = ("llama", "qwen2", "qwen3", "mistral", "llava", "llava_llama", "llava_mistral", "llava_qwen",
          "idefics", "mllama_text_model")

ROPES = {"default": None, "linear": LinearScaling, "dynamic": DynamicScaling, "yarn": YarnScaling,
         "llama3": Llama3Scaling}                       # by rope_type

LLAMA_DEFAULTS = dict(  # transformers' LlamaConfig, for a config inside another one that is silent (LLaVA)
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    max_position_embeddings=2048, rms_norm_eps=1e-6)
QWEN_DEFAULTS = dict(LLAMA_DEFAULTS, vocab_size=151936, intermediate_size=22016, num_key_value_heads=32,
                     max_position_embeddings=32768)
DEFAULTS = {            # and of the other families
    "mistral": dict(LLAMA_DEFAULTS, intermediate_size=14336, num_key_value_heads=8,
                    max_position_embeddings=131072),
    "qwen2": QWEN_DEFAULTS, "qwen3": QWEN_DEFAULTS}


def decoder_config(c: dict, where: str = "config.json") -> DecoderConfig:
    """A Llama config.json, as published (rope_scaling) or as transformers 5 writes it (rope_parameters).

    Also Qwen2's, whose q, k and v have biases, Qwen3's, whose queries and keys are normed, and Mistral's.
    What would make it another function (another family, activation, RoPE scaling) is a UserError.
    """
    refuse_other_functions(c, where)
    kind = family(c)
    ropes = c.get("rope_parameters") or c.get("rope_scaling") or {}
    context, scaling = c.get("max_position_embeddings", 2048), rope_scaling(c, where)
    if scaling and scaling.rope_type in ("linear", "dynamic"):      # there stands that of pretraining
        context = int(context * scaling.factor)
    elif scaling and scaling.rope_type == "yarn":
        context = max(context, int(scaling.original_max_position_embeddings * scaling.factor))
    with reading_config(where, "a Llama config.json"):
        return DecoderConfig(
            vocab_size=c["vocab_size"],
            width=c["hidden_size"],
            layers=c["num_hidden_layers"],
            heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            head_width=c.get("head_dim") or (
                128 if kind == "qwen3" else c["hidden_size"] // c["num_attention_heads"]),
            hidden=c["intermediate_size"],
            rope_theta=ropes.get("rope_theta") or c.get("rope_theta") or 10000.0,
            rope_scaling=scaling,
            norm_eps=c["rms_norm_eps"],
            tied=c.get("tie_word_embeddings", False),
            attention_bias="qkv" if kind == "qwen2" else c.get("attention_bias", False),
            mlp_bias=c.get("mlp_bias", False),
            context=context,
            qk_norm=QKNorm if kind == "qwen3" else nn.Identity,
            window=sliding_window(c, where),
            extra_tokens=c.get("extra_tokens", 0))


def inner_decoder_config(c: dict, outer: dict, where: str) -> DecoderConfig:
    """The text_config c inside a config of a whole model, which leaves out what is its family's default."""
    tied = {"tie_word_embeddings": outer.get("tie_word_embeddings", False)}
    return decoder_config({**tied, **DEFAULTS.get(family(c), LLAMA_DEFAULTS), **c}, where)


def family(c: dict) -> str:
    """Whose decoder it is: llama | mistral | qwen2 | qwen3 and the others of LLAMAS."""
    kind = (c.get("model_type") or "llama").removeprefix("llava_")
    return "qwen2" if kind == "qwen" else kind


def sliding_window(c: dict, where: str) -> int | None:
    """How many tokens a token of a Mistral or Qwen sees, itself included; None: its whole past.

    Published Qwen2 files name a window and do not use it. Qwen3's and Qwen2's use one from layer
    max_window_layers on; layers of two kinds are a UserError.
    """
    kinds = c.get("layer_types") or ()
    if kinds and len(kinds) != c["num_hidden_layers"]:
        raise UserError(f"{where}: layer_types names {len(kinds)} layers, num_hidden_layers is "
                        f"{c['num_hidden_layers']}; correct one of them.")
    others = {*kinds} - {"full_attention"}
    if family(c) != "mistral" and not c.get("use_sliding_window"):
        window = None if family(c).startswith("qwen") else c.get("sliding_window")
        if others or window and window < c.get("max_position_embeddings", 2048):
            asked = f"layers of {', '.join(sorted(others))}" if others else f"a window of {window} tokens"
            raise UserError(f'{where}: a "{family(c)}" with {asked} is not computed here; its layers see '
                            "their whole past.")
        return None
    window, layers = c.get("sliding_window", 4096), c["num_hidden_layers"]
    full = 0 if family(c) == "mistral" else min(c.get("max_window_layers", 28), layers)
    if kinds:
        full = kinds.count("full_attention")
    if window is None or window >= c.get("max_position_embeddings", 2048) or full == layers:
        return None
    if full:
        raise UserError(f"{where}: {full} of the {layers} layers see their whole past and the others "
                        f"{window} tokens of it; here all layers of a decoder are of one kind.")
    return window


def rope_type(c: dict) -> str:
    ropes = c.get("rope_parameters") or c.get("rope_scaling") or {}
    return ropes.get("rope_type", ropes.get("type", "default"))


def rope_scaling(c: dict, where: str):
    """What a config says about longer contexts, as papers/rope_scaling.py computes it; None: nothing."""
    ropes, kind = c.get("rope_parameters") or c.get("rope_scaling") or {}, ROPES[rope_type(c)]
    if kind is None:
        return None
    ropes = {"original_max_position_embeddings": c.get("max_position_embeddings", 2048),
             **{key: value for key, value in ropes.items() if value is not None}}
    if kind is DynamicScaling:                          # transformers reads this number alone
        ropes["original_max_position_embeddings"] = c.get("max_position_embeddings", 2048)
    with reading_config(where, f'a RoPE scaling "{kind.rope_type}"'):
        return kind(**{f.name: ropes[f.name] for f in fields(kind)
                       if f.name in ropes or f.default is MISSING})


def refuse_other_ropes(c: dict, where: str) -> None:
    """A UserError where the RoPE of a config is of an unknown kind, or where it says two things."""
    kind, spellings = rope_type(c), [c.get("rope_parameters") or {}, c.get("rope_scaling") or {}]
    if kind not in ROPES:
        raise UserError(f'{where}: RoPE scaling "{kind}" is not supported; known: {", ".join(ROPES)}.')
    for ropes in spellings:
        numbers = ROPE | {f.name for f in fields(ROPES[kind])} if ROPES[kind] else PLAIN_ROPE
        refuse_unknown(ropes, f"{where}: RoPE", numbers)
    said = [item for ropes in (*spellings, {"theta": c.get("rope_theta")}) for item in ropes.items()]
    values = {(key.removeprefix("rope_"), value if isinstance(value, (int, float)) else str(value))
              for key, value in said if value is not None}
    if len(values) > len({key for key, _ in values}):
        raise UserError(f"{where}: rope_theta, rope_scaling and rope_parameters contradict each other: "
                        f"{sorted(values)}.")


def refuse_other_functions(c: dict, where: str) -> None:
    """A UserError for what a config.json says and our decoder does not compute."""
    kind = c.get("model_type") or "llama"
    if kind not in LLAMAS:
        raise UserError(f'{where}: model_type "{kind}" is no decoder that is known here; '
                        f"{nearest(kind, LLAMAS)}")
    if c.get("hidden_act", "silu") != "silu":
        raise UserError(f'{where}: activation "{c["hidden_act"]}" is not supported in a decoder; '
                        "known: silu.")
    read = {"idefics": IDEFICS, "mllama_text_model": MLLAMA_TEXT}.get(kind, DECODER)
    refuse_unknown(c, where, LLAVA_AUTHORS if kind.startswith("llava") else read)
    refuse_other_ropes(c, where)


def meta_decoder_config(path: Path, checkpoint: Checkpoint) -> DecoderConfig:
    """Meta's params.json, and what it leaves to the tensors: the vocabulary (-1), a tied output."""
    p = read_json(path / "params.json")
    refuse_unknown(p, f"{path}/params.json", PARAMS)
    w_q, embeddings, head = "layers.0.attention.wq.weight", "tok_embeddings.weight", "output.weight"
    with reading_config(f"{path}/params.json", "Meta's params.json"):
        D, H, theta, step = p["dim"], p["n_heads"], p.get("rope_theta", 10000.0), p["multiple_of"]
        parts = max(1, D // checkpoint.shape(w_q)[0])               # W_q (H·E, D) is cut along its rows
        require_parts(path, checkpoint, parts, D)
        V = p["vocab_size"] if p.get("vocab_size", -1) > 0 else checkpoint.shape(head)[0] * parts
        hidden = int(int(8 * D / 3) * (p.get("ffn_dim_multiplier") or 1))       # ⅔ of 4 D: 3 matrices, not 2
        hidden = -(-hidden // step) * step
        # Llama 3.2 1B and 3B are tied, and store the matrix twice
        tied = parts == 1 and checkpoint.shape(head) == checkpoint.shape(embeddings) and (
            torch.equal(checkpoint.get(head), checkpoint.get(embeddings)))
        scaled = p.get("use_scaled_rope")
        # Llama 3.1's scaling; its factor is in no file: 8, 32 in two tied models (llama-models, issue 241)
        scaling = Llama3Scaling(32.0 if tied else 8.0, 1.0, 4.0, 8192) if scaled else None
        return DecoderConfig(
            vocab_size=V, width=D, layers=p["n_layers"], heads=H, kv_heads=p.get("n_kv_heads") or H,
            head_width=D // H, hidden=hidden, rope_theta=theta,
            rope_scaling=scaling, norm_eps=p["norm_eps"], tied=tied,
            context=131072 if scaled else 8192 if theta > 1e4 else 2048)


def require_parts(path: Path, checkpoint: Checkpoint, parts: int, width: int) -> None:
    """All model-parallel files must be there: a UserError names the first that is not."""
    found = {file.stem for file in checkpoint.files}
    for name in (f"consolidated.{i:02d}" for i in range(parts if parts > 1 else 0)):
        if name not in found:
            raise UserError(f'{path}: {name} is missing; "layers.0.attention.wq.weight" has '
                            f"{width // parts} of {width} rows in each file, so there are {parts}.")


def hf_decoder_config(c: DecoderConfig, **extra) -> dict:
    """The config.json of a LlamaForCausalLM, or of the class that has what a Llama has not; `extra` is added.

    These are Qwen2 (biases on q, k and v), Qwen3 (normed queries and keys), Mistral (a sliding window).
    """
    name = "Qwen3" if c.qk_norm is QKNorm else "Qwen2" if c.attention_bias == "qkv" else (
        "Mistral" if c.window else "Llama")
    if c.window:
        extra = {"sliding_window": c.window, **extra}
        if name != "Mistral":
            extra = {"use_sliding_window": True, "max_window_layers": 0, **extra}
    context = c.context
    if c.rope_scaling:
        said = {key: value for key, value in asdict(c.rope_scaling).items() if value is not None}
        extra = {"rope_scaling": {"rope_type": c.rope_scaling.rope_type, **said}, **extra}
        if c.rope_scaling.rope_type in ("linear", "dynamic"):
            context = round(c.context / c.rope_scaling.factor)
    if c.extra_tokens:                                  # transformers has no such Llama; we read it back
        extra = {**extra, "extra_tokens": c.extra_tokens}
    return dict(
        architectures=[f"{name}ForCausalLM"], model_type=name.lower(), hidden_act="silu",
        vocab_size=c.vocab_size,
        hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, head_dim=c.head_width, intermediate_size=c.hidden,
        rope_theta=c.rope_theta, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
        attention_bias=c.attention_bias is True, mlp_bias=c.mlp_bias, max_position_embeddings=context,
        **extra)


# ---- 3. Folders ------------------------------------------------------------------------------------------

def load_decoder(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None) -> Decoder:
    """A Llama folder → Decoder in eval mode; dtype None = float32.

    path: as Hugging Face has it (config.json beside one file or shards) or as Meta has it (params.json beside
    one or several consolidated files); of a CogVLM folder, its language expert. A tensor or a value that does
    not fit is a UserError.
    """
    path = Path(path)
    where = path / "params.json"
    checkpoint = Checkpoint(path) if where.exists() else None
    if checkpoint and not checkpoint.prefix("model.", ""):     # some folders hold both configs
        config = meta_decoder_config(path, checkpoint)
        names = meta_names(config)
        optional = (names["lm_head.weight"],) if config.tied else ()
    else:
        where = path / "config.json"
        refuse_adapter(path)
        c = read_json(where)
        config = decoder_config(as_llama(c, str(where)), str(where))
        names, checkpoint = decoder_names(config), checkpoint or Checkpoint(path)
        if not checkpoint.missing("embed_tokens.weight"):           # saved from the model below its head
            checkpoint.rename(lambda name: name if name.startswith("lm_head.") else f"model.{name}")
        optional = tie_head(config, names, checkpoint)
        if is_cogvlm(c):
            sizes = config.layers, config.heads // config.kv_heads
            names, optional = language_names(*sizes), beside_decoder(*sizes)
    with torch.device("meta"), at_the_door(str(where)):
        decoder = Decoder(config)
    fill(decoder, checkpoint, names, optional, device, dtype or torch.float32)
    return decoder.eval()


def refuse_adapter(folder: Path) -> None:
    """A UserError for an adapter that would change the decoder beside it; AdaptionPrompt is a bridge."""
    file = folder / "adapter_config.json"
    adapter = read_json(file) if file.exists() else {}
    kind, base = adapter.get("peft_type"), adapter.get("base_model_name_or_path")
    if kind not in (None, "ADAPTION_PROMPT"):
        raise UserError(f"{file}: a {kind} adapter of {base}, which is not applied here; merge the two with "
                        "peft (merge_and_unload, save_pretrained) and give that folder.")


def save_decoder(decoder: Decoder, path: str | os.PathLike, **extra) -> None:
    """Write a Hugging Face Llama folder; `extra` goes into config.json (bos_token_id, …)."""
    names = decoder_names(decoder.config)
    write_tensors(Path(path) / "model.safetensors", published_tensors(decoder, names))
    write_json(Path(path) / "config.json", hf_decoder_config(decoder.config, **extra))
