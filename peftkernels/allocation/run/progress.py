"""How far a run is: what an allocator has counted and decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftkernels.allocation.budget.budgets import Shares
from peftkernels.allocation.run.decision import Decision
from peftkernels.allocation.run.device_schedule import DeviceSchedule
from peftkernels.allocation.run.watchers import Watchers


class RunProgress:
    """The counts of a run and its last decision.

    Counts of steps are the host's, or the device's where the step is captured; those of gradients and scores are on the
    device in either case, and reading them synchronises with it.

    A step whose gradients are not finite leaves the statistics unchanged, is counted in `nonfinite_steps` and warned
    about once; on an accelerator the count is read back, and the warning given, only at the last allocation and when
    the state is saved or explained. Judged are the gradients that the strategy looks at, those of the gates at least.
    This guards what the allocator decides by, not the weights: the optimizer has run by then, and has written such
    gradients into weights and moments unless `GradScaler`, `clip_grad_norm_(error_if_nonfinite=True)` or the like
    stopped it. `RollbackPolicy` takes the weights back too.

    A rank whose score is not finite stays as the mask before has it. Where that is so for all ranks of a budget, where
    their scores are all the same, or where no step so far had finite gradients, nothing is decided, the mask before
    stays, and the step is counted in `undecided_steps` and warned about once.

    A step that a GradScaler skips is no step here either: most optimizers are not called then; fused ones are, and the
    call is counted in `skipped_steps`. To know, the host reads the scaler's flag after each of their steps, unless the
    step is captured.

    Attributes:
        released: True if the last allocation is done and the strategy's state is gone.
        rollbacks: How often the run was rolled back.
        informed: 0-dim bool tensor, True if the gradients of any step so far were finite.
        schedule: The schedule on the device where the step is captured, else None.
    """

    def __init__(
        self, shares: Shares, device: torch.device, watchers: Watchers, schedule: DeviceSchedule | None = None
    ) -> None:
        self._shares = shares
        self._watchers = watchers
        self.schedule = schedule
        self.released = False
        self.rollbacks = 0
        self._decision: Decision | None = None
        self._step = 0
        self._skipped = 0
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self._undecided = torch.zeros((), dtype=torch.int64, device=device)
        # Without a step whose gradients were finite there is nothing to decide by.
        self.informed = torch.zeros((), dtype=torch.bool, device=device)

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self._step if self.schedule is None else int(self.schedule.step)

    @property
    def skipped_steps(self) -> int:
        """How often a GradScaler kept the optimizer from stepping although it was called; no steps of the run."""
        return self._skipped if self.schedule is None else int(self.schedule.skipped)

    @property
    def decision(self) -> Decision | None:
        """The last decision, None before the first."""
        return self._decision if self.schedule is None else self.schedule.decision(self._decision, self._shares)

    @property
    def nonfinite_steps(self) -> int:
        """How many steps had gradients that were not finite; warns of the first one."""
        count = int(self._nonfinite)
        if count:
            self._watchers.warn_once(
                "nonfinite",
                "a step had gradients that are not finite; it leaves the allocator's score averages unchanged "
                "(later ones are counted in nonfinite_steps without a warning)",
            )
        return count

    @property
    def undecided_steps(self) -> int:
        """How many steps were to choose ranks and could not; warns of the first one."""
        count = int(self._undecided)
        if count:
            self._watchers.warn_once(
                "undecided",
                "a step was to choose ranks, and its scores are not finite or all the same: the mask before stays "
                "(later ones are counted in undecided_steps without a warning)",
            )
        return count

    def count_step(self, step: int) -> None:
        """Step `step` was made on the host."""
        self._step = step

    def count_skipped(self) -> None:
        """A GradScaler kept the optimizer from stepping."""
        self._skipped += 1

    def count_gradients(self, finite: Tensor, skip: Tensor | None = None) -> None:
        """Gradients were judged: `finite`, 0-dim bool. Where `skip` is True, 0-dim bool, they do not count."""
        if skip is None:
            self._nonfinite += ~finite
            self.informed |= finite
        else:
            self._nonfinite += ~(finite | skip)
            self.informed |= finite & ~skip

    def count_undecided(self, left: Tensor) -> None:
        """Ranks were to be chosen; `left`, 0-dim bool, is True if some could not be."""
        self._undecided += left

    def count_rollback(self, rollbacks: int) -> None:
        """The run was rolled back, after so many rollbacks: the count does not go back with it."""
        self.rollbacks = rollbacks + 1

    def release(self) -> None:
        """The last allocation is being made."""
        self.released = True

    def decide(self, decision: Decision) -> None:
        """Ranks were chosen on the host."""
        self._decision = decision

    def decide_on_device(self, decided: Tensor, scores: Tensor, thresholds: Tensor) -> None:
        """Ranks were chosen in a captured step, where `decided`, 0-dim bool, is True."""
        assert self.schedule is not None
        self._decision = self.schedule.remember(self._decision, decided, scores, thresholds)

    def follow(self, device: torch.device) -> None:
        """Count on this device from now on, since the layers have moved there."""
        self._nonfinite, self._undecided = self._nonfinite.to(device), self._undecided.to(device)
        self.informed = self.informed.to(device)
        if self._decision is not None:
            self._decision = self._decision.to(device)

    def restore(self, facts: Mapping[str, Any], decision: Decision | None) -> None:
        """Take over the counts of a saved run, already checked, and its last decision."""
        self.released = facts["released"]
        self.rollbacks = facts["rollbacks"]
        self._nonfinite.fill_(facts["nonfinite_steps"])
        # States of earlier versions have neither of these two.
        self._undecided.fill_(facts.get("undecided_steps", 0))
        self.informed.fill_(facts.get("informed", facts["nonfinite_steps"] < facts["step"]))
        self._skipped = facts["skipped_steps"]
        self._step = facts["step"]
        if self.schedule is None:
            self._decision = None if decision is None else decision.to(self.informed.device)
            return
        self.schedule.set(facts["step"], facts["skipped_steps"], 0 if decision is None else decision.step)
        if decision is None:
            return
        if self._decision is None:
            self._decision = decision.to(self.informed.device)
        else:
            # A captured step goes on writing to these tensors.
            self._decision.scores.copy_(decision.scores)
            self._decision.thresholds.copy_(decision.thresholds)
