"""What an allocator says while it runs: to observers, and in warnings that are given once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftkernels.allocation.logs.observer import Observer


class Watchers:
    """The observers of one allocator, in the order in which they came, and its warnings.

    Attributes:
        observers: The observers.
    """

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        self._warned: set[str] = set()

    def add(self, observer: Observer, facts: Mapping[str, Any]) -> None:
        """Add an observer, and tell it where the run stands."""
        self.observers.append(observer)
        observer.on_start(facts)

    def on_start(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Tell where the run stands; `facts` is called only where there is an observer."""
        if self.observers:
            found = facts()
            for observer in self.observers:
                observer.on_start(found)

    def on_decision(
        self,
        step: int,
        budget: float,
        thresholds: Sequence[float],
        scores: Sequence[Sequence[float]],
        kept: Sequence[Sequence[bool]],
    ) -> None:
        """Tell which ranks were chosen."""
        for observer in self.observers:
            observer.on_decision(step, budget, thresholds, scores, kept)

    def on_event(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """Tell what else happened at a step."""
        for observer in self.observers:
            observer.on_event(step, kind, details)

    def warn_once(self, kind: str, message: str) -> None:
        """Give a UserWarning, the first time for each kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, UserWarning, stacklevel=4)
