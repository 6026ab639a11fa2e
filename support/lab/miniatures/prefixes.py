"""lab/miniatures/prefixes.py: what a prefix language model needs (SimVLM, 2108.10904v3), and what a causal
one gains from spans at the end (CM3, 2201.07520v1). A run measures itself: papers/simvlm.py, papers/cm3.py.
"""
from __future__ import annotations

from support.lab.claims_list import Arm, Claim, Expectation, Number, Side
from support.lab.miniatures.codes import measure_results

TEXT, CHANCE = Number("as caption"), Number("chance")
BOTH, LEFT, CAPTION = Number("from both sides"), Number("from the left"), Number("from the caption")
LEFT_LOSS = Number("loss from the left", "nats")


def arm(recipe: str, measure: str, steps: str) -> Arm:
    return Arm(("--recipe", recipe, "--steps", steps, "--eval-items", "200"), measures=(measure,))


ARMS = {"SimVLM": arm("simvlm", "own text", "600"), "SimVLM, causal": arm("simvlm-causal", "own text", "600"),
        "SimVLM, pairs alone": arm("simvlm-pairs", "own text", "600"),
        "SimVLM, linear patches": arm("simvlm-linear", "own text", "600"),
        "CM3": arm("cm3", "codes named", "3000"), "CM3, no spans": arm("cm3-causal", "codes named", "3000")}
MEASUREMENTS = {"own text": measure_results, "codes named": measure_results}
MEASURED = {"own text": {TEXT.name, CHANCE.name},
            "codes named": {BOTH.name, LEFT.name, CAPTION.name, CHANCE.name, LEFT_LOSS.name}}
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
        note="A scene's cells are patches of 16 pixels, so convolutions across them find nothing that a "
             "linear map does not; seeds differ widely (63 to 79 %, and 69 to 81). The pairs' captions teach "
             "their language by themselves, so a text beside eight pairs is a distraction."),
    "cm3": Claim(
        says="A causal decoder fills gaps from both sides, once spans were moved to the end.",
        source="CM3, §3: infilled pictures and entities, no number for this",
        expect=(
            Expectation(Side("CM3"), ">", Side("CM3", LEFT)),
            Expectation(Side("CM3"), ">", Side("CM3, no spans")),
            Expectation(Side("CM3", LEFT_LOSS), "≥", Side("CM3, no spans", LEFT_LOSS)),
        ),
        columns=(BOTH, LEFT, CAPTION, LEFT_LOSS),
        note="Looked at: each seed. From both sides 16, 84 and 40 % of the codes are right, from the left 1 "
             "to 2, without spans 0 to 3: the direction is the paper's in all three, and 3,000 steps end in "
             "the middle of learning it, so the spread is too wide for the rule."),
}
