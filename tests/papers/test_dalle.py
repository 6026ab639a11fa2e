"""DALL-E's stream of words and codes: pads, weights, who predicts what, sparse masks, drawing."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import data
from conftest import ROOT, TINY, stir
from papers.dalle import Dalle, DalleTask, choose_by_clip, dalle_loss, sparse_mask
from papers.recipe import Ingredients
from papers.vq import VQ
from papers.vq_nets import VQConfig
from support.formats import load_decoder, load_tokenizer

T, K, SIDE = 5, 7, 3


@pytest.fixture(scope="module")
def dalle() -> Dalle:
    return stir(Dalle(TINY, text=T, codes=K, side=SIDE))


@pytest.fixture
def tokens(dalle) -> torch.Tensor:
    words = dalle.lay_out([[3, 4, 5], [9] * 5], begin=1)
    codes = torch.randint(K, (2, SIDE**2), generator=torch.Generator().manual_seed(0))
    return torch.cat((words, dalle.first + codes), 1)


def test_the_weights_are_one_to_seven():
    assert dalle_loss(torch.tensor(2.0), torch.tensor(4.0)).item() == 3.75


def test_every_empty_position_of_the_text_has_its_own_pad(dalle, tokens):
    assert tokens[0, :6].tolist() == [1, 3, 4, 5, TINY.vocab_size + 3, TINY.vocab_size + 4]
    assert tokens[1, :6].tolist() == [1, 9, 9, 9, 9, 9]
    with pytest.raises(ValueError, match="6 tokens"):
        dalle.lay_out([[1] * 6], begin=1)


@torch.no_grad()
def test_words_are_predicted_among_words_and_codes_among_codes(dalle, tokens):
    words, codes = dalle(tokens)
    assert words.shape == (2, T, TINY.vocab_size + T) and codes.shape == (2, SIDE**2, K)
    text = F.cross_entropy(words.flatten(0, 1), tokens[:, 1:1 + T].flatten())
    image = F.cross_entropy(codes.flatten(0, 1), tokens[:, 1 + T:].flatten() - dalle.first)
    torch.testing.assert_close(dalle.loss(tokens), (text + 7 * image) / 8)
    other = tokens.clone()
    other[:, -1] = dalle.first + (other[:, -1] - dalle.first + 1) % K           # it predicts nothing
    assert torch.equal(dalle(other)[1], codes)
    other[:, 1] = 2                                     # the first word reaches every code
    assert (dalle(other)[1] - codes).abs().amax((0, 2)).min() > 1e-4


@torch.no_grad()
def test_drawing_with_the_cache_is_the_greedy_choice_of_the_whole_forward(dalle, tokens):
    drawn = dalle.draw(tokens[:, :1 + T], temperature=0.0)
    whole = torch.cat((tokens[:, :1 + T], dalle.first + drawn), 1)
    assert torch.equal(dalle(whole)[1].argmax(-1), drawn)


def test_sparse_attention_of_a_row_a_column_and_a_square():
    """A 3 × 3 picture behind two words: cell 4 sees a row's worth, its column, the square behind it."""
    seen = {kind: sparse_mask(kind, 2, 3)[2 + 4, 2:].nonzero().flatten().tolist()
            for kind in ("row", "column", "conv")}
    assert seen == {"row": [1, 2, 3, 4], "column": [1, 4], "conv": [0, 1, 2, 3, 4]}
    for kind in seen:
        mask = sparse_mask(kind, 2, 3)
        assert mask[2:, :2].all() and not mask.triu(1).any() and mask.diagonal().all()


@pytest.fixture(scope="module")
def task() -> DalleTask:
    torch.manual_seed(0)

    class Clip:
        embed_texts = staticmethod(lambda texts: torch.eye(3)[[0] * len(texts)])
        embed_images = staticmethod(lambda arrays: torch.eye(3)[[int(a.mean() < 100) for a in arrays]])

    given = Ingredients(torch.device("cpu"), seed=0, batch=2, steps=1, world=data.Shapes(), clip=Clip,
                        images=VQ(VQConfig(patch=16, latent=8, width=8, codes=12)), eval_items=3,
                        tokenizer=load_tokenizer(ROOT / "weights/decoder"),
                        decoder=load_decoder(ROOT / "weights/decoder"))
    return DalleTask(given)


def test_the_toy_begins_as_the_bundled_decoder(task):
    """It reads its text as that does; a new row of the grid is the word of the place."""
    bundled, mine = task.given.decoder, task.module
    E = mine.decoder.embed.weight
    assert torch.equal(E[:len(bundled.embed.weight)], bundled.embed.weight)
    top, left = (task.words.encode(w)[0] for w in (" top", " left"))
    assert torch.equal(mine.rows[0], E[top]) and torch.equal(mine.columns[0], E[left])
    piece, = task.batch(0)
    assert piece["tokens"].shape == (2, 1 + 36 + 9)
    with torch.no_grad():
        mine_state = mine.decoder(piece["tokens"][:, :8])[..., :len(bundled.embed.weight)]
        torch.testing.assert_close(mine_state, bundled(piece["tokens"][:, :8]))


def test_clip_chooses_and_the_report_counts(task, capsys):
    bright, dark = torch.ones(2, 3, 48, 48), torch.zeros(2, 3, 48, 48)
    assert torch.equal(choose_by_clip(task.given.clip, ["a red ring"] * 2, (dark, bright)), bright)
    task.candidates = 2
    result = task.report(None)["results.json"]
    assert set(result) == {"test", "val"} and "best of 2 by CLIP" in result["test"]
    assert "drawn" in capsys.readouterr().out
