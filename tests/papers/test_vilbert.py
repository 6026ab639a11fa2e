"""ViLBERT computes what its authors' code does: both streams, summaries, three predictions and losses."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, check, golden, stir
from data import Shapes
from papers.masked import word_loss
from papers.recipe import Ingredients
from papers.vilbert import ViLBert, ViLBertConfig, ViLBertTask, region_loss
from support.formats import load_vit
from support.formats.streams import load_vilbert
from support.worlds.text import shapes_tokenizer

SMALL = ViLBertConfig(40, 16, 2, 2, 24, 12, 6, 5, 12, 1, 3, 20, 8, 2, ((0, 1),), 0.0)


@pytest.fixture(scope="module")
def case():
    folder, case, x, expected = golden("vilbert")
    return case, x, expected, load_vilbert(folder)


@torch.no_grad()
def test_streams_summaries_predictions_and_losses_are_the_authors(case):
    case, x, expected, model = case
    mask, region_mask = x["attention_mask"].bool(), x["image_attention_mask"].bool()
    t, v = model(x["input_ids"], x["image_feat"], x["image_loc"], mask, region_mask=region_mask)
    rows, regions = mask[..., None], region_mask[..., None]
    check(case, "sequence_text", t * rows, expected["sequence_text"] * rows)
    check(case, "sequence_image", v * regions, expected["sequence_image"] * regions)
    check(case, "pooled_text", model.text_pool(t[:, 0]).relu(), expected["pooled_text"])
    check(case, "pooled_image", model.region_pool(v[:, 0]).relu(), expected["pooled_image"])
    words, classes = model.word_logits(t), model.region_head(v, model.classes.weight)
    check(case, "prediction_text", words * rows, expected["prediction_text"] * rows)
    check(case, "prediction_image", classes * regions, expected["prediction_image"] * regions)
    match = model.match_logits(t, v)
    check(case, "alignment_logits", match, expected["alignment_logits"])
    labels = x["masked_lm_labels"].masked_fill(x["masked_lm_labels"] == -1, -100)
    check(case, "loss_mlm", word_loss(words, labels), expected["loss_mlm"])
    found = region_loss(classes[:, 1:], x["image_target"], x["image_label"] == 1)      # not the picture's row
    check(case, "loss_image", found, expected["loss_image"])
    found = F.cross_entropy(match, x["next_sentence_label"])
    check(case, "loss_alignment", found, expected["loss_alignment"])


@torch.no_grad()
def test_both_streams_read_what_enters_the_layer_not_what_the_other_has_made_of_it(case):
    """A misreading: first the words read the regions, then the regions read the NEW words."""
    _, x, expected, model = case
    layer, (t, v) = model.connections[0], (torch.randn(1, 3, 24), torch.randn(1, 4, 20))
    new_t, new_v = layer(t, v, None, None)
    _, k, value = layer.text.project(t)
    q, _, _ = layer.regions.project(v)
    torch.testing.assert_close(new_v, layer.regions.read(v, q, k, value, None))
    _, k, value = layer.text.project(new_t)
    assert not torch.allclose(new_v, layer.regions.read(v, q, k, value, None), atol=1e-3)


@torch.no_grad()
def test_a_connection_stands_ahead_of_the_layers_that_it_names():
    model = stir(ViLBert(SMALL))
    tokens, f, box = torch.arange(5)[None], torch.randn(1, 3, 6), torch.rand(1, 3, 5)
    t = model.text_layers[0](model.text(tokens))
    t, v = model.connections[0](t, model.region_norm(model.features(f) + model.boxes(box)), None, None)
    found = model(tokens, f, box)
    torch.testing.assert_close(found, (model.text_layers[1](t), model.region_layers[0](v)))


def test_at_the_published_sizes_there_are_250_million_parameters_with_those_that_nothing_reads():
    with torch.device("meta"):
        model = ViLBert(ViLBertConfig())
        unread = 6 * (1024 * 1024 + 1024 + 1024 * 768 + 768)                    # q_dense1 and q_dense2
    assert sum(p.numel() for p in model.parameters()) + unread == 250_044_029
    assert ViLBertConfig().connect == ((0, 6), (1, 7), (2, 8), (3, 9), (4, 10), (5, 11))


def test_the_loss_of_regions_is_zero_for_the_detector_s_own_answer_and_for_none_masked():
    target = torch.randn(2, 3, 5).softmax(-1)
    some = torch.tensor([[True, False, True], [False, False, True]])
    assert region_loss(target.log(), target, some).abs() < 1e-6
    assert region_loss(torch.randn(2, 3, 5), target, torch.zeros_like(some)) == 0
    uniform = (target * target.log()).sum(-1)[some].mean() + torch.tensor(5.0).log()
    torch.testing.assert_close(region_loss(torch.zeros(2, 3, 5), target, some), uniform)


def test_its_task_has_three_losses_and_trains_all_but_the_vit():
    torch.manual_seed(0)
    given = Ingredients(torch.device("cpu"), seed=0, batch=8, steps=1, world=Shapes("train"),
                        tokenizer=shapes_tokenizer(), vit=load_vit(ROOT / "weights/vit"))
    task = ViLBertTask(given)
    task.freeze(("bert",), torch.float32)
    piece, = task.batch(0)
    task.loss(**piece).backward()
    assert {*task.metrics()} == {"words", "regions", "pairs"} and task.metrics()["regions"] > 0
    without = [n for n, p in task.module.named_parameters() if p.grad is None and not n.startswith("vit.")]
    assert not without and task.match_scores(piece).shape == (8,)
    boxes = []
    task.module["bert"] = type("Spy", (torch.nn.Module,), {"forward": lambda self, *x: boxes.append(x[2])})()
    task.states(torch.randn(1, 9, 128), piece["tokens"][:1], piece["mask"][:1])
    expected = torch.tensor([[0, 0, 1, 1, 1], [1 / 3, 2 / 3, 2 / 3, 1, 1 / 9]])
    torch.testing.assert_close(boxes[0][0, [0, 8]], expected)                   # the picture; bottom centre
