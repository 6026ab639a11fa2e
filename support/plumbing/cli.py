"""plumbing/cli.py: flags out of a dataclass, and how a command ends."""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Callable, Sequence

import torch

from model import nearest
from support.formats.files import UserError

ROOT = Path(__file__).parents[2]
MATH = (*(ROOT / f"{name}.py" for name in ("model", "bridges", "data")), ROOT / "papers")


# ------------------------------------------------------------------------------------------------------------
# Flags: a dataclass whose fields are settings
# ------------------------------------------------------------------------------------------------------------

def setting(default, help: str, group: str = "", choices: Sequence[str] = (), least: int | None = None,
            **keywords):
    """A field of a dataclass that is a flag.

    group: begins a new group of the help text with this flag; choices: the values it may have, which its help
    lists; least: the smallest value; keywords: argparse's.
    """
    value = {"default_factory": list} if default == [] else {"default": default}
    facts = dict(help=help, group=group, choices=tuple(choices), least=least, keywords=keywords)
    return dataclasses.field(**value, metadata=facts)


def check_settings(s) -> None:
    """Refuse a value that is not among its field's choices, or below its least."""
    for f in dataclasses.fields(s):
        value, choices, least = getattr(s, f.name), f.metadata["choices"], f.metadata["least"]
        if choices and value not in (*choices, f.default):
            raise UserError(f'unknown {f.name} "{value}"; {nearest(value, choices)}')
        if least is not None and value is not None and value < least:
            raise UserError(f"{flag_name(f.name)} {value}: must be at least {least}.")


def make_parser(settings: type, description: str) -> argparse.ArgumentParser:
    """A parser with one flag per field of the dataclass; help in groups, and defaults where there are any."""
    parser = argparse.ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False,
                                     usage="%(prog)s [--FLAG VALUE …]", formatter_class=HelpFormatter)
    group = parser
    for f in dataclasses.fields(settings):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        flag, keywords = flag_name(f.name), dict(f.metadata["keywords"])
        shown = f.type != "list" and f.default not in (None, "", False)
        text = ": ".join(filter(None, (f.metadata["help"], ", ".join(f.metadata["choices"])))).replace("%",
                                                                                                       "%%")
        text += f" (default: {f.default})" if shown else ""
        if f.type == "bool":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        elif f.type == "list":
            group.add_argument(flag, default=[], help=text, **keywords)
        else:
            kind = {"int": int, "float": float, "str": str}[f.type]
            metavar = {int: "N", float: "X", str: "…"}[kind]
            group.add_argument(flag, type=kind, default=f.default, help=text,
                               **{"metavar": metavar, **keywords})
    return parser


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The description as it is written; flags in one column, their help beside them."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=24, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """--pack instead of --pack, --no-pack."""
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0]
        return super()._format_action_invocation(action)


def flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The flags' values. An unknown flag, or a value of another type, is a UserError."""
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(f"{e}; see python {parser.prog} --help.") from None
    if unknown:
        flags = [a.option_strings[0] for a in parser._actions if a.option_strings]
        raise UserError(f'unknown argument "{unknown[0]}"; {nearest(unknown[0], flags)}')
    return args


def parse_weighted(spec: str) -> list[tuple[str, float]]:
    """"coco:DIR + interleaved:DIR * 0.2" → [("coco:DIR", 1.0), ("interleaved:DIR", 0.2)]."""
    sets = []
    for part in spec.split(" + "):
        name, star, weight = part.strip().rpartition(" * ")
        try:
            sets.append((name.strip(), float(weight)) if star else (part.strip(), 1.0))
        except ValueError:
            raise UserError(f'--data "{spec}": the weight "{weight}" is no number; '
                            'write "SPEC + SPEC * 0.2".') from None
    return sets


def parse_options(pairs: list[str]) -> dict:
    """["width=64", "tanh=true"] → {"width": 64, "tanh": True}; what is no JSON stays text."""
    options = {}
    for pair in pairs:
        name, eq, value = pair.partition("=")
        if not eq:
            raise UserError(f"--option {pair}: write name=value, for example --option version=1.")
        try:
            options[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            options[name] = value
    return options


# ------------------------------------------------------------------------------------------------------------
# The end of a command
# ------------------------------------------------------------------------------------------------------------

def is_error_of_the_math(error: ValueError) -> bool:
    """Whether a line of ours that checks a number raised it, not a library."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    file = Path(last.tb_frame.f_code.co_filename)
    return any(file == place or place in file.parents for place in MATH)


def run_cli(main_function: Callable[[], object]) -> None:
    """Run a command: a user's mistake is one sentence on stderr, exit code 2; a bug shows its traceback."""
    try:
        main_function()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except ValueError as e:
        if not (isinstance(e, UserError) or is_error_of_the_math(e)):
            raise
        if int(os.environ.get("RANK", 0)):              # the first process prints the sentence for all;
            time.sleep(5)                               # torchrun ends this one meanwhile
        print(str(e), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(0)
