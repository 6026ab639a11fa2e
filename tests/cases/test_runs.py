"""Runs that people start, stop and start again: one owner of a folder, a clean beginning, a cache for two, a
full disk, a loss that is no number, flags that nobody reads, a broken item in a reader process, signals."""
from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import train
from support.formats.files import UserError, atomically
from support.plumbing.cli import run_cli
from support.plumbing.folder import PRODUCTS, owned
from support.plumbing.log import read_log
from support.plumbing.ranks import Ranks
from support.plumbing.stop import Stopped

ROOT = Path(__file__).parents[2]
QUICK = "--threads 1 --dtype float32 --device cpu --eval-items 2 --samples 0 --log-every 1 --batch 2".split()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Training is tried here, not what is measured and drawn after it."""
    monkeypatch.setattr(train, "draw_curves", lambda *a, **kw: [])
    monkeypatch.setattr(train.AnswerTask, "report", lambda self, out: {"results.json": {}})
    monkeypatch.setattr(train.AnswerTask, "flops_per_position", lambda self: 0.0)


def picture(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (48, 48)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def spec(tmp_path) -> str:
    """A dozen pictures with captions, in a folder of their own."""
    folder = tmp_path / "d"
    for i in range(12):
        picture(folder / f"{i}.png", (12 * i, 10, 200 - 9 * i))
    rows = [{"image": f"{i}.png", "text": f"thing {i}"} for i in range(12)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"folder:{folder}"


def run(spec: str, out: Path, *flags) -> torch.nn.Module:
    return train.main(["--bridge", "linear", "--data", spec, "--out", str(out), *QUICK, *map(str, flags)])


def losses(out: Path) -> dict[int, float]:
    return {x["step"]: x["loss"] for x in read_log(out / "log.jsonl") if "loss" in x}


def state_of(out: Path) -> tuple[int, dict[str, torch.Tensor]]:
    with safe_open(out / "state.safetensors", "pt") as f:
        return int(f.metadata()["step"]), {name: f.get_tensor(name) for name in f.keys()}


def at_progress(monkeypatch, share: float, action) -> None:
    """Call `action` before the step at this share of the run."""
    real = train.schedule

    def schedule(progress: float, *rest) -> float:
        if progress >= share:
            action()
        return real(progress, *rest)

    monkeypatch.setattr(train, "schedule", schedule)


class Killed(Exception):
    """Stands for a kill: nothing of ours catches it."""


def kill() -> None:
    raise Killed


# one owner, a clean beginning

def test_a_second_run_in_the_folder_of_a_run_is_refused(spec, tmp_path, monkeypatch):
    out, said = tmp_path / "run", []

    def second() -> None:
        for argv in ([], ["--seed", "1"]):
            with pytest.raises(UserError, match="another run is using this folder") as e:
                run(spec, out, "--steps", 2, *argv)
            said.append(str(e.value))
        with pytest.raises(UserError, match="another run is using this folder"):
            train.main(["--resume", str(out)])

    at_progress(monkeypatch, 0.5, second)
    run(spec, out, "--steps", 2)
    assert said and list(losses(out)) == [1, 2]
    run(spec, out, "--steps", 1)                        # it is free again


def test_the_lock_of_a_killed_process_is_gone_though_its_readers_live_on(tmp_path):
    end, other_end = os.pipe()
    run = os.fork()
    if run == 0:
        with owned(tmp_path):
            reader = os.fork()
            if reader:
                os.write(other_end, str(reader).encode())
            time.sleep(60)
        os._exit(0)
    reader = int(os.read(end, 99))
    try:
        with pytest.raises(UserError, match="another run"), owned(tmp_path):
            pass
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
        with owned(tmp_path):                           # no error
            pass
    finally:
        os.kill(reader, signal.SIGKILL)


def test_nothing_is_left_of_a_write_that_breaks_off_not_even_what_a_library_put_beside_it(tmp_path):
    (tmp_path / "state.safetensors").write_bytes(b"old")
    with pytest.raises(Killed), atomically(tmp_path / "state.safetensors") as tmp:
        tmp.with_name(".tmpABCDEF").write_bytes(b"half")
        raise Killed
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("state.safetensors", b"old")]


def test_a_new_run_in_a_used_folder_leaves_nothing_to_go_on_from(spec, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(spec, out, "--steps", 3)
    for name in (".state.safetensors.abcdefgh/.tmpABCDEF", "decoder/model.safetensors"):
        # what a killed save leaves, a temporary file of the library's in it; and what is not the run's own
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"x")
    with monkeypatch.context() as m, pytest.raises(Killed):
        at_progress(m, 0.5, kill)
        run(spec, out, "--steps", 4, "--seed", 7, "--save-every", 100)
    assert state_of(out)[0] == 0                        # the second run's own, before its first update
    left = {"config.json", "log.jsonl", "state.safetensors", "first.png", "decoder"}
    assert {p.name for p in out.iterdir()} == left
    train.main(["--resume", str(out)])
    run(spec, tmp_path / "fresh", "--steps", 4, "--seed", 7, "--save-every", 100)
    assert losses(out) == losses(tmp_path / "fresh")


def test_a_tower_that_an_earlier_run_trained_is_gone_and_a_foreign_folder_is_left_alone(spec, tmp_path):
    out = tmp_path / "run"
    run(spec, out, "--steps", 1, "--recipe", "llava-2", "--init", "none")
    assert (out / "decoder/model.safetensors").exists()
    with pytest.raises(UserError, match="lies in the run folder .* give --out another"):
        run(spec, out, "--steps", 1, "--init", out)
    assert (out / "decoder/model.safetensors").exists()
    run(spec, out, "--steps", 1)
    assert not (out / "decoder").exists()
    foreign = tmp_path / "model"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="model/config.json: is not a run's"):
        run(spec, foreign, "--steps", 1)
    assert (foreign / "config.json").read_text() == '{"model_type": "llama"}'


@pytest.mark.parametrize("name", [*PRODUCTS, "tensorboard/events.out.tfevents.1"])
def test_a_file_that_no_run_has_written_is_never_removed(name, spec, tmp_path):
    out = tmp_path / "mine"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_bytes(b"mine")
    with pytest.raises(UserError, match=f"mine/{name.split('/')[0]}: is not a run's, .*give --out another"):
        run(spec, out, "--steps", 1)
    assert (out / name).read_bytes() == b"mine"


def test_a_run_does_not_begin_in_the_folder_of_its_data(spec, tmp_path):
    folder = Path(spec.partition(":")[2])
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match="d: lies in the run folder .*give --out another"):
        run(spec, folder, "--steps", 1)
    assert sorted(folder.iterdir()) == before


def test_a_batch_that_does_not_divide_among_its_data_sets_says_what_it_is(spec, tmp_path, capsys):
    with pytest.raises(UserError, match="--batch 1 has no item for each of 2 data sets and"):
        run(f"{spec} + shapes", tmp_path / "a", "--batch", 1)
    run(f"{spec} + shapes", tmp_path / "b", "--batch", 3, "--steps", 1)
    assert "--batch 3 is 1 items of each of the 2 data sets, 2 in all" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["decoder=8", "name=x", "vision_width=3"])
def test_an_option_that_a_bridge_does_not_have_is_one_sentence(option, tmp_path):
    with pytest.raises(UserError, match=f'linear has no option "{option.partition("=")[0]}"'):
        run("shapes", tmp_path / "run", "--option", option)


def test_a_mistake_leaves_no_folder_behind(spec, tmp_path):
    with pytest.raises(UserError):
        run(spec, tmp_path / "run", "--lm", "no/such/folder")
    assert not (tmp_path / "run").exists()


# going on

@pytest.mark.parametrize("flags", [["--steps", "5"], ["--lr", "0.1"], ["--data", "shapes"], ["--no-pack"],
                                   ["--option", "a=1"], ["--curves", "x"], ["--list"], ["--steps", "2"]],
                         ids=" ".join)
def test_flags_beside_resume_are_refused(flags, tmp_path):
    with pytest.raises(UserError, match="--resume does not read .*--threads.*leave out") as e:
        train.main(["--resume", str(tmp_path), *flags])
    assert flags[0].replace("--no-", "--") in str(e.value)


def test_a_run_goes_on_with_other_threads_and_readers(spec, tmp_path, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(Killed):
        at_progress(m, 0.5, kill)
        run(spec, tmp_path / "a", "--steps", 4, "--save-every", 2)
    train.main(["--resume", str(tmp_path / "a"), "--workers", "1", "--device", "cpu"])
    run(spec, tmp_path / "b", "--steps", 4, "--save-every", 2)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def change_config(out: Path, folder: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    config["settings"]["lr"] *= 2
    (out / "config.json").write_text(json.dumps(config))


def change_text(out: Path, folder: Path) -> None:
    file = folder / "captions.jsonl"
    file.write_text(file.read_text().replace("thing 3", "thing 33"))


def change_picture(out: Path, folder: Path) -> None:
    picture(folder / "3.png", (1, 2, 3), (60, 80))


def change_pixels(out: Path, folder: Path) -> None:
    """Another picture in a file of the same size."""
    file = folder / "3.png"
    before = file.stat().st_size
    for shade in range(256):
        picture(file, (shade, 77, 5), (48, 48))
        if file.stat().st_size == before:
            return
    raise AssertionError("no picture of that size")


def change_tokenizer(out: Path, folder: Path) -> None:
    file = out.parent / "lm/tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "add_prefix_space": True}))


def change_tower(out: Path, folder: Path) -> None:
    file = out.parent / "lm/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1                                    # a sign
    file.write_bytes(content)


@pytest.mark.parametrize("change, part", [(change_config, "settings"), (change_text, "data"),
                                          (change_picture, "data"), (change_pixels, "data"),
                                          (change_tokenizer, "data"), (change_tower, "weights")],
                         ids=lambda x: getattr(x, "__name__", x))
def test_a_run_goes_on_only_with_its_own_settings_data_and_weights(change, part, spec, tmp_path):
    out, lm = tmp_path / "run", tmp_path / "lm"
    lm.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (lm / name).write_bytes((ROOT / "weights/decoder" / name).read_bytes())
    run(spec, out, "--steps", 1, "--lm", lm)
    before = (out / "state.safetensors").read_bytes()
    change(out, Path(spec.partition(":")[2]))
    with pytest.raises(UserError, match=f"state.safetensors: .* had other {part}") as e:
        train.main(["--resume", str(out)])
    assert "\n" not in str(e.value) and (out / "state.safetensors").read_bytes() == before


@pytest.mark.parametrize("argv, words", [
    (["--recipe", "lm", "--cache", "c"], "--cache"),
    (["--recipe", "clip", "--option", "width=3"], "--option"), (["--recipe", "clip", "--pack"], "--pack"),
    (["--recipe", "lm", "--data", "emoji"], "--data"),
    (["--recipe", "blip2-1", "--form", "QCM-A"], "--form"),
    (["--recipe", "frozen", "--cache", "c"], "--cache"), (["--form", "QCM-A"], "--form"),
    (["--strict"], "--strict"), (["--data", "emoji + shapes-web", "--follow-links"], "--follow-links"),
    (["--data", "shapes-choices", "--captions", "1"], "--captions"), (["--template", "vicuna"], "--template"),
    (["--data", "shapes-web", "--turns", "2"], "--turns"), (["--list", "--bridge", "mlp"], "--bridge"),
    (["--bridge", "zero_init", "--option", "version=1", "depth=2"], "depth"),
    (["--bridge", "zero_init", "--option", "version=0", "width=64"], "width"),
    (["--recipe", "dalle", "--init", "out/vq"], "--init"),
    (["--recipe", "vq", "--check-every", "9"], "--check-every"),
    (["--recipe", "frozen-tuned", "--frozen", "bfloat16"], "--frozen"),
    (["--data", "shapes-pages", "--turns", "2"], "--turns"),
    (["--recipe", "adapter-1", "--turns", "2"], "--turns"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_flag_that_nobody_reads_is_refused(argv, words, tmp_path):
    with pytest.raises(UserError, match=f"does not read .*{words}"):
        train.main([*argv, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("argv, words", [
    (["--recipe", "cm3", "--scale", "paper"], "--scale paper: no paper has numbers for recipe cm3"),
    (["--recipe", "linear", "--bridge", "fromage"], "--bridge fromage: it learns by a loss of its own"),
    (["--recipe", "vilt", "--data", "shapes * 0.2"], "recipe vilt learns from one data set, without a"),
    (["--recipe", "simvlm", "--lm", "./weights/decoder"], "--lm ./weights/decoder: the words are"),
    (["--recipe", "clip", "--lm", "./weights/decoder"], "--lm ./weights/decoder: the words are"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_what_would_change_nothing_is_refused_by_name(argv, words, tmp_path):
    with pytest.raises(UserError, match=words):
        train.main([*argv, "--steps", "1", "--batch", "2", "--out", str(tmp_path / "run")])


def test_training_goes_on_with_the_towers_and_words_of_a_run_alone(spec, tmp_path):
    """The run's decoder has its own tokenizer, and the next run's decoder gets that one."""
    first, second = tmp_path / "first", tmp_path / "second"
    lm = tmp_path / "lm"
    lm.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (lm / name).write_bytes((ROOT / "weights/decoder" / name).read_bytes())
    words = (lm / "tokenizer.json").read_bytes() + b"\n"
    (lm / "tokenizer.json").write_bytes(words)
    start = ["--recipe", "llava-2", "--init"]
    run(spec, first, "--steps", 1, *start, "none", "--lm", lm)
    run(spec, second, "--steps", 1, *start, first)
    assert (second / "decoder" / "tokenizer.json").read_bytes() == words
    with pytest.raises(UserError, match="--lm .*lm: training goes on with the decoder of .*first; leave one"):
        run(spec, tmp_path / "third", "--steps", 1, *start, first, "--lm", lm)


def test_each_stage_starts_from_the_one_before_and_the_first_from_init(tmp_path):
    *_, (second, *_) = stages_of("--recipe", "llava", "--init", "out/x", "--out", str(tmp_path))
    first, *_ = next(stages_of("--recipe", "llava", "--init", "out/x", "--out", str(tmp_path)))
    assert (first.init, second.init) == ("out/x", f"{tmp_path}/llava-1")
    *_, (second, *_) = stages_of("--recipe", "llava", "--init", "none", "--out", str(tmp_path))
    assert second.init == f"{tmp_path}/llava-1"


# numbers that are none

@pytest.mark.parametrize("rate", [1e40, float("inf"), float("nan")])
def test_the_last_good_state_outlives_a_broken_update(rate, spec, tmp_path, monkeypatch):
    real = train.schedule
    monkeypatch.setattr(train, "schedule", lambda p, *a: real(p, *a) if p < 0.5 else rate)
    with pytest.raises(UserError) as e:
        run(spec, tmp_path / "run", "--steps", 8, "--save-every", 2)
    text = str(e.value)
    assert "not finite at step 4" in text and "items 8 to 9" in text and "the state of step 4" in text, text
    step, tensors = state_of(tmp_path / "run")
    assert step == 4 and all(t.abs().max() < 1e6 for n, t in tensors.items() if n.startswith("parameter."))


def test_the_last_update_counts_too(spec, tmp_path, monkeypatch):
    real = train.schedule
    monkeypatch.setattr(train, "schedule", lambda p, *a: real(p, *a) if p < 0.7 else float("inf"))
    with pytest.raises(UserError, match="not finite at step 3 .*the state of step 2"):
        run(spec, tmp_path / "run", "--steps", 4, "--save-every", 2)
    assert state_of(tmp_path / "run")[0] == 2 and not (tmp_path / "run/bridge.safetensors").exists()


def test_a_gradient_that_is_not_finite_is_no_update(spec, tmp_path, monkeypatch):
    real = train.clip_gradients
    count = iter(range(9))
    monkeypatch.setattr(train, "clip_gradients",
                        lambda *a: real(*a) * (torch.inf if next(count) == 1 else 1))
    with pytest.raises(UserError, match="not finite at step 1 .*gradient norm inf.*the state of step 0"):
        run(spec, tmp_path / "run", "--steps", 4)


@pytest.mark.parametrize("kind, score", [
    ("", "cider"), ("shapes", "mean"), ("shapes-words", "held_out_loss"), ("shapes-told", "held_out_loss")])
def test_a_check_has_a_number_whatever_the_data_hold(kind, score, spec, tmp_path, capsys):
    """Captions where there are no questions, and the loss where there is no one right answer."""
    run(kind or spec, tmp_path / "run", "--steps", 2, "--check-every", 1)
    check, = (x for x in read_log(tmp_path / "run/log.jsonl") if x["step"] == 1 and "loss" not in x)
    assert check[score] >= 0 and f"{score} " in capsys.readouterr().out.split("check  ")[1]


# the end from outside

@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_names_the_command_that_goes_on(number, code, spec, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as m:
        at_progress(m, 0.5, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as e:
            run_cli(lambda: run(spec, out, "--steps", 4))
    assert e.value.code == code
    assert capsys.readouterr().err == f"stopped; go on with: python train.py --resume {out}\n"
    assert state_of(out)[0] == 2
    train.main(["--resume", str(out)])
    run(spec, tmp_path / "unbroken", "--steps", 4)
    assert losses(out) == losses(tmp_path / "unbroken")
    for name in ("bridge.safetensors", "state.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_a_signal_before_the_first_step_or_in_the_final_table_ends_at_once(spec, tmp_path, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(Stopped, match="no state was saved yet") as e:
        m.setattr(train, "make_optimizers", lambda *a: os.kill(os.getpid(), signal.SIGTERM))
        run(spec, tmp_path / "early", "--steps", 2)
    assert e.value.code == 143
    with monkeypatch.context() as m, pytest.raises(Stopped, match="--resume .*late"):
        m.setattr(train.AnswerTask, "report", lambda *a: os.kill(os.getpid(), signal.SIGINT))
        run(spec, tmp_path / "late", "--steps", 2)
    train.main(["--resume", str(tmp_path / "late")])
    assert (tmp_path / "late/results.json").exists()


def stages_of(*argv: str):
    return train.stages(train.settings_from([*argv])[0], " ".join(argv), train.RECIPES, train.SYSTEMS)


def test_a_system_that_is_stopped_names_the_commands_of_its_other_stages(tmp_path, monkeypatch):
    """--resume ends with stage 1; the command that follows begins stage 2 where that has ended."""
    asked = f"--recipe llava --steps 4 --out {tmp_path}".split() + QUICK
    first, second = (tmp_path / name for name in train.SYSTEMS["llava"])
    with monkeypatch.context() as m, pytest.raises(Stopped) as e:
        at_progress(m, 0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
        train.main(asked)
    assert f"--resume {first}; then: python train.py --recipe llava-2" in str(e.value)
    resume, after = (x.split(" train.py ")[1].split() for x in e.value.args[0].split("; then: "))
    train.main(resume)
    with monkeypatch.context() as m, pytest.raises(Stopped, match="start it again") as e:
        m.setattr(train, "load_task", lambda *a: os.kill(os.getpid(), signal.SIGINT))
        for s, *commands in stages_of(*asked):
            if s.recipe == "llava-2":
                with train.stoppable(second, *commands) as stop:
                    train.train(s, stop)
    assert str(e.value).endswith(f"start it again: python train.py {' '.join(after)}")
    train.main(after)
    train.main([*asked[:-1], "2", "--out", str(tmp_path / "unbroken")])
    for stage in ("llava-1", "llava-2"):
        kept, whole = (x / stage / "bridge.safetensors" for x in (tmp_path, tmp_path / "unbroken"))
        assert kept.read_bytes() == whole.read_bytes()


def test_each_stage_of_a_system_starts_from_the_run_of_the_one_before(tmp_path, monkeypatch):
    """Without --out, too, where folders are named by the data, and each stage may have data of its own."""
    monkeypatch.chdir(tmp_path)
    for name in train.SYSTEMS:
        before = ""
        for s, *_ in stages_of("--recipe", name):
            assert s.init == before
            Path(before := s.out).mkdir(parents=True, exist_ok=True)


def test_an_interrupt_that_a_library_makes_another_error_is_still_one(spec, tmp_path, monkeypatch, capsys):
    def library(*_):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of an object") from None

    monkeypatch.setattr(train, "make_optimizers", library)
    for main in (lambda: run(spec, tmp_path / "run", "--steps", 2), library):
        with pytest.raises(SystemExit) as e:
            run_cli(main)
        assert e.value.code == 130 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_libraries_load_is_one_line(number, code, tmp_path):
    """numpy stands for the libraries: this one says that it loads, and takes its time."""
    (tmp_path / "numpy.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    p = subprocess.Popen([sys.executable, "train.py"], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                         stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    timer = threading.Timer(60, p.kill)
    timer.start()
    assert p.stdout.readline() == "loading\n"
    p.send_signal(number)
    assert p.wait() == code and p.stderr.read() == "stopped\n"
    timer.cancel()


# files

def test_a_full_disk_is_one_sentence_and_the_state_before_stays(spec, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file/run: cannot be a run folder"):
        run(spec, tmp_path / "file/run", "--steps", 2)
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as m:
        at_progress(m, 0.5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1])))
        try:
            with pytest.raises(UserError, match="state.safetensors: cannot be written .*unchanged") as e:
                run(spec, out, "--steps", 4, "--save-every", 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(e.value) and state_of(out)[0] == 0
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    train.main(["--resume", str(out)])
    run(spec, tmp_path / "unbroken", "--steps", 4, "--save-every", 2)
    assert losses(out) == losses(tmp_path / "unbroken")


def test_a_broken_item_in_a_reader_process_is_the_same_sentence(spec, tmp_path):
    folder = Path(spec.partition(":")[2])
    (folder / "7.png").write_bytes(b"")
    texts = []
    for workers in (0, 1):
        with pytest.raises(UserError) as e:
            run(f"{spec}:all", tmp_path / f"run{workers}", "--steps", 12, "--strict", "--workers", workers)
        texts.append(str(e.value))
    assert texts[0] == texts[1] and "\n" not in texts[0] and "7.png" in texts[0]


@pytest.mark.parametrize("workers, said", [(0, ["3 broken records of", " skipped (last"]),
                                           (1, [" skipped by reader process 0 (last"])])
def test_a_run_counts_what_it_skipped_or_says_which_process_did(workers, said, spec, tmp_path, capfd):
    for n in range(1, 4):
        (Path(spec.partition(":")[2]) / f"{n}.png").write_bytes(b"")
    run(f"{spec}:all", tmp_path / "run", "--steps", 12, "--workers", workers)
    lines = [line for line in capfd.readouterr().err.splitlines() if f" broken records of {spec} " in line]
    assert any(all(part in line for part in said) for line in lines), lines


# the cache of features

def features(spec: str, cache: Path | str = "", step: int = 0, task=None) -> torch.Tensor:
    if task is None:
        task = make_task(spec, cache)
    return task.to_device(task.batch(step))[0]["features"]


def make_task(spec: str, cache: Path | str = "") -> train.AnswerTask:
    s = train.with_recipe(train.Settings(bridge="linear", recipe="linear", data=spec, batch=2, steps=1,
                                         cache=str(cache), template="plain", captions=1.0), "linear")
    sets = [(train.open_data(s.data, s.seed), 1.0)]
    return train.load_task(s, train.RECIPES["linear"], Ranks("cpu"), sets, torch.float32)


def test_pictures_with_one_id_have_features_of_their_own(tmp_path):
    rows = []
    for n, color in enumerate(((255, 0, 0), (0, 0, 255))):
        picture(tmp_path / f"d/{n}.png", color)
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "x"}]
        rows.append({"id": "identity_0", "image": f"{n}.png", "conversations": turns})
    (tmp_path / "d/chat.json").write_text(json.dumps(rows))
    spec = f"llava:{tmp_path / 'd'}:all"
    plain, cached = features(spec), features(spec, tmp_path / "cache")
    assert torch.equal(plain, cached) and not torch.equal(plain[0], plain[1])


def test_two_runs_fill_one_cache_at_the_same_time(spec, tmp_path):
    spec, cache = f"{spec}:all", tmp_path / "cache"
    a, b = make_task(spec, cache), make_task(spec, cache)
    for task, step in ((a, 0), (b, 1), (a, 2), (b, 3)):
        features(spec, cache, step, task)
    third, plain = make_task(spec, cache), make_task(spec)
    for step in range(4):
        assert torch.equal(features(spec, "", step, plain), features(spec, cache, step, third))


def test_a_picture_that_changed_is_another_picture(spec, tmp_path):
    spec, cache = f"{spec}:all", tmp_path / "cache"
    features(spec, cache)
    for i in range(12):
        picture(Path(spec.split(":")[1]) / f"{i}.png", (10, 12 * i, 99))
    assert torch.equal(features(spec, cache), features(spec))
