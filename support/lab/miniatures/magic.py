"""lab/miniatures/magic.py: CLIP steers a decoder that cannot see, more and more (MAGiC, 2205.02655v2)."""
from __future__ import annotations

from support.lab.claims_list import CIDER, Arm, Claim, Expectation, Side
from support.lab.miniatures.pica import LINEAR, MODELS, OBJECTS, PLACES

ARMS = {f"MAGiC, beta {beta}": Arm((*MODELS, "--beta", beta), answerer="magic") for beta in ("0", "0.5", "2")}
CLAIMS = {"magic": Claim(
    says="CLIP's score of each next token lets a decoder that cannot see caption pictures, far below a "
         "trained bridge.",
    source="MAGiC, its COCO table; the paper's numbers beside are those of Socratic Models, Table 1",
    expect=(Expectation(Side("MAGiC, beta 2", OBJECTS), ">", Side("MAGiC, beta 0", OBJECTS)),
            Expectation(Side("MAGiC, beta 0.5", OBJECTS), ">", Side("MAGiC, beta 0", OBJECTS)),
            Expectation(Side("MAGiC, beta 2"), ">", Side("MAGiC, beta 0")),
            Expectation(Side(LINEAR), ">", Side("MAGiC, beta 2"), "ClipCap 152.4, MAGiC 56.2")),
    columns=(CIDER, OBJECTS, PLACES))}
