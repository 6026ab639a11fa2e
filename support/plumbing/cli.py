"""plumbing/cli.py: what the command lines share."""
from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from support.formats.files import UserError


def parse_options(pairs: list[str]) -> dict:
    options = {}
    for pair in pairs:
        name, eq, value = pair.partition("=")
        if not eq:
            raise UserError(f'--option {pair}: write name=value, for example --option version=1.')
        try:
            options[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            options[name] = value
    return options


ROOT = Path(__file__).parents[2]
MATH = (*(ROOT / f"{name}.py" for name in ("model", "bridges", "data")), ROOT / "papers")


def refused_by_the_math(error: ValueError) -> bool:
    """Whether the sentence was raised by a line of ours that checks a number, not inside a library."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    file = Path(last.tb_frame.f_code.co_filename)
    return any(file == place or place in file.parents for place in MATH)


def run_cli(main_function) -> None:
    """A user's mistake is one sentence on stderr and exit code 2; anything else is a bug and shows its traceback."""
    try:
        main_function()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except ValueError as e:
        if not (isinstance(e, UserError) or refused_by_the_math(e)):
            raise
        if int(os.environ.get("RANK", 0)):              # where the first process says the same, torchrun ends this one meanwhile
            time.sleep(5)
        print(str(e), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(0)
