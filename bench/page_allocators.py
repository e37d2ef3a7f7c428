"""The comparison of rank-allocation strategies, from what `python -m demo --allocators` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.cases import GROUPS
from bench.page_tables import markdown
from bench.results import Row
from demo.compare.table import cells, columns, sensitivity_cells, sensitivity_columns
from demo.compare.words import findings
from demo.timing import FROZEN

NOTHING = "The comparison of strategies was not run yet."


def load(path: Path) -> dict[str, Any]:
    """The content of a comparison.json."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def kept(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """What is committed of a comparison: all but the name of the machine's system."""
    machine = {key: value for key, value in comparison["machine"].items() if key != "system"}
    return {**comparison, "machine": machine}


def page(comparison: Mapping[str, Any], picture: str) -> str:
    """Table, findings, sensitivity and provenance; `picture` is a Markdown link."""
    rows = [
        [
            "frozen, forward + backward",
            "",
            "",
            f"{comparison['timing']['contestants'][FROZEN]['milliseconds']:.0f}",
            "1.00",
            *[""] * 5,
        ]
    ]
    rows += [[name, *cells(comparison, name)] for name in comparison["contestants"]]
    points = [f"{rank}, {delta}" for rank, delta in sensitivity_columns(comparison)]
    grid = [[name, *sensitivity_cells(comparison, name)] for name in comparison["sensitivity"]]
    seeds = next(iter(comparison["sensitivity"].values()))["seeds"]
    return "\n\n".join(
        [
            markdown(["strategy", *columns(comparison)], rows),
            "\n".join(f"- {sentence}" for sentence in findings(comparison)),
            picture,
            f"Test accuracy at other (target_r, ΔT), {seeds} seed{'s' if seeds > 1 else ''} each; the last two columns "
            "are the largest difference in points over target_r and over ΔT:",
            markdown(["strategy", *points, "over target_r", "over ΔT"], grid),
            _provenance(comparison),
        ]
    )


def steps(rows: Sequence[Row]) -> str | None:
    """Milliseconds of one allocation step by each strategy, None where they were not measured."""
    cases = {case.id for case in GROUPS["strategies"]}
    found = [row for row in rows if row.id in cases]
    if not found:
        return None
    title = (
        f"One step of rank allocation over {found[0].modules} modules of {found[0].K}×{found[0].N}, r = {found[0].r}:"
    )
    lines = [[row.contestant, f"{row.median_us / 1e3:.2f}{' !' if row.disturbed else ''}"] for row in found]
    return f"{title}\n\n{markdown(['allocator', 'ms'], lines)}"


def _provenance(comparison: Mapping[str, Any]) -> str:
    machine, arguments, design = comparison["machine"], comparison["arguments"], comparison["design"]
    trainings, timing, data = comparison["trainings"], comparison["timing"], comparison["data"]
    return (
        f"{arguments['--steps']} steps of {arguments['--batch-size']} texts of at most {arguments['--max-tokens']} "
        f"tokens; {data['training_texts']} training and {data['test_texts']} test texts, {len(data['labels'])} labels; "
        f"{design['initial_rank']} → {design['target_rank']} ranks a matrix, seeds {comparison['seeds'][0]} to "
        f"{comparison['seeds'][-1]}; {trainings['count']} trainings, {trainings['processor_seconds'] / 3600:.1f} "
        f"hours of processor time. Step times: {timing['rounds']} paired rounds with {timing['threads']} threads, "
        f"{timing['discarded']} disturbed ones left out"
        + (", the machine was never quiet" if timing["disturbed"] else "")
        + f". {machine['processor']}, torch {comparison['versions']['torch']}, {comparison['date'][:10]}."
    )
