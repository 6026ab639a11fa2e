"""lab/miniatures/streams.py: when words meet a picture, and what teaches them to (VisualBERT, 1908.03557v1,
ablations; ViLBERT, 1908.02265v1; ViLT, 2102.03334v2).

A run measures itself: masked words of held-out captions that are named right beside their picture and beside
another one, and pairs that are judged right.
"""
from __future__ import annotations

from support.lab.claims_list import Arm, Claim, Expectation, Number, Side
from support.lab.miniatures.codes import measure_results

WORDS, OTHER, PAIRS = Number("words"), Number("words, another picture"), Number("pairs")
CELL, NEARER = Number("words on their cell, of 9"), Number("nearer than another's")


def stream(recipe: str, steps: str = "1000", *flags: str, start: str = "") -> Arm:
    return Arm(("--recipe", recipe, "--steps", steps, "--eval-items", "200", *flags), start=start,
               measures=("words and pairs",))


FEW = "--examples", "256"
ARMS = {"VisualBERT": stream("visualbert"), "VisualBERT, late fusion": stream("visualbert-late"),
        "VisualBERT, words alone": stream("visualbert-words"),
        "256 pairs": stream("visualbert", "200", *FEW, start="VisualBERT"),
        "256 pairs, no pre-training": stream("visualbert", "200", *FEW),
        "ViLBERT": stream("vilbert"), "ViLBERT, equal depths": stream("vilbert-equal"),
        "ViLT": stream("vilt", "500"), "ViLT, unaligned": stream("vilt-unaligned", "500")}
MEASUREMENTS = {"words and pairs": measure_results}
MEASURED = {"words and pairs": {number.name for number in (WORDS, OTHER, PAIRS, CELL, NEARER)}}
CLAIMS = {
    "visualbert": Claim(
        says="Early fusion matters most, then pre-training, the second objective little.",
        source="VisualBERT on NLVR² (dev)",
        expect=(
            Expectation(Side("VisualBERT"), ">", Side("VisualBERT, late fusion"), paper="66.7, 61.4"),
            Expectation(Side("VisualBERT"), "≥", Side("VisualBERT, words alone"), paper="66.7, 64.9"),
            Expectation(Side("VisualBERT"), ">", Side("VisualBERT", OTHER)),
            Expectation(Side("256 pairs", PAIRS), ">", Side("256 pairs, no pre-training", PAIRS),
                        paper="66.7, 62.9"),
        ),
        columns=(WORDS, OTHER, PAIRS),
        note="Regions are the patches of a frozen ViT that CLIP trained, one for a cell: a word has to find "
             "its patch, and the upper layers alone can do that."),
    "vilbert": Claim(
        says="The words need layers of their own ahead of the co-attention; regions, read already, do not.",
        source="ViLBERT, its two streams of 6 + 6 and 6 layers; no number for equal depths",
        expect=(
            Expectation(Side("ViLBERT"), ">", Side("ViLBERT, equal depths")),
            Expectation(Side("ViLBERT"), ">", Side("ViLBERT", OTHER)),
            Expectation(Side("ViLBERT", PAIRS), "≥", Side("ViLBERT, equal depths", PAIRS)),
        ),
        columns=(WORDS, OTHER, PAIRS),
        note="With equal depths there is a layer less, and there are fewer parameters: 700,010 against "
             "774,794."),
    "vilt": Claim(
        says="The transport plan aligns words and patches without a label of either.",
        source="ViLT, Fig. 4: heat maps without numbers",
        expect=(
            Expectation(Side("ViLT", CELL), ">", Side("ViLT, unaligned", CELL)),
            Expectation(Side("ViLT", NEARER), ">", Side("ViLT, unaligned", NEARER)),
            Expectation(Side("ViLT"), "≥", Side("ViLT, unaligned")),
            Expectation(Side("ViLT"), ">", Side("ViLT", OTHER)),
        ),
        columns=(WORDS, OTHER, PAIRS, CELL, NEARER),
        note="By chance 11 % are on their cell. The term for the plan asks that words and patches of a pair "
             "are near and those of a swapped pair far; when all of them know which it is, it has what it "
             "asks for, and no word needs its place."),
}
