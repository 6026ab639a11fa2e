"""lab/miniatures/socratic.py: objects come through words, places do not (Socratic Models, 2204.00598v2).

One draft shows what the words of the prompt hold. Among ten, CLIP's last choice may bring places back, where
CLIP reads them.
"""
from __future__ import annotations

from support.lab.claims_list import CIDER, Arm, Claim, Expectation, Side
from support.lab.miniatures.pica import GUESS, LINEAR, MODELS, OBJECTS, PLACES

ARMS = {"Socratic, 10 drafts": Arm(MODELS, answerer="socratic"),
        "Socratic, 1 draft": Arm((*MODELS, "--drafts", "1"), answerer="socratic")}
CLAIMS = {"socratic": Claim(
    says="Models that talk through language caption what CLIP names, and guess where it is; below a trained "
         "bridge.",
    source="Socratic Models, Table 1",
    expect=(Expectation(Side("Socratic, 1 draft", OBJECTS), ">", Side("Socratic, 1 draft", PLACES)),
            Expectation(Side("Socratic, 1 draft", GUESS), "≥", Side("Socratic, 1 draft", PLACES)),
            Expectation(Side("Socratic, 10 drafts"), ">", Side("Socratic, 1 draft")),
            Expectation(Side(LINEAR, PLACES), ">", Side("Socratic, 10 drafts", PLACES)),
            Expectation(Side(LINEAR), ">", Side("Socratic, 10 drafts"), "ClipCap 152.4, Socratic 44.5")),
    columns=(CIDER, OBJECTS, PLACES, GUESS), own="Socratic, 10 drafts")}
