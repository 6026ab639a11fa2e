"""plumbing/stop.py: Ctrl-C and SIGTERM, from the first second of a command to its last.

The standard library alone: train.py, eval.py and data.py import it before the libraries that take seconds to
load.
"""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import shlex
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Callable, Iterator

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}       # exit codes, as a shell reports these signals
CLOSED = 141                                            # and of SIGPIPE: nobody reads what is printed


def end_at_once() -> None:
    """Before a command begins and after its end, a signal ends the process at once: a line, no traceback."""
    def leave(number: int, frame) -> None:
        os.write(2, b"stopped\n")
        os._exit(CODES[number])

    for number in CODES:
        signal.signal(number, leave)


class Stopped(KeyboardInterrupt):
    """A run was stopped from outside: a sentence that says how to go on, and the exit code."""

    def __init__(self, sentence: str, code: int):
        super().__init__(sentence)
        self.code = code

    def __reduce__(self) -> tuple:                      # how another process hears of it
        return Stopped, (*self.args, self.code)


class Stop:
    """What a signal does to a run. On hold it waits: `asked` is then its number, and the loop stops itself.

    A second Ctrl-C, a second later, does not wait. (Some shells and tools pass the first one on twice.)
    """

    def __init__(self):
        self.asked, self.on_hold, self.time = 0, False, 0.0

    def __call__(self, number: int, frame) -> None:
        again = self.asked and number == signal.SIGINT and time.monotonic() - self.time > 1
        if not self.asked:
            self.asked, self.time = number, time.monotonic()
        if again or not self.on_hold:
            raise KeyboardInterrupt

    def hold(self) -> None:
        self.on_hold = True

    def release(self) -> None:
        """From here on a signal acts at once, and so does one that waits."""
        self.on_hold = False
        if self.asked:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stoppable(out: Path, own: str = "", after: str = "") -> Iterator[Stop]:
    """While it lasts, Ctrl-C, SIGTERM and a closed pipe stop the run in folder `out`: Stopped says how to go
    on with it.

    own, after: of a stage of a system, the commands that start it alone, and the next stage.
    """
    stop, earlier = Stop(), {}
    if threading.current_thread() is threading.main_thread():       # no other thread may set handlers
        earlier = {number: signal.signal(number, stop) for number in CODES}
    try:
        yield stop
    except BaseException as e:
        if not (stop.asked or isinstance(e, (KeyboardInterrupt, BrokenPipeError))):
            raise                       # asked: a library may have made another error of the interrupt
        hint = f"go on with: python train.py --resume {shlex.quote(str(out))}"
        if not (out / "state.safetensors").exists():
            hint = f"no state was saved yet, so start it again{own and f': {own}'}"
        hint += after and f"; then: {after}"
        code = CLOSED if isinstance(e, BrokenPipeError) else CODES[stop.asked or signal.SIGINT]
        raise Stopped(f"stopped; {hint}", code) from None
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def process_pool(jobs: int) -> Iterator[Callable]:
    """A map(function, *columns) whose calls run in `jobs` processes; they end with the block.

    An error in the block ends them at once, Ctrl-C among them, and so does the end of this process, whatever
    ends it. A process that is ended from outside is a BrokenProcessPool.
    """
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), end_with_parent)

    def spread(function: Callable, *columns) -> Iterator:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:                            # the processes begin here, and Ctrl-C never reaches them: it is ours
            futures = [pool.submit(until_interrupted, function, *row) for row in zip(*columns)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return (future.result() for future in futures)
    try:
        yield spread
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()              # calls that wait are not cancelled: of one that is and then loses
        raise                           # its process, Python 3.11 prints a traceback
    finally:
        pool.shutdown()


def end_with_parent() -> None:
    """From here on this process ends when the one that began it has ended."""
    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def until_interrupted(function: Callable, *row):
    """function(*row), in a process that ends if it is interrupted: a pool would begin the next call in it."""
    try:
        return function(*row)
    except KeyboardInterrupt:
        os._exit(CODES[signal.SIGTERM])
