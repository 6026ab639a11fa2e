"""plumbing/cli.py: flags out of a dataclass, and how a command ends."""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import Callable, Sequence

import torch

from papers.bounds import nearest
from support.formats.files import UserError, at_the_door, check_value, parse_json
from support.plumbing.device import keep_freed_memory
from support.plumbing.stop import CLOSED, CODES, Stop, Stopped

ROOT = Path(__file__).parents[2]
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list}     # of a setting
MATH = (*(ROOT / f"{name}.py" for name in ("model", "bridges", "data")), ROOT / "papers")


# ---- Flags: a dataclass whose fields are settings --------------------------------------------------------

def setting(default, help: str, group: str = "", choices: Sequence[str] = (), least: float | None = None,
            most: float | None = None, above: float | None = None, below: float | None = None, **keywords):
    """A field of a dataclass that is a flag.

    group: begins a new group of the help text with this flag; choices: the values it may have, which its help
    lists; least, most, above, below: its bounds (papers/bounds.py); keywords: argparse's.
    """
    value = {"default_factory": list} if default == [] else {"default": default}
    bounds = dict(least=least, most=most, above=above, below=below)
    facts = dict(help=help, group=group, choices=tuple(choices), bounds=bounds, keywords=keywords)
    return dataclasses.field(**value, metadata=facts)


def check_settings(s, named: Callable[[str], str] | None = None) -> None:
    """Refuse a value of another type than its field's, not among its choices or out of its bounds.

    None is right where it is the default. named: of a run that is resumed, whose fields are all filled in,
    a field → its name in the message; without it that is its flag.
    """
    for f in dataclasses.fields(s):
        value, choices, name = getattr(s, f.name), f.metadata["choices"], (named or flag_name)(f.name)
        if value is None and f.default is None and not named:
            continue
        with at_the_door():
            check_value(name, value, TYPES[f.type], **f.metadata["bounds"])
            for n, text in enumerate(value if f.type == "list" else ()):
                check_value(f"{name}[{n}]", text, str)
        if choices and value and value not in choices:
            raise UserError(f'unknown {f.name} "{value}"; {nearest(value, choices)}')


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
            metavar = {"int": "N", "float": "X", "str": "…"}[f.type]
            group.add_argument(flag, type=TYPES[f.type], default=f.default, help=text,
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
            weight = float(weight) if star else 1.0
        except ValueError:
            raise UserError(f'--data "{spec}": the weight "{weight}" is no number; '
                            'write "SPEC + SPEC * 0.2".') from None
        with at_the_door(f'--data "{spec}"'):
            check_value(f"the weight of {name or part}", weight, float, above=0, most=1e6)
        sets.append((name.strip() if star else part.strip(), weight))
    return sets


def parse_options(pairs: list[str]) -> dict:
    """["width=64", "tanh=true"] → {"width": 64, "tanh": True}; what is no JSON stays text.

    The types and bounds of a bridge's options are checked by papers.make_bridge.
    """
    options = {}
    for pair in pairs:
        name, eq, value = pair.partition("=")
        if not eq:
            raise UserError(f"--option {pair}: write name=value, for example --option version=1.")
        try:
            options[name] = parse_json(value.lower() if value in ("True", "False") else value)
        except ValueError:
            options[name] = value
    return options


# ---- The end of a command --------------------------------------------------------------------------------

def is_error_of_the_math(error: ValueError) -> bool:
    """Whether a line of ours that checks a number raised it, not a library."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    file = Path(last.tb_frame.f_code.co_filename)
    return any(file == place or place in file.parents for place in MATH)


def mistake(error: Exception) -> str | None:
    """The sentence of a user's mistake, or of a machine that lacks disk or memory; None: a bug of ours.

    Files are read and written behind doors that name them; this is what passes between the doors.
    """
    if isinstance(error, UserError) or isinstance(error, ValueError) and is_error_of_the_math(error):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{str(error.filename or 'the system'):.200}: {error.strerror}."
    full = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if full or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return ("memory is full; train.py needs less with a smaller --batch or --longest or with "
                "--accumulate, and eval.py ask and chat with --dtype bfloat16.")
    return None


def check_arguments(arguments: list[str]) -> None:
    """Refuse one that is no UTF-8: Python holds its bytes as halves of surrogate pairs, and such a text can
    neither be printed nor written into a run's config.json."""
    for argument in arguments:
        shown = argument.encode("utf-8", "backslashreplace").decode()
        if shown != argument:
            raise UserError(f"{shown}: this argument is not in UTF-8; rename the file or folder.")


def run_cli(main_function: Callable[[], object]) -> None:
    """Run a command: a user's mistake is one sentence on stderr, exit code 2; a bug shows its traceback."""
    for name in ("stdin", "stdout", "stderr"):          # one that was closed (<&-) is an empty one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    if not sys.stdout.isatty() and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)     # through a pipe, too, a line is seen when it is said
    keep_freed_memory()
    stop = Stop()
    outside = signal.signal(signal.SIGINT, stop)
    try:
        try:
            check_arguments(sys.argv)
            main_function()
        except Exception:
            if stop.asked:                              # a library made another error of the interrupt
                raise KeyboardInterrupt from None
            raise
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BrokenPipeError:                             # as in `python data.py | head -3`
        os._exit(CLOSED)                                # at its own exit Python would write there once more
    except Exception as e:
        sentence = mistake(e)
        if sentence is None:
            raise
        if int(os.environ.get("RANK", 0)):              # the first process prints the sentence for all;
            time.sleep(5)                               # torchrun ends this one meanwhile
        print(sentence, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:                      # a run that was stopped says how to go on
        code = e.code if isinstance(e, Stopped) else CODES[signal.SIGINT]
        with contextlib.suppress(BrokenPipeError):
            if not int(os.environ.get("RANK", 0)):
                print(e if isinstance(e, Stopped) else "stopped", file=sys.stderr)
        (os._exit if code == CLOSED else sys.exit)(code)
    finally:
        signal.signal(signal.SIGINT, outside)
