"""Claim: pictures become the published processor's pixels, exactly the answers are supervised, batches pad
on one side, and the `shapes` world holds out what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
from conftest import GOLDEN, SMALL, TINY_VIT, tiny_vlm
from model import IGNORE, IMAGE
from papers import ALL_BRIDGES
from support.formats.pictures import read_image
from support.worlds.text import shapes_tokenizer

# --- pictures -----------------------------------------------------------------------------------------------

PICTURES = GOLDEN / "image-processors"


@pytest.mark.parametrize("file", sorted(p.name for p in (PICTURES / "images").iterdir()))
def test_pixels_are_those_of_the_published_clip_processor(file):
    """19 awkward pictures, read and processed. The bound is the case's own, a quarter of a grey level
    (float16 storage costs up to 1e-3); JPEG decoders differ by a level here and there."""
    expected = load_file(PICTURES / "expected.safetensors")
    image = read_image(PICTURES / "images" / file)
    bound = 0.05 if file.endswith(".jpg") else 0.004
    mine = data.to_pixels([image], 32)[0]
    assert (mine - expected[f"{file}/clip"].float()).abs().max() <= bound
    for key, size in ((f"{file}/full/clip", 224), (f"{file}/full/clip336", 336)):
        if key in expected:
            assert (
                data.to_pixels([image], size)[0][:, ::7, ::7] - expected[key].float()
            ).abs().max() <= bound


def test_pictures_of_different_sizes_make_one_batch():
    images = [
        np.full((h, w, 3), 128, np.uint8) for h, w in ((48, 48), (1, 1), (7, 300), (1, 5000), (5000, 1))
    ]
    pixels = data.to_pixels(images, 48)
    assert pixels.shape == (5, 3, 48, 48) and pixels.dtype == torch.float32
    assert torch.equal(pixels, pixels[:1].expand_as(pixels))  # one grey is one grey, however thin the picture


# --- documents ----------------------------------------------------------------------------------------------


def test_supervised_tokens_are_the_answers_and_their_ends():
    t = shapes_tokenizer()
    d = (
        data.Document(t)
        .image()
        .turn("\nQuestion: what color is the ring? Answer:", "blue")
        .turn(data.CAPTION, "a red circle")
    )
    learned = [i for i in d.labels if i != IGNORE]
    assert learned == [*t.encode(" blue"), t.eos, *t.encode(" a red circle"), t.eos]
    assert all(label in (token, IGNORE) for token, label in zip(d.tokens, d.labels))
    assert d.tokens[:2] == [t.bos, IMAGE]


@pytest.mark.parametrize("left", [False, True])
def test_collating_pads_on_one_side_and_masks_the_padding(left):
    t = shapes_tokenizer()
    documents = [
        data.Document(t).turn(data.CAPTION, c) for c in ("a red circle", "a large blue ring at the top left")
    ]
    tokens, labels, mask = data.collate(documents, left)
    for row, d in enumerate(documents):
        assert tokens[row][mask[row]].tolist() == d.tokens and labels[row][mask[row]].tolist() == d.labels
        assert bool(mask[row, -1 if left else 0]) and (labels[row][~mask[row]] == IGNORE).all()


@pytest.mark.parametrize("left", [False, True])
def test_the_first_token_of_a_document_is_not_counted_as_learned(left):
    """Where a tokenizer puts no token ahead of a text, nothing predicts its first one."""
    texts = [data.Document(shapes_tokenizer()) for _ in range(3)]
    for d, ids in zip(texts, ([7, 8, 9, 10], [7, 8], [])):
        d.tokens, d.labels = [], []
        d.ids(ids, learn=True)
    tokens, labels, mask = data.collate(texts, left)
    vlm = tiny_vlm("linear")
    assert int((labels != IGNORE).sum()) == 4 == vlm.loss(tokens[:2], labels[:2], mask=mask[:2])[1]


# --- the `shapes` world

def test_training_never_shows_or_mentions_a_held_out_shape():
    words = [f"{c} {s}" for c, s in data.HELD_OUT]
    for i in range(500):
        item = data.Shapes("train").item(i, turns=5)
        assert not any(w in text for w in words for text in (*item.captions, *(q.question for q in item.qas)))
        assert any(w in data.Shapes("test").item(i).captions[0] for w in words)


# --- documents packed into one row: losses and gradients as alone, and no leak

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


@pytest.mark.parametrize("bridge", [name for name in SMALL if ALL_BRIDGES[name].soft_tokens])
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
        learned = [p.grad for p in vlm.bridge.parameters() if p.grad is not None]
        grads.append(torch.cat([grad.flatten() for grad in learned]))
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
