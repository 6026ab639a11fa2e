"""What caching the frozen ViT's features is worth: seconds of a training step with and without, in turns.

    python tests/benchmarks/bench_cache.py                  mapl and linear on `shapes`
    python tests/benchmarks/bench_cache.py SMOLLM2_FOLDER   and with SmolLM2-135M behind the larger ViT

All in one process. Towers: the bundled ones, and a ViT of ViT-B/16's size with random weights.
"""
from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import train                                                                    # noqa: E402  (after the path)
from model import ViT, ViTConfig                                                # noqa: E402
from support.formats.vision import save_vit                                     # noqa: E402
from support.plumbing.device import pick_dtype                                  # noqa: E402
from support.plumbing.ranks import Ranks                                        # noqa: E402


def make_task(argv: list[str]) -> tuple[train.AnswerTask, train.Settings]:
    """What `python train.py` with these flags trains; they name a bridge."""
    s = train.with_recipe(train.settings_from(argv)[0], argv[argv.index("--bridge") + 1])
    sets = [(train.open_data(s.data, s.seed), 1.0)]
    return train.load_task(s, train.RECIPES[s.recipe], Ranks("cpu"), sets, torch.float32), s


def seconds_of_a_step(argv: list[str], steps: int, epoch: int) -> float:
    """Median seconds of a step after the first pass over the `epoch` steps' worth of examples."""
    task, s = make_task(argv)
    trained = [(n, p) for n, p in task.module.named_parameters() if p.requires_grad]
    optimizers, times = train.make_optimizers(task.module, trained, s, train.RECIPES[s.recipe].toy), []
    dtype, _ = pick_dtype("auto", torch.device("cpu"))
    for step in range(epoch + steps):
        start = time.monotonic()
        for piece in task.to_device(task.batch(step)):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                (task.loss(**piece) / piece["count"]).backward()
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        times.append(time.monotonic() - start)
    return statistics.median(times[epoch:])


def compare(name: str, argv: list[str], steps: int, epoch: int, rounds: int) -> dict:
    """Rounds of A (without) B (with the cache); the ratio of each round, their median and range."""
    ratios, seconds = [], {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for kind, extra in (("without", []), ("with", ["--cache", folder])):
                with contextlib.redirect_stdout(io.StringIO()):
                    seconds[kind].append(seconds_of_a_step([*argv, *extra], steps, epoch))
            ratios.append(seconds["without"][-1] / seconds["with"][-1])
    row = {"case": name, "without_s": statistics.median(seconds["without"]),
           "with_s": statistics.median(seconds["with"]), "ratio": statistics.median(ratios),
           "lowest": min(ratios), "highest": max(ratios)}
    print(f"{name:55s} {1e3 * row['without_s']:8.0f} ms {1e3 * row['with_s']:8.0f} ms   {row['ratio']:.2f}x "
          f"({row['lowest']:.2f} to {row['highest']:.2f})")
    return row


def main(lm: str | None) -> None:
    print(f"{'':55s} {'without':>11s} {'with':>11s}   speed-up of a step")
    rows = []
    for bridge in ("mapl", "linear"):
        argv = ["--bridge", bridge, "--examples", "256", "--threads", "1"]
        rows.append(compare(f"{bridge} on shapes, batch 64", argv, 12, 4, 3))
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_vit(ViT(ViTConfig(224, 16, 768, 12, 12, 3072)), folder)            # ViT-B/16
        large = ["--vit", folder, "--captions", "1", "--option", "reads=-2"]
        for bridge in ("mapl", "linear"):
            argv = ["--bridge", bridge, *large, "--examples", "16", "--batch", "16"]
            rows.append(compare(f"{bridge} (toy), bundled decoder + ViT-B/16, batch 16", argv, 4, 1, 3))
        for bridge in ("mapl", "linear") if lm else ():
            argv = ["--bridge", bridge, *large, "--scale", "paper", "--warmup", "0", "--lm", lm,
                    "--examples", "8", "--batch", "8"]
            rows.append(compare(f"{bridge} (published size), SmolLM2-135M + ViT-B/16, batch 8", argv, 2, 1,
                                2))
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
