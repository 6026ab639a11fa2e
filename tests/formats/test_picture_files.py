"""Claim: a picture file of any mode and orientation is read as the published processors read it, and a
file that cannot be read gives one sentence."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from support.formats.files import UserError
from support.formats.pictures import read_image


def save(path, mode, size=(6, 4), color=None, **kw):
    Image.new(
        mode,
        size,
        color or {"L": 200, "P": 3, "RGB": (10, 20, 30), "RGBA": (10, 20, 30, 0), "LA": (200, 0)}[mode],
    ).save(path, **kw)
    return path


def test_grey_palette_and_transparent_pictures_become_colour(tmp_path):
    assert read_image(save(tmp_path / "l.png", "L")).tolist() == [[[200] * 3] * 6] * 4
    assert read_image(save(tmp_path / "la.png", "LA")).tolist() == [[[200] * 3] * 6] * 4
    assert (
        read_image(save(tmp_path / "a.png", "RGBA")).tolist() == [[[10, 20, 30]] * 6] * 4
    )  # alpha is dropped
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    image = read_image(tmp_path / "p.png")
    assert image[1, 1].tolist() == [50, 60, 70] and image[0, 0].tolist() == [
        255,
        255,
        255,
    ]  # a transparent colour is white


def test_a_photograph_is_turned_upright(tmp_path):
    image = Image.new("RGB", (6, 4))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise to view
    image.save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png")
    assert turned.shape == (6, 4, 3) and turned[0, 3].tolist() == [255, 0, 0]


def refused(path) -> str:
    with pytest.raises(UserError) as e:
        read_image(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    return str(e.value)


def test_a_file_that_is_no_picture_gives_one_sentence(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").touch()
    for name in ("text.png", "empty.jpg"):
        assert "not a picture that Pillow can read" in refused(tmp_path / name)
    assert "no such picture file" in refused(tmp_path / "missing.png")
    refused(tmp_path)                                                           # a folder


def test_a_truncated_picture_gives_one_sentence(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for name in ("cut.png", "cut.jpg"):
        noise.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for length in (10, len(whole) // 2, len(whole) - 30):
            (tmp_path / name).write_bytes(whole[:length])
            assert "not a picture that Pillow can read" in refused(tmp_path / name)


@pytest.mark.parametrize("w, h", [(20_001, 1), (1, 20_001), (30_000, 30_000), (19_000, 19_000)])
def test_a_huge_picture_is_refused_before_it_is_decoded(w, h, tmp_path):
    """The file holds a PNG header and no pixels, so that any attempt to decode it would end in another
    sentence."""
    chunk = lambda kind, body: (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    )
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    assert f"{w} x {h} pixels" in refused(tmp_path / "bomb.png")
