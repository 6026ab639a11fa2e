"""data.py: pictures to pixels, documents with loss masks, batches, and the `shapes` world with known truth.

Papers    LLaVA 2304.08485v2: conversations, supervised on the answers alone
          Flamingo 2204.14198v2: interleaved documents, a stop token after each chunk
Chapters  1 pictures to pixels · 2 documents with loss masks · 3 batches · 4 the `shapes` world
Run       python data.py shapes:test 3                      prints three items, pictures in out/samples/
          python data.py generate shapes out/instruct 1000  writes LLaVA-Instruct's samples; or stamps
"""
from __future__ import annotations

if __name__ == "__main__":
    from support.plumbing.stop import end_at_once
    end_at_once()                   # Ctrl-C while the next lines load: no traceback
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model import IGNORE, IMAGE

# 1. Pictures to pixels --------------------------------------------------------------------------------------

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Processor:
    """How a published image processor prepares a picture for a ViT; the defaults are CLIP's at 224 pixels.

    how     crop     resize the shorter side to zoom · S, keep the central S × S, lose the rest
            squash   resize to a square, or to S rows of `columns` pixels, and lose the proportions
            pad      paste into the middle of a square of the mean colour, then as crop
            tiles    cut into up to `tiles` squares (support/formats/pictures.py: tile_pixels)
    """
    how: str = "crop"
    size: int = 224                                     # S: side of the square that the ViT reads, in pixels
    zoom: float = 1.0                                   # side after resizing ÷ S; the centre is kept
    resample: int = 3                                   # Pillow's filter: 2 bilinear, 3 bicubic, …
    levels: float = 255.0                               # x ÷ levels, then − mean, ÷ std for each colour
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    tiles: int = 4                                      # the largest number of tiles, for how = tiles
    columns: int | None = None                          # of a rectangle, for how = squash; None: a square

    def __post_init__(self):
        if self.how not in ("crop", "squash", "pad", "tiles") or min(self.size, self.tiles) < 1:
            raise ValueError(f"how={self.how}, size={self.size}, tiles={self.tiles} is no image processor.")
        if self.resample not in range(6):
            raise ValueError(f"resample={self.resample} is none of Pillow's filters, 0 to 5.")
        if self.zoom < 1:
            raise ValueError(f"the crop of {self.size} pixels is larger than what it is cut from.")
        if min(*self.std, self.levels) <= 0:
            raise ValueError(f"std {self.std} and levels {self.levels} are divisors and must be positive.")


def center_slice(length: int, keep: int) -> slice:
    """The central `keep` of `length` pixels; all of them where there are fewer."""
    start = max(0, (length - keep) // 2)
    return slice(start, start + keep)


def resize(image: np.ndarray, side: int, p: Processor) -> np.ndarray:
    """(h, w, 3) uint8 → both sides at least `side` for crop, exactly `side` for squash and pad."""
    (h, w), (short, long) = image.shape[:2], sorted(image.shape[:2])
    if p.how == "crop":             # a picture thinner than 1 : 300 would need gigabytes at this size
        image = image[center_slice(h, 300 * short), center_slice(w, 300 * short)]
        h, w = (int(side * n / short) for n in image.shape[:2])
        return np.asarray(Image.fromarray(image).resize((w, h), p.resample))
    picture = Image.fromarray(image)
    if p.how == "pad" and long > 10_000:    # its square would need gigabytes: first, blocks become their mean
        return resize(np.asarray(picture.reduce(long // 5_000)), side, p)
    if p.how == "pad":
        picture = Image.new("RGB", (long, long), tuple(int(255 * m) for m in p.mean))
        picture.paste(Image.fromarray(image), ((long - w) // 2, (long - h) // 2))
    return np.asarray(picture.resize((p.columns or side, side), p.resample))


def normalize(squares: np.ndarray, p: Processor) -> Tensor:
    """(…, h, w, 3) grey levels → (…, 3, h, w) float32."""
    x = torch.from_numpy(squares).movedim(-1, -3).float() / p.levels
    return (x - torch.tensor(p.mean).view(3, 1, 1)) / torch.tensor(p.std).view(3, 1, 1)


def to_pixels(images: list[np.ndarray], size: int | None = None,
              processor: Processor | None = None) -> Tensor:
    """uint8 (h, w, 3) pictures → (B, 3, S, S) float32; defaults: CLIP's processor, the processor's own S."""
    p = processor or Processor()
    assert p.how != "tiles", "tile_pixels makes tiles"
    S, squares = size or p.size, []
    side = round(p.zoom * S)
    for image in images:
        image = image if image.shape[:2] == (side, p.columns or side) else resize(image, side, p)
        squares.append(image[center_slice(image.shape[0], S), center_slice(image.shape[1], p.columns or S)])
    return normalize(np.stack(squares), p)


# 2. Documents with loss masks -------------------------------------------------------------------------------

@dataclass
class QA:
    """A question about a picture and its answer; from `choices` on are fields of multiple choice."""
    kind: str                       # existence, count, color, position, …: the row of the result table
    question: str
    answer: str
    answers: list[str] = field(default_factory=list)        # of ten annotators, where the data set has them
    choices: tuple[str, ...] = ()
    correct: int = -1               # index of the right one
    hint: str = ""                  # ScienceQA's context of a question
    lecture: str = ""               # general knowledge behind the answer
    solution: str = ""              # the reasoning that leads to the answer
    reasons: str = ""               # where they stand in what is written: "before" the answer, or "behind" it
    source: object = None           # the record on disk, where there is one


@dataclass
class Item:
    """A picture with its captions and questions: the common form of every data set."""
    image: np.ndarray | None        # (h, w, 3) uint8; None: text alone
    captions: list[str]             # references
    qas: list[QA]
    id: str = ""
    about: str = ""                 # the picture in words: the oracle reads it in place of the picture
    images: list[np.ndarray] = field(default_factory=list)  # all pictures of an interleaved document
    turns: list[dict] = field(default_factory=list)         # a conversation, for Document.chat
    chunks: list[tuple[int | None, str]] = field(default_factory=list)      # (picture before it, text)

    @property
    def pictures(self) -> list[np.ndarray]:
        """All pictures in the order in which they stand in the text."""
        if self.chunks:
            return [self.images[n] for n, _ in self.chunks if n is not None]
        return self.images or ([] if self.image is None else [self.image])


QUESTION = "\nQuestion: {} Answer:"                     # an answer begins with a blank
CAPTION = "\nCaption:"


class Document:
    """A token sequence with its loss mask: `labels` repeat the supervised tokens and hold IGNORE elsewhere.

    >>> Document(tokenizer).image().add("\\nCaption:").add(" a red circle", learn=True).end()

    A tokenizer (support/formats/tokenizers.py) has encode(text), begin (ids in front of a text), eos (id or
    None), special (text → id), text_ids (ids of plain text), and a template (support/formats/chat.py), whose
    spans(messages, answer) are the arguments of `add`; a `whole` one writes the first token itself, too.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.tokens = tokenizer, [*tokenizer.begin]
        self.labels = [IGNORE] * len(self.tokens)
        self.start = len(self.tokens)                   # where the text starts

    def add(self, text: str, learn: bool = False, special: bool = False) -> Document:
        """Append a text. special: it names a special token (a ValueError if there is none), or "<image>"."""
        t = self.tokenizer
        if special and text == "<image>":
            return self.image()
        if special and text not in t.special:
            raise ValueError(f"this tokenizer has no token {text} of the chat template; take another.")
        if special:
            return self.ids([t.special[text]], learn)
        if len(self.tokens) == self.start or self.tokens[-1] == IMAGE:
            before = "nothing"                          # LLaVA encodes the text after a picture separately
        else:
            before = "text" if self.tokens[-1] in t.text_ids else "special"
        return self.ids(t.encode(text, preceded_by=before), learn)

    def chat(self, messages: str | list[dict], answer: bool = True, template=None) -> Document:
        """Append a conversation as the template writes it (default: the tokenizer's).

        answer=True makes a prompt that ends where the assistant answers, answer=False a document to train on.
        """
        template = template or self.tokenizer.template
        if template.whole and len(self.tokens) == self.start:
            self.tokens, self.labels, self.start = [], [], 0
        for span in template.spans(messages, answer):
            self.add(*span)
        return self

    def ids(self, ids: list[int], learn: bool = False) -> Document:
        """Append tokens."""
        self.tokens += ids
        self.labels += ids if learn else [IGNORE] * len(ids)
        return self

    def image(self) -> Document:
        """Append the sentinel that stands for a picture."""
        return self.ids([IMAGE])

    def end(self) -> Document:
        """Append the stop token, supervised: generation stops only if the model has learned to write it."""
        return self.ids([self.tokenizer.eos], learn=True)

    def turn(self, prompt: str, answer: str) -> Document:
        """Append a prompt, then its supervised answer and the stop token."""
        return self.add(prompt).add(" " + answer, learn=True).end()

    def cut(self, longest: int, K: int) -> bool:
        """Truncate to at most `longest` positions (a picture takes K); returns whether tokens were lost."""
        sizes = np.cumsum([K if t == IMAGE else 1 for t in self.tokens])
        n = int((sizes <= longest).sum())
        self.tokens, self.labels = self.tokens[:n], self.labels[:n]
        return n < len(sizes)


def training_document(item: Item, tokenizer, caption: bool = False, template=None,
                      choice_text: Callable[[QA], tuple[str, str]] | None = None) -> Document:
    """The document that is trained on for an item. The first of these that the item has decides:

    - its conversation, as `template` writes it (None: the tokenizer's template);
    - its interleaved text, with a stop token after each chunk (Flamingo's <EOC>);
    - its first caption, where `caption` asks for it or there are no questions;
    - all of its questions with their answers; choice_text(q) → (prompt, answer) words those with choices.
    """
    d = Document(tokenizer)
    if item.turns:
        turns = item.turns
        if template is not None and template.caption_only:  # LLaVA's first stage: no question
            answer = next(t for t in turns if t["role"] == "assistant")
            turns = [{"role": "user", "content": "<image>" * len(item.pictures)}, answer]
        d.chat(turns, answer=False, template=template)
        return d.end() if template is not None and template.ends_with_eos else d
    if item.chunks:
        for picture, text in item.chunks:
            (d if picture is None else d.image()).add(text, learn=True).end()
        return d
    if item.image is not None:
        d.image()
    if item.captions and (caption or not item.qas):
        return d.turn(CAPTION, item.captions[0])
    for q in item.qas:
        if q.choices and choice_text:
            prompt, answer = choice_text(q)
            d.turn("\n" + prompt, answer)
        else:
            d.turn(QUESTION.format(q.question), q.answer)
    return d


# 3. Batches -------------------------------------------------------------------------------------------------

def collate(rows: list[Document | list[Document]], left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Documents → tokens, labels (B, T) int64 and mask (B, T) bool, False = padding.

    Pad on the left to generate, on the right to train. Where a row is a list of documents (pack_documents),
    the mask is int64: the number of each token's document within its row, from 1, and 0 for padding.
    """
    packed = any(isinstance(row, list) for row in rows)
    rows = [row if isinstance(row, list) else [row] for row in rows]
    B, T = len(rows), max(sum(len(d.tokens) for d in row) for row in rows)
    tokens, labels, mask = np.zeros((B, T), np.int64), np.full((B, T), IGNORE), np.zeros((B, T), np.int64)
    for r, row in enumerate(rows):
        start = T - sum(len(d.tokens) for d in row) if left else 0
        for number, d in enumerate(row, 1):
            end = start + len(d.tokens)
            tokens[r, start:end], labels[r, start:end], mask[r, start:end] = d.tokens, d.labels, number
            labels[r, start:start + 1] = IGNORE         # nothing of its document stands before it
            start = end
    return torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(mask if packed else mask > 0)


# 4. The `shapes` world: a generator with known truth, unlimited, nothing to download ------------------------

COLORS = {"red": (230, 40, 40), "green": (40, 180, 60), "blue": (60, 90, 245), "yellow": (245, 220, 50),
          "purple": (160, 60, 200), "orange": (245, 140, 30), "cyan": (60, 220, 230),
          "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 10, "large": 14}                      # side in pixels
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
PLURALS = [(c, f"{c} objects") for c in COLORS] + [(s, s + ("es" if s[-1] == "s" else "s")) for s in SHAPES]
NUMBERS = ("zero", "one", "two", "three", "four")
KINDS = ("existence", "count", "color", "position")     # MME's coarse perception tasks
HELD_OUT = tuple(zip(COLORS, (*SHAPES, "circle", "square")))    # 8 of the 48 pairs of a colour and a shape
SEEN = tuple((c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_OUT)
CELL, BACKGROUND = 16, (24, 24, 32)                     # side of a grid cell in pixels; grey levels


@dataclass(frozen=True)
class Thing:
    """An object of a scene."""
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
    y, x = ((np.mgrid[0:side * 8, 0:side * 8] + 0.5) / (side * 4) - 1)      # −1..1
    r = np.hypot(x, y)
    inside = {"circle": r <= 1, "square": np.maximum(abs(x), abs(y)) <= 0.88,
              "triangle": (y <= 0.9) & (abs(x) <= (y + 1) / 1.9), "diamond": abs(x) + abs(y) <= 1,
              "cross": np.minimum(abs(x), abs(y)) <= 0.3, "ring": (r <= 1) & (r >= 0.55)}[shape]
    return inside.reshape(side, 8, side, 8).mean((1, 3))


def draw_scene(things: list[Thing], rng: np.random.Generator) -> np.ndarray:
    """(48, 48, 3) uint8; each thing in its cell, off the centre by up to 2 pixels (small) or 1 (large)."""
    canvas = np.empty((3 * CELL, 3 * CELL, 3), np.float32)
    canvas[:] = BACKGROUND
    for t in things:
        coverage = sprite(t.shape, t.size)[..., None]
        side = len(coverage)
        jitter = 2 if t.size == "small" else 1
        offset = (CELL - side) // 2 + rng.integers(-jitter, jitter + 1, 2)
        top, left = offset + np.array(divmod(t.cell, 3)) * CELL
        patch = canvas[top:top + side, left:left + side]
        patch += coverage * (np.array(COLORS[t.color]) - patch)
    return canvas.round().astype(np.uint8)


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def place_phrase(t: Thing) -> str:
    return f"{with_article(str(t))} at the {t.place}"


def join_phrases(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption_scene(things: list[Thing]) -> str:
    return join_phrases([place_phrase(t) for t in things])


def unique(things: list[Thing], candidates: list[Thing], key: Callable[[Thing], object]) -> list[Thing]:
    """The candidates whose key no other thing of the scene has."""
    return [t for t in candidates if sum(key(other) == key(t) for other in things) == 1]


def choose(options: list, rng: np.random.Generator):
    """One of the options, or None where there is none."""
    return options[int(rng.integers(len(options)))] if options else None


class Shapes:
    """Scenes of 1 to 4 things; item(i) is a function of (seed, split, i) alone.

    Splits: `train` and `val` never show or mention a held-out colour-shape pair. Every scene of `test` shows
    at least one, and its questions are about held-out pairs wherever the kind allows. `all` (for text alone)
    uses all 48. One item: a picture of 48 × 48 pixels with a small red square top left and a large blue ring
    middle center, captions ("a small red square at the top left and a large blue ring at the middle center",
    …), and questions: is there a red square? yes · how many rings are there? one · what color is the ring?
    blue · where is the red square? top left.
    """
    name, size, splits = "shapes", 3 * CELL, ("train", "val", "test", "all")
    held_out, seen = "test", "val"
    finite, says_scenes = False, True

    def __init__(self, split: str = "train", seed: int = 0):
        if split not in self.splits:
            raise ValueError(f'shapes has no split "{split}"; known: {", ".join(self.splits)}.')
        self.split, self.seed = split, seed
        self.allowed = SEEN if split in ("train", "val") else SEEN + HELD_OUT   # pairs that a scene may show
        self.asked = HELD_OUT if split == "test" else self.allowed          # pairs that questions are about

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.splits.index(self.split), index))

    def scene(self, rng: np.random.Generator) -> list[Thing]:
        """1 to 4 things in different cells; half of the scenes repeat a colour or a shape, for the counts."""
        n = int(rng.integers(1, 5))
        cells = rng.permutation(9)[:n]
        pairs = [self.allowed[i] for i in rng.integers(0, len(self.allowed), n)]
        if rng.random() < 0.5:
            axis = int(rng.integers(2))
            similar = [p for p in self.allowed if p[axis] == pairs[0][axis]]
            pairs[1:] = [similar[rng.integers(len(similar))] if rng.random() < 0.7 else p for p in pairs[1:]]
        if self.split == "test" and not any(p in HELD_OUT for p in pairs):
            pairs[int(rng.integers(n))] = HELD_OUT[rng.integers(len(HELD_OUT))]
        sizes = rng.integers(0, 2, n)
        return [Thing(*p, ("small", "large")[s], int(c)) for p, s, c in zip(pairs, sizes, cells)]

    def question(self, things: list[Thing], kind: str, rng: np.random.Generator) -> QA | None:
        """A question of this kind whose answer is unique in this scene, or None where there is none."""
        candidates = [t for t in things if t.pair in self.asked]
        if kind == "existence":
            return self.existence_question(things, candidates, rng)
        if kind == "count":
            return self.count_question(things, rng)
        if kind == "position":
            t = choose(unique(things, candidates, lambda o: o.pair), rng)
            return t and QA(kind, f"where is the {t.color} {t.shape}?", t.place)
        if kind == "color":
            if rng.random() < 0.5 and (t := choose(unique(things, candidates, lambda o: o.shape), rng)):
                return QA(kind, f"what color is the {t.shape}?", t.color)
            t = choose(candidates, rng)
            return QA(kind, f"what color is the object at the {t.place}?", t.color)
        if rng.random() < 0.5 and (t := choose(unique(things, candidates, lambda o: o.color), rng)):
            return QA(kind, f"what shape is the {t.color} object?", t.shape)
        t = choose(candidates, rng)
        return QA(kind, f"what shape is at the {t.place}?", t.shape)

    def existence_question(self, things: list[Thing], candidates: list[Thing],
                           rng: np.random.Generator) -> QA:
        """Half of the answers are yes. Most absent pairs combine a colour and a shape that both occur."""
        if rng.random() < 0.5:
            c, s = choose([t.pair for t in candidates], rng)
            return QA("existence", f"is there {with_article(f'{c} {s}')}?", "yes")
        pairs = [t.pair for t in things]
        absent = [p for p in self.asked if p not in pairs]
        near = [p for p in absent if any(p[0] == q[0] for q in pairs) and any(p[1] == q[1] for q in pairs)]
        c, s = choose(near if near and rng.random() < 0.7 else absent, rng)
        return QA("existence", f"is there {with_article(f'{c} {s}')}?", "no")

    def count_question(self, things: list[Thing], rng: np.random.Generator) -> QA:
        """The answer is drawn before the question; even so "one" is the commonest, 44 % of the answers."""
        target = int(rng.integers(0, len(things) + 1))
        counts = [(sum(word in t.pair for t in things), plural) for word, plural in PLURALS]
        if rng.random() < 0.2:
            return QA("count", "how many objects are there?", NUMBERS[len(things)])
        options = [c for c in counts if c[0] == target] or [c for c in counts if c[0]]
        n, plural = choose(options, rng)
        return QA("count", f"how many {plural} are there?", NUMBERS[n])

    def questions(self, things: list[Thing], rng: np.random.Generator, kinds=KINDS) -> list[QA]:
        return [q for q in (self.question(things, kind, rng) for kind in kinds) if q]

    def item(self, index: int, turns: int | None = None) -> Item:
        """One question of each kind, or for training `turns` of random kinds, with "shape" as a fifth."""
        rng = self.rng(index)
        things = self.scene(rng)
        orders = [sorted(things, key=lambda t: t.cell)]
        orders += [[things[i] for i in rng.permutation(len(things))] for _ in range(4)]
        image = draw_scene(things, rng)
        kinds = KINDS if turns is None else rng.choice([*KINDS, "shape"], turns)
        qas = self.questions(things, rng, kinds)
        for q in qas:
            q.answers = [q.answer] * 10
        captions, about = [caption_scene(order) for order in orders], "; ".join(map(place_phrase, orders[1]))
        return Item(image, captions, qas, f"{self.split}-{index}", about)


if __name__ == "__main__":
    from support.plumbing.cli import run_cli
    from support.worlds.commands import main
    run_cli(main)
