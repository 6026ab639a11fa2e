"""plumbing/cli.py: what the command lines share."""
from __future__ import annotations

import json
import os
import sys
import time

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


def run_cli(main_function) -> None:
    """A user's mistake is one sentence on stderr and exit code 2; anything else is a bug and shows its traceback."""
    try:
        main_function()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except UserError as e:
        if int(os.environ.get("RANK", 0)):              # where the first process says the same, torchrun ends this one meanwhile
            time.sleep(5)
        print(str(e), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(0)
