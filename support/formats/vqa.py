"""formats/vqa.py: how the official VQA evaluation spells an answer before it compares."""
from __future__ import annotations

import re

NUMBER_WORDS = {word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
CONTRACTED = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "'ve": "could might must not should they we what where who would you",
    "": "ma'am o'clock 'twas y'all 'ow's'at"}
CONTRACTIONS = {word[:i] + word[i + 1:]: word                   # isnt → isn't: one apostrophe is missing
                for ending, stems in CONTRACTED.items() for word in (stem + ending for stem in stems.split())
                for i, letter in enumerate(word) if letter == "'"} | {"somebody'd": "somebodyd"}    # sic


def vqa_normalize(text: str) -> str:
    """An answer in the spelling that is compared: punctuation, case, number words, articles, apostrophes.

    Quirks kept: a mark disappears if it touches a blank anywhere in the text, or if a comma stands between
    two digits anywhere; else it becomes a blank (a-b → a b, but a-b 1,000 → ab 1000). Only 32 periods go: the
    official code passes the flag re.UNICODE, whose value is 32, where re.sub takes a count.
    """
    clean = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        glued = f"{mark} " in text or f" {mark}" in text or re.search(r"[0-9],[0-9]", text)
        clean = clean.replace(mark, "" if glued else " ")
    clean = re.sub(r"\.(?!\d)", "", clean, count=32)             # 3. → 3, but 1.5 and .5 stay
    words = [NUMBER_WORDS.get(w, w) for w in clean.lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))
