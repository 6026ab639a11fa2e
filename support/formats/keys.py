"""support/formats/keys.py: what may stand under a key of a JSON file; read_json checks it as it reads.

A table per file: key → Key. The tables of config.json hold in the objects inside it, too (text_config …), and
a key that no table has is not read here, so nothing is said about it.
"""
from __future__ import annotations

from dataclasses import dataclass, field

from papers.bounds import LAYERS, SIZE, check_value


@dataclass(frozen=True)
class Key:
    """The kinds that a value may have, the bounds of a number, and what is inside a list or an object."""
    kinds: tuple[type, ...]
    bounds: dict = field(default_factory=dict)
    null: bool = False                      # null is right, too: it means the default
    each: Key | None = None                 # every element of a list, every value of an object
    keys: dict[str, Key] | None = None      # the table of an object
    among: tuple = ()                       # the values that we compute, where there are few

    def check(self, path: str, value) -> None:
        """A ValueError that names the path of keys, if the value is not what it may be."""
        if value is None and self.null:
            return
        kind = next((k for k in self.kinds if isinstance(value, k)), self.kinds[0])
        check_value(f"the key '{path}'", value, kind, **self.bounds if kind in (int, float) else {})
        if self.among and value not in self.among:
            raise ValueError(f"the key '{path}' is {value!r:.40}, which is not supported; "
                             f"known: {', '.join(map(repr, self.among))}.")
        if kind is dict and self.keys:
            check_keys(value, self.keys, f"{path}.")
        inside = value.values() if kind is dict else value if kind is list else ()
        if not self.each:
            return
        for n, element in value.items() if kind is dict else enumerate(inside):
            self.each.check(f"{path}.{n}" if kind is dict else f"{path}[{n}]", element)


def check_keys(content: dict, table: dict[str, Key], path: str = "") -> None:
    for name in content.keys() & table.keys():
        table[name].check(path + name, content[name])


def size(null: bool = False, **bounds) -> Key:
    return Key((int,), {**SIZE, **bounds}, null)


def number(null: bool = False, **bounds) -> Key:
    return Key((float,), bounds, null)


def these(names: str, key: Key) -> dict[str, Key]:
    return dict.fromkeys(names.split(), key)


TEXT, FLAG, OBJECT = Key((str,)), Key((bool,)), Key((dict,))
COUNT, LAYER = size(least=0), Key((int,), dict(least=-1000, most=1000))
ID = dict(least=-1, most=2**31)         # −1: none, in early files of LLaMA
IDS = Key((int, list), ID, True, Key((int,), ID))
EPS = number(above=0, most=1)
ROPE_BASE = number(null=True, above=0, most=1e18)

CONFIG = {
    **these("model_type hidden_act projector_hidden_act alpha_type template_version", TEXT),
    **these("vocab_size hidden_size intermediate_size num_attention_heads image_size patch_size "
            "projection_dim num_query_tokens num_query_token image_text_hidden_size embed_dim encoder_width "
            "attention_heads vision_output_dim resampler_n_latents resampler_n_heads resampler_head_dim "
            "contrast num_multi_query_heads", size()),
    **these("num_hidden_layers cross_attention_frequency cross_attention_freq cross_layer_interval "
            "resampler_depth max_num_tiles", size(**LAYERS)),
    **these("num_key_value_heads head_dim projection_size", size(null=True)),
    "max_position_embeddings": size(most=2**31),
    "sliding_window": size(null=True, most=2**31),
    **these("max_window_layers num_global_layers extra_tokens additional_vocab_size num_register_tokens",
            COUNT),
    **these("rms_norm_eps layer_norm_eps norm_eps", EPS),
    "mlp_ratio": number(above=0, most=100),
    "hidden_dropout_prob": number(least=0, below=1),
    "rope_theta": ROPE_BASE,
    **these("rope_scaling rope_parameters", Key((dict,), null=True, keys={
        "rope_theta": ROPE_BASE, **these("rope_type type", TEXT),
        **these("factor low_freq_factor high_freq_factor", number(above=0, most=1e6)),
        "original_max_position_embeddings": number(above=0, most=2**31),
        **these("beta_fast beta_slow attention_factor", number(null=True, above=0, most=1e6)),
        **these("mscale mscale_all_dim", number(null=True, least=0, most=1e6)), "truncate": FLAG,
    })),
    **these("tie_word_embeddings attention_bias mlp_bias use_sliding_window multimodal_projector_bias "
            "vision_use_head qkv_bias use_swiglu_ffn qk_layer_norms qk_layer_norms_perceiver "
            "use_resampler vision_expert_bias", FLAG),
    "architectures": Key((list,), null=True, each=TEXT),
    "layer_types": Key((list,), null=True, each=Key((str,), among=("full_attention", "sliding_attention"))),
    "num_channels": Key((int,), among=(3,)),
    "partial_rotary_factor": Key((float,), null=True, among=(1,)),
    "eos_token_id": IDS,
    "bos_token_id": Key((int,), ID, True),
    **these("image_token_index image_token dec", Key((int,), dict(least=0, most=2**31), True)),
    "vision_feature_layer": Key((int, list), LAYER.bounds, each=LAYER),
    "vision_feature_select_strategy": TEXT,
    **these("mm_vision_select_layer vit_layer", LAYER),
    **these("mm_projector_type mm_vision_select_feature", TEXT),
    "mm_use_im_start_end": FLAG,
    **these("image_aspect_ratio mm_vision_tower", Key((str,), null=True)),
    "cross_attention_layers": Key((list,), each=COUNT),
    "intermediate_layers_indices": Key((list,), each=COUNT),
    "supported_aspect_ratios": Key((list,), each=Key((list,), each=COUNT)),
    **these("bridge vit decoder vision_folder", TEXT),                                  # a run of train.py
    "bridge_options": OBJECT,
    "settings": Key((dict,), keys={         # what eval.py reads; --resume checks them all
        "data": TEXT, **these("init out", Key((str,), null=True)),
        "seed": Key((int,), dict(least=0)), "share": number(above=0, most=100),
        "follow_links": FLAG}),
    "data_digests": Key((dict,), each=TEXT),
    **these("trained_parameters training_examples seconds", number(null=True, least=0)),
    **these("n_visual_tokens shared_emb_dim", size(null=True)),
    **these("adapter_layers adapter_len query_len v_num_heads num_heads", size(null=True)),     # of a bridge
    **these("gated_cross_attention perceiver", Key((dict,), keys={"dim_head": size()})),
}
CONFIG |= these("text_config vision_config qformer_config perceiver_config", Key((dict,), keys=CONFIG))
GENERATION = {"eos_token_id": IDS, "stop_strings": Key((str, list), null=True, each=TEXT)}
CONFIG |= {"stop_strings": GENERATION["stop_strings"]}
PARAMS = {                  # Meta's
    **these("dim n_heads multiple_of", size()),
    "n_layers": size(**LAYERS),
    "n_kv_heads": size(null=True),
    "vocab_size": Key((int,), dict(least=-1, most=2**20)),
    "ffn_dim_multiplier": number(null=True, above=0, most=1000),
    "norm_eps": EPS,
    "rope_theta": ROPE_BASE,
    "use_scaled_rope": Key((bool,), null=True),
}
PIXELS = Key((int, dict), SIZE, True, size())
COLOURS = number(least=-1000, most=1000)
PROCESSOR = {
    **these("image_processor_type feature_extractor_type", Key((str,), null=True)),
    **these("size crop_size image_size", PIXELS),
    **these("do_resize do_rescale do_normalize do_center_crop do_pad", Key((bool,), null=True)),
    "rescale_factor": number(null=True, above=0, most=1000),
    "image_mean": Key((float, int, list), COLOURS.bounds, True, COLOURS),
    "image_std": Key((float, int, list), dict(least=1e-6, most=1000), True, number(least=1e-6, most=1000)),
    "resample": Key((int,), dict(least=0, most=5), True),
    "max_image_tiles": size(null=True, most=100),
}
PROCESSOR["image_processor"] = Key((dict,), null=True, keys=PROCESSOR)
ADDED = Key((dict,), keys={"content": TEXT, "id": Key((int,), dict(least=0)),
                           **these("special lstrip rstrip single_word normalized", FLAG)})
STEP = Key((dict,), null=True, keys={"type": TEXT})
TOKENIZER = {
    "added_tokens": Key((list,), each=ADDED),
    "model": Key((dict,), keys={
        "type": Key((str,), null=True), "vocab": Key((dict, list)),
        "merges": Key((list,)), "max_input_chars_per_word": size(),
        **these("unk_token end_of_word_suffix", Key((str,), null=True)),
        "byte_fallback": Key((bool,), null=True)}),
    **these("normalizer pre_tokenizer post_processor decoder", STEP),
}
TOKENIZER_CONFIG = {
    **these("bos_token eos_token unk_token pad_token cls_token sep_token mask_token image_token",
            Key((str, dict), null=True)),
    **these("add_bos_token add_eos_token legacy do_lower_case", Key((bool,), null=True)),
    "added_tokens_decoder": Key((dict,), each=ADDED),
    "chat_template": Key((str, list, dict), null=True),
}
FILES = {                   # the end of a file's name → its table
    "config.json": CONFIG, "generation_config.json": GENERATION, "params.json": PARAMS,
    "preprocessor_config.json": PROCESSOR, "processor_config.json": PROCESSOR,
    "tokenizer.json": TOKENIZER, "tokenizer_config.json": TOKENIZER_CONFIG,
    "special_tokens_map.json": TOKENIZER_CONFIG,
    "flamingo_config.json": CONFIG, "adapter_config.json": CONFIG, "model_args.json": CONFIG,
    "results.json": {"items": size(), "world": TEXT, "rows": Key((list,), each=Key(
        (dict,), each=Key((float, str), null=True),
        keys={"row": TEXT, **these("trained examples mean cider bleu4", number(null=True))}))},
    "log.jsonl": {
        "step": Key((int,), dict(least=0)), **these("loss ema lr blind seconds gate", number()),
        "gates": Key((list,), each=Key((list,), each=number())), "layers": Key((list,), each=COUNT),
        "per_head": FLAG},
    "seen.json": {"flags": Key((list,), each=TEXT), **these("seconds steps", number(least=0))},
    "index.json": {"weight_map": Key((dict,), each=TEXT)},
}


def table_of(name: str) -> dict[str, Key]:
    """The table of a file; {} for one whose keys are another's."""
    return FILES.get(name) or FILES.get(name.split(".")[-2] + ".json" if name.count(".") > 1 else "", {})
