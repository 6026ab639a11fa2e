"""Ours against the libraries that people would use instead: same weights, inputs and dtype, in turns.

    pip install transformers peft
    python tests/benchmarks/bench_speed.py                every case at SmolLM2-135M + ViT-B/16 size, bfloat16
    python tests/benchmarks/bench_speed.py train-mlp generate --size tiny --dtype float32 --rounds 9
    python tests/benchmarks/bench_speed.py train-mapl train-flamingo --cached
    python tests/benchmarks/bench_speed.py train-mlp --compile          both sides under torch.compile
    python tests/benchmarks/bench_speed.py --size 1b --device cuda      a GPU; also 7b

Weights are random: transformers builds and saves a model, both sides open the folder, each in a process of
its own, which sets what our commands set and nothing for the library. A case first checks that the two sides
compute the same number; then rounds of A B A B, one works while the other waits. Printed of a case: median
milliseconds of each side; the median of the rounds' ratios (above 1: ours is faster) with their quartiles;
the share of the limit that each side reaches; the peak of memory of each side (on a CPU VmHWM above the bare
imports, on a GPU what PyTorch allocated). A human's table first, one line of JSON last.

Share of the limit: of a generation, the bytes of weights that a token needs × tokens ÷ time ÷ bandwidth of
reading; of anything else, operations of its matrix products ÷ time ÷ peak of a square product. The limit is
measured before each turn (limits.py), because a shared machine has another one from minute to minute.
"alone": what these products take alone, at their own shapes, ÷ time.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import speed_cases                                                              # noqa: E402  (after the path)
from bench_loading import status                                                # noqa: E402
from limits import Products, bandwidth, describe_limits, peak, product_seconds, timed           # noqa: E402
from speed_cases import CASES, DECODING, NEW, NO_MODEL, SIZES                   # noqa: E402
from support.plumbing.device import keep_freed_memory                           # noqa: E402

SIDES = ("ours", "theirs")


def resident(word: str) -> float:
    """MB: VmHWM or VmRSS of this process."""
    return status()[word] / 1e6


def child(a, folder) -> None:
    """One side of one case, in a process of its own: runs when asked, answers in lines of JSON."""
    case, ours = a.cases[0], a.child == "ours"
    if ours:
        keep_freed_memory()                             # as every command of ours does (support/plumbing/cli)
    speed_cases.t.LlamaForCausalLM, speed_cases.t.LlavaForConditionalGeneration     # both import the same
    torch.ones(8, 8, dtype=a.dtype, device=a.device) @ torch.ones(8, 8, dtype=a.dtype, device=a.device)
    before = resident("VmRSS")
    run = CASES[case](a, folder, a.child)
    for line in sys.stdin:
        if line == "value\n":
            print(json.dumps(run()), flush=True)
        if line == "time\n":
            print(json.dumps(timed(a.device, run)), flush=True)
        if line == "end\n":
            cuda = a.device == "cuda"
            mb = torch.cuda.max_memory_allocated() / 1e6 if cuda else resident("VmHWM") - before
            print(json.dumps({"mb": mb, **work(a, case, run)}), flush=True)


def work(a, case: str, run) -> dict[str, float]:
    """What a call does: bytes of weights that it must read, or operations of its matrix products.

    alone: seconds that these products take alone, at their own shapes.
    """
    if case in DECODING:
        return {"bytes": decoder_bytes(a) * NEW}
    if case in NO_MODEL or case == "load" or a.compile:
        return {}
    with Products() as products:
        run()
    return {"flops": products.flops} | ({} if a.no_alone else {"alone": products.seconds_alone(a.device)})


def decoder_bytes(a) -> float:
    """Of the weights that a new token reads: the layers, and the matrix of the logits."""
    L, D, H, G, hidden, V = SIZES[a.size][0]
    layer = D * D * (2 + 2 * G / H) + 3 * D * hidden
    return (L * layer + V * D) * a.dtype.itemsize


class Side:
    """A child that holds one side of a case and waits."""

    def __init__(self, case: str, flags: list[str], side: str):
        argv = [sys.executable, __file__, case, *flags, "--child", side]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str):
        print(what, file=self.process.stdin, flush=True)
        while line := self.process.stdout.readline():
            with contextlib.suppress(json.JSONDecodeError):             # a library may print lines of its own
                return json.loads(line)
        raise SystemExit(f"a side ended while it was asked for its {what}.")

    def end(self) -> dict:
        last = self.ask("end")
        self.process.stdin.close()
        self.process.wait()
        return last


def measure(a, case: str, flags: list[str]) -> dict:
    sides, first = {}, {}
    seconds, speeds = ({side: [] for side in SIDES} for _ in range(2))
    for side in reversed(SIDES):                        # the library's makes the folder that both open
        sides[side], start = Side(case, flags, side), time.monotonic()
        first[side] = sides[side].ask("value")          # warms up, and both must say the same
        if a.compile:
            print(f"{case}, {side}: the first call took {time.monotonic() - start:.0f} s", flush=True)
    off = abs(first["ours"] - first["theirs"]) / max(1e-6, abs(first["theirs"]))
    if off >= (2e-2 if a.dtype != torch.float32 else 2e-4):
        raise SystemExit(f"{case}: ours {first['ours']}, theirs {first['theirs']}")
    limit = reading if case in DECODING else square
    for n in range(a.rounds):
        for side in SIDES[::-1 if n % 2 else 1]:
            speeds[side].append(limit(a))               # what the machine can do at this moment
            seconds[side].append(sides[side].ask("time"))
    ratios = sorted(theirs / ours for ours, theirs in zip(*seconds.values()))
    several = ratios if len(ratios) > 1 else ratios * 2
    low, _, high = statistics.quantiles(several, n=4, method="inclusive")
    row = dict(case=case, ratio=statistics.median(ratios), low=low, high=high)
    for side in SIDES:
        row[side] = {"seconds": statistics.median(seconds[side]), **sides[side].end()}
        done = row[side].get("bytes") or row[side].get("flops")
        if done:
            row[side]["limit"] = statistics.median(done / s / v for s, v in zip(seconds[side], speeds[side]))
        if "alone" in row[side]:
            row[side]["alone"] /= row[side]["seconds"]
    if case in NO_MODEL:
        for side in SIDES:
            row[side].pop("mb")
    print(describe_row(row), flush=True)
    return row


def square(a) -> float:
    """Operations a second of a square product, now."""
    product_seconds.cache_clear()
    return peak(a.dtype, a.device)


def reading(a) -> float:
    """Bytes a second, now."""
    bandwidth.cache_clear()
    return bandwidth(a.device)[0]


def describe_row(row: dict) -> str:
    def cells(key: str, form: str, width: int) -> str:
        found = [row[side].get(key) for side in SIDES]
        return "".join(f"{'' if x is None else format(x, form):>{width}s}" for x in found)
    milliseconds = "".join(f"{1e3 * row[side]['seconds']:10.0f}" for side in SIDES)
    ratio = f"{row['ratio']:7.2f} ({row['low']:.2f} to {row['high']:.2f})"
    return (f"{row['case']:18s}{milliseconds}{ratio:24s}{cells('limit', '.0%', 8)}{cells('alone', '.0%', 8)}"
            f"{cells('mb', '.0f', 9)}")


HEAD = (f"{'':18s}{'ours, ms':>10s}{'theirs':>10s}{'  ratio (quartiles)':24s}{'limit':>8s}{'theirs':>8s}"
        f"{'alone':>8s}{'theirs':>8s}{'peak MB':>9s}{'theirs':>9s}")


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    args.add_argument("--size", choices=SIZES, default="135m")
    args.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args.add_argument("--device", default="cpu")
    args.add_argument("--batch", type=int, default=4)
    args.add_argument("--text", type=int, default=64, help="tokens of a text, the image's apart")
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--cached", action="store_true", help="ours reads the frozen ViT's features from a "
                      "cache, as train.py --cache does after one epoch")
    args.add_argument("--compile", action="store_true", help="training cases under torch.compile, both sides")
    args.add_argument("--no-alone", action="store_true", help="do not time every product alone")
    args.add_argument("--models", help="folder that keeps the random models between calls")
    args.add_argument("--child", help=argparse.SUPPRESS)
    a = args.parse_args()
    if unknown := [c for c in a.cases if c not in CASES]:
        args.error(f"unknown case {unknown[0]}; known: {', '.join(CASES)}")
    flags = [f"--size={a.size}", f"--dtype={a.dtype}", f"--device={a.device}", f"--batch={a.batch}",
             f"--text={a.text}", *(f"--{name}" for name in ("cached", "compile", "no-alone")
                                   if vars(a)[name.replace("-", "_")])]
    a.dtype = getattr(torch, a.dtype)
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(a.models or tmp) / a.size

        def folder(kind: str) -> str:
            if not (root / kind / "config.json").exists():
                speed_cases.build(kind, a.size, root / kind)
            return str(root / kind)
        if a.child:
            return child(a, folder)
        limits = describe_limits([a.dtype], a.device)
        print(f"{a.size}, batch {a.batch}, {a.text} tokens of text, {a.rounds} rounds; "
              f"torch {torch.__version__}, transformers {speed_cases.t.__version__}\n{limits}\n\n{HEAD}")
        cases = a.cases or [c for c in CASES if c != "tokenize" or "SMOLLM2" in speed_cases.os.environ]
        rows = [measure(a, case, [*flags, f"--models={root.parent}"]) for case in cases]
    print("\n" + json.dumps(dict(size=a.size, dtype=str(a.dtype)[6:], limits=limits, rows=rows)))


if __name__ == "__main__":
    main()
