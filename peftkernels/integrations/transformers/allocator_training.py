"""Running a `peftkernels.allocation` allocator while a Trainer trains its layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftkernels.allocation import BudgetAllocator
from peftkernels.allocation.run.state_checks import part
from peftkernels.integrations.transformers.checkpoint_state import first_difference

_STATE = "allocator."
_GATES = "gates."


class AllocatorTraining:
    """An allocator during one training: attached to the optimizer, its term added, its state in checkpoints.

    Raises:
        TypeError: it is no `BudgetAllocator`.
    """

    kind = "allocator"

    def __init__(self, allocator: BudgetAllocator) -> None:
        if not isinstance(allocator, BudgetAllocator):
            raise TypeError(f"allocator: found {type(allocator).__name__}, expected a BudgetAllocator")
        self.allocator = allocator
        self._attached = False

    @property
    def factors(self) -> dict[str, Tensor]:
        """lora_A (r, K), lora_B (N, r) and lora_E (r, 1) of the layers by name."""
        layers = self.allocator.layers
        return {f"{n}.{f}": getattr(layer, f) for n, layer in layers.items() for f in ("lora_A", "lora_B", "lora_E")}

    @property
    def last_allocation(self) -> int:
        """The step after which ranks no longer change."""
        return self.allocator.settings.last_allocation

    @property
    def finished(self) -> bool:
        """True once the last allocation is done."""
        return self.allocator.released

    def begin(self, optimizer: Any, max_steps: int, total_step: int | None, placeholder: int) -> None:
        """Attach to the optimizer, before the first step. The schedule is the allocator's own, which cannot change."""
        settled = self.allocator.settings.total_step
        if self.last_allocation > max_steps:
            raise ValueError(
                f"total_step: found {settled} in the allocator, whose last allocation is at step "
                f"{self.last_allocation}, but the Trainer makes {max_steps} optimizer steps; expected the last "
                "allocation within them"
            )
        if settled != max_steps:
            warnings.warn(
                f"total_step: found {settled} in the allocator and {max_steps} optimizer steps in the Trainer; the "
                "allocator's schedule is followed",
                UserWarning,
                stacklevel=2,
            )
        if self.allocator.optimizer is None:
            self.allocator.attach(optimizer)
            self._attached = True

    def before_step(self) -> None:
        """Add the gradient of the orthogonality term."""
        self.allocator.add_regularization_gradient()

    def after_step(self, step: int, skipped: bool) -> None:
        """Nothing: the optimizer has called the allocator, unless a GradScaler kept it from stepping."""

    def end(self, step: int) -> None:
        """Training is over: let go of the optimizer."""
        if self._attached:
            self.allocator.detach()
            self._attached = False

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The allocator's state, and the gates, by which the checkpoint is known again."""
        tensors = {_STATE + name: value for name, value in self.allocator.state_dict().items()}
        return {**tensors, **{_GATES + name: value for name, value in self._gates().items()}}, {}

    def difference(self, tensors: Mapping[str, Tensor]) -> str | None:
        """How the gates of the checkpoint differ from the model's, in words; None where they are equal."""
        return first_difference(part(tensors, _GATES), self._gates())

    def unpack(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what `pack` gave, after `begin`."""
        self.allocator.load_state_dict(part(tensors, _STATE))

    def adopt(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """The parameters of another checkpoint were loaded into the model: take its decision over."""
        self.unpack(tensors, facts)

    def _gates(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.factors.items() if name.endswith(".lora_E")}
