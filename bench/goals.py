"""What the kernels are meant to reach, as data, and what the results say."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from . import lineup
from .cases import BACKWARD, DEAD, FORWARD, GROUPS, LAYER, RANK, TRAINING_TOKENS, Case, all_cases
from .results import Row

# Widths and rows of the prototype's measurements, which the limits come from.
FORWARD_WIDTHS = ((384, 384), (768, 768), (768, 3072), (1024, 1024), (2048, 2048), (4096, 4096))
FORWARD_TOKENS = (1, 128, 512, 2048)
BACKWARD_WIDTHS = (*FORWARD_WIDTHS, (3072, 768))
MEAN, LARGEST = "geometric mean", "largest"
_STATISTICS: dict[str, Callable[[Iterable[float]], float]] = {
    MEAN: statistics.geometric_mean,
    LARGEST: max,
}


@dataclass(frozen=True)
class Goal:
    """A limit on `statistic` over the cases that `selects` picks.

    The value of a case is the time of peftkernels over that of `against`, or with `speedup` the inverse, which must
    reach the limit instead of staying below it.
    """

    title: str
    against: str
    statistic: str
    limit: float
    selects: Callable[[Case], bool]
    speedup: bool = False

    def value(self, row: Row) -> float:
        """The value of a row of `against`."""
        return 1 / row.ours_ratio if self.speedup else row.ours_ratio


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
        """Whether the goal is reached; None where not all of its cases were measured."""
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
        speedup=True,
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
)


def judge(rows: Sequence[Row]) -> list[Reached]:
    """Every goal beside `rows`."""
    return [_judge(goal, rows) for goal in GOALS]


def _judge(goal: Goal, rows: Sequence[Row]) -> Reached:
    expected = [case for case in all_cases() if goal.selects(case)]
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
