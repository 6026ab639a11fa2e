"""The full comparison: what is kept is not written twice; the official files are read back to the table's own
numbers; Overall is the documents'."""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data
import eval as evaluation
import train
from conftest import GOLDEN
from model import IMAGE
from support.formats.benchmarks import mme_scores, scienceqa_accuracy, scienceqa_choice
from support.formats.datasets import MME, read_mme
from support.formats.files import UserError
from support.formats.vlm import open_run
from support.lab.compare import bridge_of, compare_runs, format_comparison, overall_means, published_rows
from support.lab.measures import NO_OPEN_QUESTIONS, Settings, build_questions, measure_cells, open_set
from support.lab.protocols import Comparison
from support.worlds import open_data

SETS = GOLDEN / "datasets"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs of a few steps."""
    out = tmp_path_factory.mktemp("runs")
    quick = ["--steps", "4", "--batch", "8", "--dtype", "float32", "--eval-items", "1", "--samples", "0"]
    for bridge in ("mapl", "flamingo", "zero_init"):
        train.main(["--bridge", bridge, *quick, "--out", str(out / bridge)])
    return {bridge: str(out / bridge) for bridge in ("mapl", "flamingo", "zero_init")}


def test_flamingos_zero_shot_shows_two_examples_in_words(runs, monkeypatch):
    vlm, tokenizer, _ = open_run(runs["flamingo"], "cpu")
    asked = {}

    def record(self, keys, documents, items, max_new_tokens=0):
        if keys:
            asked[keys[0].split(",")[0]] = documents, items
        return ["0"] * len(keys) if max_new_tokens else [0.0] * len(keys)
    monkeypatch.setattr(Comparison, "texts", record)
    monkeypatch.setattr(Comparison, "log_likelihoods", record)
    settings = Settings(protocol="flamingo", shots=(0, 4), count=2)
    measure_cells(Comparison(vlm, tokenizer), open_set("shapes", settings), settings)
    for measure, pictures, examples in (
            ("CIDEr", 1, 2), ("0-shot", 1, 2), ("4-shot", 5, 4), ("MME", 1, 2), ("SQA rank", 1, 0)):
        documents, items = asked[measure]
        for document, row in zip(documents, items):
            end = measure == "SQA rank"  # the option ends with a stop token
            assert document.tokens.count(IMAGE) == pictures == sum(i.image is not None for i in row)
            assert document.tokens.count(tokenizer.eos) == examples + end


def test_a_bridge_for_one_picture_leaves_its_few_shot_cells_empty_and_says_why(runs):
    rows, notes = compare_runs([runs["zero_init"]], Settings(shots=(0, 4), count=3))
    assert ("0-shot",) in rows[0]["cells"] and ("4-shot",) not in rows[0]["cells"]
    assert ("4-shot",) in rows[-1]["cells"]
    note, = notes
    assert note.startswith("zero_init, 4-shot is empty: zero_init takes one image per text")


# the table

def test_the_table_has_each_run_its_blind_row_and_chance(runs, capsys):
    rows, _ = compare_runs([runs["mapl"], runs["flamingo"]], Settings(count=5))
    assert [r["row"] for r in rows] == ["mapl", "mapl, blind", "flamingo", "flamingo, blind", "chance"]
    assert rows[0]["trained"] == 300_032 and rows[0]["examples"] == 32 and "trained" not in rows[1]
    measures = {("CIDEr",), ("B@4",), ("0-shot",), ("4-shot",), ("8-shot",), ("SQA rank",), ("MME",)}
    assert {k for k in rows[0]["cells"] if len(k) == 1} == measures
    kinds = [rows[0]["cells"][(kind, "0-shot")] for kind in data.KINDS]
    assert rows[0]["cells"][("0-shot",)] == pytest.approx(np.mean(kinds))   # Overall of a generated world
    tasks = [rows[0]["cells"][(kind, "MME")] for kind in data.KINDS]
    assert rows[0]["cells"][("MME",)] == pytest.approx(sum(tasks)) and rows[-1]["cells"][("MME",)] == 300
    assert rows[-1]["cells"][("SQA rank",)] > 25


def test_pictures_read_alone_have_rows_of_their_own(runs, tmp_path):
    settings = Settings(shots=(0, 1), count=3, alone=True, folder=str(tmp_path))
    rows, notes = compare_runs([runs["mapl"], runs["flamingo"]], settings)
    assert [r["row"] for r in rows] == ["mapl-alone", "mapl-alone, blind", "flamingo", "flamingo, blind",
                                        "chance"]
    assert any(note.startswith("flamingo has no soft tokens that could be read alone") for note in notes)
    assert (tmp_path / "mapl-alone.jsonl").exists() and not (tmp_path / "mapl.jsonl").exists()


def test_overall_is_the_documents_mean_over_data_sets():
    rows, notes = published_rows(["mapl", "frozen", "flamingo", "qformer"])
    by_name = {r["row"]: r["cells"] for r in rows}
    for name, printed in (
        ("MAPL", (44.49, 7.45, 16.84, 24.18, 24.36)),
        ("Frozen", (10.94, 3.1, 10.23, 18.52, 20.35)),
    ):
        found = [by_name[f"[{name}]"][(m,)] for m in ("CIDEr", "B@4", "0-shot", "4-shot", "8-shot")]
        assert found == pytest.approx(printed, abs=0.0051)  # they are printed with two decimals
    assert by_name["[BLIP-2]"][("MME",)] == 516.66 and len(rows) == len(notes)
    cells = {("a", "0-shot"): 10.0, ("b", "0-shot"): 20.0, ("a", "SQA"): 1.0}
    assert overall_means(cells, {"0-shot": ["a", "b"], "SQA": ["a", "b"]}) == {("0-shot",): 15.0}


def test_a_bridge_without_a_published_row_has_a_footnote(tmp_path):
    rows, notes = published_rows(["cogvlm", "linear"])
    assert [row["row"] for row in rows] == ["[LLaVA 13B]"] and notes[0] == "no published row of cogvlm"
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert bridge_of(str(tmp_path)) == tmp_path.name     # a model that others trained is called by its name


def test_text_markdown_and_csv_hold_the_same_cells():
    rows = [
        {"row": "mapl", "trained": 300032, "examples": 51200,
         "cells": {("0-shot",): 86.54, ("color", "0-shot"): 82.0}},
        {"row": "mapl, blind", "cells": {("MME",): 150.0}},
        *published_rows(["linear"])[0],
    ]
    assert format_comparison(rows).splitlines() == [
        "             trained  examples  0-shot   SQA    MME",
        "mapl         300,032    51,200    86.5",
        "mapl, blind                                   150.0",
        "[LLaVA 13B]      13B      158K          90.9"]
    assert format_comparison(rows, "markdown").splitlines()[:3] == [
        "|             | trained | examples | 0-shot |  SQA |   MME |",
        "| ----------- | ------: | -------: | -----: | ---: | ----: |",
        "| mapl        | 300,032 |   51,200 |   86.5 |      |       |"]
    table = [*csv.reader(io.StringIO(format_comparison(rows, "csv", each=True)))]
    assert table[0] == ["", "trained", "examples", "color 0-shot", "Overall 0-shot", "Overall SQA",
                        "Overall MME"]
    assert table[1] == ["mapl", "300032", "51200", "82.00", "86.54", "", ""] and table[2][0] == "mapl, blind"


# predictions on disk

@pytest.fixture(scope="module")
def predicted(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictions")
    specs = [f"{kind}:{SETS / kind}" for kind in ("vqav2", "scienceqa", "mme")]
    settings = Settings(tuple(specs), shots=(0, 1), folder=str(folder))
    rows, notes = compare_runs([runs["mapl"]], settings)
    assert not notes
    return folder, settings, rows[0]["cells"]


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_official_files_are_read_back_to_the_cells_of_the_table(predicted):
    folder, _, cells = predicted
    truth = {
        a["question_id"]: a["answers"]
        for a in read(SETS / "vqav2" / "v2_mscoco_val2014_annotations.json")["annotations"]
    }
    for k in (0, 1):
        said = read(folder / f"mapl-vqav2-{k}-shot.json")
        assert {s["question_id"] for s in said} == set(truth)
        assert all(set(s) == {"question_id", "answer"} for s in said)
        scores = [
            evaluation.vqa_accuracy(s["answer"], [a["answer"] for a in truth[s["question_id"]]]) for s in said
        ]
        assert cells[("vqav2", f"{k}-shot")] == cells[(f"{k}-shot",)] == pytest.approx(100 * np.mean(scores))
    problems, split = (
        read(SETS / "scienceqa" / "problems.json"),
        read(SETS / "scienceqa" / "pid_splits.json")["test"],
    )
    said = read(folder / "mapl-scienceqa-SQA.json")
    assert set(said["results"]) == set(said["outputs"]) == set(split)
    assert all(
        scienceqa_choice(said["outputs"][i], len(problems[i]["choices"])) == c
        for i, c in said["results"].items()
    )
    avg = scienceqa_accuracy({i: problems[i] for i in split}, said["results"])["Avg"]
    assert cells[("scienceqa", "SQA")] == pytest.approx(100 * avg)
    rows = [(file.stem, *line.split("\t")) for file in sorted((folder / "mapl-mme-MME").iterdir())
            for line in file.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    assert {row[0] for row in rows} == {*MME["perception"], *MME["cognition"]} and {
        len(row) for row in rows
    } == {5}
    asked = {
        (r.kind, Path(r.images[0]).name, r.question, r.answers[0]) for r in read_mme(SETS / "mme", "test")
    }
    assert {row[:4] for row in rows} == asked
    assert cells[("mme", "MME")] == pytest.approx(mme_scores(rows)["perception"])


def test_files_that_official_tools_would_score_high_score_high_here(tmp_path, runs, monkeypatch):
    """With an oracle in place of the model every benchmark gives full marks."""
    truth = {}
    for kind in ("vqav2", "scienceqa", "mme"):
        world = open_data(f"{kind}:{SETS / kind}:{'val' if kind == 'vqav2' else 'test'}")
        for i in range(len(world)):
            for q in world.item(i).qas:
                truth[q.question] = f"The answer is {'ABCDE'[q.correct]}." if q.choices else q.answer

    def oracle(self, keys, documents, items, max_new_tokens):
        return [next((a for q, a in truth.items() if key.endswith(", " + q)), "") for key in keys]
    monkeypatch.setattr(Comparison, "texts", oracle)
    specs = [f"{kind}:{SETS / kind}" for kind in ("vqav2", "scienceqa", "mme")]
    rows, _ = compare_runs([runs["mapl"]], Settings(tuple(specs), shots=(0,), folder=str(tmp_path)))
    cells = rows[0]["cells"]
    assert cells[("mme", "MME")] == 2000 and cells[("scienceqa", "SQA")] == 100
    assert cells[("vqav2", "0-shot")] > 60  # its annotators differ


def record_documents(monkeypatch) -> list[data.Document]:
    """The documents that are answered from now on."""
    asked, real = [], evaluation.generate_texts

    def generate_texts(model, documents, *a, **kw):
        asked.extend(documents)
        return real(model, documents, *a, **kw)
    monkeypatch.setattr("support.lab.protocols.generate_texts", generate_texts)
    return asked


def test_a_second_call_writes_nothing_and_a_torn_line_is_written_again(predicted, runs, monkeypatch):
    folder, settings, cells = predicted
    asked = record_documents(monkeypatch)

    def again(**changes):
        return compare_runs([runs["mapl"]], replace(settings, **changes))[0][0]["cells"]
    assert again() == cells and asked == []
    file = folder / "mapl.jsonl"
    lines = file.read_bytes()
    assert len(lines.split(b"\n")) > 60
    file.write_bytes(lines[:-9])  # a crash in the middle of the last line
    assert again() == cells and len(asked) == 1
    assert again() == cells and len(asked) == 1
    again(seed=1)  # other examples, other texts
    assert len(asked) > 1


def test_another_training_in_the_same_folder_is_asked_again(runs, tmp_path, monkeypatch):
    run = tmp_path / "mapl"
    shutil.copytree(runs["mapl"], run)
    facts = json.loads((run / "config.json").read_text())
    settings = Settings(shots=(0,), count=2, folder=str(tmp_path / "p"))
    compare_runs([str(run)], settings)
    (run / "config.json").write_text(json.dumps({**facts, "seconds": facts["seconds"] + 1}))
    asked = record_documents(monkeypatch)
    compare_runs([str(run)], settings)
    assert asked


# the command line

def test_one_command_prints_the_table_its_footnotes_and_minutes(runs, tmp_path, capsys):
    asked = ["compare", runs["mapl"], "--limit", "2", "--device", "cpu"]
    evaluation.main([*asked, "--shots", "0,1", "--paper", "--format", "markdown",
                     "--out", str(tmp_path / "t.md")])
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "t.md").read_text(encoding="utf-8")
    for word in ("| mapl ", "| mapl, blind ", "| chance ", "| [MAPL] ", "1-shot", "2 pictures a row",
                 "minutes on cpu", "on other data"):
        assert word in printed, word
    evaluation.main([*asked, "--shots", "0", "--format", "csv"])
    printed = capsys.readouterr()
    rows = [row[0] for row in csv.reader(io.StringIO(printed.out))]
    assert rows == ["", "mapl", "mapl, blind", "chance"] and "minutes" in printed.err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--protocol", "mapel"], 'no protocol is called "mapel"; did you mean "mapl"'),
        (["--shots", "0,x"], '--shots "0,x" is no list'),
        (["--format", "html"], "html"),
        (["--data", "vqav2:nowhere"], "vqav2:nowhere: no such folder"),
        (["--data", "shapes", "--data", "shapes:val"], "--data names shapes twice"),
        (["--data", f"mme:{SETS / 'mme'}", "--shots", "4"], "mme does not read --shots; leave out"),
        (["--data", "coco:nowhere", "--data", "scienceqa:nowhere", "--shots", "0"], "does not read --shots"),
        (["--follow-links"], "data shapes does not read --follow-links"),
        (["--data", "emoji", "--follow-links"], "data emoji does not read --follow-links"),
    ],
)
def test_a_mistake_is_one_sentence(runs, flags, words):
    with pytest.raises(UserError) as e:
        evaluation.main(["compare", runs["mapl"], "--device", "cpu", *flags])
    assert words in str(e.value)


@pytest.mark.parametrize("kind, folder", [("coco", "coco_captions"), ("mme", "mme"), ("vqav2", "vqav2"),
                                          ("scienceqa", "scienceqa"), ("llava", "llava_instruct")])
def test_where_shots_are_not_read_no_open_question_is_asked(kind, folder):
    measures = build_questions(open_set(f"{kind}:{SETS / folder}", Settings(count=9)), (0, 4))
    assert any(m.asked for m in measures if m.name.endswith("-shot")) == (kind not in NO_OPEN_QUESTIONS)
