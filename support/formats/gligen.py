"""support/formats/gligen.py: GLIGEN's position net and gated layers, out of its authors' file of the whole
diffusion model."""
from __future__ import annotations

import os

import torch
from torch import nn

from papers.gligen import GatedSelfAttention, PositionNet
from support.formats.checkpoint import Checkpoint, fill
from support.formats.files import UserError, at_the_door
from support.formats.names import Names, parameters

FUSER = {**parameters({"linear": "linear", "norm1": "norm1", "norm2": "norm2", "q": "attn.to_q",
                       "k": "attn.to_k", "v": "attn.to_v", "o": "attn.to_out.0", "up": "ff.net.0.proj",
                       "down": "ff.net.2"}),
         "attention_gate": "alpha_attn", "ff_gate": "alpha_dense"}


def position_names(prefix: str) -> Names:
    return {**{f"maps.{n}.{w}": f"{prefix}linears.{2 * n}.{w}" for n in range(3) for w in ("weight", "bias")},
            "null_phrase": f"{prefix}null_positive_feature", "null_box": f"{prefix}null_position_feature"}


def load_gligen(path: str | os.PathLike, heads: int = 8, device=None, dtype: torch.dtype | None = None
                ) -> tuple[PositionNet, dict[str, GatedSelfAttention]]:
    """(position net, gated layers by the names of their blocks in the file), in eval mode; None = float32.

    heads: of a gated layer, which no shape tells; Stable Diffusion has 8. Strict about these parts; the
    frozen model around them stays in the file.
    """
    file = Checkpoint(path)
    gate, null = "fuser.alpha_attn", "position_net.null_position_feature"
    blocks = [name.removesuffix(gate) for name in file.where if name.endswith(gate)]
    head = next((name for name in file.where if name.endswith(null)), None)
    if not blocks or head is None:
        raise UserError(f"{path}: holds no position_net and no fuser, so it is no GLIGEN of boxes.")
    prefix = head.removesuffix("null_position_feature")
    names = {f"net.{ours}": theirs for ours, theirs in position_names(prefix).items()}
    with torch.device("meta"), at_the_door(str(path)):
        hidden, into = file.shape(f"{prefix}linears.0.weight")
        box, = file.shape(head)
        net = PositionNet(into - box, file.shape(f"{prefix}linears.4.weight")[0], hidden, box // 8)
        layers = [GatedSelfAttention(*file.shape(f"{block}fuser.linear.weight"), heads) for block in blocks]
    for n, block in enumerate(blocks):
        names |= {f"layers.{n}.{ours}": f"{block}fuser.{theirs}" for ours, theirs in FUSER.items()}
    ours = (*(f"{block}fuser." for block in blocks), prefix)
    rest = tuple(name for name in file.where if not name.startswith(ours))
    whole = nn.ModuleDict({"net": net, "layers": nn.ModuleList(layers)})
    fill(whole, file, names, rest, device, dtype or torch.float32)
    return net.eval(), {block: layer.eval() for block, layer in zip(blocks, layers)}
