"""Writes tests/golden/vision-interpolate: what transformers' towers make of images of another size.

    pip install transformers; python tests/benchmarks/make_interpolation_golden.py

The towers are those of the cases clip-vision-gelu, siglip-vision and blip2-vision; only inputs and outputs
are stored.
"""
from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import Blip2VisionModel, CLIPVisionModel, SiglipVisionModel

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDER, SEED = GOLDEN / "vision-interpolate", 23
TOWERS = {
    "clip-vision-gelu": CLIPVisionModel,
    "siglip-vision": SiglipVisionModel,
    "blip2-vision": Blip2VisionModel,
}
GRIDS = {"larger": (5, 5), "smaller": (3, 3), "wide": (2, 8), "tall": (5, 2)}   # patches; the towers: 4 × 4


def main() -> None:
    g, inputs, expected, worst = torch.Generator().manual_seed(SEED), {}, {}, 0.0
    for name, cls in TOWERS.items():
        model = cls.from_pretrained(GOLDEN / name, attn_implementation="eager").eval()
        p = model.config.patch_size
        for grid, (rows, columns) in GRIDS.items():
            key = f"{name}.{grid}"
            pixels = inputs[key] = torch.randn(1, 3, rows * p, columns * p, generator=g)
            with torch.no_grad():
                options = dict(interpolate_pos_encoding=True, output_hidden_states=True)
                got, exact = model.float()(pixels, **options), model.double()(pixels.double(), **options)
            # of the hidden states the first (positions just added) and the last
            for out, state in (("first", 0), ("last", -1)):
                expected[f"{key}.{out}"] = got.hidden_states[state].contiguous()
                worst = max(worst, float((got.hidden_states[state] - exact.hidden_states[state]).abs().max()))
            expected[f"{key}.pooler_output"] = got.pooler_output.contiguous()
    FOLDER.mkdir(exist_ok=True)
    save_file(inputs, FOLDER / "inputs.safetensors", {"format": "pt"})
    save_file(expected, FOLDER / "expected.safetensors", {"format": "pt"})
    (FOLDER / "case.json").write_text(
        json.dumps(
            {
                "case": "vision-interpolate",
                "seed": SEED,
                "towers": list(TOWERS),
                "grids": GRIDS,
                "reference": {
                    "library": "transformers",
                    "version": transformers.__version__,
                    "class": [c.__name__ for c in TOWERS.values()],
                    "attention": "eager",
                    "call": "interpolate_pos_encoding=True",
                    "torch": torch.__version__,
                },
                "outputs_meaning": {"*.first": "hidden_states[0]", "*.last": "hidden_states[-1]"},
                "tolerance": {"atol": 1e-4, "rtol": 1e-4},
                "reference_float32_vs_float64_max_abs": worst,
                "notes": [
                    "wide has as many patches as the towers are made for, arranged otherwise: it is "
                    "interpolated too"
                ],
            },
            indent=2,
        )
        + "\n"
    )
    print("float32 against float64:", worst, "bytes:", sum(f.stat().st_size for f in FOLDER.iterdir()))


if __name__ == "__main__":
    main()
