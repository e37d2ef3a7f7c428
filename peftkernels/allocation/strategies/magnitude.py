"""Allocation by magnitude: what a rank adds to the weight now."""

from __future__ import annotations

from torch import Tensor

from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy


class Magnitude(Strategy):
    """Score of a rank: |e_i|·‖A_i‖·‖B_i‖, the Frobenius norm of what it adds to the weight (without the scaling).

    The oldest rule of pruning: small contributions go. It needs no gradient and no history, and cannot tell a rank that
    is small because it is new from one that is of no use. With deltaT = 1 a masked rank has one optimizer step to grow
    back above the threshold.
    """

    name = "magnitude"
    capturable = True

    def scores(self, statistics: Statistics) -> Tensor:
        return statistics.gates.abs() * statistics.norms_A * statistics.norms_B
