"""plumbing/packing.py: documents and the room for them: what --longest leaves, which share a row (--pack)."""
from __future__ import annotations

import sys

from model import IGNORE, IMAGE
from support.formats.files import UserError


def require_room(documents: list, longest: int, K: int, name: str, context: int) -> None:
    """A UserError if --longest leaves nothing to learn of these documents, the first ones of a data set.

    K: positions that a picture takes; context: those that the decoder reads, beyond which a warning is due.
    The documents are cut.
    """
    for d in documents:
        d.cut(longest, K)
    most = max(positions(d, K) for d in documents)
    if most > context:
        print(f"warning: a document of {name} takes {most} positions, and this decoder was trained on "
              f"{context} at most; give --longest {context}", file=sys.stderr)
    if all(label == IGNORE for d in documents for label in d.labels):
        raise UserError(f"--longest {longest}: nothing is left to learn of the first documents of {name}, in "
                        f"which a picture takes {K} positions; give more.")


def positions(document, K: int) -> int:
    return sum(K if t == IMAGE else 1 for t in document.tokens)


def pack_documents(documents: list, longest: int, K: int) -> list[list[int]]:
    """Which documents share a row of at most `longest` positions (a picture takes K): lists of their indices.

    First-fit decreasing: the longest document first, each into the first row with room for it.
    """
    size = [positions(d, K) for d in documents]
    rows, room = [], []
    for i in sorted(range(len(documents)), key=lambda i: -size[i]):
        row = next((r for r, free in enumerate(room) if free >= size[i]), None)
        if row is None:
            rows.append([])
            room.append(longest)
            row = len(rows) - 1
        rows[row].append(i)
        room[row] -= size[i]
    return rows
