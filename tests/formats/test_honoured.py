"""Nothing that a published config says is ignored in silence: each key is read, is without effect, or is
refused by name; and what published files say beside the model is no reason to refuse them."""
from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

from conftest import GOLDEN
from support.formats.files import UserError, read_json
from support.formats.honoured import PATTERN, WITHOUT_EFFECT
from support.formats.llama import decoder_config
from support.formats.vision import load_clip, vit_config
from support.formats.vlm import LAYOUTS, load_bridge

DECODERS = ("llama-mha", "llama-rope-llama3", "llama-rope-linear", "qwen2-bias", "mistral-plain")
TOWERS = ("clip-vision-gelu", "siglip-vision", "blip2-vision", "clip-model")
MODELS = ("llava-hf", "llava-original-v15", "instructblip-llama", "blip2-itm-itc", "blip2-lavis-stage1",
          "idefics-plain", "mllama")


def config_of(case: str) -> dict:
    return json.loads((GOLDEN / case / "config.json").read_text())


def another(value):
    """A value of the same type that says something else."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return 2 * value
    return value + "x" if isinstance(value, str) else {"other": 1} if isinstance(value, dict) else ["other"]


@pytest.mark.parametrize("case, read", [(case, decoder_config) for case in DECODERS]
                         + [(case, vit_config) for case in TOWERS[:3]])
def test_every_key_changes_the_model_or_is_refused_or_is_listed_as_without_effect(case, read):
    def outcome(config):
        try:
            return repr(read(config, "config.json"))
        except UserError:
            return "refused"
    config = config_of(case)
    for key, value in config.items():
        idle = key in WITHOUT_EFFECT or PATTERN.search(key) or value is None or (
            key in ("dtype", "max_window_layers", "use_sliding_window"))        # nothing to slide
        assert idle or outcome({**config, key: another(value)}) != outcome(config), key


def objects(config: dict, path: tuple = ()):
    """The path of every object inside a config in which a model says something."""
    yield path
    for key, value in config.items():
        if isinstance(value, dict) and value and key not in ("id2label", "label2id"):
            yield from objects(value, (*path, key))


def build(case: str, config: dict) -> None:
    with torch.device("meta"):
        LAYOUTS[config["model_type"]](config, GOLDEN / case)


@pytest.mark.parametrize("case", (*DECODERS, *TOWERS, *MODELS))
def test_an_unknown_key_is_named_wherever_it_stands(case):
    for path in objects(config_of(case)):
        if (case, path) == ("blip2-itm-itc", ("text_config",)) or case == "clip-model" and path != (
                "vision_config",):
            continue                                    # of a part that is not read
        config = config_of(case)
        part = config
        for key in path:
            part = part[key]
        part["some_new_factor"] = 2.0
        with pytest.raises(UserError, match="the key 'some_new_factor' .2.0. is not known here"):
            if case in MODELS:
                build(case, config)
            else:
                (decoder_config if case in DECODERS else vit_config)(config, "config.json")
        part["some_new_factor"] = None                  # asks for nothing
        if case in MODELS:
            build(case, config)


@pytest.mark.parametrize("case, part, key, value", [
    ("llama-mha", None, "quantization_config", {"bits": 4}),
    ("llama-mha", None, "partial_rotary_factor", 0.5),
    ("llama-mha", None, "torch_dtype", "int8"), ("llama-mha", None, "attn_logit_softcapping", 50.0),
    ("llama-mha", None, "final_logit_softcapping", 30.0), ("llama-mha", None, "query_pre_attn_scalar", 256),
    ("llama-mha", None, "hidden_act", "relu"), ("llama-mha", None, "sliding_window", 16),
    ("llama-mha", None, "layer_types", ["sliding_attention"] + ["full_attention"] * 2),
    ("llama-mha", None, "rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
    ("llama-mha", None, "rope_theta", 77.0), ("llama-mha", None, "logit_scale", 0.5),
    ("llama-mha", "rope_parameters", "factor", 8.0), ("llama-mha", "rope_parameters", "type", "linear"),
    ("qwen2-bias", None, "use_mrope", True), ("clip-vision-gelu", None, "num_channels", 4),
    ("blip2-vision", None, "qkv_bias", False), ("clip-vision-gelu", None, "hidden_act", "silu"),
    ("llava-hf", None, "vision_feature_select_strategy", "cls"),
    ("llava-hf", None, "projector_hidden_act", "relu"),
    ("llava-original-v15", None, "image_aspect_ratio", "anyres"),
    ("llava-original-v15", None, "mm_vision_select_feature", "cls"),
    ("llava-original-v15", None, "mm_patch_merge_type", "spatial_unpad"),
    ("llava-original-v15", None, "mm_projector_type", "cabs"),
    ("llava-original-v15", None, "unfreeze_mm_vision_tower", True),
    ("llava-original-v15", None, "use_mm_proj", False),
    ("instructblip-llama", "qformer_config", "layer_norm_eps", 1e-5),
    ("instructblip-llama", "qformer_config", "hidden_act", "relu"),
    ("instructblip-llama", "qformer_config", "position_embedding_type", "relative_key"),
    ("instructblip-llama", "qformer_config", "attention_probs_dropout_prob", 0.3),
    ("instructblip-llama", "vision_config", "qkv_bias", False),
    ("idefics-plain", None, "alpha_type", "matrix"),
    ("idefics-plain", None, "cross_layer_activation_function", "relu"),
    ("mllama", "text_config", "tie_word_embeddings", True), ("mllama", "text_config", "hidden_act", "gelu"),
    ("mllama", "vision_config", "supported_aspect_ratios", [[2, 2], [1, 1]])])
def test_a_value_that_we_do_not_compute_is_refused_by_the_name_of_its_key(case, part, key, value):
    config = config_of(case)
    (config[part] if part else config)[key] = value
    with pytest.raises(UserError) as error:
        if case in MODELS:
            build(case, config)
        else:
            (decoder_config if case in DECODERS else vit_config)(config, "config.json")
    names = {"hidden_act": "act", "sliding_window": "window", "layer_types": "sliding_attention",
             "rope_scaling": "RoPE", "type": "contradict", "rope_theta": "rope_theta"}
    assert names.get(key, key) in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize("name, case, file, key, value", [
    ("mapl", "mapl-mapper", "config.json", "activation", "gelu"),
    ("mapl", "mapl-mapper", "config.json", "proj_bias", False),
    ("mapl", "mapl-mapper", "config.json", "num_experts", 2),
    ("flamingo", "flamingo-open", "flamingo_config.json", "gate", "sigmoid"),
    ("zero_init", "adapter-peft/adapter", "adapter_config.json", "peft_type", "LORA"),
    ("zero_init", "adapter-llama-v1", "config.json", "w_lora", True),
    ("qformer", "blip2-qformer", "config.json", "hidden_norm", "rms")])
def test_the_config_beside_a_bridge_is_read_in_the_same_way(tmp_path, name, case, file, key, value):
    shutil.copytree(GOLDEN / case, tmp_path / "case")
    config = json.loads((tmp_path / "case" / file).read_text())
    (tmp_path / "case" / file).write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=f"{file}: .*{key}"):
        load_bridge(name, tmp_path / "case")


# what older libraries wrote into each config and each part of it
OLD = dict(
    add_cross_attention=False, architectures=None, attention_dropout=0.0, bad_words_ids=None,
    begin_suppress_tokens=None, bos_token_id=0, chunk_size_feed_forward=0, cross_attention_hidden_size=None,
    decoder_start_token_id=None, diversity_penalty=0.0, do_sample=False, dropout=0.0, early_stopping=False,
    encoder_no_repeat_ngram_size=0, exponential_decay_length_penalty=None, finetuning_task=None,
    forced_bos_token_id=None, forced_eos_token_id=None, id2label={"0": "LABEL_0"}, initializer_factor=1.0,
    initializer_range=0.02, is_decoder=False, is_encoder_decoder=False, label2id={"LABEL_0": 0},
    length_penalty=1.0, max_length=20, min_length=0, no_repeat_ngram_size=0, num_beam_groups=1, num_beams=1,
    num_return_sequences=1, output_attentions=False, output_hidden_states=False, output_scores=False,
    pad_token_id=0, prefix=None, problem_type=None, pruned_heads={}, remove_invalid_values=False,
    repetition_penalty=1.0, return_dict=True, return_dict_in_generate=False, sep_token_id=None,
    suppress_tokens=None, task_specific_params=None, temperature=1.0, tf_legacy_loss=False,
    tie_word_embeddings=True, tie_encoder_decoder=False, tokenizer_class=None, top_k=50, top_p=1.0,
    torch_dtype="float16",
    torchscript=False, transformers_version="4.28.1", typical_p=1.0, use_bfloat16=False,
    _name_or_path="", _attn_implementation_autoset=False)
BESIDE = {                  # and what else published files say
    "llama-mha": {"is_llama_config": True, "rope_interleaved": False,
                  "transformers.js_config": {"dtype": "q4"}, "max_sequence_length": 2048,
                  "unsloth_version": "2024.9", "auto_map": {"AutoConfig": "c.C"},
                  "partial_rotary_factor": 1.0, "quantization_config": None, "sliding_window": 4096},
    "qwen2-bias": {"use_mrope": False, "sliding_window": 32},
    "clip-model": {"projection_dim": 20, "logit_scale_init_value": 2.6592},
    "llava-hf": {"ignore_index": -100, "image_seq_length": 16, "pad_token_id": 32001, "vocab_size": 32064},
    "llava-original-v15": {
        "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "mm_resampler_type": None,
        "mm_projector_lr": 2e-5, "mm_vision_tower_lr": 2e-6, "pretrain_mm_mlp_adapter": None,
        "tokenizer_model_max_length": 2048, "tokenizer_padding_side": "right", "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False, "unfreeze_mm_vision_tower": False, "mm_patch_merge_type": "flat",
        "image_grid_pinpoints": None, "pretraining_tp": 1, "sep_image_conv_front": False,
        "image_aspect_ratio": "pad"},
    "idefics-plain": {
        "cross_layer_activation_function": "swiglu", "ffn_dim": 64, "max_new_tokens": 128,
        "word_embed_proj_dim": 16},
}


@pytest.mark.parametrize("case", (*DECODERS, *TOWERS, *MODELS))
def test_what_published_files_say_beside_the_model_is_no_reason_to_refuse_them(case):
    config = copy.deepcopy(config_of(case))
    for path in objects(config):
        part = config
        for key in path:
            part = part[key]
        if "rope_parameters" not in path:
            part.update({key: value for key, value in OLD.items() if key not in part})
    config |= BESIDE.get(case, {})
    if case in MODELS:
        build(case, config)
    else:
        (decoder_config if case in DECODERS else vit_config)(config, "config.json")


def test_an_old_clips_second_configs_must_agree_with_the_first(tmp_path):
    config = config_of("clip-model")
    for part in ("vision_config", "text_config"):
        sizes = {k: config[part][k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads",
                                              "intermediate_size")}
        config[f"{part}_dict"] = {**sizes, **({"image_size": 24, "patch_size": 8} if "v" in part else {
            "vocab_size": 99, "max_position_embeddings": 20})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds no .safetensors"):                       # all else is right
        load_clip(tmp_path)
    for part in ("vision_config", "text_config"):
        odd = copy.deepcopy(config)
        odd[f"{part}_dict"]["hidden_size"] = 48
        (tmp_path / "config.json").write_text(json.dumps(odd))
        with pytest.raises(UserError, match=f'{part} and {part}_dict give two values of "hidden_size"'):
            load_clip(tmp_path)


@pytest.mark.parametrize("ropes, key", [
    ({"rope_theta": 10**30}, "rope_theta"), ({"rope_type": "linear", "factor": 10**30}, "factor"),
    ({"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 2**40}, "original_max_position")])
def test_a_rope_has_bounds(ropes, key, tmp_path):
    ropes = {"rope_type": "default", "rope_theta": 1e4, **ropes}
    (tmp_path / "config.json").write_text(json.dumps({**config_of("llama-mha"), "rope_parameters": ropes}))
    with pytest.raises(UserError, match=f"config.json: the key 'rope_parameters.{key}.*not a number"):
        read_json(tmp_path / "config.json")


def test_the_kinds_of_layers_are_as_many_as_the_layers():
    with pytest.raises(UserError, match="layer_types names 1 layers, num_hidden_layers is"):
        decoder_config({**config_of("llama-mha"), "layer_types": ["full_attention"]})


def test_a_rope_may_be_spelled_twice_if_both_say_the_same():
    config = config_of("llama-rope-linear")
    ropes = config["rope_parameters"]
    both = {**config, "rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": ropes["rope_theta"]}
    assert decoder_config(both) == decoder_config(config)
    for change in ({"rope_theta": 1.0}, {"rope_scaling": {"type": "linear", "factor": 2.0}}):
        with pytest.raises(UserError, match="contradict each other"):
            decoder_config({**both, **change}, "config.json")
