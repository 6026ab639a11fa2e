"""Claim: what a run was trained on is never called held-out; a length that leaves nothing to learn, a data
set without what a recipe learns from, a picture behind a link and a file of another format are refused."""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import train
from conftest import shapes_vlm
from data import Shapes
from support.formats.files import UserError
from support.formats.pictures import read_image
from support.worlds import open_data, open_split
from support.worlds.commands import main as show
from support.worlds.pairs import contrastive_pair
from support.formats import records, save_vlm
from support.plumbing.folder import clean_folder
from support.worlds.trained import earlier_sets, known_sets, name_split, training_sets

RUN = ["--bridge", "linear", "--steps", "1", "--batch", "2", "--dtype", "float32", "--device", "cpu",
       "--eval-items", "4", "--samples", "1"]


def own_pictures(folder: Path, count: int = 12, ending: str = ".png") -> str:
    """`folder:` with pictures of one colour each and their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((48, 48, 3), 20 * i, np.uint8)).save(folder / f"{i}{ending}")
    rows = [json.dumps({"image": f"{i}{ending}", "text": f"thing {i}"}) for i in range(count)]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return f"folder:{folder}"


# --- names of splits ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("trained, name", [
    (["shapes"], "held-out"), (["shapes:val"], "held-out"), (["shapes:test"], "trained-on"),
    (["shapes:all"], "trained-on"), (["shapes", "shapes-pages:test"], "trained-on"),
    (["shapes", "shapes-pages"], "held-out"),
])
def test_generated_items_are_held_out_unless_their_split_was_trained_on(trained, name):
    assert name_split(Shapes("test"), [open_data(spec) for spec in trained]) == name


def test_pictures_are_held_out_unless_the_run_met_one_of_them(tmp_path, monkeypatch):
    spec = own_pictures(tmp_path / "own")
    val = open_data(f"{spec}:val")
    for split, name in (("train", "held-out"), ("all", "trained-on"), ("val", "trained-on")):
        assert name_split(val, [open_data(f"{spec}:{split}")]) == name
        assert name_split(val, [Shapes(), open_data(f"{spec}:{split}")]) == name          # a sum
    monkeypatch.chdir(tmp_path)
    assert name_split(val, [open_data("folder:own:all")]) == "trained-on"                   # another spelling
    rows = [dict(instruction=f"{i}", output="x") for i in range(12)]
    (tmp_path / "alpaca_data.json").write_text(json.dumps(rows))                            # no pictures
    val = open_data(f"alpaca:{tmp_path}:val")
    assert name_split(val, [open_data(f"alpaca:{tmp_path}")]) == "held-out"
    assert name_split(val, [open_data(f"alpaca:{tmp_path}:all")]) == "trained-on"


def test_what_an_earlier_stage_met_counts_too(tmp_path):
    spec = own_pictures(tmp_path / "own")
    first, second = tmp_path / "first", tmp_path / "second"
    for run, settings in ((first, dict(data=f"{spec}:all", seed=0)),
                          (second, dict(data=f"shapes + {spec} * 0.5", seed=0, init=str(first)))):
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"settings": settings}))
    sets = training_sets(dict(data=spec, seed=0, init=str(second)))
    assert [world.split for world in sets] == ["train", "train", "train", "all"]
    assert name_split(open_data(f"{spec}:val"), sets) == "trained-on"
    assert name_split(open_data(f"{spec}:val"), sets[:3]) == "held-out"
    (first / "config.json").write_text(json.dumps({"settings": dict(data="folder:nowhere", seed=0)}))
    sets = training_sets(dict(data=spec, seed=0, init=str(first)))
    assert [type(each).__name__ for each in sets] == ["Files", "Unknown"] and earlier_sets("") == []
    assert name_split(open_data(f"{spec}:val"), sets) == "perhaps trained-on"
    assert name_split(Shapes("test"), sets) == "held-out"               # no folder holds generated pictures
    sets = training_sets(dict(data=spec, seed=0, init=str(tmp_path / "gone")))
    for world in (Shapes("test"), open_data(f"{spec}:val")):
        assert name_split(world, sets) == "perhaps trained-on"
    assert len(training_sets(dict(data=spec, seed=0, init=str(first), out=str(first)))) == 1


def test_a_set_that_changed_since_the_training_may_hold_what_was_trained_on(tmp_path, capsys):
    spec = own_pictures(tmp_path / "own")
    train.main(["--data", spec, "--out", str(tmp_path / "run"), *RUN])
    facts = json.loads((tmp_path / "run/config.json").read_text())
    assert [*facts["data_digests"]] == [spec]

    def named(asked: str, facts: dict = facts) -> str:
        return name_split(open_data(asked), known_sets(facts))

    other = own_pictures(tmp_path / "other", 11, ".bmp")
    assert named(f"{spec}:val") == named(f"{other}:val") == "held-out"
    before = open_data(f"{spec}:val").pictures
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "own/a.png")
    lines = (tmp_path / "own/captions.jsonl").read_text()
    (tmp_path / "own/captions.jsonl").write_text('{"image": "a.png", "text": "a"}\n' + lines)
    assert open_data(f"{spec}:val").pictures != before                      # one that training has met
    assert named(f"{spec}:val") == "perhaps trained-on" and named(f"{other}:val") == "held-out"
    assert named(f"{spec}:val", {"settings": facts["settings"]}) == "held-out"          # an older run
    later = {"settings": dict(data="shapes", seed=0, init=str(tmp_path / "run"))}
    assert named(f"{spec}:val", later) == "perhaps trained-on" and named("shapes:test", later) == "held-out"
    capsys.readouterr()
    evaluation.main([str(tmp_path / "run"), "--items", "2", "--device", "cpu"])
    assert "run, perhaps trained-on" in capsys.readouterr().out
    evaluation.main(["compare", str(tmp_path / "run"), "--items", "2", "--device", "cpu"])
    assert f"{spec} has changed since the run was trained on it" in capsys.readouterr().out


def coco(folder: Path, part: str, file: str) -> str:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "annotations" / f"captions_{part}.json").write_text(json.dumps({
        "images": [dict(id=42, file_name=file)], "annotations": [dict(image_id=42, caption="a dog")]}))
    (folder / part).mkdir(exist_ok=True)
    Image.new("RGB", (40, 30)).save(folder / part / file)
    return f"coco:{folder}:{part}"


def test_cocos_train2017_has_met_val2014_and_is_asked_about_val2017(tmp_path):
    trained = open_data(coco(tmp_path, "train2017", "000000000042.jpg"))
    coco(tmp_path, "val2014", "COCO_val2014_000000000042.jpg")
    coco(tmp_path, "val2017", "000000000042.jpg")
    assert name_split(open_data(f"coco:{tmp_path}:val2014"), [trained]) == "trained-on"
    assert trained.held_out == "val2017" and open_data(f"coco:{tmp_path}:val2014").held_out == "val2014"


@pytest.fixture(scope="module")
def run_on_all(tmp_path_factory):
    """(run folder, what training printed) of a run on all of a folder's pictures."""
    folder, patch = tmp_path_factory.mktemp("all"), pytest.MonkeyPatch()
    printed: list[str] = []
    patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
    try:
        train.main(["--data", f"{own_pictures(folder / 'own')}:all", "--out", str(folder / "run"), *RUN])
    finally:
        patch.undo()
    return folder / "run", "\n".join(printed)


def test_a_run_on_all_names_no_row_sample_or_page_held_out(run_on_all, capsys):
    run, printed = run_on_all
    report = printed.partition("trained  1 steps")[2]
    assert "trained-on 9.png" in report and "2 trained-on" not in report and "1 trained-on pictures" in report
    rows = [row["row"] for row in json.loads((run / "results.json").read_text())["rows"]]
    assert rows[:3] == ["linear, trained-on", "linear, seen", "linear, blind"]
    page = (run / "samples.html").read_text()
    assert "1 trained-on pictures" in page
    evaluation.main([str(run), "--items", "2", "--device", "cpu"])
    evaluation.main([str(run), "--saved"])
    out = capsys.readouterr().out
    assert out.count("run, trained-on") == 2 and "held-out" not in report + page + out


def test_a_comparison_says_in_a_footnote_what_was_trained_on(run_on_all, capsys):
    run, _ = run_on_all
    own = f"folder:{run.parent / 'own'}"
    for data, said in (([], True), (["--data", f"{own}:val"], True), (["--data", "shapes"], False)):
        evaluation.main(["compare", str(run), "--items", "2", "--device", "cpu", *data])
        out = capsys.readouterr().out
        assert ("run was trained on what" in out and "none of its cells is held-out" in out) == said


@pytest.mark.parametrize("facts, asked, said", [
    ({"settings": dict(data="folder:/nowhere/else", seed=0)}, "own", "/nowhere/else"),
    ({"settings": dict(data="folder:/nowhere/else", seed=0)}, "shapes", ""),
    ({"settings": dict(data="shapes * 2 + coco:/nowhere", seed=0)}, "own", "/nowhere"),
    ({}, "own", "does not say"), ({}, "shapes", ""),
    ({"settings": dict(data="shapes", seed=0, init="/nowhere/run")}, "shapes", "/nowhere/run"),
    ({"settings": dict(data="shapes", seed=0)}, "own", ""),
])
def test_a_comparison_says_where_it_cannot_know(facts, asked, said, tmp_path, capsys):
    vlm = shapes_vlm("linear")
    save_vlm(vlm, tmp_path / "run", facts, vit="weights/vit", decoder="weights/decoder")
    asked = own_pictures(tmp_path / "own") if asked == "own" else asked
    evaluation.main(["compare", str(tmp_path / "run"), "--items", "1", "--device", "cpu",
                     "--data", asked])
    out = capsys.readouterr().out
    assert ("cannot be known here" in out and "none of its cells is called held-out" in out) == bool(said)
    assert said in out


# --- a picture under two names ------------------------------------------------------------------------------

def twins(folder: Path, link: bool = False) -> str:
    """Twelve pictures, each under two names, whose captions stand far from each other."""
    spec = own_pictures(folder, 12)
    rows = [json.dumps({"image": f"{i}.png", "text": f"thing {i}"}) for i in range(12)]
    for i in range(12):
        if link:
            os.symlink(folder / f"{i}.png", folder / f"again-{i}.png")
        else:
            (folder / f"again-{i}.png").write_bytes((folder / f"{i}.png").read_bytes())
        rows.append(json.dumps({"image": f"again-{i}.png", "text": f"again {i}"}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return spec


@pytest.mark.parametrize("link", [False, True])
def test_two_names_of_one_picture_lie_in_one_split(tmp_path, link):
    spec = twins(tmp_path / "own", link)
    train_set, val = (open_data(f"{spec}:{split}") for split in ("train", "val"))
    numbers = [{Path(p).stem.removeprefix("again-") for p in world.pictures} for world in (train_set, val)]
    assert len(train_set) + len(val) == 24 and numbers[0] and numbers[1] and not numbers[0] & numbers[1]


def test_a_copy_of_a_data_set_is_the_same_pictures(tmp_path):
    spec = own_pictures(tmp_path / "own")
    shutil.copytree(tmp_path / "own", tmp_path / "copy")
    for file in (tmp_path / "copy").glob("*.png"):
        file.rename(file.with_name(f"x{file.name}"))
    captions = tmp_path / "copy/captions.jsonl"
    captions.write_text(captions.read_text().replace('"image": "', '"image": "x'))
    val = open_data(f"folder:{tmp_path / 'copy'}:val")
    assert name_split(val, [open_data(f"{spec}:all")]) == "trained-on"
    Image.new("RGB", (48, 48), (1, 2, 3)).save(tmp_path / "copy/x11.png")
    assert name_split(val, [open_data(f"{spec}:train")]) == "held-out"


def test_pictures_that_are_all_the_same_are_split_by_name_and_that_is_said(tmp_path, capsys):
    spec = own_pictures(tmp_path / "own")
    for i in range(12):
        Image.new("RGB", (8, 8)).save(tmp_path / f"own/{i}.png")
    assert len(open_data(f"{spec}:val")) == 1 and "are all the same" in capsys.readouterr().err


def test_only_files_of_one_size_are_read_and_a_missing_one_is_itself(tmp_path, monkeypatch):
    read = []
    end = records.end_digest
    monkeypatch.setattr(records, "end_digest", lambda path: read.append(path) or end(path))
    x = b"x" * 8999
    texts = {"a": x + b"x", "b": x + b"x", "c": b"y" + x, "d": b"", "e": b"", "f": b"z" * 7}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in (*texts, "gone")]
    names = {Path(p).name: Path(n).name for p, n in records.name_contents(paths).items()}
    assert names == {"a": "a", "b": "a", "c": "c", "d": "d", "e": "d", "f": "f", "gone": "gone"}
    assert {Path(p).name for p in read} == set("abcde")


# --- nothing to learn ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("longest", [2, 6, 10, 13])
def test_a_length_that_cuts_the_picture_or_the_whole_answer_is_refused_at_once(tmp_path, longest):
    spec = own_pictures(tmp_path / "own", 4)
    with pytest.raises(UserError, match=f"--longest {longest}: nothing is left .* takes 9 positions"):
        train.main(["--data", spec, "--out", str(tmp_path / "run"), "--longest", str(longest), *RUN])
    assert not (tmp_path / "run/log.jsonl").exists()


def vqa(folder: Path) -> str:
    part, ten = "train2014", [dict(answer="x", answer_id=k) for k in range(10)]
    (folder / part).mkdir(parents=True)
    questions = [dict(question_id=i, image_id=i, question="what?") for i in range(4)]
    facts = dict(question_type="is", answer_type="other", multiple_choice_answer="x", answers=ten)
    notes = [dict(question_id=i, **facts) for i in range(4)]
    (folder / f"v2_OpenEnded_mscoco_{part}_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / f"v2_mscoco_{part}_annotations.json").write_text(json.dumps({"annotations": notes}))
    for i in range(4):
        Image.new("RGB", (48, 48)).save(folder / part / f"COCO_{part}_{i:012d}.jpg")
    return f"vqav2:{folder}"


def test_stages_that_learn_from_captions_refuse_a_data_set_without(tmp_path):
    spec = vqa(tmp_path / "vqa")
    flags = ["--data", spec, "--out", str(tmp_path / "run"), "--steps", "1", "--batch", "2"]
    with pytest.raises(UserError, match="item [0-3]* is no picture with a caption; .* pairs of both"):
        train.main(["--recipe", "blip2-1", *flags])
    with pytest.raises(UserError, match="is no picture with a caption; this recipe"):
        contrastive_pair(open_data(spec), 0)
    (tmp_path / "alpaca_data.json").write_text(json.dumps([dict(instruction="a", output="b")]))
    with pytest.raises(UserError, match="is no picture with a caption"):
        contrastive_pair(open_data(f"alpaca:{tmp_path}:all"), 0)


# --- links and formats --------------------------------------------------------------------------------------

@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_that_leaves_the_folder_is_refused_unless_asked_for(tmp_path, what, capsys, monkeypatch):
    own_pictures(tmp_path / "elsewhere", 2)
    spec, inside = own_pictures(tmp_path / "own", 2), tmp_path / "own"
    os.symlink(inside / "1.png", inside / "link.png")                           # stays inside
    if what == "file":
        os.symlink(tmp_path / "elsewhere/0.png", inside / "out.png")
    else:
        os.symlink(tmp_path / "elsewhere", inside / "out")
    name = "out.png" if what == "file" else "out/0.png"
    with open(inside / "captions.jsonl", "a") as f:
        f.write("\n" + "\n".join(json.dumps({"image": i, "text": i}) for i in ("link.png", name)))
    world = open_data(f"{spec}:all")
    assert {world.item(i).captions[0] for i in range(4)} == {"thing 0", "thing 1", "link.png"}
    assert "a link that leaves" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"{name}: a link that leaves .*; --follow-links reads it"):
        [open_data(f"{spec}:all", strict=True).item(i) for i in range(4)]
    world = open_data(f"{spec}:all", strict=True, follow_links=True)
    assert len({world.item(i).captions[0] for i in range(4)}) == 4
    assert open_split(world, "val").follow_links and not open_split(open_data(spec), "val").follow_links
    monkeypatch.chdir(tmp_path)
    show([f"{spec}:all", "4", "--follow-links"])
    assert name in capsys.readouterr().out
    os.symlink(inside, tmp_path / "own2")                       # a data set may be a link itself
    assert open_data(f"folder:{tmp_path / 'own2'}:all").item(0).image is not None


@pytest.mark.parametrize("kind, file, content, sub", [
    ("folder", "captions.jsonl", {"image": "0.png", "text": "a"}, ""),
    ("llava", "chat.json", [{"id": 0, "image": "0.png", "conversations": [
        {"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "red"}]}], ""),
    ("coco", "annotations/captions_train2014.json", {
        "images": [dict(id=7, file_name="0.png")], "annotations": [dict(image_id=7, caption="a dog")]},
     "train2014/"),
])
def test_records_behind_a_link_are_refused_unless_named_or_asked_for(kind, file, content, sub, tmp_path):
    own, there = tmp_path / "own", tmp_path / "there.json"
    (own / file).parent.mkdir(parents=True)
    (own / sub).mkdir(exist_ok=True)
    Image.new("RGB", (40, 30)).save(own / sub / "0.png")
    there.write_text(json.dumps(content))
    os.symlink(there, own / file)
    spec, split = f"{kind}:{own}", "train" if kind == "coco" else "all"
    with pytest.raises(UserError, match=f"{file}: a link that leaves .*own; --follow-links reads it"):
        open_data(f"{spec}:{split}")
    assert len(open_data(f"{spec}:{split}", follow_links=True)) == 1
    if kind != "coco":                                  # whoever names the file means it
        assert open_data(f"{kind}:{own / file}:all").item(0).image is not None
    os.unlink(own / file)
    os.rename(there, own / "inside.json")
    os.symlink(own / "inside.json", own / file)                 # stays inside
    assert len(open_data(f"{spec}:{split}")) == 1
    os.symlink(own, tmp_path / "link")
    assert len(open_data(f"{kind}:{tmp_path / 'link'}:{split}")) == 1


@pytest.mark.parametrize("format, read", [("PNG", True), ("JPEG", True), ("WEBP", True), ("GIF", True),
                                          ("BMP", True), ("TIFF", True), ("PPM", True), ("EPS", False),
                                          ("PDF", False), ("ICO", False), ("TGA", False), ("SGI", False)])
def test_pillow_opens_the_formats_that_are_named_and_no_other(tmp_path, format, read):
    file = tmp_path / "picture.png"                                             # whatever it is called
    Image.new("RGB", (20, 30), "red").save(file, format)
    if read:
        assert read_image(file).shape == (30, 20, 3)
    else:
        with pytest.raises(UserError, match="not a picture that Pillow can read .*; give a PNG, JPEG or"):
            read_image(file)


def test_sets_too_large_to_compare_by_content_are_said_so_once(tmp_path, monkeypatch, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for n in range(12):
            Image.new("RGB", (4, 4), (n, 0, 0)).save(tmp_path / name / f"{name}{n}.png")
            (tmp_path / name / f"{name}{n}.txt").write_text("a cat")
    one, two = (open_data(f"folder:{tmp_path / name}:all") for name in ("one", "two"))
    assert name_split(one, [two]) == "trained-on"
    monkeypatch.setattr("support.worlds.trained.MOST_COMPARED", 5)
    assert name_split(one, [two]) == name_split(one, [two]) == "held-out"
    assert capsys.readouterr().err.count("are compared by path and COCO's numbers alone") == 1


def test_a_folder_that_a_run_does_not_write_survives_the_next_run(tmp_path):
    """cm3's decoder learns and lies in model.safetensors; a folder called decoder is not the run's."""
    for recipe, stays in (("cm3", True), ("lm", False)):
        out = tmp_path / recipe
        (out / "decoder").mkdir(parents=True)
        (out / "config.json").write_text(json.dumps({"settings": {"recipe": recipe}}))
        clean_folder(out, train.RECIPES, ())
        assert (out / "decoder").exists() == stays


def test_runs_that_name_each_other_as_their_start_end(tmp_path):
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / name).mkdir()
        settings = {"data": "shapes", "seed": 0, "init": str(tmp_path / other), "out": str(tmp_path / name)}
        (tmp_path / name / "config.json").write_text(json.dumps({"settings": settings}))
    assert [world.name for world in earlier_sets(str(tmp_path / "one"))] == ["shapes", "shapes"]
    assert [world.name for world in training_sets(settings)][0] == "shapes"
