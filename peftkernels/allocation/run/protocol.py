"""What an allocator offers to a training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from peftkernels.allocation.logs.observer import Observer
from peftkernels.allocation.run.report import AllocationReport


class Allocator(Protocol):
    """Turns statistics of a running fine-tuning into rank plans under a budget.

    A training loop attaches the allocator to its optimizer (or calls `step` after every optimizer step, before the
    gradients are cleared) and adds `regularization()` to its loss. Where a strategy or a policy learns from the loss,
    it also calls `observe`. Nothing else is asked of it.
    """

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        ...

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer the allocator is attached to."""
        ...

    @property
    def frozen(self) -> tuple[str, ...]:
        """The layers given to `freeze`."""
        ...

    @property
    def nonfinite_steps(self) -> int:
        """Steps whose gradients were not finite and left the statistics as they were."""
        ...

    @property
    def undecided_steps(self) -> int:
        """Steps that were to choose ranks and had no score to choose by."""
        ...

    @property
    def skipped_steps(self) -> int:
        """Calls of the optimizer that a GradScaler kept from stepping."""
        ...

    @property
    def rollbacks(self) -> int:
        """How often the run was rolled back."""
        ...

    def attach(self, optimizer: Optimizer) -> None:
        """Run after every `optimizer.step()` from now on."""
        ...

    def detach(self) -> None:
        """Undo `attach`."""
        ...

    def close(self) -> None:
        """Undo `attach`, and leave the layers to another allocator."""
        ...

    def observe(self, loss: Tensor | float) -> None:
        """Take the loss of the step that is being made, before `optimizer.step()`."""
        ...

    def regularization(self) -> Tensor:
        """Return a 0-dim term to add to the loss; zero where the strategy has none."""
        ...

    def add_regularization_gradient(self, scale: float = 1.0) -> Tensor:
        """Do what adding `regularization()` to the loss does, after backward(), without a graph; return the term."""
        ...

    def step(self, step: int | None = None) -> None:
        """Advance by one optimizer step, for loops without an optimizer hook."""
        ...

    def budget(self, step: int) -> float:
        """Return what may be kept, over all layers, after optimizer step `step`, in the budget's unit."""
        ...

    def rank_pattern(self) -> dict[str, list[bool]]:
        """Return for every layer by name which ranks the last decision kept."""
        ...

    def freeze(self, name: str, *, drop: bool = True) -> None:
        """Take a layer out of the fine-tuning, with its ranks (drop=False) or without them."""
        ...

    def add_observer(self, observer: Observer) -> None:
        """Tell `observer` from now on what is decided."""
        ...

    def add_callback(self, callback: Callable[[Any], None]) -> None:
        """Call `callback` with this allocator after every step."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return what it takes to go on later to the same bits, together with the model's and optimizer's state.

        These are tensors by name, which safetensors can write.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; refuses what another allocator gave before any change."""
        ...

    def snapshot(self) -> Any:
        """Return a token that `rollback` goes back to."""
        ...

    def rollback(self, token: Any, why: str = "asked for") -> None:
        """Return to the moment of the snapshot: allocator, parameters and optimizer's moments."""
        ...

    def explain(self) -> AllocationReport:
        """Return the last decision, layer by layer, with the reason."""
        ...
