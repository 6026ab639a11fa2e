"""plumbing/device.py: which device computes, and in which numbers it computes and stores."""
from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from support.formats.files import UserError

CPUINFO = Path("/proc/cpuinfo")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3     # of mallopt(3)


def pick_device(name: str) -> torch.device:
    """auto | cpu | cuda | cuda:N | mps → that device; a UserError if this machine does not have it."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    here = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{n}" for n in gpus)]
    here += ["mps"] if torch.backends.mps.is_available() else []
    if name == "mps" and "mps" in here:
        print("note: --device mps was never tried; a run on the CPU says what the numbers should be",
              file=sys.stderr)
    if name not in ("auto", *here):
        raise UserError(f'--device "{name}": there is no such device here; known: auto, {", ".join(here)}.')
    return torch.device(name if name != "auto" else "cuda" if gpus else "cpu")


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and the reason. name: float32 | bfloat16 | auto."""
    if name in ("float32", "bfloat16"):
        return getattr(torch, name), "as asked"
    if name != "auto":
        raise UserError(f'unknown dtype "{name}"; known: auto, float32, bfloat16.')
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has it"
        return torch.float32, "this GPU has no bfloat16"
    if device.type != "cpu":
        return torch.float32, f"nobody has tried bfloat16 on {device.type}"
    return cpu_dtype(CPUINFO.read_text() if CPUINFO.exists() else "")


def cpu_dtype(cpuinfo: str) -> tuple[torch.dtype, str]:
    """The same for a CPU that Linux describes so.

    Flags alone do not say what is fast: an Intel Xeon with avx512_bf16 and without AMX multiplied 2,048 x
    2,048 matrices at 94 GFLOP/s in bfloat16 and at 172 in float32.
    """
    if "amx_bf16" in cpuinfo or "avx512_bf16" in cpuinfo and "AuthenticAMD" in cpuinfo:
        return torch.bfloat16, "this CPU has bfloat16 instructions: about 2x faster here"
    if "avx512_bf16" in cpuinfo:
        return torch.float32, "this CPU has bfloat16 instructions, but float32 is faster here"
    return torch.float32, "this CPU has no bfloat16 instructions"


def frozen_dtype(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """How frozen parts are stored. auto: on a GPU in the dtype they compute in; on a CPU in float32.

    The toys' tables were measured on a CPU.
    """
    if name not in ("auto", "float32", "bfloat16"):
        raise UserError(f'unknown --frozen "{name}"; known: auto, float32, bfloat16.')
    if name != "auto":
        return getattr(torch, name)
    return dtype if device.type == "cuda" else torch.float32


def keep_freed_memory(largest: int = 2**28) -> bool:
    """From here on this process keeps what it frees, blocks of up to `largest` bytes; whether it can.

    Linux's C library maps a large block anew for each tensor and gives it back with the tensor, and the
    kernel clears it page by page: 57,000 pages in a step that trains InstructBLIP's Q-Former, a fourth of
    the step. Kept blocks are used again. No number changes. Above `largest`, as while a checkpoint is read,
    memory goes back. Nothing happens where the C library has no mallopt (macOS, Windows, musl).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(M_MMAP_THRESHOLD, largest) and libc.mallopt(M_TRIM_THRESHOLD, -1))
