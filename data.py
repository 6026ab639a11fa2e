"""data.py: text to tokens, pictures to pixels, worlds and data sets to batches.

Chapters 1 tokenizers · 2 pictures · 3 documents and loss masks · 4 the `shapes` world · 5 the `emoji` world · 6 data sets on disk ·
         7 instructions from captions and boxes
Run      python data.py shapes:test 3     prints three items of a data set and writes their pictures to out/samples/
         python data.py generate shapes out/instruct 1000     writes LLaVA-Instruct's kind of data about them
"""
from __future__ import annotations

from typing import TYPE_CHECKING
import functools
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from model import IGNORE, IMAGE

if TYPE_CHECKING:
    from support.formats.tokenizers import Tokenizer

# ------------------------------------------------------------------------------------------------------------------
# 2. Pictures
# ------------------------------------------------------------------------------------------------------------------

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def center_slice(length: int, keep: int) -> slice:
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
            raise ValueError(f"how={self.how}, size={self.size}, tiles={self.tiles} is no image processor.")
        if self.resample not in range(6):
            raise ValueError(f"resample={self.resample} is none of Pillow's filters, 0 to 5.")
        if self.zoom < 1:
            raise ValueError(f"the crop of {self.size} pixels is larger than what it is cut from.")
        if min(*self.std, self.levels) <= 0:
            raise ValueError(f"std {self.std} and the grey levels {self.levels} are divisors and must be positive.")


def normalize(squares: np.ndarray, p: Processor) -> Tensor:
    """(…, h, w, 3) grey levels → (…, 3, h, w) float32."""
    x = torch.from_numpy(squares).movedim(-1, -3).float() / p.levels
    return (x - torch.tensor(p.mean).view(3, 1, 1)) / torch.tensor(p.std).view(3, 1, 1)


def to_pixels(images: list[np.ndarray], size: int | None = None, processor: Processor | None = None) -> Tensor:
    """uint8 (h, w, 3) pictures → (B, 3, S, S) float32. The defaults: the processor's own S, and CLIP's processor."""
    from support.formats.pictures import PROCESSORS
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
                image = image[center_slice(h, 300 * short), center_slice(w, 300 * short)]
            picture = Image.fromarray(image)
            if p.how == "pad":
                square = Image.new("RGB", (long, long), tuple(int(255 * m) for m in p.mean))
                square.paste(picture, ((long - w) // 2, (long - h) // 2))
                picture = square
            h, w = (int(side * n / short) for n in image.shape[:2]) if p.how == "crop" else (side, side)
            image = np.asarray(picture.resize((w, h), p.resample))
        squares.append(image[center_slice(image.shape[0], S), center_slice(image.shape[1], S)])
    return normalize(np.stack(squares), p)


# ------------------------------------------------------------------------------------------------------------------
# 3. Documents and loss masks
# ------------------------------------------------------------------------------------------------------------------

@dataclass
class QA:
    kind: str                       # existence, count, color, position, …: the row of the result table
    question: str
    answer: str
    answers: list[str] = field(default_factory=list)        # ten annotators', where the data set has them
    choices: tuple = ()             # of multiple choice
    correct: int = -1               # which choice is right
    hint: str = ""
    lecture: str = ""
    solution: str = ""
    source: object = None           # the entry on disk


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
        from support.formats.chat import TEMPLATES
        t = self.tokenizer
        if special and text == "<image>":
            return self.image()
        if special and text not in t.special:
            raise ValueError(f"this tokenizer has no token {text}, which the chat form needs; take another of {', '.join(TEMPLATES)}.")
        if special:
            return self.ids([] if self.tokens == [t.bos] == [t.special[text]] else [t.special[text]], learn)
        # LLaVA encodes what follows a picture as a text of its own
        start = self.tokens in ([], [t.bos]) or self.tokens[-1] == IMAGE
        before = "nothing" if start else "text" if self.tokens[-1] in t.text_ids else "special"
        return self.ids(t.encode(text, preceded_by=before), learn)

    def chat(self, messages: str | list[dict], answer: bool = True, template: str | None = None) -> Document:
        """A conversation in the form that the model knows (Template.spans): a prompt, or with answer=False a document to learn."""
        from support.formats.chat import TEMPLATES
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


def training_document(item: Item, tokenizer: Tokenizer, caption: bool = False, template: str | None = None, form: str = "QCM-LEA") -> Document:
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
            if q.choices:
                prompt, answer = scienceqa_text(q, form)
                d.turn("\n" + prompt, answer)
            else:
                d.turn(QUESTION.format(q.question), q.answer)
    return d


def pack_documents(documents: list[Document], longest: int, K: int) -> list[list[int]]:
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


def draw_scene(things: list[Thing], rng: np.random.Generator) -> np.ndarray:
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


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def place_phrase(t: Thing) -> str:
    return f"{with_article(str(t))} at the {t.place}"


def join_phrases(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption_scene(things: list[Thing]) -> str:
    return join_phrases([place_phrase(t) for t in things])


STYLES = {                          # ways to say a scene in words; the decoder learns to answer from all of them
    "at": lambda t: place_phrase(t),
    "in": lambda t: f"{with_article(str(t))} in the {t.place}",
    "place": lambda t: f"{t.place}: {with_article(str(t))}",
    "terse": lambda t: f"{t} {t.place}",
}


def describe_scene(things: list[Thing], style: str) -> str:
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
    finite, says_scenes = False, True
    name, size, held_out, seen, splits = "shapes", 3 * CELL, "test", "val", ("train", "val", "test", "all")

    def __init__(self, split: str = "train", seed: int = 0):
        if split not in ("train", "val", "test", "all"):
            raise ValueError(f'shapes has no split "{split}"; known: train, val, test, all.')
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
                return QA(kind, f"is there {with_article(f'{c} {s}')}?", "yes")
            absent = [p for p in self.asked if p not in pairs]
            near = [p for p in absent if any(p[0] == q[0] for q in pairs) and any(p[1] == q[1] for q in pairs)]   # both words occur
            c, s = pick(near if near and rng.random() < 0.7 else absent)
            return QA(kind, f"is there {with_article(f'{c} {s}')}?", "no")
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
        image = draw_scene(things, rng)
        kinds = KINDS if turns is None else rng.choice([*KINDS, "shape"], turns)
        qas = self.questions(things, rng, kinds)
        for q in qas:
            q.answers = [q.answer] * 10
        return Item(image, [caption_scene(o) for o in orders], qas, f"{self.split}-{index}", describe_scene(orders[1], "at"))

    def pair(self, index: int) -> tuple[np.ndarray, str, list[str]]:
        """For stage `clip`: a picture, a text that is true of it, and two that are nearly true (swapped or changed attributes)."""
        rng = self.rng(index)
        things = self.scene(rng)
        say = lambda ts: describe_scene([ts[i] for i in rng.permutation(len(ts))], "terse")
        return draw_scene(things, rng), say(things), [say(self.almost(things, rng)) for _ in range(2)]

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


def scienceqa_text(r: QA, form: str = "QCM-LEA") -> tuple[str, str]:
    """(prompt, answer) of a ScienceQA problem, worded as ScienceQA and LLaVA do:

        Question: …\\nContext: …\\nOptions: (A) … (B) …\\nAnswer:     lecture solution The answer is B.

    form: what is asked (Q question, C context, M choices) and what is answered (A letter, L lecture, E solution), in
    order. "QCM-LEA" is the reasoning first of LLaVA's ablation, "QCM-ALE" its answer first, "QCM-A" the answer alone.
    Double blanks are halved once, as published; the published "AL" and "AE" swap lecture and solution, these do not.
    """
    asked, told = form.split("-")
    letters = [chr(ord("A") + i) for i in range(len(r.choices))]
    part = {"Q": f"Question: {r.question}", "C": f"Context: {r.hint.strip() or 'N/A'}",
            "M": "Options: " + " ".join(f"({letter}) {choice}" for letter, choice in zip(letters, r.choices)),
            "A": f"The answer is {letters[r.correct]}." + " BECAUSE:" * (told[0] == "A"),
            "L": r.lecture, "E": r.solution}
    prompt, answer = "\n".join(part[p] for p in asked), " ".join(["Answer:", *(part[p] for p in told)])
    prompt, answer = (text.replace("  ", " ").rstrip() for text in (prompt, answer))
    return prompt + "\nAnswer:", answer.removesuffix("BECAUSE:").rstrip().removeprefix("Answer: ")


if __name__ == "__main__":
    from support.formats.files import UserError
    from support.worlds import show_items
    from support.worlds.instruct import generate_instructions
    try:
        generate_instructions(*sys.argv[2:6]) if sys.argv[1:2] == ["generate"] else show_items(*sys.argv[1:3])
    except UserError as e:
        print(f"data.py: {e}", file=sys.stderr)
        sys.exit(2)
