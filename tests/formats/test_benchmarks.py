"""The scores of whole benchmarks are those of the official tools, and what we save is what these tools read.

tests/golden/metrics holds made-up ScienceQA, MME and retrieval results with what LLaVA's and ScienceQA's
evaluation, MME's calculation.py and LAVIS made of them, and OpenFlamingo's truncated answers. Saved files are
read back and scored.
"""
import json
import random
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from eval import bleu, cider, retrieval_recall, rouge_l, vqa_accuracy
from support.formats.benchmarks import (meteor, mme_scores, postprocess_answer, save_predictions,
                                        scienceqa_accuracy, scienceqa_choice, spice, yes_no)
from support.formats.datasets import MME
from support.formats.ptb import ptb_tokenize
from support.formats.files import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"


def load(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


SQA, EXPECTED_MME, RETRIEVAL, FEWSHOT, CAPTIONS, VQA = (load(GOLDEN / f"{name}.json") for name in (
    "scienceqa", "mme_expected", "retrieval", "openflamingo_fewshot", "captions", "vqa"))
PROBLEMS, TEXTS = SQA["problems"], {p["question_id"]: p["text"] for p in SQA["predictions"]}
COLUMNS = {"NAT": "natural", "SOC": "social", "LAN": "language",
           "TXT": "has_text", "IMG": "has_image", "NO": "no_context",
           "G1-6": "grade_1_6", "G7-12": "grade_7_12", "Avg": "average"}
CORPORA = {"all kinds": CAPTIONS, **CAPTIONS["corner_corpora"]}
EXACT = dict(rel=1e-9, abs=1e-12)           # double precision, other order of the same few operations


def mme_rows(folder):
    """Result files as the official tool reads them: lines, each split at its tabs."""
    return [(file.stem, *line.split("\t")) for file in sorted(folder.iterdir())
            for line in file.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


def shown(fraction):
    return f"{100 * fraction:.2f}"          # how the official tool prints it


# ScienceQA

def picks(**rule):
    return {pid: scienceqa_choice(text, len(PROBLEMS[pid]["choices"]), **rule) for pid, text in TEXTS.items()}


def test_answers_to_scienceqa_are_read_as_by_llava():
    assert picks() == {pid: index for pid, index in SQA["results"].items() if pid in TEXTS}
    assert {pid for pid in SQA["results"] if pid not in TEXTS} == {"11", "53"}  # two predictions are missing


def test_letters_past_the_last_choice_are_read_and_then_refused():
    for pid, letter in SQA["parsed"].items():
        assert scienceqa_choice(TEXTS.get(pid, ""), 26) == (-1 if letter == "FAILED" else ord(letter) - 65)
    assert scienceqa_choice("The answer is Z.", 5) == -1
    assert scienceqa_choice("C", 2) == -1


def test_scienceqas_own_reading_knows_the_sentence_only():
    answers = "B", "B. because", "So. The answer is B."
    assert [scienceqa_choice(text, 4, direct=False) for text in answers] == [-1, -1, 1]


def test_scienceqas_own_guesses_are_draws_of_its_generator():
    ours, theirs = random.Random(10), random.Random(10)
    guesses = [scienceqa_choice("", count, direct=False, guess=ours) for count in (2, 3, 4, 5) * 20]
    assert guesses == [theirs.choice(range(count)) for count in (2, 3, 4, 5) * 20]
    assert scienceqa_choice("The answer is A.", 2, direct=False, guess=ours) == 0


def test_scienceqa_accuracy_is_official_in_every_column():
    scores = scienceqa_accuracy(PROBLEMS, picks())
    assert list(scores) == list(COLUMNS)
    for column, name in COLUMNS.items():
        assert shown(scores[column]) == SQA["category_scores"][f"acc_{name}"], column
    assert 100 * scores["Avg"] == pytest.approx(SQA["acc"], **EXACT)


def test_scienceqa_accuracy_of_each_topic_is_that_of_its_problems():
    for name, score in SQA["category_scores"].items():
        if name.removeprefix("acc_") not in COLUMNS.values():
            some = {pid: p for pid, p in PROBLEMS.items() if p["topic"] == name.removeprefix("acc_")}
            assert (shown(scienceqa_accuracy(some, picks())["Avg"]) if some else -1) == score, name


def test_llavas_img_accuracy_is_that_of_the_predicted_problems():
    score = scienceqa_accuracy({pid: PROBLEMS[pid] for pid in TEXTS}, picks())["IMG"]
    assert SQA["stdout"].endswith(f"IMG-Accuracy: {shown(score)}%")


def test_columns_of_scienceqa_without_a_problem_are_left_out():
    assert set(scienceqa_accuracy({"11": PROBLEMS["11"]}, {"11": 1})) == {"SOC", "IMG", "G1-6", "Avg"}


# MME

@pytest.mark.parametrize("response, label", EXPECTED_MME["parse_cases"])
def test_yes_and_no_are_read_as_officially(response, label):
    assert yes_no(response) == label


def test_mme_scores_are_official():
    rows = mme_rows(GOLDEN / "mme_results")
    result = mme_scores(rows)
    assert set(result) == {*EXPECTED_MME["tasks"], "perception", "cognition"}
    for task, expected in EXPECTED_MME["tasks"].items():
        assert [yes_no(row[-1]) for row in rows if row[0] == task] == expected["parsed"], task
        mine = [100 * result[task]["acc"], 100 * result[task]["acc+"], result[task]["score"]]
        assert mine == pytest.approx([expected["acc"], expected["acc_plus"], expected["score"]], **EXACT), (
            task
        )
    assert result["perception"] == pytest.approx(EXPECTED_MME["totals"]["Perception"], **EXACT)
    assert result["cognition"] == pytest.approx(EXPECTED_MME["totals"]["Cognition"], **EXACT)


def test_a_sum_of_mme_needs_all_its_tasks():
    rows = [row for row in mme_rows(GOLDEN / "mme_results") if row[0] != "OCR"]
    assert "perception" not in mme_scores(rows) and "cognition" in mme_scores(rows)


def test_perfect_mme_answers_score_2000_and_800():
    tasks = MME["perception"] + MME["cognition"]
    rows = [(task, "1.jpg", "?", truth, truth.lower()) for task in tasks for truth in ("Yes", "No")]
    assert (mme_scores(rows)["perception"], mme_scores(rows)["cognition"]) == (2000, 800)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([("existance", "1.jpg", "?", "Yes", "yes")] * 2, 'did you mean "existence"'),
        ([("count", "1.jpg", "?", "Yes", "yes")], "rows 1 and 2: pictures 1.jpg, but"),
        (
            [("count", f"{n}.jpg", "?", "Yes", "yes") for n in (1, 1, 2, 3)],
            "rows 3 and 4: pictures 2.jpg and 3.jpg",
        ),
    ],
)
def test_rows_that_are_no_mme_are_refused(rows, message):
    with pytest.raises(UserError, match=message):
        mme_scores(rows)


# retrieval

@pytest.mark.parametrize("case", RETRIEVAL["cases"], ids=["12 x 5", "10 x 1", "3 x 2"])
def test_recall_is_official(case):
    image_of = np.arange(len(case["scores_t2i"])) // case["captions_per_image"]
    mine = retrieval_recall(case["scores_i2t"], image_of, case["scores_t2i"])
    for ours, theirs in (("i2t", "txt"), ("t2i", "img")):
        for k in (1, 5, 10):
            assert 100 * mine[f"{ours}@{k}"] == pytest.approx(case["expected"][f"{theirs}_r{k}"], **EXACT)
    assert 100 * mine["mean"] == pytest.approx(case["expected"]["r_mean"], **EXACT)


def test_recall_by_hand():
    """Image 0 has captions 0 and 2; the better one is beaten by caption 1. Caption 0 alone prefers the wrong
    image."""
    scores = [[0.1, 0.9, 0.8], [0.2, 1.0, 0.3]]
    mine = retrieval_recall(scores, [0, 1, 0], ks=(1, 2))
    assert mine == pytest.approx({"i2t@1": 1 / 2, "i2t@2": 1, "t2i@1": 2 / 3, "t2i@2": 1, "mean": 19 / 24})


@pytest.mark.parametrize("score", [0.0, float("nan")])
def test_a_model_that_scores_everything_alike_retrieves_nothing(score):
    mine = retrieval_recall(np.full((20, 100), score), np.arange(100) // 5)
    assert set(mine.values()) == {0}


# METEOR and SPICE

@pytest.mark.parametrize("metric, name", [(meteor, "METEOR"), (spice, "SPICE")])
def test_a_missing_package_or_java_is_said_in_one_sentence(metric, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)             # as if not installed
    with pytest.raises(UserError, match=rf"^{name} needs Java and .* \(pip install pycocoevalcap\)"):
        metric(["a"], [["a"]])
    pretend(monkeypatch, name.lower(), lambda self, references, candidates: (1.0, [1.0]))
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(UserError, match=f'^{name} is a Java program, and no "java"'):
        metric(["a"], [["a"]])


def pretend(monkeypatch, name, compute_score):
    """A pycocoevalcap whose scorer of this name is ours, and a Java."""
    for module in ("pycocoevalcap", f"pycocoevalcap.{name}", f"pycocoevalcap.{name}.{name}"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    scorer = type(name.capitalize(), (), {"compute_score": compute_score})
    monkeypatch.setattr(sys.modules[f"pycocoevalcap.{name}.{name}"], name.capitalize(), scorer, raising=False)
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")


def test_spice_is_the_f1_of_all_tuples(monkeypatch):
    """The package gives a dictionary of categories per image; SPICE itself is "All". (Its own run takes a
    download.)"""

    def compute_score(self, references, candidates):
        assert references == {0: ["a box", "one box"], 1: ["a cat"]} and candidates == {
            0: ["a red box"],
            1: ["a dog"],
        }
        return np.float64(0.25), [
            {"All": {"pr": 1.0, "re": 0.3, "f": f}, "Object": {"f": 0.9}} for f in (0.5, 0.0)
        ]

    pretend(monkeypatch, "spice", compute_score)
    assert spice(["a red box", "a dog"], [["a box", "one box"], ["a cat"]]) == (0.25, [0.5, 0.0])


def test_a_java_program_that_breaks_is_reported_as_a_mistake_to_mend(monkeypatch):
    def compute_score(self, references, candidates):
        raise BrokenPipeError("broken pipe")
    pretend(monkeypatch, "meteor", compute_score)
    with pytest.raises(
        UserError, match=r"^METEOR: pycocoevalcap failed to run its Java program \(broken pipe\)"
    ):
        meteor(["a"], [["a"]])


@pytest.mark.parametrize("name", ["all kinds", "empty_reference", "nbsp_token"])  # each starts Java: 6 s
def test_meteor_is_official(name):
    pytest.importorskip(
        "pycocoevalcap.meteor.meteor", reason="METEOR needs the optional package pycocoevalcap"
    )
    if shutil.which("java") is None:
        pytest.skip("METEOR needs Java")
    corpus = CORPORA[name]
    items = corpus["items"]
    total, each = meteor(
        [item["candidate_tokens"] for item in items], [item["references_tokens"] for item in items]
    )
    assert total == pytest.approx(corpus["corpus"]["meteor"], **EXACT)
    assert each == pytest.approx([item["meteor"] for item in items], **EXACT)


# what is kept of what a model wrote

@pytest.mark.parametrize("rule", ["vqa", "caption"])
def test_openflamingos_answers_are_cut_as_in_its_code(rule):
    for written, kept in FEWSHOT[f"{rule}_postprocess"]:
        assert postprocess_answer(f"openflamingo-{rule}", written) == kept, repr(written)


@pytest.mark.parametrize("paper, written, kept", [
    ("mapl", " Two. Question: what", "Two"), ("mapl", "no end", "no end"), ("mapl", ".", ""),
    ("flamingo", " a dog<EOC><image> a cat<EOC>", "a dog"), ("flamingo", "a dog <|endofchunk|>", "a dog"),
    ("llava", " A red box.</s>", "A red box."), ("llava", "Yes.\n### Human: why?", "Yes."),
    ("blip2", " two dogs\n\nQuestion: what", "two dogs"), ("blip2", "", ""),
])
def test_an_answer_ends_where_its_paper_ends_it(paper, written, kept):
    assert postprocess_answer(paper, written) == kept


def test_an_unknown_rule_is_named():
    with pytest.raises(UserError, match='"lava"; did you mean "llava"'):
        postprocess_answer("lava", "")


# saved predictions, read back as the official tools read them

@pytest.mark.parametrize(
    "kind, key", [("vqav2", "question_id"), ("okvqa", "question_id"), ("vizwiz", "image")]
)
def test_saved_answers_score_as_before(kind, key, tmp_path):
    def name(item):
        number = item["question_id"]
        return number if key == "question_id" else f"VizWiz_val_{number:08}.jpg"
    file = tmp_path / "new" / "answers.json"
    save_predictions(kind, [(name(item), item["prediction"]) for item in VQA["items"]], file)
    assert all(set(row) == {key, "answer"} for row in load(file))
    answers = {row[key]: row["answer"] for row in load(file)}
    scores = [
        vqa_accuracy(answers[name(item)], [a["answer"] for a in item["answers"]]) for item in VQA["items"]
    ]
    assert 100 * sum(scores) / len(scores) == pytest.approx(VQA["overall"]["overall"], **EXACT)


def test_saved_captions_score_as_before(tmp_path):
    items = CAPTIONS["items"]
    save_predictions("coco", [(item["id"], item["candidate"]) for item in items], tmp_path / "captions.json")
    saved = load(tmp_path / "captions.json")
    assert all(set(row) == {"image_id", "caption"} for row in saved)
    captions = {row["image_id"]: " ".join(ptb_tokenize(row["caption"])) for row in saved}
    inputs = [captions[item["id"]] for item in items], [item["references_tokens"] for item in items]
    for name, metric in (("bleu", bleu), ("rouge_l", rouge_l), ("cider", cider)):
        assert metric(*inputs)[0] == pytest.approx(CAPTIONS["corpus"][name], **EXACT), name


def test_saved_scienceqa_choices_score_as_before(tmp_path):
    """The official tool reads int(results[id]) of every problem of the split: the two missing ones are saved
    as -1."""
    rows = [(pid, picks().get(pid, -1), TEXTS.get(pid, "FAILED")) for pid in PROBLEMS]
    save_predictions("scienceqa", rows, tmp_path / "results.json")
    saved = load(tmp_path / "results.json")
    assert saved["results"] == SQA["results"]
    assert {pid: saved["outputs"][pid] for pid in TEXTS} == TEXTS
    assert (
        shown(scienceqa_accuracy(PROBLEMS, saved["results"])["Avg"]) == SQA["category_scores"]["acc_average"]
    )


def test_saved_mme_answers_are_the_official_files(tmp_path):
    save_predictions("mme", mme_rows(GOLDEN / "mme_results"), tmp_path / "mme")
    assert {f.name: f.read_bytes() for f in (tmp_path / "mme").iterdir()} == {
        f.name: f.read_bytes() for f in (GOLDEN / "mme_results").iterdir()}
    assert mme_scores(mme_rows(tmp_path / "mme"))["perception"] == pytest.approx(
        EXPECTED_MME["totals"]["Perception"], **EXACT
    )


def test_line_breaks_in_mme_answers_stay_in_their_line_and_change_no_score(tmp_path):
    rows = [("count", "1.jpg", "Is it?\tOr not?", "Yes", "\n\tyes"),
            ("count", "1.jpg", "Is\r\nit?", "No", "\r\nno\nmore")]
    save_predictions("mme", rows, tmp_path)
    saved = mme_rows(tmp_path)
    assert [len(row) for row in saved] == [5, 5] and len(saved) == 2
    assert mme_scores(saved) == mme_scores(rows) == {"count": {"acc": 0.5, "acc+": 0, "score": 50}}


def test_ids_of_benchmarks_are_numbers_again(tmp_path):
    save_predictions("vqav2", [("9000", "yes"), (9001, "no")], tmp_path / "a.json")
    assert load(tmp_path / "a.json") == [
        {"question_id": 9000, "answer": "yes"},
        {"question_id": 9001, "answer": "no"},
    ]


@pytest.mark.parametrize("kind, rows, message", [
    ("vqa", [], 'no benchmark is called "vqa"; did you mean "okvqa"|"vqav2"'),
    ("vqav2", [("7", "yes"), (8, "no"), (7, "no")], 'more than one vqav2 prediction for "7"'),
    ("mme", [("ocr", "1.jpg", "?", "Yes", "yes")] * 2, '"ocr" is no task of MME'),
])
def test_what_no_benchmark_reads_is_not_written(kind, rows, message, tmp_path):
    with pytest.raises(UserError, match=message):
        save_predictions(kind, rows, tmp_path / "file.json")
    assert not list(tmp_path.iterdir())
