"""support/formats/files.py: JSON and tensor files, written atomically, and the error for a user's mistake."""
from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Iterator

from safetensors.torch import save_file
from torch import Tensor



class UserError(ValueError):
    """A mistake of the user's in one sentence: what is wrong, where, what to do. Exit code 2."""


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


def read_json(path: str | os.PathLike) -> dict:
    """The content of a JSON file; a missing or broken one is a UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; "
                        "a model folder needs config.json beside its weights.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid JSON ({e}).") from None


@contextlib.contextmanager
def atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Write to a temporary name, flush it to the disk, rename it.

    A reader or a crash at any moment finds the old file or the new one, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    finally:
        Path(name).unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value) -> None:
    with atomically(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path: str | os.PathLike, tensors: dict[str, Tensor],
                  metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; `metadata` are strings in its header."""
    with atomically(path) as tmp:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, tmp, {"format": "pt", **(metadata or {})})
