"""Masked words, swapped pairs and BERT's parts, as the readers of pictures and captions share them."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from conftest import stir
from model import IGNORE
from papers.masked import BertLayer, WordEmbedding, WordHead, init_bert, mask_words, swap_pairs, word_loss

V, MASK = 50, 52


@pytest.fixture
def text():
    """(ids (400, 30), which are words): [CLS] is 50, [SEP] and padding are 51."""
    tokens = torch.randint(V, (400, 30), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[:, 25:] = 50, 51
    return tokens, tokens < V


def test_fifteen_words_of_a_hundred_are_chosen_and_eight_of_ten_of_them_are_masked(text):
    tokens, words = text
    masked, labels = mask_words(tokens, words, MASK, V, torch.Generator().manual_seed(1))
    chosen = labels != IGNORE
    assert not chosen[~words].any() and torch.equal(masked[~chosen], tokens[~chosen])
    assert torch.equal(labels[chosen], tokens[chosen])
    n = chosen.sum()
    assert abs(n / words.sum() - 0.15) < 0.012              # 9,600 draws: three standard deviations
    assert abs((masked == MASK).sum() / n - 0.8) < 0.032
    kept = (masked == tokens)[chosen].sum() / n             # one random word of 50 is the old one
    assert abs(kept - 0.1 * (1 + 1 / V)) < 0.025
    assert (masked[chosen & (masked != MASK)] < V).all()


def test_a_word_of_several_tokens_is_chosen_as_a_whole(text):
    tokens, words = text
    word = (torch.arange(30) // 3 * 3).expand(400, 30)      # three tokens a word
    may = words.clone()
    may[:, :3], may[:, 24:] = False, False                  # whole words alone
    _, labels = mask_words(tokens, may, MASK, V, torch.Generator().manual_seed(1), word=word)
    chosen = (labels != IGNORE)[:, 3:24].unflatten(1, (7, 3))
    assert torch.equal(chosen.any(-1), chosen.all(-1)) and 0.1 < chosen.float().mean() < 0.2


def test_the_loss_of_words_is_the_mean_over_the_chosen_and_0_without_any():
    logits, labels = torch.randn(2, 3, 7), torch.full((2, 3), IGNORE)
    assert word_loss(logits, labels) == 0
    labels[0, 1], labels[1, 2] = 4, 6
    expected = (F.cross_entropy(logits[0, 1], labels[0, 1]) + F.cross_entropy(logits[1, 2], labels[1, 2])) / 2
    torch.testing.assert_close(word_loss(logits, labels), expected)


def test_half_of_the_pairs_are_swapped_and_none_of_those_meets_its_own():
    other = swap_pairs(4000, torch.Generator().manual_seed(0))
    own = torch.arange(4000)
    assert abs((other != own).float().mean() - 0.5) < 0.03
    assert torch.equal(swap_pairs(7, share=0.0), torch.arange(7)) and swap_pairs(1, share=1.0) == 0
    assert (swap_pairs(7, share=1.0) != torch.arange(7)).all()


def test_bert_starts_small_and_a_layer_hides_padding():
    torch.manual_seed(0)
    embedding, layer, head = WordEmbedding(40, 16, 8), BertLayer(16, 2, 24), WordHead(16, 40)
    init_bert(embedding)
    assert 0.01 < embedding.words.weight.std() < 0.03 and (embedding.norm.weight == 1).all()
    stir(embedding), stir(layer, 1), stir(head, 2)
    tokens = torch.tensor([[1, 2, 3, 4]])
    bias = torch.zeros(1, 1, 1, 4)
    bias[..., 3] = -1e9
    short = head(layer(embedding(tokens[:, :3])), embedding.words.weight)
    padded = head(layer(embedding(tokens), bias), embedding.words.weight)
    torch.testing.assert_close(padded[:, :3], short)
    with pytest.raises(ValueError, match="9 tokens is longer than the 8"):
        embedding(torch.zeros(1, 9, dtype=torch.long))
