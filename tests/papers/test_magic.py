"""MAGiC's search is the authors', term by term; its limits are greedy decoding and contrastive search."""
from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, check, golden, stir, tiny_decoder
from data import CAPTION, Item
from model import ViT, ViTConfig
from papers.clip import CLIP, TextConfig, TextTransformer
from papers.magic import MAGiC, Settings, contrastive_loss, magic_score, magic_search
from support.formats import load_clip, load_decoder
from support.worlds.text import shapes_tokenizer

SETTINGS = golden("magic-search")[1]["settings"]
PROMPT = torch.tensor([[1, 7, 3]])


@cache
def models():
    folder = golden("magic-search")[0]
    return load_decoder(folder / "lm"), load_clip(folder / "clip")


def no_match(ids: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the picture has no weight")


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("n", range(len(SETTINGS)))
def test_the_search_is_the_authors(n, image):
    _, case, x, expected = golden("magic-search")
    decoder, clip = models()

    def match(ids):
        """The language model's ids serve as CLIP's, between its start (41) and its end (42)."""
        text = F.pad(F.pad(ids, (1, 0), value=41), (0, 1), value=42)
        return clip(x["pixels"][image:image + 1], text)[0]
    settings = Settings(**SETTINGS[n], steps=case["steps"])
    ids, trace = magic_search(decoder, torch.tensor([case["prefix_ids"]]), match, settings)
    here = f"setting{n}.image{image}"
    check(case, f"{here}.ids", ids, expected[f"{here}.ids"])
    for term in ("candidates", "confidence", "penalty", "magic", "score"):
        if f"{here}.{term}" in expected:
            mine = torch.stack([getattr(step, term) for step in trace])
            check(case, f"{here}.{term}", mine, expected[f"{here}.{term}"])


def test_the_score_by_hand():
    """p .6 and .3, penalties .9 and .5, similarities 1 and 2: the picture turns the choice."""
    magic, score = magic_score(*map(torch.tensor, ((.6, .3), (.9, .5), (1., 2.))), alpha=0.1, beta=2.0)
    torch.testing.assert_close(magic, torch.tensor([.2689, .7311]), atol=1e-4, rtol=0)
    torch.testing.assert_close(score, torch.tensor([.9879, 1.6821]), atol=2e-4, rtol=0)
    assert score.argmax() == 1


@pytest.mark.parametrize("settings", [Settings(9, 0.0, 0.0, 12), Settings(1, 0.6, 0.0, 12),
                                      Settings(1, 0.3, 2.0, 12)],
                         ids=["no weights", "one candidate", "one candidate and the picture"])
def test_without_weights_or_with_one_candidate_it_is_greedy(settings):
    decoder = tiny_decoder()
    ids, _ = magic_search(decoder, PROMPT, lambda ids: torch.ones(len(ids)), settings)
    assert torch.equal(ids, decoder.generate(PROMPT, max_new_tokens=12)[0])


def search_without_cache(decoder, match, k, alpha, beta, steps):
    """The search spelled out: every candidate's whole sequence is read again."""
    ids = PROMPT[0].tolist()
    for _ in range(steps):
        p = decoder(torch.tensor([ids]))[0, -1].softmax(-1)
        scores, candidates = [], p.topk(k).indices.tolist()
        texts = torch.tensor([ids[PROMPT.shape[1]:] + [v] for v in candidates])
        f = match(texts).softmax(0) if beta else torch.zeros(k)
        for n, v in enumerate(candidates):
            h = decoder.states(torch.tensor([ids + [v]]))[-1][0]
            alike = F.cosine_similarity(h[-1:], h[:-1]).max()
            scores.append((1 - alpha) * p[v] - alpha * alike + beta * f[n])
        ids.append(candidates[int(torch.stack(scores).argmax())])
    return torch.tensor(ids[PROMPT.shape[1]:])


@pytest.mark.parametrize("changes", [{}, {"window": 4}, {"kv_heads": 4}], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_the_forked_cache_equals_recomputation(changes, beta):
    decoder = tiny_decoder(**changes)
    taste = torch.randn(61, generator=torch.Generator().manual_seed(5))

    def match(ids):
        return taste[ids].sum(1)
    with torch.no_grad():
        slow = search_without_cache(decoder, match, 5, 0.5, beta, 7)
    ids, trace = magic_search(decoder, PROMPT, match if beta else no_match, Settings(5, 0.5, beta, 7))
    assert torch.equal(ids, slow) and len(trace) == 7
    assert not torch.equal(ids, decoder.generate(PROMPT, max_new_tokens=7)[0])


def test_it_ends_with_a_stop_token_and_has_no_more_candidates_than_words():
    decoder = tiny_decoder()
    ids, _ = magic_search(decoder, PROMPT, no_match, Settings(5, 0.3, 0.0, 8))
    short, trace = magic_search(decoder, PROMPT, no_match, Settings(5, 0.3, 0.0, 8), stop=(int(ids[2]),))
    first = ids.tolist().index(int(ids[2]))
    assert torch.equal(short, ids[:first + 1]) and len(trace) == len(short)
    _, trace = magic_search(decoder, PROMPT, no_match, Settings(900, 0.3, 0.0, 2))
    assert len(trace[0].candidates) == 61


@pytest.mark.parametrize("settings, words", [
    (dict(k=0), "k is 0"), (dict(steps=0), "steps 0"), (dict(alpha=1.5), "alpha is 1.5"),
    (dict(beta=-1.0), "beta -1.0"), (dict(beta=float("nan")), "beta nan")])
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Settings(**settings)


@pytest.mark.parametrize("prompt", [torch.zeros(1, 0, dtype=torch.long), torch.ones(1, 40, dtype=torch.long)])
def test_a_prompt_that_does_not_fit_the_decoder_is_refused(prompt):
    with pytest.raises(ValueError, match="do not fit this decoder, which reads 1 to 48"):
        magic_search(tiny_decoder(context=48), prompt, no_match, Settings(steps=9))


def test_the_contrastive_loss_by_hand():
    """States at 0, 60 and 90 degrees: cosines .5, 0 and .866 of three pairs; the margin leaves 0, 0, .366."""
    angle = torch.deg2rad(torch.tensor([0., 60., 90.]))
    hidden = torch.stack((angle.cos(), angle.sin()), dim=-1)[None] * torch.tensor([1., 3., .5])[:, None]
    torch.testing.assert_close(contrastive_loss(hidden), torch.tensor((3 ** 0.5 / 2 - 0.5) / 3))
    real = torch.tensor([[True, True, False]])
    assert contrastive_loss(hidden, real) < 1e-6 and contrastive_loss(hidden[:, :1]) == 0
    torch.testing.assert_close(contrastive_loss(hidden, real, margin=0.6), torch.tensor(0.1))
    both = torch.cat((hidden, hidden))          # the mean is over pairs, not over texts
    real = torch.tensor([[True, True, True], [True, True, False]])
    torch.testing.assert_close(contrastive_loss(both, real), torch.tensor((3 ** 0.5 / 2 - 0.5) * 2 / 8))


def test_captions_say_what_clip_sees():
    """The bundled decoder writes; a stand-in for CLIP likes one colour, and that colour is written."""
    decoder, tokenizer = load_decoder(ROOT / "weights/decoder"), shapes_tokenizer()
    colors = ["red", "blue"]
    items = [Item(None, [], [], id=color) for color in colors]

    def embed_images(items):
        return torch.eye(2)[[colors.index(item.id) for item in items]]

    def embed_texts(texts):
        return torch.tensor([[float(color in text) for color in colors] for text in texts])
    magic = MAGiC(decoder, tokenizer, embed_images, embed_texts, settings=Settings(10, 0.1, 2.0, 6))
    texts = magic.answer(items)
    assert all(color in text for color, text in zip(colors, texts)) and magic.answer([]) == []
    blind = MAGiC(decoder, tokenizer, embed_images, embed_texts, settings=Settings(10, 0.0, 0.0, 6))
    prompt = torch.tensor([[*tokenizer.begin, *tokenizer.encode(CAPTION)]])
    ids = decoder.generate(prompt, max_new_tokens=6, stop=tokenizer.stop)[0]
    assert blind.answer(items) == [tokenizer.answer_text(ids)] * 2


def test_clip_of_papers_serves_both_embeddings():
    """The whole way with the two towers of papers/clip.py."""
    tokenizer = shapes_tokenizer()
    text = TextTransformer(TextConfig(tokenizer.vocab_size, 16, 1, 2, 32, 64, end=tokenizer.eos))
    vit = ViT(ViTConfig(image_size=24, patch=8, width=16, layers=1, heads=2, hidden=32))
    clip = stir(CLIP(vit, text, 12))
    pixels, lengths = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(3)), []

    def embed_texts(texts):
        rows = [[*tokenizer.encode(t), tokenizer.eos] for t in texts]
        lengths.append(max(map(len, rows)))
        width = max(map(len, rows))
        return clip.embed_texts(torch.tensor([row + [tokenizer.eos] * (width - len(row)) for row in rows]))
    decoder = tiny_decoder(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        magic = MAGiC(decoder, tokenizer, lambda items: clip.embed_images(pixels[:len(items)]), embed_texts,
                      settings=Settings(4, 0.1, 2.0, 5))
        texts = magic.answer([Item(None, [], []), Item(None, [], [])])
    assert len(texts) == 2 and max(lengths) > 2
