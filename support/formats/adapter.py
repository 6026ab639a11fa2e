"""support/formats/adapter.py: LLaMA-Adapter as its authors and as PEFT store it."""
from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from model import Decoder, DecoderConfig, VLM
from papers import make_bridge
from support.formats.checkpoint import BridgeFile, Checkpoint
from support.formats.files import UserError, write_json, write_tensors
from support.formats.honoured import refuse_contradiction
from support.formats.llama import meta_names, save_decoder
from support.formats.names import Joined, Names, Rows, ZerosLike, as_source, expand, parameters, split_qkv

VISUAL_NAMES = {            # V2's visual part (github.com/OpenGVLab/LLaMA-Adapter); the blocks are timm's
    "queries": "visual_query.weight",
    **parameters({"vision": "clip_proj", "vision_norm": "clip_proj_norm",
                  "project": "visual_proj", "project_norm": "visual_proj_norm"}),
    **split_qkv("blocks.{i}.", "visual_blocks.{i}.attn.qkv."),
    **parameters({"o": "attn.proj", "norm1": "norm1", "norm2": "norm2", "up": "mlp.fc1", "down": "mlp.fc2"},
                 "blocks.{i}.", "visual_blocks.{i}."),
}
TUNED_BIASES = {f"attention.{p}.bias" for p in "qo"} | {f"mlp.{p}.bias" for p in ("gate", "up", "down")}
PEFT_NAME = "base_model.model.model.layers.{}.self_attn.adaption_{}"       # {}: layer, gate | prompt


def adapter_file(file: Checkpoint, config: dict, **options) -> BridgeFile:
    """A LLaMA-Adapter bridge: the authors' first version, their second with its visual part, or PEFT's."""
    if any(name.endswith("adaption_gate") for name in file.where):
        return peft_file(file, config, **options)
    return original_file(file, config, **options)


def peft_file(file: Checkpoint, config: dict, **options) -> BridgeFile:
    """PEFT's AdaptionPrompt: one gate and one matrix of prompts in each of the topmost layers."""
    gates = [name for name in file.where if name.endswith("adaption_gate")]
    start = gates[0].partition(".layers.")[0]
    numbers = {int(name.split(".layers.")[1].split(".")[0]) for name in gates}

    def named(layer: int, what: str) -> str:
        return f"{start}.layers.{layer}.self_attn.adaption_{what}"

    last = max(numbers)
    L, adapted = config.get("n_layers") or last + 1, config.get("adapter_layers") or len(numbers)
    below, topmost = L - adapted, range(L - adapted, L)
    shut = ZerosLike(named(last, "gate"))               # below the adapted layers a gate does nothing
    names: Names = {"gate": Joined((shut,) * below + tuple(named(l, "gate") for l in topmost)),
                    "prompts": Joined(tuple(named(l, "prompt") for l in topmost))}
    _, Q, D = file.shape(named(last, "prompt"))
    options = {"prompts": Q, "adapted": adapted, "version": 0, "tanh": False, "gate_per": "layer", **options}
    return BridgeFile(make_bridge("zero_init", DecoderConfig(width=D, layers=L), D, **options), names)


def original_file(file: Checkpoint, config: dict, **options) -> BridgeFile:
    """The authors' file: the prompts of all adapted layers in one matrix, a gate per layer, V2's visual part.

    V2's file also tunes biases and norms of the decoder: `tune_decoder` gives it those.
    """
    start = file.prefix("llama.", "")
    L = config.get("n_layers") or file.count(start + "layers.{}.attention.gate")
    gates = tuple(f"{start}layers.{l}.attention.gate" for l in range(L))
    rows, D = file.shape("adapter_query.weight")
    H = math.prod(file.shape(gates[0]))
    Q = options.pop("prompts", None) or config.get("query_len") or config.get("adapter_len") or 10
    sizes = {"version": 0, "prompts": Q, "adapted": rows // Q, "gate_per": "layer" if H == 1 else "head"}
    names: Names = {"gate": Joined(gates), "prompts": Rows("adapter_query.weight", Q)}
    Di = D
    if not file.missing("visual_query.weight"):
        W, Di = file.shape("clip_proj.weight")
        depth = file.count("visual_blocks.{}.norm1.weight")
        sizes |= {"version": 2, "width": W, "depth": depth, "heads": config.get("v_num_heads", 16),
                  "mlp": file.shape("visual_blocks.0.mlp.fc1.weight")[0] // W}
        names |= expand(VISUAL_NAMES, depth)
    decoder = DecoderConfig(width=D, layers=L, heads=H, kv_heads=H)
    bridge = make_bridge("zero_init", decoder, Di, **{**sizes, **options})
    tuned = [name for source in decoder_part(file, decoder).values() for name in as_source(source).names]
    used = {name for source in names.values() for name in as_source(source).names}
    refuse_leftovers(file, [name for name in file.where if name not in used and name not in tuned])
    refuse_contradiction(config, f"{file.path}'s config", dim=D, n_heads=H if H > 1 else None,
                         adapter_layer=rows // Q, query_layer=rows // Q, v_embed_dim=sizes.get("width"),
                         v_depth=sizes.get("depth"), v_mlp_ratio=sizes.get("mlp"))
    return BridgeFile(bridge, names, tuple(tuned))


def decoder_part(file: Checkpoint, config: DecoderConfig) -> Names:
    """Ours → theirs for the biases and norms of a decoder that an adapter file holds below "llama."."""
    names = meta_names(config, "llama.")
    endings = (*TUNED_BIASES, "norm.weight", "norm1.weight", "norm2.weight")
    return {ours: source for ours, source in names.items() if ours.endswith(endings)
            and not any(file.missing(name) for name in as_source(source).names)}


def tune_decoder(decoder: Decoder, path: str | os.PathLike) -> None:
    """LLaMA-Adapter V2's bias tuning (2304.15010v1, §3.1): y = W x + b on q, o and the feed-forward.

    The biases and norms of the adapter file (llama.*) go into a decoder that was loaded without them. Strict:
    a kind of them that a layer lacks, a tensor of another size, or one that has no place (the LoRA of some
    releases) is a UserError, and the decoder stays as it was.
    """
    c, file = decoder.config, Checkpoint(path)
    if c.attention_bias not in (False, "qo"):
        raise UserError(f"{file.path}: tunes a decoder whose q, k and v have no biases of their own.")
    tuned = decoder_part(file, c)
    if not tuned:
        raise UserError(f"{file.path}: holds no bias or norm of a decoder (llama.*), so it tunes none.")
    kinds = {ours.split(".", 2)[-1] for ours in tuned if ours.startswith("layers.")}
    if any(kind.endswith("bias") for kind in kinds):
        kinds |= TUNED_BIASES
    names = meta_names(c, "llama.")
    needed = {f"layers.{l}.{kind}" for l in range(c.layers) for kind in kinds} - set(tuned)
    if needed:
        name = as_source(names[min(needed)]).names[0]
        raise UserError(f'{file.path}: tensor "{name}" is missing; this decoder has {c.layers} layers, and '
                        "what one has tuned all have.")
    used = {name for source in tuned.values() for name in as_source(source).names}
    places = tuple(f"llama.layers.{l}.attention.gate" for l in range(c.layers))         # the bridge's
    refuse_leftovers(file, [n for n in file.where if n.startswith("llama.") and n not in (*used, *places)])
    like, values = decoder.embed.weight, {}
    for ours, theirs in tuned.items():
        source, width = as_source(theirs), len(decoder.get_submodule(ours.rpartition(".")[0]).weight)
        values[ours] = source.build(file).to(like.device, like.dtype)
        if values[ours].shape != (width,):
            raise UserError(f'{file.path}: tensor "{source.names[0]}" has shape {tuple(values[ours].shape)}, '
                            f"this decoder expects {(width,)}; is it another size?")
    for ours, value in values.items():
        owner, _, leaf = ours.rpartition(".")
        setattr(decoder.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=like.requires_grad))
    if TUNED_BIASES <= kinds:
        decoder.config = replace(c, attention_bias="qo", mlp_bias=True)


def refuse_leftovers(file: Checkpoint, names: list[str]) -> None:
    """A UserError for tensors of an adapter file that neither the bridge nor the decoder takes."""
    lora = any("lora" in name for name in names)
    gate = any("new_gate" in name for name in names)
    what = "are LoRA matrices, which are not added here" if lora else (
        "are factors of the gates, which are not applied here" if gate else "have no place here")
    if names:
        raise UserError(f'{file.path}: {len(names)} tensors {what} (first: "{names[0]}"); without them '
                        "this would be another model.")


def save_peft(vlm: VLM, path: Path) -> None:
    """A folder that peft opens as AdaptionPrompt over the decoder written beside it.

    peft knows no image and one gate per layer; another bridge is a UserError.
    """
    bridge = vlm.bridge
    gates_per_layer = bridge.gate.shape[1]
    if bridge.sees or gates_per_layer > 1:
        image = "sees an image" if bridge.sees else "has no image"
        raise UserError(f"{path}: peft's AdaptionPrompt has no image and one gate per layer; this zero_init "
                        f"bridge {image} and has {gates_per_layer} gates per layer, so it stays in the "
                        "native layout (version=0 with gate_per=layer fits).")
    gates = bridge.gates()                              # tanh, where the bridge has one, is applied here
    tensors = {}
    for n, layer in enumerate(bridge.gated_layers):
        tensors[PEFT_NAME.format(layer, "gate")] = gates[n]
        tensors[PEFT_NAME.format(layer, "prompt")] = bridge.prompts[n:n + 1]
    write_tensors(path / "adapter_model.safetensors", tensors)
    write_json(path / "adapter_config.json", {
        "peft_type": "ADAPTION_PROMPT", "task_type": "CAUSAL_LM", "base_model_name_or_path": "decoder",
        "target_modules": "self_attn", "adapter_layers": len(gates), "adapter_len": bridge.prompts.shape[1],
        "inference_mode": True})
    save_decoder(vlm.decoder, path / "decoder")
