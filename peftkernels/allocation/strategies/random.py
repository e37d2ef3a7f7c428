"""Random allocation: ranks fall in an order drawn once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy


class Random(Strategy):
    """Score of a rank: its place in a permutation drawn from `seed`, the same throughout the run.

    The baseline that shows if an uneven distribution of ranks is of use by itself, without a choice.

    Args:
        seed: Seed of the permutation.
    """

    name = "random"
    capturable = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def begin(self, statistics: Statistics) -> None:
        order = torch.randperm(statistics.total, generator=torch.Generator().manual_seed(self.seed))
        self._scores = order.to(device=statistics.device, dtype=statistics.dtype)

    def scores(self, statistics: Statistics) -> Tensor:
        return self._scores

    def tensors(self) -> Mapping[str, Tensor]:
        return {"scores": self._scores}

    def facts(self) -> dict[str, Any]:
        return {"seed": self.seed}
