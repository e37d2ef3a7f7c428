"""AdaLoRA: smoothed sensitivity times uncertainty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftkernels.allocation.checks import check_smoothing
from peftkernels.allocation.strategies.scores import ScoreAverages
from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy


class AdaLora(Strategy):
    """Score of a rank: Ī·Ū of its gate plus the means of Ī·Ū over its row of A and its column of B.

    `ScoreAverages` has the formulas.

    Args:
        beta1: Smoothing of sensitivity Ī, between 0 and 1.
        beta2: Smoothing of uncertainty Ū, between 0 and 1.

    Raises:
        TypeError: Naming the argument.
        ValueError: Likewise.

    Source: Zhang et al., arXiv 2303.10512; order of operations as in HF peft.
    """

    name = "adalora"
    capturable = True

    def __init__(self, beta1: float = 0.85, beta2: float = 0.85) -> None:
        check_smoothing("beta1", beta1)
        check_smoothing("beta2", beta2)
        self.beta1 = beta1
        self.beta2 = beta2
        self._averages: ScoreAverages | None = None

    def begin(self, statistics: Statistics) -> None:
        layers = dict(zip(statistics.names, statistics.layers, strict=True))
        self._averages = ScoreAverages(layers, self.beta1, self.beta2, statistics.kernels.name)

    def update(self, statistics: Statistics) -> None:
        assert self._averages is not None
        update = self._averages.update(statistics.skip)
        statistics.report(update.finite, update.missing)

    def scores(self, statistics: Statistics) -> Tensor:
        assert self._averages is not None
        return self._averages.rank_scores()

    def tensors(self) -> Mapping[str, Tensor]:
        return {} if self._averages is None else self._averages.tensors()

    def release(self) -> None:
        self._averages = None

    def facts(self) -> dict[str, Any]:
        return {"beta1": self.beta1, "beta2": self.beta2}
