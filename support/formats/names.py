"""support/formats/names.py: what a table of names can say: which published tensor each of our parameters is.

A table maps our name to theirs; {i} stands for the number of a layer. Most of theirs are plain names.
The others say how a tensor is made of published ones:

    "norm.weight"                       the published tensor of that name
    Part("qkv.weight", 1, 3)            the second of three equal blocks of its rows
    Rotary("wq.weight", H)              its rows, reordered from Meta's layout of RoPE to ours
    Rows("adapter_query.weight", Q)     (m·Q, …) seen as (m, Q, …)
    Transposed("text_projection")       (in, out) seen as a Linear's (out, in)
    ZerosLike("q_bias")                 zeros of its shape and dtype
    Joined(("words", "new_words"))      the rows of one after those of the other
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Callable, Sequence, Union

import torch
from torch import Tensor

from support.formats.files import UserError

if TYPE_CHECKING:
    from support.formats.checkpoint import Checkpoint


@dataclass(frozen=True)
class Source:
    """A published tensor, as it is stored. The subclasses derive a tensor of ours from it.

    A tensor that cannot be cut in the way of a subclass comes back uncut; `fill` then reports its shape.
    """
    name: str

    @property
    def names(self) -> list[str]:
        """The published tensors that are read."""
        return [self.name]

    @property
    def note(self) -> str:
        """What a message says behind the name."""
        return ""

    def renamed(self, change: Callable[[str], str]) -> Source:
        return replace(self, name=change(self.name))

    def build(self, checkpoint: Checkpoint) -> Tensor:
        return self.derive(checkpoint.get(self.name))

    def derive(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass(frozen=True)
class Part(Source):
    """Block `index` (from 0) of `count` equal blocks of rows: q, k or v out of a fused matrix."""
    index: int
    count: int

    @property
    def note(self) -> str:
        return f" (part {self.index + 1} of {self.count})"

    def derive(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.count)[self.index] if divides(self.count, tensor) else tensor


@dataclass(frozen=True)
class Rotary(Source):
    """Meta's W_q or W_k, or its bias, for our RoPE.

    Meta rotates the neighbours 2i and 2i + 1 of a head, we rotate i and i + E/2. So the rows (E/2, 2) of each
    head become (2, E/2): the first of every pair, then the second.
    """
    heads: int

    def derive(self, tensor: Tensor) -> Tensor:
        if not divides(2 * self.heads, tensor):
            return tensor
        return tensor.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class Rows(Source):
    """Rows in groups: (m · size, …) → (m, size, …)."""
    size: int

    def derive(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, self.size)) if divides(self.size, tensor) else tensor


@dataclass(frozen=True)
class Transposed(Source):
    """A matrix that its model multiplies from the right: (in, out) → (out, in)."""

    def derive(self, tensor: Tensor) -> Tensor:
        return tensor.T if tensor.ndim == 2 else tensor


@dataclass(frozen=True)
class ZerosLike(Source):
    """Zeros of the tensor's shape and dtype, for a bias or a gate that the published model does not have."""

    def derive(self, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor)


@dataclass(frozen=True)
class Joined:
    """The rows of several sources, one after the other."""
    parts: tuple[Name, ...]

    @property
    def names(self) -> list[str]:
        return [name for part in self.parts for name in as_source(part).names]

    @property
    def note(self) -> str:
        return f' {"and" if len(self.names) == 2 else "to"} "{self.names[-1]}"'

    def renamed(self, change: Callable[[str], str]) -> Joined:
        return Joined(tuple(renamed(part, change) for part in self.parts))

    def build(self, checkpoint: Checkpoint) -> Tensor:
        tensors = [as_source(part).build(checkpoint) for part in self.parts]
        first = tuple(tensors[0].shape)
        for name, tensor in zip(self.names, tensors):
            if tensor.shape[1:] != first[1:]:
                shape = tuple(tensor.shape)
                raise UserError(f'{checkpoint.file_of(name)}: tensor "{name}" has shape {shape}, but '
                                f'{first} is that of "{self.names[0]}", with which it belongs together.')
        return torch.cat(tensors)


Name = Union[str, Source, Joined]
Names = dict[str, Name]                                 # ours → theirs
WB = ("weight", "bias")


def divides(count: int, tensor: Tensor) -> bool:
    """Whether the rows of a tensor can be cut into `count` equal blocks."""
    return tensor.ndim > 0 and len(tensor) % count == 0


def as_source(name: Name) -> Source | Joined:
    return Source(name) if isinstance(name, str) else name


def renamed(name: Name, change: Callable[[str], str]) -> Name:
    """The entry of a table with every published name in it changed."""
    return change(name) if isinstance(name, str) else name.renamed(change)


def parameters(modules: dict[str, str], ours: str = "", theirs: str = "",
               endings: Sequence[str] = WB) -> Names:
    """A table of modules → a table of their weights and biases, each side with its prefix."""
    return {f"{ours}{a}.{w}": f"{theirs}{b}.{w}" for a, b in modules.items() for w in endings}


def split_qkv(ours: str, theirs: str, endings: Sequence[str] = WB) -> Names:
    """q, k and v as thirds of a fused matrix: ours + "k.bias" → Part(theirs + "bias", 1, 3), …"""
    return {f"{ours}{p}.{w}": Part(theirs + w, n, 3) for n, p in enumerate("qkv") for w in endings}


def expand(names: Names, layers: int | Sequence[int], prefix: str = "", ours: str = "") -> Names:
    """The table of a whole model: {i} becomes the number of each layer.

    `prefix` goes in front of their names, `ours` in front of ours; {i} may stand in these, too.
    layers: how many there are, or the number of each in the published model, where those are not 0, 1, 2, …
    """
    numbers = range(layers) if isinstance(layers, int) else layers
    table: Names = {}
    for our_name, their_name in names.items():
        our_name = ours + our_name
        for i, number in enumerate(numbers) if "{i}" in our_name else [(0, 0)]:
            table[our_name.format(i=i)] = renamed(their_name, lambda name: (prefix + name).format(i=number))
    return table
