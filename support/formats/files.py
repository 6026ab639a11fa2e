"""support/formats/files.py: JSON and tensor files, written atomically, and the error for a user's mistake."""
from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from typing import Iterator

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from papers.bounds import check_value
from support.formats.keys import check_keys, table_of


class UserError(ValueError):
    """A mistake of the user's in one sentence: what is wrong, where, what to do. Exit code 2."""


def refuse_device(path: str | os.PathLike) -> None:
    """A UserError for a pipe or a device, which one might read for ever; a file that is missing is no matter
    here."""
    mode = 0
    with contextlib.suppress(OSError, ValueError):      # ValueError: a null character in the name
        mode = os.stat(path).st_mode
    if mode and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path}: is a pipe or a device, and only files are read; copy its content into one.")


@functools.cache
def note(sentence: str) -> None:
    """A sentence on standard error, once in a process."""
    print(sentence, file=sys.stderr)


@contextlib.contextmanager
def at_the_door(where: str = "") -> Iterator[None]:
    """Turn a ValueError of the math into a UserError, with the file or config in front that it is about."""
    try:
        yield
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"{where}: {e}" if where else str(e)) from None


@contextlib.contextmanager
def reading_config(where: str, kind: str) -> Iterator[None]:
    """A door for configs: a missing key is a UserError, and so is a number that the math refuses.

    kind: which config has that key, for the message ("a Llama config.json").
    """
    with at_the_door(where):
        try:
            yield
        except KeyError as e:
            raise UserError(f"{where}: the key {e} is missing; {kind} has it.") from None


class Json(dict):
    """An object of a JSON file that knows the file and the keys that lead to it.

        c = read_json("config.json")
        c["text_config"]["vocab_size"]      a missing key is a UserError that names the file and all keys
        c.value("seconds", float, least=0)  so is a value of a wrong kind or out of bounds (papers/bounds.py);
                                            keys.py lists keys that read_json has checked already
    """

    def __init__(self, content: dict, file: str | os.PathLike, keys: str = ""):
        super().__init__((key, inside(value, file, f"{keys}{key}")) for key, value in content.items())
        self.file, self.keys_before = file, keys

    def __missing__(self, key: str):
        raise UserError(f"{self.file}: the key '{self.keys_before}{key}' is missing.")

    def value(self, key: str, kind: type, **bounds):
        with at_the_door(str(self.file)):
            return check_value(f"the key '{self.keys_before}{key}'", self[key], kind, **bounds)

    def text(self, key: str) -> str:
        return self.value(key, str)

    def object(self, key: str) -> Json:
        return self.value(key, dict)


def inside(value, file: str | os.PathLike, keys: str):
    """The value, an object or a list of objects as Json."""
    if isinstance(value, dict):
        return Json(value, file, f"{keys}.")
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [inside(element, file, f"{keys}[{n}]") for n, element in enumerate(value)]
    return value


MODEL = "a model folder needs config.json beside its weights"
RUN = "give a run folder of train.py"


def read_json(path: str | os.PathLike, advice: str = MODEL) -> Json:
    """The object in a JSON file; UTF-8 with or without a BOM, UTF-16. advice: where there is no such file.

    A file that is missing, cannot be read, is no JSON or holds no object is a UserError; so are a key that
    stands twice in an object, NaN, Infinity, a number beyond a float, nesting beyond Python's stack, and a
    value that the file's table in keys.py does not allow.
    """
    refuse_device(path)
    try:
        content = parse_json(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {advice}.") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}).") from None
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON ({e}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {content!r:.40}, not an object {{…}}.")
    with at_the_door(str(path)):
        check_keys(content, table_of(Path(path).name))
    return Json(content, path)


def read_json_lines(path: Path) -> list[Json]:
    """The objects in a file with one a line, checked as read_json checks one; a last line cut off is left."""
    refuse_device(path)
    objects = []
    for n, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        with at_the_door(f"{path}, line {n}"):
            content = check_value("the line", parse_json(line), dict)
            check_keys(content, table_of(path.name))
        objects.append(Json(content, f"{path}, line {n}"))
    return objects


def parse_json(text: str | bytes):
    """json.loads, strict: a ValueError also for what JSON does not have or Python would change in silence."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"the key '{twice}' stands twice in one object")
    return content


def finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"{number} is no finite number")
    return float(number)


@contextlib.contextmanager
def atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Write in a temporary folder beside it, flush it to the disk, rename it.

    A reader or a crash at any moment finds the old file or the new one, never half of one. In a folder of its
    own, because libraries that write tensors make temporary files themselves, beside the name they are given.
    A full disk, or a place where nothing may be written, is a UserError.
    """
    path, room = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        tmp = room / path.name
        tmp.touch()
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(tmp, 0o644)
        os.replace(tmp, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as e:
        raise cannot_write(path, e) from None
    finally:
        if room:
            shutil.rmtree(room, ignore_errors=True)


def cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written ({error.strerror or error}); what was there is unchanged; "
                     "free some space, or choose another folder.")


def write_json(path: str | os.PathLike, value) -> None:
    with atomically(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path: str | os.PathLike, tensors: dict[str, Tensor],
                  metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; `metadata` are strings in its header."""
    with atomically(path) as tmp:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, tmp, {"format": "pt", **(metadata or {})})
        except SafetensorError as e:                    # its own name for an error of the disk
            raise OSError(str(e)) from None
        sort_metadata(tmp)


def sort_metadata(file: Path) -> None:
    """The library writes metadata in random order. Sorted, the same tensors make the same bytes."""
    with open(file, "rb+") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        f.seek(8)
        f.write(text.ljust(size))
