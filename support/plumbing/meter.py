"""plumbing/meter.py: rates, operations, the line of progress, and what a run says at its end."""
from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from model import IMAGE, VLM
from support.formats.files import UserError
from support.plumbing.log import Board, append_line

# Dense bfloat16 products, operations a second, as the makers publish them, by the whole name of a card: an
# H100 NVL, a part of an A100 (MIG) and a laptop's RTX 4090 do less. An unknown card has no utilisation.
PEAK_FLOPS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "L40S": 362e12, "L4": 121e12,
              "A100-SXM4-40GB": 312e12, "A100-SXM4-80GB": 312e12, "A100-PCIE-40GB": 312e12,
              "A100 80GB PCIe": 312e12, "GeForce RTX 4090": 165e12, "GeForce RTX 3090": 71e12}


def peak_flops(device: torch.device) -> float:
    """Operations a second that the device's maker promises in bfloat16; 0 where we do not know it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return PEAK_FLOPS.get(name.removeprefix("NVIDIA "), 0.0)


def count_images(piece: dict) -> int:
    """Pictures of a piece, one for each row of its features or pixels; where it has neither, its rows."""
    pictures = piece.get("features", piece.get("pixels"))
    return len(piece["tokens"] if pictures is None else pictures)


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


def show_rest(seconds: float) -> str:
    """How long something will still take, and until when: "2m41s, 14:32"."""
    now, end = (time.localtime(time.time() + wait) for wait in (0, seconds))
    minutes, seconds = divmod(round(seconds), 60)
    text = f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"
    return f"{text}, {time.strftime('%H:%M' if now.tm_yday == end.tm_yday else '%a %H:%M', end)}"


SILENCE = 10.0                          # seconds without a line, at most, where no bar is shown
LATER = 60.0                            # … and after ten minutes


def silence(elapsed: float) -> float:
    return SILENCE if elapsed < 600 else LATER


def shows_bars() -> bool:
    return sys.stderr.isatty()


def track(work: Sequence, what: str) -> Iterator:
    """The elements of `work`, and how far it has come: a bar in a terminal, else a line every ten seconds.

    Work that is done within a second shows nothing, and a notebook shows nothing.
    """
    start = last = time.monotonic()
    if shows_bars():
        yield from tqdm(work, desc=what, leave=False, delay=1)
        return
    for n, element in enumerate(work):
        now = time.monotonic()
        if now - last >= silence(now - start) and "ipykernel" not in sys.modules:
            rest = f"eta {show_rest((now - start) / n * (len(work) - n))}"
            print(f"{what}  {n}/{len(work)} {100 * n / len(work):3.0f}%  {rest}", file=sys.stderr, flush=True)
            last = now
        yield element


class Meter:
    """Rates since the last line, and the line itself.

    steps: updates of the run; flops: operations of a step per position of the decoder, 0 where nobody
    counted; K: positions that an image takes.
    """

    def __init__(self, steps: int, flops: float = 0.0, K: int = 1, processes: int = 1):
        self.steps, self.flops, self.K, self.processes = steps, flops, K, processes
        self.tokens = self.learned = self.images = self.positions = self.earlier_positions = 0
        self.line_start = time.monotonic()
        self.first: tuple[int, float] | None = None     # a step of this start, and when it was done
        self.now = 0, 0.0

    def add(self, pieces: list[dict]) -> None:
        """Count one process's pieces; the others have read as many rows, of about this length."""
        self.tokens += self.processes * sum(p["tokens"].numel() for p in pieces)
        self.learned += self.processes * sum(p["count"] for p in pieces)
        self.images += self.processes * sum(map(count_images, pieces))
        self.positions += self.processes * sum(count_positions(p, self.K) for p in pieces)

    def done(self, step: int) -> None:
        """`step` updates are done. The first one of a start warms up caches and kernels: it is no measure."""
        self.now = step, time.monotonic()
        if self.first is None:
            self.first = self.now

    @property
    def seconds_per_step(self) -> float:
        """The mean since the first step of this start; 0 until there is one more."""
        if self.first is None or self.now[0] == self.first[0]:
            return 0.0
        return (self.now[1] - self.first[1]) / (self.now[0] - self.first[0])

    def eta(self) -> str:
        """How long the other steps will take, and until when; a dash before that can be known."""
        rest = self.seconds_per_step * (self.steps - self.now[0])
        return f"eta {show_rest(rest)}" if self.seconds_per_step else "eta -"

    def forecast(self, device: torch.device) -> str:
        """After 20 steps: how long the rest takes, and on a GPU how much memory it needs."""
        seconds = self.seconds_per_step
        text = f"forecast {seconds:.2f} s a step: {show_rest((self.steps - 20) * seconds)}, then the report"
        if device.type == "cuda":
            text += f", {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB at the peak"
        if tflop := self.flops * (self.earlier_positions + self.positions) / 20 / 1e12:
            text += f"; {tflop:.2g} TFLOP a step, {tflop / seconds:.2g} TFLOP/s"
        return text

    def rates(self, device: torch.device) -> dict[str, float]:
        """Rates since the last call, which start anew."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = max(time.monotonic() - self.line_start, 1e-9)
        rates = {"tokens_per_s": self.tokens / seconds, "learned_per_s": self.learned / seconds,
                 "images_per_s": self.images / seconds}
        if device.type == "cuda":
            rates["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        if self.flops:
            rates["tflop_per_s"] = self.flops * self.positions / seconds / 1e12
            if peak := peak_flops(device):      # model FLOPs utilisation: needed ÷ what the cards could do
                rates["mfu"] = 1e12 * rates["tflop_per_s"] / peak / self.processes
        self.earlier_positions += self.positions
        self.tokens = self.learned = self.images = self.positions = 0
        self.line_start = time.monotonic()
        return rates

    def line(self, x: dict) -> str:
        """The line of progress, at most 120 characters, from a line of the log."""
        progress = x["step"] / self.steps
        extra = "".join(f"  {k} {x[k]:.3f}" for k in ("gate", "scale") if k in x)
        device = f"  {x['memory_gb']:.1f} GB" if "memory_gb" in x else ""
        device += f"  mfu {100 * x['mfu']:.0f}%" if "mfu" in x else ""
        return (f"step {x['step']:6d}/{self.steps} {100 * progress:3.0f}%  "
                f"loss {x['loss']:.3f} (ema {x['ema']:.3f})  |g| {x['grad_norm']:.2f}{extra}  "
                f"lr {x['lr']:.1e}  {x['learned_per_s'] / 1e3:.1f}/{x['tokens_per_s'] / 1e3:.1f}k tok/s"
                f"{device}  {self.eta()}")


class Progress:
    """What a run says between its steps: a bar, printed lines, log.jsonl. Only the first process says it.

    step: where the run starts; seconds: what it has trained before; board: for TensorBoard, too. Where no bar
    is shown, a short line stands in for it whenever nothing was printed for ten seconds.
    """

    def __init__(self, log: Path, meter: Meter, step: int = 0, seconds: float = 0.0, first: bool = True,
                 board: bool = False):
        self.log, self.meter, self.first = log, meter, first
        self.start = time.monotonic() - seconds
        self.begin, self.begun = step, time.monotonic()
        self.printed = self.begun
        quiet = not (shows_bars() and first)            # delay: the bar waits for the first step's own lines
        self.bar = tqdm(total=meter.steps, initial=step, disable=quiet, leave=False, delay=0.001)
        self.board = Board(log.parent, step) if board and first else None

    @property
    def seconds(self) -> float:
        """Of training, over all starts of the run."""
        return time.monotonic() - self.start

    def write(self, line: dict, text: str) -> None:
        if self.first:
            append_line(self.log, line)
            if self.board is not None:
                self.board.write(line)
            self.say(text)

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stdout)
        self.printed = time.monotonic()

    def check(self, step: int, evaluate: Callable[[], dict[str, float]]) -> None:
        """The scores of a short evaluation; without a split to read, a warning, and training goes on."""
        try:
            scores = evaluate()
        except UserError as e:
            if self.first:
                self.bar.write(f"warning: no check, {e}", file=sys.stderr)
            return
        if not scores:                                  # CLIP on pictures that no probe can ask about
            return
        text = "  ".join(f"{k} {v:.2f}" if k in ("cider", "held_out_loss") else f"{k} {100 * v:.1f}"
                         for k, v in scores.items())
        self.write({"step": step, **scores}, f"check  {step:6d}  {text}")

    def step(self, step: int, pieces: list[dict], device: torch.device, every: int) -> bool:
        """`step` updates are done, the last one from `pieces`; returns whether a line about it is due."""
        self.meter.add(pieces)
        self.meter.done(step)
        self.bar.update()
        if step == self.begin + 20 == 20 and self.first:
            self.say(self.meter.forecast(device))
        now, due = time.monotonic(), step % every == 0 or step == 1
        if self.first and self.bar.disable and not due and now - self.printed >= silence(now - self.begun):
            self.say(f"step {step:6d}/{self.meter.steps} {100 * step / self.meter.steps:3.0f}%  "
                     f"{self.meter.eta()}")
        return due

    def line(self, line: dict, details: dict, device: torch.device) -> None:
        """A line of numbers; `details` go into the log alone."""
        line, seconds = {**line, **self.meter.rates(device)}, self.seconds
        self.write({**line, "seconds": seconds, **details}, self.meter.line(line))

    def close(self) -> float:
        self.bar.close()
        if self.board is not None:
            self.board.close()
        return self.seconds


# ---- The end of a run ------------------------------------------------------------------------------------

def report_saved(out: Path, steps: int, seconds: float) -> None:
    """The run is safe, whatever becomes of its report."""
    print(f"\ntrained  {steps} steps in {seconds / 60:.1f} minutes\nsaved    {out}/; its report follows",
          flush=True)


def report_end(out: Path) -> None:
    """What a run folder holds, and two commands that go on from here."""
    print(f"files    {out}/   ({', '.join(sorted(p.name for p in out.iterdir()))})")
    for head, command in zip(("next", ""), next_commands(out)):
        print(f"{head:8s} {command}")


def next_commands(out: Path) -> list[str]:
    """Commands that use what a run folder holds, the most telling first."""
    run, picture, commands = shlex.quote(str(out)), "", []
    if (out / "first.png").exists():
        picture = f" --image {shlex.quote(str(out / 'first.png'))}"
    if (out / "bridge.safetensors").exists():
        commands += [f"python eval.py chat {run}{picture}"]
        commands += [f"python eval.py look {run}{picture} --out {run}/look"] if picture else []
    if (out / "decoder").is_dir():
        decoder = shlex.quote(str(out / "decoder"))
        commands += [f"python eval.py chat {decoder}", f"python train.py --bridge mlp --lm {decoder}"]
    if (out / "vit").is_dir():
        vit = shlex.quote(str(out / "vit"))
        commands += [f"python train.py --bridge {bridge} --vit {vit}" for bridge in ("mlp", "qformer")]
    return [*commands, f"python train.py --curves {run}", f"python train.py --resume {run}"]
