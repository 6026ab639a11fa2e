"""The metrics give the numbers of the official code.

tests/golden/metrics holds made-up captions and answers with what pycocoevalcap 1.2 (its Java tokenizer
included) and the VQA evaluation (commit a013f00) made of them. Scores get the official tokens, so a fault of
the tokenizer and one of a metric are told apart; the last caption test then goes the whole way from the raw
strings.
"""
import json
from pathlib import Path

import pytest

from eval import bleu, cider, rouge_l, vqa_accuracy
from support.formats.ptb import ptb_tokenize
from support.formats.vqa import CONTRACTIONS, NUMBER_WORDS, vqa_normalize

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
CAPTIONS, VQA, TABLES = (json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
                         for name in ("captions", "vqa", "text_constants"))
CORPORA = {"all kinds": CAPTIONS, **CAPTIONS["corner_corpora"]}
# double precision, sums in another order; tiny BLEUs such as 1e-11 count as well
ALMOST = dict(rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("corpus", CORPORA.values(), ids=CORPORA)
def test_caption_scores_of_the_corpus_and_of_each_image_are_official(corpus):
    items = corpus["items"]
    inputs = [item["candidate_tokens"] for item in items], [item["references_tokens"] for item in items]
    for name, metric in (("bleu", bleu), ("rouge_l", rouge_l), ("cider", cider)):
        total, each = metric(*inputs)
        assert total == pytest.approx(corpus["corpus"][name], **ALMOST), name
        assert len(each) == len(items)
        for item, score in zip(items, each):
            assert score == pytest.approx(item[name], **ALMOST), (name, item["candidate"])


def test_raw_captions_get_the_official_scores():
    def tokens(text):
        return " ".join(ptb_tokenize(text))
    items = CAPTIONS["items"]
    inputs = (
        [tokens(item["candidate"]) for item in items],
        [[tokens(r) for r in item["references"]] for item in items],
    )
    for name, metric in (("bleu", bleu), ("rouge_l", rouge_l), ("cider", cider)):
        assert metric(*inputs)[0] == pytest.approx(CAPTIONS["corpus"][name], **ALMOST), name


def test_cider_of_a_subset_is_another_number():
    """Why scores of different evaluation sizes do not compare: the weights come from the references at
    hand."""
    candidates = [item["candidate_tokens"] for item in CAPTIONS["items"]]
    references = [item["references_tokens"] for item in CAPTIONS["items"]]
    assert abs(cider(candidates[:20], references[:20])[1][0] - cider(candidates, references)[1][0]) > 0.01


def test_the_tables_of_the_vqa_evaluation_are_complete():
    """Im, Ive, Id've, I'dve can never match (words are in lower case by then); let's and she's change
    nothing."""
    table = {k: v for k, v in TABLES["vqa_contractions"].items() if k != v and k == k.lower()}
    assert CONTRACTIONS == table
    assert NUMBER_WORDS == TABLES["vqa_number_words"]


def test_answers_are_normalised_as_officially():
    for text, _, normal, _ in VQA["normalise"]:
        assert vqa_normalize(text.replace("\n", " ").replace("\t", " ").strip()) == normal, repr(text)


def test_vqa_accuracy_is_official():
    total = 0.0
    for item in VQA["items"]:
        accuracy = 100 * vqa_accuracy(item["prediction"], [a["answer"] for a in item["answers"]])
        assert accuracy == pytest.approx(item["accuracy"], abs=1e-9), (
            item["question_id"],
            item["prediction"],
        )
        total += accuracy
    assert total / len(VQA["items"]) == pytest.approx(VQA["overall"]["overall"], abs=1e-9)


@pytest.mark.parametrize("equal, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_by_hand(equal, accuracy):
    """Three of ten agree: each of the three sees two others (2/3), each of the seven sees three (1): (3 · 2/3
    + 7) / 10 = 0.9."""
    answers = ["red"] * equal + [f"colour {n}" for n in range(10 - equal)]
    assert vqa_accuracy("red", answers) == pytest.approx(accuracy)


def test_unanimous_answers_are_compared_letter_by_letter():
    assert vqa_accuracy("Red", ["red"] * 10) == 0
    assert vqa_accuracy("Red.", ["red"] * 9 + ["the red"]) == 1
