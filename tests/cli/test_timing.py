"""Turns, rounds and ratios on a clock and a load that the test decides."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest

from peftkernels.cli import timing
from peftkernels.cli.timing import Effort, Samples, interleave, spread

DRIFT = 0.1


class Clockwork:
    """Contestants that each take a known time, longer by the round; and the machine around them."""

    baseline = "frozen"

    def __init__(self, seconds: dict[str, float], shares: Iterable[float | None] = (0.0,)) -> None:
        self.contestants: dict[str, object] = dict(seconds)
        self._seconds = seconds
        self.now = 0.0
        self.turns: list[tuple[str, int, int]] = []
        self.prepared: list[str] = []
        shares = list(shares)
        self._shares = itertools.chain(shares, itertools.repeat(shares[-1]))

    def prepare(self, name: str) -> None:
        self.prepared.append(name)
        self.now += 100.0  # off the clock: must not show in any time

    def turn(self, name: str, first: int, repeats: int) -> None:
        self.turns.append((name, first, repeats))
        # The machine gets slower from round to round, which times must show and ratios must not.
        self.now += self._seconds[name] * (repeats + DRIFT * first)

    def clock(self) -> float:
        return self.now

    def load(self) -> Clockwork:
        return self

    def __enter__(self) -> Clockwork:
        return self

    def __exit__(self, *_: object) -> None:
        self.share = next(self._shares)

    def run(self, effort: Effort) -> Samples:
        return interleave(self, effort, load=self.load, clock=self.clock)


def test_turns_rotate_share_inputs_and_give_paired_ratios() -> None:
    bench = Clockwork({"frozen": 1.0, "ours": 0.75, "peer": 1.5})
    samples = bench.run(Effort(0.0, 6, 1e9))
    turns = [turn for turn in bench.turns if turn[2] == 1][-3 * len(samples.rounds) :]
    order = [name for name, _, _ in turns]
    assert order[:3] != order[3:6] != order[6:9]
    assert set(order[::3]) == {"frozen", "ours", "peer"}
    # All three see the same input in a round, and another in the next.
    firsts = [first for _, first, _ in turns]
    assert all(len(set(firsts[i : i + 3])) == 1 for i in range(0, len(firsts), 3))
    assert len(set(firsts)) == len(samples.rounds)
    assert samples.ratios("ours", "frozen") == pytest.approx([0.75] * len(samples.rounds))
    assert samples.ratios("ours", "peer") == pytest.approx([0.5] * len(samples.rounds))
    assert samples.times("peer") == pytest.approx([1.5 * (1 + DRIFT * i) for i in range(len(samples.rounds))])
    assert (samples.discarded, samples.disturbed) == (0, False)


def test_a_turn_lasts_some_milliseconds() -> None:
    bench = Clockwork({"frozen": 10e-6, "ours": 5e-6})
    samples = bench.run(Effort(0.0, 1, 1e9))
    assert {repeats for _, _, repeats in bench.turns[-2:]} == {round(timing.TURN_SECONDS / 10e-6)}
    assert samples.times("frozen")[0] == pytest.approx(10e-6)


def test_disturbed_windows_are_discarded_and_measured_again() -> None:
    bench = Clockwork({"frozen": 1.0, "ours": 0.5}, [0.0, 0.5, 0.061, 0.06, None, 0.02, 0.02])
    samples = bench.run(Effort(0.0, 4, 1e9))
    assert (len(samples.rounds), samples.discarded, samples.disturbed) == (4, 2, False)


def test_a_window_lasts_long_enough_to_tell_the_load() -> None:
    """Where a round is short, its neighbours share a window, and its fate."""
    bench = Clockwork({"frozen": 0.01, "ours": 0.02}, [0.9, 0.0, 0.0])
    bench.prepare = lambda name: None
    samples = bench.run(Effort(0.0, 4, 1e9))
    assert 4 <= samples.discarded <= timing.WINDOW_SECONDS / 0.03
    assert 4 <= len(samples.rounds) <= timing.WINDOW_SECONDS / 0.03


def test_a_case_that_was_mostly_disturbed_is_marked() -> None:
    bench = Clockwork({"frozen": 1.0, "ours": 0.5}, [0.5, 0.5, 0.5, 0.5, 0.0])
    samples = bench.run(Effort(0.0, 3, 1e9))
    assert (len(samples.rounds), samples.discarded, samples.disturbed) == (3, 4, True)


def test_a_machine_that_is_never_quiet_counts_everything_and_says_so() -> None:
    bench = Clockwork({"frozen": 1.0, "ours": 0.5}, [0.5])
    samples = bench.run(Effort(0.0, 5, 1000.0))
    assert samples.disturbed and samples.discarded == 0 and len(samples.rounds) >= 4
    assert samples.ratios("ours", "frozen") == pytest.approx([0.5] * len(samples.rounds))


def test_quartiles_and_fifths() -> None:
    assert spread([3.0]) == timing.Spread(3.0, 3.0, 3.0, 3.0, 3.0)
    found = spread([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found.median, found.p25, found.p75) == (3.0, 2.0, 4.0)
    assert (found.p20, found.p80) == (pytest.approx(1.8), pytest.approx(4.2))


def test_rounds_are_counted_as_they_come_and_end_at_the_most() -> None:
    bench = Clockwork({"frozen": 1.0, "ours": 0.5}, [0.0, 0.5, 0.5, 0.0, 0.5, 0.0])
    counted: list[int] = []
    samples = interleave(bench, Effort(0.0, 5, 1e9, 4), load=bench.load, clock=bench.clock, advance=counted.append)
    assert counted == [1, 1, 1, 2]
    assert (len(samples.rounds), samples.discarded, samples.all_counted) == (4, 0, True)


def test_time_that_runs_out_leaves_three_rounds_all_the_same() -> None:
    bench = Clockwork({"frozen": 1.0, "ours": 0.5})
    assert len(bench.run(Effort(0.0, 9, 0.5)).rounds) == timing.FEWEST_ROUNDS


def test_a_system_that_does_not_tell_the_load_is_known() -> None:
    assert Clockwork({"frozen": 1.0}, [0.0, 0.0]).run(Effort(0.0, 3, 1e9)).watched
    assert not Clockwork({"frozen": 1.0}, [0.0, None]).run(Effort(0.0, 3, 1e9)).watched
