"""plumbing/digest.py: short names for large things, to tell whether they are still the same."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

SAMPLED = 1000                  # so many records of a data set count, at equal distances


def text_digest(value) -> str:
    """Of anything that JSON can say."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def checksums(tensor: Tensor, chunk: int = 2**20) -> list[int]:
    """Σ_i (2i + 1) w_i mod 2⁶⁴ over the 64-bit words of each `chunk` of words, at the speed of memory.

    The factors make a sum that knows the order of the words. Bytes that fill no word count as words.
    """
    data = tensor.detach().contiguous().flatten()
    data = (data.clone() if data.storage_offset() else data).view(torch.uint8)          # words are aligned
    whole = len(data) // 8 * 8
    words = data[:whole].view(torch.int64)
    odd = torch.arange(1, 2 * min(chunk, len(words)), 2, device=data.device)
    sums = [(part * odd[:len(part)]).sum() for part in words.split(chunk) if len(part)]
    return [*(torch.stack(sums).tolist() if sums else []), *data[whole:].tolist()]


def weights_digest(module: nn.Module) -> str:
    """Of all parameters and buffers with their names, shapes and dtypes."""
    facts = [(name, list(t.shape), str(t.dtype), checksums(t)) for name, t in module.state_dict().items()]
    return text_digest(facts)


def parts_digest(module: nn.Module, trained: tuple[str, ...]) -> str:
    """Of the parts of a model that do not learn."""
    parts = {name: weights_digest(part) for name, part in module.named_children() if name not in trained}
    return text_digest(parts)


def picture_digest(picture: np.ndarray) -> str:
    """Of the content of a picture, (h, w, 3) uint8."""
    digest = hashlib.sha256(repr(picture.shape).encode())
    digest.update(np.ascontiguousarray(picture))
    return digest.hexdigest()[:32]


def file_end(path: Path, size: int = 4096) -> list:
    """The size of a file and a digest of its last bytes; a missing file has none."""
    if not path.exists():
        return []
    with open(path, "rb") as f:
        whole = f.seek(0, 2)
        f.seek(max(0, whole - size))
        return [whole, hashlib.sha256(f.read()).hexdigest()[:32]]


def data_digest(sets: list[tuple], task) -> str:
    """Of (data set, weight) pairs: names, lengths, up to 1000 records and the ends of their picture files; of
    what makes tokens and pixels of them: the files of the task's tokenizer, and its image processor.

    A data set that is generated from its name and seed has no records.
    """
    facts = []
    for world, weight in sets:
        items = getattr(world, "items", [])
        if hasattr(world, "digest"):                    # of all of its content
            facts.append((world.name, weight, len(items), world.digest))
            continue
        sample = items[::1 + len(items) // SAMPLED]
        pictures = [Path(p) for item in sample for record in item for p in record.images]
        facts.append((world.name, weight, len(items), list(map(repr, sample)), list(map(file_end, pictures))))
    facts.append(getattr(getattr(task, "tokenizer", None), "digest", ""))
    facts.append(repr(getattr(task.module, "processor", None)))
    return text_digest(facts)
