"""An allocation in words and in plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from peftkernels.allocation.run.decision import Decision
from peftkernels.allocation.run.parts import RunParts
from peftkernels.allocation.run.report import AllocationReport, ModuleAllocation
from peftkernels.allocation.run.settings import AllocatorSettings


def explain_decision(parts: RunParts) -> AllocationReport:
    """Return what `BudgetAllocator.explain` does; reads the last decision from the device."""
    settings, statistics, progress = parts.settings, parts.statistics, parts.progress
    decision, step = progress.decision, progress.steps
    scores: list[float] = []
    thresholds: Sequence[float | None] = [None] * len(statistics.names)
    if decision is not None:
        scores = decision.scores.tolist()
        thresholds = statistics.by_module(decision.thresholds)
    modules = []
    start = 0
    for (name, kept), threshold in zip(parts.masks.pattern().items(), thresholds, strict=True):
        own = tuple(scores[start : start + len(kept)])
        start += len(kept)
        if name in parts.masks.frozen:
            why = "frozen: its factors no longer train" + ("" if any(kept) else " and none of its ranks is kept")
        else:
            why = _why(settings, step, decision, kept, own)
        modules.append(ModuleAllocation(name, tuple(kept), own, threshold, why))
    return AllocationReport(
        step=step,
        phase=_phase(settings, step),
        budget=statistics.shares.budget(step),
        unit=statistics.shares.unit,
        decided_at=None if decision is None else decision.step,
        threshold=thresholds[0] if len(statistics.shares.shares) == 1 else None,
        nonfinite_steps=progress.nonfinite_steps,
        skipped_steps=progress.skipped_steps,
        modules=tuple(modules),
        rollbacks=progress.rollbacks,
        undecided_steps=progress.undecided_steps,
    )


def run_facts(parts: RunParts) -> dict[str, Any]:
    """Return what `Observer.on_start` is told."""
    statistics = parts.statistics
    group_of = {member: share.name for share in statistics.shares.shares for member in share.members}
    return {
        "strategy": parts.strategy.name,
        "settings": {**asdict(parts.settings), **parts.strategy.facts()},
        "modules": [
            {
                "name": name,
                "rank": statistics.ranks[index],
                "in_features": layer.lora_A.shape[1],
                "out_features": layer.lora_B.shape[0],
                "group": group_of[index],
                "cost": statistics.shares.costs[index],
            }
            for index, (name, layer) in enumerate(parts.masks.own.items())
        ],
        "unit": statistics.shares.unit,
        "step": parts.progress.steps,
        "rollbacks": parts.progress.rollbacks,
    }


def _phase(settings: AllocatorSettings, step: int) -> str:
    if step >= settings.last_allocation:
        return "final ranks"
    return "before the first mask" if step <= settings.tinit else "budget decreasing"


def _why(
    settings: AllocatorSettings,
    step: int,
    decision: Decision | None,
    kept: Sequence[bool],
    scores: Sequence[float],
) -> str:
    if step == 0:
        return "the allocator has not been stepped"
    if decision is None:
        return f"no mask before step {settings.tinit + 1}"
    if not kept:
        return "it has no ranks"
    if not all(math.isfinite(score) for score in scores):
        return "some of its scores are not finite: these ranks stay as the mask before has them"
    keeping = [score for score, keep in zip(scores, kept, strict=True) if keep]
    masked = [score for score, keep in zip(scores, kept, strict=True) if not keep]
    if not masked:
        why = f"every score is above the threshold, the lowest {min(keeping):.3g}"
    elif not keeping:
        why = f"no score is above the threshold, the highest {max(masked):.3g}"
    else:
        why = f"lowest score kept {min(keeping):.3g}, highest masked {max(masked):.3g}"
    if decision.step < step < settings.last_allocation:
        why += f"; masked at step {decision.step}, every rank trains until the next mask"
    return why
