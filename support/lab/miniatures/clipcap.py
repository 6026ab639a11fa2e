"""lab/miniatures/clipcap.py: a longer prefix, a transformer or an MLP, with the decoder frozen or tuned
(ClipCap, 2111.09734v1, Table 1 and Fig. 7)."""
from __future__ import annotations

from support.lab.claims_list import CIDER, Arm, Claim, Expectation, Side

ARMS = {
    "ClipCap, transformer": Arm(("--bridge", "clipcap_transformer", "--captions", "1"),
                                measures=("captions",)),
    "ClipCap, transformer, K 1": Arm(("--bridge", "clipcap_transformer", "--captions", "1",
                                      "--option", "tokens=1"), measures=("captions",)),
}
CLAIMS = {"clipcap": Claim(
    says="With a frozen decoder, a longer prefix writes better captions.",
    source="ClipCap, Fig. 7, a curve without numbers",
    expect=(Expectation(Side("ClipCap, transformer"), ">", Side("ClipCap, transformer, K 1")),),
    columns=(CIDER,))}
