"""The comparison's tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.compare.contestants import BASELINE
from demo.compare.words import findings, points
from demo.timing import FROZEN


def columns(comparison: Mapping[str, Any]) -> list[str]:
    """Headings of `cells`."""
    level = comparison["contestants"][BASELINE]["loss_level"]
    return [
        "test accuracy (95 %)",
        f"against {BASELINE}, points (95 %)",
        "ms per step",
        "× frozen step (quartiles)",
        "ranks, ACTIVE / all",
        "parameters, ACTIVE / trainable",
        f"steps to loss {level:.2f}",
        "mean loss",
        "learning rate, scale",
    ]


def cells(comparison: Mapping[str, Any], name: str) -> list[str]:
    """A contestant's figures as text."""
    row, chosen = comparison["contestants"][name], comparison["tuning"][name]["chosen"]
    accuracy = row["accuracy"]
    bounds = "" if accuracy["low"] is None else f" ({accuracy['low']:.3f}–{accuracy['high']:.3f})"
    seeds, reached = len(row["by_seed"]), row["reached_level"]
    steps = "not reached" if row["steps_to_level"] is None else f"{row['steps_to_level']:.0f}"
    if 0 < reached < seeds:
        steps += f" ({reached} of {seeds})"
    return [
        f"{accuracy['mean']:.3f}{bounds}",
        points(row["difference"]).replace(" points", ""),
        f"{row['step_milliseconds']:.0f}",
        f"{row['step_ratio']:.2f} ({row['step_ratio_p25']:.2f}–{row['step_ratio_p75']:.2f})",
        f"{row['live_ranks']} / {row['total_ranks']}",
        f"{row['live_parameters']:,} / {row['trainable_parameters']:,}",
        steps,
        f"{row['mean_loss']['mean']:.3f}",
        f"{chosen['learning_rate']:.2g}, {chosen['scale']:.2g}",
    ]


def sensitivity_columns(comparison: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The points (target_rank, delta_t) of the sensitivity grid."""
    points = {
        (point["target_rank"], point["delta_t"])
        for row in comparison["sensitivity"].values()
        for point in row["points"]
    }
    return sorted(points, key=lambda point: (point[1], point[0]))


def sensitivity_cells(comparison: Mapping[str, Any], name: str) -> list[str]:
    """A contestant's accuracy at every point, then the largest differences over target_rank and over delta_t."""
    row = comparison["sensitivity"][name]
    accuracies = {(point["target_rank"], point["delta_t"]): f"{point['accuracy']:.3f}" for point in row["points"]}
    ranges = [row["range_over_target_rank"], row["range_over_delta_t"]]
    return [
        *(accuracies.get(point, "") for point in sensitivity_columns(comparison)),
        *("" if value is None else f"{100 * value:.1f}" for value in ranges),
    ]


def print_comparison(console: Console, comparison: Mapping[str, Any]) -> None:
    """Both tables, and the findings."""
    design, arguments = comparison["design"], comparison["arguments"]
    table = Table(
        title=f"rank allocation at equal budget: {arguments['--steps']} steps of {arguments['--batch-size']}, "
        f"{design['initial_rank']} → {design['target_rank']} ranks a matrix",
        title_justify="left",
    )
    table.add_column("strategy")
    for heading in columns(comparison):
        table.add_column(heading, justify="right")
    frozen = comparison["timing"]["contestants"][FROZEN]
    table.add_row("frozen, forward + backward", "", "", f"{frozen['milliseconds']:.0f}", "1.00", "", "", "", "", "")
    for name in comparison["contestants"]:
        table.add_row(name, *cells(comparison, name))
    console.print(table)
    seeds = next(iter(comparison["sensitivity"].values()))["seeds"]
    grid = Table(title=f"accuracy at (target_r, ΔT), {seeds} seed{'s' if seeds > 1 else ''}", title_justify="left")
    grid.add_column("strategy")
    headings = [f"{rank}, {delta}" for rank, delta in sensitivity_columns(comparison)]
    for heading in [*headings, "range over target_r, points", "range over ΔT, points"]:
        grid.add_column(heading, justify="right")
    for name in comparison["sensitivity"]:
        grid.add_row(name, *sensitivity_cells(comparison, name))
    console.print(grid)
    for sentence in findings(comparison):
        console.print(f"- {sentence}", highlight=False, markup=False)
