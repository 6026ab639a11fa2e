"""plumbing/meter.py: rates, operations, and the line of progress."""
from __future__ import annotations

import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model import IMAGE


def count_positions(piece: dict, K: int) -> int:
    """Positions that a piece fills in the decoder, padding included: an image takes K of them."""
    images = int((piece["tokens"] == IMAGE).sum())
    return piece["tokens"].numel() + images * (K - 1)


def count_flops(loss, module: nn.Module) -> float:
    """Floating-point operations of the matrix products in one forward and backward of `loss()`, counted as they are executed.

    So a frozen ViT counts its forward, or nothing where its features are cached; a frozen decoder its forward and the gradients of its
    activations, not of its weights: 4 operations per parameter and position where training it takes 6. The gradients of `module` stay as they are.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    with torch.random.fork_rng(), FlopCounterMode(display=False) as counter:    # dropout's draws stay the run's own
        torch.autograd.grad(loss(), trained, allow_unused=True)
    return float(counter.get_total_flops())


PEAKS = {               # of dense bfloat16 products, operations a second, as the makers publish them; an unknown card has no MFU
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float:
    """Operations a second that this device's maker promises in bfloat16; 0 where we do not know it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for card, peak in PEAKS.items() if card in name), 0.0)


class Meter:
    """Rates since the last line, and the line itself."""

    def __init__(self, steps: int, minutes: float, work: float = 0.0, K: int = 1, processes: int = 1):
        self.steps, self.minutes, self.processes = steps, minutes, processes
        self.work, self.K = work, K                     # operations of a step per position of the decoder (Task.work), positions of an image
        self.tokens = self.learned = self.images = self.positions = self.passed = 0
        self.since = self.begin = time.monotonic()

    def add(self, pieces: list[dict]) -> None:
        """Of one process; the others have read as many rows, of about this length."""
        self.tokens += self.processes * sum(p["tokens"].numel() for p in pieces)
        self.learned += self.processes * sum(p["count"] for p in pieces)
        self.images += self.processes * sum(len(p["tokens"]) for p in pieces)
        self.positions += self.processes * sum(count_positions(p, self.K) for p in pieces)

    def forecast(self, left: int, device: torch.device) -> str:
        """After 20 steps: how long the rest takes, and on a GPU how much memory it needs."""
        seconds = (time.monotonic() - self.begin) / 20
        peak = f", {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB at the peak" if device.type == "cuda" else ""
        end = time.strftime("%H:%M", time.localtime(time.time() + left * seconds))
        work = self.work * (self.passed + self.positions) / 20 / 1e12
        work = f"; {work:.2g} TFLOP a step, {work / seconds:.2g} TFLOP/s" if work else ""
        return f"forecast {seconds:.2f} s a step: {left * seconds / 60:.1f} more minutes, until {end}{peak}{work}"

    def rates(self, device: torch.device) -> dict:
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = max(time.monotonic() - self.since, 1e-9)
        rates = {"tokens_per_s": self.tokens / seconds, "learned_per_s": self.learned / seconds, "images_per_s": self.images / seconds}
        if device.type == "cuda":
            rates["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if self.work:                                   # model FLOPs utilisation: operations that the method needs ÷ what the cards could do
            rates["tflop_per_s"] = self.work * self.positions / seconds / 1e12
            rates |= {"mfu": 1e12 * rates["tflop_per_s"] / peak / self.processes} if (peak := peak_flops(device)) else {}
        self.passed += self.positions
        self.tokens = self.learned = self.images = self.positions = 0
        self.since = time.monotonic()
        return rates

    def line(self, x: dict, progress: float, spent: float) -> str:
        """At most 120 characters: enough to judge the health of a run and to plan the evening."""
        eta = int(spent / max(progress, 1e-6) * (1 - progress))
        step = f"{x['step']:6d}/{self.steps}" if not self.minutes else f"{x['step']:6d}"
        extra = "".join(f"  {k} {x[k]:.3f}" for k in ("gate", "scale") if k in x)
        memory = f"  {x['memory_gb']:.1f} GB" if "memory_gb" in x else ""
        memory += f"  mfu {100 * x['mfu']:.0f}%" if "mfu" in x else ""
        return (f"step {step} {100 * progress:3.0f}%  loss {x['loss']:.3f} (ema {x['ema']:.3f})  |g| {x['grad_norm']:.2f}{extra}  lr {x['lr']:.1e}  "
                f"{x['learned_per_s'] / 1e3:.1f}/{x['tokens_per_s'] / 1e3:.1f}k tok/s{memory}  eta {eta // 60}m{eta % 60:02d}s")
