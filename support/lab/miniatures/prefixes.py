"""lab/miniatures/prefixes.py: what a prefix language model needs (SimVLM, 2108.10904v3), and what a causal
one gains from spans at the end (CM3, 2201.07520v1). A run measures itself: papers/simvlm.py, papers/cm3.py.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from support.formats.files import read_json
from support.lab.claims_list import Arm, Claim, Expectation, Number, Side

if TYPE_CHECKING:
    from support.lab.claims import TrainedArm

TEXT, CHANCE = Number("as caption"), Number("chance")
BOTH, LEFT, CAPTION = Number("from both sides"), Number("from the left"), Number("from the caption")


def measure_results(arm: TrainedArm) -> dict[str, float]:
    return dict(read_json(arm.run / "results.json"))


def arm(recipe: str, measure: str) -> Arm:
    return Arm(("--recipe", recipe, "--steps", "600", "--eval-items", "200"), measures=(measure,))


ARMS = {"SimVLM": arm("simvlm", "own text"), "SimVLM, causal": arm("simvlm-causal", "own text"),
        "SimVLM, pairs alone": arm("simvlm-pairs", "own text"),
        "SimVLM, linear patches": arm("simvlm-linear", "own text"),
        "CM3": arm("cm3", "codes"), "CM3, no spans": arm("cm3-causal", "codes")}
MEASUREMENTS = {"own text": measure_results, "codes": measure_results}
MEASURED = {"own text": {TEXT.name, CHANCE.name}, "codes": {BOTH.name, LEFT.name, CAPTION.name, CHANCE.name}}
CLAIMS = {
    "simvlm": Claim(
        says="A prefix beats a causal mask, convolutions beat linear patches, and texts help beside pairs.",
        source="SimVLM, its ablations; our sources have no numbers",
        expect=(
            Expectation(Side("SimVLM"), ">", Side("SimVLM", CHANCE)),
            Expectation(Side("SimVLM"), "≥", Side("SimVLM, causal")),
            Expectation(Side("SimVLM"), ">", Side("SimVLM, linear patches")),
            Expectation(Side("SimVLM"), "≥", Side("SimVLM, pairs alone")),
        ),
        columns=(TEXT, CHANCE),
        note="After 300 steps, half of the recipe's, linear patches alone are read. The other arms guess, "
             "and rather wrong: a held-out picture's own text has a pair that no training showed."),
    "cm3": Claim(
        says="A causal decoder fills gaps from both sides, once spans were moved to the end.",
        source="CM3, §3: infilled pictures and entities, no number for this",
        expect=(
            Expectation(Side("CM3"), ">", Side("CM3", LEFT)),
            Expectation(Side("CM3"), ">", Side("CM3, no spans")),
            Expectation(Side("CM3, no spans", LEFT), "≥", Side("CM3", LEFT)),
        ),
        columns=(BOTH, LEFT, CAPTION)),
}
