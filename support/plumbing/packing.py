"""plumbing/packing.py: documents and the room for them: what --longest leaves, which share a row (--pack)."""
from __future__ import annotations

from model import IGNORE, IMAGE
from support.formats.files import UserError


def require_room(documents: list, longest: int, K: int, name: str) -> None:
    """A UserError if --longest leaves nothing to learn of these documents, the first ones of a data set.

    K: positions that a picture takes. The documents are cut.
    """
    for d in documents:
        d.cut(longest, K)
    if all(label == IGNORE for d in documents for label in d.labels):
        raise UserError(f"--longest {longest}: nothing is left to learn of the first documents of {name}, in "
                        f"which a picture takes {K} positions; give more.")


def pack_documents(documents: list, longest: int, K: int) -> list[list[int]]:
    """Which documents share a row of at most `longest` positions (a picture takes K): lists of their indices.

    First-fit decreasing: the longest document first, each into the first row with room for it.
    """
    size = [sum(K if t == IMAGE else 1 for t in d.tokens) for d in documents]
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
