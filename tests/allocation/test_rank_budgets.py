"""Budgets in ranks, parameters, microseconds and groups: never exceeded, and met to the last rank where asked for."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import adapter_layers, draw_gradients
from torch import Tensor, nn

from peftkernels.allocation import Budget, BudgetAllocator, Group, Strategy
from peftkernels.allocation.budget.budgets import share_out
from peftkernels.allocation.budget.selection import fill_in_order, select_under_cost
from peftkernels.allocation.strategies import GateGradient, Magnitude
from peftkernels.nn import AdaLoRALinear
from peftkernels.ops.selection import select_ranks

# Few values, so that ties are frequent.
SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.0, -1.0]), min_size=1, max_size=9)
PRICES = st.sampled_from([[1.0], [1.0, 2.0], [3.0, 5.0, 7.0], [0.1, 0.2, 0.7], [1e-3, 1.0, 1e6], [65.0, 49.0, 129.0]])


@st.composite
def priced(draw: Any) -> tuple[Tensor, Tensor, list[float], float]:
    scores = torch.tensor(draw(SCORES), dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    prices = draw(PRICES)
    costs = torch.tensor([draw(st.sampled_from(prices)) for _ in scores], dtype=torch.float64)
    # Sums of costs are where rounding matters: budgets are exact sums as often as not.
    part = sum(cost for cost in costs.tolist() if draw(st.booleans()))
    budget = draw(st.one_of(st.just(float(part)), st.floats(0, float(costs.sum()) * 1.1)))
    return scores, costs, prices, budget


def _greedy(order: list[int], costs: list[float], prices: list[float], budget: float) -> list[bool]:
    """What `fill_in_order` says it does, one item after the other."""
    limit = budget * (1 + 1e-12)
    taken, spent = [False] * len(costs), 0.0
    for place, item in enumerate(order):
        if spent + costs[item] > limit:
            rest = order[place:]
            break
        taken[item] = True
        spent += costs[item]
    else:
        rest = []
    for price in sorted(prices, reverse=True):
        for item in rest:
            if costs[item] == price and spent + price <= limit:
                taken[item] = True
                spent += price
    return taken


@settings(max_examples=400, deadline=None)
@given(priced())
def test_a_cost_is_never_exceeded_and_the_fill_is_as_promised(case: tuple[Tensor, Tensor, list[float], float]) -> None:
    scores, costs, prices, budget = case
    for exact in (False, True):
        keep, threshold = select_under_cost(scores, costs, prices, budget, exact=exact)
        assert keep.dtype == torch.bool and keep.shape == scores.shape
        assert threshold.shape == () and threshold.dtype == scores.dtype
        assert math.fsum(costs[keep].tolist()) <= budget * (1 + 1e-11)
        again = select_under_cost(scores, costs, prices, torch.tensor(budget, dtype=torch.float64), exact=exact)
        assert torch.equal(keep, again[0]) and torch.equal(threshold, again[1])
        if not keep.all():
            assert threshold == scores[~keep].max()
        else:
            assert threshold == -math.inf
    keep, threshold = select_under_cost(scores, costs, prices, budget, exact=False)
    assert torch.equal(keep, ~(scores <= threshold))
    # No lower threshold would do.
    lower = scores[scores < threshold]
    if threshold > -math.inf:
        looser = scores > (lower.max() if lower.numel() else -math.inf)
        assert math.fsum(costs[looser].tolist()) > budget
    exact_keep = select_under_cost(scores, costs, prices, budget, exact=True)[0]
    order = sorted(range(len(scores)), key=lambda item: (-scores[item].item(), item))
    exactly_summed = all(cost == int(cost) for cost in costs.tolist())
    if exactly_summed:
        assert exact_keep.tolist() == _greedy(order, costs.tolist(), prices, budget)
    # Nothing that was left out would still fit.
    spare = budget - math.fsum(costs[exact_keep].tolist())
    assert all(cost > spare - 1e-9 * max(1.0, budget) for cost in costs[~exact_keep].tolist())
    # Whatever the threshold rule keeps, the exact rule keeps too.
    assert not (keep & ~exact_keep).any()


@settings(max_examples=200, deadline=None)
@given(priced(), st.floats(0, 1))
def test_more_budget_never_keeps_less(case: tuple[Tensor, Tensor, list[float], float], part: float) -> None:
    scores, costs, prices, budget = case
    for exact in (False, True):
        less = select_under_cost(scores, costs, prices, budget * part, exact=exact)[0]
        more = select_under_cost(scores, costs, prices, budget, exact=exact)[0]
        assert costs[more].sum() >= costs[less].sum() * (1 - 1e-11)
        if not exact:
            assert not (less & ~more).any()


@settings(max_examples=200, deadline=None)
@given(SCORES, st.integers(0, 10), st.booleans())
def test_costs_of_one_are_ranks(values: list[float], budget: int, exact: bool) -> None:
    scores = torch.tensor(values)
    costs = torch.ones(len(values), dtype=torch.float64)
    by_cost = select_under_cost(scores, costs, [1], budget, exact=exact)
    by_count = select_ranks(scores, budget, exact=exact)
    on_device = select_ranks(scores, torch.tensor(budget), exact=exact)
    for other in (by_count, on_device):
        assert torch.equal(by_cost[0], other[0])
        assert torch.equal(by_cost[1], other[1])
    if exact:
        assert int(by_cost[0].sum()) == min(budget, len(values))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 7), st.randoms())
def test_the_fill_against_the_best_there_is(count: int, random: Any) -> None:
    """Brute force: with one price it is the best; with several it wastes less than the cheapest item left out."""
    costs = torch.tensor([float(random.choice([2, 3, 5])) for _ in range(count)], dtype=torch.float64)
    budget = random.randint(0, int(costs.sum()))
    keep = fill_in_order(torch.tensor(random.sample(range(count), count)), costs, [2.0, 3.0, 5.0], budget)
    spent = costs[keep].sum().item()
    every = itertools.chain.from_iterable(itertools.combinations(costs.tolist(), size) for size in range(count + 1))
    best = max(sum(chosen) for chosen in every if sum(chosen) <= budget)
    assert spent <= best <= budget
    left = costs[~keep]
    assert left.numel() == 0 or spent + left.min().item() > budget
    if costs.unique().numel() == 1:
        assert spent == best


def test_items_that_are_not_to_be_had() -> None:
    costs = torch.tensor([3.0, math.inf, 3.0, 1.0], dtype=torch.float64)
    keep = fill_in_order(torch.arange(4), costs, [1.0, 3.0], 7.0)
    assert keep.tolist() == [True, False, True, True]
    empty = torch.zeros(0)
    for exact in (False, True):
        keep, threshold = select_under_cost(empty, empty.double(), [], 1.0, exact=exact)
        assert keep.shape == (0,) and threshold == -math.inf


LAYERS = {"vision.q": (4, 8, 8), "vision.mlp": (4, 32, 8), "text.q": (6, 8, 8), "text.empty": (0, 8, 8)}


def _share_out(budget: Budget, **arguments: Any) -> Any:
    return share_out(budget, LAYERS, **{"tinit": 2, "last_allocation": 9, "deltaT": 1, **arguments})


@pytest.mark.parametrize(
    ("budget", "costs", "message"),
    [
        (Budget(14), None, "budget: found 14 ranks, expected less than the 14 of all ranks"),
        (Budget(0.5), None, "budget: found 0.5 ranks, expected at least the 1 of one rank"),
        (Budget(16, "parameters"), None, "budget: found 16 parameters, expected at least the 17 of one rank"),
        (
            Budget(4, "parameters", {"mlp": Group("*.mlp", 40)}),
            None,
            "budget of 'mlp': found 40 parameters, expected at",
        ),
        (
            Budget(groups={"v": Group("vision.*", 4)}),
            None,
            "budget: found no group for text.q, text.empty, expected total",
        ),
        (Budget(3, groups={"all": Group("*", 4)}), None, "budget: found a total for the rest, but every layer is in a"),
        (
            Budget(3, groups={"v": Group(["vision.*", "audio.*"], 4)}),
            None,
            "no layer for the pattern 'audio.*' of group",
        ),
        (
            Budget(3, groups={"v": Group("vision.*", 4), "q": Group("vision.q", 1)}),
            None,
            "budget: found no layer for the groups q that an earlier group does not have",
        ),
        (
            Budget(3, groups={"none": Group("*.empty", 1)}),
            None,
            "budget of 'none': found 1 ranks, expected less than the 0",
        ),
        (Budget(3, "microseconds"), None, "costs: found None, expected microseconds by layer"),
        (Budget(3, "microseconds"), {"vision.q": 1.0}, "costs: found none for vision.mlp, text.q, text.empty"),
        (Budget(3, "microseconds"), dict.fromkeys(LAYERS, 0.0), r"costs\['vision.q'\]: found 0.0, expected a finite"),
        (Budget(3, "microseconds"), dict.fromkeys(LAYERS, math.nan), r"costs\['vision.q'\]: found nan"),
        (Budget(0.2, "microseconds"), dict.fromkeys(LAYERS, 0.3), "found 0.2 microseconds, expected at least the 0.3"),
    ],
)
def test_budgets_that_do_not_fit_the_layers(budget: Budget, costs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _share_out(budget, costs=costs)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Budget(), ValueError, "total: found None without groups"),
        (lambda: Budget(3, "layers"), ValueError, "unit: found 'layers', expected one of ranks"),
        (lambda: Budget(True), TypeError, "total: found True"),
        (lambda: Budget(math.nan), ValueError, "total: found nan"),
        (lambda: Budget(-1), ValueError, "total: found -1"),
        (lambda: Budget(groups=[Group("a", 1)]), TypeError, "groups: found list, expected a mapping"),
        (lambda: Budget(groups={"a": 3}), TypeError, r"groups\['a'\]: found int"),
        (lambda: Budget(groups={3: Group("a", 1)}), TypeError, "groups: found the name 3, expected a str"),
        (lambda: Budget(groups={"rest": Group("a", 1)}), ValueError, "groups: found the name 'rest'"),
        (lambda: Group([], 1), ValueError, r"modules: found \[\]"),
        (lambda: Group(["a", ""], 1), ValueError, "modules: found"),
        (lambda: Group("a", "3"), TypeError, "total: found '3'"),
    ],
)
def test_budgets_are_checked(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_what_groups_share() -> None:
    layers = {**LAYERS, "head": (3, 5, 4)}
    budget = Budget(20.5, "parameters", {"q": Group("*.q", 60.0), "vision": Group(["vision.*", "*.empty"], 45)})
    shares = share_out(budget, layers, tinit=2, last_allocation=9, deltaT=1)
    # The first group that has a layer keeps it.
    assert [(own.name, own.members) for own in shares.shares] == [("q", (0, 2)), ("vision", (1, 3)), ("rest", (4,))]
    assert shares.costs == (17, 41, 17, 17, 10)
    # Whole parameters; each share along its own cubic.
    assert [own.schedule(10) for own in shares.shares] == [(60, True), (45, True), (20, True)]
    assert shares.budget(0) == 10 * 17 + 4 * 41 + 30


@pytest.mark.parametrize("exact_budget", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_groups_end_at_their_totals(exact_budget: bool, ties: bool) -> None:
    torch.manual_seed(0)
    layers = adapter_layers((8, 9), (10, 9), (9, 8), (9, 9))
    groups = {"b": Group("layer[12]", 7), "a": Group("layer0", 2), "c": Group("layer3", 5)}
    allocator = BudgetAllocator(
        layers, GateGradient(), budget=Budget(groups=groups), total_step=14, tfinal=3, exact_budget=exact_budget
    )
    for _ in range(14):
        draw_gradients(layers)
        if ties:
            for layer in layers.values():
                layer.lora_E.grad.zero_()
        allocator.step()
        kept = {name: sum(own) for name, own in allocator.rank_pattern().items()}
        spent = [kept["layer1"] + kept["layer2"], kept["layer0"], kept["layer3"]]
        allowed = [share.schedule(allocator.steps)[0] for share in allocator.statistics.shares.shares]
        if exact_budget or not ties:
            assert spent == allowed
        else:
            # Nobody scores more than another: there is nothing to choose by, and every rank stays.
            assert spent == [12, 6, 6]
    assert allocator.undecided_steps == (11 if ties and not exact_budget else 0)
    if exact_budget or not ties:
        assert spent == [7, 2, 5]
        assert allocator.budget(14) == 14
    assert allocator.budget(0) == 24


def test_unequal_costs_end_within_the_budget() -> None:
    """Microseconds: what is kept costs what the budget allows but for less than one rank of the cheapest layer."""
    torch.manual_seed(0)
    layers = adapter_layers((8, 9), (10, 9), (9, 8))
    costs = {"layer0": 3.1, "layer1": 0.7, "layer2": 1.9}
    allocator = BudgetAllocator(
        layers, Magnitude(), budget=Budget(14.5, "microseconds"), costs=costs, total_step=9, exact_budget=True
    )
    for _ in range(9):
        draw_gradients(layers)
        allocator.step()
        kept = {name: sum(own) for name, own in allocator.rank_pattern().items()}
        spent = sum(costs[name] * count for name, count in kept.items())
        assert spent <= allocator.budget(allocator.steps) * (1 + 1e-12)
        assert min(costs[name] for name, count in kept.items() if count < 6) > allocator.budget(allocator.steps) - spent
    assert allocator.budget(9) == 14.5


def test_layers_without_ranks_and_one_layer() -> None:
    torch.manual_seed(0)
    layers = {"empty": AdaLoRALinear.from_linear(nn.Linear(4, 4), 0), **adapter_layers((8, 9))}
    for strategy, exact in itertools.product((GateGradient, Magnitude), (False, True)):
        for budget in (Budget(2), Budget(40, "parameters")):
            allocator = BudgetAllocator(layers, strategy(), budget=budget, total_step=6, exact_budget=exact)
            for _ in range(7):
                draw_gradients(layers)
                allocator.step()
            pattern = allocator.rank_pattern()
            assert pattern["empty"] == []
            assert sum(pattern["layer0"]) == 2
            assert allocator.explain().modules[0].why == "it has no ranks"
            assert allocator.explain().modules[0].margin is None
            allocator.load_state_dict(allocator.state_dict())
            allocator.close()


class _Fixed(Strategy):
    """Scores given from outside."""

    name = "fixed"
    # Scores never change, and on the CPU nothing is captured.
    capturable = True

    def __init__(self, scores: list[float]) -> None:
        self.given = scores

    def scores(self, statistics: Any) -> Tensor:
        return torch.tensor(self.given, dtype=statistics.dtype)


def _shares_of(layers: dict[str, Any], allocator: BudgetAllocator, steps: int) -> dict[str, int]:
    for _ in range(steps):
        draw_gradients(layers)
        allocator.step()
    return {name: sum(own) for name, own in allocator.rank_pattern().items()}


@pytest.mark.parametrize("exact_budget", [False, True])
@pytest.mark.parametrize("drop", [False, True])
def test_a_group_whose_layers_are_all_frozen(drop: bool, exact_budget: bool) -> None:
    torch.manual_seed(0)
    layers = adapter_layers((8, 9), (10, 9), (9, 8))
    groups = {"frozen": Group("layer0", 2), "live": Group("layer[12]", 5)}
    allocator = BudgetAllocator(
        layers, GateGradient(), budget=Budget(groups=groups), total_step=12, deltaT=2, exact_budget=exact_budget
    )
    _shares_of(layers, allocator, 5)
    before = allocator.rank_pattern()["layer0"]
    allocator.freeze("layer0", drop=drop)
    kept = _shares_of(layers, allocator, 8)
    assert allocator.rank_pattern()["layer0"] == ([False] * 6 if drop else before)
    assert kept["layer1"] + kept["layer2"] == 5


@pytest.mark.parametrize(("exact_budget", "kept"), [(False, (1, 0)), (True, (1, 4))])
def test_what_a_dropped_layer_gives_back(exact_budget: bool, kept: tuple[int, int]) -> None:
    """Its ranks take nothing from the others, also where they are dearer and a remainder is filled from the dearest."""
    layers = adapter_layers((30, 30), (60, 60), (8, 9), r=4)
    prices = [61, 121, 18]
    scores = [9.0] * 4 + [8.0, 7.0, 6.0, 5.0] + [4.0, 3.0, 2.0, 1.0]
    budget = Budget(121 + 4 * 18 + 7, "parameters")
    allocator = BudgetAllocator(layers, _Fixed(scores), budget=budget, total_step=8, exact_budget=exact_budget)
    allocator.freeze("layer0")
    found = _shares_of(layers, allocator, 9)
    assert found == {"layer0": 0, "layer1": kept[0], "layer2": kept[1]}
    assert sum(price * count for price, count in zip(prices, found.values(), strict=True)) <= allocator.budget(9)
    decision = allocator.decision
    assert decision is not None
    assert decision.scores.tolist() == scores


@pytest.mark.parametrize("exact_budget", [False, True])
def test_what_a_kept_frozen_layer_costs(exact_budget: bool) -> None:
    """The others get what remains; where nothing does, none of their ranks stays."""
    torch.manual_seed(0)
    layers = adapter_layers((8, 9), (10, 9))
    scores = [0.0] * 6 + [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    for target_r, others in ((5, 4), (3, 0), (2, 0)):
        allocator = BudgetAllocator(layers, _Fixed(scores), total_step=8, target_r=target_r, exact_budget=exact_budget)
        allocator.freeze("layer0", drop=False)
        assert _shares_of(layers, allocator, 9) == {"layer0": 6, "layer1": others}
        allocator.close()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("exact_budget", [False, True])
def test_what_a_kept_frozen_layer_of_dear_ranks_costs(exact_budget: bool, capturable: bool) -> None:
    """What it spends beyond the budget is not there for others, though one of its ranks is too dear for the whole."""
    scores = [1.0, 1.0, 6.0, 5.0, 4.0, 3.0]
    for total, others in ((2 * 121 + 2 * 18 + 5, 2), (2 * 121, 0), (2 * 121 - 1, 0), (121 + 4 * 18, 0), (50, 0)):
        layers = adapter_layers((60, 60), r=2)
        layers["layer1"] = adapter_layers((8, 9), r=4)["layer0"]
        budget = Budget(total, "parameters")
        allocator = BudgetAllocator(
            layers,
            _Fixed(scores),
            budget=budget,
            total_step=8,
            exact_budget=exact_budget,
            capturable=capturable,
        )
        allocator.freeze("layer0", drop=False)
        assert _shares_of(layers, allocator, 9) == {"layer0": 2, "layer1": others}


@settings(max_examples=200, deadline=None)
@given(priced(), st.data())
def test_ranks_that_cannot_change_sides(case: tuple[Tensor, Tensor, list[float], float], data: Any) -> None:
    """A choice among them and others is the choice among the others alone, with what they leave of the budget."""
    scores, costs, prices, budget = case
    side = torch.tensor([data.draw(st.sampled_from([0.0, math.inf, -math.inf])) for _ in scores], dtype=scores.dtype)
    held, free = side == math.inf, side == 0
    left = max(0.0, budget - costs[held].sum().item())
    for exact in (False, True):
        keep, threshold = select_under_cost(scores + side, costs, prices, budget, exact=exact)
        assert keep[held].all() and not keep[side == -math.inf].any()
        alone, expected = select_under_cost(scores[free], costs[free], prices, left, exact=exact)
        assert torch.equal(keep[free], alone) and threshold == expected
