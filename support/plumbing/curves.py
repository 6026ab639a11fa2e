"""plumbing/curves.py: a run's log as pictures."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from support.formats.files import UserError, atomically, read_json
from support.plumbing.log import read_log


def draw_curves(out: Path, per_token: bool = True) -> list[Path]:
    """log.jsonl as pictures: loss.png and, of a gated bridge, gates.png. Needs matplotlib.

    per_token: whether the loss is a mean over learned tokens, which its axis then says.
    """
    try:
        from matplotlib import figure as plots          # not pyplot: no window, no state shared with a caller
    except ImportError:
        raise UserError("curves are drawn by matplotlib, which is not installed; "
                        "pip install matplotlib.") from None
    s, log = read_json(out / "config.json")["settings"], read_log(out / "log.jsonl")
    lines = [x for x in log if "loss" in x]
    if not lines:
        raise UserError(f"{out}/log.jsonl: no step is logged, so nothing can be drawn; "
                        "wait for the run's first line.")
    blind = [x["blind"] for x in log if "blind" in x]
    xlabel = f"step (one update: batch of {s['batch']})"
    figures = {"loss.png": plots.Figure((8, 5.5), layout="constrained")}
    draw_loss(figures["loss.png"], lines, blind, per_token, xlabel)
    if "gates" in lines[-1]:
        figures["gates.png"] = plots.Figure((10, 4.2), layout="constrained")
        draw_gates(figures["gates.png"], lines, xlabel)
    for name, figure in figures.items():
        figure.suptitle(f"{out.resolve().name}: {s['bridge'] or s['recipe']} on {s['data']}")
        with atomically(out / name) as tmp:
            figure.savefig(tmp, format="png", dpi=120)
    return [out / name for name in figures]


def draw_loss(figure, lines: list[dict], blind: list[float], per_token: bool, xlabel: str) -> None:
    """Above: loss of each logged batch, running mean, the blind loss. Below: the learning rate."""
    from matplotlib.ticker import LogLocator
    steps = [x["step"] for x in lines]
    top, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    top.plot(steps, [x["loss"] for x in lines], ".-", color="tab:blue", alpha=0.3, label="loss of one batch")
    top.plot(steps, [x["ema"] for x in lines], color="tab:blue", linewidth=2,
             label="running mean, over about 50 steps")
    for value in blind[-1:]:
        top.axhline(value, color="tab:red", linestyle="--",
                    label="blind: the decoder without images, at step 0")
    top.set(ylabel=f"loss (nats{' per learned token' if per_token else ''})", yscale="log")
    top.yaxis.set(major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), major_formatter="{x:g}",
                  minor_formatter="")
    top.legend()
    below.plot(steps, [x["lr"] for x in lines], color="tab:green")
    below.set(xlabel=xlabel, ylabel="learning rate")


def draw_gates(figure, lines: list[dict], xlabel: str) -> None:
    """|gate| per layer over the steps.

    Gates of heads, (layers, heads): their mean, and each of them at the end. Gates of inserted blocks,
    (layers, 2·n): n of the cross-attention on the left, n of the feed-forward on the right.
    """
    from matplotlib import colormaps
    layers, values = lines[-1]["layers"], np.abs([x["gates"] for x in lines])   # (lines, layers, n)
    per_head = lines[-1].get("per_head", values.shape[2] != 2)                  # older logs do not say it
    titles = ["attention"] if per_head else ["cross-attention", "feed-forward"]
    axes = figure.subplots(1, 2, sharey=not per_head)
    for axis, title, part in zip(axes, titles, np.split(values, len(titles), 2)):
        axis.set_prop_cycle(color=colormaps["viridis"](np.linspace(0, 0.9, len(layers))))
        drawn = axis.plot([x["step"] for x in lines], part.mean(-1), ".-")      # a line per layer
        axis.set(title=title, xlabel=xlabel, ylim=(0, None),
                 ylabel="|gate|, 0 = shut" + ("; mean of heads" if per_head else ""))
    figure.legend(drawn, [f"layer {n}" for n in layers], loc="outside left center",
                  ncols=1 + len(layers) // 17)
    if per_head:
        rows, columns = (range(0, n, 1 + n // 16) for n in values.shape[1:])    # at most 16 numbers
        figure.colorbar(axes[1].imshow(values[-1], aspect="auto", vmin=0), label="|gate|")
        axes[1].set(title=f"after step {lines[-1]['step']}", xlabel="head", ylabel="layer", xticks=columns,
                    yticks=rows)
        axes[1].set_yticklabels([layers[n] for n in rows])
