"""plumbing/folder.py: a run folder has one owner, and a new run begins in a clean one."""
from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Iterator

from support.formats.files import UserError, read_json
from support.plumbing.log import BOARD

STATE = "state.safetensors"
# what a run writes beside config.json and the towers that it trained; the state goes first
PRODUCTS = (STATE, "bridge.safetensors", "stage1.safetensors", "log.jsonl", "loss.png", "gates.png",
            "samples.html", "retrieval.json", "preferences.json", "pictures.safetensors", "naming.json",
            "words.json", "words.png", "model.safetensors", "first.png", "results.json", "pictures.json",
            "pictures.png")

UNFINISHED = re.compile(r"\.[\w-]+\.(safetensors|jsonl?|png|html)\.\w{8}")      # of formats.files.atomically

LOCKS: set[int] = set()                                 # file descriptors of the folders that are ours


def close_locks() -> None:
    for lock in LOCKS:
        os.close(lock)


os.register_at_fork(after_in_child=close_locks)         # a reader process must not outlive its run as owner


@contextlib.contextmanager
def owned(out: Path) -> Iterator[None]:
    """While it lasts, no other run can begin or go on in `out`. The lock ends with the process, even killed.

    Of several processes of a run (torchrun) the first one owns the folder.
    """
    if int(os.environ.get("RANK", 0)):
        yield
        return
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
    except OSError as e:
        raise UserError(f"{out}: cannot be a run folder ({e.strerror}); give --out another.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{out}: another run is using this folder; stop it, wait for its end, or give --out "
                        "another.") from None
    except OSError as e:                                # some network file systems
        print(f"warning: {out} cannot be locked ({e.strerror}); begin no second run there", file=sys.stderr)
    LOCKS.add(lock)
    try:
        yield
    finally:
        if new:
            with contextlib.suppress(OSError):          # not empty: the run began
                out.rmdir()
        LOCKS.discard(lock)
        os.close(lock)


def clean_folder(out: Path, recipes: dict, sources: tuple[str, ...]) -> None:
    """Remove what an earlier run left in `out`, its state first, so that nobody goes on with it.

    recipes: name → a recipe, whose `trained` parts a run writes. sources: files and folders that the new run
    reads; they may not lie in `out`. What another program may have left there is a UserError.
    """
    for source in sources:
        if source and Path(source).exists() and Path(source).resolve().is_relative_to(out.resolve()):
            raise UserError(f"{source}: lies in the run folder {out}, which is cleaned before a new run; "
                            "give --out another.")
    towers: set[str] = set()
    if (out / "config.json").exists():
        settings = read_json(out / "config.json").get("settings")
        if not isinstance(settings, dict):
            raise UserError(f"{out}/config.json: is not a run's, and a run would replace it; "
                            "give --out another folder.")
        recipe = recipes.get(str(settings.get("recipe")))
        towers = {*recipe.trained} if recipe and not recipe.one_file else set()
        towers |= {"clip"} if "text" in towers else set()
        towers |= {"vit"} if settings.get("vit") == "random" else set()
    elif foreign := next((name for name in (*PRODUCTS, BOARD) if (out / name).exists()), None):
        raise UserError(f"{out / foreign}: is not a run's, for there is no config.json beside it, and a run "
                        "would replace it; give --out another folder.")
    try:
        for name in PRODUCTS:
            (out / name).unlink(missing_ok=True)
        for name in towers & {"vit", "decoder", "clip"}:
            shutil.rmtree(out / name, ignore_errors=True)
        for events in (out / BOARD).glob("events.out.tfevents.*"):
            events.unlink(missing_ok=True)
        remove_unfinished(out)
    except OSError as e:
        raise UserError(f"{e.filename}: an earlier run's file cannot be removed ({e.strerror}).") from None


def remove_unfinished(out: Path) -> None:
    """What writes that were killed have left."""
    for folder in (out, out / "vit", out / "decoder", out / "clip"):
        for rest in folder.glob(".*/"):
            if UNFINISHED.fullmatch(rest.name):
                shutil.rmtree(rest)
