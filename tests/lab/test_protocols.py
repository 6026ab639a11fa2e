"""Prompts are each paper's, to the letter; examples never show the question; what is asked in one batch is answered as one by one; what is
kept is not written twice; the official files are read back to the table's own numbers; Overall is the documents'."""

import copy
import csv
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from support.formats.benchmarks import mme_scores, scienceqa_accuracy, scienceqa_choice
from support.formats.datasets import MME, read_mme
from support.lab.compare import compare_runs
from support.worlds import open_data
from support.worlds.text import shapes_tokenizer
import eval as evaluation
import train
from conftest import GOLDEN
from support.lab.compare import format_comparison, measure_cells, overall_means, published_rows
from support.lab.protocols import Comparison, build_prompt, few_shot_examples, multiple_choice, yes_no_pairs
from model import IMAGE
from support.formats.files import UserError

SETS = GOLDEN / "datasets"
TOKENIZER = shapes_tokenizer()


def spelled(document: data.Document, tokenizer=TOKENIZER) -> str:
    return "".join("<image>" if t == IMAGE else tokenizer.decode([t], special=True) for t in document.tokens)


def item(question: str = "", answer: str = "", caption: str = "", **more) -> data.Item:
    picture = np.zeros((48, 48, 3), np.uint8)
    return data.Item(
        picture,
        [caption] * bool(caption),
        [data.QA("color", question, answer)] * bool(question),
        f"{question}{caption}",
        **more,
    )


RED, BLUE = item("is it red?", "yes"), item("is it blue?", "no")
CHOICE = data.QA(
    "biology",
    "Which is it?",
    "a dog",
    choices=("a cat", "a dog"),
    correct=1,
    lecture="Look.",
    solution="It barks.",
)


# the prompts

@pytest.mark.parametrize(
    "protocol, support, text",
    [
        ("ours", [], "<|begin|><image>\nQuestion: is it blue? Answer:"),
        (
            "ours",
            [RED],
            "<|begin|><image>\nQuestion: is it red? Answer: yes<|end|><image>\nQuestion: is it blue? Answer:",
        ),
        ("mapl", [], "<|begin|><image>Please answer the question. Question: is it blue? Answer:"),
        (
            "mapl",
            [RED],
            "<|begin|><image>Please answer the question. Question: is it red? Answer: yes.<image>Question: is it blue? Answer:",
        ),
        (
            "flamingo",
            [RED],
            "<|begin|><image>Question: is it red? Answer: yes<|end|><image>Question: is it blue? Answer:",
        ),
        ("blip2", [], "<|begin|><image>Question: is it blue? Short answer:"),
        ("llava", [], "<image>\nis it blue?\nAnswer the question using a single word or phrase."),
        ("mme", [], "<|begin|><image>\nQuestion: is it blue? Please answer yes or no. Answer:"),
    ],
)
def test_a_question_is_asked_in_the_papers_words(protocol, support, text):
    assert spelled(build_prompt(TOKENIZER, protocol, BLUE, BLUE.qas[0], support)).endswith(text)


@pytest.mark.parametrize(
    "protocol, text",
    [
        ("ours", "<|begin|><image>\nCaption: a dog<|end|><image>\nCaption:"),
        ("flamingo", "<|begin|><image>Output: a dog<|end|><image>Output:"),
        ("blip2", "<|begin|><image>a photo of a dog<|end|><image>a photo of"),
        ("mapl", "<|begin|><image> a dog.<image>"),
    ],
)
def test_a_caption_is_asked_in_the_papers_words(protocol, text):
    assert (
        spelled(build_prompt(TOKENIZER, protocol, item(caption="a cat"), support=[item(caption="a dog")]))
        == text
    )


def test_scienceqa_is_asked_as_its_code_asks_and_mme_ends_once():
    asked = spelled(build_prompt(TOKENIZER, "scienceqa", item(), CHOICE, [replace(item(), qas=[CHOICE])]))
    problem = "\nQuestion: Which is it?\nContext: N/A\nOptions: (A) a cat (B) a dog\nAnswer:"
    assert asked == f"<|begin|><image>{problem} Look. It barks. The answer is B.<|end|><image>{problem}"
    ends = data.QA("count", "Is it one? Please answer yes or no.", "Yes")
    assert spelled(build_prompt(TOKENIZER, "mme", RED, ends)).count("Please answer yes or no.") == 1
    with pytest.raises(UserError, match="no choices"):
        build_prompt(TOKENIZER, "scienceqa", RED, RED.qas[0])


def test_openflamingos_prompts_are_those_of_its_code():
    tokenizer = copy.copy(TOKENIZER)
    tokenizer.special = dict(TOKENIZER.special)
    tokenizer.add("<|endofchunk|>")
    cases = json.loads((GOLDEN / "metrics" / "openflamingo_fewshot.json").read_text(encoding="utf-8"))[
        "prompts"
    ]
    assert {(case["task"], case["shots"]) for case in cases} == {
        ("vqa", 0),
        ("caption", 0),
        ("vqa", 2),
        ("caption", 2),
    }
    for case in cases:
        vqa = case["task"] == "vqa"
        demos = [item(*demo) if vqa else item(caption=demo) for demo in case["demos"]]
        support = [replace(d, image=d.image if case["shots"] else None) for d in demos]
        question = data.QA("", case["question"], "") if vqa else None
        assert (
            spelled(build_prompt(tokenizer, "openflamingo", item(), question, support), tokenizer)
            == "<|begin|>" + case["text"]
        )


# the examples

def test_examples_are_drawn_by_the_seed_and_four_are_the_first_of_eight():
    train_split, asked = data.Shapes("train"), data.Shapes("test").item(3)
    eight = few_shot_examples(train_split, asked, 8, seed=5)
    ids = [e.id for e in eight]
    assert (
        len(set(ids)) == 8
        and all(i.startswith("train-") for i in ids)
        and all(len(e.qas) == 1 for e in eight)
    )
    assert [e.id for e in few_shot_examples(train_split, asked, 4, seed=5)] == ids[:4]
    assert [e.id for e in few_shot_examples(train_split, asked, 8, seed=5)] == ids
    assert [e.id for e in few_shot_examples(train_split, asked, 8, seed=6)] != ids
    assert [e.id for e in few_shot_examples(train_split, data.Shapes("test").item(4), 8, seed=5)] != ids
    assert few_shot_examples(train_split, asked, 0) == []


def test_examples_never_show_the_picture_that_is_asked_about(tmp_path):
    """Ten records, of which two share a picture under two names: whoever is asked, neither it nor its double is an example."""
    lines = []
    for n in range(10):
        Image.fromarray(np.full((8, 8, 3), 20 * min(n, 8), np.uint8)).save(tmp_path / f"{n}.png")
        lines.append(json.dumps({"image": f"{n}.png", "text": f"picture {n}"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    world = open_data(f"folder:{tmp_path}:all")
    for n in range(10):
        asked = world.item(n)
        others = 8 if asked.image[0, 0, 0] == 160 else 9
        found = few_shot_examples(world, asked, others)
        assert len(found) == others and not [
            e for e in found if e.id == asked.id or np.array_equal(e.image, asked.image)
        ]
        with pytest.raises(UserError, match=f"has {others} other items, too few for 10 examples"):
            few_shot_examples(world, asked, 10)


# the forms of ScienceQA and MME

def test_choices_hold_the_answer_once_among_answers_of_its_kind():
    items = [data.Shapes("test").item(i) for i in range(60)]
    made = [*multiple_choice(items, seed=1)]
    assert [n for n, _ in made] == [*range(60)] and made == [*multiple_choice(items, seed=1)] != [
        *multiple_choice(items, seed=2)
    ]
    assert {q.kind for _, q in made} == set(data.KINDS)
    for n, q in made:
        assert q.choices[q.correct] == q.answer and len(set(q.choices)) == len(
            q.choices
        )
        assert len(q.choices) == (2 if q.kind == "existence" else 4)
    assert {q.correct for _, q in made if q.kind != "existence"} == {0, 1, 2, 3}


def test_each_pair_of_questions_has_one_true_and_one_false_by_the_scene_itself():
    world = data.Shapes("test")
    items = [world.item(i) for i in range(80)]
    made = [*yes_no_pairs(items)]
    assert [q.answer for _, q in made] == ["Yes", "No"] * (len(made) // 2) and {
        q.kind for _, q in made
    } == set(data.KINDS)
    assert [n for n, _ in made] == [n for n in range(80) for _ in (0, 1)]
    for n, q in made:
        things = world.scene(world.rng(n))
        if m := re.fullmatch(r"is there an? (\w+) (\w+)\?", q.question):
            true = any(t.pair == m.groups() for t in things)
        elif m := re.fullmatch(r"is the number of (.+) (\w+)\?", q.question):
            word = dict((plural, w) for w, plural in data.PLURALS).get(m[1])
            true = sum(word is None or word in t.pair for t in things) == data.NUMBERS.index(m[2])
        else:
            color, shape, place = re.fullmatch(r"is the (\w+) (\w+) at the (\w+ \w+)\?", q.question).groups()
            true = any(t.pair == (color, shape) and t.place == place for t in things)
        assert true == (q.answer == "Yes"), (q.question, things)


# answers

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out, made = tmp_path_factory.mktemp("runs"), {}
    for bridge in ("mapl", "flamingo", "zero_init"):
        train.main(
            [
                "--bridge",
                bridge,
                "--steps",
                "4",
                "--batch",
                "8",
                "--dtype",
                "float32",
                "--eval-items",
                "1",
                "--samples",
                "0",
                "--out",
                str(out / bridge),
            ]
        )
        made[bridge] = str(out / bridge)
    return made


def few(count: int = 6):
    items = [data.Shapes("test").item(i) for i in range(count)]
    train_split = data.Shapes("train")
    return items, lambda k: [few_shot_examples(train_split, i, k) for i in items]


@pytest.mark.parametrize("bridge, beams", [("mapl", 1), ("mapl", 3), ("flamingo", 1), ("flamingo", 3)])
def test_answers_after_examples_are_the_same_in_a_batch_and_alone(runs, bridge, beams):
    vlm, tokenizer, _ = evaluation.open_run(runs[bridge], "cpu")
    items, support = few()
    examples = [row[:n % 4] for n, row in enumerate(support(3))]                    # 1 to 4 pictures a prompt
    documents = [build_prompt(tokenizer, "ours", i, i.qas[0], e) for i, e in zip(items, examples)]
    shown, keys = [[*e, i] for i, e in zip(items, examples)], [str(n) for n in range(6)]
    together = Comparison(vlm, tokenizer, beams=beams).texts(keys, documents, shown, 8)
    assert together == [
        Comparison(vlm, tokenizer, beams=beams).texts(["0"], [d], [s], 8)[0] for d, s in zip(documents, shown)
    ]
    by_pixels = []
    for d, s in zip(documents, shown):
        pixels = data.to_pixels([i.image for i in s], 48, vlm.processor)
        ids = vlm.generate(torch.tensor([d.tokens]), pixels, 8, beams=beams, stop=(tokenizer.eos,))[
            0
        ].tolist()
        by_pixels.append(
            tokenizer.decode(ids[: ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids).strip()
        )
    assert together == by_pixels  # and each picture stands where its example does


def test_options_are_ranked_by_the_likelihood_of_their_words(runs):
    """Beside the loss that training uses, one by one; rows of unequal length, with and without a picture."""
    vlm, tokenizer, _ = evaluation.open_run(runs["mapl"], "cpu")
    items, _ = few()
    items[1] = replace(items[1], image=None)
    documents = [
        build_prompt(tokenizer, "ours", i, i.qas[0]).add(" " + "red " * n, learn=True).end()
        for n, i in enumerate(items, 1)
    ]
    found = [
        float(x)
        for x in Comparison(vlm, tokenizer).texts(
            [str(n) for n in range(6)], documents, [[i] for i in items], 0
        )
    ]
    for d, i, x in zip(documents, items, found):
        pixels = (
            data.to_pixels([i.image], 48, vlm.processor) if i.image is not None else torch.zeros(0, 3, 48, 48)
        )
        loss, count = vlm.loss(torch.tensor([d.tokens]), torch.tensor([d.labels]), pixels)
        assert x == pytest.approx(-loss.item(), rel=1e-4) and count > 1


def test_flamingos_zero_shot_shows_two_examples_in_words(runs, monkeypatch):
    vlm, tokenizer, _ = evaluation.open_run(runs["flamingo"], "cpu")
    items, support = few(2)
    seen = []
    monkeypatch.setattr(
        Comparison,
        "texts",
        lambda self, keys, documents, shown, longest: (
            seen.append((keys, documents, shown)) or ["0"] * len(keys)
        ),
    )
    measure_cells(Comparison(vlm, tokenizer), data.Shapes("test"), items, support, "flamingo", (0, 4))
    of = {keys[0].split(",")[0]: (documents, shown) for keys, documents, shown in seen if keys}
    for measure, pictures, examples in (
        ("CIDEr", 1, 2),
        ("0-shot", 1, 2),
        ("4-shot", 5, 4),
        ("MME", 1, 2),
        ("SQA rank", 1, 0),
    ):
        documents, shown = of[measure]
        for d, s in zip(documents, shown):
            end = measure == "SQA rank"  # the option ends with a stop token
            assert (
                d.tokens.count(IMAGE) == pictures == sum(i.image is not None for i in s)
                and d.tokens.count(tokenizer.eos) == examples + end
            )


def test_a_bridge_for_one_picture_leaves_its_few_shot_cells_empty_and_says_why(runs):
    rows, notes = compare_runs([runs["zero_init"]], ks=(0, 4), count=3)
    assert (
        ("0-shot",) in rows[0]["cells"]
        and ("4-shot",) not in rows[0]["cells"]
        and ("4-shot",) in rows[-1]["cells"]
    )
    assert [
        n for n in notes if n.startswith("zero_init, 4-shot is empty: zero_init takes one image per text")
    ] and len(notes) == 1


# the table

def test_the_table_has_each_run_its_blind_row_and_chance(runs, capsys):
    rows, _ = compare_runs([runs["mapl"], runs["flamingo"]], count=5)
    assert [r["row"] for r in rows] == ["mapl", "mapl, blind", "flamingo", "flamingo, blind", "chance"]
    assert rows[0]["trained"] == 300_032 and rows[0]["examples"] == 32 and "trained" not in rows[1]
    measures = {("CIDEr",), ("B@4",), ("0-shot",), ("4-shot",), ("8-shot",), ("SQA rank",), ("MME",)}
    assert {k for k in rows[0]["cells"] if len(k) == 1} == measures
    kinds = [rows[0]["cells"][(kind, "0-shot")] for kind in data.KINDS]
    assert rows[0]["cells"][("0-shot",)] == pytest.approx(
        np.mean(kinds)
    )  # Overall of a generated world: the mean over its kinds
    tasks = [rows[0]["cells"][(kind, "MME")] for kind in data.KINDS]
    assert rows[0]["cells"][("MME",)] == pytest.approx(sum(tasks)) and rows[-1]["cells"][("MME",)] == 300
    assert rows[-1]["cells"][("SQA rank",)] > 25


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
    assert overall_means(
        {("a", "0-shot"): 10.0, ("b", "0-shot"): 20.0, ("a", "SQA"): 1.0},
        {"0-shot": ["a", "b"], "SQA": ["a", "b"]},
    ) == {("0-shot",): 15.0}


def test_text_markdown_and_csv_hold_the_same_cells():
    rows = [
        {
            "row": "mapl",
            "trained": 300032,
            "examples": 51200,
            "cells": {("0-shot",): 86.54, ("color", "0-shot"): 82.0},
        },
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
    assert table[0] == [
        "",
        "trained",
        "examples",
        "color 0-shot",
        "Overall 0-shot",
        "Overall SQA",
        "Overall MME",
    ]
    assert table[1] == ["mapl", "300032", "51200", "82.00", "86.54", "", ""] and table[2][0] == "mapl, blind"


# predictions on disk

@pytest.fixture(scope="module")
def predicted(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictions")
    specs = [f"{kind}:{SETS / kind}" for kind in ("vqav2", "scienceqa", "mme")]
    rows, notes = compare_runs([runs["mapl"]], specs, ks=(0, 1), folder=str(folder))
    assert not notes
    return folder, specs, rows[0]["cells"]


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
        assert {s["question_id"] for s in said} == set(truth) and all(
            set(s) == {"question_id", "answer"} for s in said
        )
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
                truth[q.question] = (
                    f"The answer is {'ABCDE'[q.correct]}." if q.choices else q.answer
                )
    monkeypatch.setattr(Comparison, "texts", lambda self, keys, documents, shown, longest: [
        next((a for q, a in truth.items() if key.endswith(", " + q)), "") for key in keys])
    specs = [f"{kind}:{SETS / kind}" for kind in ("vqav2", "scienceqa", "mme")]
    rows, _ = compare_runs([runs["mapl"]], specs, ks=(0,), folder=str(tmp_path))
    cells = rows[0]["cells"]
    assert (
        cells[("mme", "MME")] == 2000
        and cells[("scienceqa", "SQA")] == 100
        and cells[("vqav2", "0-shot")] > 60
    )  # its annotators differ


def test_a_second_call_writes_nothing_and_a_torn_line_is_written_again(predicted, runs, monkeypatch):
    folder, specs, cells = predicted
    asked, real = [], evaluation.generate_texts
    monkeypatch.setattr("support.lab.protocols.generate_texts", lambda generate, documents, *a, **kw: asked.extend(documents) or real(generate, documents, *a, **kw))
    again = lambda **kw: compare_runs([runs["mapl"]], specs, ks=(0, 1), folder=str(folder), **kw)[0][0][
        "cells"
    ]
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
    compare_runs([str(run)], ks=(0,), count=2, folder=str(tmp_path / "p"))
    (run / "config.json").write_text(json.dumps({**facts, "seconds": facts["seconds"] + 1}))
    asked, real = [], evaluation.generate_texts
    monkeypatch.setattr(
        "support.lab.protocols.generate_texts",
        lambda generate, documents, *a, **kw: asked.extend(documents) or real(generate, documents, *a, **kw),
    )
    compare_runs([str(run)], ks=(0,), count=2, folder=str(tmp_path / "p"))
    assert asked


# the command line

def test_one_command_prints_the_table_its_footnotes_and_minutes(runs, tmp_path, capsys):
    evaluation.main(
        [
            runs["mapl"],
            "--table",
            "--limit",
            "2",
            "--shots",
            "0,1",
            "--paper",
            "--format",
            "markdown",
            "--out",
            str(tmp_path / "t.md"),
            "--device",
            "cpu",
        ]
    )
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "t.md").read_text(encoding="utf-8")
    for word in (
        "| mapl ",
        "| mapl, blind ",
        "| chance ",
        "| [MAPL] ",
        "1-shot",
        "2 pictures a row",
        "minutes on cpu",
        "on other data",
    ):
        assert word in printed, word
    evaluation.main(
        [runs["mapl"], "--table", "--limit", "2", "--shots", "0", "--format", "csv", "--device", "cpu"]
    )
    printed = capsys.readouterr()
    assert [row[0] for row in csv.reader(io.StringIO(printed.out))] == [
        "",
        "mapl",
        "mapl, blind",
        "chance",
    ] and "minutes" in printed.err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--protocol", "mapel"], 'no protocol is called "mapel"; did you mean "mapl"'),
        (["--shots", "0,x"], '--shots "0,x" is no list'),
        (["--format", "html"], "html"),
        (["--data", "vqav2:nowhere"], "vqav2:nowhere: no such folder"),
        (["--data", "shapes", "--data", "shapes:val"], "--data names shapes twice"),
    ],
)
def test_a_mistake_is_one_sentence(runs, flags, words):
    with pytest.raises(UserError) as e:
        evaluation.main([runs["mapl"], "--table", "--device", "cpu", *flags])
    assert words in str(e.value)
