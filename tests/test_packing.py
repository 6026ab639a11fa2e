"""Claim: documents packed into one row, with walls between them, give what they give alone: losses, gradients, and no leak."""

from __future__ import annotations

import pytest
import torch

from conftest import TINY_VIT, tiny_vlm
from model import IGNORE, IMAGE


def documents(seed: int, images: bool) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(8, 60, (n,), generator=g) for n in (6, 9, 4, 7)]
    for row, at in zip(rows, (0, 3, None, 6) if images else ()):
        if at is not None:
            row[at] = IMAGE
    return rows


def pack(rows: list[list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    T = max(sum(map(len, row)) for row in rows)
    tokens, mask = torch.zeros(len(rows), T, dtype=torch.long), torch.zeros(len(rows), T, dtype=torch.long)
    for b, row in enumerate(rows):
        line = torch.cat(row)
        tokens[b, :len(line)] = line
        mask[b, :len(line)] = torch.cat([torch.full((len(d),), n) for n, d in enumerate(row, 1)])
    labels = tokens.masked_fill((mask == 0) | (tokens == IMAGE), IGNORE)
    first = (
        mask != torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    )  # a document's first word has nothing before it
    return tokens, labels.masked_fill(first, IGNORE), mask


@pytest.mark.parametrize("bridge", ["linear", "mapl", "qformer"])
def test_packed_equals_unpacked(bridge):
    vlm, rows = tiny_vlm(bridge), documents(0, images=True)
    features = torch.randn(3, TINY_VIT.tokens, TINY_VIT.width, generator=torch.Generator().manual_seed(1))
    losses, grads = [], []
    for layout in ([[r] for r in rows], [rows[:2], rows[2:]], [rows]):
        tokens, labels, mask = pack(layout)
        vlm.zero_grad()
        total, n = vlm.loss(tokens, labels, mask=mask if len(layout) < 4 else mask.bool(), features=features)
        total.backward()
        losses.append((total.item(), n))
        grads.append(torch.cat([p.grad.flatten() for p in vlm.bridge.parameters()]))
    for (loss, n), grad in zip(losses[1:], grads[1:]):
        assert n == losses[0][1]
        assert abs(loss - losses[0][0]) < 1e-4  # float32 sums of ~25 terms of size 4 in another order
        assert (grad - grads[0]).abs().max() < 1e-4 * grads[0].abs().max()


def test_no_word_reads_over_a_wall():
    vlm, rows = tiny_vlm("linear"), documents(3, images=False)
    tokens, _, mask = pack([rows])
    before = vlm.decoder(tokens, mask)
    for n in range(1, 5):  # change one document: no other one notices, to the bit
        changed = torch.where(mask == n, (tokens + 1) % 60, tokens)
        after = vlm.decoder(changed, mask)
        same = mask[0] != n
        assert torch.equal(before[0, same], after[0, same]) and not torch.equal(
            before[0, ~same], after[0, ~same]
        )


def test_an_image_is_seen_by_its_own_document_alone():
    vlm, rows = tiny_vlm("linear"), documents(0, images=True)
    features = torch.randn(3, TINY_VIT.tokens, TINY_VIT.width, generator=torch.Generator().manual_seed(1))
    tokens, _, mask = pack([rows])
    inputs, _ = vlm.prepare(tokens, features, mask)
    owner = inputs["mask"][0]
    before = vlm.decoder(**inputs)
    features[1] += 1.0                                                           # the image of document 2
    inputs, _ = vlm.prepare(tokens, features, mask)
    after = vlm.decoder(**inputs)
    assert torch.equal(before[0, owner != 2], after[0, owner != 2]) and not torch.equal(
        before[0, owner == 2], after[0, owner == 2]
    )
    assert (owner == 2).sum() == 8 + TINY_VIT.tokens  # eight words and the unfolded image


def test_recomputed_activations_give_the_same_gradients():
    vlm, rows = tiny_vlm("flamingo"), documents(0, images=True)
    tokens, labels, mask = pack([[r] for r in rows])
    features = torch.randn(3, TINY_VIT.tokens, TINY_VIT.width, generator=torch.Generator().manual_seed(1))
    grads = []
    for vlm.decoder.checkpoint in (False, True):
        vlm.zero_grad()
        vlm.loss(tokens, labels, mask=mask.bool(), features=features)[0].backward()
        grads.append([p.grad.clone() for p in vlm.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) and all(torch.equal(a, b) for a, b in zip(*grads))
