"""formats/blip2.py: BLIP-2 and InstructBLIP in the layouts of LAVIS and transformers, and BERT as a Q-Former's start."""
from __future__ import annotations

from pathlib import Path

import torch

from bridges import QFormer
from model import Decoder, DecoderConfig, VLM, ViT
from papers import make_bridge
from papers.blip2_stage1 import Stage1
from support.formats.checkpoint import BridgeFile, Checkpoint, Fills, IGNORED, WB, expand
from support.formats.files import UserError, read_json, write_json, write_tensors
from support.formats.hub import tower_folder
from support.formats.llama import LLAMA_DEFAULTS, decoder_config, decoder_names
from support.formats.vision import EVA_NAMES, VIT_DEFAULTS, vit_config, vit_file

EVA = dict(VIT_DEFAULTS["eva"], model_type="blip_2_vision_model")               # where a config is silent
LAVIS_EVA_NAMES = {     # the authors' ViT-g; its keys have no bias: it would add the same to all scores of a query
    "cls": "cls_token", "positions": "pos_embed", **{f"patch.{w}": f"patch_embed.proj.{w}" for w in WB},
    **{f"blocks.{{i}}.{p}.weight": f"blocks.{{i}}.attn.qkv.weight[{n}/3]" for n, p in enumerate("qkv")},
    **{f"blocks.{{i}}.{p}.bias": f"blocks.{{i}}.attn.{b}" for p, b in (("q", "q_bias"), ("k", "q_bias[zero]"), ("v", "v_bias"))},
    **{f"blocks.{{i}}.{a}.{w}": f"blocks.{{i}}.{b}.{w}" for w in WB for a, b in (
        ("o", "attn.proj"), ("norm1", "norm1"), ("norm2", "norm2"), ("up", "mlp.fc1"), ("down", "mlp.fc2"))},
}
QFORMER_LAYER = {       # @: "self" in the authors' files, "attention" in transformers'
    **{f"layers.{{i}}.{a}.{x}.{w}": f"encoder.layer.{{i}}.{b}.{y}.{w}" for w in WB
       for a, b in (("attention", "attention"), ("cross", "crossattention"))
       for x, y in (("q", "@.query"), ("k", "@.key"), ("v", "@.value"), ("o", "output.dense"), ("norm", "output.LayerNorm"))},
    **{f"layers.{{i}}.{a}.{x}.{w}": f"encoder.layer.{{i}}.{y}.{w}" for w in WB
       for a, e in (("query_mlp", "_query"), ("text_mlp", ""))
       for x, y in (("up", f"intermediate{e}.dense"), ("down", f"output{e}.dense"), ("norm", f"output{e}.LayerNorm"))},
}
QFORMER_NAMES = {       # ours: the authors' (LAVIS), transformers' BLIP-2, its InstructBLIP; below the blank line what Stage1 adds
    "queries": ("query_tokens", "query_tokens", "query_tokens"),
    "vision_norm": ("ln_vision", "vision_model.post_layernorm", "vision_model.post_layernorm"),
    "norm": ("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm", "qformer.embeddings.layernorm"),
    **{a: (f"Qformer.bert.embeddings.{b}", f"embeddings.{b}", f"qformer.embeddings.{b}")
       for a, b in (("words", "word_embeddings"), ("positions", "position_embeddings"))},
    "project": ("llm_proj", "language_projection", "language_projection"),

    "image_head": ("vision_proj", "vision_projection", ""), "text_head": ("text_proj", "text_projection", ""),
    "match_head": ("itm_head", "itm_head", ""), "temperature": ("temp", "", ""),
    **{a: (f"Qformer.cls.predictions.{b}", "", "") for a, b in (
        ("word_head", "transform.dense"), ("word_norm", "transform.LayerNorm"), ("word_matrix", "decoder"), ("word_bias", "bias"))},
}


def qformer_names(layout: str, layers: int, ours: str = "") -> dict[str, str]:
    """Ours → theirs for a Q-Former below `ours` and for Stage1's own parameters; layout: lavis | blip2 | instructblip."""
    n = ("lavis", "blip2", "instructblip").index(layout)
    trunk, attention = (("Qformer.bert.", "self"), ("qformer.", "attention"))[n > 0]
    layer = {a: b.replace("@", attention) for a, b in expand(QFORMER_LAYER, layers, trunk, ours).items()}
    return layer | {a + end: theirs[n] + end for name, theirs in QFORMER_NAMES.items() for a in (name, ours + name)
                    for end in ("", ".weight", ".bias")}


def qformer_options(c: dict, where: str, text: bool) -> dict:
    """Keyword arguments of QFormer from a config of transformers or of `lavis`; what it leaves out has BERT-base's value."""
    if c.get("hidden_act", "gelu") != "gelu" or c.get("layer_norm_eps", 1e-12) != 1e-12:
        raise UserError(f"{where}: a Q-Former's hidden_act must be gelu and its layer_norm_eps 1e-12, the only published values.")
    options = dict(width=c.get("hidden_size", 768), layers=c.get("num_hidden_layers", 12), heads=c.get("num_attention_heads", 12),
                   hidden=c.get("intermediate_size", 3072), dropout=c.get("hidden_dropout_prob", 0.1),
                   cross_every=c.get("cross_attention_frequency", c.get("cross_attention_freq", 2)))
    return {**options, "vocab": c.get("vocab_size", 30522), "positions": c.get("max_position_embeddings", 512)} if text else options


def read_blip2(c: dict, path: Path) -> tuple[VLM | Stage1, Fills]:
    """BLIP-2 and InstructBLIP of transformers: the retrieval model is a first stage (without τ and captions), the others have a decoder.

    Their prompts hold one image token per query, ours one IMAGE for all of them.
    """
    where, text, layout = f"{path}/config.json", c.get("text_config", {}), c["model_type"].replace("-", "")
    retrieval, kind = "Blip2ForImageTextRetrieval" in (c.get("architectures") or ()), text.get("model_type", "opt")
    if not retrieval and kind != "llama":
        other = {"t5": "an encoder-decoder", "opt": "a decoder with learned positions"}.get(kind, "unknown here")
        raise UserError(f'{where}: the language model is "{kind}" ({other}), but only LLaMA decoders are read; '
                        "instructblip-vicuna-7b and -13b have one.")
    vit = ViT(vit_config({**EVA, **c.get("vision_config", {})}, where)[0])
    decoder = None if retrieval else Decoder(decoder_config(
        {"tie_word_embeddings": c.get("tie_word_embeddings", False), **LLAMA_DEFAULTS, **text}, where))
    sizes = qformer_options(c.get("qformer_config", {}), where, retrieval or layout == "instructblip")
    former = make_bridge("qformer", decoder and decoder.config, vit.config.width, queries=c.get("num_query_tokens", 32),
                         vision_eps=vit.config.norm_eps, **sizes)
    names = expand(EVA_NAMES, vit.config.layers, "vision_model.", "vit.")
    if retrieval:
        stage = Stage1(vit, former, c.get("image_text_hidden_size", 256), full=False)
        return stage, [(stage, Checkpoint(path), names | qformer_names(layout, len(former.layers), "qformer."), ())]
    names |= qformer_names(layout, len(former.layers), "bridge.")
    names |= decoder_names(decoder.config, "language_model.model.", "language_model.", "decoder.")
    vlm = VLM(vit, former, decoder, c.get("image_token_index"))
    return vlm, [(vlm, Checkpoint(path), names, ("language_model.lm_head.",) if decoder.config.tied else ())]


def read_lavis(c: dict, path: Path) -> tuple[Stage1, Fills]:
    """BLIP-2's first stage as its authors publish it: Qformer.*, query_tokens, ln_vision, the heads, and perhaps visual_encoder.*

    Their files have no config.json; the one we agree on says "model_type": "blip2_qformer_lavis", and of vocab_size, hidden_size,
    num_hidden_layers, num_attention_heads, intermediate_size, max_position_embeddings, encoder_width, cross_attention_freq,
    num_query_token, embed_dim, bos_token_id ([DEC]) those that differ from the release. The ViT is visual_encoder.* of the file,
    with ViT-g's sizes or those of a "vision_config" in transformers' words; else the folder "vit", which load_vit reads
    (and "vit_layer": -2 for CLIP's ViT-L, whose last block the authors drop); else there is none, and the model takes features.
    """
    where, file, config, left = f"{path}/config.json", Checkpoint(path), None, ()
    if inside := any(n.startswith("visual_encoder.") for n in file.where):
        config = vit_config({**EVA, **c.get("vision_config", {})}, where)[0]
    elif "vit" in c:
        tower = tower_folder(path, c["vit"])
        config, family = vit_config(read_json(tower / "config.json"), f"{tower}/config.json")
    vit = ViT(config) if config else None
    former = QFormer(None, config.width if config else c.get("encoder_width", 1408), c.get("num_query_token", 32),
                     **qformer_options({"vocab_size": 30523, **c}, where, True))
    former.reads = c.get("vit_layer", -1)
    names = qformer_names("lavis", len(former.layers), "qformer.")
    matrix, words = names["word_matrix.weight"], names["words.weight"]
    tied = not {matrix, words} <= set(file.where) or torch.equal(file.get(matrix), file.get(words))
    stage = Stage1(vit, former, c.get("embed_dim", 256), tied=tied, dec=c.get("bos_token_id"))
    if inside:
        names |= {f"vit.post_norm.{w}": f"ln_vision.{w}" for w in WB}
        names |= expand(LAVIS_EVA_NAMES, config.layers, "visual_encoder.", "vit.")
    elif vit:
        beside, theirs, left = vit_file(tower, config, family)                  # one model out of two files
        file.where, file.files, file.path = file.where | beside.where, file.files | beside.files, f"{path} and {tower}"
        names |= {f"vit.{a}": b for a, b in theirs.items()}
    return stage, [(stage, file, names, (names["word_matrix.bias"], *left, *([matrix] if tied else ())))]


def read_own_stage1(c: dict, path: Path) -> tuple[Stage1, Fills]:
    """A run of train.py's recipe blip2-1: stage1.safetensors in our own names, and the folder of the ViT."""
    tower = tower_folder(path, c["vit"])
    config, family = vit_config(read_json(tower / "config.json"), f"{tower}/config.json")
    former = make_bridge("qformer", None, config.width, **c["bridge_options"])
    stage = Stage1(ViT(config), former, c["contrast"], dec=c["dec"])
    file, (beside, theirs, left) = Checkpoint(path / "stage1.safetensors"), vit_file(tower, config, family)
    file.where, file.files = file.where | beside.where, file.files | beside.files
    return stage, [(stage, file, {f"vit.{a}": b for a, b in theirs.items()}, left)]


def save_stage1(stage: Stage1, out: Path, facts: dict, vit: str) -> None:
    """Write a run of recipe blip2-1, which read_own_stage1 reads; vit: the name of the frozen ViT's folder."""
    tensors = {n: p for n, p in stage.state_dict().items() if not n.startswith("vit.")}
    write_tensors(out / "stage1.safetensors", tensors, {"stage1": "qformer"})
    write_json(out / "config.json", {**facts, "model_type": "stage1", "bridge_options": stage.qformer.options,
                                     "contrast": len(stage.image_head.weight), "dec": stage.dec, "vit": vit})


def fill_from_stage1(bridge: QFormer, path: Path) -> None:
    """Stage 2 begins with the Q-Former of a run of blip2-1, without its text branch; only the projection is new."""
    file = Checkpoint(path)
    with torch.no_grad():
        for n, p in bridge.named_parameters():
            name = f"qformer.{n}"
            if n.startswith("project."):
                continue
            if file.missing(name) or file.shape(name) != tuple(p.shape):
                raise UserError(f'{file.path}: tensor "{name}" of shape {tuple(p.shape)} is not there; '
                                "the run was another Q-Former.")
            p.copy_(file.get(name))


def init_from_bert(module: QFormer | Stage1, path) -> None:
    """Start a Q-Former, or a whole first stage, from a BERT folder (BLIP-2, §3.1; LAVIS: Blip2Base.init_Qformer, Blip2Qformer).

    ours                                                                  from BERT
    words, positions, norm, attention, text_mlp, the captioning head      the tensor of that name
    query_mlp                                                             the text's feed-forward of the same layer
    cross, queries, vision_norm, project, the other heads, words beyond BERT's ([DEC])    nothing: they stay as they are

    BERT's token types, pooler and next-sentence head are left out, so that the text branch is not quite BERT even at the start.
    """
    file, former = Checkpoint(path), getattr(module, "qformer", module)
    bert, old = file.prefix("bert.", ""), any(n.endswith("LayerNorm.gamma") for n in file.where)
    names = qformer_names("lavis", len(former.layers), "" if former is module else "qformer.")
    names = {a: b for a, b in names.items() if b.startswith("Qformer.")}
    norms = (("Norm.weight", "Norm.gamma"), ("Norm.bias", "Norm.beta")) if old else ()
    for a, b in (("Qformer.bert.", bert), ("Qformer.", ""), ("_query", ""), *norms):
        names = {ours: theirs.replace(a, b) for ours, theirs in names.items()}
    unused = ("embeddings.token_type_embeddings.", "pooler.", "cls.seq_relationship.", "cls.predictions.decoder.")
    known = {*names.values(), *(n for n in file.where if n.removeprefix(bert).startswith(unused) or n.endswith(IGNORED))}
    if extra := [n for n in file.where if n not in known]:
        raise UserError(f'{file.path}: {len(extra)} tensors have no place in this Q-Former (first: "{extra[0]}"); '
                        "build it in BERT's sizes.")
    for ours, p in module.named_parameters():
        if ours in names and "cross" not in ours and ours != "word_matrix.weight":
            shape, rows = file.shape(names[ours]), len(p)
            if ours.endswith(("words.weight", "word_bias")):                    # the words that we add come last
                rows = min(shape[0], rows)
            if shape != p[:rows].shape:
                raise UserError(f'{file.path}: tensor "{names[ours]}" has shape {shape}, the Q-Former\'s {ours} {tuple(p.shape)}; '
                                "build the Q-Former in BERT's sizes.")
            p.data[:rows].copy_(file.get(names[ours]))


def qformer_file(file: Checkpoint, beside: dict, **options) -> BridgeFile:
    """A Q-Former out of an authors' file of any stage, or transformers' Blip2QFormerModel, which has neither queries nor ln_vision.

    The projection comes along where the file holds one, the text branch where it holds words. Sizes: config.json's, else BERT-base's.
    """
    layout = "lavis" if file.prefix("Qformer.", "") else "blip2"
    names = qformer_names(layout, beside.get("num_hidden_layers", 12))
    names = {a: b.removeprefix("qformer.") for a, b in names.items()}
    project = file.prefix("llm_proj.", "llama_proj.", "opt_proj.", "t5_proj.")
    names |= {f"project.{w}": project + w for w in WB}
    queries, words, D = (file.shape(names[n])[at] if names[n] in file.where else 0 for n, at in (
        ("queries", 1), ("words.weight", 0), ("project.weight", 0)))
    sizes = qformer_options({**beside, "vocab_size": words}, str(file.path), bool(words))
    sizes |= dict(queries=queries, vision_eps=1e-5 if "ln_vision.weight" in file.where else None)
    Di = file.shape(names["layers.0.cross.k.weight"])[1]
    bridge = make_bridge("qformer", DecoderConfig(width=D) if D else None, Di, **{**sizes, **options})
    return bridge, names, ("Qformer.cls.", "vision_proj.", "text_proj.", "itm_head.", "temp", "visual_encoder.", "llm_model.",
                           "llama_model.", "opt_model.", "t5_model.")
