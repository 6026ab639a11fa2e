"""CM3: spans move to the end as in the authors' code, sentinels carry no loss, a span sees both its sides."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conftest import golden
from data import HELD_OUT, Shapes, Thing
from model import IGNORE, causal_mask
from papers.cm3 import Cm3Task, draw_spans, infill, learned, places
from papers.masks import stream_mask
from papers.recipe import Ingredients
from support.worlds.text import shapes_tokenizer


def test_one_span_moves_to_the_end_as_in_the_authors_code():
    _, _, x, expected = golden("cm3-infilling")
    document, tail = infill(x["document"].tolist(), [tuple(s) for s in x["spans"].tolist()], [90, 91], 99)
    assert document == expected["masked_document"].tolist() and tail == expected["tail"].tolist()
    assert document + tail == expected["sequence"].tolist()
    assert learned(document + tail, [90, 91]) == [10, 11, 12, 13, IGNORE, 19, 20, 21, 22, 23,
                                                  IGNORE, 14, 15, 16, 17, 18, 99]


def test_several_spans_keep_their_order_and_more_than_there_are_sentinels_is_an_error():
    tokens = [*range(10, 18)]
    document, tail = infill(tokens, [(0, 2), (5, 6)], [90, 91, 92], 99)
    assert document == [90, 12, 13, 14, 91, 16, 17] and tail == [90, 10, 11, 99, 91, 15, 99]
    assert infill(tokens, [], [], 99) == (tokens, [])
    assert infill(tokens, [(0, 8)], [90], 99) == ([90], [90, *tokens, 99])
    with pytest.raises(ValueError, match="2 spans need as many sentinels; there are 1"):
        infill(tokens, [(0, 2), (5, 6)], [90], 99)


def test_the_causal_mask_of_the_sequence_is_the_masks_of_the_document():
    """Who sees whom among the document's tokens, read off the sequence in which they are written."""
    spans = [(1, 3), (5, 6)]
    at = places(8, spans)
    document, tail = infill([*range(8)], spans, [90, 91], 99)
    assert [(document + tail)[i] for i in at] == [*range(8)]
    in_sequence = causal_mask(len(document + tail))[at][:, at]
    assert torch.equal(stream_mask("cm3", torch.zeros(8, dtype=torch.long), order=at), in_sequence)
    assert in_sequence[1].tolist() == [True, True, False, True, True, False, True, True]        # both sides


def test_spans_do_not_overlap_and_cover_a_third_on_average():
    rng, shares, counts = np.random.default_rng(0), [], []
    for _ in range(2000):
        spans = draw_spans(200, rng)
        assert all(0 <= a < b <= 200 for a, b in spans)
        assert all(end <= a for (_, end), (a, _) in zip(spans, spans[1:]))
        counts.append(len(spans))
        shares += [(b - a) / 200 for a, b in spans] if len(spans) == 1 else []
    assert min(counts) >= 1 and 1 < np.mean(counts) < 1.4                       # Poisson(1), at least 1
    single = [draw_spans(200, rng, expected=0.0) for _ in range(2000)]
    assert abs(np.mean([(b - a) / 200 for spans in single for a, b in spans]) - 1 / 3) < 0.02
    assert max(len(draw_spans(4000, rng, expected=100.0)) for _ in range(20)) <= 16


@pytest.fixture(scope="module")
def task() -> Cm3Task:
    torch.manual_seed(0)
    return Cm3Task(Ingredients(torch.device("cpu"), seed=0, batch=4, steps=1, world=Shapes("train"),
                               tokenizer=shapes_tokenizer(), eval_items=3))


def test_a_scene_is_nine_codes_and_a_caption(task):
    tokens = task.document([Thing("red", "square", "large", 4), Thing("blue", "ring", "small", 0)])
    empty, t = task.first, task.tokenizer
    assert [n for n in range(9) if tokens[n] != empty] == [0, 4] and tokens[0] != tokens[4]
    assert tokens[9] == t.bos and tokens[-1] == t.eos and max(tokens) < task.masks[0]
    assert t.decode(tokens[10:-1]).startswith("a small blue ring at the top left and a large red square")
    with pytest.raises(ValueError):                     # a pair that training never shows has no code
        task.document([Thing(*HELD_OUT[0], "small", 0)])


def test_the_loss_leaves_sentinels_and_padding_out(task):
    piece, = task.batch(0)
    tokens, labels = piece["tokens"], piece["labels"]
    sentinel = torch.isin(tokens, torch.tensor(task.masks))
    assert sentinel.any(1).all() and torch.equal(labels == IGNORE, sentinel)
    assert all((row == task.end).sum() >= 1 for row in tokens)
    total = task.loss(**piece)
    total.backward()
    assert abs(total.item() / piece["count"] - 6.26) < 0.3                      # ln 523
    assert task.metrics()["words and codes"] == pytest.approx(total.item() / piece["count"], rel=1e-5)


def test_the_report_asks_for_codes_from_both_sides_from_the_left_and_from_the_caption(task, tmp_path, capsys):
    result = task.report(tmp_path)["results.json"]
    assert [*result] == ["from both sides", "from the left", "from the caption", "chance",
                         "loss from the left"]
    assert {*task.check()} == {*result} - {"loss from the left"}                # what is printed in percent
    assert all(0 <= share <= 1 for share in [*result.values()][:4]) and "% right" in capsys.readouterr().out


def test_a_model_that_knows_a_cell_is_rarely_full_is_still_asked_which_thing_it_holds(task, monkeypatch):
    """From the left a perfect model finds an empty cell likeliest; of things, it names the right one."""
    tokens = task.document(Shapes("val").scene(Shapes("val").rng(0)))
    after = {tuple(tokens[:cell]): tokens[cell] for cell in range(1, 9) if tokens[cell] != task.first}
    assert after

    def log_probs(prompt: list[int]) -> torch.Tensor:
        p = torch.full((task.end + 1,), 0.1 / task.end)
        p[task.first], p[after.get(tuple(prompt), task.first + 1)] = 0.7, 0.2
        return p.log()

    monkeypatch.setattr(task, "log_probs", log_probs)
    found = task.measure(1)
    assert (found["from the left"], found["from both sides"]) == (1, 0)
    assert found["loss from the left"] == pytest.approx(-math.log(0.2))
