"""A picture of where the ranks went: ACTIVE ranks of every adapted matrix over time, at the end, and in total."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peftkernels._files import write_atomically
from peftkernels.cli.report.look import LIGHT, Look, png

COLUMNS = 3
MOST_MAPS = 18
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
        position = next((i for i, part in enumerate(parts) if _is_layer(part)), None)
        if position is None:
            split.append((None, "", name))
        else:
            split.append((int(parts[position]), ".".join(parts[:position]), ".".join(parts[position + 1 :])))
    several_stacks = len({before for layer, before, _ in split if layer is not None}) > 1
    return [
        (layer, ".".join(part for part in (before if several_stacks else "", after) if part))
        for layer, before, after in split
    ]


def _is_layer(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) < 10


class RankHistory:
    """ACTIVE ranks arranged by projection and layer.

    Args:
        modules: names of the adapted modules.
        active: ACTIVE ranks, times × modules.

    Attributes:
        projections: in order of first appearance; "all modules" alone where the names give more than 18 of them.
        layers: sorted layer numbers; modules outside numbered layers come last, as None. Without projections, the
            modules' own numbers, from 0.
    """

    def __init__(self, modules: Sequence[str], active: Sequence[Sequence[int]] | np.ndarray) -> None:
        self.active = np.asarray(active, dtype=float).reshape(-1, len(modules))  # [times, modules]
        places = layers_and_projections(modules)
        # Two modules in one place would hide one another: nothing to arrange by.
        if len({projection for _, projection in places}) > MOST_MAPS or len(set(places)) < len(places):
            places = [(index, "all modules") for index in range(len(modules))]
        self.projections = list(dict.fromkeys(projection for _, projection in places))
        self.layers = sorted({layer for layer, _ in places}, key=lambda layer: (layer is None, layer or 0))
        self._column = {(projection, layer): i for i, (layer, projection) in enumerate(places)}

    @property
    def rows(self) -> str:
        """What the rows of a map are."""
        return "module" if self.projections == ["all modules"] else "layer"

    def over_time(self, projection: str) -> np.ndarray:
        """Layers × steps; NaN where a layer has no such projection."""
        missing = np.full(len(self.active), np.nan)
        rows = [self._column.get((projection, layer)) for layer in self.layers]
        return np.stack([missing if column is None else self.active[:, column] for column in rows])

    def final(self) -> np.ndarray:
        """Projections × layers after the last step."""
        return np.stack([self.over_time(projection)[:, -1] for projection in self.projections])

    def totals(self) -> np.ndarray:
        """ACTIVE ranks altogether after each step."""
        return self.active.sum(1)


def write_heatmap(
    path: Path,
    modules: Sequence[str],
    active: Sequence[Sequence[int]],
    *,
    most: int,
    title: str,
    budget: Sequence[int],
    schedule: tuple[int, int],
) -> None:
    """Draw ACTIVE ranks as a PNG: a map for each projection, the sum beside its budget, and the end.

    Args:
        path: the PNG.
        modules: names in the order of computation.
        active: ACTIVE ranks, steps × modules, in that order.
        most: ranks of a matrix at the start, the top of the colour scale.
        title: above the maps.
        budget: ranks allowed altogether after each step.
        schedule: the steps between which the budget falls.
    """
    history = RankHistory(modules, active)
    span = (0.5, len(history.active) + 0.5)

    def draw(look: Look) -> Figure:
        figure, bottom = _draw_maps(history, most, title, span)
        totals, final = bottom.subplots(1, 2, width_ratios=[1, 1.15])
        _draw_totals(totals, history, budget, schedule, look)
        _draw_final(final, history, most)
        return figure

    content = png(draw, LIGHT)
    write_atomically(path, lambda file: file.write(content))


def draw_heatmap(history: RankHistory, most: int, span: tuple[float, float]) -> Figure:
    """A map of ACTIVE ranks over time for each projection, and the end, without a title.

    Args:
        history: what is drawn.
        most: the top of the colour scale.
        span: the steps at the left and right edge of the maps; times lie evenly between them.
    """
    figure, bottom = _draw_maps(history, most, None, span)
    _draw_final(bottom.subplots(), history, most)
    return figure


def _draw_maps(history: RankHistory, most: int, title: str | None, span: tuple[float, float]) -> tuple[Figure, Any]:
    """The maps, in the upper part of a new figure; returns it and its lower part."""
    columns = min(COLUMNS, len(history.projections))
    rows = math.ceil(len(history.projections) / columns)
    map_height = min(12.0, max(1.5, 0.24 * len(history.layers) + 0.75))
    bottom_height = max(2.6, 0.36 * len(history.projections) + 1.1)
    head_height = 0.9 if title else 0.3
    figure = Figure(figsize=(12.5, rows * map_height + bottom_height + head_height), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=13)
    parts: Any = figure.subfigures(2, 1, height_ratios=[rows * map_height, bottom_height])
    top, bottom = parts
    axes = top.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for axis, projection in zip(axes.flat, history.projections, strict=False):
        image = axis.imshow(
            history.over_time(projection),
            aspect="auto",
            interpolation="nearest",
            extent=(*span, len(history.layers) - 0.5, -0.5),
            vmin=0,
            vmax=most,
            cmap=_COLOURS,
        )
        axis.set_title(projection, fontsize=10)
        _label_layers(axis, history.layers, vertical=True)
    for axis in list(axes.flat)[len(history.projections) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel(history.rows)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    assert image is not None
    bar = top.colorbar(image, ax=axes, label="ACTIVE ranks", pad=0.01, aspect=30)
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    return figure, bottom


def _draw_totals(axis: Any, history: RankHistory, budget: Sequence[int], schedule: tuple[int, int], look: Look) -> None:
    steps = np.arange(1, len(history.active) + 1)
    axis.axvspan(*schedule, color=look.band, label="budget falls")
    axis.plot(steps, history.totals(), color=look.active, linewidth=3.0, alpha=0.7, label="ACTIVE")
    axis.plot(steps, budget, color=look.budget, linestyle="--", linewidth=1.0, label="budget")
    axis.set_xlim(1, len(steps))
    axis.set_ylim(0, None)
    axis.set_title("ACTIVE ranks altogether", fontsize=10)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("ranks")
    axis.legend(loc="lower left", fontsize=9, frameon=False)


def _draw_final(axis: Any, history: RankHistory, most: int) -> None:
    final = history.final()
    axis.imshow(final, aspect="auto", interpolation="nearest", vmin=0, vmax=most, cmap=_COLOURS)
    axis.set_title("ACTIVE ranks at the end", fontsize=10)
    axis.set_yticks(range(len(history.projections)), history.projections, fontsize=9)
    axis.set_xlabel(history.rows)
    _label_layers(axis, history.layers, vertical=False)
    if final.size <= MOST_ANNOTATED and len(history.layers) <= MOST_ANNOTATED // 4:
        for (row, column), ranks in np.ndenumerate(final):
            if not np.isnan(ranks):
                colour = "white" if ranks < 0.6 * most else "black"
                axis.text(column, row, f"{ranks:.0f}", ha="center", va="center", fontsize=9, color=colour)


def _label_layers(axis: Any, layers: Sequence[int | None], *, vertical: bool) -> None:
    every = math.ceil(len(layers) / 12)
    ticks = list(range(0, len(layers), every))
    labels = ["–" if layers[i] is None else str(layers[i]) for i in ticks]
    set_ticks = axis.set_yticks if vertical else axis.set_xticks
    set_ticks(ticks, labels, fontsize=8)
