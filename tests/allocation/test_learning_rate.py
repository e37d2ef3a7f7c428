"""Learning rates that follow the allocation, and priorities of modules."""

from __future__ import annotations

import itertools

import pytest
import torch
from planted import Planted, ranks_found, train
from small_models import adapter_layers, trainable
from torch import nn

from peftkernels.allocation import Budget, BudgetAllocator
from peftkernels.allocation.policies.learning_rate import (
    LearningRatePriorities,
    LearningRateScale,
    bounded_mean_one,
    module_groups,
)
from peftkernels.allocation.strategies import GateGradient, Magnitude
from peftkernels.nn import AdaLoRALinear


def three_layers(optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, lr: float = 0.1):
    torch.manual_seed(0)
    layers = adapter_layers((5, 4), (6, 4), (7, 4), r=4)
    groups = module_groups(layers, lr=lr)
    allocator = BudgetAllocator(layers, Magnitude(), total_step=100, target_r=2, tinit=90)
    made = optimizer(groups)  # type: ignore[call-arg]
    allocator.attach(made)
    return layers, made, allocator


def give_gradients(layers: dict[str, AdaLoRALinear], sizes: tuple[float, ...]) -> None:
    for layer, size in zip(layers.values(), sizes, strict=True):
        for parameter in trainable(layer):
            parameter.grad = torch.full_like(parameter, size)


def test_multipliers_are_bounded_ordered_and_one_on_average() -> None:
    for values in itertools.product([0.0, 1e-6, 0.3, 1.0, 50.0], repeat=4):
        if any(values):
            found = bounded_mean_one(list(values), 0.5, 2.0)
            assert sum(found) / 4 == pytest.approx(1.0, rel=1e-9)
            assert all(0.5 <= value <= 2.0 for value in found)
            for (value, multiplier), (other, its) in itertools.combinations(zip(values, found, strict=True), 2):
                assert (value - other) * (multiplier - its) >= 0


def test_within_the_bounds_they_are_in_proportion() -> None:
    assert bounded_mean_one([2.0, 3.0, 4.0], 0.1, 5.0) == pytest.approx([2 / 3, 1.0, 4 / 3])
    assert bounded_mean_one([0.0, 0.0, 0.0, 5.0], 0.5, 2.0) == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2.0])


def test_the_optimizer_steps_by_the_multiplied_rate() -> None:
    layers, optimizer, allocator = three_layers()
    policy = LearningRatePriorities(lowest=0.1, highest=5.0)
    policy.attach(allocator)
    give_gradients(layers, (1.0, 2.0, 3.0))
    optimizer.step()
    assert policy.current == pytest.approx({"layer0": 0.5, "layer1": 1.0, "layer2": 1.5})
    before = [layer.lora_E.detach().clone() for layer in layers.values()]
    optimizer.step()
    for layer, old, step in zip(layers.values(), before, (0.05, 0.2, 0.45), strict=True):
        assert torch.allclose(old - layer.lora_E, torch.full_like(old, step), rtol=1e-5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
    ],
)
def test_schedulers_do_not_see_the_multiplier(scheduler) -> None:
    rates = []
    for with_policy in (False, True):
        layers, optimizer, allocator = three_layers()
        if with_policy:
            LearningRatePriorities().attach(allocator)
        schedule = scheduler(optimizer)
        own = []
        for _ in range(8):
            give_gradients(layers, (1.0, 2.0, 30.0))
            optimizer.step()
            schedule.step()
            own.append([group["lr"] for group in optimizer.param_groups])
        rates.append(own)
    assert rates[0] == rates[1]
    assert rates[0][0] != rates[0][-1]


def test_a_resumed_policy_goes_on_as_before() -> None:
    layers, optimizer, allocator = three_layers()
    policy = LearningRatePriorities()
    policy.attach(allocator)
    give_gradients(layers, (1.0, 2.0, 30.0))
    optimizer.step()
    state = policy.state_dict()
    give_gradients(layers, (3.0, 2.0, 1.0))
    optimizer.step()
    expected = policy.current
    assert expected != state["multipliers"]

    layers, optimizer, allocator = three_layers()
    resumed = LearningRatePriorities()
    resumed.attach(allocator)
    resumed.load_state_dict(state)
    give_gradients(layers, (3.0, 2.0, 1.0))
    optimizer.step()
    assert resumed.current == expected


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    layers, optimizer, allocator = three_layers()
    policy = LearningRatePriorities()
    policy.attach(allocator)
    give_gradients(layers, (1.0, 2.0, 3.0))
    optimizer.step()
    before = policy.current
    give_gradients(layers, (1.0, float("nan"), 300.0))
    optimizer.step()
    assert policy.current == before


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_layer_that_has_nothing_to_learn_gets_the_lowest_rate(seed: int) -> None:
    problem = Planted(seed=seed)
    assert problem.true_ranks[0] == 0
    optimizer = torch.optim.AdamW(module_groups(problem.student, lr=2e-2, weight_decay=0.0))
    allocator = BudgetAllocator(problem.student, Magnitude(), total_step=99, budget=Budget(problem.total), tinit=90)
    allocator.attach(optimizer)
    policy = LearningRatePriorities(lowest=0.5, highest=2.0)
    policy.attach(allocator)
    means = []
    train(problem, allocator, optimizer, 40, each=lambda *_: means.append(sum(policy.current.values()) / 4))
    assert min(policy.current, key=policy.current.__getitem__) == "layers.0"
    assert policy.current["layers.0"] == pytest.approx(0.5)
    assert means == pytest.approx([1.0] * 40)


def test_groups_of_several_modules_are_refused() -> None:
    layers = adapter_layers((5, 4), (6, 4))
    allocator = BudgetAllocator(layers, Magnitude(), total_step=9, target_r=2)
    with pytest.raises(RuntimeError, match="attached to no optimizer"):
        LearningRatePriorities().attach(allocator)
    allocator.attach(torch.optim.SGD(trainable(layers), lr=0.1))
    with pytest.raises(ValueError, match="found layer0, layer1 in parameter group 0"):
        LearningRatePriorities().attach(allocator)
    allocator.detach()
    groups = module_groups(layers)
    groups[1]["params"].append(nn.Parameter(torch.zeros(1)))
    allocator.attach(torch.optim.SGD(groups, lr=0.1))
    with pytest.raises(ValueError, match="found layer1, other parameters in parameter group 1"):
        LearningRatePriorities().attach(allocator)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"lowest, highest: found 1\.5 and 2\.0"):
        LearningRatePriorities(lowest=1.5)
    with pytest.raises(ValueError, match="every: found 0"):
        LearningRatePriorities(every=0)
    with pytest.raises(ValueError, match="beta: found 1"):
        LearningRatePriorities(beta=1.0)


def test_priorities_move_ranks_to_the_modules_they_name() -> None:
    plain = ranks_found(GateGradient())
    favoured = ranks_found(GateGradient(priorities={"layers.1": 1e6}))
    assert favoured[1] > plain[1]
    assert sum(favoured) == sum(plain)


def test_priorities_multiply_the_scores() -> None:
    layers = adapter_layers((5, 4), (6, 4), r=2)
    give_gradients(layers, (1.0, 1.0))
    scores = []
    for priorities in ({}, {"layer*": 2.0, "*1": 3.0}):
        allocator = BudgetAllocator(layers, GateGradient(priorities=priorities), total_step=9, target_r=1, tinit=5)
        allocator.step()
        scores.append(allocator.strategy.scores(allocator.statistics))
        allocator.close()
    assert torch.allclose(scores[1], scores[0] * torch.tensor([2.0, 2.0, 6.0, 6.0]))
    with pytest.raises(ValueError, match=r"priorities: found no module for '\*\.v_proj'"):
        BudgetAllocator(layers, GateGradient(priorities={"*.v_proj": 2.0}), total_step=9, target_r=1)
    with pytest.raises(ValueError, match=r"priorities\['a'\]: found -1"):
        GateGradient(priorities={"a": -1})


def test_the_step_in_the_weight_keeps_its_length_when_ranks_fall() -> None:
    """Adam moves every gate by the rate; with orthonormal factors ‖ΔW‖ = rate·√live, times the multiplier √(r/live)."""
    lengths = []
    for policy in (None, LearningRateScale()):
        layer = AdaLoRALinear.from_linear(nn.Linear(32, 32), 16)
        with torch.no_grad():
            for factor in (layer.lora_A.T, layer.lora_B):
                factor.copy_(torch.linalg.qr(torch.randn(32, 32)).Q[:, :16])
        layers = {"only": layer}
        allocator = BudgetAllocator(layers, Magnitude(), total_step=6, target_r=4, tinit=1, tfinal=3, exact_budget=True)
        optimizer = torch.optim.Adam(module_groups(layers, lr=1e-2))
        allocator.attach(optimizer)
        if policy is not None:
            policy.attach(allocator)
        own = []
        for _ in range(6):
            keep = allocator.masks.keep.clone()
            before = layer.lora_E.detach().clone()
            layer.lora_A.grad, layer.lora_B.grad = torch.zeros_like(layer.lora_A), torch.zeros_like(layer.lora_B)
            layer.lora_E.grad = torch.ones_like(layer.lora_E)
            optimizer.step()
            moved = torch.where(allocator.masks.keep.unsqueeze(1), layer.lora_E.detach() - before, 0.0)
            own.append((int(keep.sum()), float((layer.lora_B.detach() * moved.T @ layer.lora_A.detach()).norm())))
        lengths.append(own)
    plain, scaled = lengths
    assert plain[0] == pytest.approx((16, 0.04), rel=1e-4)
    assert plain[-1] == pytest.approx((4, 0.02), rel=1e-4)
    assert scaled[0] == pytest.approx((16, 0.04), rel=1e-4)
    assert scaled[-1] == pytest.approx((4, 0.04), rel=1e-4)


def test_the_scale_follows_each_module_within_its_bound() -> None:
    layers, _, allocator = three_layers()
    policy = LearningRateScale(highest=1.5)
    assert policy.multipliers(allocator) == dict.fromkeys(layers, 1.0)
    allocator.masks.take(torch.tensor([1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], dtype=torch.bool))
    assert policy.multipliers(allocator) == pytest.approx({"layer0": 2**0.5, "layer1": 1.5, "layer2": 1.0})
    with pytest.raises(ValueError, match="power: found 0"):
        LearningRateScale(power=0)
    with pytest.raises(ValueError, match=r"highest: found 0\.5"):
        LearningRateScale(highest=0.5)


def test_several_policies_multiply_and_all_are_undone() -> None:
    layers, optimizer, allocator = three_layers()
    priorities, scale = LearningRatePriorities(lowest=0.1, highest=5.0), LearningRateScale()
    priorities.attach(allocator)
    scale.attach(allocator)
    allocator.masks.take(torch.tensor([1, 1, 1, 1] * 2 + [1, 0, 0, 0], dtype=torch.bool))
    give_gradients(layers, (1.0, 2.0, 3.0))
    optimizer.step()
    before = [layer.lora_E.detach().clone() for layer in layers.values()]
    optimizer.step()
    for layer, old, step in zip(layers.values(), before, (0.05, 0.2, 0.45 * 2), strict=True):
        assert torch.allclose(old - layer.lora_E, torch.full_like(old, step), rtol=1e-5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1]


def test_a_step_that_fails_leaves_no_multiplied_rate_for_the_next() -> None:
    layers, optimizer, allocator = three_layers()
    policy = LearningRatePriorities(lowest=0.1, highest=5.0)
    policy.attach(allocator)
    give_gradients(layers, (1.0, 2.0, 3.0))
    optimizer.step()

    def closure() -> float:
        raise KeyError("no batch")

    for _ in range(3):
        with pytest.raises(KeyError):
            optimizer.step(closure)
    before = layers["layer2"].lora_E.detach().clone()
    optimizer.step()
    assert torch.allclose(before - layers["layer2"].lora_E, torch.full_like(before, 0.45), rtol=1e-5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1]
