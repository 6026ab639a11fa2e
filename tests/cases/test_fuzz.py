"""Claim: whatever stands in a file, a flag or an option, a mistake costs one sentence.

Every input below is one change to something that works: a key of a JSON file, a byte or a tensor of a weights
file, a flag. What comes of it is one of

    refused     one sentence: a UserError, or the ValueError of a line of the math
    equal       accepted, and the result is the same: nothing that we compute depends on it
    changed     accepted, and the result is another one, as it is where the reference reads that key
    wrong       an exception of another kind, a hang, a number that is not finite, a model that changed with a
                key outside CHANGES or did not change with a number of MATTERS

Wrong ones must not be. Each test runs twice: with a small sample, and marked slow with the whole; -s prints
the counts.
"""
from __future__ import annotations

import collections
import contextlib
import json
import random
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from conftest import GOLDEN, SMALL, TINY, TINY_VIT, golden, shapes_vlm, tiny_decoder, tiny_vlm
from data import to_pixels
from eval import main as eval_main
from model import Decoder, IMAGE, VLM, ViT
from papers import ALL_BRIDGES, arguments, make_bridge
from papers.mllama_vit import Tiles
from support.formats import (load_bridge, load_clip, load_decoder, load_processor, load_tokenizer, load_vit,
                             load_vlm, save_vlm)
from support.formats.keys import FILES
from support.lab import claims
from support.lab.attention import gate_history
from support.lab.protocols import read_results
from support.plumbing.cli import flag_name, mistake, parse_options
from support.plumbing.log import read_log
from support.plumbing.ranks import Ranks
from support.plumbing.state import TrainState, load_state, save_state
from support.worlds import open_data
from support.worlds.commands import main as data_main

SECONDS = 20                    # an input that takes longer hangs

# --- outcomes -----------------------------------------------------------------------------------------------


class Hang(BaseException):
    pass


@contextlib.contextmanager
def time_limit(seconds: int = SECONDS):
    def stop(number, frame):
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(run, expected=None, doors: bool = True) -> tuple[str, str]:
    """(refused | equal | changed | wrong, its sentence) of one input; run() gives a tensor or a value.

    doors: only the errors of the readers count as refusals; without it what run_cli says, too.
    """
    try:
        with time_limit():
            result = run()
    except SystemExit as e:
        return ("equal", "") if not e.code else ("wrong", f"exit {e.code}")
    except KeyboardInterrupt:
        raise
    except BaseException as e:                          # a panic of a library in Rust is no Exception
        sentence = mistake(e) if isinstance(e, ValueError) or not doors else None
        right = sentence and "\n" not in sentence and "Traceback" not in sentence
        return "refused" if right else "wrong", f"{type(e).__name__}: {sentence or e}"
    if not isinstance(result, torch.Tensor):
        return "equal" if result == expected else "changed", ""
    if not bool(torch.isfinite(result).all()):
        return "wrong", "a result that is not finite"
    return "equal" if torch.equal(result, expected) else "changed", ""


class Counts(collections.Counter):
    """Outcomes, and every input whose outcome is wrong."""

    def __init__(self):
        super().__init__()
        self.failures: list[str] = []

    def add(self, what: str, result: tuple[str, str], problem: str = "") -> None:
        kind, sentence = result
        kind = "wrong" if problem else kind
        self[kind] += 1
        if kind == "wrong":
            self.failures.append(f"{what}: {problem or sentence:.200}")

    def check(self, name: str) -> None:
        print(f"\nfuzz {name}: {self.total():,} inputs, {dict(self)}")
        assert not self.failures, f"{len(self.failures)} wrong:\n" + "\n".join(self.failures[:40])


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["sample", "whole"])
def whole(request) -> bool:
    """Whether all inputs are tried, or a sample."""
    return request.param


def sample(inputs: list, whole: bool, fast: int, slow: int) -> list:
    """So many of the inputs, the same ones every time."""
    count = slow if whole else fast
    return inputs if len(inputs) <= count else random.Random(0).sample(inputs, count)


# --- JSON ---------------------------------------------------------------------------------------------------

# keys of a model's config.json that change what it computes, where another value can be accepted at all
MATTERS = {"rms_norm_eps", "layer_norm_eps", "norm_eps", "rope_theta", "factor"}
CHANGES = MATTERS | {
    "rope_parameters", "rope_scaling", "rope_type", "type", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "max_position_embeddings", "use_scaled_rope", "num_attention_heads",
    "hidden_act", "attention_heads",
    "vision_feature_layer", "vision_feature_select_strategy", "mm_vision_select_layer",
    "mm_vision_select_feature", "eos_token_id", "alpha_type", "sliding_window", "use_sliding_window",
    "max_window_layers", "num_heads", "text_config", "vision_config", "qformer_config", "perceiver_config",
    "model_type", "bridge_options", "bridge", "image_token"}
MISSING, HUGE = object(), "@1e400@"
WRONG = [MISSING, None, "abc", "", 0, -1, 1.5, True, HUGE, "@NaN@", 10**400, 2**62, [], {}, [[]], {"a": {}}]
UNREAD = [MISSING, None, 2**62, [[]]]                   # for a key that nothing here reads


def neighbours(value) -> list:
    """Values of the right type: one that is accepted must have its effect."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value * 2, value + 1, [value]]
    return [value[::-1]] if isinstance(value, str) and value[::-1] != value else []


def paths(content, keys: tuple = ()) -> list[tuple]:
    """The path of every key, at every level; of a list the first and the last element."""
    found = []
    if isinstance(content, dict):
        parts = list(content)[:40] if len(content) < 100 else list(content)[:4]
    else:
        parts = sorted({0, len(content) - 1}) if isinstance(content, list) and content else []
    for key in parts:
        found += [(*keys, key), *paths(content[key], (*keys, key))]
    return found


def changed(content, keys: tuple, value) -> str:
    """The JSON text with one value replaced."""
    content = json.loads(json.dumps(content))
    place = content
    for key in keys[:-1]:
        place = place[key]
    if value is MISSING:
        place.pop(keys[-1])
    else:
        place[keys[-1]] = value
    text = json.dumps(content)
    return text.replace(f'"{HUGE}"', "1e400").replace('"@NaN@"', "NaN")


def all_keys(table: dict) -> set[str]:
    """The keys of a table of support/formats/keys.py, and of the tables inside it."""
    inside = [key.keys or (key.each and key.each.keys) or {} for key in table.values()]
    return {*table, *(name for keys in inside if keys is not table for name in keys)}


READ = set().union(*map(all_keys, FILES.values()))


def json_inputs(content) -> list[tuple[tuple, object]]:
    inputs = []
    for keys in paths(content):
        old = content
        for key in keys:
            old = old[key]
        values = [*WRONG, *neighbours(old)] if {*keys} & READ else UNREAD
        inputs += [(keys, value) for value in values
                   if value is MISSING or value != old or type(value) is not type(old)]
    return inputs


def tokens_of(x: dict, name: str, image: int) -> torch.Tensor:
    return x[name].masked_fill(x[name] == image, IMAGE)


def run_llava(folder: Path) -> torch.Tensor:
    x = golden("llava-hf")[2]
    return load_vlm(folder)(tokens_of(x, "start.input_ids_unexpanded", 70), x["pixel_values"][:1])


def run_llava_original(folder: Path) -> torch.Tensor:
    x = golden("llava-original-v15")[2]
    return load_vlm(folder)(x["start.input_ids"], x["pixel_values"][:1])


def run_idefics(folder: Path) -> torch.Tensor:
    x = golden("idefics-plain")[2]
    return load_vlm(folder)(tokens_of(x, "input_ids", 72)[1:], x["pixel_values"][1, :1])


def run_mllama(folder: Path) -> torch.Tensor:
    x = golden("mllama")[2]
    pictures = Tiles(x["pixel_values"], x["aspect_ratio_ids"], x["aspect_ratio_mask"].bool())
    return load_vlm(folder)(tokens_of(x, "start.input_ids", 64), pictures[[0]])


def run_instructblip(folder: Path) -> torch.Tensor:
    x = golden("instructblip-llama")[2]
    tokens = torch.cat((torch.full((2, 1), IMAGE), x["input_ids"][:, 4:]), dim=1)
    return load_vlm(folder)(tokens, x["pixel_values"], bridge_tokens=x["qformer_input_ids"])


def run_stage1(folder: Path) -> torch.Tensor:
    x = golden(folder.name)[2]
    image = x.get("pixel_values", x.get("image_features"))
    text = x.get("input_ids", x.get("text_input_ids"))[:len(image)]
    return load_vlm(folder).itm(image, text, torch.ones_like(text, dtype=torch.bool))


def run_decoder(folder: Path) -> torch.Tensor:
    return load_decoder(folder)(torch.arange(24)[None])


def run_vit(folder: Path) -> torch.Tensor:
    return load_vit(folder)(golden(folder.name)[2]["pixel_values"])


def run_clip(folder: Path) -> torch.Tensor:
    x = golden("clip-model")[2]
    return load_clip(folder)(x["pixel_values"], x["input_ids"])


def run_processor(folder: Path) -> torch.Tensor:
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    processor = load_processor(folder)
    return to_pixels([picture], min(processor.size, 64), processor)


def run_tokenizer(folder: Path) -> list[int]:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("A red cat, 42 times: ça va?\n")
    return [*ids, tokenizer.decode(ids), tokenizer.bos, tokenizer.eos, sorted(tokenizer.special.items())]


def run_tiny_run(folder: Path) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    vlm = load_vlm(folder)
    return vlm(torch.tensor([[1, IMAGE, 5, 6]]), torch.randn(1, 3, 24, 24, generator=g))


def run_mapl(folder: Path) -> torch.Tensor:
    bridge = load_bridge("mapl", folder)
    return bridge.prefix(bridge.see(golden("mapl-mapper")[2]["x"]))


def run_flamingo(folder: Path) -> torch.Tensor:
    return load_bridge("flamingo", folder).resampler(golden("flamingo-open")[2]["vision_features"][0])


# file that is changed → (the golden folders that have it, what is done with one)
JSON_FILES = [
    ("config.json", ["llama-mha", "llama-gqa-tied", "llama-rope-linear", "llama-rope-llama3", "mistral-plain",
                     "qwen2-rope-yarn", "llama-rope-dynamic", "qwen2-bias", "qwen3-qk-norm",
                     "llama-sharded"], run_decoder),
    ("model.safetensors.index.json", ["llama-sharded"], run_decoder),
    ("params.json", ["meta"], run_decoder),
    ("config.json", ["clip-vision-gelu", "clip-vision-quickgelu", "siglip-vision", "blip2-vision",
                     "dinov2"], run_vit),
    ("config.json", ["clip-model"], run_clip),
    ("config.json", ["llava-hf"], run_llava),
    ("config.json", ["llava-original-v15"], run_llava_original),
    ("vision_tower/config.json", ["llava-original-v15"], run_llava_original),
    ("config.json", ["idefics-plain"], run_idefics),
    ("config.json", ["mllama"], run_mllama),
    ("config.json", ["instructblip-llama"], run_instructblip),
    ("config.json", ["blip2-itm-itc", "blip2-lavis-stage1"], run_stage1),
    ("config.json", ["mapl-mapper"], run_mapl),
    ("flamingo_config.json", ["flamingo-open"], run_flamingo),
    ("preprocessor_config.json", ["clip", "blip", "llava_pad", "siglip"], run_processor),
    ("tokenizer.json", ["wordpiece-bert-style/new", "clip-bpe-style/new", "llama3-tiktoken-style/new",
                        "sentencepiece-llama-style"], run_tokenizer),
    ("tokenizer_config.json", ["wordpiece-bert-style/new", "clip-bpe-style/new",
                               "llama3-tiktoken-style/new"], run_tokenizer),
    ("special_tokens_map.json", ["wordpiece-bert-style/old"], run_tokenizer),
    ("vocab.json", ["clip-bpe-style/old"], run_tokenizer),
    ("config.json", [f"run-{name}" for name in SMALL], run_tiny_run),
]


def copy_of(name: str, folder: Path) -> Path:
    """A working folder by its golden name, by the preset of an image processor, or a run of our own."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    processor = GOLDEN / "image-processors" / f"preprocessor_config.{name}.json"
    if name.startswith("run-"):
        save_vlm(tiny_vlm(name.removeprefix("run-")), target, {"settings": {"data": "shapes", "seed": 0}})
    elif processor.exists():
        target.mkdir()
        shutil.copy(processor, target / "preprocessor_config.json")
    elif name == "meta":
        target.mkdir()
        source = GOLDEN / "adapter-llama-v2-multimodal"
        shutil.copy(source / "model.safetensors", target / "consolidated.00.safetensors")
        (target / "params.json").write_text(json.dumps(dict(
            dim=24, n_layers=3, n_heads=4, multiple_of=16, norm_eps=1e-5, vocab_size=72, n_kv_heads=4,
            rope_theta=10000.0, use_scaled_rope=False, ffn_dim_multiplier=1.0)))
    elif (GOLDEN / name).exists():
        shutil.copytree(GOLDEN / name, target)
    return target


def fuzz_json(file: str, name: str, run, tmp_path: Path, whole, counts: Counts) -> None:
    folder = copy_of(name, tmp_path)
    if not (folder / file).exists():
        return
    text = (folder / file).read_text()
    content, expected = json.loads(text), run(folder)
    inputs = sample(json_inputs(content), whole, 4, 60 if name.startswith("run-") else 130)
    for keys, value in inputs:
        (folder / file).write_text(changed(content, keys, value))
        shown = "missing" if value is MISSING else repr(value)[:40]
        what = f"{name}/{file} {'.'.join(map(str, keys))} = {shown}"
        result = outcome(lambda: run(folder), expected)
        counts.add(what, result, silently_wrong(keys, value, result[0], expected, "processor" not in file))
    (folder / file).write_text(text)


def silently_wrong(keys: tuple, value, kind: str, expected, models: bool) -> str:
    """What is wrong with a model that was accepted; a run's own bridge_options are all its own words."""
    if not isinstance(expected, torch.Tensor) or kind not in ("equal", "changed") or not models:
        return ""
    if kind == "changed" and not {*keys} & CHANGES:
        return "accepted, and it changes the result"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "accepted without an effect" if kind == "equal" and keys[-1] in MATTERS and number else ""


@pytest.mark.parametrize("file, names, run", JSON_FILES, ids=[f"{f}-{n[0]}" for f, n, _ in JSON_FILES])
@torch.no_grad()
def test_json(file, names, run, tmp_path, whole):
    counts = Counts()
    for name in names:
        fuzz_json(file, name, run, tmp_path, whole, counts)
    counts.check(file)


# --- data sets ----------------------------------------------------------------------------------------------

DATA_FILES = [          # data set, its file, a split
    ("coco:coco_captions", "annotations/captions_val2014.json", "val"),
    ("karpathy:coco_captions", "dataset_coco.json", "test"),
    ("textcaps:textcaps", "TextCaps_0.1_val.json", "val"),
    ("vqav2:vqav2", "v2_mscoco_val2014_annotations.json", "val"),
    ("vqav2:vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", "val"),
    ("textvqa:textvqa", "TextVQA_0.5.1_val.json", "val"),
    ("vizwizvqa:vizwiz_vqa", "Annotations/val.json", "val"),
    ("scienceqa:scienceqa", "problems.json", "test"),
    ("llava:llava_instruct", "llava_instruct_150k.json", "all"),
    ("alpaca:alpaca", "alpaca_data.json", "all"),
]


def read_data(spec: str) -> list[str]:
    world = open_data(spec)
    return [repr(world.item(i, turns=3).captions) for i in range(min(2, len(world)))]


@pytest.mark.parametrize("name, file, split", DATA_FILES, ids=[f"{n}-{f}" for n, f, _ in DATA_FILES])
def test_data_sets(name, file, split, tmp_path, whole):
    kind, _, source = name.partition(":")
    shutil.copytree(GOLDEN / "datasets" / source, tmp_path / "set")
    found = [p for p in (tmp_path / "set").rglob(Path(file).name)]
    content, counts = json.loads(found[0].read_text()), Counts()
    spec = f"{kind}:{tmp_path / 'set'}:{split}"
    expected = read_data(spec)
    inputs = [(keys, value) for keys in paths(content) for value in WRONG]
    for keys, value in sample(inputs, whole, 4, 100):
        found[0].write_text(changed(content, keys, value))
        shown = "missing" if value is MISSING else repr(value)[:40]
        what = f"{file} {'.'.join(map(str, keys))} = {shown}"
        counts.add(what, outcome(lambda: read_data(spec), expected))
    counts.check(file)


# --- tensors ------------------------------------------------------------------------------------------------

SIZES = {"const"}               # tensors whose first axis is a size that nothing else says (MAPL's K)


def tensor_damages(tensors: dict) -> dict[str, dict]:
    """Name → what is different: each kind of damage for four of the tensors that have axes."""
    damages, names = {}, sorted(name for name, t in tensors.items() if t.ndim and t.is_floating_point())
    for name in {names[0], names[len(names) // 3], names[len(names) // 2], names[-1]}:
        t, first = tensors[name], torch.tensor([0])
        changes = {
            "missing": None, "NaN": t.float().index_fill(0, first, torch.nan), "bool": t.bool(),
            "inf": t.float().index_fill(0, first, torch.inf), "int64": t.long(), "uint8": t.to(torch.uint8),
            "complex": t.to(torch.complex64), "empty": t[:0], "two of it": torch.stack((t, t))}
        if name not in SIZES:
            changes |= {"longer": torch.cat((t, t)), "shorter": t[:-1]}
        damages |= {f"{name} {what}": {name: damaged} for what, damaged in changes.items()}
        damages[f"{name} renamed"] = {name: None, name + "x": t}
        damages[f"{name} twice"] = {name + ".extra": t.clone()}
    return damages


def byte_damages(data: bytes, count: int = 40) -> dict[str, bytes]:
    """Name → the file cut off or with a bit of its header flipped, at random places."""
    rng = random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    damages = {"empty": b"", "zeros": bytes(64), "text": b"not a tensor", "doubled": data + data}
    for _ in range(count):
        end = rng.randrange(1, len(data))
        damages[f"cut at {end}"] = data[:end]
    for _ in range(count):
        place, bit = rng.randrange(header), rng.randrange(8)
        flipped = bytes([data[place] ^ 1 << bit])
        damages[f"bit {bit} of byte {place}"] = data[:place] + flipped + data[place + 1:]
    return damages


WEIGHTS = [(names[0], run) for file, names, run in JSON_FILES
           if file == "config.json" and (GOLDEN / names[0] / "model.safetensors").exists()]
WEIGHTS += [("run-mapl", run_tiny_run), ("run-qformer", run_tiny_run), ("run-flamingo", run_tiny_run)]


@pytest.mark.parametrize("name, run", WEIGHTS, ids=[name for name, _ in WEIGHTS])
@torch.no_grad()
def test_weights(name, run, tmp_path, whole):
    folder, counts = copy_of(name, tmp_path), Counts()
    file = folder / ("bridge.safetensors" if name.startswith("run-") else "model.safetensors")
    data, tensors, expected = file.read_bytes(), load_file(file), run(folder)
    for what, change in sample(list(tensor_damages(tensors).items()), whole, 2, 40):
        damaged = {n: t.contiguous() for n, t in {**tensors, **change}.items() if t is not None}
        save_file(damaged, file, {"format": "pt"})
        result = outcome(lambda: run(folder), expected)
        accepted = result[0] in ("equal", "changed")
        counts.add(f"{name}: {what}", result, f"accepted, {result[0]}" if accepted else "")
    for what, damaged in sample(list(byte_damages(data).items()), whole, 2, 40):
        file.write_bytes(damaged)
        counts.add(f"{name}: {what}", outcome(lambda: run(folder), expected))
    counts.check(name)


# --- the files of a run -------------------------------------------------------------------------------------

def run_state(folder: Path) -> torch.Tensor:
    """What a resumed run would go on with: parameters, moments, step."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer, before = torch.optim.AdamW(module.parameters()), torch.get_rng_state()
    state = TrainState(list(module.named_parameters()), [optimizer], identity={"settings": "a", "data": "b"})
    try:
        load_state(state, Ranks("cpu"), folder)
    finally:
        torch.set_rng_state(before)
    moments = [v.flatten() for m in optimizer.state_dict()["state"].values() for v in m.values()]
    parameters = [p.detach().flatten() for p in module.parameters()]
    return torch.cat([*parameters, *moments, torch.tensor([float(state.step), state.smooth_loss or 0])])


def test_states(tmp_path, whole):
    torch.manual_seed(0)
    module, counts = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)), Counts()
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    identity = {"settings": "a", "data": "b"}
    state = TrainState(list(module.named_parameters()), [optimizer], {}, identity, 7, 0.5)
    state.keep_random(torch.device("cpu"))
    save_state(state, Ranks("cpu"), tmp_path)
    file = tmp_path / "state.safetensors"
    data, tensors, expected = file.read_bytes(), load_file(file), run_state(tmp_path)
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    damages = tensor_damages(tensors)
    for name, t in tensors.items():
        damages |= {f"{name} missing": {name: None}, f"{name} int64": {name: t.long()}}
        damages[f"{name} shorter"] = {name: t.flatten()[:-1]}
    for what, change in sample(list(damages.items()), whole, 15, 300):
        save_file({n: t.contiguous() for n, t in {**tensors, **change}.items() if t is not None}, file, facts)
        result = outcome(lambda: run_state(tmp_path), expected)
        accepted = result[0] in ("equal", "changed")
        counts.add(f"state: {what}", result, f"accepted, {result[0]}" if accepted else "")
    for key in facts:
        for value in ("", "abc", "-1", "1e400", "nan", "9" * 5000, "None", None):
            changed_facts = {k: v for k, v in {**facts, key: value}.items() if v is not None}
            save_file(tensors, file, changed_facts)
            counts.add(f"state: {key} = {value!r:.20}", outcome(lambda: run_state(tmp_path), expected))
    for what, damaged in sample(list(byte_damages(data).items()), whole, 15, 300):
        file.write_bytes(damaged)
        counts.add(f"state: {what}", outcome(lambda: run_state(tmp_path), expected))
    counts.check("state.safetensors")


def test_logs_and_results(tmp_path, whole, monkeypatch, capsys):
    """log.jsonl, results.json, the answers that a comparison keeps: every key with every wrong value."""
    monkeypatch.chdir(tmp_path)
    log = {"step": 1, "loss": 2.0, "ema": 2.0, "lr": 0.1, "seconds": 3.0, "gates": [[0.1], [0.2]],
           "layers": [0, 1], "per_head": True}
    rows = [{"row": "mlp, sees", "trained": 10, "examples": 5, "color": 0.5, "mean": 0.5, "cider": 1.0}]
    results = {"world": "shapes", "items": 4, "rows": [*rows, {"row": "blind", "mean": 0.1}]}
    readers = [
        ("log.jsonl", log, lambda: [read_log(tmp_path / "log.jsonl"), gate_history(tmp_path)[1].tolist()]),
        ("results.json", results, lambda: eval_main([str(tmp_path), "--saved"])),
        ("results.jsonl", ["key", "an answer"], lambda: read_results(tmp_path / "results.jsonl"))]
    counts = Counts()
    for name, content, read in readers:
        inputs = [(keys, value) for keys in paths(content) for value in WRONG]
        for keys, value in sample(inputs, whole, 25, 300):
            (tmp_path / name).write_text(changed(content, keys, value) + "\n")
            counts.add(f"{name} {keys} = {value!r:.40}", outcome(read))
        for text in ("", "\n", "5\n", "[]\n", "null\n", "{\n", "[" * 100_000 + "\n", "\0"):
            (tmp_path / name).write_text(text)
            counts.add(f"{name}: {text!r:.20}", outcome(read))
    counts.check("log.jsonl, results.json, results.jsonl")


# --- flags, options, weights of data sets -------------------------------------------------------------------

NUMBERS = ["nan", "inf", "-inf", "-1", "0", "1e400", "", "abc", "1.5", "true", "[1]",
           "9" * 12, "9" * 400, "9" * 5000, "FOLDER", "FILE", "MISSING"]


class Accepted(Exception):
    """What would be computed next has been reached."""


def accept(*_, **__):
    raise Accepted


def flags_of(parser) -> list[str]:
    return [a.option_strings[0] for a in parser._actions if a.option_strings and a.nargs != 0]


def fuzz_command(main, lines: list[list[str]], tmp_path: Path, counts: Counts) -> None:
    """Run main(argv) for every line, until it is refused, ends, or has everything that it needs."""
    places = {"FOLDER": str(tmp_path), "FILE": str(tmp_path / "file"), "MISSING": str(tmp_path / "nothing")}
    (tmp_path / "file").write_text("a file")

    def run(argv):
        try:
            main(argv)
        except Accepted:
            pass
        return "done"

    for line in lines:
        argv = [places.get(word, word) for word in line]
        counts.add(" ".join(word[:40] for word in line), outcome(lambda: run(argv), "done", doors=False))


@pytest.fixture
def stopped(monkeypatch, tmp_path):
    """Commands that stop before they compute: at a run's first batch, at a decoder's first token."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "prefetch", accept)
    monkeypatch.setattr(Decoder, "states", accept)
    monkeypatch.setattr(claims, "run_claims", accept)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


def test_flags_of_training(stopped, tmp_path, whole):
    start = ["--steps", "1", "--batch", "2", "--eval-items", "1", "--samples", "0", "--out", "out/o"]
    flags = [flag_name(f.name) for f in fields(train.Settings)]
    booleans = {flag_name(f.name) for f in fields(train.Settings) if f.type == "bool"}
    lines = [[*start, flag, value] for flag in flags if flag not in booleans for value in NUMBERS]
    lines += [[*start, flag] for flag in booleans if flag != "--compile"]
    lines += [[*start, "--device", value] for value in ("cuda", "cuda:9", "mps", "gpu", "cuda:", "CPU")]
    lines += [[*start, "--data", f"shapes + shapes-pages * {value}"] for value in NUMBERS]
    lines += [["--resume", value] for value in NUMBERS] + [["--curves", value] for value in NUMBERS]
    counts = Counts()
    fuzz_command(train.main, sample(lines, whole, 12, 350), tmp_path, counts)
    counts.check("flags of train.py")


def test_options_of_bridges(stopped, tmp_path, whole):
    counts, lines = Counts(), []
    for name, kind in ALL_BRIDGES.items():
        for option in [*arguments(kind), "reads", "reads_cls", "version", "nothing"]:
            for value in [*NUMBERS, "3", "null", "{}", "99", "100000", "NaN"]:
                lines.append([name, f"{option}={value}"])

    def build(argv):
        options = {**SMALL[argv[0]], **parse_options(argv[1:])}
        bridge = make_bridge(argv[0], TINY, TINY_VIT.width, **options)
        vlm = VLM(ViT(TINY_VIT), bridge, tiny_decoder())
        vlm.features(torch.zeros(1, 3, 24, 24))

    fuzz_command(build, sample(lines, whole, 20, 500), tmp_path, counts)
    counts.check("options of bridges")


def test_flags_of_evaluation(stopped, tmp_path, whole):
    run, facts = tmp_path / "run", {"settings": {"data": "shapes", "seed": 0}}
    save_vlm(shapes_vlm("mlp", hidden=8), run, facts, "weights/vit", "weights/decoder")
    flags = {"": ["--items", "--beams", "--device"],
             "compare": ["--data", "--protocol", "--shots", "--seed", "--items", "--beams", "--predictions",
                         "--format", "--out", "--device"],
             "ask": ["--image", "--prompt", "--max-new-tokens", "--beams", "--dtype", "--device"],
             "look": ["--image", "--prompt", "--out", "--device"], "targets": ["--items", "--device"],
             "claims": ["--seeds", "--jobs", "--out"]}
    lines = []
    for command, names in flags.items():
        place = ["all"] if command == "claims" else [str(run)]
        lines += [[*filter(None, [command]), *place, flag, value] for flag in names for value in NUMBERS]
        lines += [[*filter(None, [command]), value] for value in NUMBERS]
    lines += [[str(run), "--device", value] for value in ("cuda", "cuda:9", "mps", "gpu")]
    counts = Counts()
    fuzz_command(eval_main, sample(lines, whole, 12, 350), tmp_path, counts)
    counts.check("flags of eval.py")


def test_flags_of_data(stopped, tmp_path, whole):
    specs, counts = ("shapes", "emoji", "shapes:test", *NUMBERS), Counts()
    lines = [[spec, value] for spec in specs for value in ("1", *NUMBERS)]
    lines += [["generate", "shapes", str(tmp_path / f"i{n}"), value] for n, value in enumerate(NUMBERS)]
    lines += [["generate", value, "1", "1"] for value in NUMBERS]
    lines += [["generate", "shapes", str(tmp_path / f"t{n}"), "1", value] for n, value in enumerate(NUMBERS)]
    fuzz_command(data_main, sample(lines, whole, 12, 250), tmp_path, counts)
    counts.check("flags of data.py")
