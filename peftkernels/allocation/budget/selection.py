"""Which ranks a budget keeps where ranks cost different amounts, given one score per rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select_under_cost(
    scores: Tensor, costs: Tensor, prices: Sequence[float], budget: float | Tensor, *, exact: bool
) -> tuple[Tensor, Tensor]:
    """Choose the ranks that a budget keeps where they cost different amounts; `select_ranks` is for equal ones.

    The threshold is the lowest score at which, masking from the lowest score upwards, what remains costs no more than
    the budget; ranks at or below it go, ties included. `exact=True` breaks ties: in the order of falling score, earlier
    ranks first, ranks stay while their costs together are within the budget, and of those after the first that is too
    dear, the ones that still fit the remainder are added, the dearest first, equal costs in the same order. Costs that
    are all 1 give what `select_ranks` gives. What is kept costs no more than the budget, but for the rounding of a sum
    (1e-12 of it), and never less than what a lower budget keeps.

    Ranks at -inf never stay and ranks at +inf always do, whatever they cost; the others get what these leave.

    Args:
        scores: (b0,), one per rank.
        costs: (b0,) float64, above 0.
        prices: The different values in `costs`, which the host knows and does not read back.
        budget: What the kept ranks may cost.
        exact: True breaks ties.

    Returns:
        The ranks to keep, bool (b0,), and the threshold, 0-dim.
    """
    costs, budget = set_apart(scores, costs, budget)
    everything = scores.new_full((1,), -torch.inf)
    if not exact:
        ordered, ranks = torch.sort(scores, descending=True, stable=True)
        # kept[i] is what the i highest cost; nothing costs exactly nothing, so that one of them always fits.
        kept = torch.cat([costs.new_zeros(1), torch.cumsum(costs[ranks], 0)])
        stay = (kept <= _with_margin(budget)).sum() - 1
        candidates = torch.cat([ordered, everything])
        threshold = candidates.gather(0, stay.reshape(1)).reshape(())
        return ~(scores <= threshold), threshold
    ranks = torch.sort(scores, descending=True, stable=True).indices
    keep = fill_in_order(ranks, costs, prices, budget)
    return keep, torch.cat([torch.where(keep, -torch.inf, scores), everything]).amax()


def set_apart(scores: Tensor, costs: Tensor, budget: float | Tensor) -> tuple[Tensor, Tensor]:
    """Take ranks at -inf and +inf out of the market.

    Scores are so where a rank cannot change sides, as in layers that were frozen. Were the costs left as they are, what
    the budget has left over could buy dropped ranks, or others after kept ones that are dearer than the whole of it.

    Returns:
        Costs by which ranks at -inf are not to be had, at any price, and those at +inf are free, and the budget without
        what these cost, 0-dim, not below 0.
    """
    held = scores == torch.inf
    left = (budget - torch.where(held, costs, 0.0).sum()).clamp_min(0)
    return torch.where(held, 0.0, torch.where(scores == -torch.inf, torch.inf, costs)), left


def fill_in_order(order: Tensor, costs: Tensor, prices: Sequence[float], budget: float | Tensor) -> Tensor:
    """Choose what a budget buys when items are taken in `order`, without synchronising with the host.

    All up to the first that is too dear, then, price after price from the dearest down, those that still fit, in the
    same order.

    Args:
        order: int64 (n,), a permutation, in which items that are free come first.
        costs: (n,), infinite for items that are not to be had.
        prices: The different costs of the others.
        budget: What the items may cost together.

    Returns:
        bool (n,), by item.
    """
    limit = _with_margin(budget)
    ordered = costs[order]
    taken = torch.cumsum(ordered, 0) <= limit
    spent = torch.where(taken, ordered, 0.0).sum()
    for price in sorted(prices, reverse=True):
        # One pass for each price: a dearer item that does not fit must not keep out a cheaper one behind it.
        offered = ~taken & (ordered == price)
        fits = offered & (spent + torch.cumsum(torch.where(offered, ordered, 0.0), 0) <= limit)
        taken = taken | fits
        spent = spent + torch.where(fits, ordered, 0.0).sum()
    return torch.zeros_like(taken).scatter_(0, order, taken)


def _with_margin(budget: float | Tensor) -> float | Tensor:
    """Return a budget to compare sums of costs with, which are rounded."""
    return budget * (1 + 1e-12)
