"""formats/files.py: JSON and tensor files, written atomically, and the sentence that a user's mistake gets."""
from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Iterator

from safetensors.torch import save_file
from torch import Tensor

from model import nearest                           # noqa: F401  (asked for here by the readers of files)


class UserError(ValueError):
    """A mistake of the user's: one sentence that says what is wrong, where, and what to do. The CLIs exit with code 2."""


@contextlib.contextmanager
def at_the_door(where: str = "") -> Iterator[None]:
    """A number that the math refuses (ValueError) becomes the user's mistake, with the place where it stands in front."""
    try:
        yield
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"{where}: {e}" if where else str(e)) from None


def read_json(path: Path) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a model folder needs config.json beside its weights.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid JSON ({e}).") from None


@contextlib.contextmanager
def atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Write to a temporary name, flush to the disk, rename: a reader or a crash sees the old file or the new one, never half."""
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


def write_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with atomically(path) as tmp:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, tmp, {"format": "pt", **(metadata or {})})
