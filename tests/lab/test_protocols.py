"""Prompts are each paper's, to the letter; examples never show the question; what is asked in one batch is
answered as one by one."""

import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from conftest import GOLDEN
from eval import generate_ids
from model import IMAGE
from support.formats.files import UserError
from support.formats.vlm import open_run
from support.lab.protocols import Comparison, build_prompt, few_shot_examples, multiple_choice, yes_no_pairs
from support.worlds import open_data
from support.worlds.text import shapes_tokenizer

TOKENIZER = shapes_tokenizer()


def spelled(document: data.Document, tokenizer=TOKENIZER) -> str:
    return "".join("<image>" if t == IMAGE else tokenizer.decode([t], special=True) for t in document.tokens)


def item(question: str = "", answer: str = "", caption: str = "", **more) -> data.Item:
    picture = np.zeros((48, 48, 3), np.uint8)
    questions = [data.QA("color", question, answer)] * bool(question)
    return data.Item(picture, [caption] * bool(caption), questions, f"{question}{caption}", **more)


RED, BLUE = item("is it red?", "yes"), item("is it blue?", "no")
CHOICE = data.QA("biology", "Which is it?", "a dog", choices=("a cat", "a dog"), correct=1, lecture="Look.",
                 solution="It barks.")


# the prompts

@pytest.mark.parametrize(
    "protocol, examples, text",
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
            "<|begin|><image>Please answer the question. Question: is it red? Answer: yes."
            "<image>Question: is it blue? Answer:",
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
def test_a_question_is_asked_in_the_papers_words(protocol, examples, text):
    assert spelled(build_prompt(TOKENIZER, protocol, BLUE, BLUE.qas[0], examples)).endswith(text)


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
        spelled(build_prompt(TOKENIZER, protocol, item(caption="a cat"), examples=[item(caption="a dog")]))
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
    file = GOLDEN / "metrics" / "openflamingo_fewshot.json"
    cases = json.loads(file.read_text(encoding="utf-8"))["prompts"]
    kinds = {(case["task"], case["shots"]) for case in cases}
    assert kinds == {("vqa", 0), ("caption", 0), ("vqa", 2), ("caption", 2)}
    for case in cases:
        vqa = case["task"] == "vqa"
        demos = [item(*demo) if vqa else item(caption=demo) for demo in case["demos"]]
        examples = [replace(d, image=d.image if case["shots"] else None) for d in demos]
        question = data.QA("", case["question"], "") if vqa else None
        document = build_prompt(tokenizer, "openflamingo", item(), question, examples)
        assert spelled(document, tokenizer) == "<|begin|>" + case["text"]


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
    """Ten records, of which two share a picture under two names: neither it nor its double is an example."""
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
        assert q.choices[q.correct] == q.answer and len(set(q.choices)) == len(q.choices)
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
    """Folders of runs of a few steps."""
    out = tmp_path_factory.mktemp("runs")
    quick = ["--steps", "4", "--batch", "8", "--dtype", "float32", "--eval-items", "1", "--samples", "0"]
    for bridge in ("mapl", "flamingo"):
        train.main(["--bridge", bridge, *quick, "--out", str(out / bridge)])
    return {bridge: str(out / bridge) for bridge in ("mapl", "flamingo")}


ITEMS = [data.Shapes("test").item(i) for i in range(6)]


@pytest.mark.parametrize("bridge, beams", [("mapl", 1), ("mapl", 3), ("flamingo", 1), ("flamingo", 3)])
def test_answers_after_examples_are_the_same_in_a_batch_and_alone(runs, bridge, beams):
    vlm, tokenizer, _ = open_run(runs[bridge], "cpu")
    train_split = data.Shapes("train")
    examples = [few_shot_examples(train_split, i, 3)[:n % 4] for n, i in enumerate(ITEMS)]   # 1 to 4 pictures
    documents = [build_prompt(tokenizer, "ours", i, i.qas[0], e) for i, e in zip(ITEMS, examples)]
    items, keys = [[*e, i] for i, e in zip(ITEMS, examples)], [str(n) for n in range(6)]
    together = Comparison(vlm, tokenizer, beams=beams).texts(keys, documents, items, 8)
    single = [Comparison(vlm, tokenizer, beams=beams).texts(["0"], [d], [i], 8)[0]
              for d, i in zip(documents, items)]
    assert together == single
    by_pixels = []
    for d, row in zip(documents, items):
        pixels = data.to_pixels([i.image for i in row], 48, vlm.processor)
        tokens, eos = torch.tensor([d.tokens]), tokenizer.eos
        ids = generate_ids(vlm, tokens, 8, beams, stop=(eos,), pixels=pixels)[0].tolist()
        by_pixels.append(tokenizer.decode(ids[:ids.index(eos)] if eos in ids else ids).strip())
    assert together == by_pixels  # and each picture stands where its example does


def test_options_are_ranked_by_the_likelihood_of_their_words(runs):
    """Beside the loss that training uses, one by one; rows of unequal length, with and without a picture."""
    vlm, tokenizer, _ = open_run(runs["mapl"], "cpu")
    items = [ITEMS[0], replace(ITEMS[1], image=None), *ITEMS[2:]]
    documents = [
        build_prompt(tokenizer, "ours", i, i.qas[0]).add(" " + "red " * n, learn=True).end()
        for n, i in enumerate(items, 1)
    ]
    keys = [str(n) for n in range(6)]
    found = Comparison(vlm, tokenizer).log_likelihoods(keys, documents, [[i] for i in items])
    for d, i, x in zip(documents, items, found):
        pixels = torch.zeros(0, 3, 48, 48)
        if i.image is not None:
            pixels = data.to_pixels([i.image], 48, vlm.processor)
        loss, count = vlm.loss(torch.tensor([d.tokens]), torch.tensor([d.labels]), pixels)
        assert x == pytest.approx(-loss.item(), rel=1e-4) and count > 1
