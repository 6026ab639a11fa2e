"""Families beside Llama, CLIP and LLaVA 1.5: what each adds is computed as its publisher meant it."""
from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import TINY, TINY_VIT, check, check_states, golden, stir, tiny_decoder
from model import IMAGE, Cache, Decoder, ViT
from papers import make_bridge
from papers.qk_norm import QKNorm
from support.formats import vision
from support.formats.files import UserError
from support.formats.llama import decoder_config, inner_decoder_config, load_decoder, save_decoder
from support.formats.llava import projector
from support.formats.vision import empty_vit, load_clip, load_vit, save_vit, vit_config
from support.formats.vlm import load_vlm, save_vlm


# --- Qwen3: normed queries and keys; Mistral 0.1: a sliding window ------------------------------------------

@pytest.mark.parametrize("changes", [
    dict(qk_norm=QKNorm), dict(window=3), dict(qk_norm=QKNorm, window=3),
    dict(attention_bias="qkv", window=3), dict(attention_bias="qkv"), {}])
def test_a_decoder_is_written_as_its_family_and_read_back_to_the_bit(changes, tmp_path):
    decoder = tiny_decoder(**changes)
    save_decoder(decoder, tmp_path)
    again = load_decoder(tmp_path)
    tokens = torch.randint(61, (2, 9))
    assert again.config == decoder.config
    with torch.no_grad():
        assert torch.equal(again(tokens), decoder(tokens))
    written = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    family = ("Qwen3" if "qk_norm" in changes else "Qwen2" if "attention_bias" in changes else
              "Mistral" if "window" in changes else "Llama")
    assert written == family + "ForCausalLM"


def test_queries_and_keys_are_normed_over_each_head_by_hand():
    decoder = stir(Decoder(type(TINY)(**{**TINY.__dict__, "qk_norm": QKNorm})))
    norm, x = decoder.layers[0].attention.qk_norm, torch.randn(1, 6, 3, 8)      # 4 heads of q, 2 of k
    y = norm(x)
    for head in range(6):
        row = x[0, head, 1]
        weight = norm.q if head < 4 else norm.k
        torch.testing.assert_close(y[0, head, 1], row / (row.square().mean() + TINY.norm_eps).sqrt() * weight)
    assert torch.equal(norm(x[:, 4:]), y[:, 4:])      # keys alone: zero_init's prompts


def test_zero_inits_prompts_pass_the_norm_of_the_keys():
    decoder = tiny_decoder(qk_norm=QKNorm)
    attention, prompts = decoder.layers[3].attention, torch.randn(1, 3, 32)
    keys, longer = (attention.project(p)[0] for p in (prompts, 7 * prompts))
    torch.testing.assert_close(keys, longer, atol=1e-3, rtol=1e-3)      # a norm forgets the length
    sizes = dict(prompts=3, adapted=2, width=16, depth=1, heads=2)
    bridge = stir(make_bridge("zero_init", decoder.config, 20, **sizes))
    assert decoder(torch.randint(61, (1, 5)), bridge=bridge).isfinite().all()


@pytest.mark.parametrize("window", [1, 3, 100])
def test_a_token_sees_itself_and_the_window_behind_it_and_no_further(window):
    decoder = stir(Decoder(type(TINY)(**{**TINY.__dict__, "layers": 1, "window": window})))
    tokens = torch.randint(61, (1, 9))
    for changed in range(9):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 61
        with torch.no_grad():
            moved = (decoder(tokens) != decoder(other)).any(-1)[0]
        assert moved.nonzero().flatten().tolist() == [t for t in range(9) if changed <= t < changed + window]


def test_a_window_agrees_with_the_cache_with_padding_and_with_packing():
    decoder = tiny_decoder(window=3)
    tokens = torch.randint(61, (2, 9))
    with torch.no_grad():
        whole = decoder(tokens)
        cache = Cache(decoder.config, 2, 9, "cpu", torch.float32)
        parts = [decoder(part, cache=cache) for part in tokens.split((2, 1, 4, 1, 1), dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)   # sums in another order
        padded = torch.cat((torch.zeros(2, 4, dtype=torch.long), tokens), 1)
        mask = torch.arange(13).expand(2, -1) >= 4
        torch.testing.assert_close(decoder(padded, mask)[:, 4:], whole, atol=1e-5, rtol=1e-5)
        two = torch.cat((tokens[:1], tokens[1:]), 1)
        packed = decoder(two, torch.tensor([[1] * 9 + [2] * 9]))
        torch.testing.assert_close(packed, torch.cat((whole[:1], whole[1:]), 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_room_in_the_window_of_what_is_generated(side):
    decoder = tiny_decoder(window=4)
    long, short = torch.randint(61, (2, 9))
    short, padding = short[:5], torch.zeros(4, dtype=torch.long)
    row = torch.cat((padding, short) if side == "left" else (short, padding))
    real = torch.arange(9) >= 4 if side == "left" else torch.arange(9) < 5
    both = decoder.generate(torch.stack((long, row)), 6, mask=torch.stack((torch.ones(9).bool(), real)))
    assert torch.equal(both[:1], decoder.generate(long[None], 6))
    assert torch.equal(both[1:], decoder.generate(short[None], 6))


def test_a_text_within_the_window_is_a_plain_decoders_to_the_bit():
    plain, windowed = tiny_decoder(), tiny_decoder(window=9)
    tokens = torch.randint(61, (2, 9))
    with torch.no_grad():
        assert torch.equal(plain(tokens), windowed(tokens))
        assert torch.equal(plain.generate(tokens[:, :4], 5), windowed.generate(tokens[:, :4], 5))


# --- DINOv2, SigLIP's pair --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["dinov2", "dinov2-registers-swiglu"])
def test_dinov2s_states_and_pooled_vector_are_the_published_ones(name):
    folder, case, x, expected = golden(name)
    vit = load_vit(folder)
    with torch.no_grad():
        hidden = vit(x["pixel_values"], return_hidden=True)
        larger = vit(x["larger"], depth=1)
    check_states(case, hidden, expected)
    check(case, "pooler_output", vit.pool(hidden[-1]), expected["pooler_output"])
    check(case, "larger", larger, expected["larger_hidden_states.1"])  # 6 × 5 patches of a 4 × 4 grid


def test_a_bridge_reads_dinov2s_patches_and_no_register():
    vit = load_vit(golden("dinov2-registers-swiglu")[0])
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        states = vit(pixels, return_hidden=True)[-2]
        assert vit.config.tokens == 1 + 3 + 16
        assert torch.equal(vit.features(pixels, -2), states[:, 4:])
        assert torch.equal(vit.features(pixels, -2, cls=True), states)
        assert vit.features(pixels, "pooled").shape == (1, 1, 16)


def test_dinov2_in_a_classifiers_file_opens_and_what_it_does_not_do_is_refused(tmp_path):
    folder = golden("dinov2")[0]
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    assert "embeddings.mask_token" in tensors                                   # of its training; left over
    tensors = {"dinov2." + name: tensor for name, tensor in tensors.items()}
    tensors["classifier.bias"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(load_vit(tmp_path)(pixels), load_vit(folder)(pixels))
    with pytest.raises(UserError, match="another tower stays"):
        save_vit(load_vit(folder), tmp_path)
    with pytest.raises(UserError, match="'hidden_size' is missing"):
        vit_config({"model_type": "dinov2"})
    for change, message in (({"qkv_bias": False}, "qkv_bias"),
                            ({"use_swiglu_ffn": True}, "weights_in"), ({"mlp_ratio": 3}, "has shape")):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message):
            load_vit(tmp_path)


@pytest.mark.parametrize("published, kind, sizes", [
    (86_580_480, "dinov2", dict()),                                             # ViT-B/14
    (1_136_480_768, "dinov2", dict(hidden_size=1536, num_hidden_layers=40, num_attention_heads=24,
                                   use_swiglu_ffn=True)),                       # ViT-g/14
    (86_580_480 + 4 * 768, "dinov2_with_registers", dict())])
def test_dinov2_has_the_published_number_of_parameters(published, kind, sizes):
    config = {"model_type": kind, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
              "image_size": 518, "patch_size": 14, "mlp_ratio": 4, **sizes}
    with torch.device("meta"):
        vit = empty_vit(*vit_config(config))
    mask_token = vit.config.width                       # in the file and in no function
    assert sum(p.numel() for p in vit.parameters()) + mask_token == published


def test_siglips_logits_and_embeddings_are_the_published_ones():
    folder, case, x, expected = golden("siglip-model")
    pair = load_clip(folder)
    with torch.no_grad():
        check(case, "logits", pair(x["pixel_values"], x["input_ids"]), expected["logits_per_image"])
        check(case, "image_embeds", pair.embed_images(x["pixel_values"]), expected["image_embeds"])
        check(case, "text_embeds", pair.embed_texts(x["input_ids"]), expected["text_embeds"])
        check(case, "text", pair.text(x["input_ids"]), expected["text_last_hidden_state"])


def test_siglip_without_a_head_or_with_another_width_is_no_pair(tmp_path):
    folder = golden("siglip-model")[0]
    shutil.copy(folder / "model.safetensors", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for part, change, message in (("vision_config", {"vision_use_head": False}, "without a pooling head"),
                                  ("text_config", {"projection_size": 8}, "a text of width 8"),
                                  ("text_config", {"hidden_act": "mish"}, '"mish" is not supported')):
        changed = {**config, part: {**config[part], **change}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=message):
            load_clip(tmp_path)


# --- LLaVA: several layers, projectors without biases or deeper ---------------------------------------------

def test_a_llava_that_reads_three_layers_through_a_projector_without_biases_is_the_published_one(tmp_path):
    folder, case, x, expected = golden("llava-three-layers")
    vlm = load_vlm(folder)
    assert vlm.bridge.reads == [-1, 1, -2] and vlm.bridge.up.bias is None
    ids = x["input_ids"]
    tokens = torch.cat((ids[:, :2], torch.full((2, 1), IMAGE), ids[:, 2:]), dim=1)
    with torch.no_grad():
        logits = vlm(tokens, x["pixel_values"])
        check(case, "logits", logits, expected["logits"])
        for layout in ("native", "hf"):
            save_vlm(vlm, tmp_path / layout, layout=layout)
            again = load_vlm(tmp_path / layout)(tokens, x["pixel_values"])      # hf: a word more, the image
            torch.testing.assert_close(again[..., :40], logits)
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert written["vision_feature_layer"] == [-1, 1, -2] and written["multimodal_projector_bias"] is False


@pytest.mark.parametrize("kind, maps", [(f"mlp{n}x_gelu", n) for n in (1, 2, 3, 5)])
def test_a_projector_of_n_maps_is_the_authors_sequence(kind, maps):
    """github.com/haotian-liu/LLaVA, build_vision_projector: Linear, then n − 1 times GELU and Linear."""
    sequence = [torch.nn.Linear(20, 32)]
    for _ in range(maps - 1):
        sequence += [torch.nn.GELU(), torch.nn.Linear(32, 32)]
    theirs = torch.nn.Sequential(*sequence)
    name, options, modules = projector(kind, "config.json")
    bridge = make_bridge(name, TINY, 20, **options)
    tensors = {f"mm_projector.{name}": tensor for name, tensor in theirs.state_dict().items()}
    bridge.load_state_dict({f"{ours}.{w}": tensors.pop(f"{name}.{w}")
                            for ours, name in modules.items() for w in ("weight", "bias")})
    assert not tensors
    x = torch.randn(2, 9, 20)
    with torch.no_grad():
        torch.testing.assert_close(bridge.prefix(x), theirs(x))


@pytest.mark.parametrize("kind", ["identity", "mlp0x_gelu", "mlp2x_relu", "cabstract", "ldpnetv2"])
def test_another_projector_is_refused_by_name(kind):
    with pytest.raises(UserError, match=f'config.json: mm_projector_type "{kind}" is not supported; known'):
        projector(kind, "config.json")


def test_several_layers_are_states_side_by_side_and_one_that_is_not_there_is_named():
    vit = stir(ViT(TINY_VIT))
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        hidden = vit(pixels, return_hidden=True)
        three = torch.cat([hidden[n] for n in (0, 3, 2)], -1)
        assert torch.equal(vit.features(pixels, [0, -1, -2], True), three)
    for layers in (4, -5, [1, 4]):
        with pytest.raises(ValueError, match="states 0 to 3, there is no state"):
            vit.features(pixels, layers)
    bridge = make_bridge("linear", TINY, 20, reads=[-2, -3])
    assert bridge.map.in_features == 40
    for wrong, message in (([], "not a whole number"), ([-2, 1.5], "1.5, not a whole number"), ("x", "'x'")):
        with pytest.raises(ValueError, match=message):
            make_bridge("linear", TINY, 20, reads=wrong)


def test_the_default_strategy_on_a_tower_without_one_class_token_is_refused(tmp_path):
    folder = golden("llava-three-layers")[0]
    shutil.copy(folder / "model.safetensors", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    tower = {**config["vision_config"], "model_type": "siglip_vision_model"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_config": tower}))
    with pytest.raises(UserError, match="0 tokens come before the patches"):
        load_vlm(tmp_path)


def test_a_text_or_vision_config_inside_another_has_its_own_familys_defaults():
    names = ("vocab_size", "hidden", "kv_heads", "context", "window", "tied")
    kept = lambda c: {name: getattr(inner_decoder_config(c, {}, "here"), name) for name in names}
    assert kept({"model_type": "mistral"}) == dict(vocab_size=32000, hidden=14336, kv_heads=8, context=131072,
                                                   window=4096, tied=False)
    assert kept({"model_type": "qwen2"}) == dict(vocab_size=151936, hidden=22016, kv_heads=32, context=32768,
                                                 window=None, tied=False)
    assert kept({}) == dict(vocab_size=32000, hidden=11008, kv_heads=32, context=2048, window=None,
                            tied=False)
    assert inner_decoder_config({}, {"tie_word_embeddings": True}, "here").tied
    assert inner_decoder_config({"model_type": "qwen3"}, {}, "here").qk_norm is QKNorm


# --- published configs, as they lie on the hub --------------------------------------------------------------

QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
         "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
         "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
         "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
         "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
         "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
         "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
         "use_sliding_window": False, "vocab_size": 151936}
MISTRAL = {"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
           "hidden_act": "silu",
           "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
           "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
           "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
           "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
           "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000}


@pytest.mark.parametrize("config, window, published", [
    (QWEN3, None, 596_049_920), (MISTRAL, 4096, 7_241_732_096)], ids=["Qwen3-0.6B", "Mistral-7B-v0.1"])
def test_published_decoders_have_the_published_number_of_parameters(config, window, published):
    with torch.device("meta"):
        decoder = Decoder(decoder_config(config))
    assert sum(p.numel() for p in decoder.parameters()) == published and decoder.config.window == window


def test_siglip_base_has_the_published_number_of_parameters(tmp_path, monkeypatch):
    config = {"architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip",
              "text_config": {"model_type": "siglip_text_model"}, "torch_dtype": "float32",
              "transformers_version": "4.37.0.dev0", "vision_config": {"model_type": "siglip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"logit_bias": torch.ones(1)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(vision, "fill", lambda *args, **kw: None)               # sizes alone
    assert sum(p.numel() for p in load_clip(tmp_path).parameters()) == 203_155_970


def test_a_published_dinov2_config_is_read_whole():
    config = {"apply_layernorm": True, "architectures": ["Dinov2Model"], "attention_probs_dropout_prob": 0.0,
              "drop_path_rate": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 768,
              "image_size": 518, "initializer_range": 0.02, "layer_norm_eps": 1e-06, "layerscale_value": 1.0,
              "mlp_ratio": 4, "model_type": "dinov2", "num_attention_heads": 12, "num_channels": 3,
              "num_hidden_layers": 12, "out_features": ["stage12"], "out_indices": [12], "patch_size": 14,
              "qkv_bias": True, "reshape_hidden_states": True, "stage_names": ["stem", "stage1"],
              "torch_dtype": "float32", "transformers_version": "4.31.0.dev0", "use_swiglu_ffn": False}
    assert vit_config(config)[0].tokens == 1 + 37**2
