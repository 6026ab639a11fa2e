"""lab/miniatures/codes.py: pictures as codes. What they lose (VQ-GAN, 2012.09841v3; document 3), and what
keeps a decoder of both kinds of tokens steady (Chameleon, 2405.09818v1). A run measures itself at its end.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from support.formats.files import read_json
from support.lab.claims_list import Arm, Claim, Expectation, Number, Side

if TYPE_CHECKING:
    from support.lab.claims import TrainedArm

SMALL, LARGE, ERROR = Number("small things found"), Number("large things found"), Number("error", "a pixel")
ASKED, WORDS, UNSAID = Number("asked for a picture"), Number("asked for words"), Number("not said")
LOG_Z, SCORE = Number("log Z", "nats"), Number("score", "the largest")


def measure_results(arm: TrainedArm) -> dict:
    """What the run measured of itself at its end."""
    return dict(read_json(arm.run / "results.json"))


def measure_stability(arm: TrainedArm) -> dict[str, float]:
    return dict(measure_results(arm)["stability"])


CODES = ("--recipe", "vq", "--steps", "3000", "--batch", "16", "--eval-items", "400")


def chameleon(recipe: str) -> Arm:
    return Arm(("--recipe", recipe, "--steps", "300", "--batch", "8"), start="VQ", measures=("stability",))


def asked(recipe: str) -> Arm:
    """From scratch; behind a caption a picture or words are asked for, and how likely is a picture?"""
    flags = ("--recipe", recipe, "--batch", "16", "--eval-items", "200")
    return Arm(flags, start="VQ", measures=("modality",))


ARMS = {"VQ": Arm(CODES, measures=("painted",)),
        "Chameleon": chameleon("chameleon-2"), "Chameleon, no QK-norm": chameleon("chameleon-no-qk"),
        "Chameleon, no z-loss": chameleon("chameleon-no-z"),
        "Chameleon, z-loss 0.01": chameleon("chameleon-z"),
        "half pictures": asked("chameleon-even"), "1 picture in 20": asked("chameleon-words")}
MEASUREMENTS = {"painted": measure_results, "modality": measure_results, "stability": measure_stability}
MEASURED = {"painted": {SMALL.name, LARGE.name, ERROR.name}, "stability": {LOG_Z.name, SCORE.name},
            "modality": {ASKED.name, WORDS.name, UNSAID.name}}
CLAIMS = {
    "vq": Claim(
        says="Codes lose what is small.",
        source="document 3, on discrete spaces and on text in Chameleon's pictures, without numbers",
        expect=(Expectation(Side("VQ", LARGE), ">", Side("VQ", SMALL)),),
        columns=(SMALL, LARGE, ERROR)),
    "chameleon": Claim(
        says="Without a norm of queries and keys the scores of attention grow; the z-loss holds log Z.",
        source="Chameleon, §2.3.1: without QK-norm the 7B diverges after a fifth of an epoch",
        expect=(
            Expectation(Side("Chameleon, no QK-norm", SCORE), ">", Side("Chameleon", SCORE)),
            Expectation(Side("Chameleon, no z-loss", LOG_Z), ">", Side("Chameleon", LOG_Z)),
            Expectation(Side("Chameleon, no z-loss", LOG_Z), ">", Side("Chameleon, z-loss 0.01", LOG_Z)),
        ),
        columns=(SCORE, LOG_Z),
        note="After 300 steps of 8. A z-loss of the paper's weight, 1e-5, holds log Z by half a percent."),
    "modality": Claim(
        says="Few pictures among the answers teach a prior against pictures, whatever is asked.",
        source="document 3; Chameleon, §3, on balancing modalities in fine-tuning, without numbers",
        expect=(
            Expectation(Side("half pictures", UNSAID), ">", Side("1 picture in 20", UNSAID)),
            Expectation(Side("half pictures", ASKED), ">", Side("1 picture in 20", ASKED)),
        ),
        columns=(ASKED, WORDS, UNSAID),
        note="Here the decoder is trained from scratch, and a quarter of the requests say nothing. Then it "
             "writes a picture as often as its training had one."),
}
