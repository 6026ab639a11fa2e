"""A reader that looks at the thing asked about is found, and so are soft tokens that spell their things."""

import pytest
import torch

import data
import eval as evaluation
from conftest import shapes_vlm, tiny_vlm
from model import ViT, ViTConfig
from support.formats.files import UserError
from support.formats.vlm import save_vlm
from support.lab.targets import attention_on_target, words_on_target
from support.worlds.text import shapes_tokenizer

TOKENIZER = shapes_tokenizer()


def target_by_answer(q: data.QA, things: list[data.Thing]) -> data.Thing:
    """Another way to find the thing that is asked about: by the true answer."""
    if q.kind == "position":
        return next(t for t in things if t.place == q.answer)
    return next(t for t in things if t.color == q.answer
                and (t.place in q.question or f"the {t.shape}?" in q.question))


def numbered(vlm, items, blind):
    """In place of features: the number of each picture."""
    return torch.arange(len(items)).view(-1, 1, 1).float()


def test_attention_on_target_finds_the_thing_and_the_word(monkeypatch):
    """A reader who gives the asked thing half of the attention, from the question's last word, in layer 1."""
    world = data.Shapes("test")
    questions = {(i, q.question): q for i in range(30) for q in world.item(i).qas}

    def reader(vlm, tokens, features):
        text = TOKENIZER.decode([t for t in tokens[0].tolist() if t >= 0])
        i, asked = int(features[0, 0, 0]), text.split("Question: ")[1].split(" Answer")[0]
        words = torch.full((2, 4, tokens.shape[1] - 2, 9), 0.5 / 9)
        last = [n for n, t in enumerate(tokens[0, 2:].tolist()) if TOKENIZER.decode([t]) == "?"][0] - 1
        target = target_by_answer(questions[i, asked], world.scene(world.rng(i)))
        words[1, :, last] = 0.5 * torch.eye(9)[target.cell]
        return words, torch.eye(10)[1:]  # a class token stands in front

    monkeypatch.setattr("support.lab.targets.attention_to_patches", reader)
    monkeypatch.setattr("support.lab.targets.vision_features", numbered)
    right = [q.answer for i in range(30) if len(world.scene(world.rng(i))) > 1
             for q in world.item(i).qas if q.kind in ("color", "position")]
    monkeypatch.setattr("support.lab.targets.generate_texts", lambda *a, **k: right)
    vlm = tiny_vlm("mlp", image_token=7)
    rows = {r.pop("row"): list(r.values()) for r in attention_on_target(vlm, TOKENIZER, 30)}
    cell, picture = (0.5 / 9, 0.5 / 9), (0.5, 0.5)
    expected = {
        "question: asked": (0.5 / 9, 0.5),
        "question: another": (0.5 / 9, 0.0),
        "question: picture": picture,
        "answer: asked": cell,
        "answer: another": cell,
        "answer: picture": picture,
        "all words: picture": picture,
    }
    assert rows.keys() == expected.keys()
    for name, shares in expected.items():
        assert rows[name] == pytest.approx(shares, abs=1e-6), name
    monkeypatch.setattr("support.lab.targets.generate_texts", lambda *a, **k: ["wrong"] * len(right))
    assert attention_on_target(vlm, TOKENIZER, 30) == []    # wrong answers do not count


def test_words_on_target_count_the_things_own_words_and_anothers_where_they_differ(monkeypatch):
    world = data.Shapes("test")

    def spell(vlm, tokenizer, features):  # the tokens spell their cells backwards
        words = [[] for _ in range(9)]
        for t in world.scene(world.rng(int(features[0, 0, 0]))):
            words[8 - t.cell] = [(f" {w}", 0.5) for w in (t.color, t.shape, t.size, *t.place.split())]
        return words

    monkeypatch.setattr("support.lab.targets.nearest_words", spell)
    monkeypatch.setattr("support.lab.targets.attention_to_patches", lambda *a: (None, torch.eye(9).flip(0)))
    monkeypatch.setattr("support.lab.targets.vision_features", numbered)
    own, another = words_on_target(tiny_vlm("mlp", image_token=7), TOKENIZER, 30)
    kinds = {"color", "shape", "size", "top/middle/bottom", "left/center/right"}
    assert own == {"row": "own", **dict.fromkeys(kinds, 1.0)}
    assert another == {"row": "another's", **dict.fromkeys(kinds, 0.0)}


def test_other_grids_than_three_by_three_are_refused():
    vlm = tiny_vlm("mlp", image_token=7)
    vlm.vit = ViT(ViTConfig(image_size=56, patch=8, width=20, layers=1, heads=2, hidden=20))
    for measure in (attention_on_target, words_on_target):
        with pytest.raises(UserError, match="7 x 7"):
            measure(vlm, TOKENIZER, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Untrained runs of two bridges."""
    folder = tmp_path_factory.mktemp("runs")
    sizes = {"mapl": dict(constants=4, layers=2), "zero_init": dict(prompts=4, adapted=2, depth=1)}
    for name, options in sizes.items():
        vlm = shapes_vlm(name, width=16, heads=2, **options)
        save_vlm(vlm, folder / name, vit="weights/vit", decoder="weights/decoder")
    return folder


def test_an_untrained_run_has_nothing_right_and_no_words(runs, capsys):
    evaluation.main(["targets", str(runs / "mapl"), "--items", "3"])
    text = capsys.readouterr().out
    assert "no question was answered right" in text and "own" in text and "another's" in text


def test_targets_prints_a_table_per_run(runs, capsys, monkeypatch):
    rows = [{"row": "question: asked", "layer 0": 0.625}]
    monkeypatch.setattr("support.lab.targets.attention_on_target", lambda *a: rows)
    evaluation.main(["targets", "--items", "4", str(runs / "mapl"), str(runs / "zero_init")])
    text = capsys.readouterr().out
    assert text.count("62.5") == 2 and "mapl:" in text and "zero_init:" in text
    assert text.count("another's") == 1                                         # zero_init has no soft tokens
