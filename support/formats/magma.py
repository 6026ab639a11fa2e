"""support/formats/magma.py: MAGMA's prefix and adapters as the authors' checkpoint holds them."""
from __future__ import annotations

from model import DecoderConfig
from papers import make_bridge
from support.formats.checkpoint import BridgeFile, Checkpoint
from support.formats.files import UserError
from support.formats.honoured import refuse_contradiction
from support.formats.names import Names, expand, parameters

DECODER_LAYERS = ("lm.transformer.h.", "transformer.h.", "lm.model.layers.", "model.layers.")   # GPT-J, LLaMA
LEFT = ("lm.", "transformer.", "model.", "lm_head.", "image_prefix.enc.")       # the decoder and the encoder


def adapter_layout(file: Checkpoint, layer: str, module: str) -> tuple[str, str]:
    """(form, start of the names) of the adapters around a module; ("none", "") where it has none.

    What was wrapped has moved down: "mlp.0" or "attn_block" where the adapter is normal, "module" where it is
    parallel. Of attention's adapters alone the names do not tell these two apart; then they are normal, as in
    the published versions.
    """
    start = f"{layer}{module}."
    names = [name[len(start):] for name in file.where if name.startswith(start)]
    if any(name.startswith("1.adapter.") for name in names):
        return "normal", f"{module}.1."
    if not any(name.startswith("adapter.") for name in names):
        return "none", ""
    if "adapter_scale" in names:
        return "scaled_parallel", f"{module}."
    parallel = module == "mlp" or any(name.startswith("module.") for name in names)
    return "parallel" if parallel else "normal", f"{module}."


def adapter_names(form: str, start: str, norm: bool) -> Names:
    """Of the adapter of one layer: a Sequential of (LayerNorm), Linear, ReLU, Linear."""
    numbers = dict(norm="0", down="1", up="3") if norm else dict(down="0", up="2")
    names = parameters({ours: f"adapter.{n}" for ours, n in numbers.items()}, "", start)
    return names | ({"scale": f"{start}adapter_scale"} if form == "scaled_parallel" else {})


def magma_file(file: Checkpoint, config: dict, **options) -> BridgeFile:
    """MAGMA's prefix and adapters; sizes and forms from names and shapes, or form=… from `options`."""
    layers = file.prefix(*DECODER_LAYERS)
    attention = "self_attn" if layers.endswith("model.layers.") else "attn"
    found = {"mlp": adapter_layout(file, f"{layers}0.", "mlp"),
             "attention": adapter_layout(file, f"{layers}0.", attention)}
    (D,), (out, Di) = file.shape("image_prefix.ln.weight"), file.shape("image_prefix.proj.weight")
    names: Names = parameters({"map": "image_prefix.proj", "norm": "image_prefix.ln"})
    sizes = {"mlp": "none", "attention": "none", "tokens": out // D}
    L = 1 + max((int(n[len(layers):].split(".")[0]) for n in file.where
                 if n.startswith(layers) and ".adapter" in n), default=0)
    for part, (form, start) in found.items():
        if form != "none":
            norm = file.missing(f"{layers}0.{start}adapter.2.weight")
            table = adapter_names(options.get(part, form), start, norm)
            rows = file.shape(f"{layers}0.{table['down.weight']}")[0]
            sizes |= {part: form, "factor": D // rows, "adapter_norm": norm}
            names |= expand(table, L, layers + "{i}.", f"adapters.{part}.{{i}}.")
    if not L or sizes["mlp"] == sizes["attention"] == "none":
        raise UserError(f"{file.path}: holds no adapters, so this is no MAGMA checkpoint; its prefix alone "
                        "is LiMBeR's map and a LayerNorm.")
    refuse_contradiction(config, f"{file.path}'s config", n_layers=L)
    bridge = make_bridge("magma", DecoderConfig(width=D, layers=L), Di, **{**sizes, **options})
    left = tuple(n for n in file.where if n.startswith(LEFT) and ".adapter" not in n)
    return BridgeFile(bridge, names, left)
