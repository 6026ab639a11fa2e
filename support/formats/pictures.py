"""formats/pictures.py: picture files, and what published image processors do to pictures.

chapters: read_image · PROCESSORS, presets by kind of tower · load_processor and read_processor for the
preprocessor_config.json of a folder · Llama-3.2-Vision's tiles. data.to_pixels applies a square Processor.
Sources: transformers 5.23 (CLIP, SigLIP, BLIP, IDEFICS, Mllama image processors), LLaVA at c121f04 (padding).
"""
from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data import Processor, normalize
from support.formats.files import UserError, note, read_json, refuse_device
from support.formats.honoured import PROCESSOR, refuse_unknown
from support.formats.hub import tower_folder

FILE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")       # Pillow opens no other one
LARGEST_SIDE, LARGEST_AREA = 20_000, 200_000_000        # pixels; what is larger is hardly a photograph


def read_image(path: str | Path | io.BytesIO) -> np.ndarray:
    """A picture file, on the disk or in memory → (h, w, 3) uint8, turned upright by its EXIF tag.

    As the published processors do: an alpha channel is dropped, one of a palette's colours, too, but a
    single transparent colour becomes white; of several frames the first is read. Sixteen bits a pixel become
    eight (theirs lets everything above 255 be white). What has fractions, or more bits, is refused: whether
    white is 1, 255 or another number stands in no file.
    """
    if not isinstance(path, io.BytesIO):
        refuse_device(path)
    Image.MAX_IMAGE_PIXELS = None                       # the check below is ours, and says what to do
    try:
        with Image.open(path, formats=FILE_FORMATS) as image:      # the header; exif_transpose reads the rest
            w, h = image.size
            if max(w, h) > LARGEST_SIDE or w * h > LARGEST_AREA:
                raise UserError(f"{path}: {w} x {h} pixels; at most {LARGEST_SIDE:,} a side and "
                                f"{LARGEST_AREA:,} in all are read, scale it down first.")
            image = ImageOps.exif_transpose(image)
            darkest, brightest = image.getextrema() if image.mode in ("I", "F") else (0, 0)
            if image.mode == "F" or darkest < 0 or brightest > 65_535:
                raise UserError(f"{path}: its numbers are fractions or beyond 16 bits, so nothing says what "
                                "is white; save it with 8 or 16 bits a pixel.")
            if image.mode.startswith("I"):              # 65,535 = 255 · 257 is white
                image = Image.fromarray((np.asarray(image).clip(0, 65_535) // 257).astype(np.uint8))
            if hides_colours(image):
                note("note: transparent parts of pictures show the colours that are hidden there, often "
                     "black, as the published processors have it; save such pictures on a background")
            if isinstance(image.info.get("transparency"), bytes):    # an alpha for each colour
                del image.info["transparency"]
            if "transparency" in image.info:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture file.") from None
    except UserError:
        raise
    except Exception as e:                    # Pillow raises OSError, SyntaxError, ValueError, struct.error …
        raise UserError(f"{path}: not a picture that Pillow can read ({type(e).__name__}); "
                        "give a PNG, JPEG or WebP file.") from None


def hides_colours(image: Image.Image) -> bool:
    """Whether a pixel has an alpha below 255: one of its own, or its colour's in the palette."""
    if image.mode in ("RGBA", "LA"):
        return image.getchannel("A").getextrema()[0] < 255
    alphas = image.info.get("transparency")
    return isinstance(alphas, bytes) and any(alphas[n] < 255 for _, n in image.getcolors(256)
                                             if n < len(alphas))


PROCESSORS = {
    "clip": Processor(),
    "llava_pad": Processor("pad", 336),                 # LLaVA-1.5, stage 2 and inference; stage 1 has CLIP's
    "siglip": Processor("squash", mean=(0.5,) * 3, std=(0.5,) * 3),
    "dinov2": Processor("crop", 224, 256 / 224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "blip": Processor("squash"),                        # BLIP-2 and InstructBLIP; IDEFICS's is the same
    "mllama": Processor("tiles", 560, resample=2),      # Llama-3.2-Vision
}
# image_processor_type without its ending, or how the model_type of a tower begins → preset
PROCESSOR_KINDS = {
    "clip": "clip", "bit": "clip", "llava": "clip", "siglip": "siglip", "dinov2": "dinov2",
    "blip": "blip", "instructblip": "blip", "idefics": "blip", "mllama": "mllama",
}


def load_processor(folder: str | Path) -> Processor:
    """The image processor of a tower, a published model or a run.

    It is that of processor_config.json ("image_processor": transformers 5), else of preprocessor_config.json,
    else of the tower that config.json names (LLaVA's mm_vision_tower, our runs), else the preset of the kind
    of tower. LLaVA's image_aspect_ratio "pad" pads.
    """
    folder = Path(folder)
    c = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    file, nesting = folder / "preprocessor_config.json", folder / "processor_config.json"
    nested = read_json(nesting).get("image_processor") if nesting.exists() else None
    tower = c.get("mm_vision_tower") or ("bridge" in c and c.get("vit"))
    if nested is not None:
        p = read_processor(nested, f"{nesting}: image_processor")
    elif file.exists():
        p = read_processor(read_json(file), file)
    elif tower:
        p = load_processor(tower_folder(folder, tower))
    else:
        vision = c.get("vision_config") or c
        kind = vision.get("model_type") or c.get("model_type", "")
        preset = next((preset for k, preset in PROCESSOR_KINDS.items() if kind.startswith(k)), "clip")
        p = PROCESSORS[preset]
        p = replace(p, size=vision.get("image_size", p.size))
    return replace(p, how="pad") if c.get("image_aspect_ratio") == "pad" else p


def read_processor(c: dict, file: str | Path) -> Processor:
    """The fields of a preprocessor_config.json; one that is absent or null is as in PROCESSORS.

    Sizes are numbers (older files), {"shortest_edge": 224} or {"height": 224, "width": 224}; the last one
    squashes, to a rectangle where its two numbers differ.
    """
    refuse_unknown(c, str(file), PROCESSOR)
    c = {k: v for k, v in c.items() if v is not None}
    name = c.get("image_processor_type", c.get("feature_extractor_type", "CLIPImageProcessor"))
    kind = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", name).lower()
    if kind not in PROCESSOR_KINDS:
        raise UserError(f'{file}: the image processor "{name}" is not known here; '
                        f'known: {", ".join(PROCESSOR_KINDS)}.')
    p = PROCESSORS[PROCESSOR_KINDS[kind]]

    def side(value) -> int:
        sides = value if isinstance(value, dict) else {"height": value, "width": value}
        if set(sides) not in ({"shortest_edge"}, {"height", "width"}) or len(set(sides.values())) > 1:
            raise UserError(f"a size of {json.dumps(value)} makes no square, and the ViTs here read squares")
        return int(min(sides.values()))

    columns = None
    try:
        size = c.get("size", c.get("image_size", p.size))
        how, crop = p.how, c.get("do_center_crop", p.how == "crop")
        if how != "tiles" and isinstance(size, dict):
            how = "crop" if "shortest_edge" in size else "squash"
        if not c.get("do_resize", True) or how == "crop" and not crop:
            raise UserError("do_resize or, with shortest_edge, do_center_crop is false, and the ViTs here "
                            "read squares")
        stretched = how == "squash" and not crop
        if stretched and isinstance(size, dict) and set(size) == {"height", "width"}:
            columns = None if size["width"] == size["height"] else size["width"]
            size = size["height"]
        S = side(c.get("crop_size", size)) if crop else side(size)
        scale = c.get("rescale_factor", 1 / 255) if c.get("do_rescale", True) else 1.0
        mean, std = c.get("image_mean", p.mean), c.get("image_std", p.std)
        if not c.get("do_normalize", True):
            mean, std = 0, 1
        mean, std = (tuple(float(x) for x in np.broadcast_to(numbers, 3)) for numbers in (mean, std))
        if c.get("do_pad") and kind == "llava":         # the others' code pads no single picture
            how = "pad"
        return Processor(how, S, side(size) / S, c.get("resample", p.resample), 1 / scale, mean, std,
                         c.get("max_image_tiles", p.tiles), columns)
    except (TypeError, ValueError, ZeroDivisionError) as e:
        why = f"one of its numbers is not what it should be ({e})"
        if isinstance(e, UserError):
            why = str(e).rstrip(".")
        raise UserError(f"{file}: {why}; correct the file, or remove it and the tower's kind "
                        "decides.") from None


def canvases(tiles: int) -> list[tuple[int, int]]:
    """Every (rows, columns) of at most so many tiles; counted from 1 they are Llama-3.2-Vision's
    aspect_ratio_ids."""
    return [(r, c) for r in range(1, tiles + 1) for c in range(1, tiles + 1) if r * c <= tiles]


def fit_canvas(h: int, w: int, S: int, tiles: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) of the canvas for an h × w picture, and the height and width of the picture on it.

    The canvas that enlarges the picture least, or where all of them shrink it the one that shrinks it least;
    among equals the smallest. The picture is then enlarged only until it spans one tile one way.
    """
    scale = {(r, c): min(S * r / h, S * c / w) for r, c in canvases(tiles)}
    best = min((s for s in scale.values() if s >= 1), default=max(scale.values()))
    r, c = min((canvas for canvas, s in scale.items() if s == best), key=math.prod)
    height, width = min(max(h, S), S * r), min(max(w, S), S * c)
    if width / w < height / h:
        return (r, c), (max(1, int(h * (width / w))), width)
    return (r, c), (height, max(1, int(w * (height / h))))


def tile_pixels(images: list[np.ndarray], size: int | None = None, max_tiles: int | None = None,
                processor: Processor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 (h, w, 3) pictures → pixels (M, tiles, 3, S, S), aspect_ratio_ids (M,) int64, mask (M, tiles)
    bool.

    Llama-3.2-Vision's processor (transformers, MllamaImageProcessor): a picture stands in the upper left of
    its canvas, the rest is black, and the canvas is cut into tiles row by row. Missing tiles are 0, their
    mask False. Defaults: size S and max_tiles are the processor's; the processor is PROCESSORS["mllama"], 560
    pixels, 4 tiles.
    """
    p = processor or PROCESSORS["mllama"]
    S, tiles = size or p.size, max_tiles or p.tiles
    pixels, ids = torch.zeros(len(images), tiles, 3, S, S), []
    mask = torch.zeros(len(images), tiles, dtype=torch.bool)
    assert p.how == "tiles", "to_pixels makes squares"
    for m, image in enumerate(images):
        (r, c), (h, w) = fit_canvas(*image.shape[:2], S, tiles)
        canvas = np.zeros((r * S, c * S, 3), np.uint8)                      # black
        canvas[:h, :w] = Image.fromarray(image).resize((w, h), p.resample)
        squares = canvas.reshape(r, S, c, S, 3).swapaxes(1, 2)             # (r, S, c, S, 3) → (r, c, S, S, 3)
        squares = squares.reshape(r * c, S, S, 3)
        pixels[m, :r * c], mask[m, :r * c] = normalize(squares, p), True
        ids.append(canvases(tiles).index((r, c)) + 1)
    return pixels, torch.tensor(ids), mask
