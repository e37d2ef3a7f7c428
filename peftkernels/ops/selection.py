"""Which ranks a budget keeps, given one score per rank, where every rank costs one."""

from __future__ import annotations

import torch
from torch import Tensor


def select_ranks(scores: Tensor, budget: int | Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Choose the ranks that a budget keeps.

    With b0 - budget ranks to mask, the threshold is the (b0 - budget)-th smallest
    score and rank i is kept where not (scores_i <= threshold): ties at the threshold all go, so fewer than `budget`
    ranks may stay. `exact=True` keeps `budget` ranks: among ties at the threshold those that come first stay, and the
    threshold is the highest score that was masked. A budget of b0 or more keeps all (threshold -inf).

    Args:
        scores: (b0,) float, one per rank.
        budget: An int of at least 0, or a 0-dim int tensor on the device of `scores`, which the host does not read.
        exact: True breaks ties.

    Returns:
        The ranks to keep, bool (b0,), and the threshold, 0-dim, both on the device of `scores`.
    """
    if isinstance(budget, Tensor):
        return _select_on_device(scores, budget, exact)
    masked = scores.numel() - budget
    if masked <= 0:
        return torch.ones_like(scores, dtype=torch.bool), scores.new_full((), -torch.inf)
    if not exact:
        threshold = torch.kthvalue(scores, masked).values
        return ~(scores <= threshold), threshold
    ordered, ranks = torch.sort(scores, descending=True, stable=True)
    keep = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, ranks[:budget], True)
    return keep, ordered[budget]


def _select_on_device(scores: Tensor, budget: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    count = scores.numel()
    everything = scores.new_full((), -torch.inf)
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool), everything
    ordered, ranks = torch.sort(scores, descending=True, stable=True)
    highest_masked = ordered.gather(0, budget.reshape(1).long().clamp(max=count - 1)).reshape(())
    threshold = torch.where(budget >= count, everything, highest_masked)
    if not exact:
        return ~(scores <= threshold), threshold
    kept_in_order = torch.arange(count, device=scores.device) < budget
    return torch.empty_like(kept_in_order).scatter_(0, ranks, kept_in_order), threshold
