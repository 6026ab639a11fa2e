"""lab/miniatures/pica.py: a picture told in words, behind 0 to 8 examples, random or similar, in 1 or 5
prompts, by a bridge's caption or the true one (PICa, 2109.05014v2)."""
from __future__ import annotations

from support.lab.answerers import named_things, write_captions
from support.lab.claims_list import LONG, MEAN, Arm, Claim, Expectation, Number, Side

OBJECTS, PLACES, GUESS = Number("objects"), Number("places"), Number("a guess")
LINEAR, WORDS = "linear, captions too", "language model"
MODELS = ("--lm", f"{{{WORDS}}}")
TOLD = (*MODELS, "--captions-by", f"{{{LINEAR}}}")


def ask(shots: int, similarity: str, ensemble: int = 1, told: tuple[str, ...] = TOLD) -> Arm:
    return Arm((*told, "--shots", str(shots), "--similarity", similarity, "--ensemble", str(ensemble)),
               answerer="pica")


ARMS = {
    LINEAR: Arm(("--bridge", "linear", "--captions", "0.5", *LONG),
                measures=("answers", "captions", "things")),
    WORDS: Arm(("--recipe", "lm-prompts", "--steps", "600")),           # its recipe's
    "PICa, 0": ask(0, "random"),
    "PICa, 1 random": ask(1, "random"),
    "PICa, 1 similar": ask(1, "imagequestion"),
    "PICa, 4 random": ask(4, "random"),
    "PICa, 4 similar": ask(4, "imagequestion"),
    "PICa, 8 similar": ask(8, "imagequestion"),
    "PICa, 1 similar x 5": ask(1, "imagequestion", 5),
    "PICa, 4 similar, true captions": ask(4, "imagequestion", told=(*MODELS, "--captions-by", "truth")),
}
COLUMNS = (MEAN, Number("color"), Number("count"), Number("existence"), Number("position"))
CLAIMS = {
    "pica": Claim(
        says="A few examples teach a language model how to answer about captions; words lose what a trained "
             "bridge keeps.",
        source="PICa, Tables 2 to 4, and document 1, MAPL's table",
        expect=(Expectation(Side("PICa, 4 similar"), ">", Side("PICa, 0"), "VQAv2 46.86, 20.61"),
                Expectation(Side("PICa, 4 similar"), ">", Side("PICa, 4 random")),
                Expectation(Side("PICa, 4 similar, true captions"), ">", Side("PICa, 4 similar")),
                Expectation(Side(LINEAR), ">", Side("PICa, 4 similar"))),
        columns=COLUMNS,
        note="Without an example the language model seldom answers in the expected form: of its counts 1 % "
             "are right, of its places 3. Much of what examples bring is the form, as in the paper."),
    "pica-shots": Claim(
        says="More examples are better, similar ones more than random ones, and several prompts than one.",
        source="PICa, Tables 2 to 4",
        expect=(Expectation(Side("PICa, 8 similar"), "≥", Side("PICa, 4 similar"), "VQAv2 47.80, 46.86"),
                Expectation(Side("PICa, 1 similar"), ">", Side("PICa, 1 random")),
                Expectation(Side("PICa, 1 similar x 5"), "≥", Side("PICa, 1 similar"))),
        columns=COLUMNS,
        note="Eight examples are no better than four: of the documents that taught this form to the language "
             "model, one in twenty has eight (worlds/prompts.py).")}


def measure_things(arm) -> dict[str, float]:
    """What the captions of a trained arm name rightly: `named_things`."""
    return named_things(write_captions(arm.vlm, arm.tokenizer, arm.items), arm.items)


MEASUREMENTS = {"things": measure_things}
MEASURED = {"things": ("objects", "places", "a guess")}
