"""What a strategy is: a rule that gives every rank a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from peftkernels.allocation.strategies.statistics import Statistics


class Strategy:
    """A rule that scores ranks; `BudgetAllocator` turns the scores into masks and does everything else.

    A strategy implements `scores`. One that keeps running statistics also implements `update`, and `tensors`, through
    which its state is saved, resumed to the bit and rolled back. Ranks come as one vector (Σ r,), layers in model
    order; `Statistics` has what most rules need, in that form.

    Attributes:
        name: The strategy's name in logs and states.
        capturable: True where `update`, `scores` and `select` use device operations only, whatever the step.
        needs_loss: True where the training loop must give the loss to `BudgetAllocator.observe`.
    """

    name: str = ""
    capturable: bool = False
    needs_loss: bool = False

    def begin(self, statistics: Statistics) -> None:
        """Make the state; called once, when the allocator is made."""

    def update(self, statistics: Statistics) -> None:
        """Take in one optimizer step; called after each of them until the last allocation."""

    def scores(self, statistics: Statistics) -> Tensor:
        """Return one score per rank, (Σ r,); the higher ones stay."""
        raise NotImplementedError

    def moved(self) -> Sequence[Mapping[str, Any]]:
        """Return what was moved between groups in the last `update`, for the log; each move once."""
        return ()

    def select(self, statistics: Statistics, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the ranks to keep, bool (Σ r,), and each share's threshold, (S,), under the budget after `step`."""
        return statistics.select(scores, step)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the state by name: tensors that `load` and `rollback` write into."""
        return {}

    def load(self, tensors: Mapping[str, Tensor], statistics: Statistics) -> None:
        """Take over a saved state: tensors of the names and shapes that `tensors` has now, already checked."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def release(self) -> None:
        """Free what only later allocations would need, since the last one is done."""

    def facts(self) -> dict[str, Any]:
        """Return what the rule was given, as JSON values; a state saved with others is refused."""
        return {}
