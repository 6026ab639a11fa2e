"""formats/adapter.py: LLaMA-Adapter as its authors and as PEFT store it."""
from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from model import Decoder, DecoderConfig, VLM
from papers import make_bridge
from support.formats.checkpoint import BridgeFile, Checkpoint, WB, expand
from support.formats.files import UserError, write_json, write_tensors
from support.formats.llama import META_NAMES, save_decoder

ADAPTER_NAMES = {       # LLaMA-Adapter V2's visual part; the blocks are timm's
    **{f"{a}.{w}": f"{b}.{w}" for w in WB for a, b in (("vision", "clip_proj"), ("vision_norm", "clip_proj_norm"),
                                                       ("project", "visual_proj"), ("project_norm", "visual_proj_norm"))},
    "queries": "visual_query.weight",
    **{f"blocks.{{i}}.{p}.{w}": f"visual_blocks.{{i}}.attn.qkv.{w}[{n}/3]" for n, p in enumerate("qkv") for w in WB},
    **{f"blocks.{{i}}.{a}.{w}": f"visual_blocks.{{i}}.{b}.{w}" for w in WB for a, b in (
        ("o", "attn.proj"), ("norm1", "norm1"), ("norm2", "norm2"), ("up", "mlp.fc1"), ("down", "mlp.fc2"))},
}


def adapter_file(file: Checkpoint, beside: dict, **options) -> BridgeFile:
    """LLaMA-Adapter as its authors publish it (prompts of all adapted layers in one matrix), with V2's visual part, or as PEFT does.

    V2's file also tunes biases and norms of the decoder: `tune_decoder` gives it those.
    """
    if peft := [n for n in file.where if n.endswith("adaption_gate")]:          # base_model.model.model.layers.30.self_attn.adaption_gate
        start, _, end = peft[0].partition(".layers.")
        held = {int(n.split(".layers.")[1].split(".")[0]) for n in peft}
        L, adapted = beside.get("n_layers") or max(held) + 1, beside.get("adapter_layers") or len(held)
        name = lambda l, what: f"{start}.layers.{l}.self_attn.adaption_{what}"
        shut = f"{name(max(held), 'gate')}[zero]"                               # below the adapted layers a gate does nothing
        names = {"gate": " & ".join([shut] * (L - adapted) + [name(l, "gate") for l in range(L - adapted, L)]),
                 "prompts": " & ".join(name(l, "prompt") for l in range(L - adapted, L))}
        _, Q, D = file.shape(name(max(held), "prompt"))
        options = {**dict(prompts=Q, adapted=adapted, version=0, tanh=False, gate_per="layer"), **options}
        return make_bridge("zero_init", DecoderConfig(width=D, layers=L), D, **options), names, ()
    start = file.prefix("llama.", "")
    L = beside.get("n_layers") or file.count(start + "layers.{}.attention.gate")
    gates = [f"{start}layers.{l}.attention.gate" for l in range(L)]
    rows, D = file.shape("adapter_query.weight")
    H = math.prod(file.shape(gates[0]))
    Q = options.pop("prompts", None) or beside.get("query_len") or beside.get("adapter_len") or 10
    options = {"prompts": Q, "adapted": rows // Q, "gate_per": "layer" if H == 1 else "head", **options}
    names, Di = {}, D
    if "visual_query.weight" in file.where:
        W, Di = file.shape("clip_proj.weight")
        depth = file.count("visual_blocks.{}.norm1.weight")
        options = {"version": 2, "width": W, "depth": depth, "heads": beside.get("v_num_heads", 16),
                   "mlp": file.shape("visual_blocks.0.mlp.fc1.weight")[0] // W, **options}
        names = expand(ADAPTER_NAMES, depth)
    names |= {"gate": " & ".join(gates), "prompts": f"adapter_query.weight[rows/{Q}]"}
    return make_bridge("zero_init", DecoderConfig(width=D, layers=L, heads=H, kv_heads=H), Di, **{"version": 0, **options}), names, ("llama.",)


def tune_decoder(decoder: Decoder, path: str | os.PathLike) -> None:
    """LLaMA-Adapter V2's bias tuning (2304.15010v1, §3.1; the code's y = W x + b on q, o and the feed-forward): the adapter file's
    own biases and norms, llama.*, go into a decoder that was loaded without them."""
    c, file, held = decoder.config, Checkpoint(path), {n for n, _ in decoder.named_parameters()}
    tuned = {ours: theirs for ours, theirs in expand(META_NAMES, c.layers, "llama.", H=c.heads, G=c.kv_heads).items() if not file.missing(theirs)}
    if not tuned:
        raise UserError(f"{file.path}: holds no bias or norm of a decoder (llama.*), so it tunes none.")
    like = decoder.embed.weight
    for ours, theirs in tuned.items():
        owner, _, leaf = ours.rpartition(".")
        value, module = file.get(theirs).to(like.device, like.dtype), decoder.get_submodule(owner)
        width = len(getattr(module, "weight"))
        if value.shape != (width,):
            raise UserError(f'{file.path}: tensor "{theirs}" has shape {tuple(value.shape)}, this decoder expects {(width,)}; is it another size?')
        setattr(module, leaf, nn.Parameter(value, requires_grad=like.requires_grad))
    decoder.config = replace(c, attention_bias="qo", mlp_bias=True) if set(tuned) - held else c


def save_peft(vlm: VLM, path: Path) -> None:
    """A folder that peft opens as AdaptionPrompt over the decoder written beside it; peft knows no image and one gate per layer."""
    bridge = vlm.bridge
    if bridge.sees or bridge.gate.shape[1] > 1:
        raise UserError(f"{path}: peft's AdaptionPrompt has no image and one gate per layer; this zero_init bridge "
                        f"{'sees an image' if bridge.sees else 'has no image'} and has {bridge.gate.shape[1]} gates per layer, so it stays in the native layout (version=0 with gate_per=layer fits).")
    key = "base_model.model.model.layers.{}.self_attn.adaption_{}"
    gates, layers = bridge.gates(), enumerate(range(bridge.first, len(bridge.gate)))        # tanh, where there is one, is applied here
    tensors = {key.format(l, what): t for n, l in layers for what, t in (("gate", gates[n]), ("prompt", bridge.prompts[n:n + 1]))}
    write_tensors(path / "adapter_model.safetensors", tensors)
    write_json(path / "adapter_config.json", {"peft_type": "ADAPTION_PROMPT", "task_type": "CAUSAL_LM", "base_model_name_or_path": "decoder",
               "target_modules": "self_attn", "adapter_layers": len(gates), "adapter_len": bridge.prompts.shape[1], "inference_mode": True})
    save_decoder(vlm.decoder, path / "decoder")
