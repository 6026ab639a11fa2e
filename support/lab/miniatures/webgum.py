"""lab/miniatures/webgum.py: clicks on a toy web with real, white or random screenshots and with none (WebGUM,
2305.11854v4). Document 3 asks whether more parameters explain what a white one brings."""
from __future__ import annotations

from support.lab.claims_list import Arm, Claim, Expectation, Number, Side

CLICKED = Number("clicked right")


def measure_clicks(arm) -> dict[str, float]:
    """Share of new pages (split val) on which the answer is the right place.

    In the split test a goal's colour belongs to one shape alone, which was never the right one in training.
    """
    return {CLICKED.name: arm.own_answers("val")["mean"]}


MEASUREMENTS, MEASURED = {"clicks": measure_clicks}, {"clicks": {CLICKED.name}}


def clicks(kind: str = "") -> Arm:
    """Map and decoder learn, as in the paper; the map has learned from captions. Asked about such pages."""
    flags = ("--recipe", "llava-2", "--data", f"shapes-clicks{kind}")
    return Arm(flags, start="llava-1", measures=("clicks",))


ARMS = {"WebGUM": clicks(), "WebGUM, white": clicks("-white"), "WebGUM, random": clicks("-noise"),
        "WebGUM, text alone": clicks("-text")}
CLAIMS = {"webgum": Claim(
    says="A white screenshot already helps beside none, and the real one more.",
    source="document 3; WebGUM, an ablation without numbers in our sources",
    expect=(Expectation(Side("WebGUM"), ">", Side("WebGUM, white")),
            Expectation(Side("WebGUM"), ">", Side("WebGUM, random")),
            Expectation(Side("WebGUM, white"), ">", Side("WebGUM, text alone")),
            Expectation(Side("WebGUM, random"), ">", Side("WebGUM, text alone"))),
    columns=(CLICKED,),
    note="A guess among the things of a page is right in 36 %. The decoder learns here, so that it knows the "
         "form of an answer without a screenshot, too; what a white one adds are parameters that it does not "
         "need. With a frozen decoder (exercise 8.5 of the course) they are what tells it the form.")}
