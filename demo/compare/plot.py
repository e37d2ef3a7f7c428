"""A picture of the comparison: accuracies with their intervals, and accuracy against ACTIVE ranks."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from demo.checkpoint import write_atomically
from demo.compare.contestants import BASELINE

_MARKERS = "osD^vP*X<>hp"


def write_plot(path: Path, comparison: Mapping[str, Any]) -> None:
    """Draw the content of comparison.json as a PNG."""
    rows = comparison["contestants"]
    figure = Figure(figsize=(12, max(3.6, 1.4 + 0.34 * len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    palette = colormaps["tab20"]
    colours = {name: "black" if name == BASELINE else palette(2 * i % 20 + i // 10) for i, name in enumerate(rows)}
    _draw_intervals(left, rows, colours)
    _draw_sensitivity(right, comparison, colours)
    content = BytesIO()
    # Without the version of matplotlib in it, the same figures give the same file.
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    write_atomically(path, lambda file: file.write(content.getvalue()))


def _draw_intervals(axis: Any, rows: Mapping[str, Any], colours: Mapping[str, Any]) -> None:
    for place, (name, row) in enumerate(rows.items()):
        accuracy = row["accuracy"]
        if accuracy["low"] is not None:
            axis.hlines(place, accuracy["low"], accuracy["high"], color=colours[name], linewidth=2.5, alpha=0.6)
        axis.plot([each["accuracy"] for each in row["by_seed"]], [place] * len(row["by_seed"]), "|", color="0.5")
        axis.plot(accuracy["mean"], place, "o", color=colours[name])
    axis.axvline(rows[BASELINE]["accuracy"]["mean"], color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set_xlabel("test accuracy")
    axis.set_title("mean, 95 % interval, and each seed", fontsize=10)


def _draw_sensitivity(axis: Any, comparison: Mapping[str, Any], colours: Mapping[str, Any]) -> None:
    for index, (name, row) in enumerate(comparison["sensitivity"].items()):
        marker = _MARKERS[index % len(_MARKERS)]
        usual = sorted((p["live_ranks"], p["accuracy"]) for p in row["points"] if p["delta_t"] == row["delta_t"])
        other = [(p["live_ranks"], p["accuracy"]) for p in row["points"] if p["delta_t"] != row["delta_t"]]
        axis.plot(*zip(*usual, strict=True), marker=marker, color=colours[name], label=name, linewidth=1.2)
        if other:
            axis.plot(
                *zip(*other, strict=True), marker=marker, color=colours[name], markerfacecolor="none", linestyle=""
            )
    axis.set_xlabel("ACTIVE ranks at the end")
    axis.set_ylabel("test accuracy")
    axis.set_title("filled: the ΔT compared at; hollow: another", fontsize=10)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
