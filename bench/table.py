"""What was measured, for people: a table for each group, the goals below."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench import lineup
from bench.cases import GROUPS, Case
from bench.goals import LARGEST, Reached, judge
from bench.results import Row
from bench.runner import Measured


def print_tables(console: Console, measured: Sequence[Measured], rows: Sequence[Row]) -> None:
    """The cases of this run by group, then every goal that `rows` (all there are by now) say something about."""
    for group in GROUPS:
        found = [item for item in measured if item.rows[0].group == group]
        if found:
            console.print(group_table(group, found))
    console.print(
        f"× {lineup.FROZEN}: a contestant's time over the frozen layer's in the same round, median (quartiles of "
        "ours); below 1 is faster. roofline: least time for operations and bytes at this machine's measured peaks, "
        "over the median. !: most rounds were disturbed by other processes.",
        highlight=False,
    )
    table = goals_table(judge(rows))
    if table is not None:
        console.print(table)


def group_table(group: str, measured: Sequence[Measured]) -> Table:
    """Times and ratios of a group's cases, a line for each."""
    names = list(dict.fromkeys(row.contestant for item in measured for row in item.rows))
    ours = lineup.ours(measured[0].case)
    has_frozen = lineup.FROZEN in names
    peers = [name for name in names if name not in (ours, lineup.FROZEN)]
    title = f"{group}: µs a call, and × {lineup.FROZEN}" if has_frozen else f"{group}: µs a call"
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("case", no_wrap=True)
    if has_frozen:
        table.add_column(f"{lineup.FROZEN}, µs", justify="right")
    table.add_column(f"{ours}, µs", justify="right")
    if has_frozen:
        table.add_column(f"× {ours}", justify="right")
    for name in peers:
        table.add_column(f"× {name}" if has_frozen else f"{name}, µs", justify="right")
    table.add_column("roofline, %", justify="right")
    table.add_column("rounds", justify="right")
    for item in measured:
        by_name = {row.contestant: row for row in item.rows}
        own = by_name[ours]
        line = [item.case.id]
        if has_frozen:
            line.append(f"{by_name[lineup.FROZEN].median_us:,.0f}")
        line.append(f"{own.median_us:,.0f}")
        if has_frozen:
            line.append(f"{own.ratio:.2f} ({own.ratio_p25:.2f}–{own.ratio_p75:.2f})")
        for name in peers:
            row = by_name.get(name)
            line.append("" if row is None else f"{row.ratio:.2f}" if has_frozen else f"{row.median_us:,.0f}")
        line.append("" if own.roofline_percent is None else f"{own.roofline_percent:.0f}")
        discarded = f" (-{own.discarded})" if own.discarded else ""
        line.append(f"{own.rounds}{discarded}{' !' if own.disturbed else ''}")
        table.add_row(*line)
    return table


def goals_table(judged: Sequence[Reached], *, unmeasured: bool = False) -> Table | None:
    """Reached value beside limit, for goals with a measured case, or with `unmeasured` for all; None without any."""
    table = Table(title="goals", title_justify="left", header_style="bold")
    table.add_column("goal", overflow="fold")
    for title in ("limit", "reached", "verdict", "worst case"):
        table.add_column(title, justify="right" if title in ("limit", "reached") else "left", overflow="fold")
    for reached in judged:
        if reached.value is None and not unmeasured:
            continue
        table.add_row(*goal_cells(reached))
    return table if table.rows else None


def goal_cells(reached: Reached) -> list[str]:
    """Title, limit, value, verdict and worst case of a goal, as text."""
    goal = reached.goal
    how = "each" if goal.statistic == LARGEST else goal.statistic
    limit = f"{'≥' if goal.speedup else '≤'} {goal.limit:.2f} ({how})"
    value = "" if reached.value is None else f"{reached.value:.2f}"
    worst = "" if reached.worst_value is None else f"{reached.worst_value:.2f} {reached.worst}"
    verdict = reached.verdict + (f", {reached.disturbed} disturbed" if reached.disturbed else "")
    return [goal.title, limit, value, verdict, worst]


def print_list(console: Console, cases: Sequence[Case], seconds: Sequence[float]) -> None:
    """Ids with the seconds each is expected to take."""
    for case, each in zip(cases, seconds, strict=True):
        console.print(f"{each:7.1f} s  {case.id}", highlight=False, soft_wrap=True)
    console.print(f"{len(cases)} cases, about {max(1, round(sum(seconds) / 60))} min", highlight=False)
    console.print(f"groups: {', '.join(GROUPS)}", highlight=False, soft_wrap=True)
