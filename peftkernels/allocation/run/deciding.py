"""A decision on scores that may be of no use: what is left to the mask before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftkernels.allocation.run.masks import RankMasks
from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy


class Choice(NamedTuple):
    """Which ranks stay, all on the layers' device.

    Attributes:
        keep: bool (Σ r,).
        thresholds: (S,), one per share of the budget.
        decided: 0-dim bool, True if a share of the budget was decided.
        left: 0-dim bool, True if one could not be, and its mask stays as it was.
    """

    keep: Tensor
    thresholds: Tensor
    decided: Tensor
    left: Tensor


def choose_ranks(
    strategy: Strategy, statistics: Statistics, masks: RankMasks, scores: Tensor, step: int, informed: Tensor
) -> Choice:
    """Choose ranks by their scores, without synchronising with the host.

    A rank whose score is not finite stays as the mask before has it, and counts against the budget if that is kept. A
    share of the budget is left as it is where none of its ranks has a score, and where so many tie for the highest that
    none would stay although the budget pays for one of them: scores that are all the same say nothing.

    Args:
        strategy: What selects.
        statistics: What it selects by, with the budget.
        masks: The mask before, and the layers that are frozen.
        scores: (Σ r,), one per rank.
        step: The optimizer step.
        informed: 0-dim bool; where it is False no score counts, as before the first step whose gradients were finite.
    """
    fixed, before = masks.frozen_ranks, masks.keep
    judged = torch.isfinite(scores) & ~fixed & informed
    chosen, thresholds = strategy.select(statistics, masks.hold(scores, ~judged), step)
    keep = torch.where(judged, chosen, before)
    bound = torch.where(fixed & before, statistics.costs, 0.0)
    whole = len(statistics.shares.shares) == 1
    decided, left = [], []
    for share, members in enumerate(statistics.share_ranks):
        ranks = slice(None) if whole else members
        own, value, cost = judged[ranks], scores[ranks], statistics.costs[ranks]
        highest = own & (value == torch.where(own, value, -torch.inf).amax())
        cheapest = torch.where(highest, cost, torch.inf).amin()
        pays = cheapest <= statistics.share_budget(share, step) - bound[ranks].sum()
        usable = own.any() & ((chosen[ranks] & own).any() | ~pays)
        keep[ranks] = torch.where(usable, keep[ranks], before[ranks])
        decided.append(usable)
        left.append(~usable & ~fixed[ranks].all())
    return Choice(keep, thresholds, torch.stack(decided).any(), torch.stack(left).any())
