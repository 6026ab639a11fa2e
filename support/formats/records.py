"""formats/records.py: what the readers of data sets share: a record, a broken record, files and lines."""
from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Iterator, NamedTuple

from support.formats.files import UserError


def checked_text(value) -> str:
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
                object.__setattr__(self, name, tuple(map(checked_text, value)) if empty == () else checked_text(value))
        if not isinstance(self.id, (int, str)) or self.choices and self.answer not in range(len(self.choices)):
            raise ValueError(f"the answer is {self.answer!r:.40} and the id {self.id!r:.40}, which cannot be")


TEXTS = [(f.name, f.default) for f in fields(Record) if isinstance(f.default, (str, tuple)) and f.name != "turns"]


class BrokenRecord(NamedTuple):
    """What a reader yields in place of an entry that it cannot use."""
    where: str                                          # file and entry
    why: str


def parse_rows(where: str, rows, make) -> Iterator[Record | BrokenRecord]:
    """make(n, row) of every row, n = 1, 2, … or the key of a dict; what fails becomes a Bad, what is None nothing."""
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
    """What is wrong with a whole file becomes one sentence that names it."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({type(e).__name__}); lay the files out as {LAYOUT}.") from None
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: holds no usable record ({type(e).__name__}: {e}), nothing that {LAYOUT}.") from None


LAYOUT = "its reader in chapter 6 of data.py shows"


def load_lists(file: Path, *names: str, kind=list):
    """The list that a JSON file is (UTF-8 with or without BOM, UTF-16), or the lists of these names in its object."""
    with naming_file(file):
        data = json.loads(file.read_bytes())
        found = [data[name] for name in names] or [data]
        for value in found:
            if not isinstance(value, kind):
                raise ValueError(f"{value!r:.40} stands where a {kind.__name__} belongs")
    return found if len(found) > 1 else found[0]


def read_lines(file: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, ended by \\n or \\r\\n and nothing else: str.splitlines would cut a caption at U+2028."""
    n = 0
    with naming_file(file), open(file, encoding="utf-8-sig", newline="\n") as f:
        for n, line in enumerate(f, 1):
            yield line.rstrip("\r\n")
        if not n:
            raise ValueError("it is empty")


def path_inside(folder: Path, name: str, *roots: str) -> str:
    """folder/name, or in the first of these subfolders that has it. A name that leads out of the folder is refused: a
    list from the net must not choose which of our files are read."""
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f'the picture "{name}" lies outside the folder of the data set')
    paths = [f"{folder / root}/{name}" for root in roots or (".",)]
    return next((p for p in paths if os.path.exists(p)), paths[0]) if roots else paths[0]


def first_existing(path: Path, *names: str) -> Path:
    """The file itself, or the first of these that the folder has, or the one that it should have."""
    return path if path.is_file() else next((path / n for n in names if (path / n).exists()), path / names[0])
