"""Chameleon's decoder and tokenizer of pictures are transformers' in its numbers; z-loss, norms, masks."""
from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import data
from conftest import TINY, check, golden, stir
from model import Decoder
from papers.chameleon import (RECIPES, SIZE_34B, SIZE_7B, Z_WEIGHT, Chameleon, Only, QKLayerNorm,
                              chameleon_loss, z_loss)
from papers.chameleon_task import TASKS, ChameleonTask
from papers.recipe import Ingredients
from papers.vq import VQ, vq_loss
from papers.vq_nets import VQConfig
from support.formats.chameleon import code_name, load_chameleon
from support.formats.files import UserError
from support.worlds.text import shapes_tokenizer

NAME = "chameleon"


@pytest.fixture(scope="module")
def published():
    return load_chameleon(golden(NAME)[0])


@torch.no_grad()
def test_codes_ids_states_logits_and_losses_are_the_published_ones(published):
    decoder, vq, ids = published
    _, case, x, expected = golden(NAME)
    z = vq.prequant(x["pixel_values"])
    codes = vq.nearest(z)
    sequence = x["input_ids"].masked_scatter(x["input_ids"] == 6, ids[codes.flatten(1)])
    logits, hidden = decoder(sequence, return_hidden=True)
    ahead, target = logits[:, :-1].flatten(0, 1), sequence[:, 1:].flatten()
    mine = {"vq.prequant": z, "vq.codes": codes.flatten(1), "image_token_ids": ids[codes.flatten(1)],
            "vq.embedding_loss": vq_loss(z, vq.look_up(codes)),
            "sequence_ids": sequence, "hidden_states": torch.stack(hidden), "logits": logits,
            "nll": F.cross_entropy(ahead, target), "z_loss_term": z_loss(ahead).mean(),
            "text_only_hidden": decoder(x["text_only_ids"])[..., 20:],
            "logits_library_masked_ids": ids.sort().values}
    assert set(mine) == set(expected)
    for key, value in mine.items():
        check(case, key, value, expected[key])
    plain = Decoder(replace(decoder.config, qk_norm=torch.nn.Identity))         # without (H3): other numbers
    plain.load_state_dict({n: p for n, p in decoder.state_dict().items() if "qk_norm" not in n})
    assert (plain(sequence) - expected["logits"]).abs().max() > 0.01


def test_a_folder_without_a_code_or_with_another_encoder_is_refused(tmp_path):
    folder = golden(NAME)[0]
    shutil.copytree(folder, tmp_path / "copy")
    c = json.loads((folder / "config.json").read_text())
    del c["vocabulary_map"]["IMGIMGBAZ"]
    (tmp_path / "copy/config.json").write_text(json.dumps(c))
    with pytest.raises(UserError, match="IMGIMGBAZ"):
        load_chameleon(tmp_path / "copy")
    c["vq_config"]["attn_resolutions"] = [4]
    (tmp_path / "copy/config.json").write_text(json.dumps(c))
    with pytest.raises(UserError, match="attn_resolutions"):
        load_chameleon(tmp_path / "copy")
    assert [code_name(n) for n in (0, 10, 8191)] == ["IMGIMGAZ", "IMGIMGBAZ", "IMGIMGIBJBZ"]


def test_the_z_loss_by_hand_and_the_documents_slip():
    """Logits (2, 1, .5, −1), target 0: CE .495182; with 1e-5 log² Z .4952441, by the slip 10e-5 .4958."""
    logits, target = torch.tensor([[2.0, 1.0, 0.5, -1.0]]), torch.tensor([0])
    assert F.cross_entropy(logits, target).item() == pytest.approx(0.495182, abs=1e-6)
    assert z_loss(logits).item() == pytest.approx(6.225932, abs=1e-5)
    assert chameleon_loss(logits, target).item() == pytest.approx(0.4952441, abs=1e-7)
    slip = 0.495182 + 10e-5 * 6.225932
    assert abs(chameleon_loss(logits, target).item() - slip) > 5e-4 and Z_WEIGHT == 1e-5
    raised = logits + 10                                # softmax does not see it, log² Z does
    assert F.cross_entropy(raised, target).item() == pytest.approx(0.495182, abs=1e-6)
    assert z_loss(raised).item() == pytest.approx(156.1296, abs=1e-3)


def test_the_34bs_norms_stand_behind_attention_and_feed_forward():
    """What a layer adds is normed: doubling W_o and W_down changes nothing, and much in the 7B's order."""
    tokens, changes = torch.arange(10)[None], {}
    for behind in (False, True):
        model = stir(Chameleon(replace(TINY, qk_norm=QKLayerNorm, norm_eps=1e-12), behind))
        with torch.no_grad():
            before = model(tokens)
            for layer in model.layers:
                layer.attention.o.weight *= 2
                layer.mlp.down.weight *= 2
            changes[behind] = (model(tokens) - before).abs().max().item()
    assert changes[True] < 1e-4 and changes[False] > 0.1
    behind = Chameleon(replace(TINY, qk_norm=QKLayerNorm), True)
    assert [n for n, _ in behind.named_parameters()] == [
        n for n, _ in Chameleon(replace(TINY, qk_norm=QKLayerNorm)).named_parameters()]


def test_queries_and_keys_cannot_grow_under_their_norm():
    """W_q and W_k ten times as large: the same logits with the norm, others without."""
    tokens = torch.arange(10)[None]
    for kind, same in ((QKLayerNorm, True), (torch.nn.Identity, False)):
        model = stir(Decoder(replace(TINY, qk_norm=kind)))
        with torch.no_grad():
            before = model(tokens)
            for layer in model.layers:
                layer.attention.q.weight *= 10
                layer.attention.k.weight *= 10
            assert ((model(tokens) - before).abs().max() < 1e-3) == same


def test_published_sizes():
    """7,043,090,432 with the 29,423,616 of the VQ's encoder; the 34B in its 48 layers."""
    with torch.device("meta"):
        seven, big = Chameleon(SIZE_7B), Chameleon(SIZE_34B, norm_behind=True)
        vq = VQ(VQConfig(codes=8192), paints=False)
    count = [sum(p.numel() for p in m.parameters()) for m in (seven, vq, big)]
    assert count[0] + count[1] == 7_043_090_432 and count[1] == 29_423_616
    assert 34.0e9 < count[2] < 34.6e9
    paper = RECIPES["chameleon-2"].paper
    assert paper.steps * paper.batch * SIZE_7B.context == pytest.approx(9.2e12, rel=1e-3)       # tokens


@pytest.fixture(scope="module")
def task() -> ChameleonTask:
    torch.manual_seed(0)
    images = VQ(VQConfig(patch=16, latent=8, width=8, codes=12))                # 9 codes are a picture
    given = Ingredients(torch.device("cpu"), seed=0, batch=4, steps=1, world=data.Shapes(), images=images,
                        tokenizer=shapes_tokenizer(), eval_items=3)
    return ChameleonTask(given)


def test_a_run_begins_with_norms_of_weight_1_and_bias_0(task):
    """The norms of (H3) are matrices in shape alone; with weights of N(0, 0.02) attention is uniform."""
    model = task.module
    for layer in model.layers:
        norm = layer.attention.qk_norm
        assert all((p == 1).all() for p in norm.weight.values()) and norm.weight["q"].ndim == 2
        assert all((p == 0).all() for p in norm.bias.values())
    for matrix in (model.embed, model.layers[0].attention.q, model.layers[-1].mlp.down):
        assert matrix.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_half_of_the_documents_are_drawn_and_half_are_asked_about(task):
    piece, = task.batch(0)
    for row, (tokens, labels) in enumerate(zip(piece["tokens"], piece["labels"])):
        at = (tokens == task.boi).nonzero().item()
        codes = tokens[at + 1:at + 10]
        assert (codes >= task.first).all() and tokens[at + 10] == task.eoi
        learned = labels[at + 1:at + 10]
        assert (learned == codes).all() if row % 2 == 0 else (learned == -100).all()
        assert (labels[:at + 1] == -100).all()
    loss = task.loss(**piece) / piece["count"]
    loss.backward()
    with torch.no_grad():
        logits = task.module(piece["tokens"], piece["mask"])[:, :-1].flatten(0, 1)
        target = piece["labels"][:, 1:].flatten()
        Z = logits[target != -100].logsumexp(-1)
        torch.testing.assert_close(loss, F.cross_entropy(logits, target) + 1e-5 * Z.square().mean())


def test_inside_a_picture_codes_alone_and_outside_words_alone(task):
    """An untrained model says anything; the masks decide of which kind."""
    pictures = task.draw(["a red ring", "a large blue cross at the top left"], temperature=1.0)
    assert pictures.shape == (2, 3, 48, 48)
    prompt = data.Document(task.words).add("a red ring").ids([task.boi])
    codes = task.write([prompt], 9, Only(task.first, task.first + 12), temperature=5.0)
    words = task.write([prompt], 9, Only(0, task.words.vocab_size), temperature=5.0)
    assert (codes >= task.first).all() and (words < task.words.vocab_size).all()
    report = task.report(None)["results.json"]
    assert 0 <= report["answers"]["right"] <= 1 and set(report["drawing"]) == {"drawn", "chance"}


@pytest.mark.parametrize("name, least, most", [("chameleon-even", 90, 110), ("chameleon-words", 6, 14)])
def test_a_request_says_what_follows_and_its_share_is_the_recipes(task, name, least, most, tmp_path, capsys):
    tuned, found, unsaid = TASKS[name](task.given), 0, 0
    for step in range(50):
        for tokens, labels in zip(*(tuned.batch(step)[0][key] for key in ("tokens", "labels"))):
            text = tuned.words.decode([t for t in tokens.tolist() if t < tuned.boi])
            learned = labels[labels != -100]
            drawn = bool(learned[0] == tuned.boi)
            unsaid += "\nAnswer:" in text
            assert text.count("\nAnswer:") + text.count("\nPicture:" if drawn else "\nWords:") == 1
            assert len(learned) == 12 if drawn else (learned < tuned.boi).all()     # 9 codes and 3 marks
            found += drawn
    assert least <= found <= most and unsaid == 50      # of 200
    result = tuned.report(tmp_path)["results.json"]
    assert [*result] == ["asked for a picture", "asked for words", "not said"]
    assert all(0 < p < 1 for p in result.values()) and "not said" in capsys.readouterr().out
