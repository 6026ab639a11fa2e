"""LiMBeR is the authors' map, per cell of a grid and of one pooled vector, and it trains by its name."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import data
import train
from conftest import TINY, check, fixed_loss, golden, tiny_vlm
from model import IGNORE, IMAGE, DecoderConfig
from papers import limber, make_bridge
from papers.limber import NamesTask, PixelsTask
from papers.recipe import Ingredients
from support.formats import load_bridge, load_vlm
from support.formats.files import UserError
from support.lab.attention import rollout


def test_the_map_is_the_authors_per_cell_and_of_a_pooled_vector(tmp_path):
    """The case's loss goes over four outputs; MAGMA's two, which have a LayerNorm, stand as they are."""
    folder, case, x, expected = golden("magma-prefix")
    tensors = load_file(folder / "model.safetensors")
    bridges = {}
    outputs = {key: expected[key] for key in ("limber", "magma", "pooled", "pooled_ln")}
    for key, visual in (("limber", x["spatial"]), ("pooled", x["pooled"][:, None])):
        torch.save({w: tensors[f"{key}.proj.{w}"] for w in ("weight", "bias")}, tmp_path / "proj.ckpt")
        options = dict(tokens=3, reads="pooled") if key == "pooled" else {}
        bridges[key] = load_bridge("limber", tmp_path, **options)
        outputs[key] = bridges[key].prefix(visual)
        check(case, key, outputs[key], expected[key])
    loss = fixed_loss(torch.cat([y.flatten() for y in outputs.values()]))
    loss.backward()
    check(case, "grad.loss", loss.detach(), expected["grad.loss"])
    for key, bridge in bridges.items():
        for ending in ("weight", "bias"):
            name = f"grad.{key}.proj.{ending}"
            check(case, name, bridge.get_parameter(f"map.{ending}").grad, expected[name])


def test_the_published_size():
    with torch.device("meta"):
        bridge = make_bridge("limber", DecoderConfig(width=4096), 3072)
    assert sum(p.numel() for p in bridge.parameters()) == 12_587_008


def test_dropout_works_in_training_alone():
    vlm, features = tiny_vlm("limber", dropout=0.5), torch.ones(1, 200, 20)
    linear = vlm.bridge.map(features)
    assert torch.equal(vlm.bridge.prefix(features), linear)
    y = vlm.bridge.train().prefix(features)
    zero = y == 0
    assert 0.4 < zero.float().mean() < 0.6              # 6,400 entries: 0.5 ± 0.02 at three standard errors
    torch.testing.assert_close(y[~zero], 2 * linear[~zero])


def test_a_pooled_vector_becomes_several_words():
    vlm = tiny_vlm("limber", tokens=4, reads="pooled")
    tokens = torch.tensor([[3, IMAGE, 5]])
    assert vlm(tokens, torch.zeros(1, 3, 24, 24)).shape == (1, 2 + 4, TINY.vocab_size)
    assert torch.equal(rollout(vlm.bridge, {}, torch.zeros(2, 1, 20)), torch.ones(2, 4, 1))


def test_a_vit_learns_the_name_of_the_shape_in_a_cell_or_its_pixels():
    given = Ingredients(torch.device("cpu"), seed=3, batch=2, steps=1, world=None)
    names, pixels = NamesTask(given), PixelsTask(given)
    (piece,) = names.batch(4)
    world = data.Shapes(seed=3)
    for row, i in zip(piece["tokens"].tolist(), (8, 9)):        # items of step 4
        shown = {t.cell: t.shape for t in world.scene(world.rng(i))}
        assert row == [data.SHAPES.index(shown[c]) if c in shown else IGNORE for c in range(9)]
    logp = names.answer(piece["pixels"]).log_softmax(-1)
    told = [-logp[b, c, n] for b, row in enumerate(piece["tokens"]) for c, n in enumerate(row) if n >= 0]
    torch.testing.assert_close(names.loss(**piece), torch.stack(told).mean())
    y, x = pixels.answer(piece["pixels"]), piece["pixels"]
    right = [y[:, c].view(2, 3, 16, 16) - x[:, :, 16 * (c // 3):, 16 * (c % 3):][:, :, :16, :16]
             for c in range(9)]
    torch.testing.assert_close(pixels.loss(**piece), torch.stack(right).square().mean())


def test_a_map_reads_the_vit_that_another_run_has_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(limber, "linear_probe", lambda vit, **sizes: {"shape": 0.5})
    argv = ["--steps", "1", "--batch", "4", "--dtype", "float32"]
    made = train.main(["--recipe", "limber-names", *argv, "--out", str(tmp_path / "vit")])
    assert (tmp_path / "vit" / "vit" / "probe.json").exists()
    argv += ["--init", str(tmp_path / "vit"), "--eval-items", "2", "--samples", "0"]
    module = train.main(["--bridge", "limber", *argv, "--out", str(tmp_path / "map")])
    for vit in (module.vit, load_vlm(tmp_path / "map").vit):
        assert all(torch.equal(a, b) for a, b in zip(vit.parameters(), made["vit"].parameters()))
    with pytest.raises(UserError, match="does not read --data"):
        train.main(["--recipe", "limber-names", "--data", "emoji"])
