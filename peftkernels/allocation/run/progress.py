"""Where a run stands: what an allocator has counted and decided."""

from __future__ import annotations

import torch

from peftkernels.allocation.budget.budgets import Shares
from peftkernels.allocation.run.decision import Decision
from peftkernels.allocation.run.device_schedule import DeviceSchedule
from peftkernels.allocation.run.settings import AllocatorSettings
from peftkernels.allocation.run.watchers import Watchers
from peftkernels.allocation.strategies.statistics import Statistics


class RunProgress:
    """The counts of a run, on the host, or on the device where the step is captured."""

    statistics: Statistics
    _watchers: Watchers

    def _begin(self, settings: AllocatorSettings, shares: Shares, device: torch.device) -> None:
        """Nothing is counted or decided yet."""
        self._released = False
        self._decision: Decision | None = None
        self._step = 0
        self._skipped = 0
        self._rollbacks = 0
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self._undecided = torch.zeros((), dtype=torch.int64, device=device)
        # Whether the gradients of any step so far were finite: without one there is nothing to decide by.
        self._informed = torch.zeros((), dtype=torch.bool, device=device)
        self._on_device = DeviceSchedule(settings, shares, device) if settings.capturable else None

    @property
    def released(self) -> bool:
        """Whether the last allocation is done and the strategy's state is gone."""
        return self._released

    @property
    def steps(self) -> int:
        """Optimizer steps so far; reads the device where `capturable` is True."""
        return self._step if self._on_device is None else int(self._on_device.step)

    @property
    def decision(self) -> Decision | None:
        """The last decision, None before the first; reads the device where `capturable` is True."""
        if self._on_device is None:
            return self._decision
        return self._on_device.decision(self._decision, self.statistics.shares)

    @property
    def nonfinite_steps(self) -> int:
        """How many steps had gradients that were not finite and left the scores unchanged; reads the device."""
        count = int(self._nonfinite)
        if count:
            self._watchers.warn_once(
                "nonfinite",
                "a step had gradients that are not finite; it leaves the allocator's score averages unchanged "
                "(later ones are counted in nonfinite_steps without a warning)",
            )
        return count

    @property
    def informed(self) -> bool:
        """Whether the gradients of any step so far were finite; reads the device."""
        return bool(self._informed)

    @property
    def undecided_steps(self) -> int:
        """How many steps were to choose ranks and could not, for the whole budget or a group's share of it: no score
        was finite, all were the same, or no step yet had finite gradients. The mask before stayed. Reads the device."""
        count = int(self._undecided)
        if count:
            self._watchers.warn_once(
                "undecided",
                "a step was to choose ranks, and its scores are not finite or all the same: the mask before stays "
                "(later ones are counted in undecided_steps without a warning)",
            )
        return count

    @property
    def skipped_steps(self) -> int:
        """How often a GradScaler kept the optimizer from stepping although it was called; no steps of the allocator."""
        return self._skipped if self._on_device is None else int(self._on_device.skipped)

    @property
    def rollbacks(self) -> int:
        """How often the run was rolled back."""
        return self._rollbacks
