"""The words nearest to a soft token are the definition's, and a projection keeps what lies in a plane."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from conftest import shapes_vlm, tiny_vlm
from data import Item
from support.formats.files import UserError
from support.lab.miniatures import clipcap
from support.lab.words import joint_projection, nearest_words
from support.worlds.text import shapes_tokenizer

TOKENIZER = shapes_tokenizer()


def test_a_soft_token_along_an_embedding_has_that_word():
    vlm = shapes_vlm("linear")
    red, = TOKENIZER.encode(" red")
    with torch.no_grad():
        vlm.bridge.map.weight.zero_()
        vlm.bridge.map.bias.copy_(20 * vlm.decoder.embed.weight[red])
        near = nearest_words(vlm, TOKENIZER, torch.zeros(1, 9, 128), k=3)
    assert len(near) == 9 and near[0][0] == (" red", pytest.approx(1, abs=1e-6))
    assert [w for w, _ in near[0]] == [w for w, _ in near[8]]   # cosines of equal rows differ in the last bit
    assert [c for _, c in near[0]] == pytest.approx([c for _, c in near[8]], abs=1e-6)
    e = vlm.decoder.embed.weight.detach()
    cosine = (e @ e[red] / e.norm(dim=1) / e[red].norm()).tolist()
    for word, c in near[0]:
        assert c == pytest.approx(cosine[TOKENIZER.encode(word)[0]], abs=1e-6)
    assert [c for _, c in near[0]] == pytest.approx(sorted(cosine)[:-4:-1], abs=1e-6)


@pytest.mark.parametrize("name", ["zero_init", "flamingo"])
def test_a_bridge_without_soft_tokens_says_so(name):
    with pytest.raises(UserError, match=f"a {name} bridge"):
        nearest_words(tiny_vlm(name, image_token=7), TOKENIZER, torch.zeros(1, 9, 20))


def test_a_projection_of_directions_that_lie_in_a_plane_keeps_their_distances():
    g = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(7, 2, generator=g)).Q
    flat = F.normalize(torch.randn(12, 2, generator=g), dim=-1)
    vectors = (1 + torch.rand(12, 1, generator=g) * 50) * (flat @ plane.T)      # lengths do not count
    visual, words, shares = joint_projection(vectors[:4], vectors[4:])
    assert visual.shape == (4, 2) and words.shape == (8, 2)
    assert sum(shares) == pytest.approx(1) and shares[0] >= shares[1]
    torch.testing.assert_close(torch.cdist(visual, words), torch.cdist(flat[:4], flat[4:]), atol=1e-6, rtol=0)
    x = torch.cat((visual, words))
    assert (x.gather(0, x.abs().argmax(0)[None]) > 0).all() and x.mean(0).abs().max() < 1e-6


def test_the_shares_of_a_projection_are_those_of_the_covariance():
    vectors = F.normalize(torch.randn(40, 9, generator=torch.Generator().manual_seed(1)).double(), dim=-1)
    _, _, shares = joint_projection(vectors[:10], vectors[10:])
    values = torch.linalg.eigvalsh(torch.cov(vectors.T)).flip(0)
    assert shares == pytest.approx((values[:2] / values.sum()).tolist())


def test_words_of_a_prefix_name_the_picture_the_next_one_or_neither(monkeypatch):
    """Two pictures, two soft tokens each, whose words are given."""
    items = [Item(None, [], [], "a", "a small red ring at the top left"),
             Item(None, [], [], "b", "a large red cross at the top left; a small blue ring at the top right")]
    words = iter([" red", " a", " red", " cross"])
    monkeypatch.setattr(clipcap, "vision_features", lambda *_, **__: torch.zeros(2, 1, 4))
    monkeypatch.setattr(clipcap, "nearest_words", lambda *_, **__: [[(next(words), 1.0)] for _ in range(2)])
    found = clipcap.measure_prefix_words(SimpleNamespace(vlm=None, tokenizer=None, items=items))
    assert found == {"named": 3 / 4, "of another": 2 / 4, "equal": 1 / 2}
