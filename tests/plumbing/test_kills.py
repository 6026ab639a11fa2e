"""A run that is killed at any moment, in a step, in a save, while it resumes, goes on to the same bits."""
from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# dropout, so that the random state counts; a mean of the parameters; a state at every second step
RUN = ["--bridge", "qformer", "--steps", "10", "--batch", "2", "--save-every", "2", "--ema", "0.9",
       "--option", "dropout=0.1", "width=32", "hidden=32", "--optimizer", "adamw", "--dtype", "float32",
       "--threads", "1", "--log-every", "1", "--eval-items", "1", "--samples", "0"]

# One process imports the program and forks for each start, because imports take longer than such a run.
KILLER = """
import json, os, random, re, signal, sys, time
from pathlib import Path
import torch._dynamo, train
from safetensors import safe_open
from support.plumbing.cli import run_cli
from support.plumbing.log import read_log
from support.plumbing.stop import end_at_once

train.draw_curves = lambda *a, **kw: None               # takes longer than the run
folder, jobs, run = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
draw, loading, counts = random.Random(0), [0.5], dict(step=0, save=0, resume=0, SIGKILL=0, SIGTERM=0)

def start(out, output):
    '''A process that begins the run, or goes on with it where it has a state.'''
    output.unlink(missing_ok=True)
    argv = ["--resume", str(out)] if (out / "state.safetensors").exists() else [*run, "--out", str(out)]
    pid = os.fork()
    if pid:
        return pid, argv[0] == "--resume"
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    code = 0
    try:
        run_cli(lambda: train.main(argv))
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)

def steps(out):
    return [x["step"] for x in read_log(out / "log.jsonl")]

def moment(kind, out, pid, resumed):
    '''Wait for a moment of this kind; the kind that it was, "" if the run ended before.'''
    state, log = out / "state.safetensors", out / "log.jsonl"
    if resumed:                                         # so many lines stay, in a file that is written anew
        with safe_open(state, "pt") as f:
            kept = sum(step <= int(f.metadata()["step"]) for step in steps(out))
        old = log.stat().st_ino
    begun, progress = time.monotonic(), 0.0             # when the run began; when it logged a new step
    wait = draw.uniform(0, loading[-1] if kind == "resume" else 0.5)
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)
        now, old_log = time.monotonic(), resumed and log.stat().st_ino == old
        if not progress and not old_log and len(steps(out)) > (kept if resumed else 0):
            progress = now
            loading.append(now - begun)
        if kind == "save" and any(p.startswith(".state.") for p in (os.listdir(out) if out.exists() else ())):
            return "save"
        if kind == "step" and progress and now > progress + wait:
            return "step"
        if kind == "resume" and state.exists() and now > begun + wait:
            return "resume" if resumed and not progress else "step"
    return ""

def finish(out, text):
    pid, _ = start(out, text)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, text.read_text()

end_at_once()                                           # as the command does while it loads
finish(folder / "unbroken", folder / "unbroken.txt")
n, number = 0, 0
while n < len(jobs):
    out, text = folder / f"run{number}", folder / f"run{number}.txt"
    number += 1
    while n < len(jobs):
        kind, name = jobs[n]
        pid, resumed = start(out, text)
        found = moment(kind, out, pid, resumed)
        if found:
            os.kill(pid, signal.Signals[name])
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            break
        says = text.read_text() if text.exists() else ""
        if name == "SIGKILL":
            assert code == -9, (code, says)
        else:
            assert code == 143 and "Traceback" not in says, (code, says)
            hints = (f"--resume {out}\\n", "no state was saved yet", "stopped\\n")
            assert not says or any(hint in says for hint in hints), says       # "": before it had this file
        counts[found] += 1
        counts[name] += 1
        n += 1
    finish(out, text)
print(json.dumps([number, counts]))
"""
MEASURED = ("seconds", "tokens_per_s", "learned_per_s", "images_per_s", "tflop_per_s")


def log(out: Path) -> list[dict]:
    """The lines of log.jsonl without what is measured in seconds."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def kill_and_compare(folder: Path, jobs: list[tuple[str, str]]) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-c", KILLER, folder, json.dumps(jobs), json.dumps(RUN)], cwd=ROOT,
                          capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    runs, counts = json.loads(done.stdout.splitlines()[-1])
    print(runs, "runs", counts)
    unbroken = folder / "unbroken"
    names = sorted(p.name for p in unbroken.iterdir())
    for n in range(runs):
        out = folder / f"run{n}"
        assert sorted(p.name for p in out.iterdir()) == names       # nothing is left of a killed save
        assert log(out) == log(unbroken)
        for name in ("bridge.safetensors", "state.safetensors", "results.json", "samples.html", "first.png"):
            mine = (out / name).read_bytes().replace(out.name.encode(), b"unbroken")        # the page's title
            assert mine == (unbroken / name).read_bytes(), name
    return counts


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    kinds, names = ["save", "resume", "step"], [signal.SIGKILL.name, signal.SIGTERM.name]
    counts = kill_and_compare(tmp_path, [(kinds[n % 3], names[n // 3 % 2]) for n in range(52)])
    assert counts["save"] >= 10 and counts["resume"] >= 5 and counts["SIGKILL"] + counts["SIGTERM"] >= 50
