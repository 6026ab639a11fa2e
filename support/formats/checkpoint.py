"""support/formats/checkpoint.py: the tensors of a published model, and how a module is filled with them.

    1. files   Checkpoint: the tensors of a file or a folder, read one by one under their published names
    2. fill    module ← checkpoint by a table of names, strict both ways; published_tensors inverts it
"""
from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model import Bridge
from support.formats.files import UserError, read_json, refuse_device
from support.formats.names import Joined, Names, Part, Source, as_source
from support.formats.pickles import TensorPickle

# ---- 1. Files --------------------------------------------------------------------------------------------

IGNORED = ("rotary_emb.inv_freq", "rope.freqs", "position_ids")     # buffers of older files, which we compute
PICKLES = (".pth", ".pt", ".bin")
WRAPPERS = ("module.", "_orig_mod.", "module.")         # DistributedDataParallel's, torch.compile's
PATTERNS = ("model.safetensors", "*.safetensors", "pytorch_model.bin", "consolidated.*.pth", "*.pth", "*.pt")


def open_tensors(file: Path):
    """An open file with keys(), get_tensor(name) and metadata(); its first bytes tell which kind it is."""
    refuse_device(file)
    head = b""
    try:
        with open(file, "rb") as f:
            head = f.read(9)
        if head.startswith((b"PK", b"\x80")) and head[8:] != b"{":      # a zip archive or a pickle
            return TensorPickle(file)
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as e:
        kind, reason = "PyTorch" if file.suffix in PICKLES else "safetensors", str(e).splitlines()[0]
        if file.stat().st_size == 0:
            reason = "it is empty"
        elif head == b"version h":
            reason = "it is a pointer of Git LFS: run git lfs pull"
        raise UserError(f"{file}: not a readable {kind} file ({reason}); it may be truncated, "
                        "copy or download it again.") from None


def tensor_files(path: Path) -> list[Path]:
    """The files with a model's tensors: the path, or what a folder has by the first of PATTERNS that fits.

    A whole file comes before an index of shards, which may be left from another download.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a folder with config.json and *.safetensors.")
    if path.is_file():
        return [path]
    for pattern in PATTERNS:
        index = path / f"{pattern}.index.json"
        if (path / pattern).is_file():
            return [path / pattern]
        if index.exists():
            return indexed_files(index)
        if files := sorted(path.glob(pattern)):
            return files
    raise UserError(f"{path}: holds no .safetensors file (nor pytorch_model.bin or .pth), so no weights.")


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names; all must lie in its folder."""
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    if not names:
        raise UserError(f'{index}: "weight_map" must name the file of each tensor; download it again.')
    for name in names:
        if not name or set(name) & set("/\\:") or name.startswith("."):
            raise UserError(f'{index}: names the shard "{name}", which is not a file of its folder; '
                            "shards are read from there alone.")
        if not (index.parent / name).is_file():
            raise UserError(f"{index}: names the shard {name}, which is missing; download it again.")
    return [index.parent / name for name in names]


class Checkpoint:
    """The tensors of a file or a folder (model.safetensors, shards with an index, Meta's consolidated files).

    path    as given, for messages
    files   file → the open file
    where   name of a tensor → the files that hold it: several for Meta's model-parallel files only, of which
            each has a block of every matrix, rows or columns, and a copy of every norm
    stored  name of a tensor → its name in the files, where that is another one
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.where: dict[str, list[Path]] = {}
        self.files = {}
        for file in tensor_files(self.path):
            self.files[file] = open_tensors(file)
            for name in self.files[file].keys():
                self.where.setdefault(name, []).append(file)
        self.stored: dict[str, str] = {}
        for wrapper in WRAPPERS:
            if all(name.startswith(wrapper) for name in self.where):
                self.rename(lambda name: name.removeprefix(wrapper))

    def rename(self, change: Callable[[str], str]) -> None:
        """From now on the tensors have other names."""
        self.stored = {change(name): self.stored.get(name, name) for name in self.where}
        self.where = {change(name): files for name, files in self.where.items()}

    def include(self, other: Checkpoint) -> None:
        """Add the tensors of another checkpoint: one model out of two places."""
        self.where, self.stored = self.where | other.where, self.stored | other.stored
        self.files = self.files | other.files

    def missing(self, name: str) -> bool:
        return name not in self.where

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor, for messages."""
        return self.where[name][0]

    def get(self, name: str) -> Tensor:
        """One tensor as it is stored; the blocks of model-parallel files are joined.

        The file is opened anew: what was read through a mapping stays in memory as long as that mapping. A
        tensor of anything but finite floating-point numbers is a UserError.
        """
        files, stored = self.where[name], self.stored.get(name, name)
        pickled = isinstance(self.files[files[0]], TensorPickle)        # it maps each tensor by itself
        blocks = [(self.files[f] if pickled else open_tensors(f)).get_tensor(stored) for f in files]
        for file, block in zip(files, blocks):
            require_finite(block, f'{file}: tensor "{name}"')
        if len(blocks) == 1:
            return blocks[0]
        if len(blocks) < len(self.files) or len({b.shape for b in blocks}) > 1:
            shapes = ", ".join(str(tuple(b.shape)) for b in blocks)
            raise UserError(f'{self.path}: tensor "{name}" is in {len(blocks)} of {len(self.files)} files, '
                            f"with shapes {shapes}; model-parallel files hold equal parts of each.")
        if blocks[0].ndim == 1:
            return blocks[0]
        # (out, in) is cut along `out`; W_o, W_down, and the embeddings of Llama 1 and 2 are cut along `in`
        columns = name.endswith(("wo.weight", "w2.weight"))
        if name == "tok_embeddings.weight":
            columns = blocks[0].shape[1] < self.shape("norm.weight")[0]
        return torch.cat(blocks, int(columns))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that tells a size; of one block, where the files are model-parallel."""
        if self.missing(name):
            raise UserError(f'{self.path}: tensor "{name}" is missing, '
                            "so this is not the layout that was expected here.")
        return tuple(self.files[self.file_of(name)].get_tensor(self.stored.get(name, name)).shape)

    def count(self, pattern: str) -> int:
        """How many layers there are: the smallest i for which pattern.format(i) is no tensor."""
        return next(i for i in itertools.count() if self.missing(pattern.format(i)))

    def prefix(self, *candidates: str) -> str:
        """The first of these with which the name of some tensor starts; the last one where none does."""
        return next((c for c in candidates if any(n.startswith(c) for n in self.where)), candidates[-1])


def require_finite(tensor: Tensor, what: str) -> None:
    """A UserError where a tensor has numbers that no weight can have.

    The sum is finite where all of its terms are, unless it overflows; it is a tenth of the work of looking at
    each of them.
    """
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{what} holds numbers of type {kind}; weights are float16, bfloat16, float32 or "
                        "float64, and quantised ones are not read.")
    if not math.isfinite(tensor.sum()) and not bool(tensor.isfinite().all()):
        raise UserError(f"{what} holds {int((~tensor.isfinite()).sum()):,} numbers that are not finite "
                        "(nan or inf), so the model was damaged when it was saved.")


# ---- 2. Fill ---------------------------------------------------------------------------------------------

class Filling(NamedTuple):
    """One module of a published model and what `fill` fills it with."""
    module: nn.Module
    checkpoint: Checkpoint
    names: Names                                        # ours → theirs
    optional: tuple[str, ...] = ()                      # starts of names that may be left over


class BridgeFile(NamedTuple):
    """A bridge of the sizes that a file's shapes tell, still empty, and what `fill` needs for it."""
    bridge: Bridge
    names: Names
    optional: tuple[str, ...] = ()


def fill(module: nn.Module, checkpoint: Checkpoint, names: Names, optional: tuple[str, ...] = (), device=None,
         dtype: torch.dtype | None = None) -> None:
    """Give every parameter of a module (built on the meta device) its tensor; strict in both directions.

    names: ours → theirs; a parameter that is not in it has the same name there. A tensor that is missing, has
    another shape, or that no parameter asks for is a UserError naming it. `optional` may be left over (the
    other tower of a dual encoder): names, or their starts, which end with a dot. dtype None: as stored.
    """
    used = set()
    for ours, parameter in list(module.named_parameters()):
        source = as_source(names.get(ours, ours))
        tensor = tensor_for(parameter, source, checkpoint)
        stored = tensor.dtype
        tensor = tensor.to(device=device, dtype=dtype or stored, copy=True)             # off the mapped file
        if torch.finfo(tensor.dtype).max < torch.finfo(stored).max:
            require_finite(tensor, f'{checkpoint.path}: tensor "{source.names[0]}", as {dtype},')
        owner, _, leaf = ours.rpartition(".")
        filled = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        setattr(module.get_submodule(owner), leaf, filled)
        used.update(source.names)
    starts = tuple(name for name in optional if name.endswith("."))
    extra = [name for name in checkpoint.where if name not in used and name not in optional
             and not name.endswith(IGNORED) and not name.startswith(starts)]
    if extra:
        raise UserError(f'{checkpoint.path}: {len(extra)} tensors are not part of this model '
                        f'(first: "{extra[0]}"); the config.json beside it may belong to another model.')


def tensor_for(parameter: nn.Parameter, source: Source | Joined, checkpoint: Checkpoint) -> Tensor:
    """A parameter's published tensor, in its shape; only axes of length 1 may come or go."""
    shape = tuple(parameter.shape)
    for name in source.names:
        if checkpoint.missing(name):
            needed = f" with shape {shape}" if source == Source(name) else ""
            raise UserError(f'{checkpoint.path}: tensor "{name}" is missing; this model needs it{needed}.')
    tensor = source.build(checkpoint)
    long_axes, expected = [n for n in tensor.shape if n > 1], [n for n in shape if n > 1]
    if long_axes != expected or tensor.numel() != parameter.numel():
        name = source.names[0]
        raise UserError(f'{checkpoint.file_of(name)}: tensor "{name}"{source.note} has shape '
                        f"{tuple(tensor.shape)}, this model expects {shape}; "
                        "the config.json beside it may belong to another model.")
    return tensor.reshape(shape)


def tie(checkpoint: Checkpoint, names: Names, ours: str, other: str) -> tuple[str, ...]:
    """One matrix that files keep under either of two names, or under both → those that may be left over.

    names[ours] becomes the one that the checkpoint has. Two that differ are a UserError: they are not tied.
    """
    kept, left = as_source(names[ours]), as_source(names[other])
    if any(checkpoint.missing(name) for name in left.names):
        return ()
    if any(checkpoint.missing(name) for name in kept.names):
        names[ours] = names[other]
        return ()
    if not torch.equal(kept.build(checkpoint), left.build(checkpoint)):
        raise UserError(f'{checkpoint.file_of(left.names[0])}: tensor "{left.names[0]}" differs from '
                        f'"{kept.names[0]}", though the config says that they are one matrix '
                        "(tie_word_embeddings); correct the config.")
    return tuple(left.names)


def published_tensors(module: nn.Module, names: Names) -> dict[str, Tensor]:
    """The inverse of `fill`: parameters by their published names, fused matrices joined again."""
    blocks: dict[str, dict[int, Tensor]] = {}
    for ours, parameter in module.named_parameters():
        source = as_source(names[ours])
        if type(source) not in (Source, Part):
            raise TypeError(f"{ours}: {source} has no inverse")
        index = source.index if isinstance(source, Part) else 0
        blocks.setdefault(source.name, {})[index] = parameter.detach()
    return {name: torch.cat([parts[i] for i in sorted(parts)]) if len(parts) > 1 else parts.popitem()[1]
            for name, parts in blocks.items()}
