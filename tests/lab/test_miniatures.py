"""The measurements that the papers' miniatures bring along are what their tables say."""
from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from conftest import shapes_vlm
from data import Item
from model import VLM
from support.lab.miniatures import kosmos1, limber
from support.worlds.text import shapes_tokenizer

TOKENIZER = shapes_tokenizer()


def test_what_a_caption_says_is_compared_at_the_place_of_each_thing(monkeypatch):
    about = "a large orange cross at the top left; a small blue ring at the top right"
    items = [Item(None, [], [], "a", "a small red ring at the top left"), Item(None, [], [], "b", about)]
    captions = ["a large red ring at the top left and a small red ring at the top right",
                "a large orange ring at the top left"]
    monkeypatch.setattr(limber, "evaluate", lambda *_: {"captions": captions})
    found = limber.measure_said(SimpleNamespace(vlm=None, tokenizer=None, items=items))
    assert found == {"size said": 1 / 3, "color said": 2 / 3, "shape said": 1 / 3}


def test_the_loss_of_text_is_per_learned_token():
    """A decoder whose words are zeros has ln V."""
    vlm: VLM = shapes_vlm("kosmos1", queries=2, heads=4)
    learned = kosmos1.measure_text(SimpleNamespace(vlm=vlm, tokenizer=TOKENIZER))["text loss"]
    vlm.decoder.embed.weight.data.zero_()
    zero = kosmos1.measure_text(SimpleNamespace(vlm=vlm, tokenizer=TOKENIZER))["text loss"]
    assert zero == pytest.approx(math.log(vlm.decoder.config.vocab_size)) and 0 < learned < zero
