"""Beam search is its definition."""

import pytest
import torch

from conftest import tiny_decoder
from eval import generate_ids
from support.plumbing.beams import beam_search

PROMPT = torch.randint(61, (3, 4), generator=torch.Generator().manual_seed(5))


def total_logp(decoder, prompt, new):
    with torch.no_grad():
        logp = decoder(torch.cat((prompt, new), 1)).log_softmax(-1)[:, prompt.shape[1] - 1:-1]
    return logp.gather(2, new[..., None]).sum((1, 2))


def test_one_beam_is_greedy(decoder):
    assert torch.equal(beam_search(decoder, PROMPT, 9, beams=1), decoder.generate(PROMPT, 9))
    assert torch.equal(generate_ids(decoder, PROMPT, 9, beams=1), decoder.generate(PROMPT, 9))


def test_more_beams_find_sequences_at_least_as_likely_as_greedy():
    gained = 0
    for seed in range(4):
        decoder = tiny_decoder(seed)
        greedy, beam = decoder.generate(PROMPT, 6), beam_search(decoder, PROMPT, 6, beams=5)
        gain = total_logp(decoder, PROMPT, beam) - total_logp(decoder, PROMPT, greedy)
        assert (gain > -1e-4).all()  # float32 sums of 6 log-probabilities
        gained += int((gain > 1e-3).sum())
    assert gained > 0  # and somewhere it is a real gain


def test_as_many_beams_as_words_search_exhaustively():
    decoder = tiny_decoder(vocab_size=7)  # 7 beams and 2 steps: all 49 continuations are seen
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    best = [pairs[total_logp(decoder, row.expand(49, -1), pairs).argmax()] for row in prompt]
    assert torch.equal(beam_search(decoder, prompt, 2, beams=7), torch.stack(best))


def beams_by_hand(decoder, row, steps, W, stop=(), penalty=1.0):
    """Beam search of one row as a loop, everything recomputed: an ended beam keeps its score."""
    def rank(beam):
        return beam[0] / beam[2] ** penalty
    beams = [(0.0, row, 0, False)]  # log p, text, words written, ended
    for _ in range(steps):
        grown = [b for b in beams if b[3]]
        for score, text, n, _ in (b for b in beams if not b[3]):
            with torch.no_grad():
                logp = decoder(text[None])[0, -1].log_softmax(-1)
            grown += [
                (score + float(p), torch.cat((text, i[None])), n + 1, int(i) in stop)
                for p, i in zip(*logp.topk(W))
            ]
        beams = sorted(grown, key=rank, reverse=True)[:W]
    return max(beams, key=rank)[1][len(row):].tolist()


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beam_search_is_the_loop_without_a_cache(seed, stopping, penalty):
    decoder = tiny_decoder(seed)
    stop = tuple(int(t) for t in decoder.generate(PROMPT, 3)[:, 2]) if stopping else ()
    rows = [beams_by_hand(decoder, row, 6, 3, stop, penalty) for row in PROMPT]
    if penalty < 2:  # which is the largest reward for going on
        assert (min(map(len, rows)) < 6) == stopping                            # something does stop early
    kw = dict(max_new_tokens=6, beams=3, stop=stop, length_penalty=penalty)
    mask = torch.tensor([[0] * 3 + [1] * 4] * 3).bool()  # left padding changes nothing here either
    padded = torch.cat((torch.zeros(3, 3, dtype=torch.long), PROMPT), 1)
    padded = beam_search(decoder, padded, mask=mask, **kw)
    for mine in (beam_search(decoder, PROMPT, **kw), padded):
        for ids, row in zip(mine.tolist(), rows):
            assert ids == row + [row[-1]] * (len(ids) - len(row))


def test_all_rows_that_have_stopped_end_the_search(decoder):
    stop = tuple(decoder.generate(PROMPT, 12)[:, 2].tolist())
    assert beam_search(decoder, PROMPT, 12, beams=3, stop=stop).shape[1] <= 12


def test_at_least_one_token_must_be_asked_for(decoder):
    for beams in (1, 3):
        with pytest.raises(ValueError, match="max_new_tokens is 0"):
            generate_ids(decoder, PROMPT, 0, beams)
