"""eval.py --claim: every claim of the table can be run and judged, verdicts are computed, and the worlds that it needs say what they promise."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from model import IMAGE
from support.formats.pictures import load_processor
from support.lab.claims import few_shot_accuracy
from support.worlds import open_data
from support.worlds.text import shapes_tokenizer
import eval as evaluation
import train
from papers import make_bridge
from support.lab.claims import MEASUREMENTS, arm_flags, arm_folder, arms_of, judge, run_claims
from support.lab.claims_list import ARMS, CLAIMS, Claim
from model import VLM
from support.formats.files import UserError, read_json
from support.formats.llama import load_decoder
from support.formats.vision import load_vit

WEIGHTS = Path(evaluation.__file__).parent / "weights"


def test_a_verdict_is_two_standard_errors_of_the_difference():
    assert judge([1.0, 1.1, 1.2], [0.0, 0.1, 0.2]) == "shown"
    assert judge([0.0, 0.1, 0.2], [1.0, 1.1, 1.2]) == "opposite"
    assert judge([0.0, 1.0, 2.0], [0.1, 0.9, 1.7]) == "not shown"
    # d = 2, s² = 1 on both sides: e = √(2/3) = 0.816; below: d = 1.9, s² = 0.98, e = √(0.98) = 0.99 with two seeds
    assert judge([2.0, 3.0, 4.0], [0.0, 1.0, 2.0]) == "shown"
    assert judge([2.2, 3.6], [0.3, 1.7]) == "not shown"


def test_no_worse_is_shown_unless_it_is_clearly_worse():
    assert judge([0.0, 1.0, 2.0], [0.1, 0.9, 1.7], "≥") == "shown"
    assert judge([0.0, 0.1, 0.2], [1.0, 1.1, 1.2], "≥") == "opposite"


def test_one_seed_shows_nothing():
    assert judge([1.0], [0.0]) == judge([1.0], [0.0], "≥") == "one seed"


def test_every_claim_names_its_source_and_compares_arms_by_numbers_that_are_looked_at():
    names = {
        "answers": {"mean", "color", "count", "existence", "position", "1 thing", "4 things"},
        "captions": {"cider"},
        "loss": {"first loss", "loss"},
        "blind": {"blind mean", "blind cider"},
        "gates": {"lower layers", "upper layers", "gate halfway", "gate at the end"},
        "reasons": {"mean", "color", "count", "existence", "position"},
        "shots": {"0 shots", "1 shots", "4 shots", "8 shots"},
        "pages": {"0 pictures before", "3 pictures before"},
    }
    assert names.keys() == MEASUREMENTS.keys()
    for name, claim in CLAIMS.items():
        assert re.match(r"document [0-4], ", claim.source) and claim.says.endswith("."), name
        assert claim.expect, name
        for left, relation, right, _ in claim.expect:
            assert relation in (">", "≥")
            for side in (left, right):
                arm, _, number = side.partition(": ")
                known = set().union(*(names[look] for look in ARMS[arm][1].split()))
                assert (number or claim.columns.split()[0].replace("_", " ")) in known, side
    assert len({arm_folder("out", arm, 0) for arm in ARMS}) == len(ARMS)
    assert {arm for claim in CLAIMS.values() for arm in arms_of(claim)} | {
        "llava-1",
        "llava-1-last",
        "blip2-1",
    } == set(ARMS)  # no arm for nothing


@pytest.mark.parametrize("arm", ARMS)
def test_the_flags_of_an_arm_are_a_command_line_of_train(arm, tmp_path):
    s, resume = train.settings_from(arm_flags(arm, 2, tmp_path))
    assert (s.seed, s.threads, resume) == (2, 1, False)
    assert s.out.startswith(str(tmp_path)) and s.out.endswith("-s2")
    if s.init not in ("", "none"):                      # the run of another arm, of the same seed
        (tmp_path / s.init).mkdir(parents=True)
    train.with_recipe(s, s.recipe)


STUB = {
    "first": ("--bridge linear --captions 1", "loss"),
    "second": ("--bridge linear --captions 1 --init {first}", "captions loss"),
}
CLAIM = {"longer": Claim("A run that goes on from another has the lower loss.", "document 0, nowhere",
                         (("first: loss", ">", "second: loss", "2, 1"),), "loss cider")}


def test_a_claim_is_trained_looked_at_judged_and_kept(tmp_path, capsys):
    ask = lambda common: run_claims(
        ["longer"], 2, 1, tmp_path / "runs", tmp_path / "claims.txt", CLAIM, STUB, common, 4
    )
    quick = "--steps 12 --batch 4 --threads 1 --log-every 4 --eval-items 1 --samples 1 --lr 0.01"
    text = ask(quick)
    assert (tmp_path / "claims.txt").read_text(encoding="utf-8") == text
    assert (
        "longer: A run that goes on from another has the lower loss. (document 0, nowhere)" in text
        and "(document: 2, 1)" in text
    )
    seen = {
        (arm, seed): read_json(tmp_path / f"runs/{arm}-s{seed}/seen.json") for arm in STUB for seed in (0, 1)
    }
    losses = [[seen[arm, seed]["loss"]["loss"] for seed in (0, 1)] for arm in STUB]
    verdict = judge(*losses)
    assert re.search(rf"^    longer +{verdict}$", text, re.M) and re.search(
        rf"^    {verdict} +first: loss > second: loss", text, re.M
    )
    for arm, values in zip(STUB, losses):               # the table holds what the runs logged
        row = next(line for line in text.splitlines() if line.startswith(f"    {arm} "))
        assert f"{np.mean(values):.3g} ± {np.std(values, ddof=1):.2g}" in row
    assert seen["second", 1]["flags"][-6:] == [
        "--init",
        str(tmp_path / "runs/first-s1"),
        "--seed",
        "1",
        "--out",
        str(tmp_path / "runs/second-s1"),
    ]
    assert "cider" in seen["second", 0]["captions"] and "captions" not in seen["first", 0]

    bridge, when = tmp_path / "runs/second-s1/bridge.safetensors", lambda: bridge.stat().st_mtime_ns
    before = when()
    assert ask(quick) == text and when() == before      # finished runs are kept
    ask(quick.replace("12", "13"))
    assert when() != before                             # unless they were asked for something else


def test_an_unknown_claim_names_the_nearest():
    with pytest.raises(UserError, match='unknown claim "zero_init"; did you mean "zero-init"'):
        evaluation.main(["--claim", "zero_init"])


def test_multiple_choice_offers_the_answer_once_and_its_solution_tells_the_scene():
    world = open_data("shapes-choices:test", seed=3)
    for i in range(30):
        item, plain = world.item(i), open_data("shapes:test", seed=3).item(i)
        assert [q.question for q in item.qas] == [q.question for q in plain.qas] and (
            item.image == plain.image
        ).all()
        for q in item.qas:
            assert q.choices[q.correct] == q.answer and len(set(q.choices)) == len(q.choices) == (
                2 if q.kind == "existence" else 4
            )
            assert plain.captions[0] in q.solution
        assert len(world.item(i, turns=1).qas) == 1
    places = [q.correct for i in range(100) for q in world.item(i).qas if q.kind != "existence"]
    assert min(places.count(n) for n in range(4)) > 0.18 * len(places)  # the letter gives nothing away


def test_a_lesson_in_multiple_choice_reasons_first_or_answers_first():
    tokenizer = shapes_tokenizer()
    item = open_data("shapes-choices").item(0, turns=1)
    learned = lambda form: tokenizer.decode(
        [t for t in data.training_document(item, tokenizer, form=form).labels if t >= 0]
    )
    letter = "ABCD"[item.qas[0].correct]
    assert learned("QCM-LEA").startswith(" Look at each place. There is ") and learned("QCM-LEA").endswith(
        f" The answer is {letter}."
    )
    assert learned("QCM-ALE").startswith(f" The answer is {letter}. BECAUSE: Look at each place. There is ")


def test_alt_texts_name_one_thing_and_one_in_five_a_wrong_one():
    world, right = open_data("shapes-web", seed=1), 0
    for i in range(300):
        item, plain = world.item(i, turns=5), open_data("shapes", seed=1).item(i, turns=5)
        assert (item.image == plain.image).all() and item.qas == [] and len(item.captions) == 1
        named = [(c, s) for c, s in data.SEEN if f"{c} {s}" in item.captions[0]]
        assert len(named) == 1
        right += f"{named[0][0]} {named[0][1]}" in plain.captions[0]
    assert 0.76 < right / 300 < 0.88                    # 0.8, and some of the wrong ones are there by chance
    test, plain = (open_data(f"{kind}:test").item(7) for kind in ("shapes-web", "shapes"))
    assert (
        test.captions == plain.captions and test.qas == plain.qas
    )  # evaluated on pictures that are told in full


def test_reasoning_stands_before_the_answer_or_after_it():
    first, after = (open_data(kind).item(4, turns=2) for kind in ("shapes-reasons", "shapes-answers"))
    assert len(first.qas) == 2 and [q.question for q in first.qas] == [q.question for q in after.qas]
    for q, r in zip(first.qas, after.qas):
        reasoning, answer = q.answer.split(": ")
        assert reasoning == first.captions[0] and r.answer == f"{answer}: {reasoning}"
        assert answer in (*data.COLORS, *data.NUMBERS, *data.PLACES, "yes", "no")
    tested, plain = (open_data(f"{kind}:test").item(4) for kind in ("shapes-reasons", "shapes"))
    assert tested.qas == plain.qas


def test_examples_stand_before_the_question_each_with_its_own_picture(monkeypatch):
    tokenizer, decoder, vit = shapes_tokenizer(), load_decoder(WEIGHTS / "decoder"), load_vit(WEIGHTS / "vit")
    vlm = VLM(vit, make_bridge("linear", decoder.config, vit.config.width), decoder, tokenizer.image)
    vlm.processor = load_processor(WEIGHTS / "vit")
    items, written = [data.Shapes("test").item(i) for i in range(3)], []

    def truth(generate, documents, tokenizer, longest, beams, features, pictures):
        for d, rows in zip(documents, pictures):
            assert (
                d.tokens.count(IMAGE) == len(rows) == len(set(rows)) == 3
                and d.tokens.count(tokenizer.eos) == 2
            )
            written.append(
                (
                    tokenizer.decode([t for t in d.tokens if t >= 0]).split("Question: ")[-1],
                    features[rows[-1]],
                )
            )
        answers = {q.question: q.answer for item in items for q in item.qas}
        return [answers[question.removesuffix(" Answer:")] for question, _ in written]
    monkeypatch.setattr("support.lab.protocols.generate_texts", truth)
    assert few_shot_accuracy(vlm, tokenizer, items, 2) == 1.0
    own = evaluation.vision_features(vlm, items, False)
    assert len(written) == sum(len(item.qas) for item in items)
    for question, last in written:  # the last picture is the one that is asked about
        n = next(
            n
            for n, item in enumerate(items)
            if question.removesuffix(" Answer:") in [q.question for q in item.qas]
        )
        torch.testing.assert_close(last, own[n])
