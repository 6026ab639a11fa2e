"""What a second process brings to a training run, and what it costs.

    python tests/benchmarks/bench_processes.py [--rounds 3] [--steps 12] [FLAG OF train.py …]

The same run of train.py (default: recipe llava-2, bridge and decoder learn) by one process of one thread,
by two under torchrun with copies of the parameters (DDP), and by two with slices (FSDP2), over gloo, in
turns. Pictures a second without the first step, the ratio to one process of the same round (median and
quartiles), and the peak of resident memory of the larger process. Two cores and nothing else on them, or the
ratio says little. A table to read first, one line of JSON last.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from bench_pipeline import quartiles                                            # noqa: E402  (after the path)

TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
KINDS = {"one process": ((), ()),                       # what starts train.py, and flags of it
         "two, copies (DDP)": (TWO, ()), "two, slices (FSDP2)": (TWO, ("--shard",))}
BATCH = 32
RUN = ["--recipe", "llava-2", "--init", "none"]
COMMON = ["--batch", str(BATCH), "--threads", "1", "--log-every", "1", "--eval-items", "1", "--samples", "0"]
# The largest process of all that this one waited for, in MB: asked by a process in between, for each run.
PEAK = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(done.returncode)
"""


def measure(kind: str, steps: int, flags: list[str]) -> tuple[float, float]:
    """(pictures a second without the first step, MB of the larger process)"""
    launcher, own = KINDS[kind]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, *launcher, "train.py", *(flags or RUN), *COMMON, *own,
                   "--steps", str(steps), "--out", out]
        done = subprocess.run([sys.executable, "-c", PEAK, *command], cwd=ROOT, check=True,
                              stdout=subprocess.PIPE, text=True)
        lines = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
        seconds = [line["seconds"] for line in lines if line.get("step") and "seconds" in line]
    return BATCH * (len(seconds) - 1) / (seconds[-1] - seconds[0]), float(done.stdout)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--rounds", type=int, default=3, choices=range(2, 100), metavar="N")
    args.add_argument("--steps", type=int, default=12)
    a, flags = args.parse_known_args()
    rounds = [{kind: measure(kind, a.steps, flags) for kind in KINDS} for _ in range(a.rounds)]
    print(f"{' '.join(flags or RUN)}: {a.rounds} rounds of {a.steps} steps of {BATCH} pictures\n")
    print(f"{'':22s}{'pictures/s':>12s}{'to one process':>26s}{'MB of the larger':>18s}")
    for kind in KINDS:
        rate, peak = (statistics.median(r[kind][n] for r in rounds) for n in (0, 1))
        ratios = quartiles([r[kind][0] / r["one process"][0] for r in rounds])
        print(f"{kind:22s}{rate:12.1f}{ratios:>26s}{peak:18.0f}")
    print("\n" + json.dumps(rounds))


if __name__ == "__main__":
    main()
