"""lab/miniatures/dpo.py: false things in captions after preferences (DPO, 2305.18290v3), with three values of
β, and after supervised fine-tuning on the chosen captions, all from one start."""
from __future__ import annotations

from support.formats.files import read_json
from support.lab.claims_list import MEAN, Arm, Claim, Expectation, Number, Side

FALSE, MISSED = Number("false things", "per caption"), Number("missed things", "per caption")
BEFORE, KL = Number("false before", "per caption"), Number("KL", "nats")
TOLD_APART = Number("told apart")


def measure_preferences(arm) -> dict[str, float]:
    """What the run measured of its captions at its end: papers/dpo.py says how."""
    scores = read_json(arm.run / "preferences.json")
    before, after = scores["before"], scores["after"]
    return {FALSE.name: after["false"], MISSED.name: after["missed"], BEFORE.name: before["false"],
            TOLD_APART.name: after["told apart"], KL.name: after["KL"]}


MEASUREMENTS = {"preferences": measure_preferences}
MEASURED = {"preferences": {FALSE.name, MISSED.name, BEFORE.name, TOLD_APART.name, KL.name}}


def prefer(recipe: str) -> Arm:
    flags = ("--recipe", recipe, "--bridge", "mlp", "--steps", "150", "--eval-items", "200")
    return Arm(flags, start="mlp", measures=("preferences", "answers"))


ARMS = {"DPO": prefer("dpo"), "DPO, β 0.03": prefer("dpo-far"), "DPO, β 0.5": prefer("dpo-near"),
        "SFT": prefer("dpo-sft")}
CLAIMS = {"dpo": Claim(
    says="Preferences take false things out of captions; the smaller β, the further the model moves; what it "
         "could do before does not suffer much.",
    source="DPO, Fig. 2; LLaVA-RLHF, whose POPE F1 falls",
    expect=(Expectation(Side("DPO", BEFORE), ">", Side("DPO", FALSE)),
            Expectation(Side("SFT", FALSE), ">", Side("DPO", FALSE), paper=".55, .57: the opposite"),
            Expectation(Side("DPO", TOLD_APART), ">", Side("SFT", TOLD_APART)),
            Expectation(Side("DPO, β 0.03", KL), ">", Side("DPO, β 0.5", KL)),
            Expectation(Side("SFT", MEAN), ">", Side("DPO", MEAN), paper="POPE 82.7, 81.5")),
    columns=(FALSE, MISSED, BEFORE, TOLD_APART, KL, MEAN),
    note="Looked at: what is left out. After preferences captions miss three times as many things as after "
         "the chosen ones alone, and the more the smaller β: true things go with the false ones, of which "
         "there was one in five captions to begin with.")}
