"""Going back to an earlier moment of a run, without a file."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from peftkernels.allocation.layers.gated import FACTORS
from peftkernels.allocation.layers.sharding import local_part
from peftkernels.allocation.run.parts import RunParts
from peftkernels.allocation.run.state import check_state, pack_state, unpack_state


@dataclass(frozen=True)
class Snapshot:
    """One point of a run: the allocator, the trained parameters and the optimizer's moments of them, all copies.

    Attributes:
        step: Optimizer steps made until then.
        state: What `BudgetAllocator.state_dict` gave.
        parameters: The adapters' factors, and after them what else the attached optimizer trains, in its order; where
            they are sharded over processes, each process's own part.
        moments: For every parameter its optimizer state by name; None where no optimizer was attached.
    """

    step: int
    state: dict[str, Tensor]
    parameters: tuple[Tensor, ...]
    moments: tuple[dict[str, Any], ...] | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        moments = [value for own in self.moments or () for value in own.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in (*self.state.values(), *self.parameters, *moments))


def take_snapshot(parts: RunParts, optimizer: Optimizer | None) -> Snapshot:
    """Return what `BudgetAllocator.snapshot` does."""
    parameters = trained_parameters(parts, optimizer)
    moments = None if optimizer is None else tuple(_copied(optimizer.state.get(p, {})) for p in parameters)
    copies = tuple(local_part(parameter).clone() for parameter in parameters)
    return Snapshot(parts.progress.steps, pack_state(parts), copies, moments)


@torch.no_grad()
def restore_snapshot(parts: RunParts, optimizer: Optimizer | None, token: Snapshot) -> None:
    """Do what `BudgetAllocator.rollback` does. Everything is checked before the first change."""
    parameters = check_snapshot(parts, optimizer, token)
    parts.masks.check_writable()
    if optimizer is not None and token.moments is not None:
        for parameter, moments in zip(parameters, token.moments, strict=False):
            _write_back(optimizer.state, parameter, moments)
    torch._foreach_copy_([local_part(own) for own in parameters], list(token.parameters[: len(parameters)]))
    unpack_state(parts, token.state)


def check_snapshot(parts: RunParts, optimizer: Optimizer | None, token: Snapshot) -> list[Tensor]:
    """Return the parameters that a token of this allocator is about.

    Raises:
        TypeError: For anything but a token.
        ValueError: For another allocator's or optimizer's.
    """
    if not isinstance(token, Snapshot):
        raise TypeError(f"token: found {type(token).__name__}, expected what snapshot() returned")
    facts, _ = check_state(parts, token.state)
    if facts["step"] != token.step:
        raise ValueError(f"token: found step {token.step} beside a state of step {facts['step']}, expected the same")
    parameters = trained_parameters(parts, optimizer)
    # A token from before `attach`, or one used after `detach`, is about the factors alone.
    pairs = list(zip(parameters, token.parameters, strict=False))
    factors = len(parts.masks.layers) * len(FACTORS)
    if len(token.parameters) < factors:
        raise ValueError(f"token: found {len(token.parameters)} parameters, expected at least the {factors} factors")
    attached = optimizer is not None and token.moments is not None
    expected = "as the allocator's optimizer trains now"
    for index, (own, kept) in enumerate(pairs):
        if (shape := local_part(own).shape) != kept.shape:
            raise ValueError(
                f"token: parameters.{index}: found {tuple(kept.shape)}, expected {tuple(shape)} {expected}"
            )
    if attached and len(parameters) != len(token.parameters):
        raise ValueError(f"token: found {len(token.parameters)} parameters, expected {len(parameters)} {expected}")
    return parameters[: len(pairs) if attached else factors]


def trained_parameters(parts: RunParts, optimizer: Optimizer | None) -> list[Tensor]:
    """Return the adapters' factors, and after them what else the attached optimizer trains."""
    factors: list[Tensor] = [getattr(layer, factor) for layer in parts.masks.own.values() for factor in FACTORS]
    known = {id(factor) for factor in factors}
    groups = [] if optimizer is None else optimizer.param_groups
    return factors + [p for group in groups for p in group["params"] if id(p) not in known]


def _copied(moments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in moments.items()
    }


def _write_back(state: Any, parameter: Tensor, moments: dict[str, Any]) -> None:
    """In place where the optimizer has the tensor already: captured steps and fused optimizers keep its address."""
    if not moments:
        state.pop(parameter, None)
        return
    own = state[parameter]
    for name in own.keys() - moments.keys():
        del own[name]
    for name, value in _copied(moments).items():
        if isinstance(value, Tensor) and isinstance(own.get(name), Tensor):
            own[name].copy_(value)
        else:
            own[name] = value
