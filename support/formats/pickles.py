"""support/formats/pickles.py: the tensors in PyTorch's own files, of which no code runs.

A .pth, .pt or .bin file holds a pickle, and a pickle is a program that calls what it names. Here it can call
what describes a tensor and nothing else: every other class or function that it names becomes a StandIn.

    torch.save      a zip archive: one pickle, and a record of numbers for each tensor
    before 1.6      pickles one after the other, then the numbers
    TorchScript     torch.jit.save: a zip archive with code, which is left alone; attributes are read
"""
from __future__ import annotations

import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor

from support.formats.files import UserError

WRAPPERS = ("model", "state_dict", "model_state_dict", "module")    # where training scripts keep the tensors
STORAGES = {                # torch's name of a storage → the type of its numbers
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128}


class StandIn(dict):
    """In the place of an object of a class that is not built: it keeps attributes and does nothing."""
    __hash__ = object.__hash__

    def __init__(self, *args, **kw):
        super().__init__()

    def __setstate__(self, state) -> None:
        if isinstance(state, dict):
            self.update(state)

    def ignore(self, *args) -> None:
        pass

    append = extend = add = ignore


class Stored(NamedTuple):
    """A tensor of a zip archive: where its numbers lie in the file."""
    file: Path
    start: int                  # bytes
    length: int
    dtype: torch.dtype
    offset: int                 # numbers
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, mapped; a copy of it leaves the file."""
        if not self.length:
            return torch.empty(self.shape, dtype=self.dtype)
        record = np.memmap(self.file, np.uint8, "c", self.start, (self.length,))
        return torch.from_numpy(record).view(self.dtype).as_strided(self.shape, self.stride, self.offset)


class TensorPickle:
    """An open file of PyTorch's, with the methods of an open safetensors file.

    A file that is damaged, or that is no dictionary of tensors, is a UserError that says which.
    """

    def __init__(self, file: Path):
        print(f"{file}: a pickle; only its tensors are read, none of its code runs.", file=sys.stderr)
        try:
            content = read_zip(file) if zipfile.is_zipfile(file) else read_legacy(file)
        except UserError:
            raise
        except Exception as e:      # of a damaged file: EOFError, KeyError, RuntimeError, UnpicklingError, …
            reason = f"{type(e).__name__}: {e}".splitlines()[0][:200]
            raise UserError(f"{file}: not a readable PyTorch file ({reason}); it may be truncated, "
                            "copy or download it again.") from None
        self.file, self.tensors = file, named_tensors(content)
        if not self.tensors:
            raise UserError(f"{file}: not a readable PyTorch file: it holds no tensors under names; "
                            "save the model's state_dict().")

    def keys(self):
        return self.tensors.keys()

    def get_tensor(self, name: str) -> Tensor:
        try:
            return self.tensors[name].read()
        except (OSError, RuntimeError, TypeError, ValueError) as e:
            raise UserError(f'{self.file}: tensor "{name}" is damaged ({e}); '
                            "download the file again.") from None

    def metadata(self) -> dict[str, str]:
        return {}


def named_tensors(content) -> dict[str, Stored]:
    """The tensors of a dictionary by name; it may lie in another one, beside what a training script keeps.

    "module." before every name is torch.nn.DataParallel's.
    """
    while isinstance(content, dict):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    items = content.items() if isinstance(content, dict) else ()
    tensors = {name: t for name, t in items if isinstance(name, str) and isinstance(t, Stored)}
    start = "module." if all(name.startswith("module.") for name in tensors) else ""
    return {name[len(start):]: tensor for name, tensor in tensors.items()}


def read_zip(file: Path) -> dict:
    """The object in a file of torch.save; of a TorchScript archive the tensors by their dotted names."""
    with zipfile.ZipFile(file) as archive, open(file, "rb") as f:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}

        def place(key: str, *_) -> tuple[int, int]:
            info = records[f"data/{key}"]
            if info.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{file}: its records are compressed, as torch.save leaves none; "
                                "save it again.")
            f.seek(info.header_offset + 26)             # a name and an extra field stand before the numbers
            name, extra = np.frombuffer(f.read(4), "<u2").tolist()
            return info.header_offset + 30 + name + extra, info.file_size

        with archive.open(records["data.pkl"]) as program:
            content = TensorUnpickler(program, file, place).load()
    return dict(script_tensors(content)) if "constants.pkl" in records else content


def script_tensors(module: dict, prefix: str = "") -> Iterator[tuple[str, Stored]]:
    """(name, tensor) of the parameters and buffers of a TorchScript module, which lie in its attributes."""
    for name, value in module.items():
        if isinstance(value, Stored):
            yield prefix + name, value
        elif isinstance(value, StandIn):
            yield from script_tensors(value, f"{prefix}{name}.")


def read_legacy(file: Path) -> object:
    """The object in a file from before 1.6.

    A magic number, a version, the machine, the object, the keys of its storages; then, for each key, how many
    numbers there are (8 bytes), and the numbers.
    """
    sizes: dict[str, int] = {}
    places: dict[str, tuple[int, int]] = {}

    def measure(key: str, dtype: torch.dtype, count: int) -> tuple[int, int]:
        sizes[key] = count * dtype.itemsize
        return places.get(key, (0, 0))

    with open(file, "rb") as f:
        magic, version, machine = (TensorUnpickler(f, file, measure).load() for _ in range(3))
        if magic != torch.serialization.MAGIC_NUMBER or not machine["little_endian"]:
            raise ValueError("its first bytes are not PyTorch's")
        start = f.tell()
        TensorUnpickler(f, file, measure).load()        # once for the sizes, …
        keys = TensorUnpickler(f, file, measure).load()
        at = f.tell()
        for key in keys:
            places[key] = (at + 8, sizes[key])
            at += 8 + sizes[key]
        f.seek(start)
        return TensorUnpickler(f, file, measure).load()         # … once more with the places


class TensorUnpickler(pickle.Unpickler):
    """A pickle may name what describes a tensor, torch's types of numbers, and an OrderedDict.

    place: (key, type, count of numbers) of a storage → its first byte in the file, and how many it has.
    """

    def __init__(self, program, file: Path, place: Callable[[str, torch.dtype, int], tuple[int, int]]):
        super().__init__(program)
        self.file, self.place = file, place

    def find_class(self, module: str, name: str):
        known = {"torch._utils._rebuild_tensor": self.stored, "torch._utils._rebuild_tensor_v2": self.stored,
                 "torch._utils._rebuild_tensor_v3": self.stored_as, "collections.OrderedDict": OrderedDict,
                 "torch._utils._rebuild_parameter": first,
                 "torch._utils._rebuild_parameter_with_state": first,
                 "torch._tensor._rebuild_from_type_v2": rebuild, "torch.storage.UntypedStorage": torch.uint8}
        if module == "torch":
            dtype = STORAGES.get(name, getattr(torch, name, None))
            if name.endswith("Storage") and name not in STORAGES:
                raise UserError(f"{self.file}: holds quantised tensors (torch.{name}), which are not read.")
            return dtype if isinstance(dtype, torch.dtype) else StandIn
        return known.get(f"{module}.{name}", StandIn)

    def persistent_load(self, storage: tuple):
        """(first byte, number of bytes, type of the numbers) of a storage."""
        if storage[0] != "storage":
            return storage[1]                           # a class beside its source code
        _, dtype, key, _, count, *view = storage
        if any(view):
            raise ValueError("a storage is a view of another one")
        return *self.place(key, dtype, count), dtype

    def stored(self, storage, offset, shape, stride, *_) -> Stored:
        return Stored(self.file, *storage, offset, tuple(shape), tuple(stride))

    def stored_as(self, storage, offset, shape, stride, requires_grad, hooks, dtype, *_) -> Stored:
        return Stored(self.file, *storage[:2], dtype, offset, tuple(shape), tuple(stride))


def first(tensor, *_):
    return tensor


def rebuild(function, kind, arguments, *_):
    return function(*arguments)
