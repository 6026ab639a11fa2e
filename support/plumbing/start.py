"""plumbing/start.py: what a command line asks of train.py: a new run, an old one to go on, none."""
from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from pathlib import Path
from typing import Iterator

from support.formats.files import RUN, UserError, read_json
from support.plumbing.cli import check_settings, flag_name, make_parser, parse_flags
from support.plumbing.digest import text_digest
from support.plumbing.log import require_tensorboard

# what may change when a run goes on: where it computes and what it says, not what it computes
RESUME_READS = ("device", "threads", "workers", "offline", "tensorboard")


def read_command(kind: type, description: str, argv: list[str] | None) -> tuple[str, object, set[str]]:
    """(mode, settings of that kind, the names of what was given); mode: train | resume | curves | list.

    resume and curves give the settings that the run began with, `out` its folder.
    """
    parser = make_parser(kind, description)
    group = parser.add_argument_group("instead of training anew")
    takes = ", ".join(map(flag_name, RESUME_READS))
    group.add_argument("--resume", metavar="RUN", help=f"go on with this run as it began; {takes} may differ")
    group.add_argument("--curves", metavar="RUN", help="draw loss.png and gates.png of this run from its log")
    group.add_argument("--list", action="store_true", help="print the recipes")
    args = vars(parse_flags(parser, argv))
    nothing = argparse.Namespace(**dict.fromkeys(args))             # None is no flag's value
    given = {name: value for name, value in vars(parser.parse_known_args(argv, nothing)[0]).items()
             if value is not None}
    modes = {name: args.pop(name) for name in ("resume", "curves", "list")}
    mode = next((name for name in modes if name in given), "train")
    if mode != "train":
        reads = RESUME_READS if mode == "resume" else ()
        refuse_unread(set(given) - {mode}, set(given) - {mode, *reads}, f"--{mode}", reads)
    if mode in ("resume", "curves"):
        run = Path(modes[mode])
        saved = read_json(run / "config.json", RUN).object("settings")
        saved.text("recipe")
        settings = kind(**{**{k: v for k, v in saved.items() if k in args}, "out": str(run)})
    else:
        settings = kind(**args)
    if mode == "resume":                # a flag may have left since; all others have their values
        check_settings(settings, f"{run}/config.json: settings.{{}}".format)
        settings = dataclasses.replace(settings, **{n: given[n] for n in RESUME_READS if n in given})
    if mode in ("train", "resume"):
        check_settings(settings)
        if settings.tensorboard:
            require_tensorboard()
    return mode, settings, set(given)


def fill_settings(s, name: str, recipes: dict):
    """The settings with everything that the command line left open taken from the recipe `name`."""
    r, system = recipes[name], s.recipe != name
    if s.bridge and r.task == r.bridge != s.bridge:
        raise UserError(f"--bridge {s.bridge}: recipe {name} has a loss of its own, for the bridge "
                        f"{r.bridge} alone; leave one of the two out.")
    own = recipes[s.bridge].task if s.bridge in recipes else "answer"
    if own == s.bridge and own != r.task and not r.start:       # DPO, say, goes on from a run of any bridge
        raise UserError(f"--bridge {s.bridge}: it learns by a loss of its own, of recipe {s.bridge}, which "
                        f"recipe {name} does not have; leave one of the two out.")
    if s.scale == "paper" and not r.paper:
        raise UserError(f"--scale paper: no paper has numbers for recipe {name}; leave it out.")
    filled = dataclasses.asdict(r.numbers(s.scale))
    filled |= {key: getattr(r, key) for key in ("captions", "turns", "template", "form")}
    filled |= {"data": r.toy_data}
    filled = {k: v for k, v in filled.items() if hasattr(s, k) and getattr(s, k) is None}
    s = dataclasses.replace(s, recipe=name, bridge=s.bridge or r.bridge, **filled)
    if s.batch is None:
        raise UserError(f"the paper's batch of {name} is not in our sources; "
                        "give --batch beside --scale paper.")
    if 1 <= s.warmup > s.steps:
        raise UserError(f"the warm-up of {s.warmup:g} steps is longer than the run's {s.steps}, which would "
                        "never reach its learning rate; give --warmup a share, 0.03 say, or more --steps.")

    def folder(recipe: str) -> str:
        return f"{s.out}/{recipe}" if s.out and system else f"out/{recipe}-{re.split('[: ]', s.data)[0]}"

    first = s.bridge if r.start == r.bridge else r.start    # DPO of another bridge starts from its own run
    start, out = folder(first), s.out if s.out and not system else folder(name)
    if r.start and not s.init:
        if not Path(start).is_dir():
            raise UserError(f"recipe {name} starts from a run of {first}, and there is none at {start}; "
                            "train that first, give --init RUN, or --init none to start fresh.")
        s.init = start
    return dataclasses.replace(s, out=out, init="" if s.init == "none" else s.init)


def stages(asked, command: str, recipes: dict, systems: dict) -> Iterator[tuple[object, str, str]]:
    """The settings of each stage of a system, the command of this stage alone, and that of the next one.

    Each starts from the run of the one before, the first from --init. A recipe is one stage without such
    commands; command: the flags that were given.
    """
    names, own = systems.get(asked.recipe, (asked.recipe,)), ""
    for name, later in zip(names, (*names[1:], "")):
        s, after = fill_settings(asked, name, recipes), ""
        if later:
            flags = re.sub(rf"(?<=--recipe[ =]){re.escape(asked.recipe)}(?!\S)", later, command)
            out = f" --out {shlex.quote(f'{asked.out}/{later}')}" if asked.out else ""
            after = f"python train.py {flags} --init {shlex.quote(s.out)}{out}"
        yield s, own, after
        asked, own = dataclasses.replace(asked, init=s.out), after


def settings_digest(s) -> str:
    """Of the settings that must stay as they are when a run goes on, where they are not at their defaults."""
    defaults = vars(type(s)())
    facts = {name: value for name, value in dataclasses.asdict(s).items() if value != defaults[name]}
    return text_digest({name: facts[name] for name in facts.keys() - {"out", *RESUME_READS}})


def read_by_none(recipes: list) -> set[str]:
    """The settings that no stage reads; --init is the first one's, the others go on from the one before."""
    return set.intersection(*(r.unread for r in recipes)) | recipes[0].unread & {"init"}


def refuse_unread(given: set[str], unread: set[str], who: str, reads: tuple[str, ...] = ()) -> None:
    """A UserError for a flag that was given and that nobody will read."""
    flags = sorted(flag_name(name) for name in given & unread)
    if flags:
        but = f" (it reads {', '.join(map(flag_name, reads))})" if reads else ""
        raise UserError(f"{who} does not read {', '.join(flags)}{but}; leave out what it does not read.")
