"""Who sees whom is as in the papers and their codes; Q-Former, Flamingo and decoder use the same masks."""
from __future__ import annotations

import pytest
import torch

from bridges import Flamingo, qformer_mask
from conftest import golden, tiny_decoder
from model import DecoderConfig, ImagePositions, causal_mask, visible_keys
from papers.masks import KINDS, MaskedStream, image_mask, stream_mask
from support.lab.masks import PICTURE, draw_masks, panels


def lengths(case: dict) -> torch.Tensor:
    """(B, T) int64: 1 = a real token, 0 = padding."""
    T = int(case["length"].max())
    return (torch.arange(T) < case["length"][:, None]).long()


def test_simvlm_sees_all_of_the_prefix_and_predicts_what_follows_it():
    _, _, x, expected = golden("simvlm-mask")
    real = lengths(x)
    image = (torch.arange(real.shape[1]) < x["image_tokens"]).long().expand_as(real)
    mask = stream_mask("prefix", image, real, x["prefix_len"])
    assert torch.equal((mask & (real[:, :, None] > 0)).long(), expected["mask"])
    t = torch.arange(real.shape[1])
    learned = (t >= x["prefix_len"][:, None]) & (real > 0)
    assert torch.equal(learned.long(), expected["loss_positions"])
    assert not torch.equal((stream_mask("causal", image, real) & (real[:, :, None] > 0)).long(),
                           expected["mask"])


def images_between(tokens: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """(B, T) int64: 1 from a start mark up to its end mark, both included, else 0."""
    opened, closed = (tokens == start).cumsum(1), (tokens == end).cumsum(1)
    return ((opened > closed) | (tokens == end)).long()


def test_show_o_draws_with_sight_of_the_row_and_answers_by_a_prefix():
    _, _, x, expected = golden("show-o-mask")
    image = images_between(x["sequence"], 91, 92)
    assert torch.equal(stream_mask("show-o", image).long(), expected["mask_t2i"])
    hidden = stream_mask("show-o", image, (x["sequence"] != 90).long())
    assert torch.equal(hidden.long(), expected["mask_t2i_pad_removed"])
    end = (x["mmu"] == 92).int().argmax(1) + 1
    mmu = images_between(x["mmu"], 91, 92)
    assert torch.equal(stream_mask("prefix", mmu, prefix=end).long(), expected["mask_mmu"])
    # Transfusion's image does not see the text behind it: here none stands there. The padding in front does
    # not see the image, so what differs is nothing; with words behind, it is that.
    assert torch.equal(stream_mask("transfusion", image).long(), expected["mask_t2i"])
    behind = torch.cat((image, torch.zeros_like(image[:, :2])), dim=1)
    more = stream_mask("show-o", behind) & ~stream_mask("transfusion", behind)
    assert torch.equal(more, (behind[:, :, None] > 0) & (torch.arange(13) > 10))


def test_the_q_former_uses_three_of_them():
    """On every query, and on every word that is no padding."""
    text = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    image = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]).expand(2, -1)
    real = torch.cat((torch.ones(2, 3), text), dim=1).long()
    ours = {"itm": stream_mask("all", image, real), "itg": stream_mask("prefix", image, real, 3),
            "itc": stream_mask("apart", image, real)}
    for kind, mask in ours.items():
        theirs = qformer_mask(kind, 3, text)[:, 0]
        assert torch.equal(mask[real > 0], theirs[real > 0]), kind
    assert torch.equal(ours["itg"], stream_mask("transfusion", image, real))    # one image, in front


@pytest.mark.parametrize("see_all", [False, True])
def test_flamingo_uses_the_mask_of_words_and_latents(see_all, monkeypatch):
    torch.manual_seed(0)
    bridge = Flamingo(DecoderConfig(width=32), 8, every=4, latents=2, depth=1, heads=2, head_width=8,
                      see_all=see_all)
    last = torch.tensor([[0, 1, 1, 2, 2], [1, 1, 1, 1, 1]])
    where = ImagePositions(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 1]), last, last < 0)
    seen = []
    monkeypatch.setattr(bridge.blocks[0], "forward", lambda x, k, v, visible: seen.append(visible) or x)
    bridge.before(0, torch.zeros(2, 5, 32), bridge.see(torch.randn(3, 6, 8), where))
    latents = torch.tensor([1, 1, 2, 2]).expand(2, -1)
    assert torch.equal(image_mask(last, latents, see_all), seen[0])
    assert not seen[0][0, 0].any()                      # a word before the first image


def test_the_decoder_uses_the_causal_one_and_its_packed_form():
    words = torch.zeros(2, 6, dtype=torch.long)
    assert torch.equal(stream_mask("causal", words), causal_mask(6).expand(2, -1, -1))
    document = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3]])
    real = document > 0
    assert torch.equal(stream_mask("causal", words, document)[real], visible_keys(document, 0)[real])


def test_a_span_that_is_written_last_sees_both_sides_and_none_sees_it():
    mask = stream_mask("cm3", torch.zeros(7, dtype=torch.long), order=torch.tensor([0, 1, 5, 6, 2, 3, 4]))
    assert mask[2].tolist() == [True, True, True, False, True, True, True]
    assert not mask[4:, 2:4].any() and torch.equal(mask.sum(1).sort().values, torch.arange(1, 8))


def test_a_mask_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="there is no mask \"sliding\"; known: causal, all, prefix"):
        stream_mask("sliding", torch.zeros(3, dtype=torch.long))


def test_a_decoder_under_a_prefix_mask_sees_the_prefix_in_both_directions():
    """Perturb a token: whose states move? And one token at a time gives what the whole row gives."""
    decoder = tiny_decoder()
    tokens, words = torch.randint(0, 61, (2, 9)), torch.zeros(2, 9, dtype=torch.long)
    stream = MaskedStream()

    def states(tokens: torch.Tensor, kind: str, prefix: int = 4) -> torch.Tensor:
        mask = stream_mask(kind, words[:, :tokens.shape[1]], prefix=prefix)
        return decoder.states(tokens, bridge=stream, visual=mask)[-1]

    with torch.no_grad():
        torch.testing.assert_close(states(tokens, "causal"), decoder.states(tokens)[-1])
        h = states(tokens, "prefix")
        for changed, moved in ((3, range(9)), (6, range(6, 9))):
            other = tokens.clone()
            other[:, changed] = (other[:, changed] + 1) % 61
            differs = (states(other, "prefix") != h).any(-1).all(0)
            assert differs.nonzero()[:, 0].tolist() == [*moved]
        new = decoder.generate(tokens[:, :4], 4, bridge=stream, visual=torch.ones(2, 4, 4).bool())
        whole = tokens[:, :4]
        for _ in range(4):
            whole = torch.cat((whole, decoder.logits(states(whole, "prefix")[:, -1]).argmax(-1)[:, None]), 1)
        assert torch.equal(new, whole[:, 4:])


def test_the_picture_is_drawn_from_the_masks():
    assert PICTURE.read_text(encoding="utf-8") == draw_masks(), "draw it again: python -m support.lab.masks"
    drawn = panels()
    assert all(p.mask.shape == (len(p.rows), len(p.columns)) for p in drawn)
    titles = " ".join(p.title for p in drawn)
    assert all(kind in titles for kind in KINDS)
