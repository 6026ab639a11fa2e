"""lab/unread.py: what tells that nobody would read a flag of eval.py: it is refused (plumbing/start.py)."""
from __future__ import annotations

import argparse
from pathlib import Path

from support.formats.files import read_json
from support.formats.hub import fetch, is_hub_name
from support.worlds.trained import specs_of


def given_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> set[str]:
    """The names of the flags that have another value than their default."""
    return {name for name, value in vars(args).items() if value != parser.get_default(name)}


def trained_on(run: str) -> list[str]:
    """The specs of the data sets that a run was trained on; [""] where no config.json says any."""
    file = (fetch(run) if is_hub_name(run) else Path(run)) / "config.json"
    settings = read_json(file).get("settings") if file.exists() else None
    data = settings.get("data") if isinstance(settings, dict) else None
    return specs_of(data if isinstance(data, str) else "")
