"""Claim: a published bridge alone loads by its own names and computes what its authors' code computes,
gradients included."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from support.formats.adapter import tune_decoder
from conftest import check, fixed_loss, golden
from model import DecoderConfig, IMAGE, VLM
from support.formats.files import UserError, write_json, write_tensors
from support.formats.llama import load_decoder
from support.formats.vision import load_vit
from support.formats.vlm import load_bridge

FILES = [
    ("mapl", "mapl-mapper", "model.safetensors"),
    ("zero_init", "adapter-llama-v1", "adapter.safetensors"),
    ("zero_init", "adapter-llama-v2-multimodal", "adapter.safetensors"),
    ("zero_init", "adapter-peft", "adapter/adapter_model.safetensors"),
    ("flamingo", "flamingo-open", "flamingo.safetensors"),
    ("clipcap", "clipcap-mlp", "model.safetensors"),
    ("clipcap_transformer", "clipcap-transformer", "model.safetensors"),
    ("minigpt4", "minigpt4-projection", "model.safetensors"),
    ("minigpt4_llama2", "minigpt4-projection", "model.llama2.safetensors"),
    ("kosmos1", "kosmos2-connector", "model.safetensors"),
]


def test_mapls_mapper():
    folder, case, x, expected = golden("mapl-mapper")
    mapl = load_bridge("mapl", folder)
    check(case, "y", mapl.prefix(mapl.see(x["x"])), expected["y"])
    with pytest.raises(UserError, match="width 24 does not divide into 5 heads"):
        load_bridge("mapl", folder, heads=5)


def test_pefts_adaption_prompt():
    folder, case, x, expected = golden("adapter-peft")
    decoder, bridge = load_decoder(folder), load_bridge("zero_init", folder / "adapter")
    assert bridge.gate.shape == (3, 1) and not bridge.gate[0].any() and not bridge.tanh
    logits = decoder(x["input_ids"], bridge=bridge)
    check(case, "logits", logits, expected["logits"])
    fixed_loss(logits).backward()
    for l in (1, 2):
        key = f"grad.model.layers.{l}.self_attn.adaption_"
        check(case, key + "prompt", bridge.prompts.grad[l - 1:l], expected[key + "prompt"])
        check(case, key + "gate", bridge.gate.grad[l], expected[key + "gate"])


@pytest.mark.parametrize("tanh, key", [(True, "logits"), (False, "inference_code_logits")])
def test_llama_adapters_adapter_as_its_training_and_its_inference_file_read_it(tanh, key):
    folder, case, x, expected = golden("adapter-llama-v1")
    bridge = load_bridge("zero_init", folder, tanh=tanh)
    assert bridge.gate.shape == (4, 4) and bridge.prompts.shape == (3, 5, 24)
    check(case, key, load_decoder(folder)(x["input_ids"], bridge=bridge), expected[key])


def test_llama_adapters_second_version_with_its_decoders_biases_and_clip(tmp_path):
    folder, case, x, expected = golden("adapter-llama-v2-multimodal")
    shutil.copy(folder / "model.safetensors", tmp_path / "consolidated.00.safetensors")
    write_json(
        tmp_path / "params.json",
        dict(dim=24, n_layers=3, n_heads=4, multiple_of=16, norm_eps=1e-5, vocab_size=72),
    )
    decoder, bridge, vit = (
        load_decoder(tmp_path),
        load_bridge("zero_init", folder),
        load_vit(folder / "clip.safetensors", heads=4),
    )
    plain = decoder(x["input_ids"]).detach()
    tune_decoder(decoder, folder / "adapter.safetensors")
    assert (
        decoder.config.attention_bias == "qo"
        and decoder.config.mlp_bias
        and not torch.equal(decoder(x["input_ids"]), plain)
    )
    out = load_file(folder / "clip.safetensors")["clip.visual.proj"]  # (Di, width of the shared space)
    visual = bridge.see(vit.post_norm(vit(x["pixel_values"])) @ out)  # all tokens, normalised and projected
    check(case, "visual_query", visual, expected["visual_query"])
    check(case, "logits", decoder(x["input_ids"], bridge=bridge, visual=visual), expected["logits"])
    tensors = load_file(folder / "adapter.safetensors")
    tensors["llama.layers.1.attention.wq.bias"] = torch.zeros(5)
    write_tensors(tmp_path / "odd" / "a.safetensors", tensors)
    with pytest.raises(
        UserError, match=r"layers.1.attention.wq.bias.*has shape \(5,\), this decoder expects \(24,\)"
    ):
        tune_decoder(load_decoder(tmp_path), tmp_path / "odd" / "a.safetensors")


def test_openflamingos_resampler_and_blocks():
    folder, case, x, expected = golden("flamingo-open")
    decoder, bridge = load_decoder(folder), load_bridge("flamingo", folder)
    with torch.no_grad():  # the new rows of the words are trained too; they are the decoder's
        decoder.embed.weight.copy_(
            load_file(folder / "flamingo.safetensors")["lang_encoder.model.embed_tokens.weight"]
        )
    is_image, mask = x["input_ids"] == 71, x["attention_mask"].bool()
    features = torch.cat([f[:n] for f, n in zip(x["vision_features"], is_image.sum(1))])
    logits = VLM(None, bridge, decoder, image_token=71)(
        x["input_ids"].masked_fill(is_image, IMAGE), mask=mask, features=features
    )
    check(case, "logits", logits * mask[..., None], expected["logits"])


@pytest.mark.parametrize("name, case, file", FILES)
@pytest.mark.parametrize("damage", ["missing", "misshapen", "extra"])
def test_every_layout_is_strict_and_names_the_tensor(tmp_path, name, case, file, damage):
    source = golden(case)[0]
    tensors = load_file(source / file)
    # one tensor that no size is read from
    key = next(
        k
        for k in sorted(tensors)
        if k.endswith(
            (
                "linear2.bias",
                "clip_proj.bias",
                "layers.3.attention.gate",
                "2.self_attn.adaption_gate",
                "3.gated_cross_attn_layer.ff_gate",
                "clip_project.model.0.bias",
                "layers.1.mlp.fc1.bias",
                "llama_proj.bias",
                "x_attn.out_proj.bias",
            )
        )
    )
    if damage == "missing":
        del tensors[key]
    elif damage == "misshapen":
        tensors[key] = torch.zeros(3, 7)
    else:
        key = "nobodys.weight"
        tensors[key] = torch.zeros(2)
    write_tensors(tmp_path / "bridge.safetensors", tensors)
    decoder = (
        load_decoder(source).config if name == "zero_init" and "peft" in case else None
    )  # how many layers there must be
    for config in source.glob("*config.json"):
        if decoder is None:
            shutil.copy(config, tmp_path)
    with pytest.raises(UserError) as error:
        load_bridge(name, tmp_path / "bridge.safetensors", decoder=decoder)
    assert key in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("damage", ["missing", "misshapen", "extra"])
def test_limbers_two_tensors_are_read_strictly(tmp_path, damage):
    tensors = {"weight": torch.ones(24, 20), "bias": torch.zeros(24)}
    torch.save(tensors, tmp_path / "proj.ckpt")
    assert load_bridge("limber", tmp_path).tokens == 1
    assert load_bridge("limber", tmp_path, decoder=DecoderConfig(width=12)).tokens == 2
    changes = {"missing": {"weight": tensors["weight"]}, "misshapen": {**tensors, "bias": torch.zeros(23)},
               "extra": {**tensors, "ln.weight": torch.ones(24)}}
    torch.save(changes[damage], tmp_path / "proj.ckpt")
    with pytest.raises(UserError, match="ln.weight" if damage == "extra" else '"bias"'):
        load_bridge("limber", tmp_path / "proj.ckpt")


@pytest.mark.parametrize("name, case", [("clipcap", "clipcap-mlp"),
                                        ("clipcap_transformer", "clipcap-transformer")])
def test_clipcaps_file_holds_a_whole_gpt2_and_its_width_tells_the_length_of_the_prefix(tmp_path, capsys, name,
                                                                                     case):
    tensors = load_file(golden(case)[0] / "model.safetensors")
    D = 12 if name == "clipcap" else 24
    gpt = {"gpt.transformer.wte.weight": torch.zeros(9, D),
           "gpt.transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}     # a mask
    torch.save({**tensors, **gpt}, tmp_path / "coco_weights.pt")
    bridge = load_bridge(name, tmp_path / "coco_weights.pt")
    assert bridge.prefix(torch.zeros(1, 1, 20)).shape == (1, {12: 7, 24: 6}[D], D)
    assert "2 tensors are not the bridge's" in capsys.readouterr().err
    with pytest.raises(UserError, match="width is 36|not 2 words|84 rows are not"):
        load_bridge(name, tmp_path / "coco_weights.pt", decoder=DecoderConfig(width=36))


def test_clipcaps_mlp_alone_does_not_tell_the_length_of_its_prefix(tmp_path):
    file = tmp_path / "mlp.safetensors"
    shutil.copy(golden("clipcap-mlp")[0] / "model.safetensors", file)
    with pytest.raises(UserError, match="84 rows are K words of width D.*tokens=K"):
        load_bridge("clipcap", file)
    with pytest.raises(UserError, match="84 rows are not 5 words"):
        load_bridge("clipcap", file, tokens=5)
    assert load_bridge("clipcap", file, tokens=7).tokens == 7
    assert load_bridge("clipcap", file, decoder=DecoderConfig(width=12)).tokens == 7


def test_an_unknown_bridge_and_a_foreign_file_are_named(tmp_path):
    with pytest.raises(UserError, match='"mapel" is known; did you mean "mapl"'):
        load_bridge("mapel", tmp_path)
    with pytest.raises(UserError, match='tensor "const" is missing'):
        load_bridge("mapl", golden("adapter-llama-v1")[0] / "adapter.safetensors")
    with pytest.raises(UserError, match="no gated_cross_attn_layer"):
        load_bridge("flamingo", golden("adapter-llama-v1")[0] / "adapter.safetensors")


# --- V2's file, both ways -----------------------------------------------------------------------------------

def adapter_v2(tmp_path, change) -> tuple:
    """A decoder of the published sizes and an adapter file whose tensors `change` has changed."""
    folder = golden("adapter-llama-v2-multimodal")[0]
    shutil.copy(folder / "model.safetensors", tmp_path / "consolidated.00.safetensors")
    write_json(tmp_path / "params.json",
               dict(dim=24, n_layers=3, n_heads=4, multiple_of=16, norm_eps=1e-5, vocab_size=72))
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    (tmp_path / "adapter").mkdir()
    write_tensors(tmp_path / "adapter" / "adapter.safetensors", tensors)
    shutil.copy(folder / "config.json", tmp_path / "adapter")
    return load_decoder(tmp_path), tmp_path / "adapter"


@pytest.mark.parametrize("name, words", [
    ("llama.layers.1.attention.lora_wq_l1.weight", "1 tensors are LoRA matrices, which are not added here"),
    ("llama.layers.2.attention.new_gate", "1 tensors are factors of the gates"),
    ("llama.layers.0.attention.wk.bias", "1 tensors have no place here"),
    ("llama.layers.0.attention.wq.weight", "1 tensors have no place here"),
    ("llama.layers.3.attention_norm.weight", "1 tensors have no place here")])
def test_what_neither_the_bridge_nor_the_decoder_takes_is_refused_by_both(tmp_path, name, words):
    decoder, adapter = adapter_v2(tmp_path, lambda tensors: tensors.update({name: torch.zeros(24)}))
    for load in (lambda: load_bridge("zero_init", adapter), lambda: tune_decoder(decoder, adapter)):
        with pytest.raises(UserError, match=f'{words}.*"{name}"'):
            load()


@pytest.mark.parametrize("name", ["llama.layers.1.attention.wo.bias", "llama.layers.2.feed_forward.w3.bias"])
def test_a_layer_that_lacks_what_the_others_tuned_leaves_the_decoder_as_it_was(tmp_path, name):
    decoder, adapter = adapter_v2(tmp_path, lambda tensors: tensors.pop(name))
    before = {n: p.clone() for n, p in decoder.named_parameters()}
    with pytest.raises(UserError, match=f'tensor "{name}" is missing'):
        tune_decoder(decoder, adapter)
    after = dict(decoder.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[n], p) for n, p in after.items())


def test_nan_in_the_decoders_part_and_a_bridge_that_leaves_it_are_told(tmp_path, capsys):
    decoder, adapter = adapter_v2(
        tmp_path, lambda tensors: tensors["llama.layers.1.attention.wq.bias"].fill_(math.nan))
    load_bridge("zero_init", adapter)
    assert "15 tensors are not the bridge's" in capsys.readouterr().err
    with pytest.raises(UserError, match='1.attention.wq.bias" holds 24 numbers that are not finite'):
        tune_decoder(decoder, adapter)


@pytest.mark.parametrize("name, case, key, value", [
    ("mapl", "mapl-mapper", "num_layers", 3), ("mapl", "mapl-mapper", "output_dim", 35),
    ("zero_init", "adapter-llama-v1", "adapter_layer", 2), ("zero_init", "adapter-llama-v1", "dim", 32),
    ("zero_init", "adapter-llama-v2-multimodal", "v_depth", 3), ("flamingo", "flamingo-open", "vis_dim", 24),
    ("clipcap", "clipcap-mlp", "sizes", [20, 42, 90]),
    ("clipcap_transformer", "clipcap-transformer", "clip_length", 4),
    ("kosmos1", "kosmos2-connector", "queries", 4)])
def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path, name, case, key, value):
    shutil.copytree(golden(case)[0], tmp_path / "case")
    file = tmp_path / "case" / ("flamingo_config.json" if name == "flamingo" else "config.json")
    write_json(file, {**json.loads(file.read_text()), key: value})
    with pytest.raises(UserError, match=re.escape(f"{key} is {value}, but the tensors say")):
        load_bridge(name, tmp_path / "case")
