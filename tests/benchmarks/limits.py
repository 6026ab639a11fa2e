"""What this machine can do: matrix products of the shapes that a run executes, and moving memory.

    python tests/benchmarks/limits.py [--dtype bfloat16]        peaks of square products and of copying

`Products` records what a run executes. `peak` times a product alone, so a share of it says how near a run
stands to the same products without anything between them.
"""
from __future__ import annotations

import argparse
import collections
import functools
import platform
import time

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
SQUARE = 2048                                           # side of the product that counts as a machine's peak
MEGABYTES = 256                                         # moved by `bandwidth`


class Products(TorchDispatchMode):
    """While it lasts, counts the matrix products that run, forward and backward: {(name, shapes): number}."""

    def __init__(self):
        super().__init__()
        self.found: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket
        if name in (aten.mm, aten.bmm):
            self.add(*args[:2])
        elif name in (aten.addmm, aten.baddbmm):
            self.add(*args[1:3])
        elif name is aten.convolution and args[0].is_floating_point():      # of patches: one product
            x, w = args[:2]
            rows = out.numel() // w.shape[0]
            self.found[(1, rows, w[0].numel(), w.shape[0], x.dtype)] += 1
        elif name in ATTENTION:
            q, k = args[ATTENTION[name]], args[ATTENTION[name] + 1]
            B = q.shape[0] * q.shape[1]
            T, S, E = q.shape[2], k.shape[2], q.shape[3]
            for product in PARTS[name]:                 # of scores, of values, and their gradients
                m, n, p = (dict(T=T, S=S, E=E)[letter] for letter in product)
                self.found[(B, m, n, p, q.dtype)] += 1
        return out

    def add(self, a: Tensor, b: Tensor) -> None:
        batch = a.shape[0] if a.ndim == 3 else 1
        self.found[(batch, a.shape[-2], a.shape[-1], b.shape[-1], a.dtype)] += 1

    @property
    def flops(self) -> float:
        return sum(2 * B * m * k * n * count for (B, m, k, n, _), count in self.found.items())

    def seconds_alone(self, device: str, repeats: int = 5) -> float:
        """What these products take with nothing between them."""
        return sum(count * product_seconds(*product, device, repeats)
                   for product, count in self.found.items())


ATTENTION = {aten._scaled_dot_product_flash_attention_for_cpu: 0,
             aten._scaled_dot_product_flash_attention_for_cpu_backward: 1,
             aten._scaled_dot_product_flash_attention: 0,
             aten._scaled_dot_product_flash_attention_backward: 1,
             aten._scaled_dot_product_efficient_attention: 0,
             aten._scaled_dot_product_efficient_attention_backward: 1}      # op → where its q stands
FORWARD, BACKWARD = ("TES", "TSE"), ("TES", "TES", "STE", "TSE", "STE")     # m, k, n; scores are made again
PARTS = {op: BACKWARD if place else FORWARD for op, place in ATTENTION.items()}


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(device: str, run) -> float:
    """Seconds of a call."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


@functools.cache
def product_seconds(batch: int, m: int, k: int, n: int, dtype: torch.dtype, device: str,
                    repeats: int = 5) -> float:
    """The fastest of several (batch, m, k) @ (batch, k, n)."""
    a = torch.randn(batch, m, k, device=device).to(dtype)
    b = torch.randn(batch, n, k, device=device).to(dtype).mT            # as a linear layer holds its weight
    a, b = (a[0], b[0]) if batch == 1 else (a, b)
    return min(timed(device, lambda: a @ b) for _ in range(repeats + 1))


def peak(dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations a second of a square product."""
    return 2 * SQUARE**3 / product_seconds(1, SQUARE, SQUARE, SQUARE, dtype, device)


@functools.cache
def bandwidth(device: str = "cpu", repeats: int = 5) -> tuple[float, float]:
    """Bytes a second of reading (a sum), and of copying (read and written)."""
    x = torch.ones(MEGABYTES * 2**20 // 4, device=device)
    y = torch.empty_like(x)
    read, copy = (min(timed(device, move) for _ in range(repeats + 1))
                  for move in (x.sum, lambda: y.copy_(x)))
    return x.nbytes / read, 2 * x.nbytes / copy


def describe_limits(dtypes: list[torch.dtype], device: str = "cpu") -> str:
    peaks = ", ".join(f"{str(d)[6:]} {peak(d, device) / 1e9:,.0f} GFLOP/s" for d in dtypes)
    read, copy = bandwidth(device)
    threads = torch.get_num_threads()
    return (f"limits  {platform.machine()}, {threads} threads: products of {SQUARE} by {SQUARE} {peaks}; "
            f"reading {read / 1e9:.1f} GB/s, copying {copy / 1e9:.1f} GB/s")


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    flags.add_argument("--device", default="cpu")
    given = flags.parse_args()
    print(describe_limits([getattr(torch, d) for d in given.dtype], given.device))
