"""papers/documents.md: what the five documents say has a file, a name in it and a test, and all exist."""
from __future__ import annotations

import importlib
import re

import pytest

from conftest import ROOT

PAGE = ROOT / "papers" / "documents.md"
ROWS = [[cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
ROWS = [row for row in ROWS if row[0] not in ("documents", "objective")]        # without the heads
TESTS = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize("what,code,test", [row[-3:] for row in ROWS], ids=[row[-3][:40] for row in ROWS])
def test_what_a_document_says_stands_in_code_and_is_tested(what, code, test):
    [(text, path)] = re.findall(r"\[([\w.]+)\]\(([\w./]+\.py)\)", code)
    file = (PAGE.parent / path).resolve()
    name = code.split("`")[1] if "`" in code else None
    assert file.is_file() and file.name == text, code
    module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    assert name is None or hasattr(module, name), f"{text} has no {name}"
    assert f"test_{test}" in TESTS, test


MUST = {                                                # of the five documents; WebGUM: papers/README.md
    "Systems": "LLaVA, LLaMA-Adapter, BLIP-2, InstructBLIP, MAPL, Frozen, Flamingo, OpenFlamingo, MAGMA, "
               "MiniGPT-4, ClipCap, LiMBeR, CLIP, ALIGN, CoCa, VisualBERT, ViLBERT, ViLT, ALBEF, FLAVA, "
               "SimVLM, CM3, Unified-IO 2, Chameleon, Show-o, Transfusion, VQ-VAE, VQ-GAN, DALL-E, "
               "GLIDE, prompt tuning, prefix tuning",
    "Equations": "S_l = Q_t K_lᵀ/√C, MAPL, Q-Former, Human : X_q X_v, H_v = W Z_v, GLIGEN, Fourier, "
                 "z-loss, two-dimensional RoPE, dynamic packing, VQ-VAE, causal masking, UniT, FLAVA, f_o "
                 "+ f_s + f_p, W_v V_i and W_l L_i, one printed wrong, VisualGPT, VC-GPT, prefix-LM, "
                 "CoCa's poolers, weighted sum, last image, DALL-E",
    "Objectives": "contrast, momentum, over all processes, UniCL, hard negatives, sentence-image, masked "
                  "language, masked images, masked regions, optimal transport, captions, prefix-LM, "
                  "causally masked, text and image tokens, z-loss, codebook and commitment, guidance, "
                  "instruction tuning, PPO, DPO, by weight, teacher's embedding",
}


@pytest.mark.parametrize("part", MUST)
def test_nothing_that_must_exist_in_code_is_missing(part):
    [section] = [s for s in PAGE.read_text(encoding="utf-8").split("\n## ") if s.startswith(part)]
    assert [name for name in MUST[part].split(", ") if name not in section] == []
