"""Tables of the pages about measurements, as Markdown: goals, layers, training steps, the allocator, the demo."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from bench import lineup
from bench.cases import BACKWARD, FORWARD, GROUPS, TOKENS, TRAINING_TOKENS, WIDTHS, Case
from bench.goals import Reached
from bench.results import CPU, Row
from bench.table import goal_cells
from demo.recipe import TITLES
from demo.timing import FROZEN as DEMO_FROZEN

TITLES_OF_DTYPES = {"fp32": "fp32", "bf16": "bf16", "mixed": "bf16 with fp32 factors"}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are aligned left and the others right."""
    lines = [header, [*["---"] * left, *["---:"] * (len(header) - left)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Figures:
    """Rows by case and contestant."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self._found = {(row.id, row.contestant): row for row in rows}

    def row(self, case: Case, contestant: str) -> Row | None:
        """The row, None where it was not measured."""
        return self._found.get((case.id, contestant))


def provenance(rows: Sequence[Row]) -> str:
    """Machine, versions, commits and days of the rows, in one sentence, and how much was disturbed."""

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(getattr(row, name)) for row in rows}))

    cases = {row.id: row for row in rows}
    rounds = sum(row.rounds for row in cases.values())
    discarded = sum(row.discarded for row in cases.values())
    disturbed = sum(row.disturbed for row in cases.values())
    host = f"{all_of('processor')}, {all_of('threads')} threads"
    text = (
        f"{host if all_of('device') == CPU else all_of('device')}, torch {all_of('torch')}, peft {all_of('peft')}, "
        f"Python {all_of('python')}, {all_of('date')}, commit {all_of('commit')}; {len(cases)} cases, "
        f"{rounds:,} rounds, {discarded:,} disturbed ones left out."
    )
    if disturbed:
        text += f" In {disturbed} cases (marked !) most rounds were disturbed: their figures are not to be relied on."
    return text


def goals(judged: Sequence[Reached]) -> str:
    """Every goal beside what was reached."""
    header = ["goal (time of peftkernels)", "limit", "reached", "verdict", "worst case"]
    lines = []
    for reached in judged:
        title, limit, value, verdict, worst = goal_cells(reached)
        number, _, case = worst.partition(" ")
        lines.append([title, limit, value, verdict, f"{number} `{case}`" if case else ""])
    return markdown(header, lines, left=1)


def layers(figures: Figures) -> str:
    """Ratios to the bare frozen layer by width and rows of x, one table for each dtype and pass."""
    parts = []
    for dtype, beside in lineup.PEFT_LORA_OF.items():
        for direction in (FORWARD, BACKWARD):
            part = _layer_table(figures, dtype, direction, beside)
            if part is not None:
                parts.append(part)
    if not parts:
        return "No case of the base grids was measured."
    note = (
        "Time over that of the bare frozen `F.linear` in the same round: peftkernels, and in brackets HF peft's LoRA "
        "layer with factors of the same dtype (on a bf16 base fp32 ones are its default); r = 16. In forward + "
        "backward x, A and B get their gradients."
    )
    return "\n\n".join([note, *parts])


def _layer_table(figures: Figures, dtype: str, direction: str, beside: str) -> str | None:
    group = GROUPS[f"grid-{dtype}"]
    tokens = [m for m in TOKENS if (m, direction) in {(case.M, case.direction) for case in group}]
    cells, lines = [], []
    for k, n in WIDTHS:
        line = [f"{k}×{n}"]
        for m in tokens:
            case = next(c for c in group if (c.K, c.N, c.M, c.direction) == (k, n, m, direction))
            ours, theirs = figures.row(case, lineup.OURS), figures.row(case, beside)
            if ours is None or ours.ratio is None:
                line.append("")
                continue
            brackets = "" if theirs is None or theirs.ratio is None else f" ({theirs.ratio:.2f})"
            line.append(f"{ours.ratio:.2f}{'!' if ours.disturbed else ''}{brackets}")
            if theirs is not None and theirs.ratio is not None:
                cells.append((ours.ratio, theirs.ratio))
        lines.append(line)
    if not cells:
        return None
    mean, their_mean = (statistics.geometric_mean(column) for column in zip(*cells, strict=True))
    title = (
        f"**{TITLES_OF_DTYPES[dtype]}, {direction.replace('+', ' + ')}: geometric mean {mean:.2f} ({their_mean:.2f})**"
    )
    return f"{title}\n\n{markdown(['K×N', *(f'M = {m}' for m in tokens)], lines)}"


def training(figures: Figures) -> str:
    """Whole training steps and the allocator's."""
    lines = []
    for case in (*GROUPS["training"], *GROUPS["allocator"], *GROUPS["allocator+orthogonality"]):
        names = lineup.contestants(case)
        rows = [figures.row(case, name) for name in names]
        for row in rows:
            if row is not None:
                lines.append(_training_line(case, row))
    if not lines:
        return "No training step and no allocator was measured."
    header = ["step", "contestant", "ms", "× frozen (quartiles)", "peftkernels, × this", "saved for backward"]
    return markdown(header, lines, left=2)


def _training_line(case: Case, row: Row) -> list[str]:
    if case.model:
        place = f"{'MiniLM' if case.model == 'minilm' else 'small Llama'}, {case.M} tokens, {case.modules} modules"
    else:
        term = " and orthogonality term" if case.direction else ""
        place = f"rank allocation{term} over {case.modules} modules"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f} ({row.ratio_p25:.2f}–{row.ratio_p75:.2f})"
    saved = "" if row.saved_bytes is None else f"{row.saved_bytes / 1e6:.1f} MB"
    return [
        place,
        row.contestant,
        f"{row.median_us / 1e3:.1f}{' !' if row.disturbed else ''}",
        ratio,
        f"{row.ours_ratio:.2f}",
        saved,
    ]


def memory(figures: Figures) -> str:
    """Bytes kept for backward at the middle of the grids, by dtype and contestant."""
    lines = []
    for dtype in TITLES_OF_DTYPES:
        for case in GROUPS[f"grid-{dtype}"]:
            if (case.K, case.N, case.M, case.direction) != (768, 3072, TRAINING_TOKENS[-1], BACKWARD):
                continue
            for name in lineup.contestants(case):
                row = figures.row(case, name)
                if row is not None and row.saved_bytes is not None and name not in (lineup.FROZEN, lineup.FLOOR):
                    lines.append([TITLES_OF_DTYPES[dtype], name, f"{row.saved_bytes / 1e6:.2f} MB"])
    if not lines:
        return "No such case was measured."
    return markdown(["dtype", "contestant", "saved for backward, 768×3072, M = 2048"], lines, left=2)


def demo(path: Path) -> str:
    """The demo's table, as it printed it."""
    found = json.loads(path.read_text())
    machine, timing = found["machine"], found["timing"]
    rows = [
        [
            "frozen, forward + backward" if name == DEMO_FROZEN else TITLES[name],
            "" if run["accuracy"] is None else f"{run['accuracy']:.3f}",
            f"{run['milliseconds']:.0f}",
            f"{run['ratio']:.2f} ({run['ratio_p25']:.2f}–{run['ratio_p75']:.2f})",
            "" if run["total_ranks"] is None else f"{run['live_ranks']} / {run['total_ranks']}",
            f"{run['trainable_parameters']:,}",
            f"{run['saved_bytes'] / 1e6:.1f} MB",
        ]
        for name, run in found["runs"].items()
    ]
    header = [
        "run",
        "test accuracy",
        "ms per step",
        "× frozen step (quartiles)",
        "ranks, ACTIVE / all",
        "trainable parameters",
        "saved for backward",
    ]
    note = (
        f"{machine['processor']}, {machine['threads']} threads, torch {found['versions']['torch']}, "
        f"peft {found['versions']['peft']}, {found['date'][:10]}; {timing['rounds']} paired rounds, "
        f"{timing['discarded']} disturbed ones left out"
        + (", the machine was never quiet." if timing["disturbed"] else ".")
    )
    return f"{markdown(header, rows)}\n\n{note}"
