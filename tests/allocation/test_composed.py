"""Strategies over another one decide on the device, where the inner one does, as they do on the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_models import adapter_layers, draw_gradients

from peftkernels.allocation import Budget, BudgetAllocator, Strategy
from peftkernels.allocation.strategies import AdaLora, Bandit, GateGradient, GroupShares, Knapsack, Prior
from peftkernels.allocation.strategies.rank_prior import PriorModule, RankPrior

PRIOR = RankPrior(tuple(PriorModule("layer", depth, 12, 8, 6, kept) for depth, kept in ((0.0, 1), (1.0, 5))))
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "knapsack": lambda: Knapsack(AdaLora()),
    "prior": lambda: Prior(AdaLora(), PRIOR, half_life=5),
    "both": lambda: Knapsack(Prior(GateGradient(), PRIOR)),
}


def named(layers: dict) -> dict:
    return {f"layer.{index}": layer for index, layer in enumerate(layers.values())}


def history(strategy: Strategy, capturable: bool) -> tuple[list[dict[str, list[bool]]], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    layers = named(adapter_layers((12, 8), (8, 6), (30, 20)))
    allocator = BudgetAllocator(
        layers, strategy, total_step=14, budget=Budget(200, "parameters"), deltaT=2, tfinal=3, capturable=capturable
    )
    masks = []
    for step in range(14):
        draw_gradients(layers)
        if step == 4:
            layers["layer.0"].lora_E.grad.fill_(float("nan"))
        allocator.step()
        masks.append(allocator.rank_pattern())
    return masks, {name: tensor.clone() for name, tensor in strategy.tensors().items()}


@pytest.mark.filterwarnings("ignore:a step had gradients that are not finite")
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_on_the_device_decides_as_one_on_the_host(name: str) -> None:
    host, _ = history(STRATEGIES[name](), capturable=False)
    device, _ = history(STRATEGIES[name](), capturable=True)
    assert host == device
    assert host[-1] != host[2]


@pytest.mark.parametrize("strategy", [Knapsack(AdaLora(), "exact"), Bandit(AdaLora()), GroupShares(AdaLora())])
def test_what_decides_on_the_host_is_not_captured(strategy: Strategy) -> None:
    with pytest.raises(ValueError, match=f"the strategy '{strategy.name}' decides on the host"):
        BudgetAllocator(adapter_layers((5, 4), (6, 4)), strategy, total_step=9, target_r=2, capturable=True)


def test_what_the_inner_strategy_needs_is_asked_for() -> None:
    assert Knapsack(Bandit(AdaLora())).needs_loss
    assert not Knapsack(GroupShares(AdaLora())).needs_loss


def test_a_strategy_is_composed_of_strategies_only() -> None:
    for make in (Knapsack, Bandit, GroupShares, lambda inner: Prior(inner, PRIOR)):
        with pytest.raises(TypeError, match="inner: found str, expected a Strategy"):
            make("adalora")
