"""Features of the frozen ViT come back from the cache bit for bit, and no picture is computed twice."""
from __future__ import annotations

import numpy as np
import pytest
import torch

import train
from conftest import tiny_vlm
from data import Processor, to_pixels
from model import ViT
from support.formats.files import UserError
from support.plumbing.features import FeatureCache
from support.plumbing.log import read_log

RUN = ["--bridge", "linear", "--steps", "6", "--batch", "16", "--examples", "32", "--dtype", "float32",
       "--log-every", "1", "--eval-items", "8", "--samples", "0"]


CLIP, PICTURES = Processor(), list(np.random.default_rng(0).integers(0, 255, (3, 24, 24, 3), dtype=np.uint8))


@torch.no_grad()
def plain(vlm, *batches: list[np.ndarray]) -> torch.Tensor:
    """Features of batches as they were computed: another size of the batch may round a picture otherwise."""
    return torch.cat([vlm.features(to_pixels(pictures, 24)) for pictures in batches])


@torch.no_grad()
def features(cache: FeatureCache, vlm, pictures: list[np.ndarray]) -> torch.Tensor:
    """As a run reads them: looked up, then completed."""
    known = cache.look_up(pictures)
    missing = [pictures[n] for n in known.missing]
    pixels = to_pixels(missing, 24) if missing else torch.zeros(0, 3, 24, 24)
    return cache.complete(known, pixels, vlm.features)


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
    cache, (a, b, c) = FeatureCache(tmp_path, vlm, CLIP), PICTURES
    first = features(cache, vlm, [a, b, a])
    assert torch.equal(first, plain(vlm, [a, b])[[0, 1, 0]])
    with open(cache.file, "ab") as f:
        f.write(b"half a row")                          # a crash between the row and its line
    again = FeatureCache(tmp_path, vlm, CLIP)
    second = features(again, vlm, [c, b])
    assert torch.equal(second[1], first[1]) and torch.equal(second[0], plain(vlm, [c])[0])
    assert features(again, vlm, []).shape == (0, *cache.shape)


def test_a_file_is_named_by_the_tower_the_layer_and_the_preparation(tmp_path):
    vlm = tiny_vlm("linear")
    names = [FeatureCache(tmp_path, vlm, CLIP).file, FeatureCache(tmp_path, vlm, Processor("pad")).file]
    vlm.bridge.reads = -1
    names.append(FeatureCache(tmp_path, vlm, CLIP).file)
    with torch.no_grad():
        last = list(vlm.vit.parameters())[-1]
        last.copy_(last.flip(0))                        # the same numbers in another order
    names.append(FeatureCache(tmp_path, vlm, CLIP).file)
    assert len(set(names)) == 4


def test_two_runs_fill_one_cache_in_turns(tmp_path):
    """Neither knows the rows of the other before it appends; a third finds all of them right."""
    vlm = tiny_vlm("linear")
    one, two = FeatureCache(tmp_path, vlm, CLIP), FeatureCache(tmp_path, vlm, CLIP)
    a, b, c = PICTURES
    for cache, pictures in ((one, [a]), (two, [b]), (one, [c]), (two, [a, c])):
        assert torch.equal(features(cache, vlm, pictures), plain(vlm, *([p] for p in pictures)))
    third = FeatureCache(tmp_path, vlm, CLIP)
    known = third.look_up([a, b, c])
    assert not known.missing and torch.equal(known.rows, plain(vlm, [a], [b], [c]))
    assert third.count == 3                             # nothing was computed twice


def test_damaged_rows_are_computed_again_and_a_foreign_file_is_begun_anew(tmp_path, capsys):
    vlm = tiny_vlm("linear")
    cache, expected, (_, b, c) = FeatureCache(tmp_path, vlm, CLIP), plain(vlm, PICTURES), PICTURES
    features(cache, vlm, PICTURES)
    content = bytearray(cache.file.read_bytes())
    content[cache.row_bytes + 3] ^= 1                   # one bit of the second row
    second, rest = plain(vlm, [b]), plain(vlm, [b, c])
    for damaged, right in ((bytes(content), torch.cat((expected[:1], second, expected[2:]))),
                           (bytes(content)[:cache.row_bytes], torch.cat((expected[:1], rest))),
                           (b"", expected)):
        cache.file.write_bytes(damaged)
        again = FeatureCache(tmp_path, vlm, CLIP)
        assert torch.equal(features(again, vlm, PICTURES), right)
        assert capsys.readouterr().out.count("damaged rows") == 1
        assert not again.look_up(PICTURES).missing      # and stay right
    for foreign in (b"0/a/0\n0/b/0\n" * 9, bytes(500), b'{"id": 1}' * 20):
        cache.names.write_bytes(foreign)
        again = FeatureCache(tmp_path, vlm, CLIP)
        assert torch.equal(features(again, vlm, PICTURES), expected)
        assert capsys.readouterr().out.count("made anew") == 1
    cache.names.write_bytes(cache.names.read_bytes()[:-5])          # a crash in a line
    right = torch.cat((expected[:2], plain(vlm, [c])))
    assert torch.equal(features(FeatureCache(tmp_path, vlm, CLIP), vlm, PICTURES), right)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache .*file/cache: cannot be written"):
        FeatureCache(tmp_path / "file/cache", tiny_vlm("linear"), CLIP)
