"""An allocator's state as tensors by name, the form that safetensors writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftkernels.allocation.budgets import GIVEN_COSTS
from peftkernels.allocation.selection import Decision

if TYPE_CHECKING:
    from peftkernels.allocation.engine import BudgetAllocator

_FORMAT = 2
_METADATA = "metadata"
_STRATEGY = "strategy."


def pack_state(allocator: BudgetAllocator) -> dict[str, Tensor]:
    """Copies of all tensors, contiguous and without shared memory, with everything else as JSON under "metadata"."""
    decision = allocator.decision
    facts = {
        **_identity(allocator),
        "step": allocator.steps,
        "nonfinite_steps": allocator.nonfinite_steps,
        "skipped_steps": allocator.skipped_steps,
        "released": allocator.released,
        "all_active": allocator.masks.all_active,
        "frozen": list(allocator.frozen),
        "decision": None if decision is None else {"step": decision.step, "budget": decision.budget},
    }
    state = {_METADATA: _encoded(facts), "keep": allocator.masks.keep.clone()}
    if decision is not None:
        state["decision.scores"] = decision.scores.detach().clone()
        state["decision.thresholds"] = decision.thresholds.detach().clone()
    for name, tensor in allocator.strategy.tensors().items():
        state[_STRATEGY + name] = tensor.detach().clone().contiguous()
    return state


def check_state(allocator: BudgetAllocator, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The JSON part of a state that belongs to `allocator`. Raises ValueError for any other."""
    facts = _decoded(state)
    found = facts.get("format")
    if found != _FORMAT:
        raise ValueError(f"state: found format {found!r}, expected {_FORMAT} as given by state_dict()")
    expected = _identity(allocator)
    if facts["strategy"] != expected["strategy"]:
        raise ValueError(f"state: found the strategy {facts['strategy']!r}, expected {expected['strategy']!r}")
    differences = [
        f"{name} (found {facts['settings'].get(name)!r}, expected {value!r})"
        for name, value in expected["settings"].items()
        if facts["settings"].get(name) != value
    ]
    if differences:
        raise ValueError(f"state: it was saved by an allocator with other settings: {', '.join(differences)}")
    if facts["ranks"] != expected["ranks"]:
        different = sorted(set(facts["ranks"].items()) ^ set(expected["ranks"].items()))
        shown = ", ".join(map(str, different[:6]))
        raise ValueError(f"state: it was saved for other layers; (layer, rank) on one side only: {shown}")
    return facts


def unpack_state(allocator: BudgetAllocator, state: Mapping[str, Tensor]) -> None:
    """Write a state into the allocator and the layers' rank plans. Raises ValueError, before any change, where it
    belongs to another allocator."""
    facts = check_state(allocator, state)
    allocator.masks.check_writable()
    strategy, bus = allocator.strategy, allocator.statistics
    tensors = {name.removeprefix(_STRATEGY): part for name, part in state.items() if name.startswith(_STRATEGY)}
    if not facts["released"]:
        revived = allocator.released
        if revived:
            strategy.begin(bus)
        try:
            _check_tensors(tensors, strategy.tensors())
        except ValueError:
            if revived:
                strategy.release()
            raise
        strategy.load(tensors, bus)
    elif not allocator.released:
        strategy.release()
    decision = None
    if facts["decision"] is not None:
        scores, thresholds = state["decision.scores"].clone(), state["decision.thresholds"].clone()
        decision = Decision(facts["decision"]["step"], facts["decision"]["budget"], scores, thresholds)
    allocator.take_over(facts, state["keep"], decision)


def _identity(allocator: BudgetAllocator) -> dict[str, Any]:
    """What must be the same in the allocator that a state is loaded into, as JSON gives it back."""
    settings = {**asdict(allocator.settings), **allocator.strategy.facts()}
    if allocator.settings.budget is None:
        del settings["budget"]
    bus = allocator.statistics
    if bus.shares.unit in GIVEN_COSTS:
        settings["costs"] = dict(zip(bus.names, bus.shares.costs, strict=True))
    identity = {
        "format": _FORMAT,
        "strategy": allocator.strategy.name,
        "settings": settings,
        "ranks": allocator.masks.ranks,
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def _check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        own = found.get(name)
        if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
            described = "nothing" if own is None else f"{tuple(own.shape)} {own.dtype}"
            raise ValueError(
                f"state[{_STRATEGY + name!r}]: found {described}, expected {tuple(tensor.shape)} {tensor.dtype}"
            )
    unknown = sorted(found.keys() - expected.keys())
    if unknown:
        raise ValueError(f"state[{_STRATEGY + unknown[0]!r}]: found a tensor that the strategy does not know")


def _encoded(facts: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def _decoded(state: Mapping[str, Tensor]) -> dict[str, Any]:
    metadata = state.get(_METADATA) if isinstance(state, Mapping) else None
    if metadata is None:
        return {}
    facts: dict[str, Any] = json.loads(bytes(metadata.tolist()))
    return facts
