"""DistributedDataParallel: all processes decide alike, and as one process would that has all of the data."""

from __future__ import annotations

import pytest
import torch
from processes import Processes
from runs import STEPS, TOTAL, Training, build, run_whole, states
from torch.nn.parallel import DistributedDataParallel

from peftkernels.ops.rank_plan import RankState


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="term in the loss"),
        pytest.param({"closed_form": True, "deltaT": 3}, id="term in closed form"),
        pytest.param({"compact": True, "clip": False}, id="dead ranks at the end"),
        pytest.param({"strategy": "gate", "exact_budget": True}, id="by the gates' gradients"),
    ],
)
def test_two_processes_decide_as_one(pair: Processes, settings: dict[str, object]) -> None:
    one = run_whole(0, "one", 1, **settings)
    first, second = pair.run(run_whole, "ddp", **settings)
    assert len({tuple(mask) for mask in one.masks}) > 2, "the run decides nothing"
    assert first.masks == second.masks == one.masks
    for name, expected in one.factors.items():
        assert torch.equal(first.factors[name], second.factors[name]), name
        torch.testing.assert_close(first.factors[name], expected, rtol=1e-9, atol=1e-12)


def test_two_processes_in_float32(pair: Processes) -> None:
    """Rounding may decide a tie otherwise than one process does; the processes still decide alike."""
    first, second = pair.run(run_whole, "ddp", dtype=torch.float32)
    assert first.masks == second.masks
    assert sum(state == RankState.ACTIVE for state in first.masks[-1]) == TOTAL
    for name, factor in first.factors.items():
        assert torch.equal(factor, second.factors[name]), name


def masked_gradients(process: int, state: int) -> dict[str, bool]:
    """Whether each factor of two layers without any ACTIVE rank got a gradient of zeros, in two steps under DDP."""
    inner = build()
    for layer in (inner.first, inner.third):
        layer.rank_plan.update_(torch.full_like(layer.rank_state, state))
    model = DistributedDataParallel(inner)
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(4, 12, dtype=torch.float64)).square().mean().backward()
    return {
        f"{name}.{factor}": bool((getattr(inner.get_submodule(name), factor).grad == 0).all())
        for name in ("first", "third")
        for factor in ("lora_A", "lora_B", "lora_E")
    }


@pytest.mark.parametrize("state", [RankState.PROBE, RankState.DEAD])
def test_layers_without_an_active_rank_are_used_parameters(pair: Processes, state: RankState) -> None:
    """DDP without find_unused_parameters waits for every gradient: masked ranks give zeros, not nothing."""
    for zeros in pair.run(masked_gradients, int(state)):
        gates = {name: found for name, found in zeros.items() if name.endswith("lora_E")}
        assert all(found for name, found in zeros.items() if name not in gates)
        assert all(gates.values()) == (state == RankState.DEAD)


def frozen_run(process: int) -> list[list[int]]:
    inner = build()
    training = Training("one", process, 2)
    training.inner = inner
    training.model = DistributedDataParallel(inner, find_unused_parameters=True)
    training.optimizer = torch.optim.AdamW([p for p in inner.parameters() if p.requires_grad], lr=0.02)
    training.allocator = type(training.allocator)(inner, total_step=STEPS, budget=training.allocator.settings.budget)
    training.allocator.attach(training.optimizer)
    training.run(1, 4)
    training.allocator.freeze("second")
    masks = training.run(5, 9).masks
    assert masks[-1] == states(inner)
    return masks


def test_freezing_a_layer(pair: Processes) -> None:
    """DDP was made when the layer still trained: it finds the missing gradients with find_unused_parameters=True."""
    first, second = pair.run(frozen_run)
    assert first == second
    assert len(first) == 9
    assert first[-1][5:12] == [RankState.DEAD] * 7
