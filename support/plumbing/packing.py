"""plumbing/packing.py: which documents share a row of a batch (--pack); data.collate puts them there."""
from __future__ import annotations

from model import IMAGE


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
