"""Claim: decoders and vision towers open in every published layout of theirs, in any dtype, and give the
published numbers; what does not fit is refused in one sentence that names the tensor, the shard or the key;
and loading needs little more memory than the model."""
from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import check, check_decoder, check_states, golden, stir, tiny_decoder
from model import Decoder, DecoderConfig, ViT, ViTConfig, rope_frequencies
from papers.rope_scaling import LinearScaling, Llama3Scaling
from support.formats.checkpoint import Checkpoint
from support.formats.files import UserError, read_json
from support.formats.llama import decoder_config, load_decoder, meta_decoder_config, save_decoder
from support.formats.vision import empty_vit, load_clip, load_vit, save_vit, vit_config
from support.formats.vlm import load_vlm

ROOT = Path(__file__).parents[2]


# --- relatives of Llama -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["config.json", "config.hub.json"])
@pytest.mark.parametrize(
    "name", ["qwen2-bias", "qwen3-qk-norm", "mistral-plain", "mistral-window", "llama-rope-linear",
             "qwen2-rope-yarn", "llama-rope-dynamic"]
)
def test_relatives_of_llama_give_the_published_numbers(name, config, tmp_path):
    shutil.copy(golden(name)[0] / "model.safetensors", tmp_path)
    shutil.copy(golden(name)[0] / config, tmp_path / "config.json")
    check_decoder(name, load_decoder(tmp_path))


@pytest.mark.parametrize("name, context", [("llama-rope-linear", 256), ("qwen2-rope-yarn", 64),
                                           ("llama-rope-dynamic", 72), ("llama-rope-llama3", None)])
def test_a_longer_context_is_read_and_survives_saving(name, context, tmp_path):
    """factor times the context of pretraining, which max_position_embeddings or the scaling itself names."""
    decoder = load_decoder(golden(name)[0])
    assert context in (None, decoder.config.context)
    save_decoder(decoder, tmp_path)
    assert load_decoder(tmp_path).config == decoder.config


@pytest.mark.parametrize("change, m", [
    ({}, 0.1 * math.log(4) + 1), ({"attention_factor": 0.7}, 0.7), ({"factor": 0.5}, 1.0),
    ({"mscale": 1.0, "mscale_all_dim": 0.8}, (0.1 * math.log(4) + 1) / (0.08 * math.log(4) + 1)),
    ({"mscale": 1.0}, 0.1 * math.log(4) + 1), ({"finetuned": True}, 0.1 * math.log(4) + 1)])
def test_yarns_scores_grow_as_its_config_says(change, m):
    config = {**read_json(golden("qwen2-rope-yarn")[0] / "config.hub.json")}
    config["rope_scaling"] = {**config["rope_scaling"], **change}
    assert decoder_config(config).rope_scaling.cos_sin_factor == pytest.approx(m)


def test_a_number_of_another_scaling_is_refused():
    config = {**read_json(golden("llama-rope-linear")[0] / "config.hub.json")}
    config["rope_scaling"] = {**config["rope_scaling"], "beta_fast": 32}
    with pytest.raises(UserError, match="RoPE: the key 'beta_fast'"):
        decoder_config(config)


def test_qwen2s_biases_are_on_q_k_v_and_survive_saving(tmp_path):
    decoder = load_decoder(golden("qwen2-bias")[0])
    assert {n.split(".")[3] for n, _ in decoder.named_parameters() if n.endswith("bias")} == {"q", "k", "v"}
    save_decoder(decoder, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "qwen2" and saved["architectures"] == ["Qwen2ForCausalLM"]
    again = load_decoder(tmp_path)
    assert again.config == decoder.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), decoder.parameters()))


def published(
    kind: str, V: int, D: int, hidden: int, L: int, H: int, G: int, context: int, eps: float = 1e-5, **more
):
    """The fields of a published config.json that shape the decoder."""
    return dict(
        model_type=kind,
        hidden_act="silu",
        vocab_size=V,
        hidden_size=D,
        intermediate_size=hidden,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=G,
        max_position_embeddings=context,
        rms_norm_eps=eps,
        **more,
    )


SCALING = dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
               rope_type="llama3")
LLAMA_3_SCALING = Llama3Scaling(32.0, 1.0, 4.0, 8192)
LLAMA_2 = published("llama", 32000, 4096, 11008, 32, 32, 32, 4096, pretraining_tp=1, rope_scaling=None,
                    tie_word_embeddings=False)
TINYLLAMA = published("llama", 32000, 2048, 5632, 22, 32, 4, 2048, attention_bias=False, pretraining_tp=1,
                      rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False)
SMOLLM2 = published("llama", 49152, 576, 1536, 30, 9, 3, 8192, attention_bias=False, is_llama_config=True,
                    mlp_bias=False, rope_interleaved=False, rope_scaling=None, rope_theta=100000,
                    tie_word_embeddings=True)
LLAMA_3_2 = published(
    "llama",
    128256,
    2048,
    8192,
    16,
    32,
    8,
    131072,
    attention_bias=False,
    head_dim=64,
    mlp_bias=False,
    pretraining_tp=1,
    rope_scaling=SCALING,
    rope_theta=500000.0,
    tie_word_embeddings=True,
)
QWEN2 = published(
    "qwen2",
    151936,
    896,
    4864,
    24,
    14,
    2,
    131072,
    1e-6,
    max_window_layers=24,
    rope_theta=1000000.0,
    sliding_window=131072,
    tie_word_embeddings=True,
    use_sliding_window=False,
)  # 0.5B
MISTRAL = published(
    "mistral",
    32768,
    4096,
    14336,
    32,
    32,
    8,
    32768,
    rope_theta=1000000.0,
    sliding_window=None,
    tie_word_embeddings=False,
)  # 7B-v0.3
LLAMA_1 = {
    k: v for k, v in LLAMA_2.items() if k not in ("num_key_value_heads", "pretraining_tp", "rope_scaling")
}


@pytest.mark.parametrize("published, parameters, fields", [
    (LLAMA_2, 6_738_415_616, dict(rope_theta=1e4, context=4096, tied=False)),
    (LLAMA_1, 6_738_415_616, dict(kv_heads=32)),
    (TINYLLAMA, 1_100_048_384, dict(kv_heads=4, head_width=64, context=2048)),
    (SMOLLM2, 134_515_008, dict(rope_theta=1e5, tied=True, head_width=64, context=8192)),
    (LLAMA_3_2, 1_235_814_400, dict(rope_theta=5e5, tied=True, rope_scaling=LLAMA_3_SCALING)),
    (QWEN2, 494_032_768, dict(rope_theta=1e6, attention_bias="qkv", norm_eps=1e-6, tied=True)),
    (MISTRAL, 7_248_023_552, dict(rope_theta=1e6, kv_heads=8, head_width=128))])
def test_published_configs_give_the_published_models(published, parameters, fields):
    config = decoder_config(published)
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(config).parameters()) == parameters
    assert {k: getattr(config, k) for k in fields} == fields
    # as transformers 5 writes it
    today = {**published, "rope_parameters": {"rope_type": "default", **(published.get("rope_scaling") or {}),
                                              "rope_theta": published.get("rope_theta", 10000.0)}}
    assert (
        decoder_config({k: v for k, v in today.items() if k not in ("rope_scaling", "rope_theta")}) == config
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="gemma"), 'model_type "gemma" is no decoder.*Known: llama, qwen2, qwen3, mistral'),
        (dict(model_type="qwen3_moe"), '"qwen3_moe" is no decoder that is known here; did you mean "qwen3"'),
        (dict(model_type="phi3"), '"phi3"'),
        (dict(model_type="gpt2"), '"gpt2"'),
        (
            dict(model_type="qwen2", use_sliding_window=True, sliding_window=2048),
            "28 of the 32 layers see their whole past and the others 2048 tokens",
        ),
        (dict(hidden_act="gelu"), 'activation "gelu"'),
        (dict(rope_scaling={"type": "longrope", "factor": 2.0}), '"longrope" is not supported'),
        (dict(rope_scaling={"rope_type": "su", "factor": 2.0}), '"su".*known: default, linear, dynamic'),
        (dict(rope_scaling={"type": "linear"}), "'factor' is missing"),
        (
            dict(rope_scaling={k: v for k, v in SCALING.items() if k != "low_freq_factor"}),
            "'low_freq_factor' is missing",
        ),
    ],
)
def test_what_would_be_another_function_is_refused_in_one_sentence(change, message):
    with pytest.raises(UserError, match="here.json: .*" + message):
        decoder_config({**LLAMA_2, **change}, "here.json")


def test_what_changes_nothing_is_accepted():
    plain = decoder_config(LLAMA_2)
    assert (
        decoder_config({**LLAMA_2, "model_type": "mistral", "sliding_window": 4096}) == plain
    )  # the context's
    assert (
        decoder_config({k: v for k, v in LLAMA_2.items() if k != "model_type"}) == plain
    )  # inside another config
    assert decoder_config({**LLAMA_2, "rope_scaling": {"type": "default"}}) == plain


def test_a_window_narrower_than_the_context_is_kept_and_one_that_no_layer_has_is_not():
    window = lambda **c: decoder_config({**LLAMA_2, **c}).window
    assert window(model_type="mistral", sliding_window=1024) == 1024
    assert window(model_type="mistral", max_position_embeddings=32768) == 4096  # version 0.1's default
    assert window(model_type="mistral", sliding_window=None) is None
    assert window(model_type="llava_mistral", sliding_window=1024) == 1024
    swa = dict(model_type="qwen3", use_sliding_window=True, sliding_window=2048, head_dim=128)
    assert window(**swa, max_window_layers=0) == 2048 and window(**swa, max_window_layers=32) is None
    assert window(**{**swa, "use_sliding_window": False}) is None
    assert window(**swa, layer_types=["sliding_attention"] * 32) == 2048
    with pytest.raises(UserError, match="1 of the 32 layers see their whole past"):
        window(**swa, layer_types=["full_attention"] + ["sliding_attention"] * 31)


def test_linear_scaling_divides_positions():
    half = DecoderConfig(rope_scaling=LinearScaling(2.0))
    assert torch.equal(rope_frequencies(half) * 2, rope_frequencies(DecoderConfig()))


# --- Meta's layout ------------------------------------------------------------------------------------------

META = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
}


def meta_folder(
    path: Path, case: str, files: int = 1, suffix: str = "safetensors", split_table: int = 0
) -> Path:
    """A golden case as Meta publishes: RoPE's pairs side by side, matrices cut for model parallelism,
    params.json.

    split_table: along which axis the files share the embeddings; 0 as Llama 3, 1 as Llama 1 and 2.
    """
    folder = golden(case)[0]
    c, tensors = decoder_config(json.loads((folder / "config.json").read_text())), {}
    for name, t in load_file(folder / "model.safetensors").items():
        for a, b in META.items():
            name = name.replace(a, b)
        if name.endswith(("wq.weight", "wk.weight")):  # per head: all firsts, then all seconds → pair by pair
            H = c.heads if "wq" in name else c.kv_heads
            t = t.view(H, 2, c.head_width // 2, -1).transpose(1, 2).reshape(t.shape)
        tensors[name] = t
    tensors.setdefault("output.weight", tensors["tok_embeddings.weight"].clone())  # though tied: Llama 3.2 1B
    tensors["rope.freqs"] = torch.ones(c.head_width // 2)
    for rank in range(files):
        def part(name, t):
            if t.ndim == 1:
                return t
            axis = split_table if "tok_embeddings" in name else int(name.endswith(("wo.weight", "w2.weight")))
            return t.chunk(files, axis)[rank].contiguous()
        save = save_file if suffix == "safetensors" else torch.save
        save({n: part(n, t) for n, t in tensors.items()}, path / f"consolidated.{rank:02d}.{suffix}")
    (path / "params.json").write_text(
        json.dumps(
            dict(
                dim=c.width,
                n_layers=c.layers,
                n_heads=c.heads,
                n_kv_heads=c.kv_heads,
                vocab_size=-1,
                norm_eps=c.norm_eps,
                multiple_of=1,
                ffn_dim_multiplier=(c.hidden + 0.5) / int(8 * c.width / 3),
            )
        )
    )
    return path


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize(
    "case, files, split_table",
    [
        ("llama-mha", 1, 0),
        ("llama-mha", 2, 0),
        ("llama-mha", 2, 1),
        ("llama-mha", 4, 1),
        ("llama-gqa-tied", 1, 0),
        ("llama-gqa-tied", 2, 0),
    ],
)
def test_metas_files_give_the_published_numbers(tmp_path, capsys, case, files, split_table, suffix):
    decoder = load_decoder(meta_folder(tmp_path, case, files, suffix, split_table))
    check_decoder(case, decoder)
    assert ("consolidated.00.pth: a pickle" in capsys.readouterr().err) == (suffix == "pth")
    assert decoder.config.tied == (
        case == "llama-gqa-tied" and files == 1
    )  # stored twice: found out, kept once


def test_the_authors_own_file_opens_with_its_params_json():
    config = load_decoder(
        golden("adapter-llama-v1")[0]
    ).config  # its logits, with the adapter: test_bridges.py
    assert config == DecoderConfig(72, 24, layers=4, heads=4, kv_heads=4, head_width=6, hidden=64, tied=False)


ONE_OR_TWO = dict(n_layers=32, n_heads=32, multiple_of=256, norm_eps=1e-5, vocab_size=-1)
THREE = dict(n_layers=32, n_heads=32, n_kv_heads=8, multiple_of=1024, norm_eps=1e-5, rope_theta=500000.0,
             vocab_size=128256)


@pytest.mark.parametrize(
    "params, files, tied, published, factor, context",
    [
        (dict(ONE_OR_TWO, dim=4096), 1, False, 6_738_415_616, None, 2048),  # LLaMA 7B
        (
            dict(ONE_OR_TWO, dim=5120, n_heads=40, n_layers=40),
            2,
            False,
            13_015_864_320,
            None,
            2048,
        ),  # Llama 2 13B
        (dict(THREE, dim=4096, ffn_dim_multiplier=1.3), 1, False, 8_030_261_248, None, 8192),  # Llama 3 8B
        (
            dict(THREE, dim=4096, ffn_dim_multiplier=1.3, use_scaled_rope=True),
            1,
            False,
            8_030_261_248,
            8.0,
            131072,
        ),  # Llama 3.1 8B
        (
            dict(THREE, dim=2048, n_layers=16, multiple_of=256, ffn_dim_multiplier=1.5, use_scaled_rope=True),
            1,
            True,
            1_235_814_400,
            32.0,
            131072,
        ),  # Llama 3.2 1B
        (
            dict(
                THREE,
                dim=3072,
                n_layers=28,
                n_heads=24,
                multiple_of=256,
                ffn_dim_multiplier=1.0,
                use_scaled_rope=True,
            ),
            1,
            True,
            3_212_749_824,
            32.0,
            131072,
        ),
    ],
)  # Llama 3.2 3B
def test_published_params_json_give_the_published_models(
    tmp_path, params, files, tied, published, factor, context
):
    (tmp_path / "params.json").write_text(json.dumps(params))
    V, D = params["vocab_size"] if params["vocab_size"] > 0 else 32000, params["dim"]
    shapes = {"layers.0.attention.wq.weight": (D // files, D), "output.weight": (V // files, D),
              "tok_embeddings.weight": (V, D // files)}
    stub = SimpleNamespace(
        files=[tmp_path / f"consolidated.{i:02d}.pth" for i in range(files)],
        shape=shapes.get,
        get=lambda name: torch.zeros(1) if tied else torch.ones(1) * len(name),
    )
    config = meta_decoder_config(tmp_path, stub)
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(config).parameters()) == published
    assert (
        getattr(config.rope_scaling, "factor", None) == factor
        and config.context == context
        and config.tied == tied
    )
    assert config.rope_scaling is None or config.rope_scaling == replace(LLAMA_3_SCALING, factor=factor)


def test_a_missing_key_or_model_parallel_file_is_named(tmp_path):
    folder = meta_folder(tmp_path, "llama-mha", files=4)
    for file in ("consolidated.02", "consolidated.03", "consolidated.00"):
        shutil.move(folder / f"{file}.safetensors", folder / "elsewhere")
        with pytest.raises(UserError, match=f"{file} is missing.*so there are 4"):
            load_decoder(folder)
        shutil.move(folder / "elsewhere", folder / f"{file}.safetensors")
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({k: v for k, v in params.items() if k != "norm_eps"}))
    with pytest.raises(UserError, match="params.json: the key 'norm_eps' is missing"):
        load_decoder(folder)


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_a_tensor_that_one_model_parallel_file_lacks_or_has_in_another_shape_is_named(tmp_path, damage):
    folder, name = meta_folder(tmp_path, "llama-mha", files=2), "layers.1.feed_forward.w2.weight"
    tensors = load_file(folder / "consolidated.01.safetensors")
    tensors[name] = tensors[name][:-1].contiguous()
    if damage == "missing":
        del tensors[name]
    save_file(tensors, folder / "consolidated.01.safetensors")
    says = {"missing": "has shape", "misshapen": "is in 2 of 2 files, with shapes"}[
        damage
    ]  # a part is no whole
    with pytest.raises(UserError, match=rf'"{name}" {says} \('):
        load_decoder(folder)


# --- pickles ------------------------------------------------------------------------------------------------


def test_a_bin_file_opens_too_with_a_note(tmp_path, capsys):
    folder, _, x, _ = golden("llama-mha")
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    a, b = load_decoder(tmp_path), load_decoder(folder)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert "pytorch_model.bin: a pickle; only its tensors are read" in capsys.readouterr().err


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(golden("llama-mha")[0] / "config.json", tmp_path)
    torch.save({"model.norm.weight": Exploit()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: not a readable PyTorch file"):
        load_decoder(tmp_path)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pytorch_model.bin: not a readable PyTorch file"):
        load_decoder(tmp_path)


# --- vision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["larger", "smaller", "wide", "tall"])
@pytest.mark.parametrize("tower", ["clip-vision-gelu", "siglip-vision", "blip2-vision"])
def test_positions_for_another_size_of_image_are_the_published_ones(tower, grid):
    _, case, x, expected = golden("vision-interpolate")
    vit, key = load_vit(golden(tower)[0]), f"{tower}.{grid}"
    with torch.no_grad():
        hidden = vit(x[key], return_hidden=True)
        for name, mine in (
            ("first", hidden[0]),
            ("last", hidden[-1]),
            ("pooler_output", vit.pool(hidden[-1])),
        ):
            check(case, f"{key}.{name}", mine, expected[f"{key}.{name}"])


OPENAI = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def openai_tensors(folder: Path, prefix: str = "visual.") -> dict[str, torch.Tensor]:
    """A CLIP tower in transformers' layout under its authors' names: q, k and v in one matrix."""
    theirs, tensors = load_file(folder / "model.safetensors"), {}
    for name, t in theirs.items():
        if "q_proj" in name:
            t = torch.cat([theirs[name.replace("q_proj", f"{p}_proj")] for p in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        elif "k_proj" in name or "v_proj" in name:
            continue
        name = name.removeprefix("vision_model.")
        for a, b in OPENAI.items():
            name = name.replace(a, b)
        tensors[prefix + name] = t
    return tensors


@pytest.mark.parametrize("prefix", ["visual.", "clip.visual."])
def test_clips_own_file_gives_the_published_numbers(tmp_path, prefix):
    folder, case, x, expected = golden("clip-vision-quickgelu")
    root = prefix.removesuffix("visual.")
    text = {
        root + n: torch.zeros(2)
        for n in (
            "transformer.resblocks.0.ln_1.weight",
            "token_embedding.weight",
            "positional_embedding",
            "ln_final.bias",
            "text_projection",
            "logit_scale",
            "visual.proj",
        )
    }
    save_file({**openai_tensors(folder, prefix), **text}, tmp_path / "clip.safetensors")
    for path in (tmp_path, tmp_path / "clip.safetensors"):
        vit = load_vit(path, heads=4)
        assert vit.config == load_vit(folder).config
        with torch.no_grad():
            check_states(case, vit(x["pixel_values"], return_hidden=True), expected)
    with pytest.raises(UserError, match="width 24 has no heads of width 64"):
        load_vit(tmp_path)


def test_clips_own_file_tells_its_sizes_with_heads_of_width_64(tmp_path):
    vit = stir(ViT(ViTConfig(image_size=40, patch=8, width=128, layers=3, heads=2, hidden=96)))
    save_vit(vit, tmp_path / "hf")
    save_file(openai_tensors(tmp_path / "hf"), tmp_path / "clip.safetensors")
    again = load_vit(tmp_path / "clip.safetensors")
    assert again.config == vit.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), vit.parameters()))


def test_weights_without_a_config_are_refused_in_words(tmp_path):
    shutil.copy(golden("clip-vision-gelu")[0] / "model.safetensors", tmp_path)
    with pytest.raises(
        UserError, match='only CLIP\'s own layout is read, .*"visual.conv1.weight" is missing'
    ):
        load_vit(tmp_path)
    with pytest.raises(UserError, match="nowhere/config.json: no such file"):
        load_vit(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "config, published",
    [
        (
            {"model_type": "clip", "vision_config": {"model_type": "clip_vision_model"}},
            87_456_000,
        ),  # ViT-B/32
        (
            {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}},
            92_884_224,
        ),  # B/16
        (
            {
                "model_type": "siglip",
                "vision_config": {},
            },
            92_884_224,
        ),
        ({"model_type": "blip-2", "vision_config": {"model_type": "blip_2_vision_model"}}, 985_952_256),
    ],
)  # ViT-g
def test_what_a_dual_encoders_config_leaves_out_has_the_published_default(config, published):
    with torch.device("meta"):
        assert sum(p.numel() for p in empty_vit(*vit_config(config)).parameters()) == published


def test_a_clip_config_may_leave_out_every_default(tmp_path):
    folder, _, x, _ = golden("clip-model")
    shutil.copy(folder / "model.safetensors", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for part in ("hidden_act", "layer_norm_eps"):
        config["text_config"].pop(part)
        config["vision_config"].pop(part)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        a, b = (load_clip(path)(x["pixel_values"], x["input_ids"]) for path in (tmp_path, folder))
    assert torch.equal(a, b)
    for kind in ("siglip2_vision_model", "dinov3_vit", ""):
        with pytest.raises(UserError, match=f'model_type "{kind}" is no vision tower that is known here'):
            vit_config({"model_type": kind})


# --- dtypes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16, None])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["hf", "meta", "clip"])
def test_every_stored_dtype_loads_into_every_dtype(tmp_path, layout, stored, target):
    if layout == "meta":
        file, load = meta_folder(tmp_path, "llama-mha") / "consolidated.00.safetensors", load_decoder
    else:
        case, load = {"hf": ("llama-mha", load_decoder), "clip": ("clip-vision-gelu", load_vit)}[layout]
        folder = golden(case)[0]
        file = Path(shutil.copy(folder / "model.safetensors", tmp_path))
        shutil.copy(folder / "config.json", tmp_path)
    exact = load(tmp_path)
    save_file({n: t.to(stored) for n, t in load_file(file).items()}, file)
    for p, q in zip(load(tmp_path, dtype=target).parameters(), exact.parameters()):
        assert torch.equal(p, q.to(stored).to(target or torch.float32)) and p.dtype == (
            target or torch.float32
        )


def test_a_loaded_model_no_longer_needs_its_file(tmp_path):
    folder = golden("llama-mha")[0]
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folder / file, tmp_path)
    decoder, exact = load_decoder(tmp_path, dtype=torch.float32), load_decoder(folder)
    with open(tmp_path / "model.safetensors", "r+b") as f:  # overwritten in place, as `cp` does
        f.write(bytes((tmp_path / "model.safetensors").stat().st_size))
    assert all(torch.equal(p, q) for p, q in zip(decoder.parameters(), exact.parameters()))


# --- strictness, in each layout -----------------------------------------------------------------------------


def copied(case: str, weights: str = "model.safetensors", config: str = "config.json"):
    def make(tmp_path) -> Path:
        shutil.copy(golden(case)[0] / config, tmp_path / "config.json")
        return Path(shutil.copy(golden(case)[0] / weights, tmp_path / "model.safetensors"))
    return make


def sharded(tmp_path) -> Path:
    for file in golden("llama-sharded")[0].glob("model*"):
        shutil.copy(file, tmp_path)
    shutil.copy(golden("llama-sharded")[0] / "config.json", tmp_path)
    return tmp_path / "model-00002-of-00005.safetensors"


def whole(case: str):
    def make(tmp_path) -> Path:
        shutil.copytree(golden(case)[0], tmp_path, dirs_exist_ok=True)
        return tmp_path / "model.safetensors"
    return make


def openai(tmp_path) -> Path:
    tensors = {**openai_tensors(golden("clip-vision-quickgelu")[0]), "visual.proj": torch.zeros(2)}
    save_file(tensors, tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


STRICT = {  # layout → (a function that writes a model into a folder and returns the file to damage, loader)
    "hf": (copied("llama-mha"), load_decoder),
    "sharded": (sharded, load_decoder),
    "hf, old buffers": (copied("llama-mha", "model.hub.safetensors"), load_decoder),
    "hf, tied": (copied("llama-gqa-tied"), load_decoder),
    "qwen2": (copied("qwen2-bias"), load_decoder),
    "meta": (lambda path: meta_folder(path, "llama-mha") / "consolidated.00.safetensors", load_decoder),
    "clip": (copied("clip-vision-gelu", "model.hub.safetensors"), load_vit),
    "clip, today's names": (copied("clip-vision-quickgelu"), load_vit),
    "siglip": (copied("siglip-vision"), load_vit),
    "blip2": (copied("blip2-vision"), load_vit),
    "dual encoder": (copied("clip-model"), load_clip),
    "openai": (openai, lambda path: load_vit(path, heads=4)),
    "llava": (copied("llava-hf"), load_vlm),
    "llava, in memory": (copied("llava-hf", "model.new.safetensors"), load_vlm),
    "llava, hub": (copied("llava-hf", "model.hub.safetensors", "config.hub.json"), load_vlm),
    "llava v1": (whole("llava-original-v1-linear"), load_vlm),
    "llava v1.5": (whole("llava-original-v15"), load_vlm),
    "llava v1.5, tower": (
        lambda path: whole("llava-original-v15")(path).parent / "vision_tower/model.safetensors",
        load_vlm,
    ),
}
FREE = ("inv_freq", "freqs", "position_ids", "visual.proj")                     # read by nobody


@pytest.mark.parametrize("damage", ["missing", "misshapen", "extra"])
@pytest.mark.parametrize("layout", STRICT)
def test_any_one_tensor_that_is_missing_misshapen_or_extra_is_named(tmp_path, layout, damage):
    make, load = STRICT[layout]
    file = make(tmp_path)
    tensors = load_file(file)
    load(tmp_path)                                                              # whole, it opens
    names = [n for n in tensors if not n.endswith(FREE)]
    victims = names[::max(1, len(names) // 12)] if damage != "extra" else ["nobodys.weight", names[-1] + "x"]
    for name in victims:
        new = dict(tensors)
        if damage == "missing":
            del new[name]
        else:
            old = tensors.get(name, torch.zeros(3, 5))
            new[name] = old[..., :-1].contiguous() if old.ndim and old.shape[-1] > 1 else torch.zeros(7)
        save_file(new, file)
        with pytest.raises(UserError) as error:
            load(tmp_path)
        said = str(error.value)
        assert f'"{name}' in said and str(tmp_path) in said and said.count("\n") == 0
        assert {"missing": "is missing", "misshapen": "has shape (", "extra": "not part of this model"}[
            damage
        ] in said


def test_of_two_shards_the_missing_one_is_named(tmp_path):
    folder, half = golden("llama-mha")[0], {}
    tensors = load_file(folder / "model.safetensors")
    for i, name in enumerate(sorted(tensors)):
        half.setdefault(f"model-{1 + 2 * i // len(tensors):05d}-of-00002.safetensors", {})[name] = tensors[
            name
        ]
    assert len(half) == 2
    for file, part in half.items():
        save_file(part, tmp_path / file)
    index = {"weight_map": {n: f for f, part in half.items() for n in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(folder / "config.json", tmp_path)
    check_decoder("llama-mha", load_decoder(tmp_path))
    for file in half:
        shutil.move(tmp_path / file, tmp_path / "elsewhere")
        with pytest.raises(
            UserError, match=f"model.safetensors.index.json: names the shard {file}, which is missing"
        ):
            load_decoder(tmp_path)
        shutil.move(tmp_path / "elsewhere", tmp_path / file)


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux' /proc")
@pytest.mark.slow
def test_loading_peaks_at_one_copy_of_the_model(tmp_path):
    sizes = dict(
        vocab_size=8192, width=1024, layers=3, heads=8, kv_heads=8, head_width=128, hidden=2048, tied=False
    )
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(**sizes)).to(torch.bfloat16)
    decoder = decoder.to_empty(device="cpu")
    for p in decoder.parameters():
        p.data.zero_()
    save_decoder(decoder, tmp_path)
    script = ROOT / "tests/benchmarks/bench_loading.py"
    command = [sys.executable, script, tmp_path, "--dtype", "bf16", "--repeats", "1"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    row = json.loads(out.stdout.splitlines()[-1])["bf16"]
    assert row["size"] == sum(p.numel() * 2 for p in decoder.parameters())
    # with the file's pages and 40 MB of imports on the way; two copies, or a copy and the file, would be 2
    assert row["total"] < 1.2 * row["size"] + 40e6 and math.isclose(
        row["total_ratio"], row["total"] / row["size"]
    )


# --- numbers, indexes, tied matrices ------------------------------------------------------------------------


@pytest.mark.parametrize("spoil, words", [
    (lambda t: t.fill_(math.nan), "numbers that are not finite"),
    (lambda t: torch.where(torch.arange(t.numel()).view_as(t) == 3, -math.inf, t), "1 numbers that are not"),
    (lambda t: t.to(torch.int8), "numbers of type int8"), (lambda t: t.long(), "numbers of type int64"),
    (lambda t: t > 0, "numbers of type bool"), (lambda t: t.to(torch.complex64), "numbers of type complex64"),
    (lambda t: t.to(torch.float8_e4m3fn), "type float8_e4m3fn; .*quantised")])
@pytest.mark.parametrize("layout", ["hf", "meta", "hf, pickled"])
def test_a_tensor_that_holds_no_finite_floating_point_numbers_is_named(tmp_path, layout, spoil, words):
    make, load = STRICT[layout.removesuffix(", pickled")]
    file = make(tmp_path)
    tensors = load_file(file)
    name = sorted(n for n, t in tensors.items() if t.numel() > 8)[0]
    tensors[name] = spoil(tensors[name].clone())
    save_file(tensors, file)
    if layout.endswith("pickled"):
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        file.unlink()
    with pytest.raises(UserError, match=f'tensor "{re.escape(name)}" holds .*{words}'):
        load(tmp_path)


def test_numbers_whose_sum_overflows_are_fine_and_those_beyond_the_dtype_are_not(tmp_path):
    decoder = tiny_decoder()
    with torch.no_grad():
        decoder.embed.weight.fill_(1e38)
    save_decoder(decoder, tmp_path)
    assert torch.equal(load_decoder(tmp_path).embed.weight, decoder.embed.weight)
    with pytest.raises(UserError, match='"model.embed_tokens.weight", as torch.float16, holds .*finite'):
        load_decoder(tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../b", "..", "c:\\model", "",
                                  "a/b"])
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    save_decoder(tiny_decoder(), tmp_path)
    shutil.copy(tmp_path / "config.json", tmp_path / "in")
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    message = f'index.json: names the shard "{re.escape(name)}", which is not a file of its folder'
    with pytest.raises(UserError, match=message):
        load_decoder(tmp_path / "in")


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}])
def test_an_index_without_a_map_of_files_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match='index.json: "weight_map" must name the file of each tensor'):
        Checkpoint(tmp_path)


def test_tied_matrices_under_both_names_must_be_one(tmp_path):
    save_decoder(tiny_decoder(tied=True), tmp_path)
    expected, file = load_decoder(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    assert torch.equal(load_decoder(tmp_path).embed.weight, expected.embed.weight)
    tensors["lm_head.weight"][0] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match='"lm_head.weight" differs from "model.embed_tokens.weight", though'):
        load_decoder(tmp_path)
