"""The measurements that the papers' miniatures bring along are what their tables say."""
from __future__ import annotations

from types import SimpleNamespace

from data import Item
from support.lab.miniatures import limber


def test_what_a_caption_says_is_compared_at_the_place_of_each_thing(monkeypatch):
    about = "a large orange cross at the top left; a small blue ring at the top right"
    items = [Item(None, [], [], "a", "a small red ring at the top left"), Item(None, [], [], "b", about)]
    captions = ["a large red ring at the top left and a small red ring at the top right",
                "a large orange ring at the top left"]
    monkeypatch.setattr(limber, "evaluate", lambda *_: {"captions": captions})
    found = limber.measure_said(SimpleNamespace(vlm=None, tokenizer=None, items=items))
    assert found == {"size said": 1 / 3, "color said": 2 / 3, "shape said": 1 / 3}
