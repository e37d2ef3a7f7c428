"""From cases to rows: build, verify, measure, keep."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench import lineup, results, roofline
from bench.cases import ALLOCATOR, STRATEGIES, TRAINING, Case
from bench.plan import ROUNDS, Planned
from bench.results import Origin, Row
from peftkernels.cli.timing import FEWEST_ROUNDS, Bench, Effort, Samples, interleave, spread


class CaseBench(Bench, Protocol):
    """A case ready to be measured."""

    def saved_bytes(self, name: str) -> int | None:
        """Bytes that a contestant keeps for backward; None where nothing is differentiated."""


@dataclass(frozen=True)
class Measured:
    """A case's samples and its rows."""

    case: Case
    samples: Samples
    rows: list[Row]


def build_and_verify(case: Case, extent: lineup.Extent = lineup.USUAL) -> CaseBench:
    """The case's contestants; raises `verify.WrongResultError` unless they compute the right thing."""
    if case.operator == ALLOCATOR:
        from bench.allocators import AllocatorBench

        allocators = AllocatorBench(case)
        allocators.verify()
        return allocators
    if case.operator == STRATEGIES:
        from bench.strategies import StrategyBench

        strategies = StrategyBench(case)
        strategies.verify()
        return strategies
    if case.operator == TRAINING:
        from bench.training import TrainingBench

        training = TrainingBench(case)
        training.verify()
        return training
    from bench.layers import LayerBench
    from bench.verify import verify

    layer = LayerBench(case, extent)
    verify(layer)
    return layer


def measure_case(
    case: Case,
    effort: Effort,
    peaks: roofline.Peaks,
    common: Origin,
    extent: lineup.Extent = lineup.USUAL,
) -> Measured:
    """Verify and time one case."""
    bench = build_and_verify(case, extent)
    saved = {name: bench.saved_bytes(name) for name in bench.contestants}
    samples = interleave(bench, effort)
    percent = {
        name: roofline.percent(case, name, spread(samples.times(name)).median, peaks) for name in bench.contestants
    }
    return Measured(case, samples, results.rows_of(case, samples, percent, saved, common))


class Store:
    """The results file of a run; rows of cases that the run did not measure stay."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = results.read(path) if path.exists() else []

    def keep(self, rows: Sequence[Row]) -> None:
        """Write the rows of a case that was just measured."""
        self.rows = results.merge(self.rows, rows)
        results.write(self.rows, self.path)


def run(
    planned: Sequence[Planned],
    peaks: roofline.Peaks,
    store: Store,
    *,
    limit: float | None,
    seconds: float,
    extent: lineup.Extent,
    begin: Callable[[Case], None],
    done: Callable[[Planned, Measured], None],
) -> None:
    """Measure case after case, keeping each as soon as it is measured.

    Args:
        limit: seconds that all of it may take, None for any. Where cases took longer than planned, those that are left
            get less time each, and rounds down to FEWEST_ROUNDS; where they took less, up to `seconds` and ROUNDS.
        begin, done: called before and after each case.

    Raises `verify.WrongResultError` at the first contestant whose results are wrong.
    """
    common = results.origin()
    started = time.perf_counter()
    left = sum(item.seconds for item in planned)
    for item in planned:
        begin(item.case)
        effort = item.effort
        if limit is not None:
            effort = adjusted(effort, (limit - (time.perf_counter() - started)) / left, seconds)
        measured = measure_case(item.case, effort, peaks, common, extent)
        store.keep(measured.rows)
        left = max(left - item.seconds, 1e-9)
        done(item, measured)


def adjusted(effort: Effort, share: float, seconds: float) -> Effort:
    """The effort when `share` of the planned time is left for it; more than planned up to `seconds` and ROUNDS."""
    share = max(share, 0.0)
    if share >= 1:
        each, rounds = min(effort.seconds * share, max(seconds, effort.seconds)), effort.rounds * share
        return Effort(each, max(effort.rounds, min(ROUNDS, int(rounds))), effort.most_seconds * min(share, 2.0))
    rounds = max(min(effort.rounds, FEWEST_ROUNDS), int(effort.rounds * share))
    # Without time to spare, disturbed rounds are not made up for either; a third is what the rounds take undisturbed.
    return Effort(effort.seconds * share, rounds, effort.most_seconds * max(share, 1 / 3))


def ours_row(rows: Sequence[Row], case: Case) -> Row:
    """The row of the contestant that the others are compared with."""
    return next(row for row in rows if row.contestant == lineup.ours(case))
