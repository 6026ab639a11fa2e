"""support/formats/prefix_maps.py: the maps of ClipCap, LiMBeR, MiniGPT-4, KOSMOS-2, FROMAGe as published.

    clipcap, clipcap_transformer    the authors' .pt: clip_project.*, beside a whole GPT-2, which stays there
    limber                          the authors' proj.ckpt: weight and bias
    minigpt4, minigpt4_llama2       the authors' .pth: {"model": llama_proj.*}; the rest is BLIP-2's
    kosmos1                         transformers' Kosmos2: image_to_text_projection.*, CLIP's post_layernorm
    fromage                         the authors' pretrained_ckpt.pth.tar: visual_*, text_hidden_fcs.0.0, [RET]
"""
from __future__ import annotations

from model import DecoderConfig
from papers import make_bridge
from support.formats.blip2 import qformer_names
from support.formats.checkpoint import BridgeFile, Checkpoint
from support.formats.files import UserError
from support.formats.honoured import refuse_contradiction
from support.formats.names import WB, Names, Part, expand, parameters

CLIPCAP_NAMES = parameters({"up": "clip_project.model.0", "down": "clip_project.model.2"})
CLIPCAP_BLOCK_NAMES: Names = {                          # TransformerLayer; keys and values are one matrix
    **parameters({"norm1": "norm1", "norm2": "norm2", "o": "attn.project", "up": "mlp.fc1",
                  "down": "mlp.fc2"}, "blocks.{i}.", "layers.{i}."),
    "blocks.{i}.q.weight": "layers.{i}.attn.to_queries.weight",
    "blocks.{i}.k.weight": Part("layers.{i}.attn.to_keys_values.weight", 0, 2),
    "blocks.{i}.v.weight": Part("layers.{i}.attn.to_keys_values.weight", 1, 2),
}
WORDS = "gpt.transformer.wte.weight"                    # (V, D) of the GPT-2 in ClipCap's file
QFORMER_LEFT_OVER = (       # of BLIP-2's file: its own projection, the ViT, the branch that reads text
    "t5_proj.", "opt_proj.", "llm_proj.", "visual_encoder.", "Qformer.cls.",
    "Qformer.bert.embeddings.word_embeddings.", "Qformer.bert.embeddings.position_embeddings.")
TEXT_BRANCH = ("intermediate.dense.", "output.dense.", "output.LayerNorm.")     # of a layer of the Q-Former
KOSMOS_NAMES = {
    "queries": "image_to_text_projection.latent_query",
    **parameters({"dense": "dense", "connector.q": "x_attn.q_proj", "connector.k": "x_attn.k_proj",
                  "connector.v": "x_attn.v_proj", "connector.o": "x_attn.out_proj"},
                 "", "image_to_text_projection."),
    **parameters({"vision_norm": "vision_model.model.post_layernorm"}),
}
FROMAGE_NAMES = {"logit_scale": "logit_scale", **parameters({
    "map": "visual_embeddings", "image_head": "visual_fc", "text_head": "text_hidden_fcs.0.0"})}


def words_of(file: Checkpoint, rows: int, config: dict, D: int | None, tokens: int | None) -> tuple[int, int]:
    """(K, D) of a map with K·D rows; D is the decoder's where that is known, else K must be."""
    D = D or config.get("decoder_width")
    K = tokens or config.get("prefix_length") or (rows // D if D else 0)
    if not K:
        raise UserError(f"{file.path}: its {rows} rows are K words of width D, and nothing here tells how "
                        "many; give tokens=K, or decoder= the config of its decoder.")
    if rows % K or D and rows != K * D:
        raise UserError(f"{file.path}: its {rows} rows are not {K} words"
                        + (f" of width {D}" if D else "") + "; give another number as tokens=K.")
    return K, rows // K


def clipcap_file(file: Checkpoint, config: dict, tokens: int | None = None, **options) -> BridgeFile:
    """ClipCap's MLP. K·D rows do not tell K: the GPT-2 beside it, the config, the decoder or tokens does."""
    rows, hidden = file.shape("clip_project.model.2.weight")
    Di = file.shape("clip_project.model.0.weight")[1]
    D = None if file.missing(WORDS) else file.shape(WORDS)[1]
    K, D = words_of(file, rows, config, D, tokens)
    refuse_contradiction(config, f"{file.path}'s config", sizes=[Di, hidden, rows], prefix_length=K,
                         decoder_width=D)
    options = {"normalize": config.get("normalize_prefix", False), **options}
    bridge = make_bridge("clipcap", DecoderConfig(width=D), Di, tokens=K, **options)
    return BridgeFile(bridge, CLIPCAP_NAMES, ("gpt.",))


def clipcap_transformer_file(file: Checkpoint, config: dict, **options) -> BridgeFile:
    """ClipCap's transformer; heads, which no shape tells, are 8.

    The released one was trained on vectors of length 1 (normalize_prefix): give normalize=True.
    """
    start = "clip_project.transformer."
    K, D = file.shape("clip_project.prefix_const")
    rows, Di = file.shape("clip_project.linear.weight")
    layers = file.count(start + "layers.{}.norm1.weight")
    refuse_contradiction(config, f"{file.path}'s config", dim_clip=Di, dim_embedding=D, prefix_length=K,
                         clip_length=rows // D, num_layers=layers, decoder_width=D)
    options = {"tokens": K, "image_tokens": rows // D, "layers": layers,
               "normalize": config.get("normalize_prefix", False), **options}
    bridge = make_bridge("clipcap_transformer", DecoderConfig(width=D), Di, **options)
    names = {"constants": "clip_project.prefix_const", **parameters({"map": "clip_project.linear"}),
             **expand(CLIPCAP_BLOCK_NAMES, layers, start)}
    return BridgeFile(bridge, names, ("gpt.",))


def limber_file(file: Checkpoint, config: dict, tokens: int | None = None, **options) -> BridgeFile:
    """LiMBeR's map, one word per cell unless tokens or the decoder's width says more."""
    start = file.prefix("image_prefix.proj.", "proj.", "")
    rows, Di = file.shape(start + "weight")
    s, D = words_of(file, rows, config, None, tokens or (None if config.get("decoder_width") else 1))
    refuse_contradiction(config, f"{file.path}'s config", decoder_width=D)
    bridge = make_bridge("limber", DecoderConfig(width=D), Di, tokens=s, **options)
    return BridgeFile(bridge, {f"map.{w}": start + w for w in WB})


def minigpt4_file(file: Checkpoint, config: dict, qformer: str = "", **options) -> BridgeFile:
    """MiniGPT-4's map and the frozen Q-Former of BLIP-2 ahead of it.

    The published file has the map alone. qformer: the file of BLIP-2 (blip2_pretrained_flant5xxl.pth) with
    the rest. Heads are 64 wide, as BERT's, unless the config or `heads` says otherwise.
    """
    if qformer and not file.missing("query_tokens"):
        raise UserError(f"{file.path}: holds a Q-Former of its own; leave out qformer=.")
    if qformer:
        file.include(Checkpoint(qformer))
    if file.missing("query_tokens"):
        raise UserError(f"{file.path}: holds llama_proj alone; the Q-Former is BLIP-2's, give "
                        "qformer= its file, blip2_pretrained_flant5xxl.pth.")
    layer = "Qformer.bert.encoder.layer.{}."
    (_, Q, W), (D, _) = file.shape("query_tokens"), file.shape("llama_proj.weight")
    layers = file.count(layer + "attention.self.query.weight")
    key = layer + "crossattention.self.key.weight"
    cross = [i for i in range(layers) if not file.missing(key.format(i))] or [0]
    Di = file.shape(key.format(cross[0]))[1]
    hidden = file.shape(layer.format(0) + "intermediate_query.dense.weight")[0]
    refuse_contradiction(config, f"{file.path}'s config", vision_width=Di, qformer_width=W, layers=layers,
                         hidden=hidden, queries=Q, width=D, layer_norm_eps=1e-12, decoder_width=D)
    sizes = dict(queries=Q, width=W, layers=layers, hidden=hidden, heads=config.get("heads") or W // 64,
                 cross_every=cross[1] - cross[0] if len(cross) > 1 else layers)
    bridge = make_bridge("minigpt4", DecoderConfig(width=D), Di, **{**sizes, **options})
    names = {**qformer_names("lavis", layers), **parameters({"project": "llama_proj"})}
    text = tuple(layer.format(i) + part for i in range(layers) for part in TEXT_BRANCH)
    return BridgeFile(bridge, names, QFORMER_LEFT_OVER + text)


def minigpt4_llama2_file(file: Checkpoint, config: dict, join: int = 4, **options) -> BridgeFile:
    """The variant without a Q-Former. Its norm is in no published file: it never learned, so it is (1, 0)."""
    D, joined = file.shape("llama_proj.weight")
    if joined % join:
        raise UserError(f"{file.path}: llama_proj reads {joined} numbers, which are not {join} tokens side "
                        "by side; give another number as join=.")
    refuse_contradiction(config, f"{file.path}'s config", vision_width=joined // join, width=D,
                         decoder_width=D)
    options = {"join": join, "norm_weights": not file.missing("ln_vision.weight"), **options}
    bridge = make_bridge("minigpt4_llama2", DecoderConfig(width=D), joined // join, **options)
    return BridgeFile(bridge, parameters({"vision_norm": "ln_vision", "map": "llama_proj"}))


def kosmos_file(file: Checkpoint, config: dict, **options) -> BridgeFile:
    """KOSMOS-2's connector out of transformers' folder, with CLIP's post-norm where the file holds it."""
    (K, D), (_, Di) = (file.shape(KOSMOS_NAMES[name]) for name in ("queries", "dense.weight"))
    text = config.get("text_config") or {}
    refuse_contradiction(config, f"{file.path}'s config", latent_query_num=K, queries=K, width=D,
                         vision_width=Di, decoder_width=D)
    refuse_contradiction(text, f"{file.path}'s config: text_config", embed_dim=D)
    sizes = dict(queries=K, heads=config.get("heads") or text.get("attention_heads") or 32)
    if file.missing(KOSMOS_NAMES["vision_norm.weight"]):
        sizes["vision_eps"] = None                      # features come in behind it
    bridge = make_bridge("kosmos1", DecoderConfig(width=D), Di, **{**sizes, **options})
    return BridgeFile(bridge, KOSMOS_NAMES, ("text_model.", "vision_model."))


def fromage_file(file: Checkpoint, config: dict, **options) -> BridgeFile:
    """FROMAGe's three maps, its scale, and the row of [RET], which the authors store beside them."""
    start = file.prefix("model.", "")
    (rows, Di), (joint, D) = (file.shape(start + FROMAGE_NAMES[f"{name}.weight"])
                              for name in ("map", "text_head"))
    K = max(1, rows // D)
    refuse_contradiction(config, f"{file.path}'s config", n_visual_tokens=K, shared_emb_dim=joint,
                         vision_width=Di, decoder_width=D)
    bridge = make_bridge("fromage", DecoderConfig(width=D), Di, **{"tokens": K, "joint": joint, **options})
    names = {**expand(FROMAGE_NAMES, 0, start), "ret": "ret_input_embeddings.weight"}
    return BridgeFile(bridge, names, tuple(start + part for part in ("lm.", "visual_model.",
                                                                     "input_embeddings.")))
