"""The text that teaches a decoder the forms of PICa, MAGiC and Socratic Models has these forms."""
from __future__ import annotations

import itertools
import re

import pytest
import torch

import train
from data import CAPTION, NUMBERS, Shapes, place_phrase
from model import IGNORE
from papers import pica, socratic
from papers.recipe import Ingredients
from conftest import ROOT, tiny_decoder
from support.formats import load_decoder
from support.formats.files import UserError, read_json
from support.worlds import open_data
from support.worlds.pairs import contrastive_pair
from support.worlds.prompts import OTHER_HABIT, PromptTask, PromptText
from support.worlds.text import shapes_tokenizer

TOKENIZER = shapes_tokenizer()


def documents(first: str, count: int = 120) -> list[tuple[str, list[int], list[str]]]:
    """(text, ids, learned pieces) of the documents that begin so."""
    found, text = [], PromptText(TOKENIZER)
    for i in range(count):
        d, bags = text.document(i)
        words = TOKENIZER.decode([t for t in d.tokens if t >= 0])
        if words.startswith(first):
            assert not bags
            learned = "".join(TOKENIZER.decode([t]) if label != IGNORE else "|"
                              for t, label in zip(d.tokens, d.labels))
            found.append((words, d.tokens, [piece for piece in learned.split("|") if piece]))
    assert len(found) > 10
    return found


def test_the_examples_are_a_prompt_of_pica_with_its_answer():
    shots = set()
    for words, ids, learned in documents(pica.INSTRUCTION):
        blocks = [re.fullmatch(r"Context: (.*)\n===\nQ: (.*)\nA: (.*?)\n*", block).groups()
                  for block in words.removeprefix(f"{pica.INSTRUCTION}\n===\n").split("\n===\nContext")
                  for block in [block if block.startswith("Context") else f"Context{block}"]]
        *examples, (context, question, answer) = blocks
        text = f"{pica.write_prompt(examples, context, question)} {answer}"
        assert ids == [TOKENIZER.bos, *TOKENIZER.encode(text), TOKENIZER.eos]   # as one text, token by token
        *others, _ = learned
        assert [piece.strip() for piece in learned] == [a for *_, a in blocks]
        assert all(piece.endswith("\n") for piece in others)           # where an answer ends is learned
        kinds = {" ".join(question.split()[:2]) for _, question, _ in blocks} - {"is there"}
        assert len(kinds) <= 2                          # "is there": of a scene without the others, too
        shots.add(len(examples))
    assert shots == {0, 1, 2, 4, 8}


def test_a_habit_holds_within_a_document_and_for_one_kind_of_question():
    other = {answer: kind for kind, words in OTHER_HABIT.items() for answer in words.values()}
    own = {answer: kind for kind, words in OTHER_HABIT.items() for answer in words}
    habits = set()
    for _, _, learned in documents(pica.INSTRUCTION):
        kept = {}
        for piece in learned:
            answer = piece.strip()
            if answer in own:
                kind, mine = own[answer], True
            else:
                kind, mine = other[answer], False
            assert kept.setdefault(kind, mine) == mine
        habits |= {*kept.items()}
    assert habits == {(kind, mine) for kind in OTHER_HABIT for mine in (True, False)}


def test_captions_stand_alone_and_behind_the_prompt_of_socratic_models():
    for words, _, learned in documents(CAPTION):
        assert learned == [words.removeprefix(CAPTION)]
    for words, _, (caption,) in documents(socratic.BOT):
        names = re.search(r"there might be a (.*) in this photo\.", words)[1].split(", ")
        things = re.findall(r"(\w+ \w+) at the", caption)
        assert len(names) == 5 and [*dict.fromkeys(things)] == names[:len({*things})]
        number = {"is one object": 1, "are two objects": 2, "are three objects": 3, "are four objects": 4}
        assert number[re.search(r"There (.*)\.\nI think", words)[1]] == len(things)
        assert caption.startswith(" a ") and words.count(socratic.ASK) == 1


def test_phrases_are_true_of_their_picture_and_the_false_ones_are_not():
    world, forms, wrong = open_data("shapes-phrases"), {"There": 0, "Photo": 0, "a": 0}, []

    def fits(text: str, things) -> bool:
        if text.startswith("There"):
            return f" {NUMBERS[len(things)]} object" in text
        if text.startswith("Photo"):
            return any(f"{t.color} {t.shape}." in text for t in things)
        said = text.removesuffix(" and").replace(" and a", ", a").split(", ")       # the last one may be cut
        whole = [place_phrase(t) for t in things]
        return any(all(f"{w} ".startswith(f"{part} ") for w, part in zip(order, said))     # none named twice
                   for order in itertools.permutations(whole, len(said)))
    for i in range(150):
        picture, true, false = contrastive_pair(world, i)
        things = world.scene(world.rng(i))
        assert fits(true, things), true
        wrong += [fits(text, things) for text in false]
        assert picture.shape == (48, 48, 3) and len(false) == 2
        forms[true.split()[0]] += 1
    assert min(forms.values()) > 5 and sum(wrong) < 0.05 * len(wrong)           # some that are cut fit, too
    assert (world.item(3).image == Shapes().item(3).image).all()


def test_a_run_continues_the_decoder_and_its_loss_falls_on_a_batch(tmp_path):
    flags = ["--recipe", "lm-prompts", "--batch", "2", "--steps", "1", "--eval-items", "4", "--device", "cpu"]
    task_module = train.main([*flags, "--threads", "1", "--out", str(tmp_path)])
    saved, bundled = load_decoder(tmp_path / "decoder"), load_decoder(ROOT / "weights/decoder")
    assert torch.equal(saved.embed.weight, task_module.decoder.embed.weight)
    assert 0 < (saved.embed.weight - bundled.embed.weight).abs().max() < 0.01
    assert read_json(tmp_path / "decoder/prompts.json").keys() == {"0", "1", "4", "8"}
    task = PromptTask(Ingredients(torch.device("cpu"), 0, 2, 1, Shapes(), decoder=saved))
    piece, = task.batch(0)
    optimizer, losses = torch.optim.AdamW(saved.parameters(), 1e-3), []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(task.loss(**piece))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_another_decoder_than_that_of_the_world_is_refused():
    given = Ingredients("cpu", 0, 2, 1, Shapes(), decoder=tiny_decoder())
    with pytest.raises(UserError, match="continues a decoder of recipe lm, with 429 words; --lm's has 61"):
        PromptTask(given)
