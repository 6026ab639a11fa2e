"""How long own data takes to open, and how much memory: python tests/benchmarks/bench_own_data.py FOLDER.

Writes pictures of 64 x 64 pixels (JPEG, about 2 KB) with short captions into FOLDER, as a folder of pictures
with texts beside them and as tar and parquet shards of 10,000 records, and opens each in a process of its
own. Prints the table of support/results/own_data.md. Seconds are of the processor, so a busy machine counts.
"""
from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[2]
MEASURE = """
import json, resource, sys, time
from support.worlds import open_data
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
start, before = time.process_time(), memory()
world = open_data(sys.argv[1])
opened, opening = time.process_time() - start, memory()
times = []
for n in range(10):
    start = time.process_time()
    items = [world.item(i) for i in range(64 * n, 64 * n + 64)]
    times.append(time.process_time() - start)
print(json.dumps([opened, times[0], sorted(times)[5], opening - before, memory() - before]))
"""


def write_records(kind: str, folder: Path, numbers: range) -> None:
    rng = np.random.default_rng(numbers.start)
    rows = []
    for i in numbers:
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8)).resize((64, 64)).save(file, "jpeg")
        rows.append((i, file.getvalue(), f"thing number {i}"))
    name = folder / f"{numbers.start // 10_000:05d}"
    if kind == "folder":
        name.mkdir(parents=True)
        for i, picture, text in rows:
            (name / f"{i}.jpg").write_bytes(picture)
            (name / f"{i}.txt").write_text(text)
    elif kind == "parquet":
        table = [{"image": {"bytes": picture, "path": f"{i}.jpg"}, "text": text} for i, picture, text in rows]
        pq.write_table(pa.Table.from_pylist(table), f"{name}.parquet", row_group_size=1000)
    else:
        with tarfile.open(f"{name}.tar", "w") as tar:
            for i, picture, text in rows:
                for ending, content in (("jpg", picture), ("txt", text.encode())):
                    member = tarfile.TarInfo(f"{i:09d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def main(out: Path) -> None:
    print("| kind | records | opening | first batch | a later batch | memory: opening | and 640 items |")
    print("|---|---|---|---|---|---|---|")
    for kind in ("folder", "wds", "parquet"):
        for count in (1_000, 10_000, 100_000):
            folder = out / f"{kind}-{count}"
            if not folder.exists():
                folder.mkdir(parents=True)
                for start in range(0, count, 10_000):
                    write_records(kind, folder, range(start, min(count, start + 10_000)))
            done = subprocess.run([sys.executable, "-c", MEASURE, f"{kind}:{folder}"], cwd=ROOT,
                                  capture_output=True, text=True, check=True)
            opened, first, later, opening, memory = json.loads(done.stdout)
            print(f"| `{kind}:` | {count:,} | {opened:.1f} s | {first:.2f} s | {later:.2f} s "
                  f"| {opening:.0f} MB | {memory:.0f} MB |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
