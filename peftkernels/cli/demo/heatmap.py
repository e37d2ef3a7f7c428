"""A picture of where the ranks went: live ranks of every adapted matrix over time, at the end, and in total."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from peftkernels.cli.demo.checkpoint import write_atomically

COLUMNS = 3
MOST_ANNOTATED = 200
_COLOURS = "viridis"


def layers_and_projections(names: Sequence[str]) -> list[tuple[int | None, str]]:
    """Split each module's name at its first number: "encoder.layer.3.output.dense" is layer 3, "output.dense".

    What stands before the number becomes part of the projection where it differs between modules, as in models with an
    encoder and a decoder. A name without a number has no layer.
    """
    split: list[tuple[int | None, str, str]] = []
    for name in names:
        parts = name.split(".")
        position = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if position is None:
            split.append((None, "", name))
        else:
            split.append((int(parts[position]), ".".join(parts[:position]), ".".join(parts[position + 1 :])))
    several_stacks = len({before for layer, before, _ in split if layer is not None}) > 1
    return [
        (layer, ".".join(part for part in (before if several_stacks else "", after) if part))
        for layer, before, after in split
    ]


class RankHistory:
    """Live ranks arranged by projection and layer.

    Args:
        modules: names of the adapted modules.
        live: live ranks, steps × modules.

    Attributes:
        projections: in order of first appearance.
        layers: sorted layer numbers; modules outside numbered layers come last, as None.
    """

    def __init__(self, modules: Sequence[str], live: Sequence[Sequence[int]]) -> None:
        self.live = np.asarray(live, dtype=float)  # [steps, modules]
        places = layers_and_projections(modules)
        self.projections = list(dict.fromkeys(projection for _, projection in places))
        self.layers = sorted({layer for layer, _ in places}, key=lambda layer: (layer is None, layer or 0))
        self._column = {(projection, layer): i for i, (layer, projection) in enumerate(places)}

    def over_time(self, projection: str) -> np.ndarray:
        """Layers × steps; NaN where a layer has no such projection."""
        missing = np.full(len(self.live), np.nan)
        rows = [self._column.get((projection, layer)) for layer in self.layers]
        return np.stack([missing if column is None else self.live[:, column] for column in rows])

    def final(self) -> np.ndarray:
        """Projections × layers after the last step."""
        return np.stack([self.over_time(projection)[:, -1] for projection in self.projections])

    def totals(self) -> np.ndarray:
        """Live ranks altogether after each step."""
        return self.live.sum(1)


def write_heatmap(
    path: Path,
    modules: Sequence[str],
    live: Sequence[Sequence[int]],
    *,
    most: int,
    title: str,
    budget: Sequence[int],
    schedule: tuple[int, int],
) -> None:
    """Draw live ranks as a PNG.

    Args:
        modules: names in the order of computation, as in ``live`` (steps × modules).
        most: ranks of a matrix at the start, the top of the colour scale.
        budget: ranks allowed altogether after each step.
        schedule: the steps between which the budget falls.
    """
    history = RankHistory(modules, live)
    columns = min(COLUMNS, len(history.projections))
    rows = math.ceil(len(history.projections) / columns)
    map_height = max(1.5, 0.24 * len(history.layers) + 0.75)
    bottom_height = max(2.6, 0.36 * len(history.projections) + 1.1)
    figure = Figure(figsize=(12.5, rows * map_height + bottom_height + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=13)
    parts: Any = figure.subfigures(2, 1, height_ratios=[rows * map_height, bottom_height])
    top, bottom = parts
    colours = {"vmin": 0, "vmax": most, "cmap": _COLOURS}

    axes = top.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for axis, projection in zip(axes.flat, history.projections, strict=False):
        image = axis.imshow(
            history.over_time(projection),
            aspect="auto",
            interpolation="nearest",
            extent=(0.5, len(history.live) + 0.5, len(history.layers) - 0.5, -0.5),
            **colours,
        )
        axis.set_title(projection, fontsize=10)
        _label_layers(axis, history.layers, vertical=True)
    for axis in list(axes.flat)[len(history.projections) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("layer")
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    assert image is not None
    bar = top.colorbar(image, ax=axes, label="live ranks", pad=0.01, aspect=30)
    bar.ax.yaxis.get_major_locator().set_params(integer=True)

    totals, final = bottom.subplots(1, 2, width_ratios=[1, 1.15])
    _draw_totals(totals, history, budget, schedule)
    _draw_final(final, history, colours)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=130)
    write_atomically(path, lambda file: file.write(content.getvalue()))


def _draw_totals(axis: Any, history: RankHistory, budget: Sequence[int], schedule: tuple[int, int]) -> None:
    steps = np.arange(1, len(history.live) + 1)
    axis.axvspan(*schedule, color="0.93", label="budget falls")
    axis.plot(steps, history.totals(), color="tab:blue", linewidth=3.0, alpha=0.7, label="live")
    axis.plot(steps, budget, color="black", linestyle="--", linewidth=1.0, label="budget")
    axis.set_xlim(1, len(steps))
    axis.set_ylim(0, None)
    axis.set_title("live ranks altogether", fontsize=10)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("ranks")
    axis.legend(loc="lower left", fontsize=9, frameon=False)


def _draw_final(axis: Any, history: RankHistory, colours: dict[str, Any]) -> None:
    final = history.final()
    axis.imshow(final, aspect="auto", interpolation="nearest", **colours)
    axis.set_title("live ranks at the end", fontsize=10)
    axis.set_yticks(range(len(history.projections)), history.projections, fontsize=9)
    axis.set_xlabel("layer")
    _label_layers(axis, history.layers, vertical=False)
    if final.size <= MOST_ANNOTATED:
        for (row, column), ranks in np.ndenumerate(final):
            if not np.isnan(ranks):
                colour = "white" if ranks < 0.6 * colours["vmax"] else "black"
                axis.text(column, row, f"{ranks:.0f}", ha="center", va="center", fontsize=9, color=colour)


def _label_layers(axis: Any, layers: Sequence[int | None], *, vertical: bool) -> None:
    every = math.ceil(len(layers) / 12)
    ticks = list(range(0, len(layers), every))
    labels = ["–" if layers[i] is None else str(layers[i]) for i in ticks]
    set_ticks = axis.set_yticks if vertical else axis.set_xticks
    set_ticks(ticks, labels, fontsize=8)
