"""lab/miniatures/minigpt4.py: what learns behind a finished Q-Former, on few pictures (MiniGPT-4,
2304.10592v2, Table 5)."""
from __future__ import annotations

from support.lab.claims_list import BY_KIND, Arm, Claim, Expectation, Side


def minigpt4(*flags: str) -> Arm:
    return Arm(("--bridge", "minigpt4", "--examples", "96", *flags), "BLIP-2, both stages", ("answers",))


ARMS = {
    "MiniGPT-4": minigpt4(),
    "MiniGPT-4, three layers": minigpt4("--option", "maps=3"),
    "MiniGPT-4, Q-Former tuned": minigpt4("--option", "tuned=true"),
    "MiniGPT-4, no Q-Former": Arm(("--bridge", "minigpt4_llama2", "--examples", "96"), measures=("answers",)),
}
CLAIMS = {"minigpt4": Claim(
    says="Behind a finished Q-Former one linear layer is enough: without the Q-Former it is much the same, "
         "with three layers or a Q-Former that learns it is worse.",
    source="MiniGPT-4, Table 5, AOK-VQA",
    expect=(
        Expectation(Side("MiniGPT-4"), "≥", Side("MiniGPT-4, no Q-Former"), paper="58.2, 56.9"),
        Expectation(Side("MiniGPT-4, no Q-Former"), "≥", Side("MiniGPT-4"), paper="56.9, 58.2"),
        Expectation(Side("MiniGPT-4"), ">", Side("MiniGPT-4, three layers"), paper="58.2, 49.7"),
        Expectation(Side("MiniGPT-4"), ">", Side("MiniGPT-4, Q-Former tuned"), paper="58.2, 52.1"),
    ),
    columns=BY_KIND,
    note="Without the Q-Former it is much worse here: the Q-Former was trained on all pictures, by BLIP-2's "
         "two stages, the map behind the ViT on 96 alone, as every map of this table.")}
