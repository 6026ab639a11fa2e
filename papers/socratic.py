"""Socratic Models (2204.00598v2): CLIP says in words what it sees, a language model writes, CLIP chooses.

Document 4 says: pre-trained models are composed through language, without training. A picture is captioned
by f_VLM(f_LM(f_VLM(picture))): CLIP ranks lists of words, a language model (GPT-3) makes sentences of the
first ones, CLIP ranks the sentences. No part is trained and no seam of the decoder is used.

    symbol   shape     here          meaning
    v        (De,)     picture       CLIP's embedding of the picture, of length 1
    T        (n, De)   embedded      CLIP's embeddings of n texts, of length 1
    p                  describe      the prompt: what CLIP found, in sentences
    c_i                written       caption i of n that the language model samples, at temperature 0.9

    (SM1)  rank(v, T): texts in the order of falling v·T_i
    (SM2)  the first of each list is found by rank, every entry in the words of its list:
               type      1   "This is a {}."                     photo, cartoon, sketch, painting
               people    1   "There are {} in this photo."       no people, people;  if people:
                         1   "There {} in this photo."           is one person, are two people, …
               places    3   "Photo of a {}."                    Places365
               objects  10   "Photo of a {}."                    Tencent ML-Images
    (SM3)  c_1 … c_n ~ LM(p)
    (SM4)  caption = the first of rank(v, CLIP(c_1), …, CLIP(c_n))

    I am an intelligent image captioning bot.
    This image is a photo. There are two people.
    I think this photo was taken at a kitchen, restaurant, or bar.
    I think there might be a pan, stove, … in this photo.
    A creative short caption I can generate to describe this image is:

With v = (.6, .8) and texts (1, 0), (0, 1), (.7071, .7071) the cosines are .6, .8, .9899: the third leads.

Paper     n = 20 (10 in the notebook), CLIP ViT-L/14, GPT-3. 100 COCO pictures, BLEU-4 and CIDEr: ClipCap
          40.7, 152.4; MAGIC 11.4, 56.2; ZeroCap 0.0, 18.0; Socratic 6.9, 44.5, and with three examples in
          the prompt 18.3, 76.3.
Slips     The notebook's function for the language model has temperature 0 as its default, with which all n
          captions were one; the call passes 0.9. How the paper joins its three examples is not in the
          notebook: here each is a prompt with its caption, and an empty line follows.
Lost      (SM2) names things one at a time: which colour is whose stands in a name at most, and where a thing
          is stands nowhere.
Claim     Lists of a world: its colours x shapes, and counts. CLIP of the world ranks, a decoder writes, CLIP
          ranks. The things are named right; their places are a guess. A world of shapes has no places to
          be at: the third line is left out. python eval.py claims socratic
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from data import Document, Item
from model import Decoder

TEMPERATURE = 0.9
BOT = "I am an intelligent image captioning bot."
ASK = "A creative short caption I can generate to describe this image is:"


@dataclass(frozen=True)
class Lists:
    """What CLIP chooses from (SM2), and how many of the two long lists are told."""
    objects: tuple[str, ...]
    places: tuple[str, ...] = ()                        # without any, the prompt does not speak of places
    types: tuple[str, ...] = ("photo", "cartoon", "sketch", "painting")
    people: tuple[str, ...] = ("no people", "people")   # the last one asks for a number; (): asked at once
    numbers: tuple[str, ...] = ("is one person", "are two people", "are three people", "are several people",
                                "are many people")
    told_places: int = 3
    told_objects: int = 10


def write_prompt(kind: str, number: str, places: list[str], objects: list[str]) -> str:
    """kind: photo; number: "are two people"."""
    lines = [BOT, f"This image is a {kind}. There {number}."]
    if places:
        *first, last = places
        told = f"{', '.join(first)}, or {last}" if first else last
        lines.append(f"I think this photo was taken at a {told}.")
    lines.append(f"I think there might be a {', '.join(objects)} in this {kind}.")
    return "\n".join([*lines, ASK])


def rank(picture: Tensor, embedded: Tensor) -> list[int]:
    """Numbers of the texts (n, De), the closest to the picture (De,) first; ties in their own order."""
    return (embedded @ picture).argsort(descending=True, stable=True).tolist()                  # (SM1)


@torch.no_grad()
def sample_captions(decoder: Decoder, tokenizer, prompt: str, count: int, longest: int = 48,
                    generator: torch.Generator | None = None) -> list[str]:
    """`count` continuations of the prompt at temperature 0.9, each up to a line break."""
    ids = Document(tokenizer).add(prompt).tokens
    tokens = torch.tensor([ids], device=decoder.embed.weight.device).expand(count, -1)          # (n, T)
    new = decoder.generate(tokens, longest, TEMPERATURE, stop=tokenizer.stop, generator=generator)
    return [tokenizer.answer_text(row).split("\n")[0].strip() for row in new.tolist()]          # (SM3)


@dataclass
class Socratic:
    """Captions pictures by three talks between CLIP and a language model: one text per item."""
    embed_images: Callable[[list[Item]], Tensor]            # → (B, De), of length 1
    embed_texts: Callable[[list[str]], Tensor]              # → (n, De), of length 1
    write: Callable[[str, int], list[str]]                  # (prompt, n) → n captions: sample_captions, say
    lists: Lists
    captions: int = 20                                      # n
    examples: tuple[Item, ...] = ()                         # told in the prompt, each with its first caption

    def __post_init__(self):
        if self.captions < 1:
            raise ValueError(f"{self.captions} captions: CLIP needs at least one to choose from.")
        if not (self.lists.objects and self.lists.types and self.lists.numbers):
            raise ValueError("a list of Socratic Models is empty: give objects, types and numbers.")
        without = [item.id for item in self.examples if not item.captions]
        if without:
            raise ValueError(f'example "{without[0]}" has no caption, which its prompt ends with.')
        x = self.lists
        self.embedded = {part: self.embed_texts([form.format(word) for word in words])
                         for part, form, words in (("types", "This is a {}.", x.types),
                                                   ("people", "There are {} in this photo.", x.people),
                                                   ("numbers", "There {} in this photo.", x.numbers),
                                                   ("places", "Photo of a {}.", x.places),
                                                   ("objects", "Photo of a {}.", x.objects)) if words}
        told = [f"{self.describe(picture)} {item.captions[0]}\n\n"
                for item, picture in zip(self.examples, self.embed_images([*self.examples]))
                ] if self.examples else []
        self.told = "".join(told)

    def answer(self, items: list[Item]) -> list[str]:
        if not items:
            return []
        return [self.caption(picture) for picture in self.embed_images(items)]

    def caption(self, picture: Tensor) -> str:
        """picture (De,)."""
        written = self.write(self.told + self.describe(picture), self.captions)
        return written[rank(picture, self.embed_texts(written))[0]]                             # (SM4)

    def describe(self, picture: Tensor) -> str:
        """The prompt about a picture (De,)."""
        def first(part: str, count: int = 1) -> list[str]:
            words = getattr(self.lists, part)
            return [words[i] for i in rank(picture, self.embedded[part])[:count]] if words else []  # (SM2)
        people, = first("people") or [""]
        number = first("numbers")[0] if people in ("", *self.lists.people[-1:]) else f"are {people}"
        return write_prompt(first("types")[0], number, first("places", self.lists.told_places),
                            first("objects", self.lists.told_objects))
