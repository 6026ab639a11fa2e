"""plumbing/features.py: features of the frozen ViT, computed once per picture."""
from __future__ import annotations

import fcntl
import math
import os
import re
import zlib
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import VLM
from support.formats.files import UserError
from support.plumbing.digest import picture_digest, text_digest, weights_digest

LINE = re.compile(rb"[0-9a-f]{32} [0-9a-f]{8}\n")       # of the .ids file: picture, checksum of its row
LENGTH = 32 + 1 + 8 + 1                                 # bytes


class Known(NamedTuple):
    """What the cache has of m pictures."""
    keys: list[str]                                     # (m) digests of the pictures
    rows: Tensor                                        # (m, N, Di), zeros where it has none
    missing: list[int]                                  # the first of each picture that it lacks


class FeatureCache:
    """Features of the frozen ViT by the content of the picture, in two files that runs may share.

        FOLDER/NAME.features    rows of N · Di numbers
        FOLDER/NAME.ids         a line for each row: the digest of its picture, the row's checksum

    NAME is a digest of everything else that a feature depends on: the ViT's weights and config, the hidden
    state that is read, the picture's preparation, dtype and device. One process appends at a time: it holds a
    lock, and first reads the lines of the others. A row counts once its line is complete. A row that does not
    fit its checksum is computed again, and what is no such list of ids is begun anew.
    """

    def __init__(self, folder: str | Path, vlm: VLM, processor):
        vit, bridge, p = vlm.vit, vlm.bridge, next(vlm.vit.parameters())
        self.shape, self.dtype, self.device = tuple(vlm.features(None).shape[1:]), p.dtype, p.device
        self.row_bytes = math.prod(self.shape) * self.dtype.itemsize
        name = text_digest([repr(vit.config), weights_digest(vit), bridge.reads, bridge.reads_cls,
                            repr(processor), str(p.dtype), p.device.type])
        self.file = Path(folder) / f"{name[:16]}.features"
        self.names = self.file.with_suffix(".ids")
        self.rows: dict[str, tuple[int, str]] = {}      # picture → the number of its row, the row's checksum
        self.count, self.reported = 0, False            # lines read so far; whether damage was reported
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.names.touch()
            self.file.touch()
        except OSError as e:
            raise UserError(f"--cache {folder}: cannot be written ({e.strerror}); "
                            "give another folder.") from None
        self.refresh()

    def look_up(self, pictures: list[np.ndarray]) -> Known:
        """What the cache has of pictures, (h, w, 3) uint8 each."""
        keys = [picture_digest(picture) for picture in pictures]
        if any(key not in self.rows for key in keys):
            self.refresh()
        return self.read(keys)

    def complete(self, known: Known, pixels: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Features (m, N, Di) of the pictures that were looked up; what is missing is computed and kept.

        pixels: (len(missing), 3, S, S); compute: (k, 3, S, S) → (k, N, Di).
        """
        keys, rows, missing = known
        if missing:
            wanted = [keys[n] for n in missing]
            found = self.read(wanted)                   # the batch was put together some steps ago
            if found.missing:
                with torch.autocast(self.device.type, enabled=False):       # rows are the same for everyone
                    new = compute(pixels[found.missing]).to(self.dtype).cpu()
                self.report_damage([wanted[n] for n in found.missing])
                self.append([wanted[n] for n in found.missing], new)
                found.rows[found.missing] = new
            place = {key: n for n, key in enumerate(wanted)}
            for n, key in enumerate(keys):
                if key in place:
                    rows[n] = found.rows[place[key]]
        return rows.to(self.device)

    def read(self, keys: list[str]) -> Known:
        rows, absent = torch.zeros(len(keys), self.row_bytes, dtype=torch.uint8), {}
        with open(self.file, "rb") as file:
            for n, key in enumerate(keys):
                place, checksum = self.rows.get(key, (0, ""))
                row = os.pread(file.fileno(), self.row_bytes, place * self.row_bytes) if checksum else b""
                if len(row) == self.row_bytes and checksum_of(row) == checksum:
                    rows[n] = torch.frombuffer(bytearray(row), dtype=torch.uint8)
                else:
                    absent.setdefault(key, n)
        return Known(keys, rows.view(self.dtype).view(-1, *self.shape), list(absent.values()))

    def append(self, keys: list[str], features: Tensor) -> None:
        rows = [row.tobytes() for row in features.contiguous().view(torch.uint8).view(len(keys), -1).numpy()]
        try:
            with open(self.names, "ab") as names, open(self.file, "ab") as file:
                fcntl.flock(names, fcntl.LOCK_EX)       # until `names` is closed
                self.refresh()                          # what others have appended
                names.truncate(self.count * LENGTH)     # what a crash left
                file.truncate(self.count * self.row_bytes)
                file.writelines(rows)
                file.flush()
                names.writelines(f"{key} {checksum_of(row)}\n".encode() for key, row in zip(keys, rows))
        except OSError as e:
            raise UserError(f"{self.file}: cannot be written ({e.strerror}); free some space, or leave "
                            "--cache out.") from None
        self.refresh()

    def refresh(self) -> None:
        """Read the lines that were appended since the last time."""
        with open(self.names, "rb") as names:
            if os.fstat(names.fileno()).st_size < self.count * LENGTH:      # somebody began it anew
                self.rows, self.count = {}, 0
            names.seek(self.count * LENGTH)
            text = names.read()
        for start in range(0, len(text) - LENGTH + 1, LENGTH):
            line = text[start:start + LENGTH]
            if not LINE.fullmatch(line):
                print(f"cache    {self.names} is no list of ids, so the cache is made anew")
                os.truncate(self.names, 0)
                self.rows, self.count = {}, 0
                return
            key, checksum = line.decode().split()
            self.rows[key] = self.count, checksum
            self.count += 1

    def report_damage(self, keys: list[str]) -> None:
        if not self.reported and any(key in self.rows for key in keys):
            print(f"cache    {self.file}: damaged rows, which are computed again")
            self.reported = True


def checksum_of(row: bytes) -> str:
    return f"{zlib.crc32(row):08x}"
