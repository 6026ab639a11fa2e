"""Claim: recipe clip on pictures with names ends with what is nearest to its own name, of each data set."""
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import data
import train
from papers.clip import ClipTask
from papers.naming import item_of_turn, report_naming
from papers.recipe import Ingredients
from support.formats.files import UserError
from support.worlds import open_data
from support.worlds.text import shapes_tokenizer
from support.worlds.things import FROM_WORLDS, Named, take_turns

COLORS = {"red": (220, 30, 30), "green": (30, 170, 50), "blue": (40, 60, 230), "black": (20, 20, 20)}


def bars(folder, colors, wide: bool):
    """Three pictures of a bar of each colour, lying or standing."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i, word in enumerate([*colors] * 3):
        picture = np.full((48, 48, 3), 255, np.uint8)
        part = picture[16 + i % 3:30, 4:44] if wide else picture[4:44, 16 + i % 3:30]
        part[:] = COLORS[word]
        Image.fromarray(picture).save(folder / "images" / f"{i}.png")
        text = f"{'a wide' if wide else 'an upright'} {word} bar"
        rows.append(json.dumps({"image": f"{i}.png", "text": text}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return f"folder:{folder}"


def test_a_run_on_two_folders_reports_the_known_and_the_held_out_of_each(tmp_path, capsys):
    specs = bars(tmp_path / "a", COLORS, True), bars(tmp_path / "b", ("red", "blue"), False)
    flags = f"--steps 2 --batch 4 --threads 1 --out {tmp_path / 'run'}".split()
    train.main(["--recipe", "clip", "--data", " + ".join(specs), "--augment", *flags])
    scores = json.loads((tmp_path / "run" / "naming.json").read_text())
    assert [row["pictures"] for row in scores.values()] == [11, 1, 5, 1]        # every tenth, or the last
    assert all(row["chance"] == pytest.approx(1 / 6) for row in scores.values())
    printed = capsys.readouterr().out
    assert "gate" in printed and "nearest to their own of 6 names" in printed
    config = json.loads((tmp_path / "run" / "clip" / "config.json").read_text())
    assert config["vision_config"]["hidden_size"] == 160
    old = load_file(tmp_path / "run" / "vit" / "model.safetensors")
    go_on = ["--init", str(tmp_path / "run"), *"--lr 1e-30 --steps 1 --batch 4 --threads 1".split()]
    train.main(["--recipe", "clip", "--data", specs[0], *go_on, "--out", str(tmp_path / "more")])
    new = load_file(tmp_path / "more" / "vit" / "model.safetensors")
    assert all(torch.allclose(old[name], new[name], atol=1e-6) for name in old)


def test_a_run_on_all_pictures_as_they_are_ends_and_says_what_its_gate_is_about(tmp_path, capsys):
    data = bars(tmp_path / "a", COLORS, True) + ":all"
    flags = f"--steps 2 --batch 4 --threads 1 --out {tmp_path / 'run'}".split()
    train.main(["--recipe", "clip", "--data", data, *flags])
    scores = json.loads((tmp_path / "run" / "naming.json").read_text())
    assert [row["pictures"] for row in scores.values()] == [12]
    assert "PASSED: of pictures as training shows them" in capsys.readouterr().out


def test_a_data_set_may_have_several_turns_in_a_row_and_shows_each_item_once():
    a, b = object(), object()
    drawn = [item_of_turn([a, a, a, b], i) for i in range(8)]
    assert [n for world, n in drawn if world is a] == [*range(6)]
    assert [n for world, n in drawn if world is b] == [0, 1]
    world = SimpleNamespace(name="emoji")
    assert take_turns([(world, 3.0), (world, 1.0)]) == [world] * 4
    with pytest.raises(UserError, match="emoji . 0.5: recipe clip gives a data set so many turns"):
        take_turns([(world, 0.5)])


def test_what_is_named_and_found_is_counted_over_all_names(capsys):
    """Pictures whose brightness is their name; a third one looks like the second and is named wrong."""
    class Clip(nn.Module):
        def embed_images(self, pixels):
            return F.normalize(torch.stack([pixels.mean((1, 2, 3)), torch.ones(len(pixels))], 1))

        def embed_texts(self, tokens):
            pictures = [np.full((8, 8, 3), t, np.uint8) for t in tokens]
            return self.embed_images(data.to_pixels(pictures, 8))
    class World:
        name = "greys"
    shown = {"a": 0, "b": 120, "c": 240}
    pictures = [np.full((8, 8, 3), grey, np.uint8) for grey in (0, 120, 121, 240)]
    clip = Clip()
    clip.vit = SimpleNamespace(config=SimpleNamespace(image_size=8))
    given = SimpleNamespace(device="cpu", worlds=[World()], processor=None,
                            track=lambda work, what: work, named_pictures=lambda world, track: [
                                Named("known greys", True, pictures, ["a", "b", "c", "c"])])
    task = SimpleNamespace(module=clip, given=given,
                           tokens=lambda names: torch.tensor([*map(shown.get, names)]))
    (scores,) = report_naming(task).values()
    assert scores["named"] == 0.75 and scores["chance"] == pytest.approx(1 / 3) and scores["pictures"] == 4
    assert scores["image to text R@1"] == 0.75 and scores["text to image R@1"] == 1.0
    printed = capsys.readouterr().out
    assert '"c" → "b"' in printed and "NOT PASSED: of known greys 75.0 %" in printed


def test_the_items_of_several_data_sets_take_turns_and_a_batch_is_a_function_of_its_step(tmp_path):
    specs = bars(tmp_path / "a", ("red",), True), bars(tmp_path / "b", ("blue",), False)

    def make() -> ClipTask:
        torch.manual_seed(0)
        worlds = [open_data(spec, renderings="train") for spec in specs]
        return ClipTask(Ingredients(torch.device("cpu"), 0, 4, 1, worlds[0], tokenizer=shapes_tokenizer(),
                                    worlds=worlds, **FROM_WORLDS))
    (a,), (b,) = make().batch(7), make().batch(7)
    assert torch.equal(a["pixels"], b["pixels"]) and torch.equal(a["tokens"], b["tokens"])
    texts = a["tokens"]
    assert len(texts) == 4                              # of names no false texts stand beside the batch's own
    assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[3])
    assert not torch.equal(texts[0], texts[1])


def test_augment_is_refused_where_captions_would_become_false(tmp_path):
    with pytest.raises(UserError, match="--augment: what is said of a picture of shapes"):
        train.main(["--augment", "--out", str(tmp_path / "run")])
