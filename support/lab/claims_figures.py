"""lab/claims_figures.py: a picture of each claim, and a page that shows them beside the verdicts.

On the left the training losses of its arms, on the right what was measured of them, each seed a dot, one
plot for each unit.
"""
from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from support.formats.files import UserError, atomically
from support.lab.claims_list import Claim, Expectation, Number, Side
from support.lab.claims_store import Results, seed_values

if TYPE_CHECKING:
    from support.lab.claims import Setup


def draw_claims(claims: dict[str, Claim], results: Results, seeds: dict[str, int], setup: Setup,
                verdicts: dict[str, list[str]]) -> None:
    """NAME.png of each claim and REPORT.md in setup.figures. Needs matplotlib."""
    try:
        from matplotlib import figure as plots          # not pyplot: no window, no state shared with a caller
    except ImportError:
        raise UserError("figures are drawn by matplotlib, which is not installed; "
                        "pip install matplotlib.") from None
    report, folder = Path(setup.report), setup.figures
    about = (f"Made with [{report.name}](../{report.name}), whose text says more. Left: training loss, mean "
             "and range over seeds. Right: a dot for each seed, a bar at their mean, a diamond where the "
             "paper has a number of the same unit.")
    lines = [f"# {report.stem}: a figure for each claim", "", *wrap(about), "", "| claim | verdicts |",
             "|---|---|"]
    lines += [f"| [{name}](#{name}) | {', '.join(verdicts[name])} |" for name in claims]
    for name, claim in claims.items():
        figure = plots.Figure((11, 4), layout="constrained")
        units = sides_by_unit(claim)
        columns = sum(map(len, units.values()))
        widths = (1, *(0.15 + 1.65 * len(sides) / columns for sides in units.values()))
        left, *right = figure.subplots(1, len(widths), width_ratios=widths)
        arms = [arm for arm, seed in results if seed == 0 and arm in claim.arms]
        colors = {arm: f"C{n % 10}" for n, arm in enumerate(arms)}
        curves = {arm: [results[arm, seed]["curve"] for seed in range(seeds[name])] for arm in arms}
        draw_losses(left, {arm: runs for arm, runs in curves.items() if all(runs)}, colors)
        for axis, sides in zip(right, units.values()):
            draw_numbers(axis, claim, sides, results, seeds[name], colors, crowded=columns > 6)
        with atomically(folder / f"{name}.png") as tmp:
            figure.savefig(tmp, format="png", dpi=80)
        lines += ["", f"## {name}", "", *wrap(f"{claim.says} ({claim.source})"), "",
                  f"![{name}]({name}.png)", ""]
        for e, verdict in zip(claim.expect, verdicts[name]):
            paper = f" (document: {e.paper})" if e.paper else ""
            lines += wrap(f"- {verdict}: {e.left} {e.relation} {e.right}{paper}", "  ")
    with atomically(folder / f"{report.stem}.md") as tmp:
        tmp.write_text("\n".join(lines) + "\n", encoding="utf-8")


def wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 110, subsequent_indent=indent, break_long_words=False)


def draw_losses(axis, curves: dict[str, list[list[list[float]]]], colors: dict[str, str]) -> None:
    """The running means, over the steps that all seeds of an arm have logged."""
    from matplotlib.ticker import LogLocator
    for arm, runs in curves.items():
        count = min(map(len, runs))
        steps = [step for step, _ in runs[0][:count]]
        losses = np.array([[loss for _, loss in run[:count]] for run in runs])      # (seeds, lines)
        axis.plot(steps, losses.mean(0), color=colors[arm], label=arm)
        axis.fill_between(steps, losses.min(0), losses.max(0), color=colors[arm], alpha=0.2, linewidth=0)
    if curves:
        axis.set(xlabel="step", ylabel="training loss, running mean", yscale="log")
        axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    else:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "nothing is trained", ha="center", va="center")


def sides_by_unit(claim: Claim) -> dict[str, list[tuple[Side, Number]]]:
    """What the expectations compare, {unit: [(side, its number), …]}: numbers of one unit share a scale."""
    sides, units = dict.fromkeys(side for e in claim.expect for side in (e.left, e.right)), {}
    for side in sides:
        number = side.number or claim.columns[0]
        units.setdefault(number.unit, []).append((side, number))
    return units


def draw_numbers(axis, claim: Claim, sides: list[tuple[Side, Number]], results: Results, seeds: int,
                 colors: dict[str, str], crowded: bool = False) -> None:
    """A column for each side, all of one unit: its seeds, their mean and the paper's number.

    crowded: a word on each line of a name.
    """
    for n, (side, number) in enumerate(sides):
        if shown := seed_values(results, seeds, side.arm, number):
            axis.plot([n] * len(shown), shown, "o", color=colors[side.arm], alpha=0.6)
            axis.hlines(np.mean(shown), n - 0.3, n + 0.3, color=colors[side.arm])
        if (paper := papers_number(claim, side, number)) is not None:
            axis.plot([n], [paper], "D", color="0.35", fillstyle="none")
    breaks = ": |, | |(?<=-)" if crowded else ": |, "
    axis.set_xticks(range(len(sides)), [re.sub(breaks, "\n", str(side)) for side, _ in sides], fontsize=7)
    names, (_, first) = {number.name for _, number in sides}, sides[0]
    axis.set(ylabel=f"{first.name}, {first.unit}" if len(names) == 1 else first.unit,
             xlim=(-0.6, len(sides) - 0.4))


def papers_number(claim: Claim, side: Side, number: Number) -> float | None:
    """The document's number for a side: of "VQAv2 46.86, 20.61" one of the two; None where it has none."""
    for e in claim.expect:
        pair = re.fullmatch(r"[^\d]*(?:VQAv2 |CIDEr )?([\d.]+), [^\d]*([\d.]+)", e.paper)
        if pair and side in (e.left, e.right) and on_scale(e, number):
            return float(pair[1 if side == e.left else 2])
    return None


def on_scale(e: Expectation, number: Number) -> bool:
    """Accuracies stand beside accuracies. A paper's CIDEr and losses are of other words than ours."""
    return number.unit == "%" and "CIDEr" not in e.paper and "BLEU" not in e.paper
