"""support/formats/mapl.py: MAPL's mapper as its authors publish it."""
from __future__ import annotations

from model import DecoderConfig
from papers import make_bridge
from support.formats.checkpoint import BridgeFile, Checkpoint
from support.formats.honoured import refuse_contradiction
from support.formats.names import expand, parameters, split_qkv

MAPL_NAMES = {              # the authors' MappingNetwork (github.com/mair-lab/mapl)
    **split_qkv("blocks.{i}.", "transformer.layers.{i}.self_attn.in_proj_"),
    **parameters({"o": "self_attn.out_proj", "norm1": "norm1", "norm2": "norm2",
                  "up": "linear1", "down": "linear2"}, "blocks.{i}.", "transformer.layers.{i}."),
}


def mapl_file(file: Checkpoint, config: dict, **options) -> BridgeFile:
    """MAPL's mapper; config.json says the number of heads, which no shape tells: 8 in the release."""
    (K, W), (D, _), (_, Di) = (file.shape(name) for name in ("const", "up.weight", "down.weight"))
    layers = file.count("transformer.layers.{}.norm1.weight")
    refuse_contradiction(config, f"{file.path}'s config", input_dim=Di, output_dim=D, hidden_dim=W,
                         num_layers=layers, output_length=K)
    options = {"constants": K, "width": W, "layers": layers, "heads": config.get("num_heads", 8),
               "hidden": file.shape("transformer.layers.0.linear1.weight")[0], **options}
    bridge = make_bridge("mapl", DecoderConfig(width=D), Di, **options)
    return BridgeFile(bridge, expand(MAPL_NAMES, layers))
