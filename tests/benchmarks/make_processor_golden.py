"""Make tests/golden/mllama-processor: what transformers' processors of Llama-3.2-Vision and IDEFICS do to
pictures.

Run      python tests/benchmarks/make_processor_golden.py
needs transformers, which the project never imports

The pictures are those of tests/golden/image-processors, opened, turned upright and converted to RGB as that
case says.
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL
import torch
import transformers
from PIL import Image, ImageOps
from safetensors.torch import save_file
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.mllama import image_processing_pil_mllama as theirs

GOLDEN = Path(__file__).parent.parent / "golden"
OUT = GOLDEN / "mllama-processor"
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SMALL, FULL = ("astronaut_251x187.jpg", "coffee_73x151.png"), 560


def mllama(size: int) -> theirs.MllamaImageProcessorPil:
    """With the mean and std of the published preprocessor_config.json, which are not the class's own."""
    side = {"height": size, "width": size}
    return theirs.MllamaImageProcessorPil(size=side, image_mean=CLIP_MEAN, image_std=CLIP_STD)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    small, full, idefics, tensors = mllama(20), mllama(FULL), IdeficsImageProcessorPil(image_size=24), {}
    for file in sorted((GOLDEN / "image-processors" / "images").iterdir()):
        image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        x = small(image, return_tensors="pt")
        mask = x["aspect_ratio_mask"][0, 0]
        tensors[f"{file.name}/mllama"] = x["pixel_values"][0, 0, :int(mask.sum())].half()
        tensors[f"{file.name}/mllama/aspect_ratio_id"] = x["aspect_ratio_ids"][0, 0]
        tensors[f"{file.name}/mllama/aspect_ratio_mask"] = mask
        tensors[f"{file.name}/idefics"] = idefics(image, return_tensors="pt")[0].half()
        if file.name in SMALL:
            x = full(image, return_tensors="pt")
            tensors[f"{file.name}/full/mllama"] = x["pixel_values"][0, 0, :, :, ::35, ::35].half()
    sizes = np.exp(np.random.default_rng(0).uniform(0, np.log(4000), (600, 2))).astype(int).tolist()
    rows = []
    for h, w in sizes + [[n, n] for n in range(1, 1200, 7)]:
        canvas = theirs.get_optimal_tiled_canvas(h, w, 4, FULL)
        inside = theirs.get_image_size_fit_to_canvas(h, w, *canvas, FULL)
        rows.append([h, w, *(int(n) // FULL for n in canvas), *map(int, inside)])
    tensors["sizes"] = torch.tensor(rows, dtype=torch.int16)
    save_file({k: v.contiguous() for k, v in tensors.items()}, OUT / "expected.safetensors")
    for name, processor in (("mllama", small), ("idefics", idefics)):
        text = json.dumps(processor.to_dict(), indent=2, sort_keys=True, default=str)
        (OUT / f"preprocessor_config.{name}.json").write_text(text + "\n", encoding="utf-8")
    case = {
        "case": "mllama-processor",
        "reference": {
            "library": "transformers",
            "version": transformers.__version__,
            "pillow": PIL.__version__,
            "class": "MllamaImageProcessorPil (4 tiles of 20 pixels), IdeficsImageProcessorPil (24 pixels)",
        },
        "images": "those of the case image-processors, turned upright by EXIF, then .convert('RGB')",
        "outputs_meaning": {
            "<image>/mllama": "pixel_values of the tiles that are there, float16 (the rest of four are zero)",
            "<image>/mllama/aspect_ratio_id": "1 to 8",
            "<image>/mllama/aspect_ratio_mask": "(4,)",
            "<image>/idefics": "pixel_values (3, 24, 24), float16",
            "<image>/full/mllama": "the four tiles at the published 560 pixels, only [:, :, ::35, ::35]",
            "sizes": "height, width of a picture; rows, columns of its canvas; height, width of the picture "
            "on it",
        },
        "tolerance": {
            "atol": 0.004,
            "rtol": 0,
            "why": "a quarter of a grey level; float16 storage costs up to 1e-3",
        },
    }
    (OUT / "case.json").write_text(json.dumps(case, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
