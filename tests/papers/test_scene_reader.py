"""The reader of scenes is right on every drawn picture, in noise too, and by chance finds next to nothing."""
from __future__ import annotations

import torch

import data
from data import Thing
from papers.scene_reader import count_found, draw_scenes, read_scenes


def test_drawn_scenes_are_read_exactly_and_another_pictures_words_are_not_found():
    scenes, pictures = draw_scenes(data.Shapes("test"), 0, 60)
    read = read_scenes(pictures)
    assert [set(a) for a in scenes] == [set(b) for b in read]
    assert count_found(scenes, read) == {"pictures": 1, "things": 1, "exact": 1}
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    assert count_found(scenes, read_scenes(pictures + 0.1 * noise))["exact"] == 1
    assert count_found(scenes, [*read[1:], read[0]])["pictures"] < 0.1


def test_what_counts_as_found():
    """Two equal pairs must be there twice; a place matters to `things` and `exact` alone."""
    a, b = Thing("red", "ring", "small", 0), Thing("red", "ring", "small", 4)
    blue = Thing("blue", "ring", "small", 4)
    assert count_found([[a, b]], [[a, blue]]) == {"pictures": 0, "things": 0.5, "exact": 0}
    assert count_found([[a]], [[b]]) == {"pictures": 1, "things": 0, "exact": 0}
    assert count_found([[a]], [[a, blue]]) == {"pictures": 1, "things": 1, "exact": 0}
