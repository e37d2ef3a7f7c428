"""An AdaLoRA decision in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peftkernels.allocation.report import AllocationReport, ModuleAllocation
from peftkernels.allocation.schedule import CubicSchedule
from peftkernels.allocation.selection import Decision
from peftkernels.allocation.settings import AdaLoraSettings


def explain_decision(
    settings: AdaLoraSettings,
    schedule: CubicSchedule,
    step: int,
    decision: Decision | None,
    pattern: Mapping[str, Sequence[bool]],
    nonfinite_steps: int,
) -> AllocationReport:
    """The report after optimizer step `step`; `decision` is the last one, None before the first."""
    if decision is None:
        scores: list[float] = []
        threshold = None
    else:
        scores = decision.scores.tolist()
        threshold = decision.threshold.item()
    modules = []
    start = 0
    for name, kept in pattern.items():
        own = tuple(scores[start : start + len(kept)])
        start += len(kept)
        modules.append(ModuleAllocation(name, tuple(kept), own, threshold, _why(settings, step, decision, kept, own)))
    return AllocationReport(
        step=step,
        phase=_phase(settings, step),
        budget=schedule(step)[0],
        decided_at=None if decision is None else decision.step,
        threshold=threshold,
        nonfinite_steps=nonfinite_steps,
        modules=tuple(modules),
    )


def _phase(settings: AdaLoraSettings, step: int) -> str:
    if step >= settings.last_allocation:
        return "final ranks"
    return "before the first mask" if step <= settings.tinit else "budget decreasing"


def _why(
    settings: AdaLoraSettings,
    step: int,
    decision: Decision | None,
    kept: Sequence[bool],
    scores: Sequence[float],
) -> str:
    if step == 0:
        return "the allocator has not been stepped"
    if decision is None:
        return f"no mask before step {settings.tinit + 1}"
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
