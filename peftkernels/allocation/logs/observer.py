"""What an allocator tells those who watch it: its start, its decisions, and what else happened to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Observer(Protocol):
    """Told of everything an allocator does, in order, as plain Python values on the host.

    An allocator without observers reads nothing back from the device for them. Observers must not change what they are
    given. Under data parallelism every process decides the same: give an observer that writes to one of them only.
    """

    def on_start(self, facts: Mapping[str, Any]) -> None:
        """The allocator is about to run, from its first step or from where a saved run goes on; may come again.

        facts:
            strategy   str, the strategy's name
            settings   its settings by name; numbers, strings, booleans, None, and lists and mappings of them
            modules    one mapping for each layer, in the order of all later lists: name, rank (its initial rank),
                       in_features, out_features, group (str) and cost (float, of the budget, for one of its ranks)
            unit       str, what the budget counts: "ranks", "parameters", "microseconds" or "bytes"
            step       int, optimizer steps taken so far: 0, or where a saved run goes on
            rollbacks  int, how often the run was rolled back before that; may be left out
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
        """Ranks were chosen after optimizer step `step`.

        budget      in the unit of the budget, over all modules
        thresholds  of each module: scores at or below it are masked; -inf where nothing was. The same for all
                    modules that share a budget
        scores      of each rank, module by module
        kept        which ranks stay, module by module
        """
        ...

    def on_event(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """Something else took place at optimizer step `step`.

        kind and details:
            loss      value
            skipped   why (the scores were left as they were)
            rollback  to (the step returned to; later steps count on from there), why
            frozen    module
            alarm     why (a rollback policy saw a reason to go back and could not)
            moved     what moved between groups, as the strategy says it

        A strategy may have kinds of its own; "start" and "ranks" are taken.
        """
        ...
