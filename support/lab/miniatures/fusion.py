"""lab/miniatures/fusion.py: what a contrast ahead of the fusion is good for (ALBEF, 2107.07651v2; FLAVA,
2112.04482v3), how many tokens are pooled (CoCa, 2205.01917v2), and how little has to learn (FPT,
2103.05247v2). A run measures itself at its end.
"""
from __future__ import annotations

from support.lab.claims_list import BY_KIND, Arm, Claim, Expectation, Number, Side
from support.lab.miniatures.codes import measure_results

WORDS, PAIRS = Number("words"), Number("pairs")
FOUND, NAMED = Number("image to text R@1"), Number("text to image R@1")
CONTRAST, CAPTION, CHANCE = Number("by contrast"), Number("as caption"), Number("chance")
PROBE = Number("probe")                                 # what a linear map reads off the new ViT


def albef(recipe: str) -> Arm:
    return Arm(("--recipe", recipe, "--steps", "500", "--eval-items", "200"), measures=("aligned",))


def flava(recipe: str, steps: int) -> Arm:
    """The same number of batches of pairs in each."""
    flags = ("--recipe", recipe, "--steps", str(steps), "--batch", "32", "--eval-items", "200")
    return Arm(flags, start="VQ", measures=("aligned",))


def coca(recipe: str, *flags: str, measure: str = "own text of three") -> Arm:
    return Arm(("--recipe", recipe, "--eval-items", "200", *flags), measures=(measure,))


def fpt(*flags: str) -> Arm:
    return Arm((*flags, "--batch", "16"), measures=("answers",))


ARMS = {
    "ALBEF": albef("albef"), "ALBEF, fused at once": albef("albef-fused"),
    "ALBEF, easy negatives": albef("albef-easy"), "ALBEF, no teacher": albef("albef-untaught"),
    "FLAVA": flava("flava-2", 1200), "FLAVA, pairs alone": flava("flava-pairs", 400),
    "FLAVA, contrast alone": flava("flava-contrast", 400), "FLAVA, local contrast": flava("flava-local", 400),
    "CoCa": coca("coca"), "CoCa, 1 query": coca("coca-1"),
    "contrast alone": coca("coca-contrast", "--steps", "1500", measure="new vit"),
    "captions alone": coca("coca-caption", "--steps", "1500", measure="new vit"),
    "FPT": fpt("--recipe", "fpt"), "FPT, random": fpt("--recipe", "fpt-random"),
    "FPT, map alone": fpt("--bridge", "linear"),
}
MEASUREMENTS = {"aligned": measure_results, "own text of three": measure_results, "new vit": measure_results}
MEASURED = {"aligned": {number.name for number in (WORDS, PAIRS, FOUND, NAMED)},
            "own text of three": {CONTRAST.name, CAPTION.name, CHANCE.name},
            "new vit": {CONTRAST.name, CAPTION.name, CHANCE.name, PROBE.name}}
CLAIMS = {
    "albef": Claim(
        says="Fusing at once is hard: a contrast ahead of it, hard negatives and a teacher each help.",
        source="document 3; ALBEF, Table 1, whose values are not in our sources",
        expect=(
            Expectation(Side("ALBEF, easy negatives"), ">", Side("ALBEF, fused at once")),
            Expectation(Side("ALBEF, easy negatives", PAIRS), ">", Side("ALBEF, fused at once", PAIRS)),
            Expectation(Side("ALBEF", PAIRS), ">", Side("ALBEF, easy negatives", PAIRS)),
            Expectation(Side("ALBEF"), ">", Side("ALBEF, no teacher")),
        ),
        columns=(WORDS, PAIRS, FOUND, NAMED),
        note="Only the ViT was trained before, by CLIP's contrast; the text encoder and the projections are "
             "new in every arm. Fused at once, words are guessed worse and pairs judged as well; what is not "
             "learned is to find one by the other. Nearly all pairs are judged right in every arm, so hard "
             "negatives and the teacher have nothing to add there."),
    "flava": Claim(
        says="The contrast over all processes beats that of each; masked and matched pairs help; pictures "
             "and texts alone do not, unless the encoders were trained alone before.",
        source="FLAVA, Table 3: tasks of pairs, and the macro average of the global contrast",
        expect=(
            Expectation(Side("FLAVA, pairs alone"), ">", Side("FLAVA, local contrast"), paper="+1.65"),
            Expectation(Side("FLAVA, pairs alone"), ">", Side("FLAVA, contrast alone"), paper="69.11, 66.25"),
            Expectation(Side("FLAVA, pairs alone"), ">", Side("FLAVA"), paper="69.11, 67.32"),
        ),
        columns=(FOUND, NAMED, WORDS, PAIRS),
        note="By a text, the global contrast of 32 finds pictures better than that of two halves in each "
             "seed (by 15, 3 and 7 points); by a picture, texts in two of three. Masked words teach little: "
             "with another picture as many are guessed (0.62 to 0.66, where its own has 0.64 to 0.67)."),
    "coca": Claim(
        says="Many pooled tokens serve captions better than one, and recognition, too, by less.",
        source="CoCa, its ablation: zero-shot ImageNet, VQA",
        expect=(
            Expectation(Side("CoCa", CAPTION), ">", Side("CoCa, 1 query", CAPTION), paper="69.0, 64.4"),
            Expectation(Side("CoCa", CONTRAST), ">", Side("CoCa, 1 query", CONTRAST), paper="71.6, 69.3"),
        ),
        columns=(CAPTION, CONTRAST)),
    "contrast": Claim(
        says="From as many pictures, a contrast teaches a new encoder more than captions do.",
        source="document 4; CLIP, Fig. 2: zero-shot ImageNet after as many pictures, about 12 times as fast",
        expect=(Expectation(Side("contrast alone"), ">", Side("captions alone")),
                Expectation(Side("contrast alone", CONTRAST), ">", Side("captions alone", CAPTION))),
        columns=(PROBE, CONTRAST, CAPTION, CHANCE),
        note="The opposite, clearly: a caption of this world names colour, shape and place of every thing in "
             "few words, so each of its words teaches; a contrast of 32 pictures only has to tell them "
             "apart. The web's captions say little of a picture in any words; CLIP's batch is 32,768."),
    "fpt": Claim(
        says="A few tuned norms suffice, if the layers between them have learned a language.",
        source="document 3, on Frozen: less than 0.1 % of the parameters, without a number for this",
        expect=(
            Expectation(Side("FPT"), ">", Side("FPT, random")),
            Expectation(Side("FPT"), ">", Side("FPT, map alone")),
        ),
        columns=BY_KIND),
}
