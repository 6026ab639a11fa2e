"""plumbing/log.py: log.jsonl, a line per logged step."""
from __future__ import annotations

import json
from pathlib import Path

from support.formats.files import atomically, cannot_write, read_json_lines


def read_log(file: Path) -> list[dict]:
    """The complete lines of a log.jsonl; a crash may have cut off the last one.

    A line that is none of a log (keys.py) is a UserError.
    """
    return read_json_lines(file) if file.exists() else []


def append_line(file: Path, line: dict) -> None:
    try:
        with open(file, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
    except OSError as e:
        raise cannot_write(file, e) from None


def rewind_log(file: Path, step: int) -> float:
    """Drop the lines after `step`, which a resumed run writes again, and a last line that is cut off.

    Returns the seconds of training at the last line that stays.
    """
    kept = [line for line in read_log(file) if line["step"] <= step]
    with atomically(file) as tmp:
        tmp.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return max((line["seconds"] for line in kept if "seconds" in line), default=0.0)
