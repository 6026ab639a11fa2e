"""PyTorch's own files: every tensor is read, whatever lies beside it, and no code of the file runs."""
from __future__ import annotations

import argparse
import collections
import os
import pathlib
import re

import numpy as np
import pytest
import torch
from torch import nn

from support.formats.checkpoint import Checkpoint
from support.formats.files import UserError

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1.5, -2.0]).bfloat16(),
           "c": torch.tensor(3.0).double(), "part": torch.arange(9.0)[2:5]}


class Settings(dict):
    """A class of the script that wrote the file, which no other program has."""


class Callback:
    def __init__(self):
        self.best = {"loss": np.float64(0.5)}


FORMATS = {"zip": {}, "zip, protocol 4": {"pickle_protocol": 4},
           "before 1.6": {"_use_new_zipfile_serialization": False}}
BESIDE = {                  # what training scripts keep beside the tensors
    "argparse": argparse.Namespace(lr=1e-3, out=pathlib.Path("out")),
    "a dictionary of their own": Settings(lr=1e-3, inner=Settings(seed=0)),
    "a default": collections.defaultdict(list, loss=[1.0]),
    "numpy": {"best": np.float64(0.3), "order": np.arange(4)},
    "objects": [Callback(), {1, 2}, frozenset({3}), Callback, len, slice(1, 2), torch.Size((2, 3))],
    "an optimizer": torch.optim.AdamW([nn.Parameter(torch.zeros(2))]).state_dict(),
}


def read(file) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(file)
    return {name: checkpoint.get(name) for name in checkpoint.where}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(
        torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in TENSORS.items())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("beside", BESIDE)
def test_the_tensors_beside_whatever_a_script_keeps(tmp_path, form, beside):
    for n, content in enumerate(({"model": TENSORS, "epoch": 3, "x": BESIDE[beside]},
                                 {"state_dict": {f"module.{n}": t for n, t in TENSORS.items()},
                                  "x": BESIDE[beside]},
                                 {**TENSORS, "x": BESIDE[beside]})):
        torch.save(content, tmp_path / f"{n}.pth", **FORMATS[form])
        assert same(read(tmp_path / f"{n}.pth"))


class Evil:
    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("form", FORMATS)
def test_no_code_of_the_file_runs(tmp_path, form, capfd):
    flag = tmp_path / "ran"
    evil = [Evil(os.system, f"touch {flag}"), Evil(eval, f"open({str(flag)!r}, 'w')"),
            Evil(open, str(flag), "w")]
    torch.save({"model": TENSORS, "x": evil, **TENSORS}, tmp_path / "a.pth", **FORMATS[form])
    assert same(read(tmp_path / "a.pth")) and not flag.exists()
    assert "only its tensors are read, none of its code runs" in capfd.readouterr().err


def test_shared_and_sliced_storages_parameters_and_buffers(tmp_path):
    flat = torch.arange(10.0)
    model = nn.ModuleDict({"x": nn.Linear(2, 3), "y": nn.BatchNorm1d(3)})
    buffers = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
    content = {"low": flat[:5], "high": flat[5:].view(5, 1), "p": nn.Parameter(flat),
               "none": torch.empty(0, 3), **buffers}
    torch.save(content, tmp_path / "a.bin")
    torch.save(content, tmp_path / "b.bin", _use_new_zipfile_serialization=False)
    for file in (tmp_path / "a.bin", tmp_path / "b.bin"):
        found = read(file)
        assert found.keys() == content.keys() and all(torch.equal(found[n], t) for n, t in content.items())


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_the_attributes_of_a_torchscript_archive(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2))).half()
    torch.jit.script(model).save(tmp_path / "model.pt")
    found = read(tmp_path / "model.pt")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("content, words", [
    (lambda: nn.Linear(2, 3), "holds no tensors under names"),
    (lambda: [torch.zeros(2)], "holds no tensors under names"),
    (lambda: {"epoch": 3}, "holds no tensors"), (lambda: torch.zeros(2), "holds no tensors"),
    (lambda: {"w": torch.zeros(2).to_sparse()}, "holds no tensors"),
    (lambda: {"w": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)},
     "holds quantised tensors .torch.QInt8")])
@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_no_dictionary_of_tensors_is_said(tmp_path, form, content, words):
    torch.save(content(), tmp_path / "a.pth", **FORMATS[form])
    with pytest.raises(UserError, match=f"a.pth: .*{words}"):
        Checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("form", FORMATS)
def test_a_damaged_file_is_one_sentence(tmp_path, form):
    torch.save({"model": TENSORS}, tmp_path / "a.pth", **FORMATS[form])
    whole = (tmp_path / "a.pth").read_bytes()
    for end in (0, 1, 9, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.pth").write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"a.pth: (not a readable PyTorch file|tensor .* is damaged)"):
            read(tmp_path / "a.pth")


@pytest.mark.parametrize("content, words", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "pointer of Git LFS"),
    (b"", "it is empty"), (b"<!DOCTYPE html><html>", "not a readable")])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_holds_something_else(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(name)}: .*{words}"):
        Checkpoint(tmp_path)
