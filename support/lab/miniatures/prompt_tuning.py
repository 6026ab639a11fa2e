"""lab/miniatures/prompt_tuning.py: vectors at the input or at every layer, many or one, made by a picture
(prompt tuning, 2104.08691v2; prefix tuning, 2101.00190v1)."""
from __future__ import annotations

from support.lab.claims_list import BY_KIND, LOSS, Arm, Claim, Expectation, Side


def arm(bridge: str, prompts: int) -> Arm:
    return Arm(("--bridge", bridge, "--option", f"prompts={prompts}"), measures=("answers", "loss"))


ARMS = {
    "prefix tuning": arm("prefix_tuning", 8),
    "prompt tuning": arm("prompt_tuning", 8),
    "prefix tuning, 1": arm("prefix_tuning", 1),
    "prompt tuning, 1": arm("prompt_tuning", 1),
}
CLAIMS = {"prompt-tuning": Claim(
    says="Vectors at every layer do better than at the input alone, and several better than one.",
    source="prefix tuning §7.1, §7.2; prompt tuning §3.2",
    expect=(
        Expectation(Side("prefix tuning"), ">", Side("prompt tuning"),
                    paper="BLEU on E2E 69.7, 62.2; from memory"),
        Expectation(Side("prefix tuning"), ">", Side("prefix tuning, 1")),
        Expectation(Side("prompt tuning"), ">", Side("prompt tuning, 1"),
                    paper="BLEU on E2E 62.2, 48.1; from memory"),
    ),
    columns=(*BY_KIND, LOSS))}
