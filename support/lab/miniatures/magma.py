"""lab/miniatures/magma.py: a prefix alone, adapters in the decoder, or the whole decoder tuned (MAGMA,
2112.05253v2), and what each leaves of the decoder's own language."""
from __future__ import annotations

import torch

import data
from support.lab.claims_list import BY_KIND, LOSS, Arm, Claim, Expectation, Number, Side
from support.worlds.text import ShapesText

TEXT_LOSS = Number("text loss", "nats")
MEASURES = ("answers", "loss", "text loss")


@torch.no_grad()
def measure_text_loss(arm, count: int = 128) -> dict[str, float]:
    """Mean −log p of a learned token in texts without a picture, of the kind that made the decoder.

    arm: a TrainedArm. The texts are new ones: scenes in words, questions, answers and captions.
    """
    text = ShapesText(arm.tokenizer, seed=1, bags=0.0)
    documents, total, learned = text.held_out(count), 0.0, 0
    for first in range(0, len(documents), 32):
        tokens, labels, mask = data.collate(documents[first:first + 32])
        loss, n = arm.vlm.loss(tokens, labels, mask=mask)
        total, learned = total + loss.item(), learned + n
    return {"text loss": total / learned}


MEASUREMENTS = {"text loss": measure_text_loss}
MEASURED = {"text loss": (TEXT_LOSS.name,)}
TWICE = ("--steps", "600")              # twice the others'


def arm(*flags: str) -> Arm:
    return Arm((*flags, *TWICE), measures=MEASURES)


ARMS = {
    "MAGMA, prefix alone": arm("--bridge", "magma", "--option", "mlp=none"),
    "MAGMA": arm("--bridge", "magma"),
    "MAGMA, decoder tuned": arm("--recipe", "magma-tuned"),
    "MAGMA, attention": arm("--bridge", "magma", "--option", "mlp=none", "attention=normal"),
    "MAGMA, parallel": arm("--bridge", "magma", "--option", "mlp=parallel"),
    "MAGMA, attention parallel": arm("--bridge", "magma", "--option", "mlp=none", "attention=parallel"),
}
PREFIX = Side("MAGMA, prefix alone")
CLAIMS = {
    "magma": Claim(
        says="Adapters in the decoder add to what a prefix alone learns, and cost some of its language.",
        source="document 1; MAGMA, LiMBeR",
        expect=(
            Expectation(Side("MAGMA"), ">", PREFIX, paper="VQAv2 36.9, LiMBeR 33.33"),
            Expectation(Side("MAGMA, prefix alone", LOSS), ">", Side("MAGMA", LOSS)),
            Expectation(Side("MAGMA", TEXT_LOSS), ">", Side("MAGMA, prefix alone", TEXT_LOSS)),
        ),
        columns=(*BY_KIND, LOSS, TEXT_LOSS),
        note="All runs of this paper have 600 steps."),
    "magma-tuned": Claim(
        says="Tuning the whole decoder costs its language more than adapters do.",
        source="document 1; MAGMA",
        expect=(Expectation(Side("MAGMA, decoder tuned", TEXT_LOSS), ">", Side("MAGMA", TEXT_LOSS)),),
        columns=(*BY_KIND, LOSS, TEXT_LOSS),
        note="The rates are the recipes': 6e-3 for the adapters, 1e-3 for the decoder. Both texts are of one "
             "small world. What is told of a picture uses the language of scenes in words, so that a decoder "
             "tuned on it forgets little; other rates were not tried."),
    "magma-places": Claim(
        says="In either form and at either place, adapters do no worse than the prefix alone.",
        source="MAGMA's published code; the configurations have one form",
        expect=tuple(Expectation(Side(arm), "≥", PREFIX) for arm in (
            "MAGMA", "MAGMA, attention", "MAGMA, parallel", "MAGMA, attention parallel")),
        columns=(*BY_KIND, LOSS, TEXT_LOSS)),
}
