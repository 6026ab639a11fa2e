"""Image processors of published folders as current libraries write them: pixels are those of the library."""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data import to_pixels
from support.formats import load_processor

PICTURE = np.random.RandomState(0).randint(0, 255, (40, 60, 3), np.uint8)
CLIP = {"do_convert_rgb": True, "do_resize": True, "resample": 3, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "do_center_crop": False,
        "size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
        "image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 224, "width": 224}}
SIGLIP = {**CLIP, "image_processor_type": "SiglipImageProcessor", "size": {"height": 20, "width": 44}}
del SIGLIP["crop_size"], SIGLIP["do_center_crop"]


def pixels(folder) -> torch.Tensor:
    return to_pixels([PICTURE], processor=load_processor(folder))


def by_hand(rows: int, columns: int) -> torch.Tensor:
    image = Image.fromarray(PICTURE).resize((columns, rows), Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25


def test_the_image_processor_inside_processor_config_json(tmp_path):
    config = {"model_type": "llava", "vision_config": {"image_size": 14}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "processor_config.json").write_text(json.dumps({
        "image_processor": CLIP, "image_token": "<image>", "num_additional_image_tokens": 0, "patch_size": 14,
        "processor_class": "LlavaProcessor", "vision_feature_select_strategy": None}))
    assert (pixels(tmp_path) - by_hand(28, 28)).abs().max() < 1e-5
    old = {**CLIP, "size": {"height": 30, "width": 30}}     # the nested one is what the library takes
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert (pixels(tmp_path) - by_hand(28, 28)).abs().max() < 1e-5
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    assert pixels(tmp_path).shape == (1, 3, 30, 30)         # older ones hold no image processor


def test_a_siglip_that_reads_rectangles(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SIGLIP))
    assert (pixels(tmp_path) - by_hand(20, 44)).abs().max() < 1e-5


@pytest.mark.parametrize("fields", [CLIP, SIGLIP])
def test_the_library_itself_agrees(tmp_path, fields):
    transformers = pytest.importorskip("transformers")
    library = getattr(transformers, fields["image_processor_type"])(**fields)
    library.save_pretrained(tmp_path)
    expected = library(Image.fromarray(PICTURE), return_tensors="pt").pixel_values
    assert (pixels(tmp_path) - expected).abs().max() < 0.05
