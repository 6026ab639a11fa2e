"""How fast pictures reach a training step: pictures a second, read, decoded and prepared.

    pip install transformers && python tests/benchmarks/bench_pipeline.py

Ours is what `train.py --workers N` reads ahead: batches of tokens and pixels from a folder, and from a tar
shard of the same files. The library's is torch's DataLoader over the same files with the published processor
(CLIPImageProcessor of transformers), pixels alone. Both are timed in turns, in one process, after a check
that both prepare the same pixels. Below stands what the step takes that they feed: a frozen ViT of
ViT-B/16's size, and the bridge `mapl` in front of the bundled decoder.
"""
from __future__ import annotations

import io
import itertools
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
from bench_cache import make_task, seconds_of_a_step                            # noqa: E402  (after the path)
from model import ViT, ViTConfig                                                # noqa: E402
from support.formats.vision import save_vit                                     # noqa: E402
from support.plumbing.ranks import prefetch                                     # noqa: E402

COUNT, BATCH = 512, 32
ROUNDS, TIMED = 5, 8            # rounds, and batches of each
WIDTH, HEIGHT = 640, 480


def write_pictures(out: Path) -> None:
    """COUNT JPEGs of about 40 KB with a caption each: out/folder/, and the same in out/tar/00000.tar."""
    (out / "folder").mkdir()
    (out / "tar").mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(out / "tar/00000.tar", "w") as tar:
        for i in range(COUNT):
            coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).resize((WIDTH, HEIGHT))
            grain = rng.integers(-12, 12, (HEIGHT, WIDTH, 3))
            file = io.BytesIO()
            Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(file, "jpeg")
            for ending, content in (("jpg", file.getvalue()), ("txt", b"a red ring at the top left")):
                (out / f"folder/{i:06d}.{ending}").write_bytes(content)
                member = tarfile.TarInfo(f"{i:06d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


class Published(torch.utils.data.Dataset):
    """The library's side: a file to pixels (3, 224, 224)."""

    def __init__(self, files: list[Path], processor):
        self.files, self.processor = files, processor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.files[i]) as picture:
            return self.processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def published_batches(dataset: Published, workers: int) -> Iterator[torch.Tensor]:
    while True:
        yield from torch.utils.data.DataLoader(dataset, BATCH, num_workers=workers)


def pictures_per_second(batches: Iterator, count: int) -> float:
    """Of `count` batches, once the first two are there: processes have started, and read ahead."""
    list(itertools.islice(batches, 2))
    start = time.perf_counter()
    list(itertools.islice(batches, count))
    return count * BATCH / (time.perf_counter() - start)


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def check_pixels(task, published: Published) -> None:
    """The first file is among what ours prepares, within a step of 8-bit colour."""
    ours = torch.cat([task.batch(n)[0]["pixels"] for n in range(COUNT // BATCH)])
    distance = (ours - published[0]).abs().amax((1, 2, 3)).min().item()
    assert distance < 0.03, f"the two prepare pixels that differ by {distance}"


def compare_rates(tasks: dict, published: Published, workers: int) -> str:
    """A row of the table: pictures a second, and ratios of the same round."""
    rates = {"folder": [], "tar": [], "library": []}
    for _ in range(ROUNDS):
        sources = {kind: prefetch(task.batch, 0, workers, False) for kind, task in tasks.items()}
        sources["library"] = published_batches(published, workers)
        for kind, source in sources.items():
            rates[kind].append(pictures_per_second(source, TIMED))
            source.close()
    middle = [f"{statistics.median(rate):.0f}" for rate in rates.values()]
    ratios = [quartiles([a / b for a, b in zip(rates[one], rates[other])])
              for one, other in (("folder", "library"), ("tar", "folder"))]
    return f"| {workers} | {' | '.join([*middle, *ratios])} |"


def main() -> None:
    import transformers
    torch.set_num_threads(1)                            # this process reads, too, where there are no workers
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        write_pictures(out)
        torch.manual_seed(0)
        save_vit(ViT(ViTConfig(224, 16, 768, 12, 12, 3072)), out / "vit")       # ViT-B/16
        argv = ["--bridge", "mapl", "--vit", str(out / "vit"), "--option", "reads=-2", "--captions", "1",
                "--batch", str(BATCH), "--data"]
        tasks = {kind: make_task([*argv, f"{data}:{out / kind}:all"])[0]
                 for kind, data in (("folder", "folder"), ("tar", "wds"))}
        published = Published(sorted((out / "folder").glob("*.jpg")), transformers.CLIPImageProcessor())
        check_pixels(tasks["folder"], published)
        print(f"{COUNT} JPEGs of {WIDTH} x {HEIGHT} pixels; {ROUNDS} rounds of {TIMED} batches of {BATCH}; "
              "pictures a second\n")
        print("| workers | folder | tar | library | folder / library | tar / folder |")
        print("|---|---|---|---|---|---|")
        for workers in (0, 1, 2):
            print(compare_rates(tasks, published, workers), flush=True)
        for kind, flags in (("through the ViT", []), ("cached features", ["--cache", str(out / "cache")])):
            few = [*argv, f"folder:{out / 'folder'}:all", "--examples", str(2 * BATCH), *flags]
            rate = BATCH / seconds_of_a_step(few, steps=4, epoch=2)
            print(f"\nthe step, {kind}: {rate:.0f} pictures a second on one thread, reading included")


if __name__ == "__main__":
    main()
