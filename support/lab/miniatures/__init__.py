"""lab/miniatures: the experiment that makes a paper's point, one file per paper of papers/.

A module has ARMS and CLAIMS, as claims_list.py has them of the documents' own claims. Where the measurements
of claims.py do not say it, it also has MEASUREMENTS ({name: function of a TrainedArm}) and MEASURED ({name:
the names of its numbers}). `python eval.py claims NAME` runs one, `python eval.py claims papers` all.
"""
from __future__ import annotations

from dataclasses import replace

from support.lab.miniatures import (clipcap, codes, cogvlm, dpo, fromage, frozen, fusion, gligen, kosmos1,
                                    limber, magic, magma, minigpt4, packing, pica, prefixes, prompt_tuning,
                                    round_robin, socratic, streams, vcgpt, visualgpt, vlkd, webgum)

MODULES = (frozen, clipcap, limber, magma, minigpt4, kosmos1, visualgpt, vcgpt, fromage, prompt_tuning,
           cogvlm, gligen, vlkd, dpo, pica, magic, socratic, streams, prefixes, fusion, codes, packing,
           round_robin, webgum)
CLAIMS = {name: claim for module in MODULES for name, claim in module.CLAIMS.items()}
OWN = {claim.own_arm for claim in CLAIMS.values()}      # the papers' own arms: blind, too
ARMS = {name: replace(arm, measures=(*arm.measures, "blind"))
        if name in OWN and {"answers", "captions"} & {*arm.measures} else arm
        for module in MODULES for name, arm in module.ARMS.items()}
MEASUREMENTS = {name: measure for module in MODULES
                for name, measure in getattr(module, "MEASUREMENTS", {}).items()}
MEASURED = {name: numbers for module in MODULES for name, numbers in getattr(module, "MEASURED", {}).items()}
