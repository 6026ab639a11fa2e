"""UniT: tasks share a decoder and ask it with queries of their own."""
from __future__ import annotations

import pytest
import torch

from conftest import stir
from papers.unit import UniT

TASKS = {"boxes": (5, 4, True), "vqa": (3, 7, False), "glue": (1, 2, False)}


@pytest.fixture
def model() -> UniT:
    return stir(UniT(TASKS, 6, 10, 16, layers=2, heads=2, hidden=24, dropout=0.0))


def test_a_task_reads_what_it_has_and_answers_with_every_query_or_the_first(model):
    image, text = torch.randn(2, 9, 6), torch.randn(2, 4, 10)
    assert model("boxes", image).shape == (2, 5, 4)
    assert model("vqa", image, text).shape == (2, 7) and model("glue", text=text[:, :1]).shape == (2, 2)
    assert not torch.allclose(model("vqa", image, text), model("vqa", image))
    with pytest.raises(ValueError, match='no task "nlvr"; known: boxes, vqa, glue'):
        model("nlvr", image)
    with pytest.raises(ValueError, match="glue needs a picture, a text or both"):
        model("glue")


def test_the_loss_of_one_task_moves_the_shared_decoder_and_no_other_task_s_queries(model):
    model("vqa", torch.randn(2, 9, 6), torch.randn(2, 4, 10)).sum().backward()
    still = {n for n, p in model.named_parameters() if p.grad is None}
    assert still == {"queries.boxes", "queries.glue", *(f"heads.{t}.{w}" for t in ("boxes", "glue")
                                                        for w in ("weight", "bias"))}


@torch.no_grad()
def test_the_padding_of_a_text_is_not_read(model):
    image, text = torch.randn(1, 9, 6), torch.randn(1, 4, 10)
    mask = torch.tensor([[True, True, False, False]])
    torch.testing.assert_close(model("vqa", image, text, mask), model("vqa", image, text[:, :2]))


def test_at_the_published_sizes_the_decoder_is_detr_s():
    with torch.device("meta"):
        model = UniT({"coco": (100, 4, True)})
    per_layer = 2 * (4 * 256 * 257) + 256 * 2048 + 2048 + 2048 * 256 + 256 + 3 * 512
    assert sum(p.numel() for p in model.layers.parameters()) == 6 * per_layer == 9_472_512
