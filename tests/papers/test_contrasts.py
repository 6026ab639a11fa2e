"""Three contrasts on four pairs that a hand can compute, and the denominator that document 4 gets wrong."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from papers.contrasts import clip_loss, hard_negatives, unicl_loss

U = torch.tensor([(1.0, 0.0), (0.0, 1.0), (0.8, 0.6), (-0.6, 0.8)])
V = torch.tensor([(0.6, 0.8), (0.0, 1.0), (1.0, 0.0), (-1.0, 0.0)])
TWINS = torch.tensor([0, 1, 0, 2])                      # texts 0 and 2 are equal
S = 2 * U @ V.T


def test_unicl_takes_the_twin_of_a_text_for_right():
    rows = -(S.log_softmax(1) * (TWINS[:, None] == TWINS) / torch.tensor([2, 1, 2, 1])[:, None]).sum(1)
    torch.testing.assert_close(rows, torch.tensor([0.87186, 0.66320, 0.96759, 1.13457]), atol=1e-5, rtol=0)
    assert unicl_loss(S, TWINS) == pytest.approx(3.63722 + 3.22888, abs=2e-5)
    assert unicl_loss(S, TWINS) / 8 == pytest.approx(0.85826, abs=1e-5)
    assert clip_loss(S) == pytest.approx(0.99826, abs=1e-5)     # to CLIP the twin is a negative
    torch.testing.assert_close(unicl_loss(S, torch.arange(4)) / 8, clip_loss(S))    # without twins: CLIP's


def test_document_4_writes_one_loss_twice():
    """L_im2txt as printed sums exp(V_jᵀL_i β) over j, pictures again; the right one sums over the texts."""
    z = S.T                                             # z_ij = β L_iᵀV_j
    own = z.diagonal()
    text_to_image = -(own - z.logsumexp(1)).mean()
    printed = -(own - torch.stack([torch.stack([S[j, i] for j in range(4)]).logsumexp(0)
                                   for i in range(4)])).mean()
    right = -(own - S.logsumexp(1)).mean()
    assert printed == pytest.approx(text_to_image.item()) == pytest.approx(0.94722, abs=1e-5)
    assert right == pytest.approx(1.04931, abs=1e-5)
    assert clip_loss(S) == pytest.approx((text_to_image + right).item() / 2)


def test_align_smooths_the_labels():
    target = 0.9 * torch.eye(4) + 0.1 / 4
    expected = (F.cross_entropy(S, target) + F.cross_entropy(S.T, target)) / 2
    torch.testing.assert_close(clip_loss(S, smoothing=0.1), expected)
    assert clip_loss(S, smoothing=0.1) > clip_loss(S)


def test_a_hard_negative_is_never_the_own_pair_and_comes_from_the_first_process():
    close = torch.tensor([[9.0, 5.0, 0.0], [0.0, 9.0, 5.0], [5.0, 0.0, 9.0]])
    drawn = torch.stack([hard_negatives(close, generator=torch.Generator().manual_seed(n))
                         for n in range(99)])
    assert (drawn != torch.arange(3)).all() and (drawn == torch.tensor([1, 2, 0])).float().mean() > 0.97
    theirs = torch.tensor([2, 0, 1])
    assert torch.equal(hard_negatives(close, lambda x: torch.cat((theirs, x))), theirs)
