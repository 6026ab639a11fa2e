"""plumbing/packed.py: weights in the order in which a CPU's matrix library reads them."""
from __future__ import annotations

import contextlib
from typing import Callable, Iterator

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from model import Decoder

PACKED = range(10**7, 10**9)            # weights of a decoder: below, packing costs more than it saves; above, two copies might not fit


@contextlib.contextmanager
def packed(decoder: Decoder) -> Iterator[None]:
    """While it lasts, a bfloat16 decoder on a CPU multiplies with copies of its matrices in the order in which oneDNN reads them.

    A step of one token is bound by reading every weight once; as they are stored, oneDNN reorders them in each product, which
    is half of the time. Sums run in another order, nothing else changes. `generate` does it for itself; around several calls it saves
    packing again (about 0.7 s per GB). Nothing happens on a GPU, in float32 (measured: no gain), under autocast, outside `PACKED`, or where it is on.
    """
    linears, weight = [m for m in decoder.modules() if isinstance(m, nn.Linear)], decoder.embed.weight
    attentions = [layer.attention for layer in decoder.layers]
    if (weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
            or torch.is_autocast_enabled("cpu") or sum(m.weight.numel() for m in linears) not in PACKED or "head" in vars(decoder)):
        yield
        return

    def product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)               # for one row at a time
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, ordered, bias, "none", [], "")
    try:
        for m in linears:
            m.forward = product(m.weight, m.bias)
        for a in attentions:
            together = [a.q, a.k, a.v]
            bias = [m.weight.new_zeros(len(m.weight)) if m.bias is None else m.bias for m in together]
            a.qkv = product(torch.cat([m.weight for m in together]), torch.cat(bias) if any(m.bias is not None for m in together) else None)
        decoder.head = product(weight) if decoder.lm_head is None else decoder.lm_head.forward
        yield
    finally:
        for m, name in [*((m, "forward") for m in linears), *((a, "qkv") for a in attentions), (decoder, "head")]:
            vars(m).pop(name, None)
