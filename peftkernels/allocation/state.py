"""An allocator's state as tensors by name, the form that safetensors writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftkernels.allocation.json_tensor import METADATA, decode, encode
from peftkernels.allocation.selection import Decision

if TYPE_CHECKING:
    from peftkernels.allocation.engine import BudgetAllocator

_FORMAT = 2
_STRATEGY = "strategy."


def pack_state(allocator: BudgetAllocator) -> dict[str, Tensor]:
    """Copies of all tensors, contiguous and without shared memory, with everything else as JSON under "metadata"."""
    decision = allocator.decision
    facts = {
        **_identity(allocator),
        "step": allocator.steps,
        "nonfinite_steps": allocator.nonfinite_steps,
        "skipped_steps": allocator.skipped_steps,
        "rollbacks": allocator.rollbacks,
        "released": allocator.released,
        "all_active": allocator.all_active,
        "frozen": list(allocator.frozen),
        "decision": None if decision is None else {"step": decision.step, "budget": decision.budget},
    }
    tensors = {"keep": allocator.masks.keep, "losses": allocator.statistics.pending_losses}
    if decision is not None:
        tensors |= {"decision.scores": decision.scores, "decision.thresholds": decision.thresholds}
    if not allocator.released:
        # Afterwards nobody asks the strategy again, whatever it has kept.
        tensors |= {_STRATEGY + name: tensor for name, tensor in allocator.strategy.tensors().items()}
    owned = {name: part.detach().clone(memory_format=torch.contiguous_format) for name, part in tensors.items()}
    return {METADATA: encode(facts), **owned}


def check_state(allocator: BudgetAllocator, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The JSON part of a state that belongs to `allocator`, whose tensors are checked too. Raises ValueError, without
    a change, for any other."""
    facts = decode(state)
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
    differences += [
        f"{name} (found {value!r}, expected none)"
        for name, value in facts["settings"].items()
        if name not in expected["settings"]
    ]
    if differences:
        raise ValueError(f"state: it was saved by an allocator with other settings: {', '.join(differences)}")
    _check_layers(facts, expected)
    keep = allocator.masks.keep
    _check_tensor(state, "keep", keep.shape, keep.dtype)
    _check_tensor(state, "losses", None, None)
    if facts["decision"] is not None:
        _check_tensor(state, "decision.scores", keep.shape, None)
        shares = len(allocator.statistics.shares.shares)
        _check_tensor(state, "decision.thresholds", torch.Size([shares]), None)
    if not facts["released"]:
        _check_strategy(allocator, _strategy_tensors(state))
    return facts


def unpack_state(allocator: BudgetAllocator, state: Mapping[str, Tensor]) -> None:
    """Write a state into the allocator and the layers' rank plans. Raises ValueError, before any change, where it
    belongs to another allocator."""
    facts = check_state(allocator, state)
    allocator.masks.check_writable()
    strategy, bus = allocator.strategy, allocator.statistics
    if not facts["released"]:
        if allocator.released:
            strategy.begin(bus)
        strategy.load(_strategy_tensors(state), bus)
    elif not allocator.released:
        strategy.release()
    decision = None
    if facts["decision"] is not None:
        scores, thresholds = state["decision.scores"].clone(), state["decision.thresholds"].clone()
        decision = Decision(facts["decision"]["step"], facts["decision"]["budget"], scores, thresholds)
    allocator.take_over(facts, state["keep"], decision, state["losses"])


def _strategy_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_STRATEGY): part for name, part in state.items() if name.startswith(_STRATEGY)}


def _identity(allocator: BudgetAllocator) -> dict[str, Any]:
    """What must be the same in the allocator that a state is loaded into, as JSON gives it back."""
    settings = {**asdict(allocator.settings), **allocator.strategy.facts()}
    if allocator.settings.budget is None:
        del settings["budget"]
    else:
        # The order of the groups says which of them has a layer that matches two.
        settings["budget"]["groups"] = list(settings["budget"]["groups"].items())
    shares = allocator.statistics.shares
    if shares.unit != "ranks":
        settings["costs"] = dict(zip(allocator.statistics.names, shares.costs, strict=True))
    identity = {
        "format": _FORMAT,
        "strategy": allocator.strategy.name,
        "settings": settings,
        "ranks": allocator.masks.ranks,
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def _check_layers(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if found["ranks"] != expected["ranks"]:
        different = sorted(set(found["ranks"].items()) ^ set(expected["ranks"].items()))
        shown = ", ".join(map(str, different[:6]))
        raise ValueError(f"state: it was saved for other layers; (layer, rank) on one side only: {shown}")
    if list(found["ranks"]) != list(expected["ranks"]):
        pairs = zip(found["ranks"], expected["ranks"], strict=True)
        place, (one, other) = next((place, pair) for place, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(
            f"state: it was saved for the same layers in another order: found {one!r} as layer {place}, "
            f"expected {other!r}"
        )


def _check_strategy(allocator: BudgetAllocator, found: Mapping[str, Tensor]) -> None:
    strategy = allocator.strategy
    if allocator.released:
        strategy.begin(allocator.statistics)
    try:
        expected = strategy.tensors()
        for name, tensor in expected.items():
            _check_tensor(found, name, tensor.shape, tensor.dtype, _STRATEGY)
        unknown = sorted(found.keys() - expected.keys())
        if unknown:
            raise ValueError(f"state[{_STRATEGY + unknown[0]!r}]: found a tensor that the strategy does not know")
    finally:
        if allocator.released:
            strategy.release()


def _check_tensor(
    found: Mapping[str, Tensor], name: str, shape: torch.Size | None, dtype: torch.dtype | None, prefix: str = ""
) -> None:
    own = found.get(name)
    right = isinstance(own, Tensor) and shape in (None, own.shape) and dtype in (None, own.dtype)
    if not right:
        described = f"{tuple(own.shape)} {own.dtype}" if isinstance(own, Tensor) else "nothing"
        wanted = "a tensor" if shape is None else f"{tuple(shape)} {'' if dtype is None else dtype}".rstrip()
        raise ValueError(f"state[{prefix + name!r}]: found {described}, expected {wanted}")
