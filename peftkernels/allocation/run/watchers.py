"""Who watches an allocator: observers that are told, callbacks that are called, and warnings given once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from peftkernels.allocation.logs.observer import Observer

if TYPE_CHECKING:
    from peftkernels.allocation.run.engine import BudgetAllocator


class Watchers:
    """Those who watch one allocator, in the order in which they came."""

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        self.callbacks: list[Callable[[BudgetAllocator], None]] = []
        self._warned: set[str] = set()

    def started(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Tell where the run stands; `facts` is asked only where somebody listens."""
        if self.observers:
            told = facts()
            for observer in self.observers:
                observer.started(told)

    def tell(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """Tell what happened at a step."""
        for observer in self.observers:
            observer.happened(step, kind, details)

    def call(self, allocator: BudgetAllocator) -> None:
        """Call every callback."""
        for callback in self.callbacks:
            callback(allocator)

    def warn_once(self, kind: str, message: str) -> None:
        """A UserWarning, the first time for each kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, UserWarning, stacklevel=4)
