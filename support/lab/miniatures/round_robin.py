"""lab/miniatures/round_robin.py: pages and single pictures, learned in every update or in turn (Flamingo,
2204.14198v1, ablation)."""
from __future__ import annotations

from support.lab.claims_list import MEAN, PICTURES_BEFORE, Arm, Claim, Expectation, Side

FLAGS = ("--bridge", "flamingo", "--data", "shapes-pages + shapes * 0.2")
SUM, TURNS = "Flamingo, weighted sum", "Flamingo, round-robin"
ARMS = {SUM: Arm(FLAGS, measures=("answers", "pages")),
        TURNS: Arm(("--recipe", "round-robin", *FLAGS), measures=("answers", "pages"))}
CLAIMS = {"round-robin": Claim(
    says="An update that sees all data sets does better than updates that see one each.",
    source="Flamingo-3B's ablation, overall score",
    expect=(Expectation(Side(SUM, PICTURES_BEFORE[3]), ">", Side(TURNS, PICTURES_BEFORE[3]),
                        paper="68.4, 59.7"),
            Expectation(Side(SUM, MEAN), ">", Side(TURNS, MEAN), paper="68.4, 59.7")),
    columns=(PICTURES_BEFORE[3], PICTURES_BEFORE[0], MEAN),
    own=TURNS)}
