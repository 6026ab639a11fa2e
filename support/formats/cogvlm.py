"""support/formats/cogvlm.py: CogVLM and CogVLM2 as their authors publish them: one folder whose layers hold a
language expert, which is a LLaMA (`load_decoder`), and a vision expert (`load_bridge`)."""
from __future__ import annotations

from pathlib import Path

from model import DecoderConfig
from papers import make_bridge
from support.formats.checkpoint import BridgeFile, Checkpoint
from support.formats.files import UserError
from support.formats.honoured import COGVLM, refuse_contradiction, refuse_unknown
from support.formats.names import Joined, Names, Part, WB, as_source, expand, parameters

TOWER = ("model.vision.patch_embedding.", "model.vision.transformer.")          # EVA2-CLIP-E
NOT_LLAMAS = ("num_multi_query_heads", "vision_config", "vision_expert_bias", "template_version",
              "architectures")


def is_cogvlm(c: dict) -> bool:
    """The first version's config.json names its class and no model_type."""
    return c.get("model_type") == "cogvlm" or "CogVLMForCausalLM" in (c.get("architectures") or ())


def as_llama(c: dict, where: str) -> dict:
    """What a CogVLM's config.json says of its language expert, in Llama's keys; another config as it is.

    RoPE's base stands in the code alone: 10,000, in CogVLM2 (which has grouped keys) 500,000.
    """
    if not is_cogvlm(c):
        return c
    refuse_unknown(c, where, COGVLM)
    grouped = c.get("num_multi_query_heads")
    llama = {key: value for key, value in c.items() if key not in NOT_LLAMAS}
    return {"rope_theta": 500000.0 if grouped else 10000.0, **llama, "model_type": "llama",
            "num_key_value_heads": grouped or c.get("num_attention_heads")}


def expert_names(kind: str, groups: int) -> Names:
    """One layer's matrices; kind: language | vision; groups: query heads per key/value head.

    The rows of the fused matrix are q, k, v: `groups` blocks, one and one.
    """
    names, fused = {}, f"layers.{{i}}.self_attn.{kind}_expert_query_key_value."
    for w in WB:
        blocks = tuple(Part(fused + w, n, groups + 2) for n in range(groups + 2))
        names[f"attention.q.{w}"] = Joined(blocks[:groups]) if groups > 1 else blocks[0]
        names[f"attention.k.{w}"], names[f"attention.v.{w}"] = blocks[groups:]
    return {**names, **parameters({
        "attention.o": f"layers.{{i}}.self_attn.{kind}_expert_dense",
        **{f"mlp.{p}": f"layers.{{i}}.mlp.{kind}_mlp.{p}_proj" for p in ("gate", "up", "down")}})}


def language_names(layers: int, groups: int) -> Names:
    """A Decoder's parameters in a CogVLM folder."""
    layer = {"norm1.weight": "layers.{i}.input_layernorm.weight",
             "norm2.weight": "layers.{i}.post_attention_layernorm.weight", **expert_names("language", groups)}
    table = {"embed.weight": "embed_tokens.weight", "norm.weight": "norm.weight",
             **{f"layers.{{i}}.{ours}": theirs for ours, theirs in layer.items()}}
    return {**expand(table, layers, "model."), "lm_head.weight": "lm_head.weight"}


def vision_names(layers: int, groups: int) -> Names:
    """A CogVLM bridge's parameters in the same folder."""
    adapter = parameters({"map": "linear_proj.linear_proj", "norm": "linear_proj.norm1", "conv": "conv",
                          "glu.gate": "linear_proj.gate_proj", "glu.up": "linear_proj.dense_h_to_4h",
                          "glu.down": "linear_proj.dense_4h_to_h"}, "", "model.vision.")
    experts = {f"experts.{{i}}.{ours}": theirs for ours, theirs in expert_names("vision", groups).items()}
    ends = {"boi": "model.vision.boi", "eoi": "model.vision.eoi"}
    return {**adapter, **ends, **expand(experts, layers, "model.")}


def published_names(names: Names) -> tuple[str, ...]:
    return tuple(name for entry in names.values() for name in as_source(entry).names)


def beside_decoder(layers: int, groups: int) -> tuple[str, ...]:
    """What else may lie in the folder of a language expert."""
    return (*published_names(vision_names(layers, groups)), *TOWER)


def cogvlm_file(file: Checkpoint, config: dict, **options) -> BridgeFile:
    """The vision experts and the adapter. All sizes but the number of heads, which they do not need, are told
    by the tensors."""
    first = "model.layers.0.self_attn.vision_expert_"
    (D, wide), (rows, _) = (file.shape(f"{first}{name}.weight") for name in ("dense", "query_key_value"))
    F, _ = file.shape("model.layers.0.mlp.vision_mlp.gate_proj.weight")
    _, Di = file.shape("model.vision.linear_proj.linear_proj.weight")
    layers = file.count("model.layers.{}.self_attn.vision_expert_dense.weight")
    narrow = (rows - wide) // 2                                                 # G·E; wide is H·E
    if narrow <= 0 or wide % narrow:
        raise UserError(f'{file.path}: tensor "{first}query_key_value.weight" has {rows} rows, which are no '
                        f"queries of {wide} and keys and values of an equal part of that.")
    bias = not file.missing(f"{first}query_key_value.bias")
    refuse_contradiction(config, f"{file.path}'s config", hidden_size=D, intermediate_size=F,
                         num_hidden_layers=layers, n_layers=layers, decoder_width=D, vision_expert_bias=bias)
    refuse_contradiction(config.get("vision_config") or {}, f"{file.path}'s vision_config", hidden_size=Di)
    conv = "model.vision.conv.weight"
    stride = 1 if file.missing(conv) else file.shape(conv)[-1]
    c = DecoderConfig(width=D, layers=layers, heads=wide // narrow, kv_heads=1, head_width=narrow, hidden=F)
    bridge = make_bridge("cogvlm", c, Di, **{"bias": bias, "stride": stride, **options})
    language = published_names(language_names(layers, c.heads))
    return BridgeFile(bridge, vision_names(layers, c.heads), (*language, *TOWER))


def read_cogvlm(c: dict, path: Path) -> tuple:
    raise UserError(f"{path}: CogVLM's ViT is not computed here; load_decoder reads the language expert of "
                    'this folder, and load_bridge("cogvlm", …) its vision experts.')
