"""The schedule as device tensors, for allocator steps that a CUDA graph captures."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkernels.allocation.budget.budgets import Shares
from peftkernels.allocation.run.decision import Decision
from peftkernels.allocation.run.settings import AllocatorSettings


class DeviceSchedule:
    """The step count and what follows from it, on the device: nothing here is read by the host.

    Budgets are looked up in a table made from the host's schedule, so that they are the same to the last rank.

    Attributes:
        step: 0-dim int64, optimizer steps so far.
        skipped: 0-dim int64, steps that a GradScaler kept from the optimizer.
    """

    def __init__(self, settings: AllocatorSettings, shares: Shares, device: torch.device) -> None:
        self._last = settings.last_allocation
        steps = range(self._last + 2)
        whole = all(share.schedule.whole for share in shares.shares)
        table = [[share.schedule(step)[0] for share in shares.shares] for step in steps]
        # After the last allocation the budget no longer changes: the table's last row stands for all later steps.
        table[self._last] = table[self._last + 1]
        self._budgets = torch.tensor(table, dtype=torch.int64 if whole else torch.float64, device=device)
        deciding = [step == self._last or (step < self._last and shares.due(step)) for step in steps]
        self._deciding = torch.tensor(deciding, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._decided_at = torch.zeros((), dtype=torch.int64, device=device)

    def advance(self, overflow: Tensor | None) -> None:
        """Count one optimizer step, or one skipped step where `overflow` (0-dim, from a GradScaler) is not zero."""
        if overflow is None:
            self.step += 1
            return
        skipped = overflow.reshape(()) != 0
        self.step += ~skipped
        self.skipped += skipped

    def count_from(self, step: int) -> None:
        """Take `step` as the last step that was made."""
        self.step.fill_(step)

    def budgets(self) -> Tensor:
        """Return the budget of every share, (S,)."""
        return self._budgets.index_select(0, self._row()).reshape(-1)

    def skips_update(self, overflow: Tensor | None) -> Tensor:
        """Return True, 0-dim bool, if statistics stay as they are: in a skipped step, and after the last allocation."""
        settled = self.step >= self._last
        return settled if overflow is None else settled | (overflow.reshape(()) != 0)

    def decides(self, overflow: Tensor | None) -> Tensor:
        """Return True (0-dim bool) if ranks are chosen in this step."""
        due = self._deciding.index_select(0, self._row()).reshape(())
        return due if overflow is None else due & (overflow.reshape(()) == 0)

    def masks(self) -> Tensor:
        """Return True (0-dim bool) if masked ranks are masked in this step, by its decision or the last allocation."""
        return self._deciding.index_select(0, self._row()).reshape(()) | (self.step > self._last)

    def remember(self, before: Decision | None, deciding: Tensor, scores: Tensor, thresholds: Tensor) -> Decision:
        """Return the last decision, in tensors that keep their places."""
        if before is None:
            before = Decision(0, 0, torch.zeros_like(scores), torch.zeros_like(thresholds))
        torch.where(deciding, scores, before.scores, out=before.scores)
        torch.where(deciding, thresholds, before.thresholds, out=before.thresholds)
        torch.where(deciding, self.step, self._decided_at, out=self._decided_at)
        return before

    def decision(self, kept: Decision | None, shares: Shares) -> Decision | None:
        """Return `kept` with its step and budget, read from the device; None before the first decision."""
        step = int(self._decided_at)
        return None if kept is None or step == 0 else Decision(step, shares.budget(step), kept.scores, kept.thresholds)

    def set(self, step: int, skipped: int, decided_at: int) -> None:
        """Take over the counts of a saved run."""
        self.step.fill_(step)
        self.skipped.fill_(skipped)
        self._decided_at.fill_(decided_at)

    def _row(self) -> Tensor:
        return self.step.clamp(max=self._last + 1).reshape(1)
