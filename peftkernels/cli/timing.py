"""Turns within rounds: every contestant once in each, in an order that rotates; only ratios within a round are kept.

`peftkernels doctor --speed`, the benchmark and the demo all measure by it.

Other processes' share of the machine can be told from a hundred milliseconds on, so rounds are watched in windows of
that length, and a window in which they used more than 6 % is thrown away with all its rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from peftkernels.cli.load import ForeignLoad

MOST_FOREIGN_SHARE = 0.06
WINDOW_SECONDS = 0.2
# A turn lasts at least so long, so that the clock and the change from one contestant to the next do not count.
TURN_SECONDS = 3e-3
FEWEST_ROUNDS = 3


Stopwatch = Callable[[Callable[[], None]], float]


class Bench(Protocol):
    """Named contestants that take turns and can be timed; ratios are relative to `baseline`."""

    @property
    def baseline(self) -> str: ...

    @property
    def contestants(self) -> Mapping[str, object]: ...

    def prepare(self, name: str) -> None:
        """Called before each turn, off the clock."""

    def turn(self, name: str, first: int, repeats: int) -> None:
        """Run the contestant `repeats` times, on the inputs from number `first` on."""


class _Load(AbstractContextManager["_Load"], Protocol):
    @property
    def share(self) -> float | None: ...


@dataclass(frozen=True)
class Effort:
    """How long to measure: for `seconds`, and on until `rounds` undisturbed rounds.

    Attributes:
        seconds: time to measure where nothing disturbs it.
        rounds: undisturbed rounds that are wanted.
        most_seconds: ends it once there are FEWEST_ROUNDS rounds.
        most_rounds: ends it too; None for as many as there is time for.
    """

    seconds: float
    rounds: int
    most_seconds: float
    most_rounds: int | None = None

    @property
    def fewest(self) -> int:
        """Rounds without which there is no result."""
        return min(FEWEST_ROUNDS, self.rounds)

    def ended(self, spent: float, quiet: int, rounds: int) -> bool:
        """Return True when `spent` seconds and `rounds` rounds, `quiet` of them undisturbed, are enough."""
        if spent >= self.seconds and quiet >= self.rounds:
            return True
        if self.most_rounds is not None and rounds >= self.most_rounds:
            return True
        return spent >= self.most_seconds and rounds >= self.fewest


@dataclass(frozen=True)
class Samples:
    """The rounds that count.

    Attributes:
        baseline: the contestant that ratios are relative to.
        rounds: seconds a call by contestant, for each round.
        discarded: rounds thrown away because other processes disturbed them.
        disturbed: most rounds were disturbed; the ratios are then not to be relied on.
        watched: the system tells what other processes use.
    """

    baseline: str
    rounds: tuple[dict[str, float], ...]
    discarded: int = 0
    disturbed: bool = False
    watched: bool = True

    @property
    def all_counted(self) -> bool:
        """Disturbed rounds count as well, because there were too few others."""
        return self.disturbed and not self.discarded

    def times(self, name: str) -> list[float]:
        """A contestant's seconds in every counted round."""
        return [sample[name] for sample in self.rounds]

    def ratios(self, name: str, to: str) -> list[float]:
        """Time of `name` over time of `to` in the same round."""
        return [sample[name] / sample[to] for sample in self.rounds]


def interleave(
    bench: Bench,
    effort: Effort,
    *,
    load: Callable[[], _Load] = ForeignLoad,
    clock: Callable[[], float] = time.perf_counter,
    stopwatch: Stopwatch | None = None,
    turn_seconds: float = TURN_SECONDS,
    repeats: int | None = None,
    advance: Callable[[int], None] = lambda quiet: None,
) -> Samples:
    """Measure the contestants of `bench` against each other.

    Args:
        bench: the contestants, and how a turn of one is taken.
        effort: when to stop.
        load: a context manager whose `share` tells, afterwards, what part of the machine other processes used.
        clock: seconds.
        stopwatch: how long what it is given takes, in seconds; by `clock` if there is none. Work that a device does
            later than it is called for has a stopwatch of its own.
        turn_seconds: how long a turn of the baseline lasts at least.
        repeats: calls of a turn, in the place of as many as `turn_seconds` asks for.
        advance: called after each window with the number of undisturbed rounds so far.
    """
    watch = stopwatch or partial(_by_the_clock, clock)
    names = list(bench.contestants)
    for name in names:
        bench.prepare(name)
        bench.turn(name, 0, 1)
    repeats = repeats or _repeats(bench, watch, turn_seconds)
    quiet: list[dict[str, float]] = []
    loud: list[dict[str, float]] = []
    known = True
    started = clock()
    while not effort.ended(clock() - started, len(quiet), len(quiet) + len(loud)):
        window: list[dict[str, float]] = []
        opened = clock()
        with load() as watched:
            while not window or clock() - opened < WINDOW_SECONDS:
                number = len(quiet) + len(loud) + len(window)
                window.append(_round(bench, names, number, repeats, watch))
        known = known and watched.share is not None
        (quiet if undisturbed(watched.share) else loud).extend(window)
        advance(len(quiet))
    return replace(samples_of(bench.baseline, quiet, loud, effort.fewest), watched=known)


def undisturbed(share: float | None) -> bool:
    """Return True if a window counts in which other processes used `share` of the machine (None: unknown)."""
    return share is None or share <= MOST_FOREIGN_SHARE


def _by_the_clock(clock: Callable[[], float], work: Callable[[], None]) -> float:
    begin = clock()
    work()
    return clock() - begin


def _repeats(bench: Bench, watch: Stopwatch, seconds: float) -> int:
    """Calls of one turn: so many that the baseline takes `seconds`."""
    bench.prepare(bench.baseline)
    once = watch(partial(bench.turn, bench.baseline, 0, 1))
    if once >= seconds:
        return 1
    guess = max(1, int(seconds / max(once, 1e-9) / 4))
    bench.prepare(bench.baseline)
    each = watch(partial(bench.turn, bench.baseline, 0, guess)) / guess
    return max(1, round(seconds / max(each, 1e-9)))


def _round(bench: Bench, names: Sequence[str], number: int, repeats: int, watch: Stopwatch) -> dict[str, float]:
    start = number % len(names)
    sample = {}
    for name in (*names[start:], *names[:start]):
        bench.prepare(name)
        sample[name] = watch(partial(bench.turn, name, number * repeats, repeats)) / repeats
    return sample


def samples_of(baseline: str, quiet: list[dict[str, float]], loud: list[dict[str, float]], fewest: int) -> Samples:
    """The undisturbed rounds, or with fewer than `fewest` of them all rounds, marked as disturbed."""
    if len(quiet) < fewest:
        return Samples(baseline, (*quiet, *loud), 0, True)
    return Samples(baseline, tuple(quiet), len(loud), len(loud) > len(quiet))


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and fifths of some numbers."""

    median: float
    p20: float
    p25: float
    p75: float
    p80: float


def spread(values: Sequence[float]) -> Spread:
    """Of one number or more, by linear interpolation between neighbours."""
    if len(values) == 1:
        return Spread(*[values[0]] * 5)
    quarters = statistics.quantiles(values, n=4, method="inclusive")
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(quarters[1], fifths[0], quarters[0], quarters[2], fifths[3])
