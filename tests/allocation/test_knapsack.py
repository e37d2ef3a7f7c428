"""Knapsack allocation against every possible choice."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from small_models import adapter_layers, draw_gradients
from torch import Tensor

from peftkernels.allocation import Budget, BudgetAllocator, Group, Statistics, Strategy
from peftkernels.allocation.strategies import AdaLora, Knapsack
from peftkernels.allocation.strategies.knapsack import buy_exactly, buy_greedily


class Given(Strategy):
    """Scores that a test gives."""

    name = "given"
    capturable = True

    def __init__(self, scores: Tensor) -> None:
        self._scores = scores

    def scores(self, statistics: Statistics) -> Tensor:
        return self._scores


def highest(values: Tensor, costs: Tensor, budget: float) -> float:
    """The highest Σ value with Σ cost within the budget, of all choices."""
    choices = torch.tensor(list(product((0.0, 1.0), repeat=len(values))), dtype=torch.float64)
    return float((choices @ values)[choices @ costs <= budget].max())


def instance(seed: int) -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.tensor([3.0, 5.0, 8.0], dtype=torch.float64).repeat_interleave(4)
    values = torch.rand(12, generator=generator, dtype=torch.float64) * costs**0.5
    return values, costs, float(torch.randint(3, 60, (), generator=generator))


@pytest.mark.parametrize("seed", range(40))
def test_exact_is_the_best_of_all_choices(seed: int) -> None:
    values, costs, budget = instance(seed)
    keep = buy_exactly(values / costs, costs, budget)
    assert float(costs[keep].sum()) <= budget
    assert float(values[keep].sum()) == pytest.approx(highest(values, costs, budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_greedy_is_within_its_bound(seed: int) -> None:
    values, costs, budget = instance(seed)
    density = values / costs
    keep = buy_greedily(density, costs, [3.0, 5.0, 8.0], budget)
    order = torch.sort(density, descending=True).indices
    spent = torch.cumsum(costs[order], 0)
    first_left = order[int((spent <= budget).sum())] if float(spent[-1]) > budget else None
    bound = 0.0 if first_left is None else float(values[first_left])
    assert float(costs[keep].sum()) <= budget
    assert float(values[keep].sum()) >= highest(values, costs, budget) - bound
    left = costs[~keep]
    assert left.numel() == 0 or float(costs[keep].sum() + left.min()) > budget


def test_exact_is_better_than_greedy_where_the_best_by_cost_blocks_the_rest() -> None:
    costs = torch.tensor([6.0, 5.0, 5.0], dtype=torch.float64)
    density = torch.tensor([1.1, 1.0, 1.0], dtype=torch.float64)
    assert buy_greedily(density, costs, [5.0, 6.0], 10.0).tolist() == [True, False, False]
    assert buy_exactly(density, costs, 10.0).tolist() == [False, True, True]


def test_what_is_frozen_stays_out_and_stays_in() -> None:
    costs = torch.tensor([4.0, 2.0, 2.0, 4.0], dtype=torch.float64)
    density = torch.tensor([-torch.inf, 1.0, 2.0, torch.inf], dtype=torch.float64)
    for keep in (buy_greedily(density, costs, [2.0, 4.0], 7.0), buy_exactly(density, costs, 7.0)):
        assert keep.tolist() == [False, False, True, True]
    # What stays costs all there is and more.
    held = torch.tensor([torch.inf, torch.inf, 2.0, -torch.inf], dtype=torch.float64)
    for keep in (buy_greedily(held, costs.flip(0), [2.0, 4.0], 5.0), buy_exactly(held, costs.flip(0), 5.0)):
        assert keep.tolist() == [True, True, False, False]
    assert buy_greedily(density, costs, [2.0, 4.0], 100.0).tolist() == [False, True, True, True]
    assert buy_exactly(density, costs, 100.0).tolist() == [False, True, True, True]


def two_widths(scores: list[float], method: str = "greedy") -> BudgetAllocator:
    """A wide and a narrow layer with two ranks each, which cost 30 and 10 parameters each, and a budget of 40."""
    layers = adapter_layers((20, 9), (5, 4), r=2)
    strategy = Knapsack(Given(torch.tensor(scores)), method)
    return BudgetAllocator(layers, strategy, total_step=2, budget=Budget(40, "parameters"))


def last_decision(allocator: BudgetAllocator) -> dict[str, list[bool]]:
    for _ in range(2):
        draw_gradients(allocator.layers)
        allocator.step()
    return allocator.rank_pattern()


WIDE_AND_NARROW = {"layer0": [True, False], "layer1": [True, False]}


@pytest.mark.parametrize("method", ["greedy", "exact"])
def test_a_dear_rank_that_is_worth_its_cost_stays(method: str) -> None:
    assert last_decision(two_widths([7.0, 4.0, 2.0, 1.9], method)) == WIDE_AND_NARROW


def test_a_dear_rank_must_be_worth_its_cost() -> None:
    """By score alone the wide rank of score 5 would stay; it brings less for its cost than the narrow ones. That it
    would have fitted with one of them is what the exact method sees."""
    scores = [5.0, 4.0, 2.0, 1.9]
    assert last_decision(two_widths(scores)) == {"layer0": [False, False], "layer1": [True, True]}
    assert last_decision(two_widths(scores, "exact")) == WIDE_AND_NARROW


def test_every_group_has_a_knapsack_of_its_own() -> None:
    layers = adapter_layers((20, 9), (5, 4), r=2)
    groups = {"wide": Group("layer0", 30), "narrow": Group("layer1", 10)}
    strategy = Knapsack(Given(torch.tensor([1.0, 2.0, 9.0, 8.0])))
    allocator = BudgetAllocator(layers, strategy, total_step=2, budget=Budget(None, "parameters", groups))
    assert last_decision(allocator) == {"layer0": [False, True], "layer1": [True, False]}
    assert allocator.decision is not None
    assert allocator.decision.thresholds.tolist() == pytest.approx([1 / 30, 8 / 10])


def test_ranks_of_equal_cost_are_the_inner_strategys() -> None:
    torch.manual_seed(0)
    first, second = adapter_layers((12, 8), (8, 12)), adapter_layers((12, 8), (8, 12))
    for name, layer in second.items():
        layer.load_state_dict(first[name].state_dict())
    kept = []
    for layers, strategy in ((first, AdaLora()), (second, Knapsack(AdaLora()))):
        torch.manual_seed(1)
        allocator = BudgetAllocator(layers, strategy, total_step=12, target_r=2, exact_budget=True)
        history = []
        for _ in range(12):
            draw_gradients(layers)
            allocator.step()
            history.append(allocator.rank_pattern())
        kept.append(history)
    assert kept[0] == kept[1]


def test_the_inner_state_is_saved_with_its_settings() -> None:
    torch.manual_seed(0)
    layers = adapter_layers((12, 8), (8, 12))
    allocator = BudgetAllocator(layers, Knapsack(AdaLora()), total_step=12, target_r=2)
    draw_gradients(layers)
    allocator.step()
    state = allocator.state_dict()
    allocator.close()
    other = BudgetAllocator(layers, Knapsack(AdaLora()), total_step=12, target_r=2)
    other.load_state_dict(state)
    assert other.state_dict().keys() == state.keys()
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in state.items())
    assert any(name.startswith("strategy.inner.sensitivity") and tensor.any() for name, tensor in state.items())
    other.close()
    with pytest.raises(ValueError, match=r"inner\.beta1 \(found 0\.85, expected 0\.5\)"):
        BudgetAllocator(layers, Knapsack(AdaLora(0.5)), total_step=12, target_r=2).load_state_dict(state)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="inner: found str"):
        Knapsack("adalora")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method: found 'best'"):
        Knapsack(AdaLora(), "best")
    with pytest.raises(ValueError, match="costs that are not whole"):
        buy_exactly(torch.ones(2), torch.tensor([1.5, 2.0]), 3.0)
    with pytest.raises(ValueError, match="table entries"):
        buy_exactly(torch.ones(1 << 15), torch.ones(1 << 15), float(1 << 14))
