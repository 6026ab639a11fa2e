"""papers/siglip.py: the loss by hand, the pooling head, and a text that is read at its last position."""
from __future__ import annotations

import math

import pytest
import torch

from conftest import stir
from papers.clip import TextConfig
from papers.siglip import Siglip, SiglipConfig, SiglipText, SiglipViT, sigmoid_loss

SMALL = dict(image_size=24, patch=8, width=16, layers=2, heads=2, hidden=24)


def test_the_loss_is_the_hand_example_and_knows_no_other_row():
    ln3 = math.log(3.0)
    S = torch.tensor([[0.0, -ln3], [-ln3, ln3]])
    torch.testing.assert_close(sigmoid_loss(S), torch.tensor((math.log(2) + 3 * math.log(4 / 3)) / 2))
    assert abs(sigmoid_loss(S).item() - 0.7781) < 1e-4                          # the number in its docstring
    S.requires_grad_()
    sigmoid_loss(S).backward()
    torch.testing.assert_close(S.grad, torch.tensor([[-0.5, 0.25], [0.25, -0.25]]) / 2)  # ∂ = −z σ(−z S)/B


def test_at_the_start_a_pair_is_taken_for_no_match():
    text = SiglipText(TextConfig(vocab_size=20, width=16, layers=1, heads=2, hidden=24, context=4), 16)
    pair = Siglip(SiglipViT(SiglipConfig(**SMALL)), text)
    assert pair.logit_scale.exp().item() == pytest.approx(10) and pair.logit_bias.item() == -10
    with torch.no_grad():
        S = pair(torch.randn(3, 3, 24, 24), torch.randint(20, (2, 4)))
    assert S.shape == (3, 2) and (S <= 0).all()                                 # −10 + 10 · a cosine


def test_a_padded_text_is_read_at_its_last_position_and_sees_its_padding():
    text = stir(SiglipText(TextConfig(vocab_size=20, width=16, layers=2, heads=2, hidden=24, context=6), 16))
    tokens = torch.tensor([[5, 6, 7, 1, 1, 1]])
    states = text(tokens)
    assert torch.equal(text.pool(states, tokens), text.head(states[:, -1]))
    later = tokens.clone()
    later[0, 5] = 9
    assert not torch.equal(text(later)[:, 0], states[:, 0])                     # not causal


def test_the_head_reads_all_tokens_and_a_tower_without_one_says_so():
    vit = stir(SiglipViT(SiglipConfig(**SMALL)))
    x = torch.randn(1, 9, 16)
    with torch.no_grad():
        plain = vit.pool(x)
        assert plain.shape == (1, 16)
        for n in range(9):
            moved = x.clone()
            moved[0, n] += torch.randn(16)
            assert not torch.equal(vit.pool(moved), plain)
    with pytest.raises(ValueError, match="no pooling head"):
        SiglipViT(SiglipConfig(**SMALL, head=False)).pool(x)
