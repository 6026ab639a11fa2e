"""formats/mapl.py: MAPL's mapper as its authors publish it."""
from __future__ import annotations

from model import DecoderConfig
from papers import make_bridge
from support.formats.checkpoint import BridgeFile, Checkpoint, WB, expand

MAPL_NAMES = {          # the authors' MappingNetwork
    **{f"blocks.{{i}}.{p}.{w}": f"transformer.layers.{{i}}.self_attn.in_proj_{w}[{n}/3]" for n, p in enumerate("qkv") for w in WB},
    **{f"blocks.{{i}}.{a}.{w}": f"transformer.layers.{{i}}.{b}.{w}" for w in WB for a, b in (
        ("o", "self_attn.out_proj"), ("norm1", "norm1"), ("norm2", "norm2"), ("up", "linear1"), ("down", "linear2"))},
}


def mapl_file(file: Checkpoint, beside: dict, **options) -> BridgeFile:
    """MAPL's mapper; config.json beside it names the heads, 8 in the release, which no shape tells."""
    (K, W), (D, _), (_, Di) = (file.shape(n) for n in ("const", "up.weight", "down.weight"))
    layers = file.count("transformer.layers.{}.norm1.weight")
    options = {"heads": beside.get("num_heads", 8), "hidden": file.shape("transformer.layers.0.linear1.weight")[0], **options}
    return make_bridge("mapl", DecoderConfig(width=D), Di, constants=K, width=W, layers=layers, **options), expand(MAPL_NAMES, layers), ()
