"""Uniform allocation: every layer the same share of its ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy


class Uniform(Strategy):
    """Score of rank i = 0, …, r-1 of a layer: (r - i)/r, so that all layers lose the same share, last ranks first.

    It does not depend on the training. It is the baseline that shows if it matters where ranks are: what an
    adaptive strategy gains over it is gained by choosing. Use it with `exact_budget=True`: layers of equal rank tie.
    """

    name = "uniform"
    capturable = True

    def begin(self, statistics: Statistics) -> None:
        scores = [torch.arange(rank, 0, -1, dtype=torch.float64) / max(rank, 1) for rank in statistics.ranks]
        self._scores = torch.cat(scores).to(device=statistics.device, dtype=statistics.dtype)

    def scores(self, statistics: Statistics) -> Tensor:
        return self._scores
