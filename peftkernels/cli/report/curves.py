"""The pictures of a run beside the heatmap: budget and threshold, churn, and several runs together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peftkernels.cli.report.history import History
from peftkernels.cli.report.look import Look

_WIDTH = 12.5
_MOST_BARS = 300
_MOST_NAMED = 24


def draw_budget(history: History, losses: tuple[Sequence[int], Sequence[float]], look: Look) -> Figure:
    """ACTIVE ranks beside the budget, the threshold on a logarithmic axis, and the loss where it is known."""
    log = history.log
    panels = 2 + bool(losses[0])
    figure = Figure(figsize=(_WIDTH, 0.5 + 2.5 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=[1.25] + [1.0] * (panels - 1))[:, 0]
    begin, end = log.first_step, max(log.last_step, log.first_step + 1)

    steps = np.concatenate([[begin], log.steps, [end]])
    spent = np.concatenate([[history.spent_at_first], history.spent])
    if log.first_step > 0 and len(history.spent):
        # What was ACTIVE before the log began is not known.
        spent[0] = spent[1]
    axes[0].step(
        steps, np.concatenate([spent, spent[-1:]]), where="post", color=look.active, linewidth=2.6, label="ACTIVE"
    )
    if len(log.steps):
        axes[0].step(
            log.steps, log.budgets, where="post", color=look.budget, linestyle="--", linewidth=1.2, label="budget"
        )
    axes[0].set_ylim(0, None)
    axes[0].set_ylabel(log.unit)
    axes[0].set_title("budget, and what the ACTIVE ranks take of it", fontsize=10, loc="left")

    _draw_thresholds(axes[1], history, look)
    if losses[0]:
        axes[2].plot(*losses, color=look.text, linewidth=1.2)
        axes[2].set_title("loss", fontsize=10, loc="left")
    axes[0].set_xlim(begin, end)
    _finish(list(axes), history, look)
    return figure


def _draw_thresholds(axis: Any, history: History, look: Look) -> None:
    axis.set_title("threshold: scores at or below it are masked", fontsize=10, loc="left")
    axis.set_ylabel("score")
    drawn = False
    for index, (group, values) in enumerate(history.thresholds.items()):
        shown = np.isfinite(values) & (values > 0)
        if shown.any():
            colour = look.revived if group == "" else look.others[index % len(look.others)]
            label = group or None
            steps = history.log.steps[shown]
            axis.plot(steps, values[shown], color=colour, linewidth=1.8, marker=".", markersize=3, label=label)
            drawn = True
    if drawn:
        axis.set_yscale("log")
    else:
        _say_nothing(axis, "no threshold above zero")
    if 1 < len(history.thresholds) <= _MOST_NAMED and drawn:
        axis.legend(fontsize=9, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=6)


def draw_churn(history: History, look: Look) -> Figure:
    """Ranks masked and brought back at each decision; where there are many, sums over neighbouring ones."""
    figure = Figure(figsize=(_WIDTH, 2.8), layout="constrained")
    axis = figure.subplots()
    steps, parts = history.log.steps, max(1, -(-len(history.log.steps) // _MOST_BARS))
    if len(steps):
        first = np.arange(0, len(steps), parts)
        masked, revived = (np.add.reduceat(values, first) for values in (history.masked, history.revived))
        width = 0.8 * (np.diff(steps[first]).min() if len(first) > 1 else 1)
        axis.bar(steps[first], -masked, width, color=look.masked, label="masked")
        axis.bar(steps[first], revived, width, color=look.revived, label="brought back")
        axis.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
    else:
        _say_nothing(axis, "no decision yet")
    axis.axhline(0, color=look.text, linewidth=0.8)
    axis.set_xlim(history.log.first_step, max(history.log.last_step, history.log.first_step + 1))
    axis.set_ylabel("ranks")
    over = "each decision" if parts == 1 else f"every {parts} decisions"
    axis.set_title(f"churn: ranks that changed state at {over}", fontsize=10, loc="left")
    _finish([axis], history, look)
    return figure


def draw_together(histories: dict[str, History], look: Look) -> Figure:
    """ACTIVE ranks of several runs over their steps, as shares of their ranks at the start."""
    figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
    axis = figure.subplots()
    for index, (name, history) in enumerate(histories.items()):
        active, (left, right) = history.over_time()
        colour = look.others[index % len(look.others)]
        # Runs under one schedule lie upon one another: the later ones show through as dashes.
        style = ("-", (0, (4, 4)), (2, (2, 6)), (0, (1, 5)))[index % 4]
        times = np.linspace(left, right, len(active) + 1)[:-1]
        share = 100 * active.sum(1) / history.log.total_ranks
        axis.step(times, share, where="post", color=colour, linestyle=style, linewidth=1.8, label=name)
    axis.set_ylim(0, 104)
    axis.set_ylabel("ACTIVE ranks, %")
    axis.set_xlabel("optimizer step")
    axis.grid(visible=True, linewidth=0.6)
    axis.set_title("ACTIVE ranks, as a share of those at the start", fontsize=10, loc="left")
    axis.legend(fontsize=8, frameon=False, ncols=2 if len(histories) > 6 else 1, loc="lower left")
    return figure


def _finish(axes: Sequence[Any], history: History, look: Look) -> None:
    """Grid, marks at what happened, legend, label of the last axis."""
    marks = {
        "skipped": (look.masked, ":", 1.0),
        "frozen": (look.active, "-.", 1.0),
        "rollback": (look.trouble, "-", 1.4),
    }
    for axis in axes:
        axis.grid(visible=True, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for kind, (colour, style, width) in marks.items():
            for position, step in enumerate(sorted({event.step for event in history.events(kind)})):
                label = kind if position == 0 else None
                axis.axvline(step, color=colour, linestyle=style, linewidth=width, alpha=0.8, label=label, zorder=0.5)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=9, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=5)
    axes[-1].set_xlabel("optimizer step")


def _say_nothing(axis: Any, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", fontsize=10)
    axis.set_yticks([])
