"""formats/tokenizers.py: text ↔ token ids as the four published kinds of tokenizer have it.

    byte-level BPE       GPT-2, Llama-3, SmolLM2     Sennrich et al. 1508.07909v5, on bytes, by tiktoken
    SentencePiece BPE    LLaMA-1 and -2, Vicuna      Kudo & Richardson 1808.06226v1, with byte fallback
    WordPiece            BERT (Q-Former)             Devlin et al. 1810.04805v2
    CLIP's BPE           CLIP's text tower           Radford et al. 2103.00020v1

chapters: Tokenizer, what the four share · ByteLevel and train_bpe · SentencePiece · WordPiece · ClipBPE.
tokenizer_files.py makes a tokenizer from the files of a folder. tests/golden has the ids of the libraries.
"""
from __future__ import annotations

import codecs
import collections
import functools
import heapq
import itertools
import re
from pathlib import Path

import regex
import tiktoken

from support.formats.chat import TEMPLATES
from support.formats.files import write_json
from support.formats.text_steps import GPT2_SPLIT, Normalizer, Splitter

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
LONGEST_RUN = 25_000                # characters of one run (all blanks, or none) that go to tiktoken at once


@functools.cache
def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte: printable Latin-1 is itself, 68 others start at U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + n) for n, b in enumerate(others)}}


class Tokenizer:
    """Text ↔ ids, and the ids bos, eos, image (None = has none). A kind adds encode_plain and decode_plain.

    special: text → id, never split; text_ids: the ids of all other tokens. Only with special=True does encode
    recognise special tokens in a text, and decode spell them: what a user types stays plain text.
    words: text → id of tokens that were added to the vocabulary and are text as any other; never split.
    rules: how added tokens are found, for those with a rule (`added_pattern`).
    SentencePiece puts a blank in front of a text, some vocabularies only where nothing precedes it. So both
    directions know what precedes: "nothing", a "special" token, or "text" that goes on.
    begin, end: the ids that are written in front of a text and behind it, bos and none where no file says.
    template: the chat template of the folder that the tokenizer comes from (chat.py).
    ends, stop_texts: ids and texts that end a text by the configs of that folder; text_end: a text that ends
    an answer in the chat template, if any.
    digest: of the files of that folder.
    """
    template = TEMPLATES["plain"]
    ends: frozenset[int] = frozenset()
    stop_texts: tuple[str, ...] = ()
    text_end = digest = ""

    def __init__(self, text_ids, special: dict[str, int], bos: str | None = None, eos: str | None = None,
                 image: str | None = None, words: dict[str, int] | None = None,
                 rules: dict[str, frozenset[str]] | None = None, normalize: Normalizer = str):
        self.special, self.words, self.rules, self.normalize = special, words or {}, rules or {}, normalize
        spelled = set(text_ids).difference(special.values())
        self.text_ids = spelled | {*self.words.values()}
        self.unspelled = {i: text for text, i in self.words.items() if i not in spelled}
        self.bos, self.eos, self.image = special.get(bos), special.get(eos), special.get(image)
        self.begin, self.end = (() if self.bos is None else (self.bos,)), ()
        self.vocab_size = max({*self.text_ids, *special.values()}) + 1

    @property
    def stop(self) -> tuple[int, ...]:
        """The ids that end a text: eos, `ends`, and the token that ends a turn in the chat template."""
        turn_end = {**self.words, **self.special}.get(self.template.turn_end)
        return tuple(sorted({self.eos, turn_end, *self.ends} - {None}))

    def answer_text(self, ids) -> str:
        """Text of generated ids, up to the first that ends it, to one of `stop_texts` or to `text_end`."""
        ids, stop = [*map(int, ids)], self.stop
        end = next((n for n, i in enumerate(ids) if i in stop), len(ids))
        text = self.decode(ids[:end])
        text = text[:min((text.index(t) for t in self.stop_texts if t in text), default=len(text))].strip()
        return text.partition(self.text_end)[0].strip() if self.text_end else text

    def add(self, text: str) -> int:
        """The id of a special token; a new one (BLIP-2 adds "[DEC]" to BERT's) gets the next free id."""
        if text not in self.special:
            self.special[text], self.vocab_size = self.vocab_size, self.vocab_size + 1
        return self.special[text]

    def encode(self, text: str, special: bool = False, preceded_by: str = "nothing") -> list[int]:
        """Ids of a text. special=True: special tokens that the text spells are recognised.

        preceded_by: "nothing", "special" or "text", what stands before this text in the document.
        """
        if not special and not self.words:
            text = self.normalize(text)
            return self.encode_plain(text, preceded_by) if text else []
        ids = []
        for part, token in self.cut_added(text, special, normalized=False):
            rest = [(part, token)]
            if token is None:
                rest = self.cut_added(self.normalize(part), special, normalized=True)
            for piece, added in rest:
                if added is not None:
                    ids.append(added)
                    preceded_by = "special"
                elif piece:
                    ids += self.encode_plain(piece, preceded_by)
        return ids

    def cut_added(self, text: str, special: bool, normalized: bool):
        """(text, None) and (text, id of an added token) in turn."""
        known, at = {**self.words, **(self.special if special else {})}, 0
        known = {t: i for t, i in known.items() if ("normalized" in self.rules.get(t, ())) == normalized}
        if normalized:
            known = {self.normalize(t): i for t, i in known.items()}
        for match in added_pattern(tuple(known), self.rules).finditer(text) if known else ():
            yield text[at:match.start()], None
            yield match[0], known[match[match.lastindex]]
            at = match.end()
        yield text[at:], None

    def decode(self, ids, special: bool = False) -> str:
        """Text of ids. Ids that name no token (IMAGE, padding) are left out, broken UTF-8 becomes U+FFFD."""
        names = {**self.unspelled, **({i: text for text, i in self.special.items()} if special else {})}
        ids = [i for i in map(int, ids) if i in self.text_ids or i in names]
        text, before = "", "nothing"
        for is_named, run in itertools.groupby(ids, names.__contains__):
            run = [*run]
            text += "".join(names[i] for i in run) if is_named else self.decode_plain(run, before)
            before = "text" if run[-1] in self.text_ids else "special"
        return text

    def encode_plain(self, text: str, preceded_by: str) -> list[int]:
        """Ids of a text, not empty, in which no special token is recognised."""
        raise NotImplementedError

    def decode_plain(self, ids: list[int], preceded_by: str) -> str:
        """Text of a run of text_ids."""
        raise NotImplementedError


def added_pattern(texts: tuple[str, ...], rules: dict[str, frozenset[str]]):
    """A regular expression with a group for each of the texts, the longest first.

    Rules of a text: lstrip and rstrip take the blanks beside it, single_word finds it only between words.
    """
    def spell(text: str) -> str:
        rule, word = rules.get(text, ()), f"({regex.escape(text)})"
        word = rf"(?<!\w){word}(?!\w)" if "single_word" in rule else word
        return r"\s*" * ("lstrip" in rule) + word + r"\s*" * ("rstrip" in rule)

    return compile_cached("|".join(map(spell, sorted(texts, key=len, reverse=True))))


compile_cached = functools.lru_cache(64)(regex.compile)


class ByteLevel(Tokenizer):
    """Byte-level BPE through tiktoken: GPT-2, Llama-3, SmolLM2.

    split, then pattern, cut a text into words: a function, and a regular expression for tiktoken. Without a
    pattern each piece of `split` is a word.
    ranks: bytes of a token → its id, also the order of merging. Where it is not, `order` says when a pair of
    tokens is merged, and no other pair is; then words are merged here, which is slower.
    """

    def __init__(self, pattern: str | None, ranks: dict[bytes, int], special: dict[str, int],
                 split: Splitter | None = None, order: dict[tuple[bytes, bytes], int] | None = None, **names):
        super().__init__(ranks.values(), special, **names)
        self.pattern, self.ranks, self.split, self.order = pattern, ranks, split, order
        self.merge_word = functools.lru_cache(20_000)(self.merge_bytes)
        self.encode_word = functools.lru_cache(20_000)(self.encode_piece)
        if not ranks:
            raise ValueError("its vocabulary is empty.")
        if b"" in ranks or pattern is not None and (not pattern or regex.match(pattern, "")):
            raise ValueError("a piece of the vocabulary, or a match of its pattern, is empty.")     # a panic
        # SmolLM2 has no token for 21 of the 256 bytes, and tiktoken stops at such a byte.
        # Here the byte gets an id past the end, which encode_plain drops.
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        extra = {b: self.vocab_size + n for n, b in enumerate(missing)}
        self.coder = tiktoken.Encoding("bpe", pat_str=pattern or r"(?s:.+)", special_tokens={},
                                       mergeable_ranks={**ranks, **extra})

    def encode_plain(self, text: str, preceded_by: str) -> list[int]:
        encode = self.encode_piece if self.pattern else self.encode_word
        return [i for piece in (self.split(text) if self.split else [text]) for i in encode(piece)]

    def merge_bytes(self, word: str) -> list[int]:
        parts = merge_pairs([bytes([b]) for b in word.encode("utf-8", "replace")], self.order)
        return [self.ranks[part] for part in parts if part in self.ranks]

    def encode_piece(self, text: str) -> list[int]:
        if self.order is not None:
            words = compile_cached(self.pattern).findall(text) if self.pattern else [text]
            return [i for word in words for i in self.merge_word(word)]
        # Llama-3's own code cuts long runs too: 10⁶ blanks overflow the stack of tiktoken's pattern matcher.
        runs = re.finditer(r"\s+|\S+", text) if self.pattern and len(text) > LONGEST_RUN else ()
        cuts = [i for run in runs for i in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)]
        ids = []
        for start, end in zip([0, *cuts], [*cuts, len(text)]):
            ids += [i for i in self.coder.encode_ordinary(text[start:end]) if i in self.text_ids]
        return ids

    def decode_plain(self, ids: list[int], preceded_by: str) -> str:
        return self.coder.decode(ids)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json as Hugging Face's libraries read them."""
        letters, names = byte_letters(), {i: text for text, i in self.special.items()}

        def spell(token: bytes) -> str:
            return "".join(letters[b] for b in token)

        merged = [token for token in sorted(self.ranks, key=self.ranks.get) if len(token) > 1]
        pairs = [merge_halves(token, self.ranks) for token in merged]
        if self.order is not None:
            pairs = sorted(self.order, key=self.order.get)
        merges = [[spell(half) for half in pair] for pair in pairs]
        flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        begin = names.get(self.bos)
        first, second = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
        processor = begin and {
            "type": "TemplateProcessing", "pair": [first, second],
            "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, first],
            "special_tokens": {begin: {"id": begin, "ids": [self.bos], "tokens": [begin]}}}
        write_json(Path(folder) / "tokenizer.json", {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": text, **flags} for text, i in self.special.items()],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                              "use_regex": True},
            "post_processor": processor, "decoder": {"type": "ByteLevel"},
            "model": {"type": "BPE", "vocab": {spell(token): i for token, i in self.ranks.items()},
                      "merges": merges}})
        write_json(Path(folder) / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names.get(self.bos),
            "eos_token": names.get(self.eos), "image_token": names.get(self.image)})


def merge_halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose merge made this token: BPE on its bytes with the merges learned before it."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def train_bpe(texts: list[str], vocab_size: int, special: list[str], **names) -> ByteLevel:
    """Byte-pair encoding (1508.07909v5, Algorithm 1): merge the commonest pair until the vocabulary is full.

    vocab_size counts the 256 bytes, the merges and the special tokens, which get the last ids.
    """
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


def merge_pairs(parts: list, order: dict[tuple, float]) -> list:
    """Join the pair that comes first in `order`, the leftmost of equals, until no pair is in it; O(n log n).

    Parts are a doubly linked list, the pairs that can be joined a heap. A pair is skipped if its parts have
    changed since it was pushed.
    """
    left = list(range(-1, len(parts) - 1))              # index of the part on the left; −1 = none
    right = list(range(1, len(parts) + 1))              # and on the right; len(parts) = none
    heap = []

    def push_pair(i: int) -> None:                      # part i and the one on its right
        if i >= 0 and right[i] < len(parts):
            rank = order.get((parts[i], parts[right[i]]))
            if rank is not None:
                heapq.heappush(heap, (rank, i, parts[i], parts[right[i]]))

    for i in range(len(parts)):
        push_pair(i)
    while heap:
        _, i, a, b = heapq.heappop(heap)
        j = right[i]
        if j < len(parts) and (parts[i], parts[j]) == (a, b):
            parts[i], parts[j], right[i] = a + b, None, right[j]
            if right[j] < len(parts):
                left[right[j]] = i
            push_pair(left[i])
            push_pair(i)
    return [p for p in parts if p is not None]


class SentencePiece(Tokenizer):
    """SentencePiece BPE with byte fallback (1808.06226v1): LLaMA-1/2, Vicuna.

    A blank is written ▁ and merged like a letter. A character that is no piece is spelled in bytes, <0x00> …

    vocab: piece → id; order: two pieces → when they are joined.
    prefix: where a text gets one blank in front (the "dummy prefix"), named by what precedes the text.
    With "lazy" (Hugging Face's Metaspace) only a text that begins with no blank gets it. Decoding removes it.
    """
    ALWAYS, FIRST, NEVER = ("nothing", "special"), ("nothing",), ()     # ALWAYS: "legacy" in the settings

    def __init__(self, vocab: dict[str, int], order: dict, special: dict[str, int], prefix: tuple = ALWAYS,
                 unk: str | None = "<unk>", **names):
        super().__init__(vocab.values(), {text: i for text, i in special.items() if text != unk}, **names)
        self.vocab, self.order, self.prefix = vocab, order, prefix
        self.bytes = [vocab[f"<0x{b:02X}>"] for b in range(256)]
        self.spelling = {i: piece.replace("▁", " ").encode() for piece, i in vocab.items()}   # id → bytes
        if unk in vocab:
            self.spelling[vocab[unk]] = " ⁇ ".encode()
        self.spelling |= {i: bytes([b]) for b, i in enumerate(self.bytes)}
        self.begins_with_blank = {i for piece, i in vocab.items() if piece.startswith("▁")}
        # Words are merged one by one ("▁▁two"), unless a piece holds a ▁ behind another character ("a▁b"):
        # only such a piece joins two words.
        crosses_words = any(re.search("[^▁]▁", a + b) for a, b in order)
        self.split = r"(?s:.+)" if crosses_words else r"▁*[^▁]+|▁+"
        self.encode_word = functools.lru_cache(20_000)(self.merge_word)

    def merge_word(self, word: str) -> list[int]:
        ids = []
        for part in merge_pairs([*word], self.order):
            if part in self.vocab:
                ids.append(self.vocab[part])
            else:
                ids += [self.bytes[b] for b in part.encode("utf-8", "replace")]
        return ids

    def encode_plain(self, text: str, preceded_by: str) -> list[int]:
        text = text.replace(" ", "▁")
        if preceded_by in self.prefix and not ("lazy" in self.prefix and text[0] == "▁"):
            text = "▁" + text
        return [i for word in re.findall(self.split, text) for i in self.encode_word(word)]

    def decode_plain(self, ids: list[int], preceded_by: str) -> str:
        """As the sentencepiece library spells it: U+FFFD for EACH byte of a broken character."""
        spelled = b"".join(self.spelling[i] for i in ids)
        if preceded_by in self.prefix and ids[0] in self.begins_with_blank:
            spelled = spelled[1:]
        return spelled.decode("utf-8", "replace-each-byte")


codecs.register_error("replace-each-byte", lambda e: ("\ufffd" * (e.end - e.start), e.end))


class WordPiece(Tokenizer):
    """BERT's vocabulary (1810.04805v2).

    A word is cut from the left into the longest pieces of the vocabulary; ## marks a piece inside the word.
    A word that has no such cut, or too many characters, is [UNK].
    """

    def __init__(self, vocab: dict[str, int], special: dict[str, int], split: Splitter, unk: str = "[UNK]",
                 longest: int = 100, words: dict[str, int] | None = None, **names):
        super().__init__({*vocab.values(), *(words or {}).values()}, special, words=words, **names)
        self.vocab, self.split, self.unk, self.longest = vocab, split, vocab[unk], longest
        self.pieces = {i: piece for piece, i in {**vocab, **self.words}.items()}
        self.encode_word = functools.lru_cache(20_000)(self.split_word)

    def split_word(self, word: str) -> list[int]:
        ids, start = [], 0
        while start < len(word) <= self.longest:
            inside = "##" if start else ""
            end = next((e for e in range(len(word), start, -1) if inside + word[start:e] in self.vocab), None)
            if end is None:
                break
            ids.append(self.vocab[inside + word[start:end]])
            start = end
        return ids if start == len(word) else [self.unk]

    def encode_plain(self, text: str, preceded_by: str) -> list[int]:
        return [i for word in self.split(text) for i in self.encode_word(word)]

    def decode_plain(self, ids: list[int], preceded_by: str) -> str:
        text = " ".join(self.pieces[i] for i in ids).replace(" ##", "").replace(" ' ", "'")
        return re.sub(" ([.?!,]|n't|'m|'s|'ve|'re)", r"\1", text)           # "a dog ." → "a dog."


class ClipBPE(Tokenizer):
    """CLIP's BPE (2103.00020v1).

    The last letter of a word carries </w>, which is decoded as a blank.
    """

    def __init__(self, vocab: dict[str, int], order: dict, special: dict[str, int], split: Splitter, **names):
        super().__init__(vocab.values(), special, **names)
        self.vocab, self.order, self.split = vocab, order, split
        byte_of = {letter: b for b, letter in byte_letters().items()}
        self.spelling = {}                                                  # id → bytes
        for piece, i in vocab.items():
            if i in self.text_ids:
                blank = b" " if piece.endswith("</w>") else b""
                self.spelling[i] = bytes(byte_of[c] for c in piece.removesuffix("</w>")) + blank
        self.encode_word = functools.lru_cache(20_000)(self.merge_word)

    def merge_word(self, word: str) -> list[int]:
        letters = [byte_letters()[b] for b in word.encode("utf-8", "replace")]
        parts = merge_pairs([*letters[:-1], letters[-1] + "</w>"], self.order)
        return [self.vocab[part] for part in parts if part in self.vocab]

    def encode_plain(self, text: str, preceded_by: str) -> list[int]:
        return [i for word in self.split(text) for i in self.encode_word(word)]

    def decode_plain(self, ids: list[int], preceded_by: str) -> str:
        return b"".join(self.spelling[i] for i in ids).decode("utf-8", "replace").strip()
