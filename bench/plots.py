"""Plots of the results: what an adapter costs beside the frozen layer, as one thing grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, NullLocator

from bench import lineup
from bench.cases import (
    DEAD,
    GROUPS,
    GROWTH_RANKS,
    GROWTH_TOKENS,
    LIVE_SHARES,
    MIDDLE,
    MIDDLE_TOKENS,
    PASSES,
    PROBE,
    Case,
)
from bench.results import CPU, Row
from peftkernels._files import write_atomically

# Colours of Okabe and Ito, told apart with every kind of colour vision; markers say the same once more.
STYLES: dict[str, tuple[str, str]] = {
    lineup.OURS: ("#0072B2", "o"),
    lineup.OURS_ADALORA: ("#0072B2", "o"),
    lineup.OURS_LORA: ("#56B4E9", "^"),
    lineup.FLOOR: ("#999999", "v"),
    lineup.EAGER: ("#E69F00", "s"),
    lineup.PEFT_LORA: ("#D55E00", "D"),
    lineup.PEFT_ADALORA: ("#CC79A7", "P"),
    lineup.PEFT_ALLOCATOR: ("#CC79A7", "P"),
    lineup.COMPILED: ("#009E73", "X"),
    lineup.PEFT_LORA_BF16: ("#D55E00", "D"),
    lineup.PEFT_LORA_FP32: ("#882255", "d"),
    lineup.PEFT_ADALORA_BF16: ("#CC79A7", "P"),
    lineup.PEFT_ADALORA_FP32: ("#AA4499", "p"),
    lineup.HALF_RANK: ("#000000", "*"),
}
_SIZE = (11.0, 4.4)
# On a logarithmic axis the labels of all of GROWTH_TOKENS would run into each other.
GROWTH_TOKENS_SHOWN = (1, 4, 16, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True)
class Plot:
    """A picture that was drawn."""

    path: Path
    title: str


@dataclass(frozen=True)
class Line:
    """Points of one contestant: x, value, quartiles."""

    label: str
    style: tuple[str, str]
    points: Sequence[tuple[float, float, float, float]]
    dashes: str = "-"


class RatioLines:
    """Rows as lines of a plot."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {(row.id, row.contestant): row for row in rows}

    def line(self, name: str, cases: Sequence[tuple[float, Case]], label: str = "", dashes: str = "-") -> Line:
        """The contestant's ratio to the frozen layer over x."""
        points = []
        for x, case in cases:
            row = self._rows.get((case.id, name))
            if row is not None and row.ratio is not None:
                assert row.ratio_p25 is not None and row.ratio_p75 is not None
                points.append((x, row.ratio, row.ratio_p25, row.ratio_p75))
        return Line(label or name, STYLES[name], points, dashes)

    def milliseconds(self, name: str, cases: Sequence[tuple[float, Case]]) -> Line:
        """The contestant's time over x."""
        found = [(x, self._rows.get((case.id, name))) for x, case in cases]
        points = [(x, row.median_us / 1e3, row.p20_us / 1e3, row.p80_us / 1e3) for x, row in found if row is not None]
        return Line(name, STYLES[name], points)


def draw_all(rows: Sequence[Row], folder: Path, prefix: str = "") -> list[Plot]:
    """Every plot that `rows` has at least two points of a line for, as PNG files in `folder`."""
    found = RatioLines(rows)
    note = provenance(rows)
    drawers: list[Callable[[RatioLines, Path, str], Plot | None]] = [_tokens, _rank, _live, _modules]
    folder.mkdir(parents=True, exist_ok=True)
    plots = [draw(found, folder / f"{prefix}{name}.png", note) for name, draw in zip(_NAMES, drawers, strict=True)]
    return [plot for plot in plots if plot is not None]


_NAMES = ("ratio-against-tokens", "ratio-against-rank", "ratio-against-active-share", "growth-with-modules")


def provenance(rows: Sequence[Row]) -> str:
    """Machine, versions, days and commits of the rows, in one line."""

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(getattr(row, name)) for row in rows}))

    host = f"{all_of('processor')}, {all_of('threads')} threads"
    return (
        f"{host if all_of('device') == CPU else all_of('device')}, torch {all_of('torch')}, peft {all_of('peft')}, "
        f"{all_of('date')}, commit {all_of('commit')}"
    )


def _layer(direction: str, **fields: Any) -> Case:
    case = Case(direction=direction, K=MIDDLE[0], N=MIDDLE[1], M=MIDDLE_TOKENS)
    return replace(case, **fields)


_PEERS = (lineup.OURS, lineup.FLOOR, lineup.EAGER, lineup.PEFT_LORA, lineup.PEFT_ADALORA, lineup.COMPILED)
_WIDTH = f"{MIDDLE[0]}×{MIDDLE[1]}"


def _tokens(rows: RatioLines, path: Path, note: str) -> Plot | None:
    panels = []
    for direction in PASSES:
        cases = [(float(m), _layer(direction, M=m)) for m in GROWTH_TOKENS]
        panels.append((direction, [rows.line(name, cases) for name in _PEERS]))
    title = f"Cost of a LoRA layer against rows of x ({_WIDTH}, r = 16, fp32)"
    return draw_ratios(path, title, note, panels, "rows of x (tokens)", GROWTH_TOKENS_SHOWN)


def _rank(rows: RatioLines, path: Path, note: str) -> Plot | None:
    panels = []
    for direction in PASSES:
        cases = [(float(r), _layer(direction, r=r)) for r in GROWTH_RANKS]
        panels.append((direction, [rows.line(name, cases) for name in _PEERS if name != lineup.COMPILED]))
    title = f"Cost of a LoRA layer against its rank ({_WIDTH}, {MIDDLE_TOKENS} rows, fp32)"
    return draw_ratios(path, title, note, panels, "rank", GROWTH_RANKS)


def _live(rows: RatioLines, path: Path, note: str) -> Plot | None:
    panels = []
    for direction in PASSES:
        probe = [(float(share), _layer(direction, live=share, masking=PROBE)) for share in LIVE_SHARES]
        # All ranks ACTIVE is the same layer with either masking.
        dead = [probe[0], *((float(s), _layer(direction, live=s, masking=DEAD)) for s in LIVE_SHARES[1:])]
        panels.append(
            (
                direction,
                [
                    rows.line(lineup.OURS, probe, f"{lineup.OURS}, others {PROBE}"),
                    rows.line(lineup.OURS, dead, f"{lineup.OURS}, others {DEAD}", "--"),
                    rows.line(lineup.HALF_RANK, [(50.0, _layer(direction, live=50, masking=DEAD))]),
                    rows.line(lineup.FLOOR, dead, f"{lineup.FLOOR}, others {DEAD}", "--"),
                    rows.line(lineup.PEFT_ADALORA, probe, f"{lineup.PEFT_ADALORA}, gates set to zero"),
                ],
            )
        )
    title = f"Cost of an AdaLoRA layer against the share of ACTIVE ranks ({_WIDTH}, {MIDDLE_TOKENS} rows, r = 16, fp32)"
    return draw_ratios(path, title, note, panels, "ACTIVE ranks, %", LIVE_SHARES, logarithmic=False)


def _modules(rows: RatioLines, path: Path, note: str) -> Plot | None:
    steps = sorted((float(case.modules), case) for case in GROUPS["modules"])
    allocators = [(float(case.modules), case) for case in GROUPS["allocator"]]
    names = (lineup.OURS_LORA, lineup.OURS_ADALORA, lineup.PEFT_LORA, lineup.PEFT_ADALORA)
    left = [rows.line(name, steps) for name in names]
    right = [rows.milliseconds(name, allocators) for name in (lineup.OURS, lineup.PEFT_ALLOCATOR)]
    if not any(len(line.points) > 1 for line in (*left, *right)):
        return None
    figure, (one, two) = pyplot.subplots(1, 2, figsize=_SIZE, layout="constrained")
    _draw_lines(one, left)
    _draw_frozen(one)
    _frame(one, "a training step of MiniLM, 1024 tokens", "modules with an adapter", "time / frozen step")
    one.set_xticks([x for x, _ in steps])
    _draw_lines(two, right)
    _frame(two, "one step of rank allocation, 768×768, r = 12", "modules", "milliseconds")
    two.set_xticks([x for x, _ in allocators])
    two.set_ylim(bottom=0)
    for axes in (one, two):
        axes.legend(framealpha=1, edgecolor="none", fontsize=8)
    return _save(figure, path, "Cost against the number of adapted modules", note)


def draw_ratios(
    path: Path,
    title: str,
    note: str,
    panels: Sequence[tuple[str, Sequence[Line]]],
    x_label: str,
    ticks: Sequence[int],
    *,
    logarithmic: bool = True,
) -> Plot | None:
    """A panel of ratios to the frozen layer for each of `panels`; None where no line has two points."""
    if not any(len(line.points) > 1 for _, lines in panels for line in lines):
        return None
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=_SIZE, layout="constrained", sharey=True)
    for axes, (direction, lines) in zip(all_axes, panels, strict=True):
        _draw_lines(axes, lines)
        _draw_frozen(axes)
        label = "time / frozen layer" if axes is all_axes[0] else ""
        _frame(axes, direction.replace("+", " + "), x_label, label)
        if logarithmic:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xticks(ticks)
        axes.tick_params(axis="x", labelsize=8)
    handles, labels = all_axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8.5, handlelength=3)
    return _save(figure, path, title, note)


def _draw_lines(axes: Any, lines: Sequence[Line]) -> None:
    for line in lines:
        if not line.points:
            continue
        x, y, low, high = zip(*sorted(line.points), strict=True)
        colour, marker = line.style
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        size = 9 if marker == "*" else 5
        axes.plot(x, y, line.dashes, color=colour, marker=marker, markersize=size, linewidth=1.6, label=line.label)


def _draw_frozen(axes: Any) -> None:
    axes.axhline(1.0, color="#444444", linewidth=1, linestyle=":", zorder=1)


def _frame(axes: Any, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Any, path: Path, title: str, note: str) -> Plot:
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(note, fontsize=7, color="#555555")
    # The date and matplotlib's version would change the file where the picture is the same.
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png", metadata={"Software": None}))
    pyplot.close(figure)
    return Plot(path, title)
