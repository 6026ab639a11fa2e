"""support/formats/chameleon.py: a published Chameleon: a decoder and the encoder of a VQ-GAN."""
from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from papers.chameleon import Chameleon, QKLayerNorm
from papers.vq import VQ
from papers.vq_nets import VQConfig
from support.formats.checkpoint import Checkpoint, fill
from support.formats.files import UserError, read_json
from support.formats.llama import decoder_config, decoder_names
from support.formats.names import WB, Names, expand, parameters

NOT_LLAMAS = ("vq_config", "vocabulary_map", "swin_norm", "image_token_id", "architectures",
              "model_parallel_size")
TRUNK = "model.vqmodel."
BESIDE_VQ = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")


def block_names(ours: str, theirs: str) -> Names:
    parts = {part: part for part in ("norm1", "conv1", "norm2", "conv2")}
    return parameters({**parts, "skip": "nin_shortcut"}, ours, theirs)


def vq_names(c: VQConfig, trunk: str = "") -> Names:
    """taming-transformers' names of a VQ without its painter, below `trunk`."""
    ends = {"first": "conv_in", "norm": "norm_out", "last": "conv_out"}
    names = {**parameters(ends, "encoder.", "encoder."),
             **parameters({"quant": "quant_conv", "post_quant": "post_quant_conv"}),
             **block_names("encoder.middle.0.", "encoder.mid.block_1."),
             **block_names("encoder.middle.2.", "encoder.mid.block_2."),
             **parameters({"norm": "norm", "q": "q", "k": "k", "v": "v", "o": "proj_out"},
                          "encoder.middle.1.", "encoder.mid.attn_1."), "codes": "quantize.embedding.weight"}
    for level in range(len(c.multipliers)):
        names |= parameters({f"encoder.downsample.{level}": f"encoder.down.{level}.downsample.conv"})
        for n in range(c.blocks):
            names |= block_names(f"encoder.levels.{level}.{n}.", f"encoder.down.{level}.block.{n}.")
    return {ours: trunk + name for ours, name in names.items()}


def code_name(code: int) -> str:
    """The word of a code: IMGIMG, its decimal digits as letters A … J, Z."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def load_chameleon(path: str | os.PathLike, device=None) -> tuple[Chameleon, VQ, Tensor]:
    """The decoder, the tokenizer of pictures (it cannot paint), and the id of each code: (K,) int64."""
    c, file = read_json(Path(path) / "config.json"), Checkpoint(path)
    where = f"{path}/config.json"
    if c.get("model_type") != "chameleon":
        raise UserError(f"{where}: model_type is {c.get('model_type')!r}, not chameleon.")
    llama = {key: value for key, value in c.items() if key not in NOT_LLAMAS}
    config = replace(decoder_config({**llama, "model_type": "llama"}, where), qk_norm=QKLayerNorm)
    v = c.object("vq_config")
    if v.get("attn_resolutions") or v.get("attn_type", "vanilla") != "vanilla" or v.get("double_latent"):
        raise UserError(f"{where}: attn_resolutions, attn_type or double_latent of vq_config ask for another "
                        "encoder than Chameleon's; only its defaults are computed.")
    sizes = VQConfig(channels=v.get("base_channels", 128), blocks=v.get("num_res_blocks", 2),
                     multipliers=tuple(v.get("channel_multiplier", (1, 1, 2, 2, 4))),
                     latent=v.get("latent_channels", 256), width=v.get("embed_dim", 256),
                     codes=v.get("num_embeddings", 8192))
    with torch.device("meta"):
        decoder, vq = Chameleon(config, bool(c.get("swin_norm"))), VQ(sizes, paints=False)
    norms = {f"layers.{{i}}.attention.qk_norm.{w}.{p}": f"layers.{{i}}.self_attn.{p}_norm.{w}"
             for p in "qk" for w in WB}
    names = {**decoder_names(config), **expand(norms, config.layers, "model.")}
    fill(decoder, file, names, (TRUNK,), device, torch.float32)
    fill(vq, file, vq_names(sizes, TRUNK), BESIDE_VQ, device, torch.float32)
    words = c.object("vocabulary_map")
    missing = [name for name in map(code_name, range(sizes.codes)) if name not in words]
    if missing:
        raise UserError(f"{where}: vocabulary_map has no id for {missing[0]}, a code of the picture.")
    return decoder.eval(), vq.eval(), torch.tensor([words[code_name(n)] for n in range(sizes.codes)])
