"""plumbing/device.py: in which numbers a device computes and stores."""
from __future__ import annotations

from typing import TYPE_CHECKING
from pathlib import Path

import torch

from support.formats.files import UserError

if TYPE_CHECKING:
    from train import Settings


def frozen_dtype(s: Settings, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """How frozen parts are stored: on a GPU as they are computed with; a CPU keeps float32, where the toys' tables were measured."""
    if s.frozen not in ("auto", "float32", "bfloat16"):
        raise UserError(f'unknown --frozen "{s.frozen}"; known: auto, float32, bfloat16.')
    return (dtype if device.type == "cuda" else torch.float32) if s.frozen == "auto" else getattr(torch, s.frozen)


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    if name == "auto":
        if device.type == "cuda":
            return (torch.bfloat16, "this GPU has it") if torch.cuda.is_bf16_supported() else (torch.float32, "this GPU has no bfloat16")
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return torch.bfloat16, "this CPU has bfloat16 instructions: about 2x faster here"
        return torch.float32, "this CPU has no bfloat16 instructions"
    if name not in ("float32", "bfloat16"):
        raise UserError(f'unknown dtype "{name}"; known: auto, float32, bfloat16.')
    return getattr(torch, name), "as asked"
