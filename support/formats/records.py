"""formats/records.py: what the readers of data sets share.

chapters: Record and BrokenRecord, which a reader yields · parse_rows, which makes one or the other of each
row · helpers that open a file: load_lists (JSON), read_lines (text), path_inside and first_existing (paths).
"""
from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Iterator, NamedTuple

from support.formats.files import UserError


def checked_text(value) -> str:
    """The text, with "?" for each half of a surrogate pair (JSON can spell one); a ValueError if it is no
    text."""
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
    kind: str = ""                                      # of the question: answer type, MME's task, subject
    question: str = ""
    answers: tuple[str, ...] = ()                       # of ten annotators, or the right one alone
    choices: tuple[str, ...] = ()
    answer: int = -1                                    # index of the right choice
    turns: tuple[tuple[str, str], ...] = ()             # a conversation: ("human" or "gpt", text)
    texts: tuple[str, ...] = ()                         # sentences of an interleaved document
    more: dict = field(default_factory=dict)            # other fields, under the format's own names

    def __post_init__(self):
        for name, default in TEXT_FIELDS:
            value, is_list = getattr(self, name), default == ()
            if is_list and not isinstance(value, (list, tuple)):
                raise ValueError(f"{value!r:.40} stands where {name} belong")
            if value is not default:
                checked = tuple(map(checked_text, value)) if is_list else checked_text(value)
                object.__setattr__(self, name, checked)             # the class is frozen
        wrong_choice = self.choices and self.answer not in range(len(self.choices))
        if not isinstance(self.id, (int, str)) or wrong_choice:
            raise ValueError(f"the answer is {self.answer!r:.40} and the id {self.id!r:.40}, which cannot be")


TEXT_FIELDS = [(f.name, f.default) for f in fields(Record)          # texts and lists of texts
               if isinstance(f.default, (str, tuple)) and f.name != "turns"]


class BrokenRecord(NamedTuple):
    """What a reader yields in place of an entry that it cannot use."""
    where: str                                          # file and entry
    why: str


def parse_rows(where: str, rows, make) -> Iterator[Record | BrokenRecord]:
    """Yield make(n, row) of every row; n counts from 1, of a dict it is the key.

    A row whose make fails becomes a BrokenRecord that names `where` and n. A row whose make returns None is
    skipped.
    """
    for n, row in rows.items() if isinstance(rows, dict) else enumerate(rows, 1):
        try:
            record = make(n, row)
        except KeyError as e:
            record = BrokenRecord(f"{where} {n}", f'"{e.args[0]}" is missing')
        except (TypeError, AttributeError) as e:
            record = BrokenRecord(f"{where} {n}", f"not of the form that {LAYOUT} ({e})")
        except (ValueError, RecursionError) as e:
            record = BrokenRecord(f"{where} {n}", str(e))
        if record is not None:
            yield record


@contextlib.contextmanager
def naming_file(file: Path):
    """Turns an error that concerns a whole file into a UserError that names the file."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({type(e).__name__}); lay the files out as {LAYOUT}."
                        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as e:
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
    """Lines of a UTF-8 file. Only \\n and \\r\\n end one: str.splitlines would cut a caption at U+2028."""
    n = 0
    with naming_file(file), open(file, encoding="utf-8-sig", newline="\n") as f:
        for n, line in enumerate(f, 1):
            yield line.rstrip("\r\n")
        if not n:
            raise ValueError("it is empty")


def path_inside(folder: Path, name: str, *roots: str) -> str:
    """folder/name; with roots, in the first of these subfolders that has it.

    A name that leads out of the folder is refused: a downloaded list must not choose which of our files are
    read.
    """
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f'the picture "{name}" lies outside the folder of the data set')
    paths = [f"{folder / root}/{name}" for root in roots or (".",)]
    if not roots:                              # one candidate: no look at the disk, millions of pictures pass
        return paths[0]
    return next((p for p in paths if os.path.exists(p)), paths[0])


def first_existing(path: Path, *names: str) -> Path:
    """path if it is a file; of a folder the first of these names that exists, else the first name."""
    if path.is_file():
        return path
    return next((path / name for name in names if (path / name).exists()), path / names[0])
