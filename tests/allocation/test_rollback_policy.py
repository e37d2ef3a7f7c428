"""Going back to kept steps by a policy that watches loss and churn."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rollback_runs import Listener, Run
from safetensors.torch import load_file, save_file
from saved_runs import assert_same_bits
from small_models import adapter_layers, draw_gradients, trainable
from torch import Tensor

from peftkernels.allocation import (
    AdaLoraAllocator,
    BudgetAllocator,
    DecisionLog,
    RollbackPolicy,
    Snapshots,
    Strategy,
)
from peftkernels.allocation.policies.band import Band


def test_band_is_mean_and_deviation() -> None:
    band = Band(width=2.0, warmup=4, beta=0.999)
    values = [1.0, 2.0, 4.0, 9.0]
    for value in values:
        assert band.limit == math.inf
        band.take(value)
    mean = sum(values) / 4
    variance = sum((value - mean) ** 2 for value in values) / 4
    assert band.mean == pytest.approx(mean)
    assert band.variance == pytest.approx(variance)
    assert band.limit == pytest.approx(mean + 2 * math.sqrt(variance))
    for _ in range(2000):
        band.take(5.0)
    quick = Band(width=2.0, warmup=1, beta=0.5, relative=0.5, absolute=0.1)
    for value in (*values, *[5.0] * 60):
        quick.take(value)
    assert quick.limit == pytest.approx(7.5)
    quick.load(Band(width=1, warmup=1, beta=0.5).state())
    assert (quick.count, quick.mean, quick.variance) == (0, 0.0, 0.0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_false_alarm_on_a_normal_run(seed: int) -> None:
    plain, watched = Run(seed), Run(seed, policy={})
    for run in (plain, watched):
        run.advance(range(130))
    assert plain.losses[-1] < plain.losses[0]
    assert watched.policy is not None
    assert watched.policy.rollbacks == 0
    assert watched.policy.explain() == ""
    # Watching changes nothing.
    assert_same_bits(watched.outcome(), plain.outcome())


@pytest.mark.parametrize("poison", [1e4, math.inf, math.nan])
def test_a_poisoned_batch_is_rolled_back_and_the_run_recovers(poison: float) -> None:
    clean, plain = Run(), Run()
    watched = Run(policy={"patience": 1})
    clean.advance(range(118))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a step had gradients|the scores at step|step .*: loss nan")
        plain.advance(range(118), {60: poison})
        watched.advance(range(118), {60: poison})
    policy = watched.policy
    assert policy is not None
    assert policy.rollbacks == watched.allocator.rollbacks == 1
    # Batch 60 makes step 61; the newest snapshot two steps before is of 55, since 60 is one step before.
    rollbacks = [event for event in watched.listener.events if event[1] == "rollback"]
    assert [(step, details["to"]) for step, _, details in rollbacks] == [(61, 55)]
    expected = "left its band (mean" if math.isfinite(poison) else "is not finite"
    assert expected in rollbacks[0][2]["why"]
    assert rollbacks[0][2]["why"] in policy.explain()
    assert "the run was rolled back 1 times" in str(watched.allocator.explain())
    assert watched.allocator.steps == 112
    assert math.isfinite(watched.test_loss())
    assert watched.test_loss() < 1.5 * clean.test_loss()
    assert not plain.test_loss() < 3 * clean.test_loss()


def test_what_the_bands_learned_goes_back_too() -> None:
    watched, short = Run(policy={"patience": 1}), Run(policy={"patience": 1})
    watched.advance(range(61), {60: 1e4})
    short.advance(range(55))
    assert watched.policy is not None and short.policy is not None
    assert watched.allocator.steps == short.allocator.steps == 55
    for name in ("loss", "churn"):
        assert watched.policy._bands[name].state() == short.policy._bands[name].state()
    # The decision that is compared with next is the one before the snapshot.
    watched.advance(range(61, 63))
    short.advance(range(61, 63))
    assert watched.policy._bands["churn"].state() == short.policy._bands["churn"].state()


def test_patience_lets_a_single_spike_pass() -> None:
    run = Run(policy={"patience": 2, "loss_slack": 0.5})
    run.advance(range(60))
    assert run.policy is not None
    policy = run.policy
    band = policy._bands["loss"]
    limit, count = band.limit, band.count
    allocator = run.allocator

    def step(loss: float) -> None:
        allocator.observe(loss)
        for parameter in trainable(run.model):
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()

    step(limit * 10)
    assert (band.count, policy.rollbacks) == (count, 0)
    step(limit * 0.9)
    step(limit * 10)
    assert policy.rollbacks == 0
    step(limit * 10)
    assert policy.rollbacks == 1
    assert "for the 2. time in a row" in policy.explain()


class _Storm(Strategy):
    """Scores that stay in their order, but turn around with every decision while there is a storm."""

    name = "storm"

    def begin(self, statistics: Any) -> None:
        self._order = torch.arange(statistics.total, dtype=statistics.dtype)
        self.storm = False
        self.turned = 1

    def scores(self, statistics: Any) -> Tensor:
        self.turned = -self.turned if self.storm else 1
        return self._order * self.turned


def test_a_churn_storm_is_rolled_back() -> None:
    layers = adapter_layers((8, 9), (10, 9), (9, 8), (9, 9), r=12)
    storm = _Storm()
    allocator = BudgetAllocator(layers, storm, total_step=200, target_r=6)
    optimizer = torch.optim.SGD(trainable(layers), lr=1e-3)
    allocator.attach(optimizer)
    listener = Listener()
    allocator.add_observer(listener)
    policy = RollbackPolicy(
        Snapshots(allocator, every=10, last=2), loss_width=None, patience=3, learning_rate_factor=0.5
    )
    allocator.add_callback(policy)

    def advance(steps: int) -> None:
        for _ in range(steps):
            draw_gradients(layers)
            optimizer.step()

    advance(64)
    pattern = allocator.rank_pattern()
    assert policy.explain() == ""
    storm.storm = True
    # Turned around at 65, back at 66, and again.
    advance(3)
    assert listener.events[-1][:2] == (67, "rollback")
    assert "churn" in listener.events[-1][2]["why"]
    assert "learning rates times 0.5" in policy.explain()
    assert allocator.steps == 60
    assert optimizer.param_groups[0]["lr"] == 5e-4
    storm.storm = False
    advance(4)
    assert allocator.rank_pattern() == pattern
    assert policy.rollbacks == 1


def test_going_back_further_and_no_further_than_allowed() -> None:
    run = Run(policy={"patience": 1, "limit": 2})
    poison = {40: math.nan, 45: math.nan}
    run.advance(range(40))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a step had gradients|the scores at step")
        run.advance(range(40, 46), poison)
        rollbacks = [(step, details["to"]) for step, kind, details in run.listener.events if kind == "rollback"]
        # Step 41 goes back to 35; the alarm at step 40 comes before 41 was passed, so 35 is given up for 30.
        assert rollbacks == [(41, 35), (40, 30)]
        with pytest.warns(UserWarning, match="step 31: loss nan is not finite; no rollback is left of 2"):
            run.advance(range(46, 47), {46: math.nan})
        run.advance(range(47, 50), {47: math.nan})
    assert run.policy is not None
    assert (run.policy.rollbacks, run.allocator.rollbacks) == (2, 2)
    alarms = [details["why"] for _, kind, details in run.listener.events if kind == "alarm"]
    assert alarms == ["loss nan is not finite; no rollback is left of 2"]
    assert len(run.policy.explain().splitlines()) == 3


def test_without_a_snapshot_the_alarm_is_told() -> None:
    run = Run(policy={})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a step had gradients")
        with pytest.warns(UserWarning, match="no snapshot from before step 1"):
            run.advance(range(1), {0: math.nan})
    assert run.allocator.rollbacks == 0


@pytest.mark.parametrize("stop", [30, 58, 61, 62, 64, 90])
def test_a_resumed_policy_does_the_same_to_the_bit(stop: int, tmp_path: Path) -> None:
    """Also where the resume comes between the snapshot and the rollback to it, or within the patience."""
    poison = {60: 300.0, 61: 300.0, 80: math.nan}
    settings = {"patience": 2, "learning_rate_factor": 0.7}
    whole = Run(1, settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a step had gradients|the scores at step")
        whole.advance(range(110), poison)
        first = Run(1, settings)
        first.advance(range(stop), poison)
        assert first.policy is not None
        save_file(first.allocator.state_dict(), tmp_path / "allocator.safetensors")
        save_file(first.policy.state_dict(), tmp_path / "policy.safetensors")
        others = {
            "model": first.model.state_dict(),
            "head": first.head.detach(),
            "optimizer": first.optimizer.state_dict(),
        }
        torch.save(others, tmp_path / "others.pt")
        second = Run(2, settings)
        others = torch.load(tmp_path / "others.pt", weights_only=True)
        second.model.load_state_dict(others["model"])
        second.head.data.copy_(others["head"])
        second.optimizer.load_state_dict(others["optimizer"])
        second.allocator.load_state_dict(load_file(tmp_path / "allocator.safetensors"))
        assert second.policy is not None
        second.policy.load_state_dict(load_file(tmp_path / "policy.safetensors"))
        second.advance(range(stop, 110), poison)
    assert whole.policy is not None
    assert whole.policy.rollbacks == 2
    second.losses[:0] = first.losses
    assert_same_bits(second.outcome(), whole.outcome())
    assert second.policy.explain() == whole.policy.explain()
    assert_same_bits(second.policy.state_dict(), whole.policy.state_dict())
    assert second.listener.facts["rollbacks"] == first.allocator.rollbacks


def test_states_of_other_policies_are_refused() -> None:
    run = Run(policy={})
    run.advance(range(3))
    assert run.policy is not None
    state = run.policy.state_dict()
    other = RollbackPolicy(Snapshots(run.allocator, every=5, last=3), patience=4)
    with pytest.raises(ValueError, match=r"patience \(found 2, expected 4\)"):
        other.load_state_dict(state)
    other = RollbackPolicy(Snapshots(run.allocator, every=6, last=3))
    with pytest.raises(ValueError, match="state: found every 5, expected 6"):
        other.load_state_dict(state)
    elsewhere = AdaLoraAllocator(adapter_layers((8, 9)), total_step=9, target_r=2)
    other = RollbackPolicy(Snapshots(elsewhere, every=5, last=3))
    with pytest.raises(ValueError, match="state: it was saved by an allocator with other settings"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"state\['metadata'\]: found NoneType"):
        other.load_state_dict({})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss_width": None, "churn_width": None}, ValueError, "loss_width: found None beside churn_width None"),
        ({"loss_width": -1}, ValueError, "loss_width: found -1"),
        ({"churn_slack": "1"}, TypeError, "churn_slack: found '1'"),
        ({"beta": 1.0}, ValueError, "beta: found 1.0"),
        ({"warmup": 0}, ValueError, "warmup: found 0"),
        ({"patience": 1.5}, TypeError, "patience: found 1.5"),
        ({"limit": 0}, ValueError, "limit: found 0"),
        ({"learning_rate_factor": 2}, ValueError, "learning_rate_factor: found 2, expected at most 1"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    allocator = AdaLoraAllocator(adapter_layers((8, 9)), total_step=9, target_r=2)
    with pytest.raises(error, match=message):
        RollbackPolicy(Snapshots(allocator, every=5, last=3), **arguments)


def test_a_loss_that_is_not_given_is_missed() -> None:
    layers = adapter_layers((8, 9))
    allocator = AdaLoraAllocator(layers, total_step=9, target_r=2)
    allocator.add_callback(RollbackPolicy(Snapshots(allocator, every=5, last=3)))
    draw_gradients(layers)
    with pytest.raises(RuntimeError, match=r"call allocator\.observe\(loss\)"):
        allocator.step()


@pytest.mark.filterwarnings("ignore:a step had gradients", "ignore:the scores at step")
@pytest.mark.parametrize("stop", [50, 63, 85])
def test_the_log_of_a_resumed_run_tells_its_rollbacks(stop: int, tmp_path: Path) -> None:
    """Killed some steps after its checkpoint, before, between and after two rollbacks: the same log to the byte."""
    poison = {60: math.nan, 80: math.nan}
    whole = Run(1, {})
    whole.allocator.add_observer(DecisionLog(tmp_path / "whole.jsonl"))
    whole.advance(range(100), poison)
    killed = Run(1, {})
    killed.allocator.add_observer(DecisionLog(tmp_path / "killed.jsonl"))
    killed.advance(range(stop), poison)
    saved = copy.deepcopy(killed.outcome())
    assert killed.policy is not None
    policy = killed.policy.state_dict()
    killed.advance(range(stop, stop + 4), poison)
    del killed

    resumed = Run(2, {})
    resumed.model.load_state_dict(saved["model"])
    resumed.head.data.copy_(saved["head"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.allocator.load_state_dict(saved["allocator"])
    assert resumed.policy is not None
    resumed.policy.load_state_dict(policy)
    resumed.allocator.add_observer(DecisionLog(tmp_path / "killed.jsonl"))
    resumed.advance(range(stop, 100), poison)
    assert resumed.allocator.rollbacks == 2
    log = (tmp_path / "whole.jsonl").read_bytes()
    assert log.count(b'"event": "rollback"') + log.count(b'"event":"rollback"') == 2
    assert (tmp_path / "killed.jsonl").read_bytes() == log
