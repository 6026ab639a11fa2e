"""formats/vqa.py: how the VQA evaluations spell an answer before they compare it."""
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


def vqa_punctuation(text: str) -> str:
    """The first half of `vqa_normalize`: marks go, or become blanks.

    Quirks kept: a mark disappears if it touches a blank anywhere in the text, or if a comma stands between
    two digits anywhere; else it becomes a blank (a-b → a b, but a-b 1,000 → ab 1000). Only 32 periods go: the
    official code passes the flag re.UNICODE, whose value is 32, where re.sub takes a count.
    """
    clean = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        glued = f"{mark} " in text or f" {mark}" in text or re.search(r"[0-9],[0-9]", text)
        clean = clean.replace(mark, "" if glued else " ")
    return re.sub(r"\.(?!\d)", "", clean, count=32)             # 3. → 3, but 1.5 and .5 stay


def vqa_normalize(text: str) -> str:
    """An answer in the spelling that is compared: punctuation, case, number words, articles, apostrophes."""
    words = [NUMBER_WORDS.get(w, w) for w in vqa_punctuation(text).lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def textvqa_normalize(text: str) -> str:
    """An answer as TextVQA's evaluation compares it.

        "Nokia's, 3?"  →  nokia 's 3

    LLaVA writes its answers to VQAv2 and VizWiz so, too, before it submits them. Source: the answer processor
    in haotian-liu/LLaVA at c121f04, llava/eval/m4c_evaluator.py, which is MMF's.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa_normalize(on_one_line(text.strip()))


def on_one_line(text: str) -> str:
    return re.sub(r"[\n\t]", " ", text).strip()


# How an evaluation spells a prediction and the annotators' answers before it compares them ------------------

def spell_official(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    """The VQA evaluation since 2021: only where the annotators differ."""
    prediction, answers = on_one_line(prediction), [on_one_line(a) for a in answers]
    if len(set(answers)) > 1:
        return vqa_normalize(prediction), [vqa_normalize(a) for a in answers]
    return prediction, answers


def spell_openflamingo(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    """OpenFlamingo's: always."""
    return vqa_normalize(on_one_line(prediction)), [vqa_normalize(on_one_line(a)) for a in answers]


def spell_lavis(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    """LAVIS's (BLIP-2), the official one before 2021: of the answers the marks alone, where they differ."""
    if len(set(answers)) > 1:
        answers = [vqa_punctuation(a) for a in answers]
    return vqa_normalize(on_one_line(prediction)), answers


def spell_textvqa(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    """TextVQA's (MMF, LLaVA): always, with their own processor."""
    return textvqa_normalize(prediction), [textvqa_normalize(a) for a in answers]


EVALUATORS = {"vqa": spell_official, "openflamingo": spell_openflamingo, "lavis": spell_lavis,
              "textvqa": spell_textvqa}
