"""plumbing/log.py: log.jsonl, a line per logged step."""
from __future__ import annotations

import json
from pathlib import Path

from support.formats.files import atomically


def read_log(file: Path) -> list[dict]:
    """The complete lines of a log.jsonl; a crash may have cut off the last one."""
    lines = file.read_text(encoding="utf-8").splitlines(True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_line(file: Path, line: dict) -> None:
    with open(file, "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")


def rewind_log(file: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run writes again, and a last line that is cut off."""
    kept = [json.dumps(x) + "\n" for x in read_log(file) if x["step"] <= step]
    with atomically(file) as tmp:
        tmp.write_text("".join(kept), encoding="utf-8")
