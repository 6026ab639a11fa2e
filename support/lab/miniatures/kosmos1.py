"""lab/miniatures/kosmos1.py: pairs, interleaved pages and text, and what each mixture teaches (KOSMOS-1,
2302.14045v2)."""
from __future__ import annotations

from support.lab.claims_list import SHOTS, Arm, Claim, Expectation, Side
from support.lab.miniatures.magma import TEXT_LOSS


def kosmos1(*sets: str, also: tuple[str, ...] = ()) -> Arm:
    flags = ("--bridge", "kosmos1", "--batch", "30", "--data", " + ".join(sets))
    return Arm(flags, measures=("shots", "text loss", *also))


ARMS = {
    "KOSMOS-1, pairs": kosmos1("shapes"),
    "KOSMOS-1, and pages": kosmos1("shapes", "shapes-pages"),
    "KOSMOS-1, and text": kosmos1("shapes", "shapes-pages", "shapes-told", also=("answers",)),
}
CLAIMS = {"kosmos1": Claim(
    says="Interleaved documents are what makes examples in the prompt help, and text keeps the language.",
    source="KOSMOS-1, a mixture that our sources have no ablation of",
    expect=(
        Expectation(Side("KOSMOS-1, and pages"), ">", Side("KOSMOS-1, pairs")),
        Expectation(Side("KOSMOS-1, and pages"), ">", Side("KOSMOS-1, and pages", SHOTS[0])),
        Expectation(Side("KOSMOS-1, pairs", SHOTS[0]), ">", Side("KOSMOS-1, pairs")),
        Expectation(Side("KOSMOS-1, and pages", TEXT_LOSS), ">", Side("KOSMOS-1, and text", TEXT_LOSS)),
    ),
    columns=(SHOTS[4], SHOTS[0], SHOTS[1], SHOTS[8], TEXT_LOSS),
    note="A question about `shapes` asks for what the model knows without an example, so that the best that "
         "four can do is not to disturb: they cost 35 points after pairs and 4 after pages.",
    own="KOSMOS-1, and text")}
