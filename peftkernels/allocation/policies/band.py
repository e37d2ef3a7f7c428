"""The band in which a number is expected: above its running mean by some deviations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peftkernels._reading import check_not_below_zero, check_number, check_whole
from peftkernels.allocation.run.state_checks import check_names


class Band:
    """A running mean m and variance v of the numbers seen, and the limit above which a number is out of the band.

        α = max(1/n, 1-beta) for the n-th number x;  v ← (1-α)·(v + α·(x-m)²);  m ← m + α·(x-m)
        limit = m + max(width·√v, relative·|m|, absolute)

    That is the plain mean and variance at first and exponentially weighted ones later (West, Comm. ACM 22(9), 1979;
    Finch, "Incremental calculation of weighted mean and variance", 2009). Nothing is out of the band before `warmup`
    numbers were taken. Low numbers never are.
    """

    def __init__(self, *, width: float, warmup: int, beta: float, relative: float = 0.0, absolute: float = 0.0) -> None:
        self._width = width
        self._warmup = warmup
        self._beta = beta
        self._relative = relative
        self._absolute = absolute
        self.count = 0
        self.mean = 0.0
        self.variance = 0.0

    @property
    def limit(self) -> float:
        """The highest number inside the band; infinite while it is being learned."""
        if self.count < self._warmup:
            return math.inf
        spread = self._width * math.sqrt(self.variance)
        return self.mean + max(spread, self._relative * abs(self.mean), self._absolute)

    def take(self, value: float) -> None:
        """Learn from a number."""
        self.count += 1
        weight = max(1 / self.count, 1 - self._beta)
        difference = value - self.mean
        self.variance = (1 - weight) * (self.variance + weight * difference * difference)
        self.mean += weight * difference

    def state(self) -> dict[str, Any]:
        """Return what was learned, as JSON values."""
        return {"count": self.count, "mean": self.mean, "variance": self.variance}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.count, self.mean, self.variance = state["count"], state["mean"], state["variance"]

    @staticmethod
    def check(state: Any, where: str) -> None:
        """Check that `load` can take a state over.

        Raises:
            ValueError: With `where` in front, where it cannot.
        """
        check_names(state, ("count", "mean", "variance"), where)
        check_whole(state["count"], f"{where}.count")
        check_number(state["mean"], f"{where}.mean")
        check_not_below_zero(state["variance"], f"{where}.variance")

    def __str__(self) -> str:
        return f"mean {self.mean:.4g}, deviation {math.sqrt(self.variance):.4g}, limit {self.limit:.4g}"
