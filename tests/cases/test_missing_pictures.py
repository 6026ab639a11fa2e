"""Strangers' reports about evaluations: pictures that are missing on disk, items that have none."""
from __future__ import annotations

import json
import re

import pytest
import torch

import data
import train
from support.formats.files import UserError
from support.lab.compare import compare_runs
from support.lab.measures import Settings
from support.lab.protocols import few_shot_examples
from support.worlds import open_data, open_split, take_items
from test_papers_protocols import picture, scienceqa, vqav2

QUICK = ["--dtype", "float32", "--device", "cpu", "--eval-items", "8", "--log-every", "1", "--steps", "1",
         "--batch", "2"]


@pytest.fixture
def torn(tmp_path) -> str:
    """VQAv2 with six pictures in each split, of which one is missing in val, and another in train."""
    vqav2(tmp_path, 6)
    (tmp_path / "val2014/COCO_val2014_000000000002.jpg").unlink()
    (tmp_path / "train2014/COCO_train2014_000000000004.jpg").write_bytes(b"no picture")
    return f"vqav2:{tmp_path}"


def test_an_evaluation_asks_about_each_picture_once_and_counts_the_missing(torn, capsys):
    world = open_data(torn)
    ids = [item.id for item in take_items(open_split(world, "val"), 400)]
    assert sorted(ids) == sorted(f"{10 * i + 1}" for i in (0, 1, 3, 4, 5))
    assert "note: 1 of 6 items" in capsys.readouterr().err
    trained = [world.item(i).id for i in range(6)]      # training goes on with the next item instead
    assert len(trained) == 6 and len(set(trained)) == 5 and "41" not in trained


def test_the_comparison_and_its_official_file_have_no_neighbour_of_a_missing_picture(torn, untrained_run,
                                                                                    tmp_path):
    settings = Settings((f"{torn}:val",), shots=(0, 2), folder=str(tmp_path / "pred"))
    rows, notes = compare_runs([untrained_run], settings)
    assert any("1 items are missing" in note for note in notes), notes
    assert any("0-shot.json holds 5 of the 6 questions" in note for note in notes), notes
    for shots in (0, 2):
        file, = (tmp_path / "pred").glob(f"*-vqav2-{shots}-shot.json")
        assert sorted(row["question_id"] for row in json.loads(file.read_text())) == [1, 11, 31, 41, 51]
    train_split = open_split(open_data(torn), "train")
    item = open_data(f"{torn}:val").item(0)
    for seed in range(5):                               # no example twice, none without its picture
        ids = [example.id for example in few_shot_examples(train_split, item, 4, seed)]
        assert len(set(ids)) == 4 and "41" not in ids


def test_training_reports_on_what_can_be_read(torn, tmp_path, capsys):
    train.main(["--bridge", "linear", "--data", torn, "--out", str(tmp_path / "run"), *QUICK])
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["items"] == 5 and "note: 1 of 6 items" in capsys.readouterr().err


def test_a_split_without_any_readable_picture_is_said_and_what_was_trained_is_kept(torn, tmp_path, capsys):
    for file in (tmp_path / "val2014").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="not one of its pictures can be read"):
        take_items(open_split(open_data(torn), "val"), 9)
    train.main(["--bridge", "linear", "--data", torn, "--out", str(tmp_path / "run"), *QUICK])
    assert "warning: no final table" in capsys.readouterr().err
    assert (tmp_path / "run/bridge.safetensors").exists()


@pytest.mark.parametrize("seed", ["0", "1"])            # whichever kind of item comes first
def test_training_on_items_with_and_without_a_picture_ends_with_its_table(seed, tmp_path):
    run = tmp_path / "run"
    train.main(["--bridge", "linear", "--data", f"scienceqa:{scienceqa(tmp_path)}", "--out", str(run),
                "--seed", seed, *QUICK])
    results = json.loads((run / "results.json").read_text())
    assert results["items"] == 4 and all("mean" in row for row in results["rows"])
    chance = next(row for row in results["rows"] if row["row"].startswith("chance"))
    assert chance["mean"] == 1                          # the right choice is B, always
    page = (run / "samples.html").read_text()
    assert page.count("<article>") == 4 and page.count("<img") == 2


def test_recall_on_fewer_than_100_held_out_pictures_is_1_for_a_model_that_is_always_right(tmp_path):
    count, lines = 40, []
    for i in range(count):
        picture(tmp_path / f"d/{i}.png", 6 * i)
        lines.append(json.dumps({"image": f"{i}.png", "text": f"thing {i}"}))
    (tmp_path / "d/captions.jsonl").write_text("\n".join(lines))
    s = train.with_recipe(train.Settings(recipe="blip2-1", data=f"folder:{tmp_path / 'd'}", batch=2, steps=1,
                                         dtype="float32", device="cpu"), "blip2-1")
    ranks = train.Ranks(s.device, s.compile, s.shard)
    task = train.load_task(s, train.RECIPES["blip2-1"], ranks, [(open_data(s.data), 1.0)], torch.float32)

    def perfect(pixels, tokens, mask):                  # knows each caption's picture: "thing i" has grey 6 i
        words = [task.tokenizer.decode(row[real].tolist()) for row, real in zip(tokens, mask)]
        numbers = [re.search(r"thing\s*([\d ]+)", w)[1].replace(" ", "") for w in words]
        wanted = torch.tensor([6.0 * int(number) for number in numbers])
        p = task.given.processor or data.Processor()
        red = (pixels[:, 0, 5, 5] * p.std[0] + p.mean[0]) * p.levels
        return -(red[:, None] - wanted[None]).abs()
    task.module.itc = perfect
    assert min(task.check().values()) == 1
