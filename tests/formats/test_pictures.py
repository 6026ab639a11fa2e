"""Claim: every picture becomes the pixels that the published image processors make of it, to a quarter of a
grey level.

golden/image-processors: 19 awkward pictures through CLIP, LLaVA with padding, SigLIP and BLIP;
golden/mllama-processor: the same through Llama-3.2-Vision's tiles and IDEFICS. Another libjpeg may decode a
JPEG to the next grey level: there one is allowed.
"""
from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
from support.formats.pictures import canvases, fit_canvas
from conftest import GOLDEN
from data import Processor, to_pixels
from support.formats.pictures import PROCESSORS, load_processor, read_image, tile_pixels
from support.formats.files import UserError

CASE, TILES = GOLDEN / "image-processors", GOLDEN / "mllama-processor"
EXPECTED, TILED = load_file(CASE / "expected.safetensors"), load_file(TILES / "expected.safetensors")
FILES = sorted(p.name for p in (CASE / "images").iterdir())
FULL = {"clip": ("clip", 224), "clip336": ("clip", 336), "llava_pad336": ("llava_pad", 336),
        "siglip224": ("siglip", 224), "blip384": ("blip", 384), "blip224": ("blip", 224)}


def close(key: str, mine: torch.Tensor, expected: torch.Tensor, p: Processor) -> None:
    """0.004 is the case's own bound; one grey level is 1 / levels / std, and float16 storage costs up to
    1e-3."""
    bound = 1 / p.levels / min(p.std) + 1e-3 if ".jpg" in key else 0.004
    assert mine.shape == expected.shape, key
    assert (mine - expected.float()).abs().max() <= bound, (
        f"{key}: off by {(mine - expected.float()).abs().max():.4f}"
    )


def published(folder, name: str, tmp_path) -> Processor:
    """The processor that a preprocessor_config.json of the golden case describes."""
    shutil.copy(folder / f"preprocessor_config.{name}.json", tmp_path / "preprocessor_config.json")
    return load_processor(tmp_path)


def test_no_golden_picture_and_no_processor_is_left_out():
    assert len(FILES) == 19 and set(FILES) == {key.split("/")[0] for key in EXPECTED}
    kinds = {key.partition("/")[2] for key in EXPECTED}
    variants = ("", "/exif_ignored", "/alpha_on_white")
    small = {name + variant for name in ("clip", "llava_pad", "siglip", "blip") for variant in variants}
    assert kinds == small | {f"full/{name}" for name in FULL}
    assert {key.partition("/")[2] for key in TILED if key != "sizes"} == {
        "mllama", "mllama/aspect_ratio_id", "mllama/aspect_ratio_mask", "idefics", "full/mllama"}


@pytest.mark.parametrize("name", ["clip", "llava_pad", "siglip", "blip"])
@pytest.mark.parametrize("file", FILES)
def test_pixels_are_those_of_the_published_processor(file, name, tmp_path):
    p, image = published(CASE, name, tmp_path), read_image(CASE / "images" / file)
    close(f"{file}/{name}", to_pixels([image], None, p)[0], EXPECTED[f"{file}/{name}"], p)
    for full, (preset, size) in FULL.items():
        if preset == name and (key := f"{file}/full/{full}") in EXPECTED:
            close(key, to_pixels([image], size, PROCESSORS[name])[0][:, ::7, ::7], EXPECTED[key], p)
    with Image.open(CASE / "images" / file) as picture:  # the case's other two ways to read it
        if (key := f"{file}/{name}/exif_ignored") in EXPECTED:
            close(key, to_pixels([np.array(picture.convert("RGB"))], None, p)[0], EXPECTED[key], p)
        if (key := f"{file}/{name}/alpha_on_white") in EXPECTED:
            whole = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
            close(key, to_pixels([np.array(whole.convert("RGB"))], None, p)[0], EXPECTED[key], p)


@pytest.mark.parametrize("file", FILES)
def test_tiles_are_those_of_llama_vision(file, tmp_path):
    p, image = published(TILES, "mllama", tmp_path), read_image(CASE / "images" / file)
    pixels, ids, mask = tile_pixels([image], processor=p)
    assert pixels.shape == (1, 4, 3, 20, 20)
    assert (pixels.dtype, ids.dtype, mask.dtype) == (torch.float32, torch.int64, torch.bool)
    assert ids[0] == TILED[f"{file}/mllama/aspect_ratio_id"]
    assert torch.equal(mask[0].long(), TILED[f"{file}/mllama/aspect_ratio_mask"])
    close(file, pixels[0, mask[0]], TILED[f"{file}/mllama"], p)
    assert not pixels[0, ~mask[0]].any()
    if (key := f"{file}/full/mllama") in TILED:
        close(key, tile_pixels([image])[0][0, :, :, ::35, ::35], TILED[key], p)


@pytest.mark.parametrize("file", FILES)
def test_pixels_are_those_of_idefics(file, tmp_path):
    p = published(TILES, "idefics", tmp_path)
    assert p == dataclasses.replace(PROCESSORS["blip"], size=24)
    close(file, to_pixels([read_image(CASE / "images" / file)], None, p)[0], TILED[f"{file}/idefics"], p)


def test_the_canvas_of_any_size_is_llama_visions():
    """772 sizes from 1 to 4,000 pixels: the canvas and the picture's size on it, exactly."""
    sizes = TILED["sizes"].tolist()
    assert len(sizes) == 772 and {tuple(row[2:4]) for row in sizes} == set(canvases(4))
    for h, w, r, c, height, width in sizes:
        assert fit_canvas(h, w, 560, 4) == ((r, c), (height, width)), (h, w)


def test_several_pictures_have_a_row_of_tiles_each():
    grey = [np.full((h, w, 3), 128, np.uint8) for h, w in ((28, 28), (28, 112), (60, 60))]
    pixels, ids, mask = tile_pixels(grey, 28, 4)
    assert (
        ids.tolist() == [1, 4, 6] and mask.sum(1).tolist() == [1, 4, 4] and pixels.shape == (3, 4, 3, 28, 28)
    )
    assert torch.equal(pixels[1], pixels[0, :1].expand_as(pixels[1]))
    assert tile_pixels(grey[:1], 28, 1)[0].shape == (1, 1, 3, 28, 28)
    with pytest.raises(AssertionError, match="tile_pixels"):
        to_pixels(grey, 28, PROCESSORS["mllama"])


@pytest.mark.parametrize("name", ["clip", "siglip", "blip"])
def test_one_grey_is_one_grey_however_thin_the_picture(name):
    shapes = ((48, 48), (1, 1), (7, 300), (1, 5000), (5000, 1))
    pixels = to_pixels([np.full((h, w, 3), 128, np.uint8) for h, w in shapes], 48, PROCESSORS[name])
    assert pixels.shape == (5, 3, 48, 48) and pixels.dtype == torch.float32
    assert torch.equal(pixels, pixels[:1].expand_as(pixels))


def test_padding_keeps_the_whole_picture_and_adds_the_mean_colour():
    image = np.zeros((10, 40, 3), np.uint8)
    p = PROCESSORS["llava_pad"]
    pixels = to_pixels([image], 40, p)[0]
    levels = (pixels * torch.tensor(p.std).view(3, 1, 1) + torch.tensor(p.mean).view(3, 1, 1)) * 255
    assert levels[:, 5, 20].round().tolist() == [122, 116, 104] and levels[:, 20].abs().max() < 1e-3
    assert pixels[:, 5, 20].abs().max() < 0.02                                  # next to nothing for the ViT
    assert to_pixels([image, image[:, :1], image[:1]], 40, p).shape == (3, 3, 40, 40)


# --- what a folder says -------------------------------------------------------------------------------------

CLIP_NUMBERS = dict(image_mean=list(data.CLIP_MEAN), image_std=list(data.CLIP_STD), resample=3)
PUBLISHED = [  # preprocessor_config.json in the forms that published folders have
    (
        dict(
            crop_size=224,
            do_center_crop=True,
            do_normalize=True,
            do_resize=True,
            size=224,
            feature_extractor_type="CLIPFeatureExtractor",
            **CLIP_NUMBERS,
        ),
        Processor(),
    ),
    (
        dict(
            crop_size={"height": 336, "width": 336},
            do_center_crop=True,
            do_convert_rgb=True,
            do_normalize=True,
            do_rescale=True,
            rescale_factor=0.00392156862745098,
            do_resize=True,
            image_processor_type="CLIPImageProcessor",
            size={"shortest_edge": 336},
            **CLIP_NUMBERS,
        ),
        Processor(size=336),
    ),
    (
        dict(
            image_processor_type="LlavaImageProcessorFast",
            do_pad=True,
            crop_size={"height": 336, "width": 336},
            size={"shortest_edge": 336},
        ),
        PROCESSORS["llava_pad"],
    ),
    (
        dict(
            image_processor_type="SiglipImageProcessorFast",
            crop_size=None,
            do_center_crop=None,
            do_pad=None,
            do_normalize=True,
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
            resample=2,
            size={"height": 384, "width": 384},
        ),
        dataclasses.replace(PROCESSORS["siglip"], size=384, resample=2),
    ),
    (
        dict(image_processor_type="BlipImageProcessor", size={"height": 364, "width": 364}, **CLIP_NUMBERS),
        Processor("squash", 364),
    ),
    (
        dict(
            image_processor_type="BitImageProcessor",
            size={"shortest_edge": 256},
            crop_size={"height": 224, "width": 224},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        Processor(zoom=256 / 224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ),
    (
        dict(image_processor_type="CLIPImageProcessor", size={"height": 224, "width": 224}, crop_size=224),
        Processor("squash"),
    ),
    (
        dict(
            image_processor_type="IdeficsImageProcessor", image_num_channels=3, image_size=224, **CLIP_NUMBERS
        ),
        Processor("squash"),
    ),
    (
        dict(
            image_processor_type="MllamaImageProcessor",
            do_pad=True,
            max_image_tiles=4,
            size={"height": 560, "width": 560},
            **{**CLIP_NUMBERS, "resample": 2},
        ),
        PROCESSORS["mllama"],
    ),
    (
        dict(image_processor_type="CLIPImageProcessor", do_rescale=False, do_normalize=False),
        Processor(levels=1.0, mean=(0.0,) * 3, std=(1.0,) * 3),
    ),
    (dict(image_mean=0.5, image_std=0.5), Processor(mean=(0.5,) * 3, std=(0.5,) * 3)),
]


@pytest.mark.parametrize("fields, expected", PUBLISHED)
def test_a_preprocessor_config_is_read_in_every_form_that_is_published(fields, expected, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    found = load_processor(tmp_path)
    assert abs(found.levels - expected.levels) < 1e-9
    assert dataclasses.replace(found, levels=expected.levels) == expected


def test_resizing_beyond_the_crop_keeps_the_middle():
    """BiT's 256 → 224 at a fifth of it: as if the picture had been resized and then cropped by hand."""
    image = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    p = Processor(size=28, zoom=32 / 28)
    by_hand = np.asarray(Image.fromarray(image).resize((32, 41), Image.Resampling.BICUBIC))[6:34, 2:30]
    assert torch.equal(to_pixels([image], None, p), to_pixels([by_hand], 28))


@pytest.mark.parametrize(
    "fields, said",
    [
        (
            dict(image_processor_type="ConvNextImageProcessor"),
            '"ConvNextImageProcessor" is not known here; known: clip',
        ),
        (dict(do_image_splitting=True), "the key 'do_image_splitting' (true) is not known here"),
        (dict(do_flip_channel_order=True), "do_flip_channel_order is true"),
        (dict(size={"longest_edge": 384}), '{"longest_edge": 384} makes no square'),
        (dict(size={"height": 224, "width": 448}), '{"height": 224, "width": 448} makes no square'),
        (dict(do_center_crop=False), "do_center_crop is false"),
        (dict(do_resize=False), "do_resize or"),
        (dict(size=200, crop_size=224), "the crop of 224 pixels is larger than what it is cut from"),
        (dict(image_mean=[0.5, 0.5]), "one of its numbers is not what it should be"),
        (dict(image_std=[0.5, 0.0, 0.5]), "std"),
        (dict(rescale_factor=0), "'rescale_factor' is 0, not a number above 0"),
        (dict(size="large"), "'size' is 'large', not a whole number"),
        (dict(resample=9), "'resample' is 9, not a whole number of at least 0 and of at most 5"),
    ],
)
def test_a_config_that_cannot_be_followed_gives_one_sentence(fields, said, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError) as e:
        load_processor(tmp_path)
    assert said in str(e.value) and str(tmp_path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "config, expected",
    [
        (dict(model_type="clip_vision_model", image_size=48), Processor(size=48)),
        (
            dict(model_type="clip", vision_config=dict(model_type="clip_vision_model", image_size=336)),
            Processor(size=336),
        ),
        (
            dict(model_type="siglip", vision_config=dict(model_type="siglip_vision_model", image_size=384)),
            dataclasses.replace(PROCESSORS["siglip"], size=384),
        ),
        (
            dict(model_type="instructblip", vision_config=dict(model_type="instructblip_vision_model")),
            PROCESSORS["blip"],
        ),
        (
            dict(model_type="blip-2", vision_config=dict(model_type="blip_2_vision_model", image_size=364)),
            Processor("squash", 364),
        ),
        (dict(model_type="idefics", vision_config=dict(image_size=224)), PROCESSORS["blip"]),
        (
            dict(model_type="mllama", vision_config=dict(model_type="mllama_vision_model", image_size=448)),
            dataclasses.replace(PROCESSORS["mllama"], size=448),
        ),
        (dict(model_type="llava", vision_config=dict(image_size=336)), Processor(size=336)),
    ],
)
def test_a_folder_without_that_file_has_what_its_kind_of_tower_has(config, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_processor(tmp_path) == expected


def test_a_llava_takes_its_towers_processor_and_pads_when_it_says_so(tmp_path):
    tower = tmp_path / "tower"
    tower.mkdir()
    shutil.copy(CASE / "preprocessor_config.clip.json", tower / "preprocessor_config.json")
    for ratio, how in (("pad", "pad"), ("square", "crop"), (None, "crop")):
        config = dict(model_type="llava_llama", mm_vision_tower="tower", image_aspect_ratio=ratio)
        (tmp_path / "config.json").write_text(json.dumps(config))
        p = load_processor(tmp_path)
        assert (p.how, p.size, p.zoom) == (how, 32, 1.0)
    (tmp_path / "config.json").write_text(json.dumps(dict(bridge="mlp", vit="tower")))  # a run of ours
    assert load_processor(tmp_path).size == 32


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [np.linspace(0, 1, 6, dtype=np.float32), np.arange(-1, 5, dtype=np.int32),
                                    np.arange(0, 600_000, 100_000, dtype=np.int32)])
def test_a_picture_whose_white_nobody_knows_is_refused(values, tmp_path):
    Image.fromarray(values.reshape(2, 3)).save(tmp_path / "odd.tif")
    with pytest.raises(UserError, match="odd.tif: its numbers are fractions or beyond 16 bits"):
        read_image(tmp_path / "odd.tif")


def test_bilevel_sixteen_bit_and_animated_files_become_colour(tmp_path):
    bits = np.array([[0, 1], [1, 0]], bool)
    Image.fromarray(bits).save(tmp_path / "bits.png")
    assert read_image(tmp_path / "bits.png")[..., 0].tolist() == [[0, 255], [255, 0]]
    deep = np.array([[0, 257, 32_896], [65_535, 256, 65_000]], np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image.shape == (2, 3, 3) and image[..., 1].tolist() == [[0, 1, 128], [255, 0, 252]]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(deep).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png")[..., 0].tolist() == [[255, 0], [0, 1], [252, 128]]
    frames = [Image.new("RGB", (5, 4), color) for color in ("red", "blue")]
    for name in ("film.gif", "film.png", "film.webp"):
        exact = {"lossless": True} if "webp" in name else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **exact)
        assert read_image(tmp_path / name).tolist() == [[[255, 0, 0]] * 5] * 4, name


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's own words about the cut TIFF
@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.webp", "cut.gif", "cut.tif"])
def test_a_truncated_file_of_any_format_gives_one_sentence(name, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for length in (0, 10, len(whole) // 2):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(UserError) as e:
            read_image(tmp_path / name)
        assert f"{name}: not a picture that Pillow can read" in str(e.value) and "give a PNG" in str(e.value)
        assert "\n" not in str(e.value)


def test_a_very_long_picture_is_padded_without_its_square():
    """A strip of 12,000 x 30 pixels: the square of the whole needs 0.4 GB, and shows the same."""
    rng = np.random.default_rng(0)
    strip = np.repeat(rng.integers(0, 256, (12_000 // 500, 30, 3), np.uint8), 500, axis=0)
    p = Processor("pad", 24)
    for image in (strip, strip.transpose(1, 0, 2)):
        h, w = image.shape[:2]
        square = Image.new("RGB", (12_000, 12_000), tuple(int(255 * m) for m in p.mean))
        square.paste(Image.fromarray(image), ((12_000 - w) // 2, (12_000 - h) // 2))
        whole = to_pixels([np.asarray(square.reduce(20))], None, dataclasses.replace(p, how="squash"))
        assert (to_pixels([image], None, p) - whole).abs().max() < 0.06         # four grey levels


def test_a_palette_with_an_alpha_for_each_colour_keeps_its_colours(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 50, 60, 70, 1, 2, 3])
    palette.save(tmp_path / "p.png", transparency=bytes([0, 128, 255]))
    assert read_image(tmp_path / "p.png").tolist() == np.array(palette.convert("RGB")).tolist()
