"""How much memory and time it takes to load a decoder folder, above the interpreter with its imports.

    python tests/benchmarks/bench_loading.py FOLDER [--dtype bf16 f16 f32] [--repeats 3]

Each run is a process of its own, watched through Linux' /proc/self/status: VmHWM is the largest total ever
resident, mapped files included; RssAnon, the part of the process alone, is sampled every millisecond. The
size is the bytes of the parameters in the target dtype. A human's table first, one line of JSON last.
"""
from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def status() -> dict[str, int]:
    """Bytes: VmHWM, VmRSS, RssAnon."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        words[0][:-1]: 1024 * int(words[1]) for words in lines if words[0] in ("VmHWM:", "VmRSS:", "RssAnon:")
    }


def child(folder: str, dtype: str) -> None:
    sys.path.insert(0, str(ROOT))
    import torch
    from support.formats.llama import load_decoder
    torch.ones(1).to(torch.bfloat16)                    # the first tensor starts the threads
    before, most, done = status(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            most[0] = max(most[0], status()["RssAnon"])
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start = time.monotonic()
    decoder = load_decoder(folder, dtype=getattr(torch, DTYPES[dtype]))
    seconds = time.monotonic() - start
    done.set()
    thread.join()
    after = status()
    print(
        json.dumps(
            dict(
                size=sum(p.numel() * p.element_size() for p in decoder.parameters()),
                seconds=seconds,
                baseline=before["VmRSS"],
                anonymous=max(most[0], after["RssAnon"]) - before["RssAnon"],
                total=after["VmHWM"] - before["VmRSS"],
                kept=after["VmRSS"] - before["VmRSS"],
            )
        )
    )


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("folder")
    args.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["bf16", "f32"], help="dtypes to load into"
    )
    args.add_argument("--repeats", type=int, default=3, help="processes per dtype: largest peak, median time")
    args.add_argument("--child", help=argparse.SUPPRESS)
    a = args.parse_args()
    if a.child:
        return child(a.folder, a.child)
    rows = {}
    print(
        f"{a.folder} on {platform.machine()}, Python {platform.python_version()}; MB above the bare imports\n"
    )
    print("dtype    size   peak: own pages   with the file's pages   kept   seconds   peak/size")
    for dtype in a.dtype:
        command = [sys.executable, __file__, a.folder, "--child", dtype]
        said = (
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            for _ in range(a.repeats)
        )
        runs = [json.loads(text.splitlines()[-1]) for text in said]
        row = {k: max(r[k] for r in runs) for k in ("size", "baseline", "anonymous", "total", "kept")}
        row["seconds"] = sorted(r["seconds"] for r in runs)[len(runs) // 2]
        row |= {"anonymous_ratio": row["anonymous"] / row["size"], "total_ratio": row["total"] / row["size"]}
        mb = {k: row[k] / 1e6 for k in ("size", "anonymous", "total", "kept")}
        print(f"{dtype:5} {mb['size']:7.1f} {mb['anonymous']:17.1f} {mb['total']:23.1f} {mb['kept']:6.1f} "
              f"{row['seconds']:9.2f} {row['total_ratio']:11.3f}")
        rows[dtype] = row
    print("\n" + json.dumps(dict(folder=a.folder, repeats=a.repeats, **rows)))


if __name__ == "__main__":
    main()
