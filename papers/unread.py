"""papers/unread.py: which settings of the command line a task of training does not read.

A flag that nobody would read is refused (support/plumbing/start.py).
"""
from __future__ import annotations

ANSWERS = {"bridge", "turns", "captions", "template", "form", "longest", "cache", "pack"}
CLIP = ANSWERS | {"option", "vit", "init", "examples", "accumulate", "frozen", "checkpoint", "compile"}
TEXT = ANSWERS | {"option", "vit", "data", "share", "examples", "frozen", "checkpoint"}
PAIRS = ANSWERS | {"option", "accumulate", "checkpoint", "compile"}
WORDS = ANSWERS | {"augment", "accumulate", "checkpoint", "compile"}
NO_CHECK = {"check_every"}          # nothing is evaluated while they train
NOTHING_FROZEN = ("vilt", "vilt-unaligned", "albef", "albef-fused", "albef-easy", "albef-untaught")
PAIR_TASKS = ("visualbert", "visualbert-late", "visualbert-words", "vilbert", "vilbert-equal",
              *NOTHING_FROZEN)                                                              # papers/masked.py
CHAMELEON_TASKS = ("chameleon", "chameleon-no-qk", "chameleon-no-z", "chameleon-z",
                   "chameleon-even", "chameleon-words")
FLAVA_TASKS = ("flava-2", "flava-pairs", "flava-contrast", "flava-local")
UNREAD = {                          # task → the settings of the command line that it does not read
    **dict.fromkeys(("answer", "round-robin", "fpt", "fpt-random"), set()),
    "stage1": ANSWERS | {"accumulate", "checkpoint", "compile"},
    **dict.fromkeys(PAIR_TASKS, PAIRS), **dict.fromkeys(NOTHING_FROZEN, PAIRS | {"frozen"}),
    **dict.fromkeys(FLAVA_TASKS, PAIRS | {"vit", "frozen"}),
    **dict.fromkeys(("coca", "coca-1", "coca-contrast", "coca-caption"), CLIP - {"vit"}),
    **dict.fromkeys(("simvlm", "simvlm-causal", "simvlm-pairs", "simvlm-linear"), CLIP),
    **dict.fromkeys(("dalle", *CHAMELEON_TASKS), (CLIP | TEXT | NO_CHECK) - {"init", "examples"}),
    "clip": CLIP - {"init"}, "clip-text": (CLIP | NO_CHECK) - {"vit"}, "lm": TEXT | {"lm"},
    **dict.fromkeys(("lm-prompts", "lm-reader"), TEXT | {"init"}),
    **dict.fromkeys(("fromage", "vlkd"), {"pack", "accumulate"}),       # a batch is contrasted as a whole
    "word": WORDS - {"bridge"}, "told-1": WORDS,
    "gligen": {"pack", "cache", "captions"}, "glide": (CLIP | NO_CHECK) - {"frozen"},
    **dict.fromkeys(("dpo", "dpo-far", "dpo-near", "dpo-sft"), ANSWERS - {"bridge", "longest", "cache"}),
    **dict.fromkeys(("cm3", "cm3-causal"), CLIP | TEXT | {"lm"}),
    **dict.fromkeys(("names", "pixels", "vq", "dvae"), CLIP | TEXT | NO_CHECK | {"lm"})}
