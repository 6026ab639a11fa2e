"""lab/miniatures/fromage.py: one picture among 32 from its caption, and behind another picture; with and
without texts of two pictures in training (FROMAGe, 2301.13823)."""
from __future__ import annotations

from eval import vision_features
from papers.fromage import recall
from support.lab.claims_list import SHOTS, Arm, Claim, Expectation, Number, Side

CAPTION, DIALOGUE = Number("found by caption"), Number("found by dialogue")


def measure_retrieval(arm) -> dict[str, float]:
    """Share of the pictures that are found among 32, 0 … 1: papers/fromage.py says how."""
    features = vision_features(arm.vlm, arm.items, blind=False)
    found = recall(arm.vlm, arm.tokenizer, arm.items, features)
    return {f"found by {name}": share for name, share in found.items()}


MEASUREMENTS = {"retrieval": measure_retrieval}
MEASURED = {"retrieval": {CAPTION.name, DIALOGUE.name}}
FLAGS = ("--bridge", "fromage", "--steps", "200")
ARMS = {
    "FROMAGe": Arm(FLAGS, measures=("retrieval", "shots")),
    "FROMAGe, single": Arm((*FLAGS, "--option", "pairs=0"), measures=("retrieval", "shots")),
}
CLAIMS = {"fromage": Claim(
    says="Texts of two pictures in training are what makes a text with several pictures work.",
    source="FROMAGe; our sources have no numbers",
    expect=(Expectation(Side("FROMAGe", DIALOGUE), ">", Side("FROMAGe, single", DIALOGUE)),
            Expectation(Side("FROMAGe", SHOTS[1]), ">", Side("FROMAGe, single", SHOTS[1])),
            Expectation(Side("FROMAGe", SHOTS[4]), ">", Side("FROMAGe, single", SHOTS[4])),
            Expectation(Side("FROMAGe", CAPTION), "≥", Side("FROMAGe, single", CAPTION))),
    columns=(CAPTION, DIALOGUE, *SHOTS.values()))}
