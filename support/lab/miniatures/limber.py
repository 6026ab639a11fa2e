"""lab/miniatures/limber.py: one linear map over three ViTs, which have met captions, names of shapes, or no
word (LiMBeR, 2209.15162v3)."""
from __future__ import annotations

import re
from typing import TYPE_CHECKING

from data import COLORS, PLACES, SHAPES, SIZES
from eval import evaluate, mean
from support.lab.claims_list import Arm, Claim, Expectation, Number, Side

if TYPE_CHECKING:
    from support.lab.claims import TrainedArm

SHAPE_SAID, COLOR_SAID, SIZE_SAID = Number("shape said"), Number("color said"), Number("size said")
PHRASE = re.compile(rf"an? ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) at the "
                    rf"({'|'.join(PLACES)})")


def measure_said(arm: TrainedArm) -> dict[str, float]:
    """Of the things in a picture: the shares whose size, colour and shape its caption says at their place."""
    result = evaluate(arm.vlm, arm.tokenizer, arm.items)
    said: dict[str, list[bool]] = {"size said": [], "color said": [], "shape said": []}
    for item, caption in zip(arm.items, result["captions"]):
        written = {place: words for *words, place in PHRASE.findall(caption)}
        for *words, place in PHRASE.findall(item.about):
            for found, ours, theirs in zip(said.values(), words, written.get(place, [""] * 3)):
                found.append(ours == theirs)
    return {name: mean(found) for name, found in said.items()}


LIMBER = ("--bridge", "limber", "--captions", "1")
ARMS = {
    "LiMBeR, captions": Arm(LIMBER, measures=("said", "captions")),
    "ViT, names": Arm(("--recipe", "limber-names", "--steps", "1000")),
    "ViT, pixels": Arm(("--recipe", "limber-pixels", "--steps", "1000")),
    "LiMBeR, names": Arm(LIMBER, start="ViT, names", measures=("said",)),
    "LiMBeR, pixels": Arm(LIMBER, start="ViT, pixels", measures=("said",)),
}
MEASUREMENTS = {"said": measure_said}
MEASURED = {"said": {"shape said", "color said", "size said"}}
CLAIMS = {"limber": Claim(
    says="Through a linear map, language in an encoder's training helps with what a thing is, and hardly "
         "with what it looks like.",
    source="LiMBeR, its abstract, without numbers; CLIP, NF-ResNet-50, BEiT",
    expect=(
        Expectation(Side("LiMBeR, captions"), ">", Side("LiMBeR, names")),
        Expectation(Side("LiMBeR, names"), ">", Side("LiMBeR, pixels")),
        Expectation(Side("LiMBeR, pixels", COLOR_SAID), "≥", Side("LiMBeR, captions", COLOR_SAID)),
        Expectation(Side("LiMBeR, pixels", COLOR_SAID), "≥", Side("LiMBeR, names", COLOR_SAID)),
        Expectation(Side("LiMBeR, pixels", SIZE_SAID), "≥", Side("LiMBeR, captions", SIZE_SAID)),
    ),
    columns=(SHAPE_SAID, COLOR_SAID, SIZE_SAID),
    note="Here language is about looks, too: a caption says size and color as it says the shape, so that the "
         "contrast needs all three. A tower that learned names of shapes alone lets go of the color (7 %), "
         "one that learned pixels keeps it better than the shape. The first comparison is not one of equal "
         "data: the bundled tower has seen 2,500 batches of 96, the others 1,000 of 32. Looked at, seed 0: "
         "after 3,000 of 32 each, CLIP says 21 % of the shapes and 21 of the colors, names 22 and 6, pixels "
         "17 and 17. So what captions are ahead in shapes is the number of pictures.")}
