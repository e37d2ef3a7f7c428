"""Step times count only undisturbed rounds and are compared within a round."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from demo import timing
from demo.batches import Batch
from demo.timing import FROZEN, time_steps
from peftkernels.cli.timing import interleave

BATCH = Batch(
    torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
)


class Clock:
    """Stands in for the clock: every variant's step advances it by a known time, doubled in disturbed rounds."""

    def __init__(self, shares: list[float | None]) -> None:
        self.now = 0.0
        self.round = -1
        self.shares = shares
        self.order: list[list[str]] = []

    def perf_counter(self) -> float:
        return self.now

    def variant(self, name: str, seconds: float) -> object:
        clock = self

        class Variant:
            def step(self, batch: Batch) -> None:
                clock.order[-1].append(name)
                # The machine's speed drifts from round to round; ratios must not notice.
                clock.now += seconds * (1 + 0.1 * max(clock.round, 0))

        return Variant()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = self
        self.order.append([])

        class Load:
            share: float | None = None

            def __enter__(self) -> Load:
                clock.round += 1
                clock.order.append([])
                self.share = clock.shares[clock.round]
                return self

            def __exit__(self, *_: object) -> None:
                return

        monkeypatch.setattr(timing, "interleave", partial(interleave, clock=self.perf_counter, load=Load))


def run(clock: Clock, monkeypatch: pytest.MonkeyPatch, wanted: int, most_seconds: float = 1e9) -> timing.Timing:
    clock.install(monkeypatch)
    variants = {FROZEN: clock.variant(FROZEN, 0.1), "lora": clock.variant("lora", 0.12)}
    return time_steps(
        variants,
        [BATCH],
        wanted_rounds=wanted,
        most_rounds=2 * wanted,
        most_seconds=most_seconds,
        advance=lambda quiet: None,
    )


def test_ratios_are_paired_and_disturbed_rounds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(Clock([0.0, 0.5, 0.01, 0.061, 0.05, 0.06]), monkeypatch, wanted=4)
    assert (found.rounds, found.discarded, found.disturbed, found.measured) == (4, 2, False, True)
    assert found.steps["lora"].ratio == pytest.approx(1.2)
    assert found.steps["lora"].ratio_p25 == pytest.approx(1.2)
    assert found.steps[FROZEN].ratio == 1.0
    assert found.tokens == 6
    # Rounds 0, 2, 4, 5 at 1.0, 1.2, 1.4 and 1.5 times the time: median 1.3.
    assert found.steps["lora"].milliseconds == pytest.approx(156.0)
    assert found.samples["lora"] == pytest.approx([120.0, 144.0, 168.0, 180.0])


def test_too_few_undisturbed_rounds_count_all_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(Clock([0.5] * 7 + [0.0]), monkeypatch, wanted=4)
    assert (found.rounds, found.discarded, found.disturbed) == (8, 0, True)


def test_unknown_load_counts_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(Clock([None] * 4), monkeypatch, wanted=4)
    assert (found.rounds, found.disturbed, found.measured) == (4, False, False)


def test_time_limit_ends_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(Clock([0.5] * 40), monkeypatch, wanted=20, most_seconds=1.5)
    assert 3 <= found.rounds < 10


def test_variants_take_turns_at_being_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([0.0] * 4)
    run(clock, monkeypatch, wanted=4)
    assert clock.order[1:] == [[FROZEN, "lora"], ["lora", FROZEN]] * 2
