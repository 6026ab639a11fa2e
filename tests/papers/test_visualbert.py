"""VisualBERT computes what transformers' does: embeddings, states, both heads, both losses, gradients."""
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, check, golden, stir
from data import Shapes
from papers.masked import word_loss
from papers.recipe import Ingredients
from papers.visualbert import VisualBert, VisualBertConfig, VisualBertTask
from support.formats import load_vit
from support.formats.streams import load_visualbert
from support.worlds.text import shapes_tokenizer

SMALL = VisualBertConfig(40, 16, 2, 2, 24, positions=12, region=6, dropout=0.0)


@pytest.fixture(scope="module")
def case():
    folder, case, x, expected = golden("visualbert")
    return case, x, expected, load_visualbert(folder)


def states(model: VisualBert, x: dict) -> list[torch.Tensor]:
    return model(x["input_ids"], x["visual_embeds"], x["attention_mask"].bool(), x["token_type_ids"],
                 region_mask=x["visual_attention_mask"].bool())


def test_states_heads_losses_and_gradients_are_the_library_s(case):
    case, x, expected, model = case
    T = x["input_ids"].shape[1]
    hidden = states(model, x)
    real = torch.cat((x["attention_mask"], x["visual_attention_mask"]), dim=1)[..., None]
    check(case, "embeddings", hidden[0] * real, expected["embeddings"] * real)
    check(case, "hidden_states", torch.stack(hidden) * real, expected["hidden_states"])
    words, match = model.word_logits(hidden[-1][:, :T]), model.match_logits(hidden[-1])
    check(case, "prediction_logits", words * real[:, :T], expected["prediction_logits"][:, :T])
    check(case, "seq_relationship_logits", match, expected["seq_relationship_logits"])
    assert (x["labels"][:, T:] == -100).all()               # no loss on regions
    losses = word_loss(words, x["labels"][:, :T]), F.cross_entropy(match, x["sentence_image_labels"])
    check(case, "loss_mlm", losses[0], expected["loss_mlm"])
    check(case, "loss_sentence_image", losses[1], expected["loss_sentence_image"])
    check(case, "loss", sum(losses), expected["loss"])
    model.zero_grad()
    sum(losses).backward()
    root = "grad.visual_bert."
    for key, p in (("embeddings.visual_projection.weight", model.project.weight),
                   ("embeddings.visual_token_type_embeddings.weight", model.visual_segments.weight),
                   ("embeddings.visual_position_embeddings.weight", model.visual_positions.weight),
                   ("encoder.layer.0.attention.self.query.weight", model.layers[0].attention.q.weight)):
        torch.testing.assert_close(p.grad, expected.pop(root + key), atol=1e-4, rtol=1e-4)
    assert not [key for key in expected if key.startswith("grad.")]


@torch.no_grad()
def test_the_order_of_the_regions_says_nothing(case):
    """Document 4 has f_p align the order of the regions. All of them have one position."""
    _, x, _, model = case
    order = torch.tensor([3, 0, 4, 1, 2])
    other = dict(x, visual_embeds=x["visual_embeds"][:, order],
                 visual_attention_mask=x["visual_attention_mask"][:, order])
    T = x["input_ids"].shape[1]
    torch.testing.assert_close(states(model, other)[-1][:, :T], states(model, x)[-1][:, :T])


@torch.no_grad()
def test_a_linked_region_takes_the_mean_of_its_words_positions_or_in_the_paper_their_sum():
    features, aligned = torch.randn(1, 2, 6), torch.tensor([[[1, 3, -1], [-1, -1, -1]]])
    for paper in (False, True):
        model = stir(VisualBert(SMALL, sum_aligned=paper))
        plain, linked = model.regions(features), model.regions(features, aligned)
        rows = model.text.positions.weight[[1, 3]]          # the words' table, not the regions' own
        torch.testing.assert_close(linked[0, 0] - plain[0, 0], rows.sum(0) if paper else rows.mean(0))
        assert torch.equal(linked[0, 1], plain[0, 1])


@torch.no_grad()
def test_with_late_fusion_the_picture_is_met_in_one_more_layer_alone():
    model = stir(VisualBert(VisualBertConfig(40, 16, 2, 2, 24, 12, 6, 0.0, join=2)))
    tokens, a, b = torch.arange(5)[None], torch.randn(1, 3, 6), torch.randn(1, 3, 6)
    first, second = model(tokens, a), model(tokens, b)
    assert len(first) == 4 and first[-1].shape == (1, 8, 16)
    assert torch.equal(first[1], second[1]) and torch.equal(first[2][:, :5], second[2][:, :5])
    assert not torch.equal(first[3][:, :5], second[3][:, :5])


def test_at_the_published_sizes_there_are_112_million_parameters_and_the_tables_begin_alike():
    with torch.device("meta"):
        model = VisualBert(VisualBertConfig())
    assert sum(p.numel() for p in model.parameters()) == 112_074_812
    model = VisualBert(SMALL)
    assert torch.equal(model.visual_positions.weight, model.text.positions.weight)
    assert torch.equal(model.visual_segments.weight, model.text.segments.weight)


@pytest.fixture(scope="module")
def task() -> VisualBertTask:
    torch.manual_seed(0)
    given = Ingredients(torch.device("cpu"), seed=0, batch=8, steps=1, world=Shapes("train"),
                        tokenizer=shapes_tokenizer(), vit=load_vit(ROOT / "weights/vit"), eval_items=12,
                        open_held_out=lambda: Shapes("test"),
                        take_items=lambda world, n: [world.item(i) for i in range(n)])
    task = VisualBertTask(given)
    task.freeze(("bert",), torch.float32)
    return task


def test_the_first_caption_belongs_and_the_second_does_in_half_of_the_rows(task):
    piece, = task.batch(0)
    world, decode = Shapes("train"), task.tokenizer.decode
    for i, (row, j) in enumerate(zip(piece["tokens"].tolist(), piece["other"].tolist())):
        end = row.index(task.sep)
        assert row[0] == task.cls and decode(row[1:end]) in world.item(i).captions
        assert decode(row[end + 1:row.index(task.sep, end + 1)]) in world.item(j).captions
    again, = task.batch(0)
    assert all(torch.equal(again[k], piece[k]) for k in ("tokens", "masked", "labels", "other", "pixels"))
    task.loss(**piece).backward()
    assert {*task.metrics()} == {"words", "pairs"}
    learned = {n.split(".")[0] for n, p in task.module.named_parameters() if p.grad is not None}
    assert learned == {"bert"}


def test_its_report_has_words_beside_their_picture_and_another_and_pairs(task, capsys):
    task.given.name_split = lambda world: "held-out"
    result = task.report(None)["results.json"]
    assert {*result} == {"words", "words, another picture", "pairs"}
    assert all(0 <= v <= 1 and np.isfinite(v) for v in result.values())
    assert "chance is 50 %" in capsys.readouterr().out
