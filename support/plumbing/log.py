"""plumbing/log.py: log.jsonl, a line per logged step, and the same for TensorBoard."""
from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

from support.formats.files import UserError, atomically, cannot_write, read_json_lines

BOARD = "tensorboard"                   # a folder of a run: events of TensorBoard


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


def require_tensorboard() -> None:
    """A UserError where the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard writes what the package tensorboard reads, which is not installed; "
                        "pip install tensorboard.")


class Board:
    """The numbers of log.jsonl as events of TensorBoard, in the run folder's `tensorboard`.

    step: where the run starts; TensorBoard then drops later events, which a resumed run writes again.
    """

    def __init__(self, out: Path, step: int = 0):
        require_tensorboard()
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        self.event, self.summary, self.file = Event, Summary, EventFileWriter(str(out / BOARD))
        start = SessionLog(status=SessionLog.START)
        self.file.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, line: dict) -> None:
        """The numbers of a line of the log, each a curve."""
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in line.items()
                  if isinstance(value, (int, float)) and name != "step"]
        summary = self.summary(value=values)
        self.file.add_event(self.event(wall_time=time.time(), step=line["step"], summary=summary))

    def close(self) -> None:
        self.file.close()
