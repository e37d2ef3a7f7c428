"""Going back to an earlier moment of a run, without a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftkernels.allocation.protocol import FACTORS
from peftkernels.allocation.sharding import local_part
from peftkernels.allocation.state import check_state, unpack_state

if TYPE_CHECKING:
    from peftkernels.allocation.engine import BudgetAllocator


@dataclass(frozen=True)
class Snapshot:
    """A moment of an allocator, the adapters it decides on and the optimizer's moments of them; all copies.

    step     optimizer steps made until then
    factors  of every layer in order; where they are sharded over processes, each process's own part
    moments  for every factor in order its optimizer state by name; None where no optimizer was attached
    """

    step: int
    state: dict[str, Tensor]
    factors: tuple[Tensor, ...]
    moments: tuple[dict[str, Any], ...] | None


def take_snapshot(allocator: BudgetAllocator) -> Snapshot:
    """What `BudgetAllocator.snapshot` returns."""
    parameters = _parameters(allocator)
    optimizer = allocator.optimizer
    moments = None if optimizer is None else tuple(_copied(optimizer.state.get(p, {})) for p in parameters)
    factors = tuple(local_part(parameter).clone() for parameter in parameters)
    return Snapshot(allocator.steps, allocator.state_dict(), factors, moments)


@torch.no_grad()
def restore_snapshot(allocator: BudgetAllocator, token: Snapshot) -> None:
    """What `BudgetAllocator.rollback` does. Everything is checked before the first change."""
    if not isinstance(token, Snapshot):
        raise TypeError(f"token: found {type(token).__name__}, expected what snapshot() returned")
    check_state(allocator, token.state)
    allocator.masks.check_writable()
    parameters = _parameters(allocator)
    torch._foreach_copy_([local_part(parameter) for parameter in parameters], list(token.factors))
    optimizer = allocator.optimizer
    if optimizer is not None and token.moments is not None:
        for parameter, moments in zip(parameters, token.moments, strict=True):
            _write_back(optimizer.state, parameter, moments)
    unpack_state(allocator, token.state)


def _parameters(allocator: BudgetAllocator) -> list[Tensor]:
    return [getattr(layer, factor) for layer in allocator.masks.own.values() for factor in FACTORS]


def _copied(moments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in moments.items()}


def _write_back(state: Any, parameter: Tensor, moments: dict[str, Any]) -> None:
    """In place where the optimizer has the tensor already: captured steps and fused optimizers keep its address."""
    if not moments:
        state.pop(parameter, None)
        return
    own = state[parameter]
    for name in own.keys() - moments.keys():
        del own[name]
    for name, value in moments.items():
        if isinstance(value, Tensor) and isinstance(own.get(name), Tensor):
            own[name].copy_(value)
        else:
            own[name] = value.clone() if isinstance(value, Tensor) else value
