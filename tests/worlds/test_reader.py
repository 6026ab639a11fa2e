"""A drawn scene is read as it was drawn, through noise, too; a cell without a thing is empty."""
from __future__ import annotations

import numpy as np

from data import BACKGROUND, Shapes, draw_scene
from support.worlds.reader import read_scene


def test_every_thing_of_every_scene_is_read():
    for split in ("val", "test"):
        world = Shapes(split)
        for i in range(40):
            rng = world.rng(i)
            things = world.scene(rng)
            picture = draw_scene(things, rng)
            expected = sorted(things, key=lambda t: t.cell)
            assert read_scene(picture) == expected
            noisy = np.clip(picture + rng.normal(0, 15, picture.shape), 0, 255).astype(np.uint8)
            assert [t.pair for t in read_scene(noisy)] == [t.pair for t in expected]


def test_background_and_faint_noise_are_no_things():
    empty = np.full((48, 48, 3), BACKGROUND, np.uint8)
    assert read_scene(empty) == []
    noisy = empty + np.random.default_rng(0).integers(0, 12, empty.shape).astype(np.uint8)
    assert read_scene(noisy) == []
