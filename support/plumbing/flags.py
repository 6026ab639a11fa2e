"""plumbing/flags.py: the parser of eval.py's command lines, and the flags that all of them have."""
from __future__ import annotations

import argparse
import os
from typing import Callable

from papers.bounds import nearest
from support.formats.files import UserError, check_value
from support.plumbing.device import pick_device


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake as one sentence (UserError) and keeps lines of examples."""

    def __init__(self, program: str, examples: str):
        super().__init__(prog=program, description=examples, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            hint = f"see python {self.prog} --help."
            if unknown[0].startswith("-"):
                hint = nearest(unknown[0].partition("=")[0], flags)
            raise UserError(f'unknown argument "{unknown[0]}"; {hint}')
        return args

    def error(self, message: str):
        raise UserError(f"{message}; see python {self.prog} --help.")


def number(kind: type = int, **bounds) -> Callable[[str], float]:
    """An argparse type: a number within bounds (papers/bounds.py); the parser names the flag."""
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = text
        try:
            return check_value("it", value, kind, **bounds)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e).rstrip(".")) from None

    return convert


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the machine")
    group.add_argument("--device", default="auto", help="cpu | cuda | cuda:N | mps (untested) | auto (auto)")
    group.add_argument("--offline", action="store_true", help="no network: hub names from the local cache")


def use_machine(args: argparse.Namespace) -> str:
    """Apply --offline, and return the device that --device means."""
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"              # read by hub.fetch and by the hub's own library
    return str(pick_device(args.device))
