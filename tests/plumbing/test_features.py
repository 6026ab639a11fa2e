"""Features of the frozen ViT come back from the cache bit for bit, and no picture is computed twice."""
from __future__ import annotations

import pytest
import torch

import train
from conftest import tiny_vlm
from model import ViT
from support.plumbing.features import FeatureCache
from support.plumbing.log import read_log

RUN = ["--bridge", "linear", "--steps", "6", "--batch", "16", "--examples", "32", "--dtype", "float32",
       "--log-every", "1", "--eval-items", "8", "--samples", "0"]


def losses(out) -> list[float]:
    return [x["loss"] for x in read_log(out / "log.jsonl") if "loss" in x]


def test_a_second_run_reads_what_the_first_computed(tmp_path, monkeypatch):
    sizes, forward = [], ViT.forward

    def counted(self, pixels, *args, **keywords):
        sizes.extend([len(pixels)] if len(pixels) else [])          # none: the shape alone is asked for
        return forward(self, pixels, *args, **keywords)

    monkeypatch.setattr(ViT, "forward", counted)
    run = [*RUN, "--cache", str(tmp_path / "cache")]
    train.main([*run, "--out", str(tmp_path / "a")])
    assert sum(sizes[:2]) == 32                         # 6 batches of 16 from 32 pictures
    assert all(n in (8, 16) for n in sizes)             # then only the final tables, 8 pictures each
    sizes.clear()
    train.main([*run, "--out", str(tmp_path / "b")])
    assert 16 not in sizes                              # a second run computes none of them again
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    files = list((tmp_path / "cache").glob("*.features"))
    train.main([*run, "--option", "reads=-1", "--out",
                str(tmp_path / "c")])  # another hidden state, another file
    assert len(list((tmp_path / "cache").glob("*.features"))) == len(files) + 1


@pytest.mark.parametrize("name", ["linear", "mapl", "clipcap"])    # without class token, with it, pooled
def test_rows_come_back_in_the_order_asked_for_and_a_half_written_row_is_dropped(name, tmp_path):
    vlm = tiny_vlm(name)
    cache = FeatureCache(tmp_path, vlm, ("shapes", 0))
    pixels = {key: torch.randn(3, 24, 24) for key in "abc"}

    def compute(x: torch.Tensor) -> torch.Tensor:
        return vlm.features(x).detach()

    with torch.no_grad():
        first = cache(pixels, ["a", "b", "a"], compute)
        fresh = compute(torch.stack([pixels[key] for key in "ab"]))
        assert torch.equal(first, fresh[[0, 1, 0]])
        with open(cache.file, "ab") as f:
            f.write(b"half a row")                      # a crash between the row and its name
        again = FeatureCache(tmp_path, vlm, ("shapes", 0))
        second = again({"c": pixels["c"]}, ["c", "b"], compute)
        assert torch.equal(second[1], first[1]) and torch.equal(second[0], compute(pixels["c"][None])[0])
    assert FeatureCache(tmp_path, vlm, ("emoji", 0)).file != cache.file
    assert again({}, [], compute).shape == (0, *cache.shape)
