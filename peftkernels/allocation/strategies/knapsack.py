"""Allocation as a knapsack: the highest sum of scores that the budget buys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from peftkernels.allocation.budget.selection import fill_in_order, set_apart
from peftkernels.allocation.strategies.composed import Composed
from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy

METHODS = ("greedy", "exact")
# Table entries of the exact method: a byte each, and about a second for all of them.
LARGEST_TABLE = 1 << 28


class Knapsack(Composed):
    """Keeps ranks so that Σ score is as high as Σ cost <= budget allows; score of a rank: score of `inner` over cost.

    A rank of a wide matrix costs more than one of a narrow one, in parameters, microseconds or bytes; `Budget(unit=…)`
    says which. With a budget in ranks all cost one, and what stays is what the inner strategy would keep.

    - "greedy": in the order of score per cost, earlier ranks first, all up to the first that is too dear, then those
      that still fit (`fill_in_order`). The sum of scores is short of the highest possible by less than the score of
      that first one (Dantzig, Discrete-Variable Extremum Problems, Operations Research 5, 1957)
    - "exact": dynamic programming over the budget (Bellman, Dynamic Programming, 1957) for costs that are whole
      numbers; on the host, ranks · budget/gcd(costs) steps of one byte, at most 2^28 of them

    Scores must not be negative.

    Args:
        inner: Scores the ranks.
        method: "greedy" or "exact".

    Raises:
        TypeError: Naming the argument.
        ValueError: Likewise; with "exact" also at the first decision, where costs are not whole or the table would be
            larger.
    """

    name = "knapsack"

    def __init__(self, inner: Strategy, method: str = "greedy") -> None:
        super().__init__(inner)
        if method not in METHODS:
            raise ValueError(f"method: found {method!r}, expected one of {', '.join(METHODS)}")
        self.method = method
        self.capturable = inner.capturable and method == "greedy"

    def begin(self, statistics: Statistics) -> None:
        super().begin(statistics)
        # Made here, and kept: a captured step cannot make what comes from the host.
        _ = statistics.costs, statistics.share_ranks

    def scores(self, statistics: Statistics) -> Tensor:
        scores = self.inner.scores(statistics)
        return (scores / statistics.costs).to(scores.dtype)

    def select(self, statistics: Statistics, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        keep = torch.zeros_like(scores, dtype=torch.bool)
        thresholds = []
        for share, ranks in enumerate(statistics.share_ranks):
            own, costs, budget = scores[ranks], statistics.costs[ranks], statistics.share_budget(share, step)
            if self.method == "greedy":
                chosen = buy_greedily(own, costs, statistics.shares.prices(share), budget)
            else:
                chosen = buy_exactly(own, costs, float(budget))
            keep[ranks] = chosen
            thresholds.append(torch.where(chosen, -torch.inf, own).amax())
        return keep, torch.stack(thresholds)

    def facts(self) -> dict[str, Any]:
        return {"method": self.method, **super().facts()}


def buy_greedily(density: Tensor, costs: Tensor, prices: list[float], budget: float | Tensor) -> Tensor:
    """Choose items by score per cost, those at +inf first, whatever the budget, those at -inf never.

    Args:
        density: Score per cost, (n,).
        costs: (n,).
        prices: The different costs.
        budget: What the items may cost together.

    Returns:
        bool (n,), True for items that stay.
    """
    order = torch.sort(density, descending=True, stable=True).indices
    offered, left = set_apart(density, costs, budget)
    return fill_in_order(order, offered, prices, left)


def buy_exactly(density: Tensor, costs: Tensor, budget: float) -> Tensor:
    """Choose the items of the highest Σ density·cost with Σ cost <= budget, those at +inf first, those at -inf never.

    Args:
        density: Score per cost, (n,).
        costs: (n,), whole numbers.
        budget: What the items may cost together.

    Returns:
        bool (n,), True for items that stay; of equal sums the one with later items.

    Raises:
        ValueError: Where costs are not whole or the table would be too large.
    """
    prices = [round(cost) for cost in costs.tolist()]
    if any(price != cost for price, cost in zip(prices, costs.tolist(), strict=True)):
        raise ValueError(
            "method: found 'exact' with costs that are not whole numbers, expected 'greedy' or a budget in ranks, "
            "parameters or bytes"
        )
    keep = density == torch.inf
    offered = torch.nonzero(torch.isfinite(density)).flatten().tolist()
    unit = math.gcd(*prices)
    capacity = max(0, math.floor((budget - float(costs[keep].sum())) / unit))
    capacity = min(capacity, sum(prices[item] for item in offered) // unit)
    if len(offered) * (capacity + 1) > LARGEST_TABLE:
        raise ValueError(
            f"method: found 'exact' for {len(offered)} ranks and a budget of {capacity} times {unit}, expected at most "
            f"{LARGEST_TABLE} table entries; 'greedy' has no such limit"
        )
    values = (density.double() * costs).tolist()
    best = torch.zeros(capacity + 1, dtype=torch.float64)
    taken = torch.zeros(len(offered), capacity + 1, dtype=torch.bool)
    for row, item in enumerate(offered):
        price = prices[item] // unit
        if price > capacity:
            continue
        with_it = best[: capacity + 1 - price] + values[item]
        taken[row, price:] = with_it >= best[price:]
        best[price:] = torch.maximum(best[price:], with_it)
    for row in reversed(range(len(offered))):
        if taken[row, capacity]:
            keep[offered[row]] = True
            capacity -= prices[offered[row]] // unit
    return keep
