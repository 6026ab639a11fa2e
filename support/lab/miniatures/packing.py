"""lab/miniatures/packing.py: documents share rows (Unified-IO 2, 2312.17172v1, §3.4; document 3)."""
from __future__ import annotations

from typing import TYPE_CHECKING

from support.lab.claims_list import Arm, Claim, Expectation, Number, Side
from support.plumbing.log import read_log

if TYPE_CHECKING:
    from support.lab.claims import TrainedArm

SECOND, WORK = Number("learned per second", "tokens"), Number("learned per GFLOP", "tokens")


def measure_throughput(arm: TrainedArm) -> dict[str, float]:
    """Learned tokens per second by the clock, and per 10⁹ operations, which no clock enters."""
    log = [line for line in read_log(arm.run / "log.jsonl") if "learned_per_s" in line][1:]
    learned = sum(line["learned_per_s"] for line in log) / len(log)
    flop = sum(line["tflop_per_s"] for line in log) / len(log)
    return {SECOND.name: learned, WORK.name: learned / flop / 1000}


BOTH = ("--bridge", "linear", "--captions", "0.5", "--steps", "24", "--log-every", "6")
ARMS = {"one per row": Arm(BOTH, measures=("throughput",)),
        "packed": Arm((*BOTH, "--pack", "--longest", "256"), measures=("throughput",))}
MEASUREMENTS = {"throughput": measure_throughput}
MEASURED = {"throughput": {SECOND.name, WORK.name}}
CLAIMS = {"packing": Claim(
    says="Packed documents train several times as fast as padded ones.",
    source="document 3, Unified-IO 2: almost four times; two examples to a row, inputs of many lengths",
    expect=(Expectation(Side("packed"), ">", Side("one per row"), paper="4, 1"),
            Expectation(Side("packed", WORK), ">", Side("one per row", WORK))),
    columns=(SECOND, WORK),
    note="Looked at: the work. Padding is a twentieth of it, for captions and five questions differ little "
         "in length; the paper's inputs are texts, pictures, sounds and films. The clock ran on a shared "
         "machine.")}
