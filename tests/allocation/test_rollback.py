"""Going back to kept steps, by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rollback_runs import Run
from saved_runs import assert_same_bits
from small_models import NAMES, trainable

from peftkernels.allocation import (
    BudgetAllocator,
    Snapshots,
)
from peftkernels.allocation.strategies import STRATEGIES


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("compact", [False, True])
def test_any_kept_step_comes_back_to_the_bit(strategy: str, compact: bool) -> None:
    """Masks, gates, factors, statistics, moments and what else is trained; from there the run repeats itself."""

    def make() -> Run:
        run = Run()
        run.allocator.close()
        settings: dict[str, Any] = {"total_step": 20, "target_r": 2, "tinit": 3, "tfinal": 5, "deltaT": 2}
        run.allocator = BudgetAllocator(run.model, STRATEGIES[strategy](), compact=compact, **settings)
        run.allocator.attach(run.optimizer)
        return run

    whole = make()
    snapshots = Snapshots(whole.allocator, every=1, last=24)
    whole.allocator.add_callback(snapshots)
    outcomes = {}
    for step in range(1, 25):
        whole.advance(range(step, step + 1))
        outcomes[step] = copy.deepcopy(whole.outcome())
    assert snapshots.steps == list(range(1, 25))
    # From the last phase into each of the others; each is the newest kept step afterwards.
    for step in (22, 16, 15, 14, 7, 6, 3, 1):
        snapshots.to(step)
        assert snapshots.steps == list(range(1, step + 1))
        for part in ("model", "head", "optimizer"):
            assert_same_bits(whole.outcome()[part], outcomes[step][part], f"{part} at {step}")
        assert whole.allocator.steps == step
        del whole.losses[step:]
        whole.advance(range(step + 1, 25))
        for part in ("model", "head", "optimizer", "losses"):
            assert_same_bits(whole.outcome()[part], outcomes[24][part], f"{part} from {step}")
        snapshots.to(step)
    assert whole.allocator.rollbacks == 16
    with pytest.raises(ValueError, match=r"step: found 5, expected one of the kept steps \[1\]"):
        snapshots.to(5)


def test_memory_is_bounded_and_told() -> None:
    run = Run()
    snapshots = Snapshots(run.allocator, every=4, last=2)
    run.allocator.add_callback(snapshots)
    assert (snapshots.steps, snapshots.nbytes) == ([], 0)
    kept = []
    for batch in range(1, 18):
        run.advance(range(batch, batch + 1))
        kept.append(snapshots.steps)
    assert kept[:9] == [[1], [1], [1], [1, 4], [1, 4], [1, 4], [1, 4], [4, 8], [4, 8]]
    assert kept[-1] == [12, 16]
    factors = sum(p.numel() for p in trainable(run.model))
    # Factors with two moments and two averages, the head with two moments: four bytes each; then steps, masks, JSON.
    floats = 4 * (5 * factors + 3 * run.head.numel())
    assert 2 * floats < snapshots.nbytes < 2 * (floats + 8192)
    snapshots.drop(12)
    assert snapshots.steps == [16]
    for arguments in ({"every": 0, "last": 1}, {"every": 1, "last": 0}):
        with pytest.raises(ValueError, match="found 0, expected at least 1"):
            Snapshots(run.allocator, **arguments)


def test_a_token_of_other_parameters_is_refused_before_a_change() -> None:
    run = Run()
    run.advance(range(3))
    token = run.allocator.snapshot()
    run.advance(range(3, 5))
    before = copy.deepcopy(run.outcome())
    run.allocator.detach()
    run.allocator.attach(torch.optim.SGD(trainable(run.model), lr=0.1))
    with pytest.raises(ValueError, match="token: found 10 parameters, expected 9"):
        run.allocator.rollback(token)
    assert_same_bits(run.outcome(), before)
    # Without an optimizer it is about the factors.
    run.allocator.detach()
    run.allocator.rollback(token)
    assert run.allocator.steps == 3
    assert_same_bits(run.outcome()["optimizer"], before["optimizer"])


def test_unfreezing_by_rollback() -> None:
    run = Run()
    run.model.first.lora_B.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"no gradient on first\.lora_B:"):
        run.advance(range(12))
    token = run.allocator.snapshot()
    run.allocator.freeze("first")
    run.allocator.freeze("second", drop=False)
    run.advance(range(12, 16))
    run.allocator.rollback(token, "too early")
    assert run.allocator.frozen == ()
    flags = [getattr(run.model, name).lora_B.requires_grad for name in NAMES]
    assert flags == [False, True, True]
    assert all(getattr(run.model, name).lora_A.requires_grad for name in NAMES)
    before = run.model.first.lora_A.detach().clone()
    run.advance(range(16, 18))
    assert not torch.equal(run.model.first.lora_A, before)
    assert run.listener.events == [
        (12, "frozen", {"module": "first"}),
        (12, "frozen", {"module": "second"}),
        (16, "rollback", {"to": 12, "why": "too early"}),
    ]
