"""Published weights as they lie on people's disks: each such folder loads as the model that it holds."""
from __future__ import annotations

import argparse
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import golden, tiny_decoder
from support.formats import load_decoder, load_vit, load_vlm
from support.formats.files import UserError
from support.formats.llama import save_decoder

TOKENS = torch.arange(1, 7)[None]


def logits(folder) -> torch.Tensor:
    with torch.no_grad():
        return load_decoder(folder)(TOKENS)


def test_a_whole_file_beside_an_index_of_shards_that_are_gone(tmp_path):
    save_decoder(tiny_decoder(), tmp_path)
    expected = logits(tmp_path)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(tmp_path), expected)


def test_tied_embeddings_under_the_name_of_the_output_projection_alone(tmp_path):
    save_decoder(tiny_decoder(tied=True), tmp_path)
    expected, file = logits(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({n.replace("model.embed_tokens", "lm_head"): t for n, t in tensors.items()}, file)
    assert torch.equal(logits(tmp_path), expected)


def test_a_checkpoint_of_a_training_script_with_its_arguments(tmp_path):
    save_decoder(tiny_decoder(), tmp_path)
    expected, file = logits(tmp_path), tmp_path / "model.safetensors"
    torch.save({"model": load_file(file), "epoch": 3, "args": argparse.Namespace(lr=1e-3)},
               tmp_path / "pytorch_model.bin")
    file.unlink()
    assert torch.equal(logits(tmp_path), expected)


def test_a_llava_whose_tower_was_trained_along(tmp_path):
    shutil.copytree(golden("llava-original-v15")[0], tmp_path / "llava")
    tower, file = tmp_path / "llava" / "vision_tower", tmp_path / "llava" / "model.safetensors"
    shutil.copytree(tower, tmp_path / "tuned")
    tuned = {n: t + 0.1 for n, t in load_file(tower / "model.safetensors").items()}
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    start = "model.vision_tower.vision_tower.vision_model."
    inside = {start + n.removeprefix("vision_model."): t for n, t in tuned.items()}
    save_file({**load_file(file), **inside}, file)
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        features = load_vlm(tmp_path / "llava").vit.features(pixels)
        assert torch.equal(features, load_vit(tmp_path / "tuned").features(pixels))
        assert (features - load_vit(tower).features(pixels)).abs().max() > 0.1


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * 0.1)
        self.in_proj_bias = nn.Parameter(torch.randn(3 * width) * 0.1)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        return self.out_proj(x) + self.in_proj_weight.sum() + self.in_proj_bias.sum()


def openai_clip(width: int = 64) -> nn.Module:
    """Modules with the names of CLIP's authors; what they compute does not matter here."""
    class Named(nn.Module):
        def __init__(self, **parts):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

        def forward(self, x):
            for part in self.children():
                x = part(x)
            return x + sum(p.sum() for p in self.parameters(recurse=False))

    def block():
        return Named(attn=Attention(width), ln_1=nn.LayerNorm(width), ln_2=nn.LayerNorm(width),
                     mlp=Named(c_fc=nn.Linear(width, 4 * width), c_proj=nn.Linear(4 * width, width)))

    class Clip(Named):
        def forward(self, x):
            visual = self.visual
            x = visual.ln_pre(visual.conv1(x).flatten(2).transpose(1, 2) + visual.positional_embedding[1:])
            x = visual.ln_post(visual.transformer(x) + visual.class_embedding) @ visual.proj
            return x * self.logit_scale + self.input_resolution

    visual = Named(
        conv1=nn.Conv2d(3, width, 8, 8, bias=False), class_embedding=nn.Parameter(torch.randn(width)),
        positional_embedding=nn.Parameter(torch.randn(17, width)), ln_pre=nn.LayerNorm(width),
        transformer=Named(resblocks=nn.Sequential(block(), block())), ln_post=nn.LayerNorm(width),
        proj=nn.Parameter(torch.randn(width, 16)))
    clip = Clip(visual=visual, logit_scale=nn.Parameter(torch.tensor(2.0)))
    clip.register_buffer("input_resolution", torch.tensor(32))
    return clip.eval()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_clip_as_its_authors_publish_it_a_torchscript_archive(tmp_path):
    torch.manual_seed(0)
    clip, pixels = openai_clip(), torch.randn(1, 3, 32, 32)
    torch.save(clip.state_dict(), tmp_path / "plain.pt")
    torch.jit.trace(clip, pixels).save(tmp_path / "ViT.pt")
    with torch.no_grad():
        assert torch.equal(load_vit(tmp_path / "ViT.pt")(pixels), load_vit(tmp_path / "plain.pt")(pixels))


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_that_were_saved_in_their_wrapper(wrapper, tmp_path):
    """DistributedDataParallel and torch.compile put a name in front of every tensor."""
    save_decoder(tiny_decoder(), tmp_path)
    expected, file = logits(tmp_path), tmp_path / "model.safetensors"
    save_file({wrapper + name: tensor for name, tensor in load_file(file).items()}, file)
    assert torch.equal(logits(tmp_path), expected)


def test_a_model_that_was_saved_without_its_head_has_that_of_its_embeddings(tmp_path):
    save_decoder(tiny_decoder(tied=True), tmp_path)
    expected, file = logits(tmp_path), tmp_path / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    assert torch.equal(logits(tmp_path), expected)
    save_decoder(tiny_decoder(), tmp_path)
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match='"lm_head.weight" is missing'):
        load_decoder(tmp_path)


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_that_changes_its_decoder_is_named_and_not_left_out(alone, tmp_path):
    save_decoder(tiny_decoder(), tmp_path)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "some/model", "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    if alone:
        (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="adapter_config.json: a LORA adapter of some/model, .*merge"):
        load_decoder(tmp_path)
    if not alone:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**adapter, "peft_type": "ADAPTION_PROMPT"}))
        load_decoder(tmp_path)                          # that is a bridge of its own


@pytest.mark.parametrize("layer", [99, -99])
def test_a_hidden_state_that_the_tower_does_not_have_is_refused_when_it_is_loaded(layer, tmp_path):
    shutil.copytree(golden("llava-hf")[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_feature_layer": layer}))
    with pytest.raises(UserError, match="config.json: .*"):
        load_vlm(tmp_path)
