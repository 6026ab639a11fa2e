"""lab/miniatures/frozen.py: captions alone, through a frozen decoder or one that learns; then questions that
neither was taught to answer about a picture (Frozen, 2106.13884v2)."""
from __future__ import annotations

from support.lab.claims_list import BY_KIND, CIDER, Arm, Claim, Expectation, Side

TUNED = "Frozen, decoder tuned"
FLAGS = ("--recipe", "frozen-tuned", "--vit", "random", "--captions", "1")
ARMS = {TUNED: Arm(FLAGS, measures=("answers", "captions"))}
CLAIMS = {"frozen": Claim(
    says="A language model tuned on captions answers questions about pictures worse than a frozen one.",
    source="document 3; Frozen, whose frozen model has 29.5 on VQAv2 without an example",
    expect=(Expectation(Side("Frozen"), ">", Side(TUNED)),
            Expectation(Side(TUNED, CIDER), ">", Side("Frozen", CIDER))),
    columns=(*BY_KIND, CIDER),
    note="Two seeds were added because three did not decide the first comparison.")}
