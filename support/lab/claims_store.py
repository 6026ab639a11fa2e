"""lab/claims_store.py: what each finished run of a claim measured, a line of JSON, kept in the repository.

A report of many runs takes days and more than one machine. A run's folder may be gone; what it said stays,
with its curve. It counts for the flags, its own and those of the runs before it, and for the bundled towers,
that it was made with.
"""
from __future__ import annotations

import functools
import json
from pathlib import Path

from support.formats.files import atomically
from support.formats.records import file_digest
from support.formats.towers import WEIGHTS, resolve_folder
from support.lab.claims_list import Number
from support.plumbing.digest import text_digest
from support.plumbing.log import read_log

KEPT = Path(__file__).parents[1] / "results/claims/runs.jsonl"      # wherever the command is called from
Results = dict[tuple[str, int], dict]           # {(arm, seed): what lab/claims.py: run_arm returns}


@functools.cache
def bundled_towers() -> str:
    """The digest of the bundled decoder and ViT: with others, the same flags are another experiment."""
    files = [resolve_folder(f"{WEIGHTS}/{tower}") / "model.safetensors" for tower in ("decoder", "vit")]
    return text_digest([file_digest(str(file)).hex() for file in files])[:16]


class Store:
    """Results by arm and seed: what lab/claims.py's run_arm returns."""

    def __init__(self, file: str | Path):
        self.file = Path(file)
        self.lines = self.read()

    def read(self) -> Results:
        return {(line["arm"], line["seed"]): line for line in read_log(self.file)}

    def find(self, arm: str, seed: int, identity: dict, measures: tuple[str, ...]) -> dict | None:
        """The result of this run, if it is this one (run_identity) and all of it was measured."""
        found = self.lines.get((arm, seed), {})
        return found if is_finished(found, identity, measures) else None

    def keep(self, arm: str, seed: int, result: dict) -> None:
        self.lines = self.read() | {(arm, seed): {"arm": arm, "seed": seed, **result}}   # others write, too
        with atomically(self.file) as tmp:
            text = "".join(json.dumps(self.lines[key]) + "\n" for key in sorted(self.lines))
            tmp.write_text(text, encoding="utf-8")


def is_finished(result: dict, identity: dict, measures: tuple[str, ...] = ()) -> bool:
    """identity: of lab/claims.py, run_identity."""
    return all(result.get(key) == value for key, value in identity.items()) and {*measures} <= {*result}


def loss_lines(log: Path) -> list[dict]:
    """The lines of a run's log that have a training loss."""
    return [line for line in read_log(log) if "ema" in line]


def learning_curve(log: Path) -> list[list[float]]:
    """[[step, running mean of the training loss], …] of a run's log."""
    return [[line["step"], float(f"{line['ema']:.4g}")] for line in loss_lines(log)]


def seed_values(results: Results, seeds: int, arm: str, number: Number) -> list[float]:
    """What the seeds of an arm measured, in the number's unit; nothing where the arm does not measure it."""
    measured = [m for s in range(seeds) for name, m in results[arm, s].items()
                if isinstance(m, dict) and name != "before"]
    return [number.scale * m[number.name] for m in measured if number.name in m]
