"""Claim: the Q-Former, its first stage and InstructBLIP load by their published names and compute what their
own code computes, losses and gradients included; a first stage draws hard negatives as it says; and a
Q-Former starts from BERT as the authors' does."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from bridges import QFormer
from papers.blip2_stage1 import Stage1
from support.formats.blip2 import fill_from_stage1, init_from_bert, qformer_names
from support.formats.vlm import LAYOUTS
from conftest import GOLDEN, TINY_VIT, check, check_states, fixed_loss, golden, stir
from model import IMAGE, ViT
from support.formats.files import UserError, write_tensors
from support.formats.vlm import load_bridge, load_vlm


def check_grads(case: dict, expected: dict, module: torch.nn.Module, names: dict) -> None:
    """Every stored gradient against ours."""
    ours = {names.get(n, n): p for n, p in module.named_parameters()}
    keys = [k for k in expected if k.startswith("grad.") and k != "grad.loss"]
    assert len(keys) > 50
    for key in keys:
        check(case, key, ours[key.removeprefix("grad.")].grad.view(expected[key].shape), expected[key])


def folder_of(tmp_path, tensors: dict, config: dict):
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


# --- the published code's own numbers -----------------------------------------------------------------------


def test_the_qformer_is_the_published_one_at_every_layer():
    folder, case, x, expected = golden("blip2-qformer")
    former = load_bridge("qformer", folder)
    assert (
        former.queries is None
        and former.words is None
        and former.project is None
        and not list(former.vision_norm.parameters())
    )
    hidden = former.encode(
        x["encoder_hidden_states"], image_mask=x["encoder_attention_mask"].bool(), queries=x["query_embeds"]
    )
    check_states(case, hidden, expected)
    check(case, "last_hidden_state", hidden[-1], expected["last_hidden_state"])
    loss = fixed_loss(hidden[-1])
    loss.backward()
    check(case, "grad.loss", loss, expected["grad.loss"])
    check_grads(
        case, expected, former, {a: b.removeprefix("qformer.") for a, b in qformer_names("blip2", 4).items()}
    )


def test_instructblip_reads_the_instruction_twice():
    folder, case, x, expected = golden("instructblip-llama")
    vlm = load_vlm(folder)
    assert vlm.image_token == 70 and vlm.bridge.vision_norm.eps == 1e-6
    text, text_mask = x["qformer_input_ids"], x["qformer_attention_mask"].bool()
    tokens = torch.cat((torch.full((2, 1), IMAGE), x["input_ids"][:, 4:]), dim=1)  # one IMAGE for their four
    assert (x["input_ids"][:, :4] == vlm.image_token).all()
    features = vlm.features(x["pixel_values"])
    image = vlm.bridge.vision_norm(features)
    check(case, "vision_last_hidden_state", image, expected["vision_last_hidden_state"])
    check(case, "vision_last_hidden_state", vlm.vit.post_norm(features), expected["vision_last_hidden_state"])
    states = vlm.bridge.encode(image, text, "itm", text_mask)[-1]
    check(case, "qformer_last_hidden_state", states, expected["qformer_last_hidden_state"])
    soft = vlm.bridge.prefix(vlm.bridge.see(features, text=text, text_mask=text_mask))
    check(case, "projected_queries", soft, expected["projected_queries"])
    logits = vlm(tokens, x["pixel_values"], bridge_tokens=text, bridge_mask=text_mask)
    check(case, "logits", logits, expected["logits"])
    loss = fixed_loss(logits)
    loss.backward()
    check(case, "grad.loss", loss, expected["grad.loss"])
    check_grads(case, expected, vlm, qformer_names("instructblip", 4, "bridge."))
    banned = torch.zeros(72).index_fill_(
        0, torch.tensor([70]), -1e9
    )  # the case never lets the image's id be chosen
    head = vlm.decoder.head
    vlm.decoder.head = lambda h: head(h) + banned
    wrote = vlm.generate(
        tokens, x["pixel_values"], max_new_tokens=10, bridge_tokens=text, bridge_mask=text_mask
    )
    check(case, "generated_ids", wrote, expected["generated_ids"])


def test_transformers_retrieval_model_matches_and_contrasts():
    folder, case, x, expected = golden("blip2-itm-itc")
    stage, mask = load_vlm(folder), x["attention_mask"].bool()
    features = stage.features(x["pixel_values"])
    check(
        case,
        "vision_last_hidden_state",
        stage.qformer.vision_norm(features),
        expected["vision_last_hidden_state"],
    )
    check(
        case,
        "itc_logits_per_image",
        stage.itc(x["pixel_values"], x["input_ids"], mask),
        expected["itc_logits_per_image"],
    )
    check(
        case,
        "itc_logits_per_image",
        stage.itc(features, x["input_ids"][:1], mask[:1]),
        expected["itc_logits_per_image"][:, :1],
    )
    check(case, "itm_logits", stage.itm(x["pixel_values"], x["input_ids"], mask), expected["itm_logits"])
    q, text = stage.encode(features)[0], stage.qformer.encode(None, x["input_ids"], "itc", mask)[-1][:, 0]
    check(case, "image_embeds", F.normalize(stage.image_head(q), dim=-1), expected["image_embeds"])
    check(case, "text_embeds", F.normalize(stage.text_head(text), dim=-1), expected["text_embeds"])
    with pytest.raises(ValueError, match="no captioning head"):
        stage.losses(features, x["input_ids"], mask)


def test_the_authors_first_stage_with_its_three_losses():
    folder, case, x, expected = golden("blip2-lavis-stage1")
    stage = load_vlm(folder)
    assert stage.word_matrix is not None  # in this case the matrix is not the words' own
    image, text, mask = x["image_features"], x["text_input_ids"], x["text_attention_mask"].bool()
    q, t = stage.encode(image, text, "itc", mask)  # with the mask of ITC one pass equals two
    check(case, "query_last_hidden_state", q, expected["query_last_hidden_state"])
    check(case, "query_last_hidden_state", stage.encode(image)[0], expected["query_last_hidden_state"])
    check(case, "text_last_hidden_state", t * mask[..., None], expected["text_last_hidden_state"])
    check(case, "sim_i2t", stage.itc(image, text, mask), expected["sim_i2t"])
    check(case, "sim_t2i", stage.itc(image, text, mask).T, expected["sim_t2i"])
    pairs = torch.tensor([0, 1, 2, 1, 2, 0, 0, 1, 2]), torch.tensor([0, 1, 2, 0, 1, 2, 1, 2, 0])
    check(
        case, "itm_logits", stage.itm(image[pairs[0]], text[pairs[1]], mask[pairs[1]]), expected["itm_logits"]
    )
    check(case, "lm_logits", stage.itg(image, text, mask) * mask[..., None], expected["lm_logits"])
    wrong = (torch.arange(3) + 1) % 3
    losses = stage.losses(image, text, mask, wrong=(wrong, wrong))
    for ours, theirs in (("itc", "loss_itc"), ("itm", "loss_itm"), ("itg", "loss_lm")):
        check(case, theirs, losses[ours], expected[theirs])
    sum(losses.values()).backward()
    check_grads(case, expected, stage, qformer_names("lavis", 4, "qformer."))
    with pytest.raises(ValueError, match='without its ViT; give features, or name a folder as "vit"'):
        stage.itc(torch.zeros(1, 3, 28, 28), text, mask)


# --- the authors' layout with a ViT: transformers' golden model under the authors' names --------------------

EVA_RENAMED = (
    ("vision_model.", "visual_encoder."),
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers", "blocks"),
    ("layer_norm", "norm"),
    ("self_attn.qkv", "attn.qkv"),
    ("self_attn.projection", "attn.proj"),
)


def authors_file(theirs: dict) -> dict:
    """transformers' retrieval model under the authors' names; temperature and captions, which it lacks, from
    the authors' golden case."""
    folder = golden("blip2-lavis-stage1")[0]
    names = json.loads((folder / "lavis_to_transformers_keys.json").read_text())
    tensors = {a: theirs[b] for a, b in names.items() if b}
    tensors |= {
        n: t
        for n, t in load_file(folder / "model.safetensors").items()
        if n.startswith(("Qformer.cls.", "temp"))
    }
    tensors["Qformer.cls.predictions.decoder.weight"] = tensors[
        "Qformer.bert.embeddings.word_embeddings.weight"
    ].clone()
    for name, tensor in theirs.items():
        if name.startswith("vision_model.") and "post_layernorm" not in name:
            for a, b in EVA_RENAMED:
                name = name.replace(a, b)
            if name.endswith("qkv.bias"):  # the authors have none for the keys: it changes nothing
                (
                    tensors[name.replace("qkv.bias", "q_bias")],
                    _,
                    tensors[name.replace("qkv.bias", "v_bias")],
                ) = tensor.clone().chunk(3)
            else:
                tensors[name] = tensor
    return {n: t.clone() for n, t in tensors.items()}


@pytest.mark.parametrize("where", ["in the file", "in a pickle", "in a folder"])
def test_the_authors_file_with_its_vit_inside_and_beside_it(tmp_path, where):
    folder, case, x, expected = golden("blip2-itm-itc")
    config = json.loads((folder / "config.json").read_text())
    theirs = load_file(folder / "model.safetensors")
    tensors = authors_file(theirs)
    ours = json.loads((golden("blip2-lavis-stage1")[0] / "config.json").read_text())
    if where == "in a folder":
        (tmp_path / "eva").mkdir()
        folder_of(
            tmp_path / "eva",
            {n: t for n, t in theirs.items() if n.startswith("vision_model.")},
            config["vision_config"],
        )
        tensors, ours = (
            {n: t for n, t in tensors.items() if not n.startswith("visual_encoder.")},
            {**ours, "vit": "eva"},
        )
    else:
        ours["vision_config"] = config["vision_config"]
    folder_of(tmp_path, tensors, ours)
    if where == "in a pickle":
        (tmp_path / "model.safetensors").unlink()
        torch.save({"model": tensors, "epoch": 3}, tmp_path / "blip2_pretrained.pth")
    stage = load_vlm(tmp_path)
    assert stage.word_matrix is None and stage.qformer.vision_norm.eps == 1e-5
    stage.qformer.vision_norm.eps = 1e-6  # the one number in which the two codes differ
    mask = x["attention_mask"].bool()
    cosine = stage.itc(x["pixel_values"], x["input_ids"], mask) * stage.temperature
    check(case, "itc_logits_per_image", cosine, expected["itc_logits_per_image"])
    check(case, "itm_logits", stage.itm(x["pixel_values"], x["input_ids"], mask), expected["itm_logits"])
    alone = load_bridge("qformer", tmp_path)  # the Q-Former of the same file
    alone.vision_norm.eps = 1e-6
    features = stage.features(x["pixel_values"])
    assert torch.equal(alone.see(features), stage.encode(features)[0])


def test_a_qformer_of_the_authors_second_stage_brings_its_projection(tmp_path):
    folder = golden("instructblip-llama")[0]
    theirs, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    names = {b: a for a, b in qformer_names("instructblip", 4).items()}
    lavis = qformer_names("lavis", 4)
    tensors = {lavis[names[n]]: t for n, t in theirs.items() if n in names} | {
        "llm_model.lm_head.weight": torch.zeros(3, 3)
    }
    former = load_bridge("qformer", folder_of(tmp_path, tensors, config["qformer_config"]))
    former.vision_norm.eps = 1e-6
    vlm, x = load_vlm(folder), golden("instructblip-llama")[2]
    features, text = vlm.features(x["pixel_values"]), x["qformer_input_ids"]
    assert torch.equal(
        former.prefix(former.see(features, text=text)), vlm.bridge.prefix(vlm.bridge.see(features, text=text))
    )


def test_blip2_with_a_llama_is_instructblip_without_the_instruction(tmp_path):
    folder, case, x, _ = golden("instructblip-llama")
    config = json.loads((folder / "config.json").read_text())
    tensors = {
        n.replace("qformer.embeddings.layernorm", "qformer.layernorm"): t
        for n, t in load_file(folder / "model.safetensors").items()
        if "word_emb" not in n
        and "qformer.embeddings.pos" not in n
        and not any(n.startswith("qformer") and n.split(".")[4:5] == [t] for t in ("intermediate", "output"))
    }
    blip2 = load_vlm(
        folder_of(
            tmp_path,
            tensors,
            {**config, "model_type": "blip-2", "architectures": ["Blip2ForConditionalGeneration"]},
        )
    )
    assert blip2.bridge.words is None
    tokens = torch.cat((torch.full((2, 1), IMAGE), x["input_ids"][:, 4:]), dim=1)
    assert torch.equal(blip2(tokens, x["pixel_values"]), load_vlm(folder)(tokens, x["pixel_values"]))


# --- the first stage as a whole -----------------------------------------------------------------------------


def tiny_stage(seed: int = 0) -> Stage1:
    torch.manual_seed(seed)
    former = QFormer(
        None, TINY_VIT.width, queries=3, width=16, layers=3, heads=2, hidden=24, vocab=31, positions=16
    )
    stage = stir(Stage1(ViT(TINY_VIT), former, contrast=8), seed)
    stage.temperature.data.fill_(0.07)
    return stage


def test_captions_are_the_likeliest_words_after_dec_and_stop():
    stage, pixels = tiny_stage(6), torch.randn(2, 3, 24, 24)
    wrote = stage.generate(pixels, max_new_tokens=6)
    assert wrote.shape == (2, 6) and not torch.equal(wrote[0], wrote[1])
    whole = torch.cat((torch.full((2, 1), 7), wrote), dim=1)  # whatever stands first, [DEC] is read
    assert torch.equal(stage.itg(pixels, whole)[:, :-1].argmax(-1), wrote)
    end = int(wrote[0, 2])
    stopped = stage.generate(pixels, max_new_tokens=6, stop=(end,))
    first = wrote[0].tolist().index(end)
    assert (
        stopped[0, : first + 1].tolist() == wrote[0, : first + 1].tolist()
        and (stopped[0, first:] == end).all()
    )
    assert end not in wrote[1] and torch.equal(stopped[1], wrote[1])            # the other row goes on
    assert stage.generate(pixels[:1], max_new_tokens=6, stop=(end,)).shape == (1, first + 1)


@pytest.mark.slow
def test_hard_negatives_follow_the_similarity_and_are_never_the_own_pair():
    stage, features = tiny_stage(), torch.randn(4, 10, TINY_VIT.width)
    tokens = torch.randint(1, 30, (4, 5))
    drawn, itm = [], stage.itm
    stage.itm = lambda image, tokens, mask: drawn.append((image, tokens)) or itm(image, tokens, mask)
    g = torch.Generator().manual_seed(1)
    n = 600
    with torch.no_grad():
        similar = stage.itc(features, tokens) / 8  # softer, so that every pair turns up
        stage.similarities = lambda *_: similar
        for _ in range(n):
            losses = stage.losses(features, tokens, generator=g)
            assert {*losses} == {"itc", "itm", "itg"}
    shape = torch.zeros(2, 4, 4)  # [wrong image | wrong text, of pair i, which]
    for image, text in drawn:
        assert (
            torch.equal(image[:4], features)
            and torch.equal(image[8:], features)
            and torch.equal(text[:8], torch.cat((tokens, tokens)))
        )
        for i in range(4):
            shape[0, i, [j for j in range(4) if torch.equal(image[4 + i], features[j])]] += 1
            shape[1, i, [j for j in range(4) if torch.equal(text[8 + i], tokens[j])]] += 1
    for counts, s in ((shape[0], similar.T), (shape[1], similar)):
        p = s.masked_fill(torch.eye(4, dtype=torch.bool), -math.inf).softmax(1)
        assert not counts.diagonal().any()
        assert (
            (counts / n - p).abs() < 4 * (p * (1 - p) / n).sqrt() + 1e-6
        ).all()  # four standard deviations
    again = [
        tiny_stage().losses(features, tokens, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    ]
    assert all(torch.equal(again[0][k], again[1][k]) for k in again[0])
    with pytest.raises(ValueError, match="a batch needs 2 pairs or more"):
        tiny_stage().losses(features[:1], tokens[:1])


def test_padding_is_read_by_no_loss():
    stage, pixels, tokens = tiny_stage(), torch.randn(3, 3, 24, 24), torch.randint(1, 30, (3, 5))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    wrong = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    a, b = (stage.losses(pixels, tokens.masked_fill(~mask, pad), mask, wrong=wrong) for pad in (0, 9))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_text_longer_than_the_positions_is_refused_in_words():
    with pytest.raises(ValueError, match="a text of 17 tokens, but this Q-Former has 16 positions"):
        tiny_stage().itc(torch.randn(1, 10, TINY_VIT.width), torch.ones(1, 17, dtype=torch.long))


@pytest.mark.slow
def test_the_three_losses_fall_together():
    stage, pixels = tiny_stage(), torch.randn(4, 3, 24, 24)
    tokens = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 10, 2], [1, 11, 12, 2]])
    features = stage.features(pixels).detach()
    stage.vit.requires_grad_(False)
    optimiser = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=3e-3)
    g, history = torch.Generator().manual_seed(0), []
    for _ in range(120):
        losses = stage.losses(features, tokens, generator=g)
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
        history.append({k: v.item() for k, v in losses.items()})
    assert all(history[-1][k] < 0.7 * history[0][k] for k in history[0])
    assert torch.equal(stage.itc(features, tokens).argmax(1), torch.arange(4))
    assert torch.equal(stage.generate(pixels, 3), tokens[:, 1:])


# --- from BERT ----------------------------------------------------------------------------------------------

BERT_SIZES = dict(queries=5, width=24, layers=4, heads=4, hidden=36, positions=24)


def from_bert(folder) -> Stage1:
    torch.manual_seed(0)
    former = QFormer(None, 24, vocab=59, **BERT_SIZES)                          # 58 words of BERT and [DEC]
    stage = stir(Stage1(None, former))
    init_from_bert(stage, folder)
    return stage


def test_a_first_stage_starts_from_bert_as_the_authors_does():
    folder = GOLDEN / "qformer-from-bert"
    mapping, expected = (
        json.loads((folder / "expected_mapping.json").read_text()),
        load_file(folder / "expected.safetensors"),
    )
    born = stir(from_bert(folder))                                              # the same random values again
    stage, names, seen = from_bert(folder), qformer_names("lavis", 4, "qformer."), set()
    before = dict(born.named_parameters())
    for ours, p in stage.named_parameters():
        theirs = names[ours].removeprefix("Qformer.")
        if mapping.get(theirs, {}).get("bert"):                                 # exact: nothing is computed
            seen.add(theirs)
            assert torch.equal(p[:len(expected[theirs])], expected[theirs]), ours
            assert torch.equal(p[len(expected[theirs]) :], before[ours][len(expected[theirs]) :]), (
                ours
            )  # the row of [DEC]
        else:
            assert torch.equal(p, before[ours]), ours
    assert seen == {n for n, source in mapping.items() if source["bert"]} == set(expected)


@pytest.mark.parametrize("layout", ["no prefix, norms called weight and bias", "as published"])
def test_a_plain_qformer_starts_from_bert_too(tmp_path, layout):
    folder = GOLDEN / "qformer-from-bert"
    tensors = load_file(folder / "model.safetensors")
    if layout != "as published":  # what a BertModel of today writes
        tensors = {
            n.removeprefix("bert.").replace("gamma", "weight").replace("beta", "bias"): t
            for n, t in tensors.items()
            if n.startswith("bert.")
        }
        folder = folder_of(tmp_path, tensors, {})
    expected = load_file(GOLDEN / "qformer-from-bert" / "expected.safetensors")
    former = stir(QFormer(None, 20, **BERT_SIZES))
    init_from_bert(former, folder)
    names = qformer_names("lavis", 4)
    held = [
        ours
        for ours, p in former.named_parameters()
        if torch.equal(p, expected.get(names[ours].removeprefix("Qformer."), torch.zeros(())))
    ]
    assert len(held) == 2 + 4 * (10 + 6) and former.words is None


# --- configs as published leave out what has the default value ----------------------------------------------


def numel(folder, config: dict) -> int:
    with torch.device("meta"):
        model, _ = LAYOUTS[config["model_type"]](config, folder)
    return sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in model.vit.post_norm.parameters()
    )  # one in their files


@pytest.mark.parametrize(
    "case, config, published",
    [
        (
            "instructblip-llama",
            {
                "model_type": "instructblip",
                "qformer_config": {"vocab_size": 30523},
                "text_config": {"model_type": "llama", "vocab_size": 32001},
            },
            7_913_210_624,
        ),
        (
            "blip2-itm-itc",
            {
                "model_type": "blip-2",
                "architectures": ["Blip2ForImageTextRetrieval"],
                "qformer_config": {"vocab_size": 30523},
            },
            1_172_032_258,
        ),
    ],
)
def test_published_configs_build_models_of_the_published_size(case, config, published):
    assert numel(golden(case)[0], config) == published


def test_the_authors_release_needs_no_more_than_its_name(tmp_path):
    folder = folder_of(
        tmp_path, {"visual_encoder.cls_token": torch.zeros(1, 1, 1408)}, {"model_type": "blip2_qformer_lavis"}
    )
    with torch.device("meta"):
        stage, _ = LAYOUTS["blip2_qformer_lavis"]({"model_type": "blip2_qformer_lavis"}, folder)
    assert stage.dec == 30522
    assert sum(p.numel() for n, p in stage.named_parameters() if not n.startswith("vit.")) == 186_705_470
    assert (
        sum(
            p.numel()
            for n, p in stage.vit.named_parameters()
            if not n.startswith("post_norm") and not n.endswith(".k.bias")
        )
        == 985_894_528
    )


@pytest.mark.parametrize(
    "text, says",
    [({}, '"opt" (a decoder with learned positions)'), ({"model_type": "t5"}, '"t5" (an encoder-decoder)')],
)
@pytest.mark.parametrize("case", ["instructblip-llama", "blip2-itm-itc"])
def test_decoders_that_are_no_llama_are_refused_by_name(tmp_path, case, text, says):
    folder = golden(case)[0]
    config = {
        **json.loads((folder / "config.json").read_text()),
        "text_config": text,
        "architectures": ["ForConditionalGeneration"],
    }
    with pytest.raises(UserError) as e:
        load_vlm(folder_of(tmp_path, load_file(folder / "model.safetensors"), config))
    assert f"the language model is {says}, but only LLaMA decoders are read" in str(e.value)


# --- strict -------------------------------------------------------------------------------------------------

WORKS = {"instructblip-llama": load_vlm, "blip2-itm-itc": load_vlm, "blip2-lavis-stage1": load_vlm,
         "blip2-qformer": lambda folder: load_bridge("qformer", folder), "qformer-from-bert": from_bert}
BREAK = {  # a few tensors of every part; what an unknown one would be called
    "instructblip-llama": (
        "query_tokens",
        "qformer.embeddings.word_embeddings.weight",
        "qformer.encoder.layer.3.output.dense.weight",
        "vision_model.post_layernorm.bias",
        "language_projection.bias",
        "language_model.model.norm.weight",
    ),
    "blip2-itm-itc": (
        "embeddings.position_embeddings.weight",
        "text_projection.weight",
        "itm_head.bias",
        "vision_model.embeddings.patch_embedding.bias",
    ),
    "blip2-lavis-stage1": (
        "Qformer.bert.embeddings.LayerNorm.bias",
        "Qformer.bert.embeddings.word_embeddings.weight",
        "vision_proj.weight",
        "Qformer.cls.predictions.bias",
        "ln_vision.weight",
        "Qformer.bert.encoder.layer.2.crossattention.self.key.weight",
    ),
    "blip2-qformer": ("layernorm.weight", "encoder.layer.3.output_query.dense.weight"),
    "qformer-from-bert": (
        "bert.encoder.layer.3.intermediate.dense.weight",
        "cls.predictions.transform.dense.bias",
    ),
}


@pytest.mark.parametrize("damage", ["missing", "misshapen", "extra"])
@pytest.mark.parametrize("case", WORKS)
def test_every_layout_is_strict_and_names_the_tensor(tmp_path, case, damage):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / case / file, tmp_path / file)
    tensors = load_file(tmp_path / "model.safetensors")
    WORKS[case](tmp_path)                                                       # undamaged, it is fine
    for name in BREAK[case]:
        broken = dict(tensors)
        if damage == "missing":
            del broken[name]
        elif damage == "misshapen":
            broken[name] = torch.zeros(tensors[name].shape[0] + 1, *tensors[name].shape[1:])
        else:
            name = "encoder.layer.7.strange.weight" if name == BREAK[case][0] else name + "_too"
            broken[name] = torch.zeros(1)
        save_file(broken, tmp_path / "model.safetensors")
        with pytest.raises(UserError) as e:
            WORKS[case](tmp_path)
        assert f'"{name}"' in str(e.value), str(e.value)


# --- strict both ways ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("key, value", [("hidden_act", "relu"), ("layer_norm_eps", 1e-5),
                                        ("model_type", "roberta"), ("num_attention_heads", 2),
                                        ("position_embedding_type", "relative_key"), ("embedding_size", 128)])
def test_a_bert_that_computes_otherwise_is_refused_and_changes_nothing(tmp_path, key, value):
    source = GOLDEN / "qformer-from-bert"
    config = json.loads((source / "config.json").read_text())
    folder = folder_of(tmp_path, load_file(source / "model.safetensors"), {**config, key: value})
    former = stir(QFormer(None, 20, **BERT_SIZES))
    before = {n: p.clone() for n, p in former.named_parameters()}
    with pytest.raises(UserError, match=f"config.json: .*{key}"):
        init_from_bert(former, folder)
    assert all(torch.equal(before[n], p) for n, p in former.named_parameters())


@pytest.mark.parametrize("damage", ["missing", "misshapen", "extra", "not finite"])
def test_stage_two_takes_a_first_stage_whole_or_not_at_all(tmp_path, damage):
    stage = stir(Stage1(None, QFormer(None, 24, vocab=59, **BERT_SIZES)))
    tensors, name = dict(stage.state_dict()), "qformer.layers.3.query_mlp.up.bias"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        name = "qformer.layers.4.query_mlp.up.bias"
    tensors |= {"missing": {}, "misshapen": {name: torch.zeros(7)}, "extra": {name: torch.zeros(36)},
                "not finite": {name: torch.full((36,), math.nan)}}[damage]
    write_tensors(tmp_path / "stage1.safetensors", tensors)
    former = stir(QFormer(None, 24, **BERT_SIZES), seed=3)
    before = {n: p.clone() for n, p in former.named_parameters()}
    with pytest.raises(UserError, match=f'"{name}"'):
        fill_from_stage1(former, tmp_path / "stage1.safetensors")
    assert all(torch.equal(before[n], p) for n, p in former.named_parameters())
