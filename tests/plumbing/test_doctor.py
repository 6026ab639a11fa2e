"""What a run prints before it spends the evening is true."""
from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train
from conftest import SMALL, TINY, shapes_vlm, tiny_vlm
from data import Shapes
from model import DecoderConfig, IGNORE, IMAGE
from papers import make_bridge
from support.plumbing.doctor import (advise, advise_at_end, advise_on_depth, advise_on_pictures,
                                     align_tokens, blind_loss, gradient_norms, print_modules)
from support.worlds.text import shapes_tokenizer


class Words:
    """A tokenizer of four words."""
    words = ["a", " red", " circle", "\n"]

    def decode(self, ids: list[int], special: bool = False) -> str:
        return "".join(self.words[i] for i in ids)


class Text:
    tokens = [IMAGE, 0, 1, 2, 3] * 8
    labels = [IGNORE, IGNORE, 1, 2, 3] * 8


def test_tokens_stand_above_what_is_learned_of_them():
    lines = align_tokens(Text, Words(), width=60)
    assert len(lines) % 2 == 0 and all(len(line) <= 60 for line in lines)
    assert lines[0].split()[:5] == ["<image>", "a", "~red", "~circle", "↵"]
    assert lines[1].split()[:3] == ["~red", "~circle",
                                    "↵"] and lines[0].index("~red") == lines[1].index("~red")
    assert sum(line.count("<image>") for line in lines) == 8


def test_the_blind_loss_does_not_depend_on_the_pictures_and_is_the_decoders_own():
    """The image takes no position there; so it is the loss of the text alone, from the first token on."""
    vlm = tiny_vlm("mlp")
    tokens = torch.tensor([[IMAGE, 5, 9, 17, 3]])
    labels = torch.tensor([[IGNORE, IGNORE, 9, 17, 3]])
    expected = torch.log_softmax(vlm.decoder(tokens[:, 1:])[0].detach(), -1)[[0, 1, 2], [9, 17, 3]].sum()
    piece = dict(tokens=tokens, labels=labels, mask=None)
    torch.testing.assert_close(blind_loss(vlm, piece), -expected, atol=1e-5, rtol=1e-5)     # float32 sums


def test_gradient_norms_are_those_of_parts_two_names_deep():
    a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    named = [("bridge.map.weight", a), ("bridge.map.bias", b), ("bridge.gate", c)]
    assert gradient_norms(named) == "bridge.map 5"


def test_the_table_of_modules_counts_what_is_trained(capsys):
    vlm = tiny_vlm("mlp")
    vlm.requires_grad_(False)
    vlm.bridge.requires_grad_(True)
    print_modules(vlm)
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    count = f"{sum(p.numel() for p in vlm.bridge.parameters()):,d}"
    assert rows["bridge"][1:3] == [count, count] and rows["bridge"][-1] == "trained"
    assert rows["decoder"][2] == "0" and rows["vit"][-1] == "frozen"


# --- what is likely to go wrong -----------------------------------------------------------------------------

class OnDisk(list):
    """A data set of so many words."""

    def __init__(self, words: int, items: int = 4):
        super().__init__(range(items))
        self.words = words


def task_of(vlm, text: str, words: int | None = None, trained=("bridge",), **settings):
    """(what `advise` reads of a task, the first update), which learns the text in shapes' tokenizer."""
    tokenizer = shapes_tokenizer()
    ids = tokenizer.encode(f" {text}", preceded_by="text")
    labels = torch.tensor([[IGNORE, *ids, tokenizer.eos]])
    s = SimpleNamespace(**{**dict(lm="weights/decoder", scale="toy", option=[], steps=10, batch=2,
                                  bridge=vlm.bridge.name, vit="", init=""), **settings})
    sets = [(Shapes() if words is None else OnDisk(words), 1.0)]
    task = SimpleNamespace(s=s, module=vlm, trained=trained, tokenizer=tokenizer, sets=sets)
    return task, [dict(labels=labels)]


def test_a_decoder_that_cannot_write_these_words_is_named_with_what_to_do():
    vlm = shapes_vlm("linear")
    said = advise(*task_of(vlm, "a baguette beside a violin"), 5.0, 5.0)
    assert len(said) == 1 and re.search(r'weights/decoder spells 3 of the 3 .* \("baguette" takes \d tokens\)'
                                        ".* give a language model, --lm FOLDER$", said[0])
    assert advise(*task_of(vlm, "a large purple circle at the top left"), 2.0, 2.5) == []
    assert advise(*task_of(vlm, "a baguette", trained=("bridge", "decoder")), 2.0, 2.5) == []
    assert advise(*task_of(vlm, "7"), 2.0, 2.5) == []               # a short answer spells nothing


@pytest.mark.parametrize("blind, loss, said", [
    (6.2, 6.3, "less likely than a uniform guess does .6.20 > 6.06.*; give another --lm"),
    (2.0, 6.3, "the first loss is above a uniform guess .6.30 > 6.06.*; give a lower --lr"), (6.0, 6.0, "")])
def test_a_loss_above_a_uniform_guess_is_said(blind, loss, said):
    found = advise(*task_of(shapes_vlm("linear"), "a large purple circle"), blind, loss)
    assert len(found) == bool(said) and re.search(said, " ".join(found))


def test_more_parameters_than_words_are_said_of_data_that_has_an_end():
    vlm = shapes_vlm("linear").requires_grad_(False)
    vlm.bridge.requires_grad_(True)
    learned = sum(p.numel() for p in vlm.bridge.parameters())
    said = advise(*task_of(vlm, "a large circle", words=learned), 2.0, 2.0)
    assert said == [] and advise(*task_of(vlm, "a large circle"), 2.0, 2.0) == []
    said, = advise(*task_of(vlm, "a large circle", words=20), 2.0, 2.0)
    assert f"{learned:,} parameters learn from 20 words of 4 items, each shown 5 times" in said


SAID = "weights/vit has met scenes of 48 x 48 pixels alone, and folder:x shows other .*; give --vit"


@pytest.mark.parametrize("size, settings, trained, said", [
    (64, {}, ["bridge"], SAID), (48, {}, ["bridge"], "^$"), (48, dict(renderings="train"), ["bridge"], SAID),
    (64, dict(vit="openai/clip"), ["bridge"], "^$"), (64, {}, ["bridge", "vit"], "^$"),
    (64, dict(init="RUN"), ["bridge"], "^$")])
def test_a_vit_that_has_met_scenes_alone_is_named_where_pictures_are_no_scenes(size, settings, trained, said,
                                                                               tmp_path):
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").touch()
    world = OnDisk(9)
    world.name, world.renderings = "folder:x", settings.get("renderings", "")
    settings = {"vit": "weights/vit", "init": "", **settings}
    s = SimpleNamespace(vit=settings["vit"], init=settings["init"] and str(tmp_path))
    vlm = SimpleNamespace(vit=SimpleNamespace(config=SimpleNamespace(image_size=48)))
    item = SimpleNamespace(pictures=[np.zeros((size, size, 3), np.uint8)])
    task = SimpleNamespace(s=s, module=vlm, trained=trained, sets=[(world, 1.0)],
                           example=lambda *_: (None, item))
    assert re.search(said, advise_on_pictures(task))
    task.sets = [(Shapes(), 1.0)]
    assert advise_on_pictures(task) == ""


@pytest.mark.parametrize("name, toy, fit, said", [
    ("flamingo", dict(every=1), dict(every=4), "a block before each of the 16 layers.*--option every=4"),
    ("idefics", dict(every=1), dict(every=4), "a block before each of the 16 layers.*--option every=4"),
    ("zero_init", dict(adapted=4), dict(adapted=14), "adapted=4 reaches few .*; give --option adapted=14")])
def test_toy_options_on_a_deep_decoder_are_said(name, toy, fit, said):
    deep = DecoderConfig(**{**TINY.__dict__, "layers": 16})

    def advice(options: dict, config=deep, **settings) -> str:
        bridge = make_bridge(name, config, 20, **{**SMALL[name], **options})
        return advise_on_depth(SimpleNamespace(
            s=SimpleNamespace(**{**dict(scale="toy", option=[], bridge=name), **settings}),
            module=SimpleNamespace(bridge=bridge, decoder=SimpleNamespace(config=config))))

    assert re.search(said, advice(toy)) and not advice(fit) and not advice(toy, scale="paper")
    assert not advice(toy, option=[f"{key}={value}" for key, value in toy.items()])     # asked for
    assert not advice({**toy, **({"adapted": 2} if name == "zero_init" else {})}, TINY)


def test_a_run_that_ends_above_a_uniform_guess_says_so_and_goes_on(tmp_path, capsys):
    for i in range(12):
        Image.new("RGB", (48, 48), (20 * i, 9, 9)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a baguette beside a violin")
    train.main(["--data", f"folder:{tmp_path}", "--out", str(tmp_path / "run"), "--steps", "2",
                "--batch", "2", "--log-every", "1", "--lr", "1e-6", "--device", "cpu",
                "--dtype", "float32", "--eval-items", "1",
                "--samples", "0"])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("doctor")]
    starts = ["the decoder without any image", "the decoder weights/decoder spells",
              "33,024 parameters learn", "at step 2 the loss is"]
    assert [next(s for s in starts if s in line) for line in said] == starts
    for step, loss, silent in ((1, 9.0, True), (50, 9.0, False), (50, 6.0, True)):
        line = {"step": step, "loss": loss, "ema": 9.0, "grad_norm": 1, "lr": 1}
        (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
        assert (advise_at_end(tmp_path, 429) == "") == silent
    assert not advise_at_end(tmp_path / "none", 429)
