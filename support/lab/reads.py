"""lab/reads.py: what a model can read, said to whoever asks it.

A toy decoder's tokenizer was trained on the text of its world, so each word of that world is one token. Any
other word reaches it letter by letter. It has learned what such letters say of few words: of those that a
later training brought (worlds/reader.py: "how many things are left of …").
"""
from __future__ import annotations

import contextlib
import re

from support.formats.files import UserError
from support.formats.tokenizers import Tokenizer
from support.worlds.files import MissingPicture
from support.worlds.trained import Unknown, known_sets

TOY = 1024                      # tokens: a vocabulary of no more is a toy's
LOOKED_AT = 100                 # items whose words are listed


def is_toy(tokenizer: Tokenizer) -> bool:
    return tokenizer.vocab_size <= TOY


def unread_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words of a text that are letters to a toy decoder, each once; none for any other decoder."""
    words = dict.fromkeys(re.findall(r"\w+", text)) if is_toy(tokenizer) else {}
    return [word for word in words if len(tokenizer.encode(" " + word, preceded_by="text")) > 1]


def trained_items(sets: list) -> list:
    """The first items of the data sets that a run was trained on (known_sets), as far as they are here."""
    items = []
    for world in sets:
        if not isinstance(world, Unknown):
            count = min(LOOKED_AT, len(world)) if world.finite else LOOKED_AT
            for n in range(count):
                with contextlib.suppress(MissingPicture, UserError):
                    items.append(world.item(n))
    return items


def what_it_reads(name: str, tokenizer: Tokenizer, facts: dict) -> str:
    """One sentence: what this model can read, and what not. facts: its config.json."""
    spec = facts.get("settings", {}).get("data")
    if not is_toy(tokenizer):
        return f"{name}: trained on the pictures of {spec}; others are new to it." if spec else ""
    if not spec:
        return (f"{name}: a toy decoder of {tokenizer.vocab_size} tokens; it reads the words that it was "
                "trained on, in lower case, and no others.")
    sets = known_sets(facts)
    texts = [text for item in trained_items(sets)
             for text in (*item.captions, *(f"{q.question} {q.answer}" for q in item.qas))]
    words = sorted({word for text in texts for word in re.findall(r"\w+", text)})
    words = [word for word in words if not unread_words(tokenizer, word)]
    if not words or any(isinstance(each, Unknown) and not each.path for each in sets):
        some = f" ({', '.join(words)} among them)" if words else ""
        return (f"{name}: a toy decoder, trained on {spec}, which is not here, or not all of it; it reads "
                f"the words of that data{some} and no others.")
    return (f"{name}: a toy decoder, trained on {spec}; it reads these {len(words)} words and no others: "
            f"{', '.join(words)}.")
