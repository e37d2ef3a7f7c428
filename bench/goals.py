"""What the kernels are meant to reach, as data, and what the results say."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench import lineup
from bench.cases import (
    ALLOCATOR,
    BACKWARD,
    CALLS,
    DEAD,
    ENQUEUE,
    FORWARD,
    GRAPH,
    GROUPS,
    LAYER,
    ORTHOGONALITY,
    RANK,
    REGULARIZED_MODULES,
    TRAINING_TOKENS,
    Case,
    all_cases,
)
from bench.results import Row

# Widths and rows of the prototype's measurements, which the limits come from.
FORWARD_WIDTHS = ((384, 384), (768, 768), (768, 3072), (1024, 1024), (2048, 2048), (4096, 4096))
FORWARD_TOKENS = (1, 128, 512, 2048)
BACKWARD_WIDTHS = (*FORWARD_WIDTHS, (3072, 768))
# What a goal speaks of: the time of peftkernels over another's, the inverse, the µs on top of the other's, all its µs.
RATIO, SPEEDUP, EXTRA, MICROSECONDS = "ratio", "speedup", "extra", "microseconds"
MEAN, LARGEST, SMALLEST = "geometric mean", "largest", "smallest"
_STATISTICS: dict[str, Callable[[Iterable[float]], float]] = {
    MEAN: statistics.geometric_mean,
    LARGEST: max,
    SMALLEST: min,
}


@dataclass(frozen=True)
class Goal:
    """A limit on `statistic` over the cases that `selects` picks.

    The value of a case is `measure` of peftkernels beside `against`; a SPEEDUP must reach the limit, everything else
    stay below it.
    """

    title: str
    against: str
    statistic: str
    limit: float
    selects: Callable[[Case], bool]
    measure: str = RATIO

    @property
    def speedup(self) -> bool:
        """True where more is better."""
        return self.measure == SPEEDUP

    def value(self, row: Row) -> float:
        """The value of a row of `against`."""
        return {
            RATIO: row.ours_ratio,
            SPEEDUP: 1 / row.ours_ratio,
            EXTRA: row.median_us * (row.ours_ratio - 1),
            MICROSECONDS: row.median_us * row.ours_ratio,
        }[self.measure]


@dataclass(frozen=True)
class Reached:
    """A goal beside the results: `value` of `cells` cases, None without any; the worst of them; disturbed ones."""

    goal: Goal
    value: float | None
    cells: int
    expected: int
    worst: str
    worst_value: float | None
    disturbed: int

    @property
    def holds(self) -> bool | None:
        """True if the goal is reached; None where not all of its cases were measured."""
        if self.value is None or self.cells < self.expected:
            return None
        return self.value >= self.goal.limit if self.goal.speedup else self.value <= self.goal.limit

    @property
    def verdict(self) -> str:
        """In words, with how much is missing, in percent of the limit."""
        if self.holds is None:
            return f"{self.cells} of {self.expected} cases measured"
        if self.holds:
            return "reached"
        assert self.value is not None
        return f"missed by {100 * abs(self.value / self.goal.limit - 1):.1f} %"


def _plain(case: Case) -> bool:
    """A layer of the base grids: nothing but width, rows, pass and dtype varies."""
    return case.operator == LAYER and not case.masking and case.dropout == 0 and case.bias and case.r == RANK


def _grid(
    direction: str, dtype: str, widths: Sequence[tuple[int, int]], tokens: Sequence[int]
) -> Callable[[Case], bool]:
    return lambda case: (
        _plain(case)
        and case.direction == direction
        and case.dtype == dtype
        and (case.K, case.N) in widths
        and case.M in tokens
    )


_FORWARD = _grid(FORWARD, "fp32", FORWARD_WIDTHS, FORWARD_TOKENS)

GOALS = (
    Goal("fp32 forward, over frozen", lineup.FROZEN, MEAN, 0.82, _FORWARD),
    Goal("fp32 forward, no cell above frozen", lineup.FROZEN, LARGEST, 1.0, _FORWARD),
    Goal(
        "fp32 forward of one row, over frozen", lineup.FROZEN, MEAN, 0.55, _grid(FORWARD, "fp32", FORWARD_WIDTHS, (1,))
    ),
    Goal(
        "fp32 forward + backward, over frozen",
        lineup.FROZEN,
        MEAN,
        0.86,
        _grid(BACKWARD, "fp32", BACKWARD_WIDTHS, TRAINING_TOKENS),
    ),
    Goal(
        "bf16 forward + backward, over frozen",
        lineup.FROZEN,
        MEAN,
        0.95,
        _grid(BACKWARD, "bf16", BACKWARD_WIDTHS, TRAINING_TOKENS),
    ),
    Goal(
        "mixed forward + backward, over frozen",
        lineup.FROZEN,
        MEAN,
        0.95,
        _grid(BACKWARD, "mixed", BACKWARD_WIDTHS, TRAINING_TOKENS),
    ),
    Goal(
        "mixed forward + backward, times as fast as peft's default",
        lineup.PEFT_LORA_FP32,
        MEAN,
        1.5,
        _grid(BACKWARD, "mixed", BACKWARD_WIDTHS, TRAINING_TOKENS),
        measure=SPEEDUP,
    ),
    Goal("dropout 0.1, over none", lineup.NO_DROPOUT, MEAN, 1.03, lambda case: case.dropout == 0.1),
    Goal(
        "50 % DEAD ranks, over half the rank",
        lineup.HALF_RANK,
        LARGEST,
        1.02,
        lambda case: case.masking == DEAD and case.live == 50,
    ),
    Goal(
        "MiniLM training step under AdaLoRA, over the frozen step",
        lineup.FROZEN,
        LARGEST,
        0.97,
        lambda case: case in GROUPS["training"] and case.model == "minilm",
    ),
    Goal(
        "allocator step with orthogonality term, each times as fast as peft's",
        lineup.PEFT_ALLOCATOR,
        SMALLEST,
        10.0,
        lambda case: (
            case.operator == ALLOCATOR and case.direction == ORTHOGONALITY and case.modules in REGULARIZED_MODULES
        ),
        measure=SPEEDUP,
    ),
)


# Rows and ranks that the goals on an H200 are for, and what the spread of medians may hide.
GPU_TOKENS, GPU_RANK, GPU_BAND = 2048, 64, 0.02


def _on_gpu(case: Case, direction: str, dropout: float = 0.0) -> bool:
    """A bf16 layer of many rows and few ranks, all of them live."""
    wide = case.operator == LAYER and case.dtype == "bf16" and case.timing == CALLS and not case.masking
    return (
        wide and case.direction == direction and case.dropout == dropout and case.M >= GPU_TOKENS and case.r <= GPU_RANK
    )


def _gpu_goals(direction: str, limit: float) -> tuple[Goal, ...]:
    def plain(case: Case) -> bool:
        return _on_gpu(case, direction)

    def dropped(case: Case) -> bool:
        return _on_gpu(case, direction, 0.1)

    name, peer = f"bf16 {direction.replace('+', ' + ')}", lineup.PEFT_LORA_BF16
    return (
        Goal(f"{name}, over frozen", lineup.FROZEN, MEAN, limit, plain),
        Goal(f"{name}, no cell above", lineup.FROZEN, LARGEST, limit, plain),
        Goal(f"{name}, times as fast as {peer}", peer, MEAN, 1.3, plain, measure=SPEEDUP),
        Goal(f"{name}, dropout 0.1, times as fast as {peer}", peer, MEAN, 1.6, dropped, measure=SPEEDUP),
    )


# On an H200. A factor's dtype is x's in all of them, peft's with autocast_adapter_dtype=False: its faster setting.
GPU_GOALS = (
    *_gpu_goals(FORWARD, 1.03),
    *_gpu_goals(BACKWARD, 1.05),
    Goal(
        f"never slower than {lineup.FLOOR} ({GPU_BAND:.0%} for measuring)",
        lineup.FLOOR,
        LARGEST,
        1 + GPU_BAND,
        lambda case: case.operator == LAYER and case.timing == CALLS,
    ),
    Goal(
        f"replayed from a graph, never slower than {lineup.FLOOR} ({GPU_BAND:.0%} for measuring)",
        lineup.FLOOR,
        LARGEST,
        1 + GPU_BAND,
        lambda case: case.timing == GRAPH,
    ),
    Goal(
        "forward, host time of a call over F.linear's, µs",
        lineup.FROZEN,
        LARGEST,
        15.0,
        lambda case: case.timing == ENQUEUE and case.direction == FORWARD,
        measure=EXTRA,
    ),
    Goal(
        "allocator step, µs",
        lineup.PEFT_ALLOCATOR,
        LARGEST,
        1000.0,
        lambda case: case.operator == ALLOCATOR,
        measure=MICROSECONDS,
    ),
)


def judge(rows: Sequence[Row], goals: Sequence[Goal] = GOALS, cases: Sequence[Case] | None = None) -> list[Reached]:
    """Every goal beside `rows`; `cases` are what could have been measured, all of the CPU's registry without."""
    known = all_cases() if cases is None else cases
    return [_judge(goal, rows, known) for goal in goals]


def _judge(goal: Goal, rows: Sequence[Row], cases: Sequence[Case]) -> Reached:
    expected = [case for case in cases if goal.selects(case)]
    ids = {case.id for case in expected}
    chosen = [row for row in rows if row.contestant == goal.against and row.id in ids]
    values = {row.id: goal.value(row) for row in chosen}
    worst = ""
    if values:
        worst = min(values, key=values.__getitem__) if goal.speedup else max(values, key=values.__getitem__)
    return Reached(
        goal=goal,
        value=_STATISTICS[goal.statistic](values.values()) if values else None,
        cells=len(values),
        expected=len(expected),
        worst=worst,
        worst_value=values.get(worst),
        disturbed=sum(row.disturbed for row in chosen),
    )
