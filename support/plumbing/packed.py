"""plumbing/packed.py: weights in the order in which a CPU's matrix library reads them."""
from __future__ import annotations

import contextlib
from typing import Callable, Iterator

import torch
from torch import Tensor, nn

from model import Decoder

# Weights of a decoder: below, packing costs more than it saves; above, two copies might not fit into memory.
PACKED = range(10**7, 10**9)


@contextlib.contextmanager
def packed(decoder: Decoder) -> Iterator[None]:
    """While it lasts, a bfloat16 decoder on a CPU multiplies with copies of its matrices in oneDNN's order.

    A step of one token is bound by reading every weight once. oneDNN reorders stored weights in each product,
    which takes half of the time; a packed copy is in order. Sums run in another order, nothing else changes.

    This is fast and ugly. It overwrites `forward` of every linear layer, `qkv` of every attention and `head`
    of the decoder in the objects' own `__dict__`, and it calls private operators of PyTorch. Leaving deletes
    the overwrites. So no model code enters it. A caller who asks for speed does, around many calls at once,
    because packing costs about 0.7 s per GB. Nothing happens on a GPU, in float32 (measured: no gain), under
    autocast, outside `PACKED`, or where it is on.
    """
    if not can_be_packed(decoder):
        yield
        return
    linears = [m for m in decoder.modules() if isinstance(m, nn.Linear)]
    attentions = [layer.attention for layer in decoder.layers]
    try:
        for m in linears:
            m.forward = packed_product(m.weight, m.bias)
        for a in attentions:
            together = [a.q, a.k, a.v]
            weight, bias = torch.cat([m.weight for m in together]), None
            if any(m.bias is not None for m in together):
                zeros = [m.weight.new_zeros(len(m.weight)) for m in together]
                bias = torch.cat([z if m.bias is None else m.bias for m, z in zip(together, zeros)])
            a.qkv = packed_product(weight, bias)
        tied = decoder.lm_head is None
        decoder.head = packed_product(decoder.embed.weight) if tied else decoder.lm_head.forward
        yield
    finally:
        for m in linears:
            vars(m).pop("forward", None)
        for a in attentions:
            vars(a).pop("qkv", None)
        vars(decoder).pop("head", None)


def can_be_packed(decoder: Decoder) -> bool:
    weight = decoder.embed.weight
    size = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, nn.Linear))
    return (weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and size in PACKED
            and torch.ops.mkldnn._is_mkldnn_bf16_supported() and not torch.is_autocast_enabled("cpu")
            and "head" not in vars(decoder))


def packed_product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x → x Wᵀ + b with a copy of W (out, in) in the order for a few rows at a time.

    oneDNN is asked for 4 rows: it then lays W out in blocks of 32 outputs. For 1 it chooses 64, which are
    10 to 25 % slower with 1, 5, 8 and 32 rows alike, on a Xeon with AMX.
    """
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 4)

    def product(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, ordered, bias, "none", [], "")
    return product
