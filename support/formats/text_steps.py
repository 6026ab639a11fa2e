"""formats/text_steps.py: what a tokenizer.json does with a text before its vocabulary sees it.

    normalizer        text → text                 lower case, Unicode's forms, blanks, replacements
    pre-tokenizer     text → list of pieces       no token reaches across the end of a piece

Each entry of the file is one step, or a Sequence of steps that follow each other. The steps mean what they
mean in Hugging Face's tokenizers 0.23; a step that is not known here is a ValueError that shows it.
"""
from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable

import regex

Normalizer = Callable[[str], str]
Splitter = Callable[[str], list[str]]

GPT2_SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BLANKS = "".join(c for c in map(chr, range(0x3001)) if regex.match(r"\s", c))       # str.strip takes more
WORD = r"\p{Alphabetic}\p{M}\p{Pc}"              # inside a regular expression's [ ], as the next two
CHINESE = ("\u4E00-\u9FFF\u3400-\u4DBF\uF900-\uFAFF\U00020000-\U0002A6DF\U0002A700-\U0002CEAF"
           "\U0002F800-\U0002FA1F")
PUNCTUATION = r"\p{P}$+<=>^`|~"
FLAGS = ("strip_left", "strip_right", "lowercase", "strip_accents", "clean_text", "handle_chinese_chars",
         "individual_digits", "invert", "add_prefix_space", "use_regex", "split")      # true or false
TEXTS = ("content", "prepend", "behavior", "delimiter", "prepend_scheme")
BEHAVIORS = ("Removed", "Isolated", "Contiguous", "MergedWithPrevious", "MergedWithNext")


def flat_steps(entry: dict | None) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer entry, sequences within sequences unfolded."""
    if entry is None:
        return []
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
        raise ValueError(f"{json.dumps(entry)} is no step: it has no type.")
    for key, value in entry.items():
        kind = bool if key in FLAGS else str if key in TEXTS else object
        if not isinstance(value, kind) and (key, value) != ("strip_accents", None):
            raise unknown_step(entry)
    if entry["type"] != "Sequence":
        return [entry]
    inside = entry["normalizers"] if "normalizers" in entry else entry["pretokenizers"]
    if not isinstance(inside, list) or None in inside:
        raise unknown_step(entry)
    return [step for part in inside for step in flat_steps(part)]


def unknown_step(step: dict) -> ValueError:
    return ValueError(f"the step {json.dumps(step)} is not supported for a vocabulary of its kind.")


def compile_pattern(pattern: dict, step: dict):
    """{"String": …} or {"Regex": …}, compiled. As in Oniguruma, ^ and $ are at the ends of lines, and \\w
    outside of a set takes all numerals."""
    try:
        if "String" in pattern:
            return regex.compile(regex.escape(pattern["String"]))
        words = {r"\w": rf"[{WORD}\p{{N}}]", r"\W": rf"[^{WORD}\p{{N}}]"}
        set_or_escape = r"(?s)\[(?:\\.|[^\]\\])*\]|\\."

        def spell(match) -> str:
            found = match[0]
            return words.get(found) or (found.replace(r"\w", WORD + r"\p{Nd}") if found[0] == "[" else found)
        text = regex.sub(set_or_escape, spell, pattern["Regex"])
        return regex.compile(text, regex.M)
    except (regex.error, KeyError):
        raise ValueError(f"the pattern of the step {json.dumps(step)} cannot be read.") from None


# --- normalizers --------------------------------------------------------------------------------------------

def make_normalizer(steps: list[dict]) -> Normalizer:
    """One function for steps that follow each other."""
    functions = [normalizer_step(step) for step in steps]

    def normalize(text: str) -> str:
        for function in functions:
            text = function(text)
        return text

    return normalize


def normalizer_step(step: dict) -> Normalizer:
    kind = step["type"]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return lambda text: unicodedata.normalize(kind, text)
    if kind == "Lowercase":
        return lowercase
    if kind == "StripAccents":
        return lambda text: regex.sub(r"\p{M}", "", text)
    if kind == "Strip":
        left, right = step["strip_left"], step["strip_right"]

        def strip(text: str) -> str:
            text = text.lstrip(BLANKS) if left else text
            return text.rstrip(BLANKS) if right else text
        return strip
    if kind == "Prepend":
        return lambda text: step["prepend"] + text if text else text
    if kind == "Replace":
        expression, content = compile_pattern(step["pattern"], step), step["content"]
        return lambda text: expression.sub(lambda _: content, text)
    if kind == "BertNormalizer":
        return bert_normalizer(step)
    raise unknown_step(step)


def lowercase(text: str) -> str:
    return "".join(c.lower() for c in text)             # letter by letter: no final sigma


def bert_normalizer(step: dict) -> Normalizer:
    """BERT's (1810.04805v2): strip_accents null follows lowercase."""
    lower, accents = step["lowercase"], step.get("strip_accents")
    no_accents = lower if accents is None else accents

    def normalize(text: str) -> str:
        if step.get("clean_text", True):
            # Control, format and private characters go, unassigned ones (Cn) and \t \n \r stay.
            text = regex.sub(r"[^\P{C}\p{Cn}\t\n\r]|\uFFFD", "", text)
            text = regex.sub(r"\s", " ", text)
        if step.get("handle_chinese_chars", True):
            text = regex.sub(f"([{CHINESE}])", r" \1 ", text)
        if no_accents:
            text = unicodedata.normalize("NFD", text)
            text = "".join(c for c in text if unicodedata.category(c) != "Mn")
        return lowercase(text) if lower else text

    return normalize


# --- pre-tokenizers -----------------------------------------------------------------------------------------

def make_splitter(steps: list[dict]) -> Splitter:
    """One function for steps that follow each other: each cuts every piece of the one before."""
    functions = [splitter_step(step) for step in steps]

    def split(text: str) -> list[str]:
        pieces = [text]
        for function in functions:
            pieces = [part for piece in pieces for part in function(piece) if part]
        return pieces

    return split


def splitter_step(step: dict) -> Splitter:
    kind = step["type"]
    if kind == "Split":
        expression = compile_pattern(step["pattern"], step)
        return cut_at(expression, step["behavior"], step.get("invert", False), step)
    if kind == "Digits":
        how = "Isolated" if step["individual_digits"] else "Contiguous"
        return cut_at(regex.compile(r"\p{N}"), how)
    if kind == "Punctuation":
        return cut_at(regex.compile(rf"[{PUNCTUATION}]"), step.get("behavior", "Isolated"), False, step)
    if kind == "Whitespace":
        return regex.compile(r"\w+|[^\w\s]+").findall
    if kind == "WhitespaceSplit":
        return regex.compile(r"\S+").findall
    if kind == "CharDelimiterSplit":
        return lambda text: text.split(step["delimiter"])
    if kind == "BertPreTokenizer":
        return regex.compile(rf"[{PUNCTUATION}]|[^\s{PUNCTUATION}]+").findall
    if kind == "ByteLevel":                             # the letters for bytes are the vocabulary's affair
        return byte_level_splitter(step)
    raise unknown_step(step)


def byte_level_splitter(step: dict) -> Splitter:
    words = regex.compile(GPT2_SPLIT).findall if step.get("use_regex", True) else (lambda text: [text])
    if not step.get("add_prefix_space"):
        return words
    return lambda text: words(text if text.startswith(" ") else " " + text)


def cut_at(expression, behavior: str, invert: bool = False, step: dict | None = None) -> Splitter:
    """Cut a text where `expression` matches, or with invert=True where it does not.

        "the-final--countdown", "-"    Removed              the  final  countdown
                                       Isolated             the  -  final  -  -  countdown
                                       Contiguous           the  -  final  --  countdown
                                       MergedWithPrevious   the-  final-  -  countdown
                                       MergedWithNext       the  -final  -  -countdown
    """
    if behavior not in BEHAVIORS:
        raise unknown_step(step)

    def find(text: str) -> list[tuple[int, int, bool]]:             # (start, end, is a separator)
        spans, at = [], 0
        for match in expression.finditer(text):
            if at < match.start():
                spans.append((at, match.start(), invert))
            spans.append((*match.span(), not invert))
            at = match.end()
        return [*spans, (at, len(text), invert)] if at < len(text) else spans

    def split(text: str) -> list[str]:
        spans, pieces, before = find(text), [], False
        if behavior == "Removed":
            return [text[start:end] for start, end, separator in spans if not separator]
        for start, end, separator in reversed(spans) if behavior == "MergedWithNext" else spans:
            if behavior == "Isolated":
                joins = False
            elif behavior == "Contiguous":
                joins = separator == before
            else:
                joins = separator and not before
            if joins and pieces:
                start, end = min(start, pieces[-1][0]), max(end, pieces[-1][1])
                pieces[-1] = (start, end)
            else:
                pieces.append((start, end))
            before = separator
        return [text[start:end] for start, end in sorted(pieces)]

    return split
