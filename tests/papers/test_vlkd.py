"""VLKD's three losses are the numbers by hand; CLIP's part of the bridge never learns."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from conftest import tiny_vlm
from model import IMAGE, DecoderConfig
from papers.vlkd import Vlkd, contrast, distance
from support.formats import load_clip, load_vlm
from support.formats.files import UserError
from support.plumbing.log import read_log

ROOT = Path(__file__).parents[2]
QUICK = ["--bridge", "vlkd", "--batch", "8", "--eval-items", "2", "--samples", "0", "--log-every", "1",
         "--dtype", "float32"]


def test_the_losses_are_the_hands():
    t, projected = torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    assert math.isclose(distance(projected[:1], t[:1]).item(), 0.8, rel_tol=1e-6)               # (K1)
    assert distance(projected[1:], t[1:]).item() == 0
    assert math.isclose(distance(projected, t).item(), 0.4, rel_tol=1e-6)
    v = torch.tensor([[0.8, 0.6], [0.6, 0.8]])
    expected = math.log(1 + math.exp(-0.2))
    assert math.isclose(contrast(t, v).item(), expected, rel_tol=1e-6) and round(expected, 4) == 0.5981
    assert math.isclose(contrast(3 * t, v).item(), expected, rel_tol=1e-6)      # lengths of W s do not count
    sharper = math.log(1 + math.exp(-1.0))
    assert math.isclose(contrast(t, v, torch.tensor(5.0)).item(), sharper, rel_tol=1e-6)
    assert not math.isclose(distance(3 * t, t).item(), 0)                       # … and in (K1) they do


@torch.no_grad()
def test_clips_vector_of_a_picture_is_one_word():
    vlm = tiny_vlm("vlkd")
    z = torch.randn(2, 1, 20, generator=torch.Generator().manual_seed(0))
    v = vlm.bridge.see(z)
    direction = z[:, 0] @ vlm.bridge.project.weight.T
    torch.testing.assert_close(v, direction / direction.norm(dim=1, keepdim=True))
    torch.testing.assert_close(vlm.bridge.see(7 * z), v)                        # its length is not told
    tokens = torch.tensor([[3, IMAGE, 5], [IMAGE, 6, 7]])
    inputs, _ = vlm.prepare(tokens, z)
    torch.testing.assert_close(inputs["embeds"][0, 1], vlm.bridge.map(v[0]))
    assert inputs["embeds"].shape == (2, 3, 32)                                 # K = 1


def test_the_word_begins_as_large_as_the_toys_words():
    """The rows of the bundled table have a standard deviation of 0.37; PyTorch's start has 0.07."""
    words = load_file(ROOT / "weights/decoder/model.safetensors")["model.embed_tokens.weight"].float()
    bridge = Vlkd(DecoderConfig(width=128), 128, joint=128)
    v = F.normalize(torch.randn(64, 1, 128, generator=torch.Generator().manual_seed(0)), dim=-1)[:, 0]
    assert bridge.map(v).std().item() == pytest.approx(words.std().item(), rel=0.1)


def test_clips_projection_never_learns():
    bridge = tiny_vlm("vlkd").bridge
    assert {n for n, p in bridge.named_parameters() if not p.requires_grad} == {"project.weight"}
    bridge.requires_grad_(False).requires_grad_(True)
    assert not bridge.project.weight.requires_grad and bridge.map.weight.requires_grad


def test_a_text_tower_beside_the_bundled_vit_finds_its_pictures():
    """weights/clip-text has no vision tower of its own: the bundled one is named there."""
    clip, vit = load_clip(ROOT / "weights/clip-text"), load_file(ROOT / "weights/vit/model.safetensors")
    assert torch.equal(clip.vit.positions, vit["vision_model.embeddings.position_embedding.weight"])
    assert clip.text.config.vocab_size == 429 and not clip.training


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("vlkd")
    train.main([*QUICK, "--steps", "3", "--out", str(out)])
    return out


def test_a_run_logs_three_losses_and_keeps_clips_projection(run):
    for line in (line for line in read_log(run / "log.jsonl") if "loss" in line):               # (K4)
        total = line["caption"] + line["distance"] + line["contrast"]
        assert math.isclose(line["loss"], total, rel_tol=1e-5)
    vlm, clip = load_vlm(run), load_clip(ROOT / "weights/clip-text")
    assert torch.equal(vlm.bridge.project.weight, clip.image_projection.weight)
    assert (run / "decoder").is_dir()                                           # it learned
    facts = json.loads((run / "config.json").read_text())
    assert facts["bridge"] == "vlkd" and facts["vit"] == "weights/vit"


def test_without_their_weights_the_caption_is_all_that_is_learned(tmp_path):
    train.main([*QUICK, "--steps", "1", "--option", "distance=0", "contrast=0", "--out", str(tmp_path)])
    line = next(line for line in read_log(tmp_path / "log.jsonl") if "loss" in line)
    assert line["loss"] == line["caption"] and "distance" not in line


@pytest.mark.parametrize("flags, message", [
    (["--option", "joint=64"], "--vit weights/vit: its vectors have 128 numbers.*joint=128"),
    (["--option", "distance=-1"], "distance is -1"),
    (["--vit", "random"], "random"), (["--accumulate", "2"], "does not read --accumulate"),
    (["--data", "shapes-words"], "no picture with a caption"),
])
def test_a_mistake_is_one_sentence(tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as e:
        train.main([*QUICK, "--steps", "1", *flags, "--out", str(tmp_path)])
    assert "\n" not in str(e.value)
