"""Step times count only undisturbed rounds and are compared within a round; saved bytes count each storage once."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from demo import timing
from demo.batches import Batch
from demo.saved import bytes_saved_for_backward
from demo.timing import FROZEN, time_steps
from peftkernels.cli import load
from peftkernels.cli.load import ForeignLoad

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

        monkeypatch.setattr(timing.time, "perf_counter", self.perf_counter)
        monkeypatch.setattr(timing, "ForeignLoad", Load)


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


def test_foreign_load_is_what_the_machine_did_beyond_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = iter([(10.0, 100.0), (13.0, 104.0)])
    own = iter([5.0, 7.0])
    monkeypatch.setattr(load, "_machine_times", lambda: next(machine))
    monkeypatch.setattr(load, "_own_seconds", lambda: next(own))
    with ForeignLoad() as measured:
        pass
    assert measured.share == pytest.approx(0.25)


def test_foreign_load_is_unknown_without_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_machine_times", lambda: None)
    with ForeignLoad() as measured:
        pass
    assert measured.share is None


@pytest.mark.alone
def test_own_and_machine_times_grow_by_the_work_done() -> None:
    machine, own, begin = load._machine_times(), load._own_seconds(), time.process_time()
    while time.process_time() - begin < 0.3:
        math.sqrt(2.0)
    assert load._own_seconds() - own == pytest.approx(time.process_time() - begin, abs=0.05)
    after = load._machine_times()
    if machine is None or after is None:
        assert not Path("/proc/stat").exists()
    else:
        assert after[0] - machine[0] > 0.2
        assert after[1] - machine[1] >= after[0] - machine[0]


def test_saved_bytes_count_each_storage_once_and_no_parameters() -> None:
    first, second = nn.Linear(8, 16, bias=False), nn.Linear(8, 4, bias=False)
    model = nn.ModuleList([first, second])
    x = torch.randn(5, 8, requires_grad=True)

    def forward() -> torch.Tensor:
        # Both layers save x (once: 160 bytes) and their weights (not counted); relu saves its output (320 bytes).
        return torch.relu(first(x)).sum() + second(x).sum()

    assert bytes_saved_for_backward(forward, model.parameters()) == 5 * 8 * 4 + 5 * 16 * 4


def test_saved_bytes_are_none_without_gradients() -> None:
    model = nn.Linear(8, 16).requires_grad_(False)
    assert bytes_saved_for_backward(lambda: model(torch.randn(5, 8)).sum(), model.parameters()) == 0
