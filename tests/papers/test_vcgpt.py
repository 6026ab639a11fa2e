"""VC-GPT adds the logits of a second reader: its hand example, and what the decoder alone would say."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import train
from conftest import TINY, fixed_loss, shapes_vlm, tiny_vlm
from model import IGNORE, IMAGE, DecoderConfig
from papers import make_bridge
from papers.vcgpt import VCGPT
from support.formats.files import UserError
from support.lab.claims import TrainedArm
from support.lab.miniatures.vcgpt import measure_text
from support.worlds.text import shapes_tokenizer

ROWS = torch.tensor([[3, IMAGE, 5, 6, 8], [IMAGE, 4, IMAGE, 9, 2]])


def images(m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, 10, 20, generator=torch.Generator().manual_seed(seed))


def by_hand(fuse: str) -> VCGPT:
    """One fusion layer of width 2 whose matrices are 1, without norms and feed-forward; W^fuse = ½."""
    config = DecoderConfig(vocab_size=2, width=2, layers=1, heads=1, kv_heads=1, head_width=2)
    bridge = make_bridge("vcgpt", config, 2, layers=1, heads=1, hidden=4, fuse=fuse)
    layer = bridge.blocks[0]
    layer.norm1 = nn.Identity()
    with torch.no_grad():
        for f in (layer.q, layer.k, layer.v, layer.o):
            f.weight.copy_(torch.eye(2))
            f.bias.zero_()
        layer.down.weight.zero_()
        layer.down.bias.zero_()
        bridge.vocabulary.weight.copy_(torch.eye(2) / 2)
    return bridge


@pytest.mark.parametrize("fuse, logits, p", [
    ("ensemble", (1.6651, 3.3349), (0.1585, 0.8415)), ("alone", (0.6651, 1.3349), (0.3385, 0.6615))])
def test_the_hand_example(fuse, logits, p):
    bridge, h, picture = by_hand(fuse), torch.tensor([[[1.0, 2.0]]]), torch.eye(2)[None]
    where = tiny_vlm("vcgpt", image_token=7).prepare(torch.tensor([[IMAGE]]), images(1))[0]["visual"]["where"]
    both = bridge.finish(h, bridge.see(picture, where))
    torch.testing.assert_close(both[0, 0], torch.tensor([1, 2, 1.3302, 2.6698]), atol=1e-4, rtol=0)
    found = bridge.head(both, lambda x: x)[0, 0]
    torch.testing.assert_close(found, torch.tensor(logits), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.softmax(-1), torch.tensor(p), atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["no padding", "left", "right"])
def test_at_w_fuse_zero_logits_loss_and_text_are_the_plain_decoders_to_the_bit(side):
    vlm = tiny_vlm("vcgpt", image_token=7)
    with torch.no_grad():
        assert (vlm(ROWS, features=images(3)) - vlm.decoder(ROWS.masked_fill(ROWS < 0, 7))).abs().max() > 1e-2
        vlm.bridge.vocabulary.weight.zero_()
    mask = torch.ones_like(ROWS, dtype=torch.bool)
    if side != "no padding":
        mask[0, 0 if side == "left" else -1] = False
    plain, labels = ROWS.masked_fill(ROWS < 0, 7), ROWS.masked_fill((ROWS < 0) | ~mask, IGNORE)
    with torch.no_grad():
        assert torch.equal(vlm(ROWS, mask=mask, features=images(3)), vlm.decoder(plain, mask))
        loss, n = vlm.loss(ROWS, labels, mask=mask, features=images(3))
        logits = vlm.decoder(plain, mask)[:, :-1].flatten(0, 1)
        theirs = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        torch.testing.assert_close(loss, theirs)
        ids = vlm.generate(ROWS, features=images(3), mask=mask, max_new_tokens=6)
        assert torch.equal(ids, vlm.decoder.generate(plain, 6, mask=mask))


def test_both_readers_learn_and_the_first_is_untouched_by_the_second():
    """The logits are the plain decoder's and a second term that is linear in W^fuse."""
    vlm = tiny_vlm("vcgpt", image_token=7)
    plain = vlm.decoder(ROWS.masked_fill(ROWS < 0, 7))
    with torch.no_grad():
        once = vlm(ROWS, features=images(3)) - plain
        vlm.bridge.vocabulary.weight *= 3
        thrice = vlm(ROWS, features=images(3)) - plain
    torch.testing.assert_close(thrice, 3 * once, atol=1e-4, rtol=1e-4)
    fixed_loss(vlm(ROWS, features=images(3))).backward()
    assert vlm.bridge.vocabulary.weight.grad.any() and vlm.decoder.lm_head.weight.grad.any()
    assert all(p.grad is not None and p.grad.any() for name, p in vlm.bridge.named_parameters()
               if name.endswith(("q.weight", "v.weight", "up.weight")))


@pytest.mark.parametrize("fuse", ["ensemble", "alone", "inside"])
def test_who_sees_what(fuse):
    """A word reads its own last picture: words before it are those of the text alone."""
    vlm = tiny_vlm("vcgpt", image_token=7, fuse=fuse)
    tokens, other = torch.tensor([[3, 4, IMAGE, 5, IMAGE, 6]]), images(2)
    other[1] = images(1, 5)[0]
    with torch.no_grad():
        a, b = vlm(tokens, features=images(2)), vlm(tokens, features=other)
        text = vlm(torch.tensor([[3, 4]]))
        plain = vlm.decoder(torch.tensor([[3, 4]]))
    assert (a != b).any(-1)[0].nonzero().flatten().tolist() == [4, 5]
    torch.testing.assert_close(a[:, :2], text, atol=1e-5, rtol=1e-5)    # products of matrices of other sizes
    assert torch.equal(text, plain) == (fuse == "ensemble")


def test_the_ensemble_reads_the_picture_above_the_layers_only():
    vlm = tiny_vlm("vcgpt", image_token=7)
    with torch.no_grad():
        _, mine = vlm(ROWS, features=images(3), return_hidden=True)
        _, plain = vlm.decoder(ROWS.masked_fill(ROWS < 0, 7), return_hidden=True)
    assert all(torch.equal(a, b) for a, b in zip(mine[:-1], plain[:-1]))
    assert torch.equal(mine[-1][..., :32], plain[-1]) and mine[-1].shape[-1] == 64


def test_sizes_and_impossible_options():
    gpt2 = DecoderConfig(vocab_size=50257, width=768, layers=12)
    with torch.device("meta"):
        bridge, inside = (make_bridge("vcgpt", gpt2, 768, fuse=fuse) for fuse in ("ensemble", "inside"))
    block = 12 * 768**2 + 13 * 768                          # GPT-2's: four projections, a feed-forward of 4 D
    assert sum(p.numel() for p in bridge.parameters()) == block + 50257 * 768
    assert sum(p.numel() for p in inside.parameters()) == block
    deep = dict(fuse="inside", layers=5, heads=2)
    for options, message in ((dict(fuse="both"), 'fuse ensemble, alone, inside, not "both"'),
                             (deep, "5 fusion layers inside a decoder of 4"),
                             (dict(heads=5), "width 32 does not divide into 5 heads")):
        with pytest.raises(ValueError, match=message):
            make_bridge("vcgpt", TINY, 20, **options)


def test_packing_is_refused(tmp_path):
    with pytest.raises(UserError, match="--pack: a vcgpt bridge reaches into the layers"):
        train.main(["--bridge", "vcgpt", "--pack", "--out", str(tmp_path)])


def test_the_miniature_measures_text_that_an_ensemble_leaves_alone():
    """The bundled decoder answers about scenes in words; fuse="alone" asks the second reader, who cannot."""
    nats = {}
    for fuse in ("ensemble", "alone"):
        vlm = shapes_vlm("vcgpt", heads=4, fuse=fuse)
        nats[fuse] = measure_text(TrainedArm(vlm, shapes_tokenizer(), [None] * 8, Path()))["text"]
    assert nats["ensemble"] < 0.5 < 4 < nats["alone"]
