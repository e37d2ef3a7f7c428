"""Strategies made of another one: what they do not change is the inner one's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy

_INNER = "inner."


class Composed(Strategy):
    """A strategy over `inner`, which keeps its statistics, its state (tensors "inner.…") and its settings (facts
    "inner.…"). Raises TypeError where inner is no Strategy."""

    def __init__(self, inner: Strategy) -> None:
        if not isinstance(inner, Strategy):
            raise TypeError(f"inner: found {type(inner).__name__}, expected a Strategy")
        self.inner = inner
        self.capturable = inner.capturable
        self.needs_loss = inner.needs_loss

    def begin(self, bus: Statistics) -> None:
        self.inner.begin(bus)

    def update(self, bus: Statistics) -> None:
        self.inner.update(bus)

    def scores(self, bus: Statistics) -> Tensor:
        return self.inner.scores(bus)

    def moved(self) -> Sequence[Mapping[str, Any]]:
        return self.inner.moved()

    def select(self, bus: Statistics, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return self.inner.select(bus, scores, step)

    def tensors(self) -> Mapping[str, Tensor]:
        return {_INNER + name: tensor for name, tensor in self.inner.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor], bus: Statistics) -> None:
        self.inner.load(
            {name.removeprefix(_INNER): part for name, part in tensors.items() if name.startswith(_INNER)}, bus
        )

    def release(self) -> None:
        self.inner.release()

    def facts(self) -> dict[str, Any]:
        return {"inner": self.inner.name, **{_INNER + name: value for name, value in self.inner.facts().items()}}
