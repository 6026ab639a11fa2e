"""Beam search is its definition, and the reference's."""

import itertools
import math

import pytest
import torch

from conftest import tiny_decoder
from eval import generate_ids
from support.formats.llama import save_decoder
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
    """Beam search of one row as a loop, everything recomputed: the tokens of the best ended text."""
    growing, ended = [(0.0, [])], []                    # (log p, tokens); (log p / n^penalty, tokens)
    for n in range(1, steps + 1):
        candidates = []
        for total, text in growing:
            tokens = torch.cat((row, torch.tensor(text, dtype=torch.long)))[None]
            with torch.no_grad():
                logp = decoder(tokens)[0, -1].log_softmax(-1)
            candidates += [(total + float(p), [*text, token]) for token, p in enumerate(logp)]
        candidates.sort(reverse=True)
        finished = [n == steps or text[-1] in stop for _, text in candidates]
        ended += [(total / n**penalty, text) for (total, text), end in zip(candidates[:W], finished) if end]
        ended = sorted(ended, reverse=True)[:W]
        growing = [c for c, end in zip(candidates, finished) if not end][:W]
        if len(ended) == W and (not growing or growing[0][0] / n**penalty <= ended[-1][0]):
            break
    return ended[0][1]


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beam_search_is_the_loop_without_a_cache(seed, stopping, penalty):
    decoder = tiny_decoder(seed)
    stop = tuple(int(t) for t in decoder.generate(PROMPT, 3)[:, 2]) if stopping else ()
    rows = [beams_by_hand(decoder, row, 6, 3, stop, penalty) for row in PROMPT]
    if penalty < 1:                                     # without a reward for going on
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
    ids = beam_search(decoder, PROMPT, 12, beams=3, stop=stop)
    assert not torch.isin(ids[:, :-1], torch.tensor(stop)).all(0).any()     # no column behind all the ends


@pytest.mark.parametrize("seed", [0, 1])
def test_beam_search_finds_what_transformers_finds(seed, tmp_path):
    transformers = pytest.importorskip("transformers")
    decoder = tiny_decoder(seed, vocab_size=(5, 61)[seed % 2])
    save_decoder(decoder, tmp_path)
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    tokens = PROMPT % decoder.config.vocab_size
    mask = torch.arange(4) >= torch.tensor([[0], [1], [3]])
    for beams, penalty, stop, steps in itertools.product((2, 4), (-1.0, 0.0, 1.0, 2.0), ((), (3,), (3, 2)),
                                                         (1, 6)):
        with torch.no_grad():
            theirs = reference.generate(
                tokens, attention_mask=mask.long(), max_new_tokens=steps, do_sample=False, num_beams=beams,
                length_penalty=penalty, pad_token_id=0, eos_token_id=list(stop) or None)[:, 4:]
        mine = beam_search(decoder, tokens, steps, beams, penalty, stop, mask=mask)
        for a, b in zip(theirs.tolist(), mine.tolist()):
            ends = [[i for i, token in enumerate(ids) if token in stop] for ids in (a, b)]
            assert a[:ends[0][0] + 1 if ends[0] else None] == b[:ends[1][0] + 1 if ends[1] else None]


@pytest.mark.parametrize("arguments", [dict(beams=0), dict(beams=-2), dict(beams=1.5), dict(beams=math.nan),
                                       dict(length_penalty=math.nan), dict(length_penalty=math.inf)])
def test_a_number_of_the_search_outside_its_bounds_is_named(decoder, arguments):
    (name, value), = arguments.items()
    with pytest.raises(ValueError, match=f"{name} {value}"):
        beam_search(decoder, PROMPT, 3, **arguments)


def test_at_least_one_token_must_be_asked_for(decoder):
    for beams in (1, 3):
        with pytest.raises(ValueError, match="max_new_tokens is 0"):
            generate_ids(decoder, PROMPT, 0, beams)
