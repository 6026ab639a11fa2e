"""Socratic Models rank by cosine, write the notebook's prompt, sample, and keep what CLIP likes best."""
from __future__ import annotations

import pytest
import torch

from conftest import ROOT, chain_decoder
from data import QUESTION, Item
from papers.socratic import ASK, BOT, Lists, Socratic, rank, sample_captions, write_prompt
from support.formats import load_decoder
from support.worlds.text import shapes_tokenizer

PROMPT = """I am an intelligent image captioning bot.
This image is a photo. There are two people.
I think this photo was taken at a kitchen, restaurant, or bar.
I think there might be a pan, stove in this photo.
A creative short caption I can generate to describe this image is:"""
WORDS = ("photo", "sketch", "people", "two", "kitchen", "restaurant", "bar", "pan", "stove", "dog")


def item(words: str, *captions: str) -> Item:
    return Item(None, [*captions], [], id=words)


def embed(texts: list[str]) -> torch.Tensor:
    """A stand-in for CLIP: which words a text has, the first ones weigh most, and whether it has none."""
    rows = [[(1 - n / 20) * (word in text.replace("no people", "")) for n, word in enumerate(WORDS)]
            for text in texts]
    rows = [[*row, 0.01 + (not any(row))] for row in rows]
    return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


def embed_images(items: list[Item]) -> torch.Tensor:
    return embed([item.id for item in items])


LISTS = Lists(("dog", "stove", "pan"), ("beach", "bar", "restaurant", "kitchen"), told_objects=2)
KITCHEN = item("photo people two kitchen restaurant bar pan stove")


def socratic(**changes) -> Socratic:
    given = dict(embed_images=embed_images, embed_texts=embed, write=lambda prompt, n: [prompt] * n,
                 lists=LISTS, captions=2)
    return Socratic(**{**given, **changes})


def test_the_order_by_hand():
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5**0.5, 0.5**0.5]])
    picture = torch.tensor([0.6, 0.8])
    torch.testing.assert_close(texts @ picture, torch.tensor([0.6, 0.8, 0.9899]), atol=1e-4, rtol=0)
    assert rank(picture, texts) == [2, 1, 0]
    assert rank(picture, texts[[0, 0, 1]]) == [2, 0, 1]         # ties keep their order


def test_the_prompt_is_the_notebooks():
    places = ["kitchen", "restaurant", "bar"]
    assert write_prompt("photo", "are two people", places, ["pan", "stove"]) == PROMPT
    assert "taken at a bar.\n" in write_prompt("photo", "are no people", ["bar"], ["pan"])
    short = write_prompt("sketch", "are no people", [], ["dog"]).split("\n")
    assert short == [BOT, "This image is a sketch. There are no people.",
                     "I think there might be a dog in this sketch.", ASK]


def test_the_lists_are_ranked_in_their_own_words():
    asked = []

    def note(texts: list[str]) -> torch.Tensor:
        asked.append(texts)
        return embed(texts)
    pictured = socratic(embed_texts=note)
    assert [texts[0] for texts in asked] == [
        "This is a photo.", "There are no people in this photo.", "There is one person in this photo.",
        "Photo of a beach.", "Photo of a dog."]
    assert pictured.describe(embed_images([KITCHEN])[0]) == PROMPT
    alone = pictured.describe(embed(["sketch dog bar"])[0])
    assert alone.startswith(f"{BOT}\nThis image is a sketch. There are no people.\n") and "a dog, " in alone


def test_a_number_is_asked_at_once_where_there_is_no_question_about_people():
    lists = Lists(("dog", "pan"), people=(), numbers=("is one thing", "are two things"), told_objects=1)
    prompt = socratic(lists=lists).describe(embed(["photo two dog"])[0])
    assert prompt.split("\n")[1:3] == ["This image is a photo. There are two things.",
                                       "I think there might be a dog in this photo."]


def test_clip_chooses_among_the_captions_and_the_order_of_the_items_stays():
    prompts = []

    def write(prompt: str, n: int) -> list[str]:
        prompts.append(prompt)
        return ["nothing", "a stove and a pan", "a dog"][:n]
    answers = socratic(write=write, captions=3).answer([KITCHEN, item("sketch dog"), KITCHEN])
    assert answers == ["a stove and a pan", "a dog", "a stove and a pan"]
    assert len(prompts) == 3 and prompts[0] == PROMPT and socratic().answer([]) == []


def test_an_example_is_its_prompt_with_its_caption():
    text, = socratic(examples=(item(KITCHEN.id, "a pan on a stove"),)).answer([item("sketch dog")])
    assert text.startswith(f"{PROMPT} a pan on a stove\n\n{BOT}\nThis image is a sketch.")
    assert text.endswith(ASK)


@pytest.mark.parametrize("change, words", [
    (dict(captions=0), "0 captions"), (dict(lists=Lists(())), "is empty"),
    (dict(examples=(item("7"),)), '"7" has no caption')])
def test_what_nobody_can_caption_with_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        socratic(**change)


def test_captions_are_sampled_and_end_at_a_line_break():
    decoder, tokenizer = load_decoder(ROOT / "weights/decoder"), shapes_tokenizer()
    asked = QUESTION.format("what color is the ring?")         # of no scene: it can only guess
    captions = sample_captions(decoder, tokenizer, asked, 6, 12, torch.Generator().manual_seed(0))
    assert len(captions) == 6 and len({*captions}) > 1          # at temperature 0 they would be one
    assert not any("\n" in caption for caption in captions)
    again = sample_captions(decoder, tokenizer, asked, 6, 12, torch.Generator().manual_seed(0))
    assert again == captions
    colon, red, line = (tokenizer.encode(text)[-1] for text in (":", " red", "\n"))
    decoder = chain_decoder(tokenizer.vocab_size, {colon: red, red: line, line: red})
    with torch.no_grad():
        decoder.lm_head.weight.mul_(1000)                       # so sure that a draw is the likeliest
    assert sample_captions(decoder, tokenizer, ASK, 2, 6) == ["red", "red"]
