"""GLIDE: the text steers the network and padding does not; it trains by its name, draws, and opens again."""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from conftest import ROOT, stir, tiny_decoder
from data import COLUMNS, Shapes, caption_scene
from model import ViTConfig
from papers.ddpm import Diffusion, cosine_betas
from papers.glide import CONFIG, Denoiser, Painter, read_texts, text_rows
from papers.glide_task import GlideTask
from papers.recipe import Ingredients
from support.formats import load_decoder
from support.formats.files import UserError
from support.formats.glide import load_painter
from support.plumbing.log import read_log
from support.worlds.text import shapes_tokenizer

SMALL = ViTConfig(image_size=16, patch=8, width=24, layers=2, heads=2, hidden=32, act="gelu", cls=False,
                  pre_norm=False, patch_bias=True)


@pytest.fixture(scope="module")
def painter() -> Painter:
    tokenizer = shapes_tokenizer()
    return Painter(stir(Denoiser(SMALL, 32)), tiny_decoder(vocab_size=tokenizer.vocab_size), tokenizer,
                   Diffusion(cosine_betas(1000)))


@torch.no_grad()
def test_a_text_is_read_and_its_padding_is_not(painter):
    tokens, mask = text_rows(painter.tokenizer, ["a red ring", "", "a small blue cross at the top left"])
    assert mask.sum(1).tolist()[1] == 1 + len(painter.tokenizer.begin)          # ∅ is its end token
    states = read_texts(painter.decoder, tokens, mask)
    x, t = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 500, 999])
    y = painter.denoiser(x, t, states, mask)
    n = mask.sum(1)
    for row in range(3):
        alone = painter.denoiser(x[row:row + 1], t[row:row + 1], states[row:row + 1, :n[row]],
                                 mask[row:row + 1, :n[row]])
        torch.testing.assert_close(y[row:row + 1], alone, atol=1e-5, rtol=1e-5)     # another length of sums
    other = states.clone()
    other[:, 0] += 1
    assert (painter.denoiser(x, t, other, mask) - y).abs().amax((1, 2, 3)).min() > 1e-3             # (G8)
    assert (painter.denoiser(x, t + 1, states, mask) - y).abs().amax((1, 2, 3)).min() > 1e-4        # (G7)


def test_a_forecast_is_laid_out_patch_by_patch():
    """Where a patch went in, its token's pixels come out: the patches stand row by row."""
    denoiser = Denoiser(SMALL, 8)
    with torch.no_grad():
        denoiser.pixels.weight.normal_()
        for block in denoiser.blocks:                   # no token reads another
            block.o.weight.zero_()
        denoiser.positions.copy_(torch.arange(4.0)[:, None] * torch.randn(24))
        text = torch.zeros(1, 1, 8), torch.ones(1, 1, dtype=torch.bool)
        y = denoiser(torch.zeros(1, 3, 16, 16), torch.tensor([0]), *text)
        denoiser.positions[1] = 0                       # top right
        changed = (denoiser(torch.zeros(1, 3, 16, 16), torch.tensor([0]), *text) - y).abs().amax(1)[0]
    assert changed[:8, 8:].min() > 0 and not changed[:8, :8].any() and not changed[8:].any()


def test_guidance_of_one_is_the_text_alone_and_of_zero_none_of_it(painter):
    a, b = painter.draw(["a red ring"], scale=0.0, steps=3), painter.draw(["a large blue cross"], 0.0, 3)
    assert np.array_equal(a[0], b[0])
    c, d = painter.draw(["a red ring"], 1.0, 3), painter.draw(["a large blue cross"], 1.0, 3)
    assert not np.array_equal(c[0], d[0])
    assert np.array_equal(painter.draw(["a red ring"], 1.0, 3, seed=0)[0], c[0])
    assert not np.array_equal(painter.draw(["a red ring"], 1.0, 3, seed=1)[0], c[0])


def test_the_loss_of_a_batch_is_a_function_of_the_step_and_a_fifth_has_no_text():
    decoder, tokenizer = load_decoder(ROOT / "weights/decoder"), shapes_tokenizer()
    given = Ingredients(torch.device("cpu"), 0, 40, 1, Shapes(), decoder=decoder, tokenizer=tokenizer)
    task = GlideTask(given)
    (piece,), (again,) = task.batch(3), task.batch(3)
    assert all(torch.equal(piece[key], again[key]) for key in ("pixels", "tokens", "t", "noise"))
    empty = (piece["mask"].sum(1) == piece["mask"].sum(1).min()).float().mean()
    assert 0.05 < empty < 0.4 and piece["pixels"].abs().max() <= 1
    grey = piece["pixels"].square().mean() * 40         # the head begins at 0: the first forecast is grey
    torch.testing.assert_close(task.loss(**piece), grey, atol=0, rtol=0.05)


def test_at_first_the_states_are_those_of_the_frozen_decoder():
    states = torch.randn(2, 8, 20)
    assert not Denoiser(SMALL, 8).phrase(states).any()                          # (G9): V = 0, without a bias


def test_a_patch_begins_by_reading_the_phrase_of_its_place_and_nothing_else_learned():
    """Under noise alone the last word of its phrase gets most of a patch's attention; by chance one of 35."""
    decoder, tokenizer, world = load_decoder(ROOT / "weights/decoder"), shapes_tokenizer(), Shapes("val")
    torch.manual_seed(0)
    task = GlideTask(Ingredients(torch.device("cpu"), 0, 4, 1, world, decoder=decoder, tokenizer=tokenizer))
    denoiser, own = task.module["denoiser"], []
    scenes = [world.scene(world.rng(i)) for i in range(20)]
    tokens, mask = text_rows(tokenizer, [caption_scene(things) for things in scenes])
    states = read_texts(decoder, tokens, mask)
    handle = denoiser.blocks[0].attend.register_forward_pre_hook(
        lambda _, args: own.append((args[0], args[1], args[3])))
    with torch.no_grad():
        y = denoiser(torch.randn(20, 3, 48, 48), torch.full((20,), 999), states, mask)
        handle.remove()
        (q, k, bias), = own
        weights = (q @ k.mT / q.shape[-1]**0.5 + bias).softmax(-1).mean(1)      # (B, 9, n + 9)
        ends = torch.isin(tokens, torch.tensor([tokenizer.encode(f" {word}")[0] for word in COLUMNS]))
        found = [weights[b, thing.cell, place].item() for b, things in enumerate(scenes)
                 for thing, place in zip(things, ends[b].nonzero()[:, 0])]
        assert np.mean(found) > 0.6 and y.std((2, 3)).max() < 1e-6       # the head begins at 0
        denoiser.phrase.weight[:, :, -2] = torch.eye(128)       # (G9): a state takes up the one before it
        denoiser.phrase.bias.zero_()
        moved = states + torch.nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]
        plain = Denoiser(CONFIG, 128)
        plain.load_state_dict({**denoiser.state_dict(), "phrase.weight": torch.zeros(128, 128, 8)})
        for network in (denoiser, plain):
            network.pixels.weight.fill_(0.1)
        a, b = (network(torch.ones(20, 3, 48, 48), torch.full((20,), 5), x, mask)
                for network, x in ((denoiser, states), (plain, moved)))
        torch.testing.assert_close(a, b)


def test_a_run_draws_opens_again_and_draws_the_same(tmp_path):
    out = tmp_path / "run"
    train.main(["--recipe", "glide", "--steps", "6", "--batch", "8", "--eval-items", "2", "--log-every", "1",
                "--warmup", "0", "--dtype", "float32", "--out", str(out)])
    loss = [line["loss"] for line in read_log(out / "log.jsonl") if "loss" in line]
    assert loss[-1] < loss[0] / 2
    scores = json.loads((out / "pictures.json").read_text())
    assert set(scores) == {"val", "test"} and set(scores["val"]) >= {"things", "pictures", "chance"}
    assert Image.open(out / "pictures.png").size == (3 * (4 * 50 - 2), 3 * 48)
    painter = load_painter(out)
    assert not any(name.startswith("decoder") for name in painter.denoiser.state_dict())
    texts = ["a large red ring at the top left", "a small blue cross at the bottom right"]
    evaluation.main(["draw", out, *texts, "--each", "2", "--steps", "2", "--out", tmp_path / "drawn.png"])
    drawn = np.asarray(Image.open(tmp_path / "drawn.png"))[1::3, 1::3]
    expected = painter.draw([text for text in texts for _ in range(2)], steps=2)
    for n, picture in enumerate(expected):
        top, left = 50 * (n // 2), 50 * (n % 2)
        assert np.array_equal(drawn[top:top + 48, left:left + 48], picture)
    with pytest.raises(UserError, match="glide"):
        evaluation.main([str(out)])


def test_a_run_of_another_recipe_draws_nothing(untrained_run):
    with pytest.raises(UserError, match="draws no pictures"):
        evaluation.main(["draw", untrained_run, "a red ring"])
