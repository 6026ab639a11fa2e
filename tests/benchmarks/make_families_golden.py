"""Writes tests/golden/{siglip-model, dinov2, dinov2-registers-swiglu, llava-three-layers}: tiny random
models, and what transformers makes of them.

    pip install transformers; python tests/benchmarks/make_families_golden.py [CASE …]

Norm weights and layer scales are not 1, biases are not 0. The files are as transformers writes them, which is
also how the published ones look.
"""
from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

GOLDEN = Path(__file__).parents[1] / "golden"
SEED = 21
TOWER = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
PIXELS = dict(image_size=28, patch_size=7)
TEXT = dict(TOWER, intermediate_size=24, vocab_size=40)


def siglip():
    config = transformers.SiglipConfig(
        text_config=dict(TEXT, max_position_embeddings=6, projection_size=16),
        vision_config=dict(TOWER, **PIXELS, intermediate_size=24))
    return transformers.SiglipModel(config)


def llava():
    text = transformers.LlamaConfig(**TEXT, max_position_embeddings=64)
    vision = transformers.CLIPVisionConfig(**TOWER, **PIXELS, intermediate_size=24)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=39, image_seq_length=16,
        vision_feature_layer=[-1, 1, -2], multimodal_projector_bias=False)
    return transformers.LlavaForConditionalGeneration(config)


def dinov2():
    return transformers.Dinov2Model(transformers.Dinov2Config(**TOWER, **PIXELS, mlp_ratio=2))


def registers():
    return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
        **TOWER, **PIXELS, mlp_ratio=2, use_swiglu_ffn=True, num_register_tokens=3))


def run_pair(model, g) -> tuple[dict, dict]:
    x = dict(pixel_values=torch.randn(3, 3, 28, 28, generator=g),
             input_ids=torch.randint(40, (2, 6), generator=g))
    y = model(**x)
    return x, {"logits_per_image": y.logits_per_image, "image_embeds": y.image_embeds,
               "text_embeds": y.text_embeds,
               "text_last_hidden_state": y.text_model_output.last_hidden_state}


def run_tower(model, g) -> tuple[dict, dict]:
    x = dict(pixel_values=torch.randn(2, 3, 28, 28, generator=g),
             larger=torch.randn(1, 3, 42, 35, generator=g))
    y = model(x["pixel_values"], output_hidden_states=True)
    hidden = {f"hidden_states.{i}": h for i, h in enumerate(y.hidden_states)}
    return x, {**hidden, "pooler_output": y.pooler_output,
               "larger_hidden_states.1": model(x["larger"], output_hidden_states=True).hidden_states[1]}


def run_llava(model, g) -> tuple[dict, dict]:
    ids = torch.randint(38, (2, 5), generator=g)
    expanded = torch.cat((ids[:, :2], torch.full((2, 16), 39), ids[:, 2:]), 1)
    pixels = torch.randn(2, 3, 28, 28, generator=g)
    return dict(input_ids=ids, pixel_values=pixels), {
        "logits": model(input_ids=expanded, pixel_values=pixels).logits}


CASES = {       # case → the model, its run, what is special
    "siglip-model": (siglip, run_pair, "sigmoid logits: scale and bias; a text is read at its last position"),
    "dinov2": (dinov2, run_tower, "layer scale; `larger` resizes the positions without antialias"),
    "dinov2-registers-swiglu": (registers, run_tower,
                                "3 registers, SwiGLU; `larger` resizes the positions with antialias"),
    "llava-three-layers": (llava, run_llava, "hidden states -1, 1 and -2 side by side, a projector "
                           "without biases; the image stands behind the second token of input_ids"),
}


@torch.no_grad()
def main() -> None:
    for case in sys.argv[1:] or CASES:
        make, run, note = CASES[case]
        model, g = make().eval(), torch.Generator().manual_seed(SEED)
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "logit" in name:
                p.copy_(1 + 0.1 * noise)
            elif p.ndim < 2:
                p.copy_(0.3 * noise + ("norm" in name and name.endswith("weight") or "lambda" in name))
            else:
                p.copy_(noise / math.sqrt(p[0].numel()))
        inputs, expected = run(model, g)
        folder = GOLDEN / case
        model.save_pretrained(folder)
        for file in folder.glob("generation_config.json"):
            file.unlink()
        save_file({k: v.contiguous() for k, v in inputs.items()}, folder / "inputs.safetensors")
        save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
        (folder / "case.json").write_text(json.dumps({
            "case": case,
            "reference": {"library": "transformers", "version": transformers.__version__,
                          "class": type(model).__name__, "torch": torch.__version__},
            "seed": SEED, "tolerance": {"atol": 1e-4, "rtol": 1e-4}, "notes": [note]}, indent=2) + "\n")
        print(case, sum(f.stat().st_size for f in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
