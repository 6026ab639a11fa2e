"""Strangers' reports about published protocols: their answers' spelling, their evaluators, their files."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
from conftest import GOLDEN, ROOT
from eval import answer_accuracy, vqa_accuracy
from support.formats.benchmarks import scienceqa_text
from support.formats.files import UserError
from support.formats.tokenizer_files import load_tokenizer
from support.lab.compare import compare_runs
from support.lab.measures import Settings
from support.lab.protocols import word_exchange
from support.worlds import open_data

ITEMS = json.loads((GOLDEN / "metrics" / "vqa.json").read_text(encoding="utf-8"))["items"]


def picture(file: Path, grey: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((30, 40, 3), grey, np.uint8)).save(file)


def write(file: Path, content) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def vqav2(folder: Path, count: int = 3) -> Path:
    """Questions whose ten annotators say yes."""
    questions = [dict(question_id=10 * i + 1, image_id=i, question=f"is it {i}?") for i in range(count)]
    annotations = [dict(question_id=q["question_id"], question_type="is", answer_type="yes/no",
                        multiple_choice_answer="yes",
                        answers=[dict(answer="yes", answer_id=k) for k in range(10)]) for q in questions]
    for part in ("train2014", "val2014"):
        write(folder / f"v2_OpenEnded_mscoco_{part}_questions.json", {"questions": questions})
        write(folder / f"v2_mscoco_{part}_annotations.json", {"annotations": annotations})
        for i in range(count):
            picture(folder / part / f"COCO_{part}_{i:012d}.jpg", 20 * i)
    return folder


def textvqa(folder: Path, count: int = 4) -> Path:
    for split in ("train", "val"):
        rows = [dict(question_id=i, image_id=f"i{i}", question="what brand?", answers=["nokia"] * 10)
                for i in range(count)]
        write(folder / f"TextVQA_0.5.1_{split}.json", {"data": rows})
    for i in range(count):
        picture(folder / f"train_images/i{i}.jpg", 20 * i)
    return folder


def says(monkeypatch, *texts: str) -> None:
    """The model writes these, one after another, to all of its documents."""
    left = list(texts)
    monkeypatch.setattr("support.lab.protocols.generate_texts",
                        lambda vlm, documents, *a, **kw: [left.pop(0) if len(left) > 1 else left[0]
                                                          for _ in documents])


def test_llavas_answers_are_processed_before_they_are_scored_and_written(tmp_path, untrained_run,
                                                                         monkeypatch):
    says(monkeypatch, "Yes.")
    rows, _ = compare_runs([untrained_run], Settings((f"vqav2:{vqav2(tmp_path)}:val",), "llava", (0,), 3,
                                                     folder=str(tmp_path / "pred")))
    assert rows[0]["cells"]["vqav2", "0-shot"] == 100
    written = json.loads(next((tmp_path / "pred").glob("*vqav2*.json")).read_text())
    assert [row["answer"] for row in written] == ["yes"] * 3        # what the official evaluation scores 1
    rows, _ = compare_runs([untrained_run], Settings((f"vqav2:{tmp_path}:val",), "ours", (0,), 3))
    assert rows[0]["cells"]["vqav2", "0-shot"] == 0                 # our own protocol promises no processing


def test_textvqas_predictions_are_its_official_file(tmp_path, untrained_run):
    evaluation.main(["compare", untrained_run, "--data", f"textvqa:{textvqa(tmp_path)}:val", "--shots", "0",
                     "--predictions", str(tmp_path / "pred"), "--device", "cpu"])
    file, = (tmp_path / "pred").glob("*.json")
    rows = json.loads(file.read_text())
    assert sorted(row["question_id"] for row in rows) == [0, 1, 2, 3]
    assert all(set(row) == {"question_id", "answer"} for row in rows)


def test_textcaps_file_keeps_its_hexadecimal_ids_and_a_format_without_one_says_so(tmp_path, untrained_run):
    names = ("0123456789012345", "00aa")
    for split in ("train", "val"):
        write(tmp_path / f"TextCaps_0.1_{split}.json",
              {"data": [dict(image_id=name, reference_strs=["a red box"]) for name in names]})
    for n, name in enumerate(names):
        picture(tmp_path / f"train_images/{name}.jpg", 20 * n)
    asked = Settings((f"textcaps:{tmp_path}:val",), shots=(), folder=str(tmp_path / "pred"))
    compare_runs([untrained_run], asked)
    file, = (tmp_path / "pred").glob("*.json")
    assert {row["image_id"] for row in json.loads(file.read_text())} == set(names)
    (tmp_path / "own").mkdir()
    picture(tmp_path / "own/a.png")
    (tmp_path / "own/captions.jsonl").write_text('{"image": "a.png", "text": "a box"}')
    _, notes = compare_runs([untrained_run], Settings((f"folder:{tmp_path}/own:all",), shots=(),
                                                      folder=str(tmp_path / "none")))
    assert any("no official file of folder's predictions is known" in note for note in notes), notes


def test_textvqas_evaluation_spells_answers_even_where_all_ten_agree(tmp_path):
    question = open_data(f"textvqa:{textvqa(tmp_path, 1)}:val").item(0).qas[0]
    said = {a: answer_accuracy(question, a) for a in ("nokia", "Nokia", "Nokia.", "the nokia", "samsung")}
    assert said == {"nokia": 1, "Nokia": 1, "Nokia.": 1, "the nokia": 1, "samsung": 0}


@pytest.mark.parametrize("evaluator, key", [
    ("vqa", "accuracy"), ("openflamingo", "accuracy_open_flamingo"), ("lavis", "accuracy_lavis"),
    ("textvqa", "accuracy_textvqa")])
def test_each_evaluator_gives_its_codes_own_numbers(evaluator, key):
    for item in ITEMS:
        accuracy = vqa_accuracy(item["prediction"], [a["answer"] for a in item["answers"]], evaluator)
        assert 100 * accuracy == pytest.approx(item[key], abs=1e-9), item["question_id"]


def scienceqa(folder: Path) -> Path:
    same = dict(choices=["a", "b", "c"], answer=1, hint="", grade="grade2", subject="natural science",
                lecture="Look.", solution="So.")
    problems = {str(i): dict(question=f"which is {i}?", image=None if i % 2 else "image.png",
                             split="train" if i < 4 else "test", **same) for i in range(8)}
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {s: [i for i in problems if problems[i]["split"] == s]
                                       for s in ("train", "test")})
    for i in range(0, 8, 2):
        picture(folder / f"images/{problems[str(i)]['split']}/{i}/image.png", 20 * i)
    return folder


def test_a_model_of_the_form_qcm_lepa_is_asked_for_the_letter_behind_its_reasons(tmp_path, untrained_run,
                                                                                monkeypatch):
    world = open_data(f"scienceqa:{scienceqa(tmp_path)}:test")
    answer = scienceqa_text(world.item(0).qas[0], "QCM-LEPA")[1]
    assert answer == "LECTURE: Look.\nSOLUTION: So.\n###\nANSWER: B."
    assert answer_accuracy(world.item(0).qas[0], answer) == 1
    with pytest.raises(UserError, match='--form "QCM-LEP"'):
        scienceqa_text(world.item(0).qas[0], "QCM-LEP")
    run = Path(shutil.copytree(untrained_run, tmp_path / "run"))
    facts = json.loads((run / "config.json").read_text())
    write(run / "config.json", facts | {"settings": {"form": "QCM-LEPA"}})
    tokenizer, asked = load_tokenizer(ROOT / "weights/decoder"), []

    def generate(vlm, documents, *a, **kw):
        asked.extend(tokenizer.decode([t for t in d.tokens if t >= 0]) for d in documents)
        letter = asked[-1].endswith("ANSWER:")
        return ["B." if letter else "LECTURE: Look.\nSOLUTION: So.\n### Human: why?"] * len(documents)
    monkeypatch.setattr("support.lab.protocols.generate_texts", generate)
    settings = Settings((world.name,), shots=(), folder=str(tmp_path / "pred"))
    rows, _ = compare_runs([str(run)], settings)
    assert rows[0]["cells"]["scienceqa", "SQA"] == 100
    assert asked[4].endswith("LECTURE: Look.\nSOLUTION: So. ###\nANSWER:")
    file, = (tmp_path / "pred").glob("*scienceqa*.json")
    outputs = json.loads(file.read_text())["outputs"]
    assert set(outputs) == {"4", "5", "6", "7"}         # with a picture and without
    assert set(outputs.values()) == {"LECTURE: Look.\nSOLUTION: So.\n The answer is B."}


def test_llava_asks_multiple_choice_in_its_own_words(tmp_path):
    world = open_data(f"scienceqa:{scienceqa(tmp_path)}:test")
    items = [world.item(i) for i in range(4)]
    for item in items:
        exchange = word_exchange("llava", item, item.qas[0], "QCM-LEA", first=True)
        assert exchange.prompt == (
            f"Context: N/A\nQuestion: {item.qas[0].question}\nOptions: (A) a (B) b (C) c\n"
            "Answer with the option's letter from the given choices directly.")
        assert exchange.pictured == (item.image is not None)
