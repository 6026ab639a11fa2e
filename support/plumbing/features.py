"""plumbing/features.py: features of the frozen ViT, computed once per picture."""
from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from model import VLM


class FeatureCache:
    """Features of the frozen ViT, computed once per picture: rows of one file, read through a memory map.

    The file is named by everything that a feature depends on: the ViT's weights and config, the hidden state
    that is read, and `identity` (data set, seed, dtypes). Rows are appended. `.ids` names the picture of each
    row; a row counts once its line there is complete.
    """

    def __init__(self, folder: str | Path, vlm: VLM, identity: tuple, rank: int = 0):
        vit, bridge = vlm.vit, vlm.bridge
        digest = hashlib.sha256(repr((vit.config, bridge.reads, bridge.reads_cls, *identity)).encode())
        for p in vit.parameters():
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
        self.shape, self.dtype, self.device = tuple(vlm.features(None).shape[1:]), p.dtype, p.device
        self.row_bytes = math.prod(self.shape) * self.dtype.itemsize
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.file = Path(folder) / f"{digest.hexdigest()[:16]}-{rank}.features"
        self.names = self.file.with_suffix(".ids")
        lines = self.names.read_text(encoding="utf-8").splitlines(True) if self.names.exists() else []
        self.rows = {line.rstrip("\n"): n for n, line in enumerate(lines) if line.endswith("\n")}

    def __call__(self, pixels: dict[str, Tensor], keys: list[str], compute: Callable) -> Tensor:
        """Features (m, N, Di) of the pictures named by keys, (m).

        compute: (k, 3, S, S) → (k, N, Di) for pictures without a row yet; `pixels` holds theirs, (3, S, S).
        """
        new = [key for key in dict.fromkeys(keys) if key not in self.rows]
        if new:
            self.append(new, compute(torch.stack([pixels[key] for key in new])).to(self.dtype))
        if not keys:
            return torch.zeros(0, *self.shape, dtype=self.dtype, device=self.device)
        table = np.memmap(self.file, np.uint8, "r", shape=(len(self.rows), self.row_bytes))
        rows = torch.from_numpy(table[[self.rows[key] for key in keys]])    # (m, bytes): a copy of these rows
        return rows.view(self.dtype).view(-1, *self.shape).to(self.device)

    def append(self, keys: list[str], features: Tensor) -> None:
        with open(self.file, "ab") as f:
            f.truncate(len(self.rows) * self.row_bytes)                         # drops what a crash left
            f.write(features.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        with open(self.names, "a", encoding="utf-8") as f:
            f.writelines(f"{key}\n" for key in keys)
        self.rows |= {key: len(self.rows) + n for n, key in enumerate(keys)}
