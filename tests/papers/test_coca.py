"""CoCa is open_clip's to the last gradient, as in the paper with two poolers, and learns with two losses."""
from __future__ import annotations

import json

import pytest
import torch

from conftest import golden, stir
from data import Shapes
from model import ViT, ViTConfig
from papers.clip import TextConfig
from papers.coca import CoCa, LowerHalf
from papers.coca_task import TASKS, CocaTask
from papers.recipe import Ingredients
from support.formats.coca import empty_coca, load_coca
from support.formats.files import Json, UserError
from support.worlds.pairs import contrastive_pair
from support.worlds.text import shapes_tokenizer


def outputs(coca: CoCa, x: dict) -> dict[str, torch.Tensor]:
    """Everything that the case has."""
    (u, G), (w, h) = coca.see(x["image"]), coca.read(x["text"])
    loss = coca.losses(x["image"], x["text"])
    (loss["contrast"] + 2 * loss["caption"]).backward()
    return {"image_features": u, "image_tokens": G, "text_features": w, "text_tokens": h,
            "logits": coca.write(h[:, :-1], G), "logit_scale": coca.logit_scale.exp(),
            "loss_contrastive": loss["contrast"], "loss_caption_weighted": 2 * loss["caption"],
            "grad.visual.attn_pool.query": coca.pool.queries.grad, "grad.text.cls_emb": coca.text.cls.grad,
            "grad.logit_scale": coca.logit_scale.grad}


def test_with_one_pooler_it_is_open_clips():
    folder, case, x, expected = golden("coca")
    found = outputs(load_coca(folder), x)
    assert found.keys() == expected.keys()
    for key, mine in found.items():
        torch.testing.assert_close(mine, expected[key], **case["tolerance"], msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize("misread, moved", [
    ("mask in place", "text_features"), ("norm ahead", "image_tokens"), ("words normed", "logits"),
    ("padding learned", "loss_caption_weighted")])
def test_a_misreading_fails_the_case(misread, moved, monkeypatch):
    folder, case, x, expected = golden("coca")
    coca = load_coca(folder)
    if misread == "mask in place":
        coca.text.shifted = False
    elif misread == "norm ahead":
        monkeypatch.setattr(coca.pool, "norm_k", torch.nn.Identity())
    elif misread == "words normed":
        read = coca.read
        monkeypatch.setattr(coca, "read", lambda y: (read(y)[0], coca.text.norm(read(y)[1])))
    else:
        coca.text.pad = 49                              # so 0 is a word like any other
        monkeypatch.setattr(coca, "read", lambda y: load_coca(folder).read(y))
    found = outputs(coca, x)[moved]
    assert (found - expected[moved]).abs().max() > 20 * case["tolerance"]["atol"]


@pytest.mark.parametrize("name, sizes, count", [
    ("coca_ViT-B-32", (32, 768, 12, 512, 8), 253_560_065),
    ("coca_ViT-L-14", (14, 1024, 24, 768, 12), 638_450_177)])
def test_the_published_sizes(name, sizes, count):
    patch, width, layers, text, heads = sizes
    half = dict(context_length=76, vocab_size=49408, width=text, heads=heads, layers=12)
    vision = dict(image_size=224, patch_size=patch, width=width, layers=layers, attentional_pool=True,
                  attn_pooler_heads=8, output_tokens=True)
    config = dict(embed_dim=text, vision_cfg=vision, text_cfg=half | dict(embed_cls=True, output_tokens=True),
                  multimodal_cfg=half | dict(attn_pooler_heads=8), custom_text=True)
    with torch.device("meta"):
        assert sum(p.numel() for p in empty_coca(Json(config, name), name).parameters()) == count


def small(pool: str = "cascade", shifted: bool = False) -> CoCa:
    torch.manual_seed(0)
    vit = ViT(ViTConfig(image_size=16, patch=8, width=24, layers=1, heads=2, hidden=24))
    text = LowerHalf(TextConfig(20, 24, 1, 2, 24, context=6), pad=0, shifted=shifted)
    return stir(CoCa(vit, text, 12, 1, queries=3, pool_heads=2, pool=pool))


TEXTS = torch.tensor([[1, 5, 6, 7, 2, 0], [1, 8, 9, 2, 0, 0]])


def test_the_contrast_reads_what_the_captions_read_in_a_cascade_alone():
    """Another query of the generative pooler: the picture's vector moves in a cascade, not in parallel."""
    pixels = torch.randn(2, 3, 16, 16)
    for pool, moves in (("cascade", True), ("parallel", False)):
        coca = small(pool)
        u, G = coca.see(pixels)
        assert u.shape == (2, 12) and G.shape == (2, 3, 24)
        with torch.no_grad():
            coca.pool.queries[2] += torch.randn(24)
        other, H = coca.see(pixels)
        assert ((u - other).abs().max() > 1e-4) == moves and torch.equal(G[:, :2], H[:, :2])
    assert small("one").see(pixels)[1].shape == (2, 2, 24)
    with pytest.raises(ValueError, match='no pool "both"; known: cascade, parallel, one'):
        small("both")


def test_a_word_sees_the_words_before_it_and_cls_all_words_and_no_padding():
    coca, other = small(), TEXTS.clone()
    other[:, 2] = 11
    (w, h), (v, g) = coca.read(TEXTS), coca.read(other)
    assert torch.equal(h[:, :2], g[:, :2]) and not torch.allclose(h[:, 2:], g[:, 2:])
    assert (w - v).abs().amax(1).min() > 1e-4
    for shifted in (False, True):                       # one place too far right, the first padding is seen
        coca = small(shifted=shifted)
        before = coca.read(TEXTS)[0]
        with torch.no_grad():
            coca.text.embed.weight[0] = torch.randn(24)
        assert torch.equal(coca.read(TEXTS)[0], before) != shifted


def test_more_texts_than_pictures_are_contrasted_alone():
    coca, pixels = small(), torch.randn(1, 3, 16, 16)
    alone, both = coca.losses(pixels, TEXTS[:1]), coca.losses(pixels, TEXTS)
    torch.testing.assert_close(alone["caption"], both["caption"])
    assert alone["contrast"] == 0 < both["contrast"]


def test_a_caption_written_word_by_word_is_the_likeliest_next_word_each_time():
    coca, pixels = small(), torch.randn(2, 3, 16, 16)
    y = torch.cat((torch.ones(2, 1, dtype=torch.long), coca.generate(pixels, begin=1, end=19)), dim=1)
    assert y.shape[1] == 6                              # the context is full
    logits = coca.write(coca.read(y)[1], coca.see(pixels)[1])
    assert torch.equal(logits[:, :-1].argmax(-1)[y[:, :-1] != 19], y[:, 1:][y[:, :-1] != 19])


def test_a_config_of_another_model_is_an_error_of_one_sentence(tmp_path):
    folder, *_ = golden("coca")
    config = json.loads((folder / "config.json").read_text())
    for change, message in (({"text_cfg": config["text_cfg"] | {"width": 20}}, "have one width"),
                            ({"vision_cfg": config["vision_cfg"] | {"no_ln_pre": True}}, "'no_ln_pre'"),
                            ({"vision_cfg": config["vision_cfg"] | {"attentional_pool": "x"}}, "no pool")):
        with pytest.raises(UserError, match=message):
            empty_coca(Json(config | change, "config.json"), "config.json")


def test_the_task_frames_its_texts_and_scores_them():
    tokenizer = shapes_tokenizer()
    vit = ViT(ViTConfig(image_size=48, width=32, layers=1, heads=2, hidden=32))
    given = Ingredients(torch.device("cpu"), seed=0, batch=2, steps=1, world=Shapes("train"), vit=vit,
                        tokenizer=tokenizer, contrastive_pair=contrastive_pair,
                        open_held_out=lambda: Shapes("test"))
    task = CocaTask(given)
    task.freeze((), torch.float32)
    piece, = task.batch(0)
    ids, pad = piece["tokens"], tokenizer.vocab_size
    assert ids.shape[0] == 6 and (ids[:, 0] == tokenizer.bos).all()
    ended = (ids == tokenizer.eos).cumsum(1)
    assert torch.equal(ids == pad, (ended > 0) & (ids != tokenizer.eos)) and (ended[:, -1] == 1).all()
    loss = task.loss(**piece)
    loss.backward()
    torch.testing.assert_close(loss, task.last["contrast"] + 2 * task.last["caption"])
    learns = {n for n, p in task.module.named_parameters() if p.grad is not None}
    assert learns == {n for n, _ in task.module.named_parameters() if not n.startswith("vit.")}
    scores = task.check(4)
    assert [*scores] == ["by contrast", "as caption", "chance"] and abs(scores["chance"] - 1 / 3) < 1e-6
    task.after_step()
    assert {"scale", "contrast", "caption"} <= task.metrics().keys()


@pytest.mark.parametrize("loss, score", [("contrast", "by contrast"), ("caption", "as caption")])
def test_one_loss_alone_teaches_a_new_vit_and_is_asked_its_own_way(loss, score):
    vit = ViT(ViTConfig(image_size=48, width=32, layers=1, heads=2, hidden=32))
    given = Ingredients(torch.device("cpu"), seed=0, batch=2, steps=1, world=Shapes("train"), vit=vit,
                        tokenizer=shapes_tokenizer(), contrastive_pair=contrastive_pair,
                        open_held_out=lambda: Shapes("test"))
    task = TASKS[f"coca-{loss}"](given)
    task.freeze((), torch.float32)
    assert not torch.equal(task.module.vit.patch.weight, vit.patch.weight)      # not the bundled one
    found = task.loss(**task.batch(0)[0])
    torch.testing.assert_close(found, task.last[loss])
    found.backward()
    assert task.module.vit.patch.weight.grad.abs().sum() > 0
    found = task.check(4)
    assert [*found] == [score, "chance", "probe"] and 0 < found["probe"] < 1
