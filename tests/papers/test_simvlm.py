"""SimVLM: the prefix sees both ways, what follows is predicted, and a text without a picture is a text."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from conftest import golden, stir
from data import Shapes
from model import DecoderConfig
from papers.recipe import Ingredients
from papers.simvlm import SimVLM, SimvlmTask, conv_stem
from support.worlds.pairs import contrastive_pair
from support.worlds.text import shapes_tokenizer

TINY = DecoderConfig(vocab_size=30, width=32, layers=2, heads=2, kv_heads=2, head_width=16, hidden=48)


@pytest.fixture(scope="module")
def simvlm() -> SimVLM:
    torch.manual_seed(0)
    return stir(SimVLM(TINY, 32))                       # 4 patches


def rows(simvlm: SimVLM) -> tuple[dict, torch.Tensor]:
    """The golden case's two rows as (tokens, mask, prefix, patches); its expected loss positions of words."""
    _, _, x, expected = golden("simvlm-mask")
    P = int(x["image_tokens"])
    T, g = int(x["length"].max()) - P, torch.Generator().manual_seed(1)
    with torch.no_grad():
        patches = simvlm.patches(torch.randn(2, 3, 32, 32, generator=g))
    assert patches.shape == (2, P, 32)
    return dict(tokens=torch.randint(30, (2, T), generator=g), prefix=x["prefix_len"], patches=patches,
                mask=torch.arange(T) < x["length"][:, None] - P), expected["loss_positions"][:, P:]


def test_the_loss_is_that_of_the_words_behind_the_prefix(simvlm):
    row, positions = rows(simvlm)
    losses = simvlm.word_losses(**row)
    assert torch.equal((losses > 0).long(), positions)


def test_a_changed_word_of_the_prefix_changes_all_and_a_later_one_only_what_follows(simvlm):
    """Row 1 has a prefix of 4 patches and 3 words; words 3 and 4 are predicted, 4 from 3."""
    row, _ = rows(simvlm)
    before = simvlm.word_losses(**row)[1]
    for word, moved in ((0, [3, 4]), (2, [3, 4]), (3, [3, 4]), (4, [4])):
        other = row["tokens"].clone()
        other[1, word] = (other[1, word] + 1) % 30
        after = simvlm.word_losses(**row | {"tokens": other})[1]
        assert (after != before).nonzero()[:, 0].tolist() == moved
    prefix, causal = (simvlm.word_losses(**row, kind=kind) for kind in ("prefix", "causal"))
    assert torch.equal(prefix > 0, causal > 0) and not torch.allclose(prefix, causal)


def test_without_a_picture_and_a_longer_prefix_it_is_a_language_model(simvlm):
    row, _ = rows(simvlm)
    tokens, mask = row["tokens"], torch.ones(2, 5, dtype=torch.bool)
    losses = simvlm.word_losses(tokens, mask, torch.tensor([1, 1]))
    logits = simvlm.decoder(tokens)
    plain = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(losses[:, 1:], plain)
    assert not losses[:, 0].any()
    torch.testing.assert_close(losses, simvlm.word_losses(tokens, mask, torch.tensor([1, 1]), kind="causal"))


def test_a_caption_is_the_likeliest_words_one_after_the_other(simvlm):
    pixels = torch.randn(1, 3, 32, 32)
    new = simvlm.generate(pixels, 4)
    with torch.no_grad():
        patches = simvlm.patches(pixels)
        for n in range(4):
            each = torch.cat((new[:, :n].expand(30, -1), torch.arange(30)[:, None]), dim=1)
            losses = simvlm.word_losses(each, torch.ones_like(each).bool(), torch.full((30,), 4),
                                        patches.expand(30, -1, -1))
            assert int(losses[:, n].argmin()) == int(new[0, n])


def test_the_stem_has_stride_16_and_another_stem_is_an_error():
    assert conv_stem(32)(torch.zeros(1, 3, 48, 48)).shape == (1, 32, 3, 3)
    assert SimVLM(TINY, 48, "linear").patches(torch.zeros(1, 3, 48, 48)).shape == (1, 9, 32)
    for size, stem in ((48, "resnet"), (50, "conv")):
        with pytest.raises(ValueError, match="a multiple of 16 pixels"):
            SimVLM(TINY, size, stem)


def test_the_task_draws_a_prefix_and_reads_texts_beside_pairs():
    tokenizer = shapes_tokenizer()
    given = Ingredients(torch.device("cpu"), seed=0, batch=16, steps=1, world=Shapes("train"),
                        tokenizer=tokenizer, contrastive_pair=contrastive_pair,
                        open_held_out=lambda: Shapes("test"))
    torch.manual_seed(0)
    task = SimvlmTask(given)
    pairs, texts = task.batch(0)
    assert pairs["pixels"].shape == (16, 3, 48, 48) and texts["pixels"] is None and len(texts["tokens"]) == 2
    length = 9 + pairs["mask"].sum(1)
    assert (pairs["prefix"] >= 9).all() and (pairs["prefix"] < length).all()
    assert len({*pairs["prefix"].tolist()}) > 4
    assert (texts["tokens"][:, 0] == tokenizer.bos).all() and (texts["prefix"] >= 1).all()
    total = sum(task.loss(**piece) for piece in (pairs, texts))
    total.backward()
    mean = total.item() / (pairs["count"] + texts["count"])
    assert abs(mean - 6.06) < 0.3 and task.metrics().keys() == {"pairs", "texts"}    # ln 429
    assert all(p.grad is not None for p in task.module.parameters())
    assert [*task.check(2)] == ["as caption", "chance"]
