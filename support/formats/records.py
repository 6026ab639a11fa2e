"""formats/records.py: what the readers of data sets share.

chapters: Record and BrokenRecord, which a reader yields · parse_rows, which makes one or the other of each
row · opening a file: load_lists (JSON), read_lines (text), read_rows (JSON or JSON lines), read_table (CSV) ·
paths: path_inside, find_picture, picture_key, first_existing.
"""
from __future__ import annotations

import contextlib
import contextvars
import csv
import hashlib
import itertools
import json
import os
import re
import unicodedata
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

from support.formats.files import UserError, refuse_device


def checked_text(value, halves: str = "replace") -> str:
    """The text, with "?" for each half of a surrogate pair (JSON can spell one); a ValueError if it is no
    text. halves: another way of Python's to encode them."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} stands where a text belongs")
    return value.encode("utf-8", halves).decode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a data set as it lies on disk, its texts raw; what a format does not have stays empty."""
    id: int | str
    images: tuple[str, ...] = ()                        # paths
    split: str = "train"
    captions: tuple[str, ...] = ()
    kind: str = ""                                      # of the question: answer type, MME's task, subject
    question: str = ""
    answers: tuple[str, ...] = ()                       # of ten annotators, or the right one alone
    choices: tuple[str, ...] = ()
    answer: int = -1                                    # index of the right choice
    turns: tuple[tuple[str, str], ...] = ()             # a conversation: ("system", "human" or "gpt", text)
    texts: tuple[str, ...] = ()                         # sentences of an interleaved document
    more: dict = field(default_factory=dict)            # other fields, under the format's own names

    def __post_init__(self):
        for name, default in TEXT_FIELDS:
            value, is_list = getattr(self, name), default == ()
            if is_list and not isinstance(value, (list, tuple)):
                raise ValueError(f"{value!r:.40} stands where {name} belong")
            if value is not default:
                halves = "surrogatepass" if name == "images" else "replace"     # a file's name is any bytes
                checked = tuple(checked_text(v, halves) for v in (value if is_list else [value]))
                object.__setattr__(self, name, checked if is_list else checked[0])      # the class is frozen
        if isinstance(self.id, str):                    # perhaps a file's name; it is printed and written
            object.__setattr__(self, "id", checked_text(self.id, "backslashreplace"))
        wrong_choice = self.choices and self.answer not in range(len(self.choices))
        if not isinstance(self.id, (int, str)) or wrong_choice:
            raise ValueError(f"the answer is {self.answer!r:.40} and the id {self.id!r:.40}, which cannot be")
        if flaw := self.flaw():
            raise ValueError(flaw)

    def flaw(self) -> str:
        """Why nothing can be learned from this entry, or not what it says; "" where all is well."""
        for name in ("captions", "answers", "texts"):
            texts = getattr(self, name)
            if texts and not any(map(str.strip, texts)):
                return f"all of its {name} are empty"
        if (self.answers or self.choices) and not self.question.strip():
            return "its question is empty"
        places = [speaker for speaker, text in self.turns for _ in range(text.count("<image>"))]
        if self.turns and (len(places) != len(self.images) or set(places) - {"human"}):
            return (f"<image> stands {len(places)} times for {len(self.images)} pictures, but each picture "
                    "needs one, in a human turn")
        return ""


TEXT_FIELDS = [(f.name, f.default) for f in fields(Record)          # texts and lists of texts
               if isinstance(f.default, (str, tuple)) and f.name != "turns"]


def count_words(r: Record) -> int:
    """The words that training can learn of a record: captions, one answer, what gpt says, sentences."""
    texts = [*r.captions, *r.answers[:1], *r.texts, *(text for who, text in r.turns if who == "gpt")]
    return sum(len(text.split()) for text in texts)


class BrokenRecord(NamedTuple):
    """What a reader yields in place of an entry that it cannot use."""
    where: str                                          # file and entry
    why: str


class Unpaired(NamedTuple):
    """A picture without a text, or a text without a picture: all of one kind are counted in one sentence."""
    where: str                                          # the file
    noun: str                                           # "picture" or "text"
    missing: str                                        # the other of the two
    advice: str
    stops: bool = True                                  # whether a strict run stops at it


def parse_rows(where: str, rows, make) -> Iterator[Record | BrokenRecord]:
    """Yield make(n, row) of every row; n counts from 1, of a dict it is the key.

    A row whose make fails becomes a BrokenRecord that names `where` and n. A row whose make returns None is
    skipped, and so is an empty line, which counts.
    """
    for n, row in rows.items() if isinstance(rows, dict) else enumerate(rows, 1):
        if isinstance(row, str) and not row.strip():
            continue
        try:
            record = make(n, row)
        except KeyError as e:
            record = BrokenRecord(f"{where} {n}", f'"{e.args[0]}" is missing')
        except (TypeError, AttributeError) as e:
            record = BrokenRecord(f"{where} {n}", f"not of the form that {LAYOUT} ({e})")
        except (ValueError, OverflowError, RecursionError) as e:
            record = BrokenRecord(f"{where} {n}", str(e))
        if record is not None:
            yield record


READING: contextvars.ContextVar[tuple[Path, Path] | None] = contextvars.ContextVar("READING", default=None)


@contextlib.contextmanager
def reading_inside(folder: Path, named: Path):
    """While it lasts, a file behind a link that leaves the folder is refused, but for the named one."""
    token = READING.set((folder, named))
    try:
        yield
    finally:
        READING.reset(token)


@contextlib.contextmanager
def naming_file(file: Path):
    """Turns an error that concerns a whole file into a UserError that names the file."""
    folder, named = READING.get() or (None, None)
    if folder is not None and file != named and link_leaves(folder, file):
        raise UserError(f"{file}: a link that leaves {folder}; --follow-links reads it.")
    refuse_device(file)
    try:
        yield
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({type(e).__name__}); lay the files out as {LAYOUT}."
                        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: is no text in UTF-8; save it as UTF-8.") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise UserError(f"{file}: holds no usable record ({type(e).__name__}: {e}), nothing that {LAYOUT}."
                        ) from None


LAYOUT = "its reader in support/formats/datasets.py shows"


def load_lists(file: Path, *names: str, kind=list):
    """The list in a JSON file (UTF-8 with or without BOM, UTF-16), or the lists of these names in its object.

    kind: dict for a file that holds a dict. Several names give several lists.
    """
    with naming_file(file):
        data = json.loads(file.read_bytes())
        lists = [data[name] for name in names] or [data]
        for value in lists:
            if not isinstance(value, kind):
                raise ValueError(f"{value!r:.40} stands where a {kind.__name__} belongs")
    return lists if len(lists) > 1 else lists[0]


def read_lines(file: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, or of a UTF-16 one with BOM.

    Only \\n and \\r\\n end one: str.splitlines would cut a caption at U+2028.
    """
    n = 0
    with naming_file(file), open(file, encoding=encoding_of(file), newline="\n") as f:
        for n, line in enumerate(f, 1):
            yield line.rstrip("\r\n")
        if not n:
            raise ValueError("it is empty")


def encoding_of(file: Path) -> str:
    with open(file, "rb") as f:
        return "utf-16" if f.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def read_rows(file: Path):
    """The rows of a JSON list, or the lines of a file with a JSON object a line, whatever the file is called.

    `row_object` makes the object of a row.
    """
    with naming_file(file), open(file, encoding=encoding_of(file)) as f:
        start = f.read(1)
        while start.isspace():
            start = f.read(1)
    return load_lists(file) if start == "[" else read_lines(file)


def row_object(row):
    return json.loads(row) if isinstance(row, str) else row


def read_table(file: Path, *columns: tuple[str, ...]) -> Iterator[dict]:
    """Rows of a table as dicts; commas, semicolons or tabs stand between its columns, which line 1 names.

    columns: one name of each of these must be among them.
    """
    lines = read_lines(file)
    head = next(lines)
    mark = max(",;\t", key=head.count)
    whole = (line + "\n" for line in itertools.chain([head], lines))             # a quoted field may go on
    rows = csv.DictReader(whole, delimiter=mark, strict=True, skipinitialspace=True)
    try:
        rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or ()]
        if known := next((names for names in columns if not set(names) & set(rows.fieldnames)), None):
            raise UserError(f'{file}: its first line is "{head:.60}", but it must name the columns, '
                            f"among them one of {', '.join(known)}.")
        yield from rows
    except csv.Error as e:
        first, last = rows.line_num + 1, rows.reader.line_num           # of the row, with empty lines before
        lines = f"line {last}" if first == last else f"lines {first} to {last}"
        raise UserError(f"{file}, {lines}: {e}; repair the table.") from None


def same_id(value):
    """An id as a number where it is one: 7, "7" and 7.0 name the same picture."""
    if isinstance(value, float) and value.is_integer() or isinstance(value, str) and value.isdecimal():
        return int(value)
    return value


def path_inside(folder: Path, name: str, *roots: str) -> str:
    """folder/name; with roots, in the first of these subfolders that has it.

    A name that leads out of the folder is refused: a downloaded list must not choose which of our files are
    read. Whether a link does is checked where a picture is opened (`link_leaves`).
    """
    name = checked_text(name)
    if os.path.isabs(name):
        name = name.removeprefix(f"{folder.absolute()}/")
    if not name or "\0" in name or os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
        raise ValueError(f'the picture "{name}" lies outside the folder of the data set')
    paths = [f"{folder / root}/{name}" for root in roots or (".",)]
    if not roots:                              # one candidate: no look at the disk, millions of pictures pass
        return paths[0]
    return next((p for p in map(find_picture, paths) if os.path.exists(p)), paths[0])


def link_leaves(folder: Path, path: str) -> bool:
    """Whether the path leads out of the folder by a symbolic link, of the file or of a folder before it."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


ENDINGS = (".jpg", ".jpeg", ".JPG", ".JPEG", ".png", ".PNG", ".webp", ".WEBP", ".gif", ".GIF", ".bmp", ".BMP",
           ".tif", ".tiff", ".TIF", ".TIFF", ".jfif", ".JFIF", ".ppm", ".PPM", ".pgm", ".PGM")
OTHER_ENDINGS = (".heic", ".heif", ".avif", ".svg", ".jxl", ".jp2", ".psd", ".raw", ".dng", ".cr2", ".cr3",
                 ".nef", ".arw", ".orf", ".rw2", ".raf")        # of pictures that read_image does not open
UNREADABLE = ("picture", "form that is read here", "convert HEIC, AVIF, SVG, raw and the like to JPEG")


def plain_ending(ending: str) -> str:
    """One ending for .JPG, .jpg and .jpeg, and so on."""
    return {".jpeg": ".jpg", ".tiff": ".tif"}.get(ending.lower(), ending.lower())


def find_picture(path: str) -> str:
    """The path, or another spelling of it under which there is a file.

    cat.jpg is also cat.JPG or cat.jpeg, a name without an ending gets one, and dir\\cat.jpg is dir/cat.jpg.
    cat.png is another picture. An accent may be one character or two: macOS writes two.
    """
    if os.path.exists(path):
        return path
    for form in () if path.isascii() else ("NFC", "NFD"):
        spelled = unicodedata.normalize(form, path)
        if os.path.exists(spelled):
            return spelled
    stem, ending = os.path.splitext(path.replace("\\", "/"))
    if ending not in ENDINGS and ending.lower() not in ENDINGS:
        spellings = [stem + ending, *(stem + ending + e for e in ENDINGS)]
    else:
        spellings = [stem + ending, *(stem + e for e in ENDINGS if plain_ending(e) == plain_ending(ending))]
    return next((p for p in spellings if os.path.exists(p)), path)


COCO_NAME = re.compile(r"(?:train|val|test|unlabeled)20(?:14|15|17)/(?:COCO_\w+_)?(\d{12})\.jpe?g$", re.I)


def picture_key(path: str) -> str:
    """What is equal for two paths of one picture: COCO's number, which 2014's and 2017's names share."""
    number = COCO_NAME.search(path)
    return f"COCO {number[1]}" if number else os.path.abspath(path)


MOST_COMPARED = 200_000         # pictures; reading the ends of so many takes minutes on a slow disk


def name_contents(paths: Iterable[str]) -> dict[str, str]:
    """Path → the first of these paths whose file has the same bytes; a missing file has only itself.

    Links to one file have the same bytes. A file is read only where another one has its size: first its last
    4 KB, then all of it where these agree. 100,000 files in memory take 5 s if all have one size, else 1 s.
    """
    names = {path: path for path in paths}
    by_size: dict[int, list[str]] = {}
    for path in names:
        with contextlib.suppress(OSError):
            by_size.setdefault(os.stat(find_picture(path)).st_size, []).append(path)
    for digest in (end_digest, file_digest):
        groups: dict[tuple, list[str]] = {}
        for key, alike in by_size.items():
            for path in alike if len(alike) > 1 else ():
                with contextlib.suppress(OSError):
                    groups.setdefault((key, digest(find_picture(path))), []).append(path)
        by_size = groups
    for same in by_size.values():
        names |= dict.fromkeys(same, same[0])
    return names


def content_name(size: int, last: bytes) -> int:
    """A number of 64 bits for a picture of this many bytes that ends so (its last 4096)."""
    return int.from_bytes(hashlib.blake2b(b"%d " % size + last, digest_size=8).digest(), "little")


def end_digest(path: str) -> bytes:
    with open(path, "rb") as f:
        f.seek(-min(4096, os.fstat(f.fileno()).st_size), os.SEEK_END)
        return hashlib.sha256(f.read()).digest()


def file_digest(path: str) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(2**20):
            digest.update(part)
    return digest.digest()


def first_existing(path: Path, *names: str) -> Path:
    """path if it is a file; of a folder the first of these names that exists, else the first name.

    A name may also lie in one of the folders that people sort the files of a data set into (FOLDERS).
    """
    if path.is_file():
        return path
    places = [path / folder / name for name in names for folder in (".", *FOLDERS)]
    return next((place for place in places if place.exists()), path / names[0])


FOLDERS = ("annotations", "Annotations", "Questions", "questions")
