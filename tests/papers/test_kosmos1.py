"""KOSMOS-1's connector is the published one of KOSMOS-2, sees unit vectors, and trains by its name."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from conftest import ROOT, TINY_VIT, check, fixed_loss, golden, tiny_vlm
from model import DecoderConfig
from papers import make_bridge
from support.formats import load_bridge, load_vlm
from support.formats.files import UserError, write_json, write_tensors
from support.formats.prefix_maps import KOSMOS_NAMES
from support.lab.attention import attention_weights
from support.lab.claims_store import loss_lines

def test_the_connector_is_the_published_one():
    """The case begins behind (K1)."""
    folder, case, x, expected = golden("kosmos2-connector")
    bridge = load_bridge("kosmos1", folder)
    names = {n: KOSMOS_NAMES[n] for n, _ in bridge.named_parameters()}
    with attention_weights(bridge) as found:
        y = bridge.prefix(x["features"])
    check(case, "y", y, expected["y"])
    check(case, "attention", found["connector"].detach(), expected["attention"])
    loss = fixed_loss(y)
    loss.backward()
    check(case, "grad.loss", loss.detach(), expected["grad.loss"])
    for ours, name in names.items():
        grad = bridge.get_parameter(ours).grad
        if name in case["gradients_not_stored_because_zero"]:
            assert grad.abs().max() < 1e-6              # float32: it cancels in the softmax
        else:
            check(case, f"grad.{name}", grad, expected[f"grad.{name}"])


def test_it_comes_out_of_the_whole_of_kosmos_2_with_clips_last_norm(tmp_path):
    tensors = load_file(golden("kosmos2-connector")[0] / "model.safetensors")
    norm = {"weight": torch.rand(20), "bias": torch.rand(20)}
    tensors |= {f"vision_model.model.post_layernorm.{w}": t for w, t in norm.items()}
    tensors["text_model.model.embed_tokens.weight"] = torch.zeros(4, 24)
    write_tensors(tmp_path / "model.safetensors", tensors)
    config = {"model_type": "kosmos-2", "latent_query_num": 5, "vision_config": {"hidden_size": 20},
              "text_config": {"embed_dim": 24, "attention_heads": 3}}
    write_json(tmp_path / "config.json", config)
    bridge = load_bridge("kosmos1", tmp_path)
    assert bridge.connector.heads == 3
    features = torch.randn(1, 7, 20)
    z = F.layer_norm(features, (20,), norm["weight"], norm["bias"])
    torch.testing.assert_close(bridge.see(features), z / z.norm(dim=-1, keepdim=True))
    write_json(tmp_path / "config.json", {**config, "latent_query_num": 64})
    with pytest.raises(UserError, match="latent_query_num is 64, but the tensors say 5"):
        load_bridge("kosmos1", tmp_path)


def test_the_published_size():
    with torch.device("meta"):
        bridge = make_bridge("kosmos1", DecoderConfig(width=2048), 1024)
    assert sum(p.numel() for p in bridge.parameters()) == 19_015_680 + 2048


def test_it_sees_every_token_as_a_unit_vector():
    vlm = tiny_vlm("kosmos1")
    features = vlm.features(torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)))
    visual = vlm.bridge.see(features)
    assert visual.shape == (2, 10, TINY_VIT.width)      # 9 patches and the class token
    torch.testing.assert_close(visual.norm(dim=-1), torch.ones(2, 10))
    direction = vlm.bridge.vision_norm(features[1, 4])
    torch.testing.assert_close(visual[1, 4], direction / direction.square().sum().sqrt())


def test_it_trains_by_name_with_the_decoder_and_its_run_opens(tmp_path):
    argv = ["--bridge", "kosmos1", "--steps", "2", "--batch", "4", "--eval-items", "2", "--samples", "0",
            "--data", "shapes + shapes-pages * 0.2", "--dtype", "float32"]
    module = train.main([*argv, "--out", str(tmp_path)])
    saved = load_vlm(tmp_path)
    assert not saved.training and saved.bridge.name == "kosmos1"
    assert all(torch.equal(a, b) for a, b in zip(saved.state_dict().values(), module.state_dict().values()))
    assert (tmp_path / "decoder").is_dir()              # it learned, so it lies in the run


def test_the_texts_of_its_mixture_are_the_kind_that_its_text_loss_is_of(tmp_path, monkeypatch):
    """The bundled decoder, which was made of such texts, starts below 4 nats; Alpaca's form costs it 10."""
    monkeypatch.chdir(ROOT)
    run = [*"--bridge kosmos1 --steps 1 --batch 6 --eval-items 1 --samples 0 --dtype float32".split(),
           "--data", "shapes-told"]
    train.main([*run, "--out", str(tmp_path)])
    assert loss_lines(tmp_path / "log.jsonl")[0]["loss"] < 4
