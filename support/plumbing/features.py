"""plumbing/features.py: features of the frozen ViT, computed once per picture."""
from __future__ import annotations

from typing import TYPE_CHECKING
import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import VLM

if TYPE_CHECKING:
    from train import Settings


class FeatureCache:
    """Features of the frozen ViT, computed once per picture: rows of one file, read back through the memory map.

    The file is named by everything that a feature depends on: the ViT's weights and config, the hidden state that is read, and the data
    set with its seed. Rows are appended; `.ids` names the picture of each row, and a row counts once its line there is complete.
    """

    def __init__(self, s: Settings, vlm: VLM, rank: int = 0):
        digest = hashlib.sha256(repr((vlm.vit.config, vlm.bridge.reads, vlm.bridge.reads_cls, s.data, s.seed, s.frozen, s.dtype)).encode())
        for p in vlm.vit.parameters():
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
        tokens = vlm.vit.config.tokens - (vlm.vit.config.cls and not vlm.bridge.reads_cls)
        self.shape, self.dtype, self.device = (tokens, vlm.vit.config.width), p.dtype, p.device
        self.bytes = math.prod(self.shape) * self.dtype.itemsize                # of one picture
        folder = Path(s.cache)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{digest.hexdigest()[:16]}-{rank}.features"
        self.names = self.file.with_suffix(".ids")
        lines = self.names.read_text(encoding="utf-8").splitlines(True) if self.names.exists() else []
        self.rows = {line.rstrip("\n"): n for n, line in enumerate(lines) if line.endswith("\n")}

    def __call__(self, pixels: dict[str, Tensor], keys: list[str], look) -> Tensor:
        """Features (m, N, Di) of the pictures named by keys; `look` computes those that are new from their pixels (3, S, S)."""
        new = [key for key in dict.fromkeys(keys) if key not in self.rows]
        if new:
            fresh = look(torch.stack([pixels[key] for key in new])).to(self.dtype)
            with open(self.file, "ab") as f:
                f.truncate(len(self.rows) * self.bytes)                         # what a crash left behind
                f.write(fresh.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            with open(self.names, "a", encoding="utf-8") as f:
                f.writelines(f"{key}\n" for key in new)
            self.rows |= {key: len(self.rows) + n for n, key in enumerate(new)}
        if not keys:
            return torch.zeros(0, *self.shape, dtype=self.dtype, device=self.device)
        held = np.memmap(self.file, np.uint8, "r", shape=(len(self.rows), self.bytes))
        rows = torch.from_numpy(held[[self.rows[key] for key in keys]])         # (m, bytes): a copy of these rows
        return rows.view(self.dtype).view(-1, *self.shape).to(self.device)
