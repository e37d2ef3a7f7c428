"""What an allocator tells its observers: its start, its decisions, and what else happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Observer(Protocol):
    """Is told of everything an allocator does, in order, as plain Python values on the host.

    An allocator without observers reads nothing back from the device for them. Observers must not change what they are
    given. Under data parallelism every process decides the same: give an observer that writes to one of them only.
    """

    def on_start(self, facts: Mapping[str, Any]) -> None:
        """Take note that the allocator is about to run; may be called again.

        It runs from its first step, or from where a saved run goes on.

        - strategy: str, the strategy's name
        - settings: its settings by name; numbers, strings, booleans, None, and lists and mappings of them
        - modules: one mapping for each layer, in the order of all later lists: name, rank (its initial rank),
          in_features, out_features, group (str) and cost (float, of the budget, for one of its ranks)
        - unit: str, what the budget counts: "ranks", "parameters", "microseconds" or "bytes"
        - step: int, optimizer steps taken so far: 0, or where a saved run goes on
        - rollbacks: int, how often the run was rolled back before that; may be left out

        Args:
            facts: The entries above by name.
        """
        ...

    def on_decision(
        self,
        step: int,
        budget: float,
        thresholds: Sequence[float],
        scores: Sequence[Sequence[float]],
        kept: Sequence[Sequence[bool]],
    ) -> None:
        """Take note that ranks were chosen.

        Args:
            step: The optimizer step after which they were.
            budget: In the unit of the budget, over all modules.
            thresholds: Of each module: scores at or below it are masked; -inf where nothing was. The same for all
                modules that share a budget.
            scores: Of each rank, module by module.
            kept: Which ranks stay, module by module.
        """
        ...

    def on_event(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """Take note of something else. A strategy may have kinds of its own; "start" and "ranks" are taken.

        - loss: value
        - skipped: why (the scores were left as they were)
        - rollback: to (the step returned to; later steps count on from there), why
        - frozen: module
        - alarm: why (a rollback policy saw a reason to go back and could not)
        - moved: what moved between groups, as the strategy says it

        Args:
            step: The optimizer step at which it took place.
            kind: One of the words above.
            details: What stands behind the word, by name.
        """
        ...
