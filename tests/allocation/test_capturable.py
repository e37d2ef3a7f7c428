"""Steps that a CUDA graph may capture: the same as the others, and without a look at the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from saved_runs import BUDGETS, COSTS, assert_same_bits, plan_of
from small_models import NAMES, Base, adapt, adapter_layers, draw_gradients, trainable
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftkernels.allocation import AdaLoraAllocator, Budget, BudgetAllocator, Group
from peftkernels.allocation.strategies import STRATEGIES

SCHEDULES: dict[str, dict[str, int]] = {
    "every step": {"total_step": 14},
    "warm-up": {"total_step": 14, "tinit": 5, "tfinal": 2},
    "every third": {"total_step": 15, "tinit": 1, "tfinal": 4, "deltaT": 3},
    "rarer than the run": {"total_step": 12, "deltaT": 40, "tfinal": 3},
}
CAPTURABLE = [name for name, make in STRATEGIES.items() if make().capturable]
# What makes the host wait for a device: reading numbers, and shapes that depend on them.
READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
}


class _Reads(TorchDispatchMode):
    """Counts what would wait for the device; `refuse` raises there."""

    def __init__(self, refuse: bool = True) -> None:
        super().__init__()
        self.refuse = refuse
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked_index = function is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if function in READS or masked_index:
            if self.refuse:
                raise AssertionError(f"the host waits for the device in {function}")
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class _ScalerAware(torch.optim.Optimizer):
    """Descends, and leaves the parameters alone where a scaler says in `found_inf` that there was an overflow."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            if self.found_inf is None:
                parameter.sub_(0.1 * parameter.grad)
            else:
                parameter.sub_(0.1 * parameter.grad * (1 - self.found_inf))


def _compare(one: BudgetAllocator, other: BudgetAllocator, models: tuple[Any, Any], where: str) -> None:
    first, second = (
        {
            "plans": [plan_of(model.get_submodule(name)) for name in NAMES],
            "factors": [p.detach() for p in trainable(model)],
            "pattern": allocator.rank_pattern(),
            "counts": [allocator.steps, allocator.nonfinite_steps, allocator.skipped_steps, allocator.all_active],
            "strategy": {} if where >= "last" else dict(allocator.strategy.tensors()),
        }
        for allocator, model in zip((one, other), models, strict=True)
    )
    assert_same_bits(second, first, where)
    decisions = one.decision, other.decision
    assert (decisions[0] is None) == (decisions[1] is None), where
    if decisions[0] is not None and decisions[1] is not None:
        assert (decisions[0].step, decisions[0].budget) == (decisions[1].step, decisions[1].budget), where
        assert_same_bits([decisions[0].scores, decisions[0].thresholds], [decisions[1].scores, decisions[1].thresholds])


@pytest.mark.filterwarnings("ignore:a step had gradients", "ignore:the scores at step")
@pytest.mark.parametrize("exact_budget", [False, True], ids=["ties go", "exact"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("strategy", "budget"), [*((name, "ranks") for name in CAPTURABLE), *(("gate", name) for name in BUDGETS)]
)
def test_host_and_device_decide_the_same(strategy: str, budget: str, schedule: str, exact_budget: bool) -> None:
    """Masks, gates, plans, averages, counts after every step; with ties, overflows and a bad gradient."""
    allocators, models, optimizers = [], [], []
    for capturable in (False, True):
        torch.manual_seed(0)
        model = adapt(Base(), r=6)
        allocator = BudgetAllocator(
            model,
            STRATEGIES[strategy](),
            budget=BUDGETS[budget],
            costs=COSTS,
            exact_budget=exact_budget,
            capturable=capturable,
            **SCHEDULES[schedule],
        )
        optimizers.append(_ScalerAware(trainable(model)))
        allocator.attach(optimizers[-1])
        allocators.append(allocator)
        models.append(model)
    for step in range(1, 18):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)
            draw_gradients({name: model.get_submodule(name) for name in NAMES})
            # A layer without a gradient ties throughout.
            for parameter in trainable(model.second):
                parameter.grad.zero_()
            if step == 4:
                model.third.lora_E.grad[0] = math.nan
            optimizer.found_inf = torch.tensor(float(step in (2, 9)))
            optimizer.step()
            if step == 4:
                with torch.no_grad():
                    model.third.lora_E[0] = 0.1
        last = allocators[0].settings.last_allocation
        _compare(*allocators, tuple(models), f"{'last' if allocators[0].steps >= last else ''} {step}")


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("strategy", CAPTURABLE)
def test_a_capturable_step_reads_nothing(strategy: str, budget: str) -> None:
    """Over all phases, from the second step on: the first may be a warm-up before the capture, and need not be."""
    torch.manual_seed(0)
    model = adapt(Base(), r=6)
    allocator = BudgetAllocator(
        model,
        STRATEGIES[strategy](),
        budget=BUDGETS[budget],
        costs=COSTS,
        capturable=True,
        **SCHEDULES["every third"],
    )
    layers = {name: model.get_submodule(name) for name in NAMES}
    kernels = allocator.statistics.kernels.name
    optimizer = _ScalerAware(trainable(model))
    allocator.attach(optimizer)
    for step in range(1, 18):
        draw_gradients(layers)
        optimizer.found_inf = None if step % 3 else torch.tensor(float(step == 6))
        # The implementation for the CPU reads tensors there, for nothing is waited for.
        with _Reads(refuse=kernels != "eager") as reads:
            allocator.observe(torch.tensor(1.0))
            optimizer.step()
        # One: whether the gradients are finite, which `EagerKernels` asks where that is free.
        assert len(reads.names) <= (1 if strategy == "adalora" and kernels == "eager" else 0), reads.names
    assert allocator.steps == 16


def _on_meta(**arguments: Any) -> tuple[BudgetAllocator, dict[str, Any]]:
    layers = adapter_layers((40, 24), (24, 40), (24, 24))
    layers = {name: layer.to("meta") for name, layer in layers.items()}
    return BudgetAllocator(layers, STRATEGIES[arguments.pop("strategy")](), impl="eager", **arguments), layers


def _budget(kind: str) -> dict[str, Any]:
    groups = {"two": Group(["layer0", "layer1"], 5.0), "one": Group("layer2", 2.0)}
    costs = {"layer0": 1.0, "layer1": 0.5, "layer2": 0.75}
    return {
        "target_r": {"target_r": 2},
        "parameters": {"budget": Budget(500, "parameters")},
        "groups": {"budget": Budget(groups=groups)},
        "microseconds": {"budget": Budget(unit="microseconds", groups=groups), "costs": costs},
    }[kind]


@pytest.mark.parametrize("exact_budget", [False, True])
@pytest.mark.parametrize("kind", ["target_r", "parameters", "groups", "microseconds"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_away_from_the_cpu_no_step_reads_the_device_before_the_last_allocation(
    strategy: str, kind: str, exact_budget: bool
) -> None:
    """On "meta" tensors, which have no numbers to be read, as on a device whose numbers are dear: every read raises.
    The last allocation reads one number on purpose, how many steps had bad gradients, to warn about them."""
    arguments: dict[str, Any] = {"strategy": strategy, "exact_budget": exact_budget, **_budget(kind)}
    if STRATEGIES[strategy]().needs_loss:
        pytest.skip(f"{strategy} learns from the loss, which it reads")
    allocator, layers = _on_meta(total_step=9, tfinal=3, tinit=1, deltaT=2, **arguments)
    for step in range(1, 6):
        draw_gradients(layers)
        allocator.step()
        assert allocator.steps == step
        assert not any(layer.rank_state.device.type != "meta" for layer in layers.values())
    draw_gradients(layers)
    with pytest.raises(RuntimeError, match=r"meta tensors|Tensor\.item"):
        allocator.step()


@pytest.mark.parametrize("exact_budget", [False, True])
@pytest.mark.parametrize("kind", ["target_r", "parameters", "groups", "microseconds"])
@pytest.mark.parametrize("strategy", CAPTURABLE)
def test_away_from_the_cpu_a_capturable_step_reads_nothing(strategy: str, kind: str, exact_budget: bool) -> None:
    """In any phase, attached or not."""
    arguments: dict[str, Any] = {"strategy": strategy, "exact_budget": exact_budget, **_budget(kind)}
    allocator, layers = _on_meta(total_step=9, tfinal=3, tinit=1, deltaT=2, capturable=True, **arguments)
    for step in range(1, 12):
        draw_gradients(layers)
        if step == 5:
            optimizer = _ScalerAware(trainable(layers))
            allocator.attach(optimizer)
            optimizer.found_inf = torch.zeros(1, device="meta")
        if step < 5:
            allocator.step()
        else:
            optimizer.step()


def test_captured_tensors_keep_their_places() -> None:
    """What a graph wrote to when it was captured is what it writes to after a rollback and a load."""
    layers = adapter_layers((8, 9), (10, 9))
    allocator = AdaLoraAllocator(layers, total_step=20, target_r=2, capturable=True)
    fresh = allocator.state_dict()

    def step() -> None:
        draw_gradients(layers)
        allocator.step()

    def places() -> list[int]:
        decision = allocator.decision
        assert decision is not None
        tensors = [allocator.masks.keep, decision.scores, decision.thresholds]
        plans = [tensor for layer in layers.values() for tensor in plan_of(layer)]
        progress = allocator.parts.progress
        own: list[Tensor] = [*tensors, *plans, *allocator.strategy.tensors().values(), progress._nonfinite]
        return [tensor.data_ptr() for tensor in own]

    step()
    step()
    token, before = allocator.snapshot(), places()
    step()
    assert places() == before
    allocator.rollback(token)
    assert places() == before
    assert allocator.decision is not None and allocator.decision.step == 2
    step()
    assert places() == before
    allocator.load_state_dict(fresh)
    assert allocator.decision is None
    assert all(map(all, allocator.rank_pattern().values()))
    # The first decision after it is in the tensors of the last one before.
    step()
    assert places() == before


def test_what_a_captured_run_refuses() -> None:
    layers = adapter_layers((8, 9), (10, 9))
    arguments: dict[str, Any] = {"total_step": 20, "target_r": 2, "tfinal": 4}
    allocator = AdaLoraAllocator(layers, capturable=True, **arguments)
    with pytest.raises(ValueError, match="callback: a captured step calls nothing on the host"):
        allocator.add_callback(print)
    with pytest.raises(ValueError, match="observer: a captured step tells nothing to the host"):
        allocator.add_observer(None)
    with pytest.raises(RuntimeError, match="found no gradient on any lora_A"):
        allocator.step()
    draw_gradients(layers)
    allocator.step(3)
    assert allocator.steps == 3
    with pytest.raises(ValueError, match="step: found 17 after 3, expected at most 16"):
        allocator.step(17)
    with pytest.raises(ValueError, match="step: found 2, expected more than the last step, 3"):
        allocator.step(2)
    allocator.step(16)
    assert allocator.decision is not None and allocator.decision.step == 16
    for layer in layers.values():
        layer.to("meta")
    draw_gradients(layers)
    with pytest.raises(RuntimeError, match="the layers moved from cpu to meta"):
        allocator.step()


@pytest.mark.parametrize("drop", [False, True])
def test_freezing_before_the_capture(drop: bool) -> None:
    """Frozen on the host, obeyed by the device: equal to the run that is not capturable."""
    outcomes = []
    for capturable in (False, True):
        torch.manual_seed(0)
        layers = adapter_layers((8, 9), (10, 9), (9, 8))
        allocator = AdaLoraAllocator(layers, total_step=20, target_r=2, deltaT=2, capturable=capturable)
        for step in range(14):
            if step == 5:
                allocator.freeze("layer1", drop=drop)
            torch.manual_seed(step)
            draw_gradients(layers)
            allocator.step()
        gates = [layer.lora_E.detach() for layer in layers.values()]
        outcomes.append([allocator.rank_pattern(), gates, [plan_of(layer) for layer in layers.values()]])
    assert_same_bits(outcomes[1], outcomes[0])
