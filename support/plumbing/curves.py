"""plumbing/curves.py: a run's log as pictures."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from support.formats.files import UserError, atomically, read_json
from support.plumbing.log import read_log


def draw_curves(out: Path) -> None:
    """log.jsonl as pictures: loss.png and, of a gated bridge, gates.png. Needs matplotlib."""
    from train import RECIPES
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure            # not pyplot: no window, no state shared with a caller
        from matplotlib.ticker import LogLocator
    except ImportError:
        raise UserError("curves are drawn by matplotlib, which is not installed; pip install matplotlib.") from None
    s, log = read_json(out / "config.json")["settings"], read_log(out / "log.jsonl")
    lines = [x for x in log if "loss" in x]
    if not lines:
        raise UserError(f"{out}/log.jsonl: no step is logged, so nothing can be drawn; wait for the run's first line.")
    steps, across = [x["step"] for x in lines], f"step (one update: batch of {s['batch']})"
    figures = {"loss.png": (loss := Figure((8, 5.5), layout="constrained"))}
    top, below = loss.subplots(2, sharex=True, height_ratios=(3, 1))
    top.plot(steps, [x["loss"] for x in lines], ".-", color="tab:blue", alpha=0.3, label="loss of one batch")
    top.plot(steps, [x["ema"] for x in lines], color="tab:blue", linewidth=2, label="running mean, over about 50 steps")
    for x in [x for x in log if "blind" in x][-1:]:
        top.axhline(x["blind"], color="tab:red", linestyle="--", label="blind: the decoder without images, at step 0")
    per = " per learned token" if RECIPES[s["recipe"]].task in ("answer", "lm") else ""
    top.set(ylabel=f"loss (nats{per})", yscale="log")
    top.yaxis.set(major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), major_formatter="{x:g}", minor_formatter="")
    top.legend()
    below.plot(steps, [x["lr"] for x in lines], color="tab:green")
    below.set(xlabel=across, ylabel="learning rate")
    if "gates" in lines[-1]:
        heads, layers = s["bridge"] == "zero_init", lines[-1]["layers"]
        values = np.abs([x["gates"] for x in lines])    # (lines, layers, H), or (…, attention and feed-forward)
        parts = [("attention", values)] if heads else zip(("cross-attention", "feed-forward"), np.split(values, 2, 2))
        figures["gates.png"] = gates = Figure((10, 4.2), layout="constrained")
        axes = gates.subplots(1, 2, sharey=not heads)
        for axis, (title, part) in zip(axes, parts):
            axis.set_prop_cycle(color=colormaps["viridis"](np.linspace(0, 0.9, len(layers))))
            lined = axis.plot(steps, part.mean(-1), ".-")                       # a line per layer
            axis.set(title=title, xlabel=across, ylabel="|gate|, 0 = shut" + heads * "; mean of heads", ylim=(0, None))
        gates.legend(lined, [f"layer {n}" for n in layers], loc="outside left center", ncols=1 + len(layers) // 17)
        if heads:
            rows, columns = (range(0, n, 1 + n // 16) for n in values.shape[1:])        # at most 16 numbers
            gates.colorbar(axes[1].imshow(values[-1], aspect="auto", vmin=0), label="|gate|")
            axes[1].set(title=f"after step {steps[-1]}", xlabel="head", ylabel="layer", xticks=columns, yticks=rows)
            axes[1].set_yticklabels([layers[n] for n in rows])
    for name, figure in figures.items():
        figure.suptitle(f"{out.resolve().name}: {s['bridge'] or s['recipe']} on {s['data']}")
        with atomically(out / name) as tmp:
            figure.savefig(tmp, format="png", dpi=120)
