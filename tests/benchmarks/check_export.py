"""What save_vlm(layout="hf") writes, opened by transformers' and peft's own classes: the largest difference
of the logits.

pip install transformers peft; python tests/benchmarks/check_export.py
"""
from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from papers import make_bridge                                                 # noqa: E402  (after the path)
from conftest import TINY_VIT, stir, tiny_decoder                         # noqa: E402
from model import IMAGE, VLM, ViT
from papers.siglip import SiglipConfig, SiglipViT
from support.formats.vlm import load_vlm, save_vlm                           # noqa: E402

SIGLIP = SiglipConfig(image_size=24, patch=8, width=20, layers=3, heads=2, hidden=40)
NARROW = replace(TINY_VIT, width=16)                    # 2 Di ≤ D: what a linear bridge needs
BUNDLED = Path(__file__).parents[2] / "weights"


def llava(name: str, vit_config, tied: bool, image_token: int | None, **options) -> float:
    """Largest |logit difference| over a batch of two texts with an image each; the folder must also load back
    here."""
    decoder = tiny_decoder(tied=tied)
    bridge = stir(make_bridge(name, decoder.config, vit_config.width, **options), 5)
    tower = SiglipViT if vit_config is SIGLIP else ViT
    vlm = VLM(stir(tower(vit_config), 7), bridge, decoder, image_token).eval()
    return compare_llava(vlm)


@torch.no_grad()
def compare_llava(vlm: VLM) -> float:
    g = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, vlm.vit.config.image_size, vlm.vit.config.image_size, generator=g)
    tokens = torch.randint(8, 40, (2, 9), generator=g)     # 7 is the image
    tokens[:, 3] = IMAGE
    with tempfile.TemporaryDirectory() as folder:
        save_vlm(vlm, folder, layout="hf")
        theirs = LlavaForConditionalGeneration.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()
        again = load_vlm(folder)
    image, K = theirs.config.image_token_id, vlm.bridge.prefix(vlm.features(pixels)).shape[1]
    unfolded = torch.stack([torch.cat((row[:3], torch.full((K,), image), row[4:])) for row in tokens])
    ours, back = vlm(tokens, pixels), again(tokens, pixels)
    reference = theirs(input_ids=unfolded, pixel_values=pixels).logits
    words = slice(0, vlm.decoder.config.vocab_size)  # transformers may have one more row, for the image
    return max(
        (ours - reference[..., words]).abs().max().item(), (back[..., words] - ours).abs().max().item()
    )


@torch.no_grad()
def peft(tanh: bool) -> float:
    decoder = tiny_decoder()
    bridge = stir(
        make_bridge(
            "zero_init", decoder.config, 20, prompts=3, adapted=3, version=0, gate_per="layer", tanh=tanh
        ),
        3,
    )
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        save_vlm(VLM(ViT(TINY_VIT), bridge, decoder), folder, layout="hf")
        base = LlamaForCausalLM.from_pretrained(
            Path(folder) / "decoder", attn_implementation="eager", dtype=torch.float32
        )
        theirs = PeftModel.from_pretrained(base, folder).eval()
        assert json.loads((Path(folder) / "adapter_config.json").read_text())["adapter_len"] == 3
    return (decoder(tokens, bridge=bridge) - theirs(input_ids=tokens).logits).abs().max().item()


if __name__ == "__main__":
    results = {
        "mlp, CLIP ViT, untied": llava("mlp", TINY_VIT, False, 7),
        "mlp, CLIP ViT, tied, no word for the image": llava("mlp", TINY_VIT, True, None),
        "mlp, last layer with the class token": llava(
            "mlp", TINY_VIT, False, 7, reads=-1, reads_cls=True
        ),
        "mlp, SigLIP ViT": llava("mlp", SIGLIP, False, 7),
        "linear, CLIP ViT": llava("linear", NARROW, False, 7),
        "linear without bias": llava("linear", NARROW, True, None, bias=False),
        "zero_init without image, tanh (peft)": peft(True),
        "zero_init without image, raw gate (peft)": peft(False),
    }
    for name, off in results.items():
        print(f"{name:45s} largest logit difference {off:.1e}")
    print(json.dumps(results))
    sys.exit(max(results.values()) > 1e-4)
