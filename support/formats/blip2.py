"""support/formats/blip2.py: BLIP-2 and InstructBLIP of LAVIS and of transformers; a start from BERT."""
from __future__ import annotations

import os
from pathlib import Path

import torch

from bridges import QFormer
from model import Decoder, DecoderConfig, VLM, ViT, ViTConfig
from papers import make_bridge
from papers.blip2_stage1 import Stage1
from support.formats.checkpoint import BridgeFile, Checkpoint, Filling, IGNORED, tensor_for
from support.formats.files import UserError, read_json, write_json, write_tensors
from support.formats.honoured import BERT, BLIP2, LAVIS, refuse_unknown
from support.formats.hub import tower_folder
from support.formats.llama import decoder_names, inner_decoder_config, tie_head
from support.formats.names import Names, Part, Source, WB, ZerosLike, expand, parameters
from support.formats.vision import EVA_NAMES, VIT_DEFAULTS, empty_vit, vit_config, vit_file

# ---- 1. Names of tensors, ours → theirs ------------------------------------------------------------------

LAVIS_EVA_NAMES = {         # the authors' ViT-g (LAVIS, eva_vit.py), below "visual_encoder."
    "cls": "cls_token",
    "positions": "pos_embed",
    **parameters({"patch": "patch_embed.proj"}),
    **{f"blocks.{{i}}.{p}.weight": Part("blocks.{i}.attn.qkv.weight", n, 3) for n, p in enumerate("qkv")},
    "blocks.{i}.q.bias": "blocks.{i}.attn.q_bias",
    "blocks.{i}.k.bias": ZerosLike("blocks.{i}.attn.q_bias"),       # would change no softmax
    "blocks.{i}.v.bias": "blocks.{i}.attn.v_bias",
    **parameters({"o": "attn.proj", "norm1": "norm1", "norm2": "norm2", "up": "mlp.fc1", "down": "mlp.fc2"},
                 "blocks.{i}.", "blocks.{i}."),
}


def qformer_layer_names(attention: str) -> Names:
    """A layer of the Q-Former, BERT's with cross-attention and a second feed-forward for the queries.

    attention: what the authors call "self", transformers "attention".
    """
    def block(theirs: str) -> dict[str, str]:
        return {"q": f"{theirs}.{attention}.query", "k": f"{theirs}.{attention}.key",
                "v": f"{theirs}.{attention}.value", "o": f"{theirs}.output.dense",
                "norm": f"{theirs}.output.LayerNorm"}

    def feed_forward(ending: str) -> dict[str, str]:
        return {"up": f"intermediate{ending}.dense", "down": f"output{ending}.dense",
                "norm": f"output{ending}.LayerNorm"}

    parts = {"attention": block("attention"), "cross": block("crossattention"),
             "query_mlp": feed_forward("_query"), "text_mlp": feed_forward("")}
    modules = {f"{part}.{ours}": theirs for part, table in parts.items() for ours, theirs in table.items()}
    return parameters(modules, "layers.{i}.", "encoder.layer.{i}.")


QFORMER_NAMES = {           # ours → theirs, in each layout: LAVIS, and transformers' BLIP-2 and InstructBLIP
    "lavis": {
        "queries": "query_tokens",
        "vision_norm": "ln_vision",
        "norm": "Qformer.bert.embeddings.LayerNorm",
        "words": "Qformer.bert.embeddings.word_embeddings",
        "positions": "Qformer.bert.embeddings.position_embeddings",
        "project": "llm_proj",
    },
    "blip2": {
        "queries": "query_tokens",
        "vision_norm": "vision_model.post_layernorm",
        "norm": "qformer.layernorm",
        "words": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "project": "language_projection",
    },
    "instructblip": {
        "queries": "query_tokens",
        "vision_norm": "vision_model.post_layernorm",
        "norm": "qformer.embeddings.layernorm",
        "words": "qformer.embeddings.word_embeddings",
        "positions": "qformer.embeddings.position_embeddings",
        "project": "language_projection",
    },
}
STAGE1_NAMES = {            # what the first stage adds
    "lavis": {
        "image_head": "vision_proj",
        "text_head": "text_proj",
        "match_head": "itm_head",
        "temperature": "temp",
        "word_head": "Qformer.cls.predictions.transform.dense",
        "word_norm": "Qformer.cls.predictions.transform.LayerNorm",
        "word_matrix": "Qformer.cls.predictions.decoder",
        "word_bias": "Qformer.cls.predictions.bias",
    },
    "blip2": {"image_head": "vision_projection", "text_head": "text_projection", "match_head": "itm_head"},
    "instructblip": {},
}


def qformer_names(layout: str, layers: int, ours: str = "") -> dict[str, str]:
    """Ours → theirs for a Q-Former below `ours` and for Stage1's own parameters.

    layout: lavis | blip2 | instructblip. Some entries are bare parameters, others modules; the table has a
    name for every ending.
    """
    trunk, attention = ("Qformer.bert.", "self") if layout == "lavis" else ("qformer.", "attention")
    names = expand(qformer_layer_names(attention), layers, trunk, ours)
    for a, b in {**{ours + a: b for a, b in QFORMER_NAMES[layout].items()}, **STAGE1_NAMES[layout]}.items():
        names |= {a + ending: b + ending for ending in ("", ".weight", ".bias")}
    return names


# ---- 2. Configs ------------------------------------------------------------------------------------------

EVA = dict(VIT_DEFAULTS["eva"], model_type="blip_2_vision_model")   # for a vision_config that is silent


def qformer_options(c: dict, where: str, text: bool) -> dict:
    """Keyword arguments of QFormer from a config of transformers or of `lavis`; BERT-base's sizes by default.

    text: whether the Q-Former reads text, too.
    """
    refuse_unknown(c, where, LAVIS)
    dropout = c.get("hidden_dropout_prob", 0.1)
    if c.get("hidden_act", "gelu") != "gelu" or c.get("layer_norm_eps", 1e-12) != 1e-12:
        raise UserError(f"{where}: a Q-Former's hidden_act must be gelu and its layer_norm_eps 1e-12, "
                        "the only published values.")
    if c.get("attention_probs_dropout_prob", dropout) != dropout:
        raise UserError(f"{where}: a Q-Former has one dropout, but hidden_dropout_prob is {dropout} and "
                        f"attention_probs_dropout_prob {c['attention_probs_dropout_prob']}.")
    options = dict(
        width=c.get("hidden_size", 768), layers=c.get("num_hidden_layers", 12),
        heads=c.get("num_attention_heads", 12), hidden=c.get("intermediate_size", 3072),
        dropout=dropout,
        cross_every=c.get("cross_attention_frequency", c.get("cross_attention_freq", 2)))
    if text:
        options |= dict(vocab=c.get("vocab_size", 30522), positions=c.get("max_position_embeddings", 512))
    return options


def tower_beside(path: Path, name: str) -> tuple[Path, ViTConfig, str]:
    """The folder of a ViT that a config.json names, its config, and its family."""
    tower = tower_folder(path, name)
    return tower, *vit_config(read_json(tower / "config.json"), f"{tower}/config.json")


# ---- 3. Folders ------------------------------------------------------------------------------------------

def read_blip2(c: dict, path: Path) -> tuple[VLM | Stage1, list[Filling]]:
    """transformers' BLIP-2 and InstructBLIP → the empty model, and what fills it.

    Blip2ForImageTextRetrieval is a first stage (without τ and captions), the others have a decoder. Their
    prompts hold one image token per query, ours one IMAGE for all of them.
    """
    where, layout = f"{path}/config.json", c["model_type"].replace("-", "")
    refuse_unknown(c, where, BLIP2)
    if "Blip2ForImageTextRetrieval" in (c.get("architectures") or ()):
        return read_retrieval(c, path, layout)
    text = c.get("text_config", {})
    kind = text.get("model_type", "opt")
    if kind != "llama":
        others = {"t5": "an encoder-decoder", "opt": "a decoder with learned positions"}
        raise UserError(f'{where}: the language model is "{kind}" ({others.get(kind, "unknown here")}), but '
                        "only LLaMA decoders are read; instructblip-vicuna-7b and -13b have one.")
    decoder = Decoder(inner_decoder_config(text, c, where))
    reads_text = layout == "instructblip"
    vit, former, names = vision_part(c, where, layout, decoder.config, "bridge.", reads_text)
    names |= decoder_names(decoder.config, "language_model.model.", "language_model.", "decoder.")
    vlm, file = VLM(vit, former, decoder, c.get("image_token_index")), Checkpoint(path)
    optional = tie_head(decoder.config, names, file, "decoder.")
    return vlm, [Filling(vlm, file, names, optional)]


def read_retrieval(c: dict, path: Path, layout: str) -> tuple[Stage1, list[Filling]]:
    vit, former, names = vision_part(c, f"{path}/config.json", layout, None, "qformer.", text=True)
    stage = Stage1(vit, former, c.get("image_text_hidden_size", 256), full=False)
    return stage, [Filling(stage, Checkpoint(path), names)]


def vision_part(c: dict, where: str, layout: str, decoder: DecoderConfig | None, ours: str,
                text: bool) -> tuple[ViT, QFormer, Names]:
    """ViT and Q-Former of transformers' BLIP-2 and InstructBLIP, and their names.

    ours: the prefix of the Q-Former's names. text: whether it reads text, too.
    """
    vit = empty_vit(*vit_config({**EVA, **c.get("vision_config", {})}, where))
    options = qformer_options(c.get("qformer_config", {}), where, text)
    former = make_bridge("qformer", decoder, vit.config.width, queries=c.get("num_query_tokens", 32),
                         vision_eps=vit.config.norm_eps, **options)
    names = {**expand(EVA_NAMES, vit.config.layers, "vision_model.", "vit."),
             **qformer_names(layout, len(former.layers), ours)}
    return vit, former, names


def read_lavis(c: dict, path: Path) -> tuple[Stage1, list[Filling]]:
    """BLIP-2's first stage as its authors publish it: Qformer.*, query_tokens, ln_vision, the heads.

    Their files have no config.json. Ours for them says "model_type": "blip2_qformer_lavis", and of
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size,
    max_position_embeddings, encoder_width, cross_attention_freq, num_query_token, embed_dim and bos_token_id
    ([DEC]) those that differ from the release.

    The ViT is visual_encoder.* of the file, with ViT-g's sizes or those of a "vision_config" in transformers'
    words. Else it is the folder "vit", which load_vit reads ("vit_layer": -2 for CLIP's ViT-L, whose last
    block the authors drop). Without either there is none, and the model takes features.
    """
    where, file = f"{path}/config.json", Checkpoint(path)
    inside = any(name.startswith("visual_encoder.") for name in file.where)
    tower = config = family = None
    if inside:
        config, family = vit_config({**EVA, **c.get("vision_config", {})}, where)
    elif "vit" in c:
        tower, config, family = tower_beside(path, c["vit"])
    Di = config.width if config else c.get("encoder_width", 1408)
    options = qformer_options({"vocab_size": 30523, **c}, where, text=True)
    former = QFormer(None, Di, c.get("num_query_token", 32), **options)
    former.reads = c.get("vit_layer", -1)
    names = qformer_names("lavis", len(former.layers), "qformer.")
    matrix, words = names["word_matrix.weight"], names["qformer.words.weight"]
    tied = file.missing(matrix) or file.missing(words) or torch.equal(file.get(matrix), file.get(words))
    stage = Stage1(empty_vit(config, family) if config else None, former, c.get("embed_dim", 256), tied=tied,
                   dec=c.get("bos_token_id"))
    optional = (names["word_matrix.bias"], *([matrix] if tied else ()))
    if inside:
        names |= {f"vit.post_norm.{w}": f"ln_vision.{w}" for w in WB}
        names |= expand(LAVIS_EVA_NAMES, config.layers, "visual_encoder.", "vit.")
    elif tower:
        optional += include_vit(file, names, tower, config, family)
        file.path = f"{path} and {tower}"
    return stage, [Filling(stage, file, names, optional)]


def read_own_stage1(c: dict, path: Path) -> tuple[Stage1, list[Filling]]:
    """A run of train.py's recipe blip2-1: stage1.safetensors in our own names, and the folder of the ViT."""
    tower, config, family = tower_beside(path, c["vit"])
    former = make_bridge("qformer", None, config.width, **c["bridge_options"])
    stage = Stage1(empty_vit(config, family), former, c["contrast"], dec=c["dec"])
    file, names = Checkpoint(path / "stage1.safetensors"), {}
    optional = include_vit(file, names, tower, config, family)
    return stage, [Filling(stage, file, names, optional)]


def include_vit(file: Checkpoint, names: Names, tower: Path, config: ViTConfig,
                family: str) -> tuple[str, ...]:
    """Add a ViT's own folder to a checkpoint and its names to the table → starts of what may be left over."""
    beside, theirs, optional = vit_file(tower, config, family)
    file.include(beside)
    names |= {f"vit.{ours}": name for ours, name in theirs.items()}
    return optional


def qformer_file(file: Checkpoint, config: dict, **options) -> BridgeFile:
    """A Q-Former out of an authors' file of any stage, or out of transformers' Blip2QFormerModel.

    The latter has neither queries nor ln_vision. The projection comes along where the file holds one, the
    text branch where it holds words. Sizes: those of the config, else BERT-base's.
    """
    layout = "lavis" if file.prefix("Qformer.", "") else "blip2"
    names = qformer_names(layout, config.get("num_hidden_layers", 12))
    names = {ours: theirs.removeprefix("qformer.") for ours, theirs in names.items()}
    project = file.prefix("llm_proj.", "llama_proj.", "opt_proj.", "t5_proj.")
    names |= {f"project.{w}": project + w for w in WB}

    def size(ours: str, axis: int) -> int:
        return 0 if file.missing(names[ours]) else file.shape(names[ours])[axis]

    queries, words, D = size("queries", 1), size("words.weight", 0), size("project.weight", 0)
    sizes = qformer_options({**config, "vocab_size": words}, f"{file.path}'s config.json", bool(words))
    sizes |= dict(queries=queries, vision_eps=None if file.missing("ln_vision.weight") else 1e-5)
    Di = file.shape(names["layers.0.cross.k.weight"])[1]
    bridge = make_bridge("qformer", DecoderConfig(width=D) if D else None, Di, **{**sizes, **options})
    return BridgeFile(bridge, names, (
        "Qformer.cls.", "vision_proj.", "text_proj.", "itm_head.", "temp", "visual_encoder.",
        "llm_model.", "llama_model.", "opt_model.", "t5_model."))


# ---- 4. BERT ---------------------------------------------------------------------------------------------

BERT_UNUSED = ("embeddings.token_type_embeddings.", "pooler.", "cls.seq_relationship.",
               "cls.predictions.decoder.")


def save_stage1(stage: Stage1, out: Path, facts: dict, vit: str) -> None:
    """Write a run of recipe blip2-1, which read_own_stage1 reads; vit: the frozen ViT's folder."""
    tensors = {n: p for n, p in stage.state_dict().items() if not n.startswith("vit.")}
    write_tensors(out / "stage1.safetensors", tensors, {"stage1": "qformer"})
    write_json(out / "config.json", {**facts, "model_type": "stage1", "bridge_options": stage.qformer.options,
                                     "contrast": len(stage.image_head.weight), "dec": stage.dec, "vit": vit})


def fill_from_stage1(bridge: QFormer, path: Path) -> None:
    """Stage 2 begins with the Q-Former of a run of blip2-1, without its text branch and its heads.

    path: its stage1.safetensors, or the bridge.safetensors of a Q-Former. Strict both ways, as `fill`; only
    the projection stays as it is.
    """
    file, values = Checkpoint(path), {}
    start = file.prefix("qformer.", "")
    for n, p in bridge.named_parameters():
        if not n.startswith("project."):
            values[n] = tensor_for(p, Source(start + n), file)
    left_out = ("qformer.words.", "qformer.positions.", "project.",
                *(f"{head}." for head in STAGE1_NAMES["lavis"]))
    extra = [n for n in file.where if n.removeprefix("qformer.") not in values and ".text_mlp." not in n
             and not f"{n}.".startswith(left_out)]
    if extra:
        raise UserError(f'{file.path}: {len(extra)} tensors are not part of this Q-Former '
                        f'(first: "{extra[0]}"); the run was another one.')
    with torch.no_grad():
        for n, value in values.items():
            bridge.get_parameter(n).copy_(value)


def init_from_bert(module: QFormer | Stage1, path: str | os.PathLike) -> None:
    """Start a Q-Former, or a whole first stage, from a BERT folder (BLIP-2, 2301.12597v3, §3.1).

    As LAVIS does it (Blip2Base.init_Qformer, Blip2Qformer):

        ours                                                                from BERT
        words, positions, norm, attention, text_mlp, the captioning head    the tensor of that name
        query_mlp                                                           the text's feed-forward there
        cross, queries, vision_norm, project, the other heads, new words    nothing: they stay as they are

    BERT's token types, pooler and next-sentence head are left out, so even at the start the text branch is
    not quite BERT. A tensor of another size, or one that has no place, is a UserError, and so is a
    config.json of another kind of BERT; the module then stays as it was.
    """
    file, former = Checkpoint(path), getattr(module, "qformer", module)
    require_bert(Path(path), former)
    names = bert_names(file, len(former.layers), "" if former is module else "qformer.")
    bert = file.prefix("bert.", "")
    unused = {n for n in file.where if n.removeprefix(bert).startswith(BERT_UNUSED) or n.endswith(IGNORED)}
    if extra := [name for name in file.where if name not in unused and name not in names.values()]:
        raise UserError(f"{file.path}: {len(extra)} tensors have no place in this Q-Former "
                        f'(first: "{extra[0]}"); build it in BERT\'s sizes.')
    values = []
    for ours, parameter in module.named_parameters():
        if ours not in names or "cross" in ours or ours == "word_matrix.weight":
            continue
        shape, rows = file.shape(names[ours]), len(parameter)
        if ours.endswith(("words.weight", "word_bias")):            # the words that we add come last
            rows = min(shape[0], rows)
        if shape != parameter[:rows].shape:
            raise UserError(f'{file.path}: tensor "{names[ours]}" has shape {shape}, the Q-Former\'s {ours} '
                            f"{tuple(parameter.shape)}; build the Q-Former in BERT's sizes.")
        values.append((parameter.data[:rows], file.get(names[ours])))
    for rows, value in values:
        rows.copy_(value)


def require_bert(path: Path, former: QFormer) -> None:
    """A UserError where a BERT's config.json asks for what the Q-Former does not compute."""
    where = (path if path.is_dir() else path.parent) / "config.json"
    c = read_json(where) if where.exists() else {}
    refuse_unknown(c, str(where), BERT)
    heads = former.layers[0].attention.heads
    for key, ours in {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12,
                      "num_attention_heads": heads, "num_hidden_layers": len(former.layers)}.items():
        if c.get(key, ours) != ours:
            raise UserError(f"{where}: {key} is {c[key]}, the Q-Former has {ours}.")


def bert_names(file: Checkpoint, layers: int, ours: str) -> dict[str, str]:
    """The authors' names of a Q-Former, as BERT's file has them; old files say gamma and beta."""
    names = {a: b for a, b in qformer_names("lavis", layers, ours).items() if b.startswith("Qformer.")}
    changes = [("Qformer.bert.", file.prefix("bert.", "")), ("Qformer.", ""), ("_query", "")]
    if any(name.endswith("LayerNorm.gamma") for name in file.where):
        changes += [("Norm.weight", "Norm.gamma"), ("Norm.bias", "Norm.beta")]
    for old, new in changes:
        names = {a: b.replace(old, new) for a, b in names.items()}
    return names
