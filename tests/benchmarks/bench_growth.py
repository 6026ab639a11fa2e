"""How the cost of a training step grows with text length, images, visual tokens and batch.

    python tests/benchmarks/bench_growth.py [--size 135m] [--dtype bfloat16] [--rounds 3]

A frozen decoder of this size with random weights and the linear bridge, on features (the ViT's part is one
more forward per image). One thing grows, the others stay at: batch 2, 64 tokens of text, 1 image of 64 visual
tokens. Each point is a process of its own: median seconds of a step, and peak of resident memory above what
the model itself takes. Exponent p of cost ∝ x^p: least squares on the logarithms of the upper three points,
where constants matter least. A table to read first, one line of JSON last.
"""
from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
from bench_speed import SIZES, resident                                         # noqa: E402  (after the path)
from papers import make_bridge                                                 # noqa: E402
from model import Decoder, DecoderConfig, IGNORE, IMAGE, VLM, ViT, ViTConfig    # noqa: E402

START = dict(batch=2, text=64, images=1, visual=64)
AXES = {"text": (64, 128, 256, 512, 1024), "images": (1, 2, 4, 8), "visual": (64, 128, 256, 512, 1024),
        "batch": (1, 2, 4, 8)}
BOUND = {               # what bounds it, from the operations of a step
    "text": "the decoder's matrices (linear) until T nears 6 D; then attention's scores (quadratic)",
    "images": "as text: an image is K more positions",
    "visual": "as text",
    "batch": "the decoder's matrices; memory: activations kept for the backward pass",
}


def point(a, batch: int, text: int, images: int, visual: int) -> dict:
    """Seconds and MB of a step at this size."""
    (L, D, H, G, hidden, V), (_, _, Di, *_) = SIZES[a.size]
    torch.manual_seed(0)
    dtype = getattr(torch, a.dtype)
    config = DecoderConfig(vocab_size=V, width=D, layers=L, heads=H, kv_heads=G, head_width=D // H,
                           hidden=hidden, tied=True)
    decoder = Decoder(config).to(dtype)
    vit = ViT(ViTConfig(width=Di, layers=1, heads=4, hidden=64))
    vlm = VLM(vit, make_bridge("linear", config, Di), decoder).train()
    vlm.vit.requires_grad_(False)
    decoder.requires_grad_(False)
    tokens = torch.randint(0, V, (batch, text))
    tokens[:, :images] = IMAGE
    labels = tokens.masked_fill(torch.arange(text) < text - 16, IGNORE)
    features = torch.randn(batch * images, visual, Di, dtype=dtype)
    parameters, before, seconds = list(vlm.bridge.parameters()), resident("VmRSS"), []
    for _ in range(1 + a.rounds):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            total, count = vlm.loss(tokens, labels, features=features)
        (total / count).backward()
        for p in parameters:
            p.grad = None
        seconds.append(time.perf_counter() - start)
    return dict(seconds=statistics.median(seconds[1:]), mb=resident("VmHWM") - before)


def exponent(xs, ys) -> float:
    """Least squares of log y on log x over the last three points."""
    xs, ys = ([math.log(v) for v in values[-3:]] for values in (xs, ys))
    mx, my = statistics.mean(xs), statistics.mean(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--size", choices=SIZES, default="135m")
    args.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    args.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    a = args.parse_args()
    if a.point:
        return print(json.dumps(point(a, **a.point)))
    flags, rows = [f"--size={a.size}", f"--dtype={a.dtype}", f"--rounds={a.rounds}"], {}
    print(f"{a.size}, {a.dtype}, {torch.get_num_threads()} threads; seconds of a step, MB above the model; "
          f"else {START}\n")
    for axis in a.axes:
        points = []
        for x in AXES[axis]:
            sizes = START | {axis: x} | ({"text": 80} if axis == "images" else {})
            argv = [sys.executable, __file__, *flags, "--point", json.dumps(sizes)]
            output = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
            points.append(json.loads(output.splitlines()[-1]))
        p, q = (exponent(AXES[axis], [point[k] for point in points]) for k in ("seconds", "mb"))
        rows[axis] = dict(x=AXES[axis], points=points, time_exponent=p, memory_exponent=q)
        print(f"{axis:8s}" + "".join(f"{x:>8d}" for x in AXES[axis]) + "   exponent")
        seconds = "".join(f"{point['seconds']:8.2f}" for point in points)
        megabytes = "".join(f"{point['mb']:8.0f}" for point in points)
        print(f"{'seconds':>8s}{seconds}{p:8.2f}   {BOUND[axis]}")
        print(f"{'MB':>8s}{megabytes}{q:8.2f}", flush=True)
    print("\n" + json.dumps(dict(size=a.size, dtype=a.dtype, rows=rows)))


if __name__ == "__main__":
    main()
