"""An answer that is shown while it is written is the answer that is written; what a cache holds is not read
twice and changes nothing."""
import pytest
import torch
from conftest import SMALL, tiny_decoder, tiny_vlm

from model import IMAGE
from support.plumbing.stream import Reader, stream_text
from support.worlds.text import shapes_tokenizer


def take(reader, embeds, count, tail, **seams):
    return [*reader.stream(embeds, count, tail, **seams)]


def test_streamed_ids_are_those_of_generate_and_the_second_turn_reads_what_is_new():
    decoder = tiny_decoder()
    reader, tokens = Reader(decoder), torch.arange(1, 8)[None]
    written = lambda ids: decoder.generate(ids, max_new_tokens=5)[0].tolist()           # noqa: E731
    first = take(reader, decoder.embed(tokens), 5, 7)
    assert first == written(tokens)
    longer = torch.cat((tokens, torch.tensor([first + [3, 9]])), 1)
    assert reader.known(decoder.embed(longer), 0) == 7 + 4         # the last id was never read
    assert take(reader, decoder.embed(longer), 5, 14) == written(longer)
    other = longer.clone()
    other[0, 4] = 60                                                # an earlier word is another one
    assert reader.known(decoder.embed(other), 0) == 4
    assert take(reader, decoder.embed(other), 5, 14) == written(other)


@pytest.mark.parametrize("name", SMALL)
def test_no_bridge_notices_the_cache(name):
    """Of every bridge: the second turn about a picture gives the ids that it gives when all is read again."""
    vlm, g = tiny_vlm(name), torch.Generator().manual_seed(0)
    features = vlm.features(torch.randn(1, 3, 24, 24, generator=g))
    first = torch.tensor([[1, 2, IMAGE, 5, 6, 7]])
    second = torch.cat((first, torch.tensor([[8, 9, 10, 11, 12]])), 1)
    reader = Reader(vlm.decoder)
    for tokens, tail in ((first, 3), (second, 8)):
        inputs, _ = vlm.prepare(tokens, features=features)
        inputs.pop("mask")
        embeds = inputs.pop("embeds")
        if tokens is second:
            assert reader.known(embeds, embeds.shape[1] - tail) == embeds.shape[1] - 5
        ids = take(reader, embeds, 6, tail, **inputs)
        assert ids == vlm.generate(tokens, features=features, max_new_tokens=6)[0].tolist()


def test_a_picture_is_read_whole_or_not_at_all():
    vlm = tiny_vlm("linear")
    features, other = (vlm.features(torch.randn(1, 3, 24, 24)) for _ in range(2))
    tokens, reader = torch.tensor([[1, 2, IMAGE, 5]]), Reader(vlm.decoder)
    inputs, _ = vlm.prepare(tokens, features=features)
    take(reader, inputs["embeds"], 2, 1, bridge=vlm.bridge, visual=inputs["visual"])
    changed, _ = vlm.prepare(tokens, features=other)
    assert reader.known(changed["embeds"], 0) == 2                  # the two words in front of the picture
    assert reader.known(changed["embeds"], changed["embeds"].shape[1] - 1) == 0


def test_a_reader_that_is_interrupted_holds_nothing_half_read(monkeypatch):
    decoder = tiny_decoder()
    reader, embeds = Reader(decoder), decoder.embed(torch.arange(1, 8)[None])
    ids = reader.stream(embeds, 5, 7)
    next(ids)
    monkeypatch.setattr(decoder.norm, "forward", lambda x: 1 / 0)   # an exception in the middle of a forward
    with pytest.raises(ZeroDivisionError):
        next(ids)
    assert reader.held is None and reader.cache is None


@pytest.mark.parametrize("text", ["a red ring", "zwölf 🦊 füchse", "  blanks  around  ", "", "a\nb\n",
                                  "🦊" * 3])
def test_pieces_join_to_the_answer_and_hold_no_half_of_a_character(text):
    tokenizer = shapes_tokenizer()
    ids = [*tokenizer.encode(text), tokenizer.eos, *tokenizer.encode(" never read")]
    taken = iter(ids)
    pieces = [*stream_text(taken, tokenizer)]
    assert "".join(pieces) == tokenizer.answer_text(ids) and "\ufffd" not in "".join(pieces)
    assert next(taken) == tokenizer.encode(" never read")[0]    # it stops where the answer ends


@pytest.mark.parametrize("name, value", [("text_end", "###"), ("stop_texts", ("\n\nUser:", "###"))])
def test_the_text_that_ends_an_answer_is_never_shown(name, value, monkeypatch):
    tokenizer = shapes_tokenizer()
    monkeypatch.setattr(tokenizer, name, value)
    ids = tokenizer.encode("two # rings ### Human:")
    pieces = [*stream_text(iter(ids), tokenizer)]
    assert "".join(pieces) == "two # rings" and len(pieces) > 1
    assert "".join(stream_text(iter(tokenizer.encode("a ##")), tokenizer)) == "a ##"    # it was no end
