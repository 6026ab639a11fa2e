"""formats/tokenizers.py: four kinds of tokenizers: byte-level BPE, SentencePiece BPE, WordPiece, CLIP's BPE."""
from __future__ import annotations

import codecs
import functools
import heapq
import itertools
import re
import unicodedata
from pathlib import Path

import regex
import tiktoken

from support.formats.chat import TEMPLATES
from support.formats.files import write_json

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
    there: nothing ("start"), a special token ("after"), or text that goes on ("more"). template: a chat Template.
    """
    template = TEMPLATES["plain"]

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
        merges = [[spell(half) for half in merge_halves(token, self.ranks)] for token in sorted(self.ranks, key=self.ranks.get) if len(token) > 1]
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


def merge_halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
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


def merge_pairs(parts: list[str], order: dict[tuple[str, str], float]) -> list[str]:
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
        return [i for part in merge_pairs([*word], self.order) for i in ids(part)]

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
        return [self.vocab[part] for part in merge_pairs([*letters[:-1], letters[-1] + "</w>"], self.order) if part in self.vocab]

    def plain(self, text: str, place: str) -> list[int]:
        text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))
        return [i for word in regex.findall(CLIP_SPLIT, text) for i in self.word(word)]

    def text(self, ids: list[int], place: str) -> str:
        return b"".join(map(self.spelling.get, ids)).decode("utf-8", "replace").strip()
