"""formats/checkpoint.py: the tensors of a published model, and how a module is filled with them, strict in both directions."""
from __future__ import annotations

import itertools
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.utils.checkpoint
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model import Bridge
from support.formats.files import UserError, read_json

IGNORED = ("rotary_emb.inv_freq", "rope.freqs", "position_ids")         # buffers of older files: recomputed, never read
PICKLES = (".pth", ".pt", ".bin")


def open_tensors(file: Path):
    """A file by its ending: safe_open, or the same two methods for a pickle, of which nothing but tensors is read, and mapped."""
    try:
        if file.suffix not in PICKLES:
            return safe_open(file, framework="pt")
        print(f"{file}: a pickle; only its tensors are read (torch.load, weights_only=True).", file=sys.stderr)
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        held = {n: t for n, t in held.get("model", held).items() if isinstance(t, Tensor)}      # some keep a config beside "model"
        return SimpleNamespace(keys=held.keys, get_tensor=held.__getitem__)
    except (SafetensorError, OSError, EOFError, RuntimeError, AttributeError, pickle.UnpicklingError) as e:
        kind = "PyTorch" if file.suffix in PICKLES else "safetensors"
        raise UserError(f"{file}: not a readable {kind} file ({(str(e) or 'empty').splitlines()[0]}); it may be truncated, "
                        "copy or download it again.") from None


class Checkpoint:
    """The tensors of a file or a folder (model.safetensors, shards with an index, Meta's consolidated files), read one by one.

    where: tensor → the files that hold it: several for Meta's model-parallel files only, of which each has a block of every
    matrix, rows or columns, and a copy of every norm.
    """

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; give a folder with config.json and *.safetensors.")
        files = [path] if path.is_file() else []
        for name in () if files else ("model.safetensors", "*.safetensors", "pytorch_model.bin", "consolidated.*.pth", "*.pth"):
            index = path / f"{name}.index.json"
            files = sorted({path / f for f in read_json(index)["weight_map"].values()} if index.exists() else path.glob(name))
            if files:
                break
        if not files:
            raise UserError(f"{path}: holds no .safetensors file (nor pytorch_model.bin or .pth), so no weights.")
        self.path, self.where, self.files = path, {}, {}
        for file in files:
            if not file.exists():
                raise UserError(f"{index}: names the shard {file.name}, which is missing; download it again.")
            self.files[file] = open_tensors(file)
            for name in self.files[file].keys():
                self.where.setdefault(name, []).append(file)

    def missing(self, name: str) -> list[str]:
        """The tensors that a name of the tables speaks of and that are not here."""
        return [n for n in pieces(name) if n not in self.where]

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored. Its file is opened anew: what is read through a mapping stays in memory as long as that."""
        parts = [(self.files[f] if f.suffix in PICKLES else open_tensors(f)).get_tensor(name) for f in self.where[name]]
        if len(parts) == 1:
            return parts[0]
        if len(parts) < len(self.files) or len({p.shape for p in parts}) > 1:
            raise UserError(f'{self.path}: tensor "{name}" is in {len(parts)} of {len(self.files)} files, with shapes '
                            f'{", ".join(str(tuple(p.shape)) for p in parts)}; model-parallel files hold equal parts of each.')
        if parts[0].ndim == 1:
            return parts[0]
        # (out, in) is cut along `out`, or along `in` where its input is cut: W_o, W_down, the embeddings of Llama 1 and 2
        table = name == "tok_embeddings.weight" and parts[0].shape[1] < self.shape("norm.weight")[0]
        return torch.cat(parts, int(table or name.endswith(("wo.weight", "w2.weight"))))

    def get(self, name: str) -> Tensor:
        """The tensor, or what "&" and brackets make of it and others (see the tables of names)."""
        if " & " in name:
            parts = [self.get(n) for n in name.split(" & ")]
            for n, t in zip(pieces(name), parts):
                if t.shape[1:] != parts[0].shape[1:]:
                    raise UserError(f'{self.where[n][0]}: tensor "{n}" has shape {tuple(t.shape)}, but {tuple(parts[0].shape)} is that of '
                                    f'"{pieces(name)[0]}", with which it belongs together.')
            return torch.cat(parts)
        name, _, part = name.partition("[")
        tensor = self.read(name)
        if not part or not tensor.ndim:
            return tensor
        what, _, n = part.rstrip("]").partition("/")
        if what == "zero":
            return torch.zeros_like(tensor)
        if what == "rows":
            return tensor if len(tensor) % int(n) else tensor.unflatten(0, (-1, int(n)))
        if what == "rope":                              # (E/2, 2) of Meta's neighbours → (2, E/2): firsts, then seconds
            pairs = (int(n), -1, 2)
            return tensor if len(tensor) % (2 * int(n)) else tensor.unflatten(0, pairs).transpose(1, 2).flatten(0, 2)
        return tensor.tensor_split(int(n))[int(what)]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.where:
            raise UserError(f'{self.path}: tensor "{name}" is missing, so this is not the layout that was expected here.')
        return tuple(self.files[self.where[name][0]].get_tensor(name).shape)

    def count(self, pattern: str) -> int:
        """How many layers there are: the smallest i for which pattern.format(i) is no tensor."""
        return next(i for i in itertools.count() if pattern.format(i) not in self.where)

    def prefix(self, *candidates: str) -> str:
        """The first of these with which the name of some tensor starts; the last one where none does."""
        return next((c for c in candidates if any(n.startswith(c) for n in self.where)), candidates[-1])


def pieces(name: str) -> list[str]:
    """The plain names in one of the tables' names: "a[1/3] & b" → ["a", "b"]."""
    return [n.split("[")[0] for n in name.split(" & ")]


def expand(names: dict[str, str], layers: int, prefix: str = "", ours: str = "", **heads: int) -> dict[str, str]:
    """The table for so many layers, with a prefix on their names and on ours; heads: what stands in for {H} and {G}."""
    return {ours + a.format(i=i): prefix + b.format(i=i, **heads)
            for a, b in names.items() for i in (range(layers) if "{i}" in a else (0,))}


def fill(module: nn.Module, checkpoint: Checkpoint, names: dict[str, str], optional: tuple[str, ...] = (), device=None,
         dtype=None) -> None:
    """Give every parameter of a module (built on the meta device) its tensor; strict in both directions.

    names: ours → theirs. A tensor that is missing, has another shape, or that nobody asked for is a UserError naming it.
    Tensors whose name starts with `optional` may be left over (the other tower of a dual encoder).
    """
    used, file = set(), checkpoint.path
    for ours, parameter in list(module.named_parameters()):
        theirs = names.get(ours, ours)
        for missing in checkpoint.missing(theirs):
            raise UserError(f'{file}: tensor "{missing}" is missing; this model needs it'
                            + (f" with shape {tuple(parameter.shape)}." if theirs == missing else "."))
        tensor = checkpoint.get(theirs)
        if tensor.numel() != parameter.numel() or [n for n in tensor.shape if n > 1] != [n for n in parameter.shape if n > 1]:
            where = checkpoint.where[pieces(theirs)[0]][0]
            raise UserError(f'{where}: tensor "{theirs}" has shape {tuple(tensor.shape)}, '
                            f"this model expects {tuple(parameter.shape)}; the config.json beside it may belong to another model.")
        used.update(pieces(theirs))
        owner, _, leaf = ours.rpartition(".")
        tensor = tensor.reshape(parameter.shape).to(device=device, dtype=dtype or tensor.dtype, copy=True)      # off the file
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    extra = [n for n in checkpoint.where if n not in used and not n.endswith(IGNORED) and not n.startswith(optional)]
    if extra:
        raise UserError(f'{file}: {len(extra)} tensors are not part of this model (first: "{extra[0]}"); '
                        "the config.json beside it may belong to another model.")


def published_tensors(module: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    """The inverse of `fill`: parameters under their published names, blocks of a fused matrix joined again."""
    tensors: dict[str, list[Tensor]] = {}
    for ours, p in module.named_parameters():           # blocks [0/3], [1/3], [2/3] come in the order in which q, k, v are defined
        tensors.setdefault(pieces(names[ours])[0], []).append(p.detach())
    return {n: torch.cat(parts) for n, parts in tensors.items()}


Fills = list[tuple[nn.Module, Checkpoint, dict[str, str], tuple[str, ...]]]     # module, its file, ours → theirs, what may be left over
WB = ("weight", "bias")
BridgeFile = tuple[Bridge, dict[str, str], tuple[str, ...]]                     # the empty bridge, ours → theirs, what may be left over
