"""Soft tokens that read no word before them: lab/alone.py."""
from __future__ import annotations

import pytest
import torch

import data
from model import IMAGE
from support.formats.vlm import open_run
from support.lab.alone import keys_alone, moved_by_words, read_alone
from support.lab.claims import few_shot_accuracy
from tests.conftest import shapes_vlm, tiny_vlm

PREFIX = ("linear", "mlp", "mapl", "qformer")


def states(vlm, tokens: list[list[int]], pictures: int, mask=None, white: int | None = None):
    """Hidden states (B, T', D) after the last layer, and where pictures stand in them (B, T').

    white: the picture whose features are ones.
    """
    features = torch.randn(pictures, 4, vlm.vit.config.width, generator=torch.Generator().manual_seed(3))
    if white is not None:
        features[white] = 1.0
    inputs, _ = vlm.prepare(torch.tensor(tokens), features, mask)
    with torch.no_grad():
        return vlm.decoder.states(**inputs)[-1], inputs["visual"].image


def test_who_may_read_whom_in_a_small_text():
    vlm = tiny_vlm("linear")
    features = torch.zeros(2, 2, vlm.vit.config.width)
    where = vlm.prepare(torch.tensor([[1, 5, IMAGE, 6, IMAGE]]), features)[0]["visual"]
    keys = torch.ones(7, 7, dtype=torch.bool).tril()[None]              # 1 5 a a 6 b b
    assert keys_alone(keys, where)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, 0, 1, 1]]
    assert keys_alone(keys, where, "words")[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("name", PREFIX)
def test_a_picture_at_the_head_of_a_text_is_read_as_ever(name):
    vlm = shapes_vlm(name)
    before, _ = states(vlm, [[1, IMAGE, 5, 6, 7]], 1)
    read_alone(vlm.bridge)
    after, _ = states(vlm, [[1, IMAGE, 5, 6, 7]], 1)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)        # two kernels of one attention


@pytest.mark.parametrize("name", PREFIX)
def test_words_before_a_picture_move_its_soft_tokens_only_without_it(name):
    vlm = shapes_vlm(name)
    for alone in (False, True):
        one, image = states(vlm, [[1, 5, 6, IMAGE, 7]], 1)
        other, _ = states(vlm, [[1, 8, 9, IMAGE, 7]], 1)
        assert torch.equal(one[image], other[image]) == alone
        assert not torch.equal(one[:, -1], other[:, -1])                # a word reads them all
        if not alone:
            read_alone(vlm.bridge)


def test_another_picture_before_is_not_read_either():
    vlm = shapes_vlm("mlp")
    read_alone(vlm.bridge)
    tokens = [[1, IMAGE, 5, IMAGE, 7]]
    both, image = states(vlm, tokens, 2)
    changed, _ = states(vlm, tokens, 2, white=0)
    second = image & (image.cumsum(1) > image.sum() // 2)
    assert torch.equal(both[second], changed[second]) and not torch.equal(both[:, -1], changed[:, -1])


@pytest.mark.parametrize("left", [True, False])
def test_rows_of_a_padded_batch_equal_rows_alone(left):
    vlm = shapes_vlm("mapl")
    read_alone(vlm.bridge)
    short, long = [1, 5, IMAGE, 7], [1, 5, 6, 8, IMAGE, 7]
    padded = [0, 0, *short] if left else [*short, 0, 0]
    mask = torch.tensor([[p != 0 for p in padded], [True] * 6])
    batch, _ = states(vlm, [padded, long], 2, mask)
    row, _ = states(vlm, [short], 1)
    T = row.shape[1]
    mine = batch[0, -T:] if left else batch[0, :T]
    torch.testing.assert_close(mine, row[0], atol=1e-4, rtol=0)         # the sums of a batch, states up to 7


def test_generation_with_the_cache_equals_recomputation():
    vlm = shapes_vlm("linear")
    read_alone(vlm.bridge)
    prompt, features = [1, 5, 6, IMAGE, 7], torch.randn(1, 4, vlm.vit.config.width)
    new = vlm.generate(torch.tensor([prompt]), max_new_tokens=6, features=features)[0].tolist()
    for n, token in enumerate(new):
        with torch.no_grad():
            logits = vlm(torch.tensor([prompt + new[:n]]), features=features)
        assert logits[0, -1].argmax() == token


def test_a_bridge_without_soft_tokens_is_refused():
    with pytest.raises(ValueError, match="flamingo has no soft tokens"):
        read_alone(shapes_vlm("flamingo").bridge)


def test_a_stored_run_keeps_its_answers_behind_four_examples():
    """linear was trained with one picture a text; results/examples.md has all four on 400 pictures."""
    vlm, tokenizer, _ = open_run("notebooks/runs/linear", "cpu")
    items = [data.Shapes("test").item(n) for n in range(10)]
    plain = few_shot_accuracy(vlm, tokenizer, items, 4)
    read_alone(vlm.bridge)
    assert few_shot_accuracy(vlm, tokenizer, items, 4) > plain + 0.25   # 27 and 87 % of 15 pictures


def test_words_move_the_states_of_soft_tokens_and_hardly_where_they_are_not_read():
    """Alone, only the distance to the text's first token is another one."""
    vlm, tokenizer, _ = open_run("notebooks/runs/linear", "cpu")
    items, examples = ([data.Shapes(split).item(n) for n in range(4)] for split in ("test", "train"))
    read = moved_by_words(vlm, tokenizer, items, examples)
    read_alone(vlm.bridge)
    alone = moved_by_words(vlm, tokenizer, items, examples)
    assert read[0] == alone[0] == 0 and len(read) == len(vlm.decoder.layers) + 1
    assert all(a < r / 2 for a, r in zip(alone[1:], read[1:]))
