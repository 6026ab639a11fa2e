"""lab/miniatures/vlkd.py: captions alone, and with one or both losses that teach the decoder CLIP's text
space; questions that it never saw, and its text (VLKD, 2203.06386v2)."""
from __future__ import annotations

from support.lab.claims_list import BY_KIND, CIDER, Arm, Claim, Expectation, Side
from support.lab.miniatures.magma import TEXT_LOSS


def vlkd(*options: str) -> Arm:
    flags = ("--bridge", "vlkd", "--steps", "600", *(("--option", *options) if options else ()))
    return Arm(flags, measures=("answers", "captions", "text loss"))


ARMS = {
    "VLKD, ICTI": vlkd("distance=0", "contrast=0"),
    "VLKD, ICTI, TTDM": vlkd("contrast=0"),
    "VLKD, ICTI, ITCL": vlkd("distance=0"),
    "VLKD": vlkd(),
}
CLAIMS = {"vlkd": Claim(
    says="A decoder that was taught CLIP's text space reads CLIP's pictures better, and answers questions "
         "after captions alone.",
    source="VLKD; our sources have no number of its ablation",
    expect=(Expectation(Side("VLKD"), ">", Side("VLKD, ICTI")),
            Expectation(Side("VLKD, ICTI, TTDM"), ">", Side("VLKD, ICTI")),
            Expectation(Side("VLKD, ICTI, ITCL"), ">", Side("VLKD, ICTI")),
            Expectation(Side("VLKD", CIDER), ">", Side("VLKD, ICTI", CIDER)),
            Expectation(Side("VLKD, ICTI", TEXT_LOSS), ">", Side("VLKD", TEXT_LOSS))),
    columns=(*BY_KIND, CIDER, TEXT_LOSS),
    note="Looked at: each run. All arms read the picture after 600 steps, the recipe's number, and write "
         "captions alike: with captions alone a decoder that learns needs no help to read CLIP's vector. "
         "(K1) and (K2) align the last state, which nothing reads here; in the paper the decoder reads it. "
         "So this miniature lacks the claim's cause. With the contrast alone answers and texts suffer in all "
         "three seeds.")}
