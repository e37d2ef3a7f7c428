"""Optimizer steps that a CUDA graph may capture: all that a step decides by is on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkernels.allocation.run.deciding import choose_ranks
from peftkernels.allocation.run.device_schedule import DeviceSchedule
from peftkernels.allocation.run.parts import RunParts
from peftkernels.allocation.run.stepping import checked_step, update_strategy
from peftkernels.ops.rank_plan import RankState


class CapturedStepper:
    """Makes the steps of a run whose step count and schedule are on the device; `Stepper` says what they are."""

    def __init__(self, parts: RunParts, schedule: DeviceSchedule) -> None:
        self._parts = parts
        self._schedule = schedule

    def advance(self, step: int | None) -> None:
        if step is not None:
            before, last = self._parts.progress.steps, self._parts.settings.last_allocation
            if checked_step(step, before) > last > before:
                raise ValueError(f"step: found {step} after {before}, expected at most {last} before the one after")
            self._schedule.count_from(step - 1)
        self._make(None)

    def after_optimizer_step(self, overflow: Tensor | None) -> bool:
        self._make(overflow)
        return True

    def _make(self, overflow: Tensor | None) -> None:
        parts, schedule = self._parts, self._schedule
        statistics, strategy, masks, progress = parts.statistics, parts.strategy, parts.masks, parts.progress
        if parts.layers.device != masks.device:
            raise RuntimeError(
                f"the layers moved from {masks.device} to {parts.layers.device}: with capturable=True make the "
                "allocator where the layers are trained"
            )
        schedule.advance(overflow)
        skip = schedule.skips_update(overflow)
        statistics.begin_step(skip=skip, budgets=schedule.budgets())
        progress.count_gradients(update_strategy(parts), skip)
        scores = strategy.scores(statistics)
        choice = choose_ranks(strategy, statistics, masks, scores, 0, progress.informed)
        due = schedule.decides(overflow)
        progress.count_undecided(due & choice.left)
        progress.decide_on_device(due & choice.decided, scores, choice.thresholds)
        masks.take(torch.where(due, choice.keep, masks.keep))
        masks.write_masked(RankState.PROBE, schedule.masks())
        parts.idle.reset()
