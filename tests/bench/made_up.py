"""Results that were never measured: known ratios for any cases."""

from __future__ import annotations

from collections.abc import Iterable

from peftkernels.bench import lineup, results
from peftkernels.bench.cases import Case
from peftkernels.bench.results import Origin, Row
from peftkernels.bench.runner import Measured
from peftkernels.bench.timing import Samples

ORIGIN = Origin(2, "a processor, 2 cores", "2.13.0", "0.21.2", "3.11", "0.1.0", "abc1234", "2026-01-02")


def measured(case: Case, ours: float = 0.5, peers: float = 1.25, disturbed: bool = False) -> Measured:
    """Three rounds in which the baseline takes 1, 2 and 4 ms, ours and the peers a fixed share of it."""
    names = lineup.contestants(case)
    shares = dict.fromkeys(names, peers) | {names[0]: 1.0, lineup.ours(case): ours}
    rounds = tuple({name: share * speed * 1e-3 for name, share in shares.items()} for speed in (1, 2, 4))
    samples = Samples(names[0], rounds, 1, disturbed)
    saved = dict.fromkeys(names, 1_500_000 if case.trains or case.model else None)
    return Measured(case, samples, results.rows_of(case, samples, dict.fromkeys(names, 80.0), saved, ORIGIN))


def rows(cases: Iterable[Case], ours: float = 0.5) -> list[Row]:
    """The rows of `measured` for each case."""
    return [row for case in cases for row in measured(case, ours).rows]
