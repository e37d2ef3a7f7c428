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
    order; the statistics bus (`Statistics`) has what most rules need, in that form.

    name        the strategy's name in logs and states
    capturable  True where `update`, `scores` and `select` use device operations only, whatever the step
    needs_loss  True where the training loop must give the loss to `BudgetAllocator.observe`
    """

    name: str = ""
    capturable: bool = False
    needs_loss: bool = False

    def begin(self, bus: Statistics) -> None:
        """Make the state; called once, when the allocator is made."""

    def update(self, bus: Statistics) -> None:
        """Take in one optimizer step; called after each of them until the last allocation."""

    def scores(self, bus: Statistics) -> Tensor:
        """One score per rank, (Σ r,); the higher ones stay."""
        raise NotImplementedError

    def moved(self) -> Sequence[Mapping[str, Any]]:
        """What was moved between groups in the last `update`, for the log; each move is given once."""
        return ()

    def select(self, bus: Statistics, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The ranks to keep (bool, (Σ r,)) and the threshold of each share (S,) under the budget after `step`."""
        return bus.select(scores, step)

    def tensors(self) -> Mapping[str, Tensor]:
        """The state by name: tensors that `load` and `rollback` write into."""
        return {}

    def load(self, tensors: Mapping[str, Tensor], bus: Statistics) -> None:
        """Take over a saved state: tensors of the names and shapes that `tensors` has now, already checked."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def release(self) -> None:
        """The last allocation is done: free what only later ones would need."""

    def facts(self) -> dict[str, Any]:
        """What the rule was given, as JSON values; a state saved with others is refused."""
        return {}
