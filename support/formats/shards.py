"""formats/shards.py: pictures with texts in shards, of which one record at a time is in memory.

    wds:PATH        00000.tar …: cat.jpg, cat.txt (or .json, .caption); a key is the name up to its first dot;
                    each line of a text is a caption, as in a folder
    parquet:PATH    train-00000-of-00002.parquet …: a column `image` of {bytes, path}, others of texts

PATH is a shard or a folder of shards, in sub-folders, too. Opening is one pass over the shards: it checks
every text, names every picture by its bytes, and keeps some tens of bytes of a record. A name that holds
train, val (validation, dev) or test says of which split a shard is, where the shards are of several. Nothing
is unpacked to the disk. Fields of a row: rows.py.

chapters: Shards, what both kinds share · TarShards · ParquetShards · SHARDED, the table of kinds.
"""
from __future__ import annotations

import collections
import functools
import hashlib
import io
import json
import os
import re
import tarfile
import unicodedata
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np

from support.formats.files import UserError
from support.formats.own_pictures import SPLITS, caption_lines
from support.formats.records import (BrokenRecord, ENDINGS, OTHER_ENDINGS, Record, UNREADABLE, Unpaired,
                                     checked_text, content_name, count_words, naming_file)
from support.formats.rows import CAPTIONS, FIELDS, IDS, NO_TEXT, TEXTS, row_record

SPLIT_NAME = re.compile(rf"(?:^|[-_./])({'|'.join(SPLITS)})(?=[-_./\d]|$)", re.I)


class Found(NamedTuple):
    """A record that a pass has met."""
    place: tuple[int, ...]                              # numbers by which the shard finds it again
    content: int                                        # content_name of its picture, else of its text
    size: int                                           # bytes of its pictures
    words: int                                          # of count_words
    alone: bool                                         # an item of its own: a conversation, a text
    joins: bool                                         # shows what the record before it in its shard shows
    text: bytes                                         # what its texts are made of, for the digest


class Shards:
    """The records of shards, in their order: `record(n)` and `picture(n, k)` read them again.

    places (n, …), contents, sizes, words and splits (n,) say where each lies, what its picture is, how large
    it is, how much text it has and of which split its shard is. items (m, 2): first and last + 1 row; rows of
    the same pictures, byte by byte, that follow one another are an item. flaws: what cannot be used. digest:
    of all of it. unread: how many rows have a caption or a question and pictures after their first.
    """
    ending = ""

    def __init__(self, path: Path):
        self.files = [path] if path.is_file() else sorted(path.rglob(f"*{self.ending}"))
        if not self.files:
            raise UserError(f"{path}: holds no file {self.ending}{self.other_files(path)}.")
        top = path.parent if path.is_file() else path
        self.names = [str(file.relative_to(top)) for file in self.files]
        self.splits_of = [declared_split(name) for name in self.names]
        self.flaws: list[BrokenRecord | Unpaired] = []
        self.unread = 0
        digest = hashlib.sha256()
        columns: list[list] = [[] for _ in range(7)]    # places, contents, sizes, words, alone, joins, splits
        for shard, file in enumerate(self.files):
            with naming_file(file):
                open(file, "rb").close()
            for found in self.scan(shard):
                if not isinstance(found, Found):
                    self.flaws.append(found)
                    continue
                for column, value in zip(columns, (*found[:6], self.splits_of[shard] or "train")):
                    column.append(value)
                digest.update(b"%d %d " % (found.content, found.size) + found.text)
        self.places = np.array(columns[0] or np.zeros((0, 4)), np.int64)
        self.contents, self.sizes = np.array(columns[1], np.uint64), np.array(columns[2], np.int64)
        self.words = np.array(columns[3], np.int64)
        self.splits, self.digest = np.array(columns[6], "U5"), digest.hexdigest()[:32]
        alone, joins = np.array(columns[4], bool), np.array(columns[5], bool)
        new = np.ones(len(alone), bool)                 # whether a row begins an item
        new[1:] = alone[1:] | alone[:-1] | ~joins[1:]
        starts = np.flatnonzero(new)
        self.items = np.stack((starts, np.append(starts, len(new))[1:]), 1)

    def other_files(self, path: Path) -> str:
        """What to do about the files of another kind that lie there; "" where there are none."""
        return f"; give a file {self.ending} or a folder of them"

    def scan(self, shard: int) -> Iterator[Found | BrokenRecord | Unpaired]:
        """What a pass over a shard meets."""
        raise NotImplementedError

    def record(self, n: int) -> Record:
        """Row n; its images are names for messages alone."""
        raise NotImplementedError

    def picture(self, n: int, k: int) -> io.BytesIO:
        """The file of picture k of row n."""
        raise NotImplementedError

    def order(self, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random order of the items `chosen`, as positions in that array."""
        return rng.permutation(len(chosen))


def declared_split(name: str) -> str:
    """The split that the name of a shard says; "" if it says none."""
    said = SPLIT_NAME.findall(name.rpartition(".")[0])
    return SPLITS[said[-1].lower()] if said else ""


FLAWS = (ValueError, TypeError, AttributeError, KeyError, RecursionError)       # of row_record


def flaw_of(where: str, error: Exception, advice: str) -> BrokenRecord | Unpaired:
    """What a row is that gives no Record."""
    if str(error) == NO_TEXT:
        return Unpaired(where, "picture", "text", advice)
    form = not isinstance(error, ValueError)
    return BrokenRecord(where, f"not of a form that rows.py shows ({error})" if form else str(error))


# Tar files --------------------------------------------------------------------------------------------------

PICTURES, NOTES = tuple(dict.fromkeys(e[1:].lower() for e in ENDINGS)), ("txt", "caption", "json")
LACKING = "a key needs a picture (.jpg, .png, .webp …) and a .txt, .caption or .json"
DOTTED = ("member", "ending of one part", "a key ends at its first dot; rename them, one dot a name")


class TarShards(Shards):
    """WebDataset's layout; a place is (shard, and offset and size of the picture and of each of NOTES)."""
    ending = ".tar"

    def __init__(self, path: Path):
        self.keys: list[str] = []
        super().__init__(path)

    def other_files(self, path: Path) -> str:
        packed = next((file for file in path.rglob("*.t*gz")), None)
        return f", but {packed.name}; unpack it with gunzip" if packed else super().other_files(path)

    def scan(self, shard: int) -> Iterator[Found | BrokenRecord | Unpaired]:
        file, members = self.files[shard], {}           # members: key → ending → (offset, size, content)
        with open(file, "rb", buffering=2**18) as f:
            yield from self.read_members(f, file, members)
        last = (0, 0, None)                             # the picture of the record before
        for key, parts in members.items():
            picture = next((parts[ending] for ending in PICTURES if ending in parts), None)
            notes = [parts.get(ending, (0, 0, b"")) for ending in NOTES]
            where = f"{file}, key {checked_text(key)}"
            if picture is None or not any(size for _, size, _ in notes):
                lacks = ("picture", "text") if picture else ("text", "picture")
                yield Unpaired(where, *lacks, LACKING)
                continue
            try:
                record = self.make(shard, key, [content for *_, content in notes])
            except FLAWS as e:
                yield flaw_of(where, e, LACKING)
                continue
            self.keys.append(key)
            place = (shard, *picture[:2], *(number for note in notes for number in note[:2]))
            text = b"\0".join((key.encode("utf-8", "replace"), *(content for *_, content in notes)))
            joins = picture[1:] == last[1:] and same_bytes(file, picture, last)
            yield Found(place, picture[2], picture[1], count_words(record), bool(record.turns), joins, text)
            last = picture

    def read_members(self, f, file: Path, members: dict) -> Iterator[BrokenRecord | Unpaired]:
        """Fill `members`, and yield what is no member that can be used."""
        length, seen = os.fstat(f.fileno()).st_size, False
        try:
            with tarfile.open(fileobj=f, mode="r:") as tar:
                for member in iter(tar.next, None):
                    seen = True
                    tar.members.clear()                 # or it would keep them all
                    where = f"{file}, {checked_text(member.name)}"
                    flaw = add_member(f, member, members, length)
                    if flaw in (DOTTED, UNREADABLE):
                        yield Unpaired(where, *flaw, stops=flaw is UNREADABLE)
                    elif flaw:
                        yield BrokenRecord(where, flaw)
                end = tar.offset                        # of the last member; two blocks of zeros follow
                rest = read_part(f, end, 2**16)
        except (tarfile.TarError, OSError, ValueError):
            end, rest = length if seen else 0, b""
        if not end:
            yield BrokenRecord(str(file), "it is no tar file; a compressed one must be unpacked with gunzip")
        elif len(rest) < 512 or rest.strip(b"\0"):
            what = "more follows after its end" if rest[:512] == bytes(512) else "it is cut off or damaged"
            yield BrokenRecord(str(file), f"{what}, at byte {end:,}; what stands before is read")

    def make(self, shard: int, key: str, notes: list[bytes]) -> Record:
        txt, caption, fields = notes
        row = json.loads(fields) if fields.strip() else {}
        if not isinstance(row, dict):
            raise ValueError("its .json holds no object")
        texts = [line for note in (txt, caption) for line in caption_lines(note)]
        unread = {*IDS, *(CAPTIONS if texts else ())}
        row = {name: value for name, value in row.items() if name.lower() not in unread}
        row |= {"captions": texts} if texts else {}
        name = f"{self.names[shard].removesuffix('.tar')}/{key}"
        return row_record(row, name, [f"{self.files[shard]}/{key}"], self.splits_of[shard] or "train")

    def record(self, n: int) -> Record:
        shard, _, _, *notes = self.places[n].tolist()
        with open(self.files[shard], "rb") as f:
            return self.make(shard, self.keys[n], [read_part(f, *notes[k:k + 2]) for k in (0, 2, 4)])

    def picture(self, n: int, k: int) -> io.BytesIO:
        shard, offset, size, *_ = self.places[n].tolist()
        with open(self.files[shard], "rb") as f:
            return io.BytesIO(read_part(f, offset, size))


def add_member(f, member: tarfile.TarInfo, members: dict, length: int) -> str | tuple[str, str, str]:
    """Note a picture or a text under its key; says why a member cannot be used, "" where nothing is wrong.

    DOTTED and UNREADABLE are said of all such members in one sentence. Masks and the like may be DOTTED:
    cat.seg.png is no flaw in a shard, so it stops no strict run.
    """
    name = unicodedata.normalize("NFC", member.name.removeprefix("./"))     # of an accent in two characters
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    if member.isdir() or not stem or "__MACOSX" in name:
        return ""
    if name.startswith("/") or ".." in re.split(r"[/\\]", name):
        return "its name leads out of the shard"
    if not member.isreg() or member.issparse():
        link = member.issym() or member.islnk()
        return "it is a link, and links in a shard are not followed" if link else "it is no plain file"
    ending = ending.lower()
    if f".{ending}" in OTHER_ENDINGS:
        return UNREADABLE
    if ending not in PICTURES and ending not in NOTES:
        return DOTTED if ending.rpartition(".")[2] in (*PICTURES, *NOTES) else ""
    if member.offset_data + member.size > length:       # the pass will say that the shard is cut off
        return ""
    parts = members.setdefault(f"{folder}/{stem}" if folder else stem, {})
    if ending in parts or ending in PICTURES and any(other in parts for other in PICTURES):
        what = "picture" if ending in PICTURES else f".{ending}"
        return f"its key has a {what} already; the first one counts"
    if ending in PICTURES:
        last = min(member.size, 4096)
        content = content_name(member.size, read_part(f, member.offset_data + member.size - last, last))
    else:
        content = read_part(f, member.offset_data, member.size)
    parts[ending] = (member.offset_data, member.size, content)
    return ""


def same_bytes(file: Path, one: tuple, other: tuple) -> bool:
    """Whether two members are equal, of which the size and the last bytes are."""
    with open(file, "rb") as f:
        return read_part(f, *one[:2]) == read_part(f, *other[:2])


def read_part(f, offset: int, size: int) -> bytes:
    if not size:
        return b""
    f.seek(offset)
    return f.read(size)


# Parquet files ----------------------------------------------------------------------------------------------

IMAGES = ("image", "images", "img", "picture", "jpg", "jpeg", "png", "webp",
          *(f"image_{n}" for n in range(10)))           # columns of pictures
BLOCK, WINDOW = 2**25, 4        # bytes of pictures that are read together; so many blocks are shuffled


def pyarrow_parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files are read with pyarrow: pip install pyarrow") from None
    return pyarrow.parquet


class ParquetShards(Shards):
    """The hub's layout; a place is (shard, row group, row of the group).

    A row can be read only together with its neighbours: rows are read in blocks of BLOCK bytes, of which the
    last few stay in memory, and a random order shuffles the rows of WINDOW blocks.
    """
    ending = ".parquet"

    def __init__(self, path: Path):
        pyarrow_parquet()
        super().__init__(path)
        self.blocks = np.zeros(len(self.places), int)   # row → its block
        self.bounds: list[tuple[int, int]] = []         # block → first row, last + 1
        self.loaded: collections.OrderedDict[int, list[tuple[dict, list[bytes]]]] = collections.OrderedDict()
        self.reader: GroupReader | None = None
        start, full = 0, 0
        for n in range(len(self.places) + 1):
            end = n == len(self.places)
            if n > start and (end or full + self.sizes[n] > BLOCK
                              or (self.places[n, :2] != self.places[n - 1, :2]).any()):
                self.blocks[start:n] = len(self.bounds)
                self.bounds.append((start, n))
                start, full = n, 0
            full += 0 if end else self.sizes[n]

    def columns(self, shard: int) -> tuple[str, ...]:
        """The columns of a shard that are read; a UserError where there is none of pictures, or of texts."""
        schema = pyarrow_parquet().read_schema(self.files[shard])
        kinds = {name: schema.field(name).type for name in schema.names}
        known = tuple(name for name, kind in kinds.items()
                      if name.lower() in FIELDS or name.lower() in IMAGES and holds_bytes(kind))
        for wanted, what in ((IMAGES, "pictures (bytes)"), (TEXTS, "texts")):
            if not {name.lower() for name in known} & set(wanted):
                other = next((name for name in kinds if name.lower() in wanted), None)
                why = f"column {other} holds {kinds[other]}, not bytes" if other else \
                    f"none of its columns {', '.join(kinds)} is known"
                raise UserError(f"{self.files[shard]}: {why}; rename its column of {what} to {wanted[0]}.")
        return known

    def scan(self, shard: int) -> Iterator[Found | BrokenRecord | Unpaired]:
        file = self.files[shard]
        try:
            first, columns, last = 0, self.columns(shard), b""
            for group in range(pyarrow_parquet().ParquetFile(file).num_row_groups):
                n = -1
                for n, (row, pictures) in enumerate(read_group(file, group, columns)):
                    found, shown = self.find(shard, group, n, first + n, row, pictures), digest_of(pictures)
                    if isinstance(found, Found):
                        found, last = found._replace(joins=shown == last), shown
                    yield found
                first += n + 1
        except UserError:
            raise
        except (OSError, ValueError) as e:              # pyarrow's errors are of these kinds
            why = str(e).partition("\n")[0].rstrip(".")
            yield BrokenRecord(str(file), f"it is cut off, damaged or no parquet file ({why:.80})")

    def find(self, shard: int, group: int, n: int, number: int, row: dict,
             pictures: list) -> Found | BrokenRecord | Unpaired:
        where = f"{self.files[shard]}, row {number}"
        try:
            record = self.make(shard, number, row, len(pictures))
        except FLAWS as e:
            return flaw_of(where, e, "a row needs both")
        if record.captions and not pictures:
            return Unpaired(where, "text", "picture", "a row needs both")
        text = repr(row).encode("utf-8", "replace")
        content = content_name(len(text), text)
        if pictures:
            size, last = pictures[0].size, min(pictures[0].size, 4096)
            content = content_name(size, pictures[0].slice(size - last, last).to_pybytes())
        self.unread += len(record.images) < len(pictures)
        return Found((shard, group, n, number), content, sum(p.size for p in pictures),
                     count_words(record), bool(record.turns or not pictures), False, text)

    def make(self, shard: int, number: int, row: dict, pictures: int) -> Record:
        name = f"{self.names[shard].removesuffix('.parquet')}:{number}"
        where = f"{self.files[shard]}, row {number}"
        images = [f"{where}, picture {k}" if pictures > 1 else where for k in range(pictures)]
        return row_record(row, name, images, self.splits_of[shard] or "train")

    def load(self, n: int) -> tuple[dict, list[bytes]]:
        """Row n, of a block that is read now or was read before."""
        block = int(self.blocks[n])
        start, stop = self.bounds[block]
        if block not in self.loaded:
            shard, group, first, _ = self.places[start].tolist()
            if self.reader is None or not self.reader.reaches(shard, group, first):
                self.reader = GroupReader(shard, group, self.files[shard], self.columns(shard))
            self.loaded[block] = self.reader.read(self.places[start:stop, 2].tolist())
            while len(self.loaded) > WINDOW:
                self.loaded.popitem(last=False)
        self.loaded.move_to_end(block)
        return self.loaded[block][n - start]

    def __getstate__(self) -> dict:
        """For another process: it reads blocks of its own."""
        return {**vars(self), "reader": None, "loaded": collections.OrderedDict()}

    def record(self, n: int) -> Record:
        row, pictures = self.load(n)
        return self.make(int(self.places[n, 0]), int(self.places[n, 3]), row, len(pictures))

    def picture(self, n: int, k: int) -> io.BytesIO:
        return io.BytesIO(self.load(n)[1][k])

    def order(self, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Row groups in random order, and the rows of WINDOW blocks at a time in random order."""
        blocks = self.blocks[self.items[chosen, 0]]
        first = self.places[[start for start, _ in self.bounds], :2]            # (shard, group) of each block
        _, group = np.unique(first, axis=0, return_inverse=True)
        rank = rng.permutation(group.max() + 1)[group.ravel()]                  # block → rank of its group
        turn = np.empty(len(rank), int)
        turn[np.lexsort((np.arange(len(rank)), rank))] = np.arange(len(rank))   # block → when it is read
        return np.lexsort((rng.random(len(chosen)), turn[blocks] // WINDOW))


class GroupReader:
    """Reads rows of a row group from front to back, in the process that made it."""

    def __init__(self, shard: int, group: int, file: Path, columns: tuple[str, ...]):
        self.shard, self.group, self.process, self.next = shard, group, os.getpid(), 0
        self.rows = read_group(file, group, columns)

    def reaches(self, shard: int, group: int, row: int) -> bool:
        """Whether the row lies ahead of it."""
        return (self.shard, self.group, self.process) == (shard, group, os.getpid()) and self.next <= row

    def read(self, wanted: list[int]) -> list[tuple[dict, list[bytes]]]:
        """The rows of these numbers, which increase."""
        found, numbers = [], set(wanted)
        while self.next <= wanted[-1]:
            row, pictures = next(self.rows)
            if self.next in numbers:
                found.append((row, [p.to_pybytes() for p in pictures]))
            self.next += 1
        return found


def read_group(file: Path, group: int, columns: tuple[str, ...]) -> Iterator[tuple[dict, list]]:
    """The rows of a row group as (fields, pictures); a picture is a buffer of pyarrow's."""
    opened = pyarrow_parquet().ParquetFile(file, pre_buffer=False, buffer_size=2**20)
    images = [name for name in columns if name.lower() in IMAGES]
    for batch in opened.iter_batches(64, [group], list(columns), use_threads=False):
        fields = batch.select([name for name in columns if name not in images]).to_pylist()
        pictures = [batch.column(name) for name in images]
        for n in range(batch.num_rows):
            yield fields[n], [p for column in pictures for p in buffers(column[n])]


def digest_of(pictures: list) -> bytes:
    """Of all bytes of the pictures of a row, each with its size."""
    digest = hashlib.blake2b(digest_size=16)
    for p in pictures:
        digest.update(b"%d " % p.size)
        digest.update(p)
    return digest.digest()


def holds_bytes(kind) -> bool:
    """Whether a column of this type holds pictures: {bytes, path}, bytes, or a list of these."""
    if hasattr(kind, "value_type"):
        return holds_bytes(kind.value_type)
    if str(kind).startswith("struct"):
        return kind.get_field_index("bytes") >= 0
    return str(kind) in ("binary", "large_binary", "binary_view")


def buffers(value) -> list:
    """The pictures of a cell, without those that are missing."""
    if not value.is_valid:
        return []
    if hasattr(value, "as_buffer"):
        return [value.as_buffer()]
    if hasattr(value, "values") and not callable(value.values):
        return [p for inner in value.values for p in buffers(inner)]
    return buffers(value["bytes"])


SHARDED = {                     # kind: Shards, splits, held-out split of the table
    "parquet": (ParquetShards, "train val test all", "val"), "wds": (TarShards, "train val test all", "val"),
}


@functools.lru_cache(maxsize=4)
def open_shards(kind: str, path: Path, follow_links: bool, state: tuple) -> Shards:
    """The shards of a path, found once in a process. state: of shards_state, so that a change is seen.

    follow_links: whether links were followed, which a caller who does not must not profit from.
    """
    return SHARDED[kind][0](path)


def shards_state(kind: str, path: Path) -> tuple:
    """Name, size and time of each shard."""
    files = [path] if path.is_file() else sorted(path.rglob(f"*{SHARDED[kind][0].ending}"))
    stats = [(str(file), os.stat(file)) for file in files if file.exists()]
    return tuple((name, s.st_size, s.st_mtime_ns) for name, s in stats)
