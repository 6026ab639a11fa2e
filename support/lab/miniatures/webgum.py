"""lab/miniatures/webgum.py: clicks on a toy web with real, white or random screenshots and with none (WebGUM,
2305.11854v4). Document 3 asks whether more parameters explain what a white one brings."""
from __future__ import annotations

from support.lab.claims_list import MEAN, Arm, Claim, Expectation, Side


def clicks(kind: str = "") -> Arm:
    """Bridge and decoder learn, as in the paper; asked about the same kind of pages."""
    return Arm(("--recipe", "llava-2", "--init", "none", "--data", f"shapes-clicks{kind}"),
               measures=("reasons",))


ARMS = {"WebGUM": clicks(), "WebGUM, white": clicks("-white"), "WebGUM, random": clicks("-noise"),
        "WebGUM, text alone": clicks("-text")}
CLAIMS = {"webgum": Claim(
    says="A white screenshot already helps beside none, and the real one more.",
    source="document 3; WebGUM, an ablation without numbers in our sources",
    expect=(Expectation(Side("WebGUM"), ">", Side("WebGUM, white")),
            Expectation(Side("WebGUM"), ">", Side("WebGUM, random")),
            Expectation(Side("WebGUM, white"), ">", Side("WebGUM, text alone")),
            Expectation(Side("WebGUM, random"), ">", Side("WebGUM, text alone"))),
    columns=(MEAN,))}
