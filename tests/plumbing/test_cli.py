"""Flags come from a dataclass: groups, choices and limits are its fields' own; what is wrong is named in a
sentence."""
from __future__ import annotations

import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from model import DecoderConfig
from papers import make_bridge
from support.formats.files import UserError
from support.plumbing import device
from support.plumbing.cli import (check_settings, make_parser, parse_flags, parse_options, parse_weighted,
                                  mistake, run_cli, setting)
from support.plumbing.device import cpu_dtype, frozen_dtype, keep_freed_memory, pick_device, pick_dtype
from support.plumbing.stop import Stopped
from train import Settings


@dataclass
class Flags:
    kind: str = setting("plain", "which one", "what", choices=("plain", "fancy"))
    words: list = setting([], "some words", nargs="+", action="extend")
    share: float = setting(None, "100 % is all", "how much", above=0, most=100)
    rounds: int = setting(3, "how often", least=1)
    loud: bool = setting(False, "with noise")


def flags(*argv: str) -> Flags:
    parsed = Flags(**vars(parse_flags(make_parser(Flags, "a test"), list(argv))))
    check_settings(parsed)
    return parsed


def test_every_field_is_a_flag_of_its_type():
    assert flags() == Flags()
    given = flags("--kind", "fancy", "--words", "a", "b", "--words", "c", "--share", "0.5", "--rounds", "2",
                  "--loud")
    assert given == Flags("fancy", ["a", "b", "c"], 0.5, 2, True)
    assert not flags("--loud", "--no-loud").loud


def test_help_has_groups_choices_and_defaults_and_fits_the_page():
    text = make_parser(Flags, "a test").format_help()
    assert text.index("what:") < text.index("--kind") < text.index("how much:") < text.index("--share")
    assert "which one: plain, fancy (default: plain)" in text and "100 % is all" in text
    assert "--no-loud" not in text and all(len(line) <= 110 for line in text.splitlines())


@pytest.mark.parametrize("argv, words", [
    (["--kind", "plian"], 'unknown kind "plian"; did you mean "plain"'),
    (["--rounds", "0"], "--rounds is 0, not a whole number of at least 1"),
    (["--rounds", str(10**400)], "not a whole number"),
    *[(["--share", wrong], "--share is") for wrong in ("nan", "inf", "0", "-1", "101", "1e400")],
    (["--rounds", "many"], "--rounds"), (["--round", "2"],
                                         'unknown argument "--round"; did you mean "--rounds"'),
], ids=" ".join)
def test_a_wrong_flag_is_named(argv, words):
    with pytest.raises(UserError) as e:
        flags(*argv)
    assert words in str(e.value)


@pytest.mark.parametrize("field, value", [
    ("rounds", "3"), ("rounds", 1.5), ("rounds", True), ("rounds", None), ("rounds", [3]), ("share", None),
    ("share", "all"), ("share", math.nan), ("share", 10**400), ("kind", 1), ("kind", None), ("words", "a"),
    ("words", [1]), ("words", {}), ("loud", 1), ("loud", "yes")])
def test_the_settings_of_a_resumed_run_have_types_and_bounds_too(field, value):
    check_settings(Flags(share=1.0), "config.json: settings.{}".format)
    with pytest.raises(UserError, match=rf"config.json: settings.{field}(\[0\])? is "):
        check_settings(replace(Flags(share=1.0), **{field: value}), "config.json: settings.{}".format)


def test_every_number_that_is_a_setting_has_bounds():
    for f in fields(Settings):
        bounds = {k for k, v in f.metadata["bounds"].items() if v is not None}
        assert f.type not in ("int", "float") or bounds & {"least", "above"}, f.name


@pytest.mark.parametrize("value", ["cuda:9", "mps", "gpu", "", "cuda:-1", "CPU", "cpu:0"])
def test_a_device_that_is_not_there_is_named(value, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f'--device "{value}": there is no such device here; known: auto'):
        pick_device(value)


def test_options_are_json_or_text():
    assert parse_options(["a=1", "b=true", "c=True", "d=random", "e=[1, 2]"]) == {
        "a": 1, "b": True, "c": True, "d": "random", "e": [1, 2]}
    with pytest.raises(UserError, match="write name=value"):
        parse_options(["width"])


@pytest.mark.parametrize("option", [
    "width=abc", "width=1.5", "width=0", "width=-1", "width=1e400", "width=NaN", "width=true", "width=null",
    "width=[16]", "width=99999999999", "layers=-1", "layers=100000", "constants=", "hidden=-4", "reads=1.5",
    "reads=abc", "reads_cls=3"])
def test_an_option_has_a_type_and_bounds(option):
    name, _, _ = option.partition("=")
    with pytest.raises(ValueError, match=f"mapl's option {name} is .*, not "):
        make_bridge("mapl", DecoderConfig(), 20, **parse_options([option]))


def test_data_sets_have_weights():
    assert parse_weighted("shapes") == [("shapes", 1.0)]
    assert parse_weighted("coco:DIR + interleaved:DIR * 0.2") == [("coco:DIR", 1.0), ("interleaved:DIR", 0.2)]
    with pytest.raises(UserError, match='the weight "two" is no number'):
        parse_weighted("shapes + shapes * two")
    for wrong in ("nan", "inf", "-1", "0", "1e400"):
        with pytest.raises(UserError, match="the weight of shapes is .*, not a number above 0"):
            parse_weighted(f"emoji + shapes * {wrong}")


def test_a_mistake_exits_with_2_and_a_bug_shows_its_traceback(capsys):
    def mistake():
        raise UserError("no such file.")

    def number():
        DecoderConfig(width=30, heads=4, kv_heads=3)    # the math refuses this number

    def bug():
        raise ValueError("a library's")

    for wrong in (mistake, number):
        with pytest.raises(SystemExit) as e:
            run_cli(wrong)
        assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="a library's"):
        run_cli(bug)


@pytest.mark.parametrize("cpuinfo, dtype, reason", [
    ("GenuineIntel avx512_bf16 amx_bf16", torch.bfloat16, "2x faster"),
    ("AuthenticAMD avx512_bf16", torch.bfloat16, "2x faster"),
    ("GenuineIntel avx512_bf16", torch.float32, "float32 is faster"),
    ("AuthenticAMD avx512f", torch.float32, "no bfloat16"), ("", torch.float32, "no bfloat16")])
def test_bfloat16_is_taken_where_it_is_faster(cpuinfo, dtype, reason):
    assert cpu_dtype(cpuinfo)[0] == dtype and reason in cpu_dtype(cpuinfo)[1]


FREED = """
import resource, torch
from support.plumbing.cli import run_cli
def main():
    torch.ones(10**7).sum()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(10**7)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
run_cli(main)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no mallopt")
def test_a_command_keeps_the_memory_that_its_tensors_free():
    """20 tensors of 40 MB, one after the other, are 195,000 pages of 4 KB where each is mapped anew."""
    said = subprocess.run([sys.executable, "-c", FREED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(said.stdout) < 2 * 10**4


@pytest.mark.parametrize("platform, library", [("darwin", object()), ("linux", object())])
def test_where_there_is_no_mallopt_freed_memory_goes_back(platform, library, monkeypatch):
    monkeypatch.setattr(device.sys, "platform", platform)
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: library)
    assert not keep_freed_memory()


def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch):
    """A T4 and a V100 do: PyTorch counts that as support unless it is asked not to."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert pick_dtype("auto", torch.device("cuda")) == (torch.float32, "this GPU has no bfloat16")


def test_full_memory_names_the_flags_of_training_and_those_of_asking():
    """ask and chat have no --batch."""
    sentence = mistake(torch.OutOfMemoryError("CUDA out of memory"))
    training, asking = sentence.split(", and ")
    assert all(f in training for f in ("train.py", "--batch", "--longest", "--accumulate"))
    assert all(f in asking for f in ("eval.py ask", "chat", "--dtype bfloat16"))


def test_apples_gpu_is_taken_and_said_to_be_untested(monkeypatch, capsys):
    with pytest.raises(UserError, match="no such device"):
        pick_device("mps")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert pick_device("auto").type in ("cpu", "cuda") and capsys.readouterr().err == ""
    assert pick_device("mps") == torch.device("mps") and "never tried" in capsys.readouterr().err
    assert pick_dtype("auto", torch.device("mps"))[0] == torch.float32
    assert "mps" in pick_dtype("auto", torch.device("mps"))[1]
    assert frozen_dtype("auto", torch.float32, torch.device("mps")) == torch.float32


def test_a_stopped_run_tells_another_process_why():
    told = pickle.loads(pickle.dumps(Stopped("stopped; go on", 143)))
    assert isinstance(told, Stopped) and (str(told), told.code) == ("stopped; go on", 143)


# Calls of a minute; where a process of the pool is ended from outside, the command says "broken".
SLEEPERS = """
import os, sys, time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from support.plumbing.stop import end_at_once, process_pool, stoppable
FOLDER = Path(sys.argv[1])

def sleep(n):
    (FOLDER / f"{n}-{os.getpid()}").touch()
    with stoppable(FOLDER):
        time.sleep(60)

if __name__ == "__main__":
    end_at_once()
    try:
        with process_pool(2) as spread:
            list(spread(sleep, range(6)))
    except BrokenProcessPool:
        print("broken")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("to, said", [("command", ""), ("call", "broken\n")])
def test_no_call_of_a_pool_goes_on_or_begins_once_something_has_ended(to, said, number, tmp_path):
    (file := tmp_path / "sleepers.py").write_text(SLEEPERS)
    (begun := tmp_path / "begun").mkdir()
    process = subprocess.Popen([sys.executable, file, begun], cwd=Path(__file__).parents[2], text=True,
                               stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": "."})
    while len(names := os.listdir(begun)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    calls = [int(name.split("-")[1]) for name in names]
    os.kill(process.pid if to == "command" else calls[0], number)
    assert process.communicate(timeout=20)[0] == said   # a call holds the pipe: all have ended
    assert sorted(os.listdir(begun)) == sorted(names)


@pytest.mark.parametrize("command", ["data.py", "eval.py", "train.py"])
def test_ctrl_c_while_a_command_loads_its_libraries_is_a_word(command, tmp_path):
    loading = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
    (tmp_path / "numpy.py").write_text(loading)
    done = subprocess.run([sys.executable, command], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (130, "stopped\n")


COMMAND = """
import sys
from pathlib import Path
from support.plumbing.cli import run_cli
from support.plumbing.stop import stoppable

def main():
    with stoppable(Path(sys.argv[1])):
        for n in range(2):
            print(*sys.stdin, "a line")

run_cli(main)
"""


def run_command(out, **streams) -> tuple[int, str]:
    command = [sys.executable, "-c", COMMAND, str(out)]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60, **streams)
    return done.returncode, done.stderr


def test_a_run_whose_reader_has_gone_says_how_to_go_on(tmp_path):
    read, write = os.pipe()
    os.close(read)
    code, said = run_command(tmp_path / "run", stdout=write, stdin=subprocess.DEVNULL)
    assert code == 141 and said == "stopped; no state was saved yet, so start it again\n"
    (tmp_path / "state.safetensors").touch()
    code, said = run_command(tmp_path, stdout=write, stdin=subprocess.DEVNULL)
    assert code == 141 and said == f"stopped; go on with: python train.py --resume {tmp_path}\n"


def test_a_stream_that_was_closed_is_an_empty_one(tmp_path):
    def close():
        os.close(0)
        os.close(1)
    assert run_command(tmp_path, preexec_fn=close) == (0, "")


def test_an_argument_that_cannot_be_printed_is_a_sentence(monkeypatch, capsys):
    """The bytes of a name in Latin-1 reach Python as halves of surrogate pairs."""
    monkeypatch.setattr("sys.argv", ["data.py", "folder:caf\udce9"])
    with pytest.raises(SystemExit) as e:
        run_cli(lambda: None)
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.count("\n") == 1 and r"folder:caf\udce9: " in said and "UTF-8" in said
