"""An allocator's decisions as TensorBoard scalars."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


class TensorBoardScalars:
    """An observer that writes scalars to a SummaryWriter of yours, at the step of each decision.

    - allocation/live: ranks kept, and allocation/live/<group> where there are several groups
    - allocation/budget: in the unit of the budget
    - allocation/threshold: left out where nothing was masked; threshold/<group> where there are several
    - allocation/churn: ranks masked or brought back since the decision before
    - allocation/revived: ranks brought back; like churn left out at the first decision of a resumed run
    - allocation/skipped, allocation/rollbacks: how often that happened since the writer was given

        from torch.utils.tensorboard import SummaryWriter       # pip install 'peftkernels[tensorboard]'
        allocator.add_observer(TensorBoardScalars(SummaryWriter("runs/one")))

    Args:
        writer: Anything with add_scalar(tag, value, step); it stays yours to flush and close.
        prefix: What all tags begin with.

    Raises:
        TypeError: For a writer without add_scalar.
    """

    def __init__(self, writer: Any, prefix: str = "allocation") -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                f"writer: found {type(writer).__name__}, expected a torch.utils.tensorboard.SummaryWriter or another "
                "object with add_scalar(); pip install 'peftkernels[tensorboard]' brings the package it needs"
            )
        self._writer = writer
        self._prefix = prefix
        self._groups: list[str] = []
        self._kept: list[bool] | None = None
        self._counts: Counter[str] = Counter()

    def on_start(self, facts: Mapping[str, Any]) -> None:
        """Take note of the groups."""
        modules = facts["modules"]
        self._groups = [str(module.get("group") or "") for module in modules]
        everything = [True] * sum(module["rank"] for module in modules)
        self._kept = everything if facts["step"] == 0 else None

    def on_decision(
        self,
        step: int,
        budget: float,
        thresholds: Sequence[float],
        scores: Sequence[Sequence[float]],
        kept: Sequence[Sequence[bool]],
    ) -> None:
        """Write the decision."""
        live: Counter[str] = Counter()
        for group, keeps in zip(self._groups, kept, strict=True):
            live[group] += sum(keeps)
        self._write("live", live.total(), step)
        if len(live) > 1:
            for group, count in live.items():
                self._write(f"live/{group or 'other'}", count, step)
        self._write("budget", budget, step)
        for group, threshold in dict(zip(self._groups, thresholds, strict=True)).items():
            if math.isfinite(threshold):
                self._write(f"threshold/{group or 'other'}" if len(live) > 1 else "threshold", threshold, step)
        now = [bool(keep) for keeps in kept for keep in keeps]
        if self._kept is not None:
            pairs = list(zip(self._kept, now, strict=True))
            self._write("churn", sum(before != after for before, after in pairs), step)
            self._write("revived", sum(after and not before for before, after in pairs), step)
        self._kept = now

    def on_event(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """Count skipped steps and rollbacks."""
        tag = {"skipped": "skipped", "rollback": "rollbacks"}.get(kind)
        if tag is not None:
            self._counts[tag] += 1
            self._write(tag, self._counts[tag], step)

    def _write(self, tag: str, value: float, step: int) -> None:
        self._writer.add_scalar(f"{self._prefix}/{tag}", value, step)
