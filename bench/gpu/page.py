"""The tables of what was measured on a GPU, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from bench import lineup
from bench.cases import CALLS, GRAPH, PASSES, Case
from bench.goals import GPU_GOALS, judge
from bench.gpu.cases import GRAPH_SHAPES, GRAPH_TOKENS, GROUPS, LIVE_RANK, SHAPES, TOKENS, in_order
from bench.page_tables import Figures, goals, markdown, provenance
from bench.results import Row

NOTHING = "Nothing was measured on a GPU yet."
_PEER = lineup.PEFT_LORA_BF16
# Name of a column and the contestant whose ratio to F.linear it shows.
_LORA = (("ours", lineup.OURS), ("floor", lineup.FLOOR), ("peft, bf16", _PEER), ("peft, fp32", lineup.PEFT_LORA_FP32))
_ADALORA = (
    ("ours", lineup.OURS),
    ("floor", lineup.FLOOR),
    ("peft, bf16", lineup.PEFT_ADALORA_BF16),
    ("peft, fp32", lineup.PEFT_ADALORA_FP32),
)


def page(rows: Sequence[Row], plots: Sequence[str]) -> str:
    """Goals and tables of one GPU's results, with links to its plots."""
    figures = Figures(rows)
    device = ", ".join(sorted({row.device for row in rows}))
    cases = [case for _, case in in_order(GROUPS)]
    parts = [
        f"**{device}**",
        goals(judge(rows, GPU_GOALS, cases)),
        provenance(rows),
        "Time over that of `F.linear` on the bf16 weight alone, in the same round: peftkernels, and in brackets "
        f"{_PEER}; r = 16, no dropout. K×N are a layer's inputs and outputs.",
    ]
    for direction in PASSES:
        parts += _grid(figures, f"{direction}, called", direction, CALLS, SHAPES, TOKENS)
    for direction in PASSES:
        parts += _grid(
            figures, f"{direction}, replayed from a CUDA graph", direction, GRAPH, GRAPH_SHAPES, GRAPH_TOKENS
        )
    parts += _varied(figures, "ranks", GROUPS["gpu-rank"], _LORA, lambda case: f"r = {case.r}")
    parts += _varied(figures, "dropout", GROUPS["gpu-dropout"], _LORA, lambda case: f"dropout {case.dropout:g}")
    parts += _varied(
        figures, f"ACTIVE ranks of {LIVE_RANK}", GROUPS["gpu-live"], _ADALORA, lambda case: f"{case.live} %"
    )
    parts += _host(figures)
    return "\n\n".join([*parts, *plots])


def _grid(
    figures: Figures,
    title: str,
    direction: str,
    timing: str,
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
) -> list[str]:
    lines, ours_ratios, peer_ratios = [], [], []
    for k, n in shapes:
        line = [f"{k}×{n}"]
        for m in tokens:
            case = Case(direction=direction, K=k, N=n, M=m, dtype="bf16", bias=False, timing=timing)
            ours, peer = figures.row(case, lineup.OURS), figures.row(case, _PEER)
            line.append(_cell(ours) + ("" if peer is None else f" ({_cell(peer)})"))
            if ours is not None and ours.ratio is not None:
                ours_ratios.append(ours.ratio)
            if peer is not None and peer.ratio is not None:
                peer_ratios.append(peer.ratio)
        lines.append(line)
    if not ours_ratios:
        return []
    mean = f"{statistics.geometric_mean(ours_ratios):.2f}"
    if peer_ratios:
        mean += f" ({statistics.geometric_mean(peer_ratios):.2f})"
    return [
        f"*{title}: geometric mean {mean}*".replace("+", " + "),
        markdown(["K×N", *(f"M = {m}" for m in tokens)], lines),
    ]


def _cell(row: Row | None) -> str:
    if row is None or row.ratio is None:
        return ""
    return f"{row.ratio:.2f}{'!' if row.disturbed else ''}"


def _varied(
    figures: Figures,
    title: str,
    cases: Sequence[Case],
    columns: Sequence[tuple[str, str]],
    factor: Callable[[Case], str],
) -> list[str]:
    lines = []
    for case in cases:
        found = [figures.row(case, name) for _, name in columns]
        if found[0] is not None:
            place = f"{case.direction.replace('+', ' + ')}, {case.K}×{case.N}, M = {case.M}"
            lines.append([factor(case), place, *(_cell(row) for row in found)])
    if not lines:
        return []
    return [f"*{title}*", markdown([title, "layer", *(name for name, _ in columns)], lines, left=2)]


def _host(figures: Figures) -> list[str]:
    lines = []
    for case in GROUPS["gpu-enqueue"]:
        frozen = figures.row(case, lineup.FROZEN)
        for name in (lineup.OURS, lineup.FLOOR, _PEER, lineup.PEFT_ADALORA_BF16):
            row = figures.row(case, name)
            if row is not None and row.ratio is not None and frozen is not None:
                over = frozen.median_us * (row.ratio - 1)
                lines.append([f"`{case.id}`", name, f"{row.median_us:.1f}", f"{over:+.1f}"])
    if not lines:
        return []
    header = ["case", "contestant", "µs a call", "over `F.linear`, µs"]
    return ["*the host's time to enqueue a call*", markdown(header, lines, left=2)]
