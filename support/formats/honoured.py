"""support/formats/honoured.py: no key of a published config is ignored in silence.

    refuse_unknown(c, where, DECODER)           every key is one that our loader reads, or changes nothing in
                                                what the model computes, or has a value that we compute
    refuse_contradiction(c, where, layers=12)   a size that the tensors tell is not another in the config

What these find is a UserError that names the file and the key. A new family adds the keys that its loader
reads.
"""
from __future__ import annotations

import json
import re

from support.formats.files import UserError


def keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


# --- keys that a loader reads -------------------------------------------------------------------------------

DECODER = keys("""model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act rms_norm_eps rope_theta rope_scaling rope_parameters
    tie_word_embeddings attention_bias mlp_bias max_position_embeddings sliding_window use_sliding_window
    max_window_layers layer_types extra_tokens""")
PLAIN_ROPE = keys("rope_type type rope_theta")
ROPE = PLAIN_ROPE | keys("factor original_max_position_embeddings finetuned")
PARAMS = keys("""dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta
    use_scaled_rope""")                                                                 # Meta's params.json
VIT = keys("""model_type image_size patch_size hidden_size embed_dim num_hidden_layers num_attention_heads
    intermediate_size hidden_act layer_norm_eps vision_use_head mlp_ratio use_swiglu_ffn
    num_register_tokens vocab_size""")                  # vocab_size stands in LLaVA's vision_config, unused
TILED_VIT = keys("""model_type image_size patch_size vision_output_dim num_hidden_layers attention_heads
    intermediate_size norm_eps hidden_size num_global_layers max_num_tiles intermediate_layers_indices
    supported_aspect_ratios hidden_act""")
VISUALBERT = keys("""model_type vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size
    max_position_embeddings type_vocab_size hidden_act layer_norm_eps visual_embedding_dim
    special_visual_initialize""")
VILBERT = keys("""model_type vocab_size vocab_size_or_config_json_file hidden_size num_hidden_layers
    num_attention_heads intermediate_size max_position_embeddings type_vocab_size hidden_act v_hidden_act
    v_feature_size v_target_size v_hidden_size v_num_hidden_layers v_num_attention_heads v_intermediate_size
    bi_hidden_size bi_num_attention_heads v_biattention_id t_biattention_id fixed_v_layer fixed_t_layer
    fusion_method""")
VILT = keys("""model_type vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size
    max_position_embeddings type_vocab_size hidden_act layer_norm_eps image_size patch_size num_images
    max_image_length""")                                # max_image_length: of training
ALBEF = keys("""hidden_size vocab_size num_attention_heads num_hidden_layers fusion_layer encoder_width
    intermediate_size max_position_embeddings type_vocab_size hidden_act layer_norm_eps image_res patch_size
    vision_depth embed_dim queue_size momentum alpha""")
DUAL_ENCODER = keys("""model_type text_config vision_config text_config_dict vision_config_dict projection_dim
    vision_folder""")
CLIP_TEXT = keys("""model_type vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size
    max_position_embeddings hidden_act layer_norm_eps""")
QFORMER = keys("""model_type vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size
    max_position_embeddings hidden_act layer_norm_eps hidden_dropout_prob attention_probs_dropout_prob
    cross_attention_frequency cross_attention_freq encoder_hidden_size encoder_width""")
LAVIS = QFORMER | keys("vision_config vit vit_layer num_query_token embed_dim")
BLIP2 = keys("""model_type text_config vision_config qformer_config num_query_tokens image_text_hidden_size
    tie_word_embeddings""")
LLAVA = keys("""model_type text_config vision_config vision_feature_layer vision_feature_select_strategy
    projector_hidden_act multimodal_projector_bias tie_word_embeddings vocab_size""")  # transformers'
LLAVA_AUTHORS = DECODER | keys("""mm_vision_tower mm_projector_type mm_vision_select_layer
    mm_vision_select_feature unfreeze_mm_vision_tower image_aspect_ratio""")
MLLAMA_TEXT = DECODER | keys("cross_attention_layers")
IDEFICS = DECODER | keys("""vision_config perceiver_config additional_vocab_size cross_layer_interval
    qk_layer_norms alpha_type use_resampler""")
COCA = keys("embed_dim vision_cfg text_cfg multimodal_cfg correct_cls_mask")      # open_clip's
COCA_PART = keys("""image_size patch_size layers width heads head_width context_length vocab_size mlp_ratio
    attentional_pool attn_pooler_queries attn_pooler_heads""")
COGVLM = DECODER | keys("num_multi_query_heads vision_expert_bias vision_config template_version")
PERCEIVER = keys("""model_type use_resampler resampler_n_latents resampler_depth resampler_n_heads
    resampler_head_dim
    qk_layer_norms_perceiver""")
MLLAMA = keys("model_type text_config vision_config")
PROCESSOR = keys("""image_processor_type feature_extractor_type size crop_size image_size do_resize
    do_center_crop do_rescale rescale_factor do_normalize image_mean image_std do_pad resample
    max_image_tiles""")
BERT = keys("""model_type hidden_act layer_norm_eps num_attention_heads hidden_size num_hidden_layers
    intermediate_size vocab_size max_position_embeddings type_vocab_size directionality
    pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type""")
FLAVA = keys("""model_type image_config text_config multimodal_config image_codebook_config hidden_size
    projection_dim layer_norm_eps init_codebook ce_ignore_index mim_weight mlm_weight mmm_image_weight
    mmm_text_weight itm_weight global_contrastive_weight global_backprop_contrastive
    skip_unmasked_multimodal_encoder return_loss tie_word_embeddings""")    # from init_codebook on: losses
FLAVA_PART = keys("""model_type hidden_size image_size patch_size num_hidden_layers num_attention_heads
    intermediate_size hidden_act layer_norm_eps vocab_size max_position_embeddings type_vocab_size""")
BRIDGES = {                 # what lies beside a bridge alone
    "mapl": keys("model_type input_dim output_dim hidden_dim num_heads num_layers output_length"),
    "qformer": LAVIS,
    "zero_init": PARAMS | keys("""model_type adapter_len adapter_layers adapter_layer query_len
        query_layer v_embed_dim v_depth v_num_heads v_mlp_ratio"""),
    "flamingo": keys("""vis_dim cross_attn_every_n_layers perceiver gated_cross_attention dim_head heads
        num_latents depth ff_mult"""),
    "magma": keys("model_type"),
    "clipcap": keys("model_type sizes prefix_length normalize_prefix"),
    "clipcap_transformer": keys("""model_type dim_clip dim_embedding prefix_length clip_length num_layers
        normalize_prefix"""),
    "limber": keys("model_type"),
    **dict.fromkeys(("minigpt4", "minigpt4_llama2"), keys("""model_type vision_width qformer_width heads
        layers hidden queries width patches layer_norm_eps""")),
    "fromage": keys("""model_type n_visual_tokens shared_emb_dim vision_width opt_version visual_encoder task
        pretrained_visual append_retrieval_token retrieval_token_idx input_prompt add_input_to_ret"""),
    "kosmos1": keys("""model_type vision_width width heads queries patches latent_query_num text_config
        vision_config"""),
    "cogvlm": COGVLM,
}

# --- keys that change nothing in what the model computes ----------------------------------------------------

WITHOUT_EFFECT = keys("""
    architectures transformers_version id2label label2id problem_type finetuning_task task_specific_params
    processor_class auto_map return_dict use_cache use_bfloat16 chunk_size_feed_forward
    pretraining_tp gradient_checkpointing attn_implementation cache_implementation is_llama_config
    output_attentions output_hidden_states output_scores output_past return_dict_in_generate tf_legacy_loss
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups temperature top_k
    top_p typical_p num_return_sequences bad_words_ids remove_invalid_values suppress_tokens
    begin_suppress_tokens stop_strings prefix model_max_length max_sequence_length max_seq_len max_batch_size
    ignore_index image_seq_length projection_dim
    projection_size layerscale_value out_features out_indices stage_names apply_layernorm use_mask_token
    reshape_hidden_states logit_scale_init_value use_qformer_text_input inference_mode task_type
    base_model_name_or_path revision auto_mapping vision_model_name ffn_dim word_embed_proj_dim
    alphas_initializer_range mm_hidden_size mm_use_im_start_end mm_use_im_patch_token
    image_grid_pinpoints image_crop_resolution image_split_resolution max_token image_processor
    media_token_id eoc_token_id im_start_end_token_ids w_bias lora_rank clip
    default_to_square tie_word_embeddings do_convert_rgb input_data_format device return_tensors
    disable_grouping""")
# training, generation, and what begins with "_"
PATTERN = re.compile(r"^_|dropout|^drop_|_pdrop$|layerdrop|initializer|^init_|_init$|_token_ids?$|_lr$|_loss"
                     r"|_token_index$|^tokenizer_|flash_att|^unsloth|^transformers\.|^(un)?(tune|freeze)_"
                     r"|_version$|_penalty$|_ngram_size$")
DTYPES = keys("""auto float16 bfloat16 float32 float64
    torch.float16 torch.bfloat16 torch.float32 torch.float64""")

# key → the values that mean what we compute
ONLY = {
    **dict.fromkeys(("torch_dtype", "dtype"), DTYPES),
    **dict.fromkeys(("num_channels", "image_num_channels"), {3}),
    **dict.fromkeys(("is_decoder", "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder",
                     "torchscript", "sep_image_conv_front", "rope_interleaved", "use_mrope", "w_lora",
                     "w_new_gate", "do_flip_channel_order", "do_reduce_labels"), {False}),
    **dict.fromkeys(("qkv_bias", "proj_bias", "use_mm_proj", "use_decoder_only_language_model",
                     "only_attend_immediate_media"), {True}),
    "partial_rotary_factor": {1},
    "position_embedding_type": {"absolute"},
    "activation": {"relu"},                                                             # MAPL's
    "cross_layer_activation_function": {"swiglu"},                                      # IDEFICS's
    "alpha_type": {"float", "vector"},
    "mm_vision_select_feature": {"patch", "cls_patch"},
    "mm_patch_merge_type": {"flat"},
    "image_aspect_ratio": {"square", "pad"},
    "vision_feature_select_strategy": {"default", "full"},
    "text_emb_layers": ([-1],),                                                         # FROMAGe's
    **dict.fromkeys(("use_image_embed_norm", "use_text_embed_layernorm"), {False}),
    "bypass_transformer": {False},                                                      # VisualBERT's
    "modality_type_vocab_size": {2},                                                    # ViLT's
    "with_coattention": {True}, "pooling_method": {"mul"},                              # ViLBERT's
    **dict.fromkeys(("predict_feature", "fast_mode", "in_batch_pairs"), {False}),
    **dict.fromkeys(("use_cls_token", "mask_token", "qkv_bias"), {True}),               # FLAVA's
    "use_pooler": {True}, "tunable_prompt_length": {0}, "num_appended_retrieval_tokens": {1},
    "peft_type": {"ADAPTION_PROMPT"},
    "target_modules": {"self_attn"},
    "data_format": {"channels_first"},
    **dict.fromkeys(("embed_cls", "output_tokens", "custom_text"), {True}),     # open_clip's CoCa
    "quantization_config": (),
}


def refuse_unknown(c: dict, where: str, read: frozenset[str]) -> None:
    """A UserError for the first key that asks for what we would not do; null and {} ask for nothing."""
    for key, value in c.items():
        if value is None or value in ({}, [], "", ()):
            continue
        if key in ONLY:
            known = ONLY[key]
            if any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in known):
                continue
            names = " or ".join(json.dumps(v) for v in sorted(known, key=str)) or "none"
            raise UserError(f"{where}: {key} is {shown(value)}, and that is not what is computed here "
                            f"(known: {names}).")
        if key not in read and key not in WITHOUT_EFFECT and not PATTERN.search(key):
            raise UserError(f"{where}: the key '{key}' ({shown(value)}) is not known here, so what it asks "
                            "for would not be done; remove it if the model computes the same without it.")


def refuse_contradiction(c: dict, where: str, **sizes) -> None:
    """A UserError for the first of these keys that has another value in the config."""
    for key, ours in sizes.items():
        if ours is not None and c.get(key) not in (None, ours):
            raise UserError(f'{where}: {key} is {shown(c[key])}, but the tensors say {ours}; '
                            "they belong to different models.")


def shown(value) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
