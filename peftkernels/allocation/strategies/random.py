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

    The baseline that says whether an uneven distribution of ranks is of use when nobody chose it.
    """

    name = "random"
    capturable = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def begin(self, bus: Statistics) -> None:
        order = torch.randperm(bus.total, generator=torch.Generator().manual_seed(self.seed))
        self._scores = order.to(device=bus.device, dtype=bus.dtype)

    def scores(self, bus: Statistics) -> Tensor:
        return self._scores

    def tensors(self) -> Mapping[str, Tensor]:
        return {"scores": self._scores}

    def facts(self) -> dict[str, Any]:
        return {"seed": self.seed}
