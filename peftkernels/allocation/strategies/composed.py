"""Strategies made of another one: what they do not change is the inner one's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy

_INNER = "inner."


class Composed(Strategy):
    """A strategy over another one, which keeps its statistics, its state and its settings.

    They are tensors and facts of this one by the names "inner.…".

    Args:
        inner: The other strategy.

    Raises:
        TypeError: Where inner is no Strategy.
    """

    def __init__(self, inner: Strategy) -> None:
        if not isinstance(inner, Strategy):
            raise TypeError(f"inner: found {type(inner).__name__}, expected a Strategy")
        self.inner = inner
        self.capturable = inner.capturable
        self.needs_loss = inner.needs_loss

    def begin(self, statistics: Statistics) -> None:
        self.inner.begin(statistics)

    def update(self, statistics: Statistics) -> None:
        self.inner.update(statistics)

    def scores(self, statistics: Statistics) -> Tensor:
        return self.inner.scores(statistics)

    def moved(self) -> Sequence[Mapping[str, Any]]:
        return self.inner.moved()

    def select(self, statistics: Statistics, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return self.inner.select(statistics, scores, step)

    def tensors(self) -> Mapping[str, Tensor]:
        return {_INNER + name: tensor for name, tensor in self.inner.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor], statistics: Statistics) -> None:
        self.inner.load(
            {name.removeprefix(_INNER): part for name, part in tensors.items() if name.startswith(_INNER)}, statistics
        )

    def release(self) -> None:
        self.inner.release()

    def facts(self) -> dict[str, Any]:
        return {"inner": self.inner.name, **{_INNER + name: value for name, value in self.inner.facts().items()}}
