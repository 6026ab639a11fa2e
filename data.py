"""data.py: text to tokens, pictures to pixels, worlds and data sets to batches.

Chapters 1 tokenizers · 2 pictures · 3 documents and loss masks · 4 the `shapes` world · 5 the `emoji` world · 6 loaders
Run      python data.py shapes:test 3     prints three items of a data set and writes their pictures to out/samples/
"""
from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor

from model import IGNORE, IMAGE, UserError, read_json, write_json

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

    ranks: bytes of each token → its id, which is also the order of merging; special: text → id, never split and never
    produced by `encode`.
    """

    def __init__(self, pattern: str, ranks: dict[bytes, int], special: dict[str, int], bos: str | None = None,
                 eos: str | None = None, image: str | None = None):
        self.pattern, self.ranks, self.special = pattern, ranks, special
        self.coder = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.bos, self.eos, self.image = special.get(bos), special.get(eos), special.get(image)
        self.vocab_size = max(*ranks.values(), *special.values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.coder.encode_ordinary(text)

    def decode(self, ids) -> str:
        """Text of ids; special tokens and ids outside the vocabulary are left out, broken UTF-8 becomes U+FFFD."""
        return self.coder.decode([i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in self.special.values()])

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
    file = Path(folder) / "tokenizer.json"
    data = read_json(file)
    model = data.get("model", {})
    if model.get("type", "BPE") != "BPE" or "vocab" not in model or model.get("byte_fallback"):
        raise UserError(f"{file}: not a byte-level BPE vocabulary; this reader knows SmolLM2-, GPT-2- and Llama-3-style files.")
    value = {letter: b for b, letter in byte_letters().items()}
    special = {t["content"]: t["id"] for t in data.get("added_tokens", []) if t["special"]}
    try:
        ranks = {bytes(value[c] for c in token): i for token, i in model["vocab"].items() if token not in special}
    except KeyError as e:
        raise UserError(f"{file}: the vocabulary holds the character {e}, which is no byte letter of GPT-2's table.") from None
    settings = Path(folder) / "tokenizer_config.json"
    names = read_json(settings) if settings.exists() else {}
    content = lambda t: t.get("content") if isinstance(t, dict) else t
    return Tokenizer(split_pattern(data.get("pre_tokenizer"), file), ranks, special,
                     **{k: content(names.get(k + "_token")) for k in ("bos", "eos", "image")})


def split_pattern(pre: dict | None, file: Path) -> str:
    """One regular expression for the `pre_tokenizer` entry of a tokenizer.json."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre] if pre else []
    pattern = GPT2_SPLIT
    for step in steps:
        if step["type"] == "Digits" and step["individual_digits"]:
            # every digit alone, first: a run of blanks then ends at a digit as it ends at the end of the text
            pattern = GPT2_SPLIT.replace(r"| ?\p{N}+", r"|\p{N}").replace(r"\s+(?!\S)", r"\s+(?!\S)|\s+(?=\p{N})")
        elif step["type"] == "Split" and "Regex" in step["pattern"]:
            pattern = step["pattern"]["Regex"]
        elif step["type"] != "ByteLevel":
            raise UserError(f'{file}: pre-tokenizer "{step["type"]}" is not supported; known: Digits, Split, ByteLevel.')
    return pattern


# ------------------------------------------------------------------------------------------------------------------
# 2. Pictures
# ------------------------------------------------------------------------------------------------------------------

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LARGEST_SIDE = 20_000       # pixels; a wider picture is more likely an attack or a mistake than a photograph


def read_image(path: str | Path) -> np.ndarray:
    """A picture file → (h, w, 3) uint8, turned upright by its EXIF tag; alpha is dropped, as the published processors do."""
    from PIL import Image, ImageOps
    Image.MAX_IMAGE_PIXELS = None                       # the check below is ours, and says what to do
    try:
        with Image.open(path) as image:
            if max(image.size) > LARGEST_SIDE:
                raise UserError(f"{path}: {image.width}x{image.height} pixels; the largest side may be {LARGEST_SIDE}, scale it down first.")
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture file.") from None
    except UserError:
        raise
    except Exception as e:                              # Pillow raises many kinds: OSError, SyntaxError, ValueError, struct.error
        raise UserError(f"{path}: not a picture that Pillow can read ({type(e).__name__}); give a PNG, JPEG or WebP file.") from None


def to_pixels(images: list[np.ndarray], size: int) -> Tensor:
    """uint8 (h, w, 3) pictures → (B, 3, S, S) float32: CLIP's processor: shortest side to S bicubically, centre crop, ÷255, normalise."""
    from PIL import Image
    squares = []
    for image in images:
        h, w = image.shape[:2]
        if (h, w) != (size, size):
            short = min(h, w)
            h, w = (size, int(size * w / short)) if h <= w else (int(size * h / short), size)
            top, left = (h - size) // 2, (w - size) // 2
            resized = Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)
            image = np.asarray(resized)[top:top + size, left:left + size]
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


QUESTION, CAPTION = "\nQuestion: {} Answer:", "\nCaption:"      # what stands before an answer; the answer begins with a blank


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
SIZES = {"small": 8, "large": 14}                                               # side in pixels
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right"))
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
    name, size = "shapes", 3 * CELL

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
            names = [(c, f"{c} objects") for c in COLORS] + [(s, s + ("es" if s[-1] == "s" else "s")) for s in SHAPES]
            counts = [(sum(w in t.pair for t in things), plural) for w, plural in names]
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

    def item(self, index: int, kinds=KINDS) -> Item:
        rng = self.rng(index)
        things = self.scene(rng)
        orders = [sorted(things, key=lambda t: t.cell)] + [[things[i] for i in rng.permutation(len(things))] for _ in range(4)]
        qas = self.questions(things, rng, kinds)
        for q in qas:
            q.answers = [q.answer] * 10
        return Item(draw(things, rng), [caption(o) for o in orders], qas, f"{self.split}-{index}", describe(orders[1], "at"))


def shapes_text(count: int = 400, seed: int = 0) -> list[str]:
    """Text with every word of the world: what the bundled tokenizer was trained on."""
    world, texts = Shapes("all", seed), []
    for i in range(count):
        rng = world.rng(i)
        things = world.scene(rng)
        texts += [describe(things, s) for s in STYLES] + [caption(things), CAPTION]
        texts += [QUESTION.format(q.question) + " " + q.answer for q in world.questions(things, rng, (*KINDS, "shape"))]
    return texts


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

    def document(self, index: int) -> tuple[Document, list[list[int]]]:
        rng = self.world.rng(index)
        things = self.world.scene(rng)
        order = [things[i] for i in rng.permutation(len(things))]
        d, bags = Document(self.tokenizer), []
        everything = rng.random() < 0.2                             # one document in five is learned whole, as a language model
        if rng.random() < self.bags:
            bags = [self.bag(t) for t in order]
            if rng.random() < 0.7:                                  # the grid as a ViT sees it: empty cells too, row by row
                by_cell = {t.cell: self.bag(t) for t in things}
                void = rng.random() < 0.5                           # an empty cell says nothing, or where it is
                bags = [by_cell.get(c) or [EMPTY] * 3 + ([EMPTY] * 2 if void else [self.word[w] for w in PLACES[c].split()]) for c in range(9)]
            for _ in bags:
                d.image()
        else:
            d.add(describe(order, list(STYLES)[rng.integers(len(STYLES))]), learn=everything)
        for kind in rng.permutation([*KINDS, *KINDS, "shape", "caption"])[:rng.integers(3, 7)]:
            if kind == "caption":
                d.add(CAPTION, everything).add(" " + caption(sorted(things, key=lambda t: t.cell)), learn=True).end()
            elif q := self.world.question(things, kind, rng):
                d.add(QUESTION.format(q.question), everything).add(" " + q.answer, learn=True).end()
        return d, bags
