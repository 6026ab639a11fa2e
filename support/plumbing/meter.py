"""plumbing/meter.py: rates, operations, and the line of progress."""
from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from model import IMAGE, VLM
from support.plumbing.log import append_line

# Dense bfloat16 products, operations a second, as the makers publish them. An unknown card has no
# utilisation.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "L4": 121e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(device: torch.device) -> float:
    """Operations a second that the device's maker promises in bfloat16; 0 where we do not know it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), 0.0)


def count_positions(piece: dict, K: int) -> int:
    """Positions that a piece fills in the decoder, padding included: an image takes K of them."""
    images = int((piece["tokens"] == IMAGE).sum())
    return piece["tokens"].numel() + images * (K - 1)


def count_flops(loss: Callable[[], Tensor], module: VLM) -> float:
    """Floating-point operations of the matrix products in one forward and backward of `loss()`, as they run.

    A frozen ViT counts its forward, or nothing where its features are cached. A frozen decoder counts its
    forward and the gradients of its activations, not of its weights: 4 operations per parameter and position,
    where training it takes 6. Recomputed activations (decoder.checkpoint) count once. The gradients of
    `module` and the run's random state stay as they are.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    checkpoint, module.decoder.checkpoint = module.decoder.checkpoint, False
    with torch.random.fork_rng(), FlopCounterMode(display=False) as counter:
        torch.autograd.grad(loss(), trained, allow_unused=True)
    module.decoder.checkpoint = checkpoint
    return float(counter.get_total_flops())


class Meter:
    """Rates since the last line, and the line itself.

    steps: updates of the run; flops: operations of a step per position of the decoder, 0 where nobody
    counted; K: positions that an image takes.
    """

    def __init__(self, steps: int, flops: float = 0.0, K: int = 1, processes: int = 1):
        self.steps, self.flops, self.K, self.processes = steps, flops, K, processes
        self.tokens = self.learned = self.images = self.positions = self.earlier_positions = 0
        self.line_start = self.run_start = time.monotonic()

    def add(self, pieces: list[dict]) -> None:
        """Count one process's pieces; the others have read as many rows, of about this length."""
        self.tokens += self.processes * sum(p["tokens"].numel() for p in pieces)
        self.learned += self.processes * sum(p["count"] for p in pieces)
        self.images += self.processes * sum(len(p["tokens"]) for p in pieces)
        self.positions += self.processes * sum(count_positions(p, self.K) for p in pieces)

    def forecast(self, steps_left: int, device: torch.device) -> str:
        """After 20 steps: how long the rest takes, and on a GPU how much memory it needs."""
        seconds = (time.monotonic() - self.run_start) / 20
        end = time.strftime("%H:%M", time.localtime(time.time() + steps_left * seconds))
        text = f"forecast {seconds:.2f} s a step: {steps_left * seconds / 60:.1f} more minutes, until {end}"
        if device.type == "cuda":
            text += f", {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB at the peak"
        if tflop := self.flops * (self.earlier_positions + self.positions) / 20 / 1e12:
            text += f"; {tflop:.2g} TFLOP a step, {tflop / seconds:.2g} TFLOP/s"
        return text

    def rates(self, device: torch.device) -> dict[str, float]:
        """Rates since the last call, which start anew."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = max(time.monotonic() - self.line_start, 1e-9)
        rates = {"tokens_per_s": self.tokens / seconds, "learned_per_s": self.learned / seconds,
                 "images_per_s": self.images / seconds}
        if device.type == "cuda":
            rates["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if self.flops:
            rates["tflop_per_s"] = self.flops * self.positions / seconds / 1e12
            if peak := peak_flops(device):      # model FLOPs utilisation: needed ÷ what the cards could do
                rates["mfu"] = 1e12 * rates["tflop_per_s"] / peak / self.processes
        self.earlier_positions += self.positions
        self.tokens = self.learned = self.images = self.positions = 0
        self.line_start = time.monotonic()
        return rates

    def line(self, x: dict, seconds: float) -> str:
        """The line of progress, at most 120 characters, from a line of the log and seconds of training."""
        progress = x["step"] / self.steps
        eta = int(seconds / max(progress, 1e-6) * (1 - progress))
        extra = "".join(f"  {k} {x[k]:.3f}" for k in ("gate", "scale") if k in x)
        device = f"  {x['memory_gb']:.1f} GB" if "memory_gb" in x else ""
        device += f"  mfu {100 * x['mfu']:.0f}%" if "mfu" in x else ""
        return (f"step {x['step']:6d}/{self.steps} {100 * progress:3.0f}%  "
                f"loss {x['loss']:.3f} (ema {x['ema']:.3f})  |g| {x['grad_norm']:.2f}{extra}  "
                f"lr {x['lr']:.1e}  {x['learned_per_s'] / 1e3:.1f}/{x['tokens_per_s'] / 1e3:.1f}k tok/s"
                f"{device}  "
                f"eta {eta // 60}m{eta % 60:02d}s")


class Progress:
    """What a run says between its steps: a bar, printed lines, log.jsonl. Only the first process says it.

    step: where the run starts; seconds: what it has trained before.
    """

    def __init__(self, log: Path, meter: Meter, step: int = 0, seconds: float = 0.0, first: bool = True):
        self.log, self.meter, self.first = log, meter, first
        self.start = time.monotonic() - seconds
        quiet = not (sys.stderr.isatty() and first)
        self.bar = tqdm(total=meter.steps, initial=step, disable=quiet, leave=False)

    @property
    def seconds(self) -> float:
        """Of training, over all starts of the run."""
        return time.monotonic() - self.start

    def write(self, line: dict, text: str) -> None:
        if self.first:
            append_line(self.log, line)
            self.bar.write(text, file=sys.stdout)

    def check(self, step: int, scores: dict[str, float]) -> None:
        """The scores of a short evaluation."""
        text = "  ".join(f"{k} {100 * v:.1f}" for k, v in scores.items())
        self.write({"step": step, **scores}, f"check  {step:6d}  {text}")

    def step(self, step: int, pieces: list[dict], device: torch.device) -> None:
        """`step` updates are done, the last one from `pieces`."""
        self.meter.add(pieces)
        self.bar.update()
        if step == 20 and self.first:
            print(self.meter.forecast(self.meter.steps - step, device))

    def line(self, line: dict, details: dict, device: torch.device) -> None:
        """A line of numbers; `details` go into the log alone."""
        line, seconds = {**line, **self.meter.rates(device)}, self.seconds
        self.write({**line, "seconds": seconds, **details}, self.meter.line(line, seconds))

    def close(self) -> float:
        self.bar.close()
        return self.seconds
