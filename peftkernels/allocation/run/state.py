"""An allocator's state as tensors by name, the form that safetensors writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from peftkernels._module_names import names_without_wrappers
from peftkernels._reading import check_flag, check_not_below_zero, check_object, check_whole, shown
from peftkernels.allocation.run.decision import Decision
from peftkernels.allocation.run.json_tensor import METADATA, decode, encode
from peftkernels.allocation.run.parts import RunParts
from peftkernels.allocation.run.state_checks import check_floats, check_settings, check_tensor, fact, part

_FORMAT = 2
_STRATEGY = "strategy."


def pack_state(parts: RunParts) -> dict[str, Tensor]:
    """Copies of all tensors, contiguous and without shared memory, with everything else as JSON under "metadata"."""
    progress = parts.progress
    decision = progress.decision
    facts = {
        **_identity(parts),
        "step": progress.steps,
        "nonfinite_steps": progress.nonfinite_steps,
        "undecided_steps": progress.undecided_steps,
        "informed": bool(progress.informed),
        "skipped_steps": progress.skipped_steps,
        "rollbacks": progress.rollbacks,
        "released": progress.released,
        "all_active": parts.all_active,
        "frozen": list(parts.masks.frozen),
        "decision": None if decision is None else {"step": decision.step, "budget": decision.budget},
    }
    tensors = {"keep": parts.masks.keep, "losses": parts.statistics.pending_losses}
    if decision is not None:
        tensors |= {"decision.scores": decision.scores, "decision.thresholds": decision.thresholds}
    if not parts.progress.released:
        # Afterwards the strategy is not called again, whatever it has kept.
        tensors |= {_STRATEGY + name: tensor for name, tensor in parts.strategy.tensors().items()}
    owned = {name: own.detach().clone(memory_format=torch.contiguous_format) for name, own in tensors.items()}
    return {METADATA: encode(facts), **owned}


def check_state(parts: RunParts, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Return the JSON part and the tensors of a state of this allocator, with its own names of the layers.

    Raises:
        ValueError: For a state of another allocator.
    """
    facts = decode(state)
    found = facts.get("format")
    if found != _FORMAT:
        raise ValueError(f"state: found format {shown(found)}, expected {_FORMAT} as given by state_dict()")
    expected = _identity(parts)
    for name in ("settings", "ranks"):
        check_object(facts.get(name), fact(name))
    if facts.get("strategy") != expected["strategy"]:
        raise ValueError(f"state: found the strategy {shown(facts.get('strategy'))}, expected {expected['strategy']!r}")
    facts, state = _with_own_names(facts, state, list(expected["ranks"]))
    check_settings(facts["settings"], expected["settings"], "an allocator")
    _check_layers(facts, expected)
    _check_facts(facts)
    keep = parts.masks.keep
    check_tensor(state, "keep", keep.shape, keep.dtype)
    check_floats(state, "losses", None)
    if facts["decision"] is not None:
        check_floats(state, "decision.scores", keep.shape)
        shares = len(parts.statistics.shares.shares)
        check_floats(state, "decision.thresholds", torch.Size([shares]))
    if not facts["released"]:
        _check_strategy(parts, part(state, _STRATEGY))
    return facts, state


def unpack_state(parts: RunParts, state: Mapping[str, Tensor]) -> None:
    """Write a state into the allocator and the layers' rank plans.

    Where writing fails or is interrupted, the allocator is what it was.

    Raises:
        ValueError: Before any change, for a state of another allocator.
    """
    facts, state = check_state(parts, state)
    parts.masks.check_writable()
    before = pack_state(parts)
    gates = [gate.detach().clone() for gate in parts.masks.gates()]
    try:
        _write(parts, facts, state)
    except BaseException:
        _write(parts, decode(before), before)
        with torch.no_grad():
            torch._foreach_copy_(parts.masks.gates(), gates)
        raise


def _write(parts: RunParts, facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    strategy, statistics = parts.strategy, parts.statistics
    if not facts["released"]:
        if parts.progress.released:
            strategy.begin(statistics)
        strategy.load(part(state, _STRATEGY), statistics)
    elif not parts.progress.released:
        strategy.release()
    decision = None
    if facts["decision"] is not None:
        scores, thresholds = state["decision.scores"].clone(), state["decision.thresholds"].clone()
        decision = Decision(facts["decision"]["step"], facts["decision"]["budget"], scores, thresholds)
    parts.restore(facts, state["keep"], decision, state["losses"])


def _check_facts(facts: Mapping[str, Any]) -> None:
    """What a state says of the run: counts, flags, frozen layers and the last decision."""
    # States of earlier versions lack these two.
    facts = {"undecided_steps": 0, "informed": True, **facts}
    for name in ("step", "nonfinite_steps", "undecided_steps", "skipped_steps", "rollbacks"):
        check_whole(facts.get(name), fact(name))
    for name in ("released", "all_active", "informed"):
        check_flag(facts.get(name), fact(name))
    frozen = facts.get("frozen")
    if not isinstance(frozen, list) or not all(isinstance(name, str) and name in facts["ranks"] for name in frozen):
        raise ValueError(f"{fact('frozen')}: found {shown(frozen)}, expected names of the layers")
    if "decision" not in facts:
        raise ValueError(f"{fact('decision')}: found nothing, expected the last decision or null")
    if facts["decision"] is not None:
        decision = check_object(facts["decision"], fact("decision"))
        check_whole(decision.get("step"), fact("decision.step"), most=facts["step"])
        check_not_below_zero(decision.get("budget"), fact("decision.budget"))


def _with_own_names(
    facts: dict[str, Any], state: Mapping[str, Tensor], own: Sequence[str]
) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """A state with the allocator's own names, where the saved ones differ by what the model was wrapped in alone."""
    saved = list(facts["ranks"])
    if saved == list(own) or names_without_wrappers(saved) != names_without_wrappers(own):
        return facts, state
    names = dict(zip(saved, own, strict=True))
    facts = {**facts, "ranks": {names[name]: rank for name, rank in facts["ranks"].items()}}
    if isinstance(facts["settings"].get("costs"), dict):
        costs = {names.get(name, name): cost for name, cost in facts["settings"]["costs"].items()}
        facts["settings"] = {**facts["settings"], "costs": costs}
    if isinstance(facts.get("frozen"), list):
        facts["frozen"] = [names.get(name, name) if isinstance(name, str) else name for name in facts["frozen"]]
    return facts, {_renamed(name, names): tensor for name, tensor in state.items()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """A strategy's name of a tensor, with the layer's name in it replaced."""
    parts = name.split(".")
    for begin in range(len(parts)):
        for end in range(len(parts), begin, -1):
            found = names.get(".".join(parts[begin:end]))
            if found is not None:
                return ".".join([*parts[:begin], found, *parts[end:]])
    return name


def _identity(parts: RunParts) -> dict[str, Any]:
    """What must be the same in the allocator that a state is loaded into, as JSON gives it back."""
    settings = {**asdict(parts.settings), **parts.strategy.facts()}
    if parts.settings.budget is None:
        del settings["budget"]
    else:
        # The order of the groups says which of them has a layer that matches two.
        settings["budget"]["groups"] = list(settings["budget"]["groups"].items())
    shares = parts.statistics.shares
    if shares.unit != "ranks":
        settings["costs"] = dict(zip(parts.statistics.names, shares.costs, strict=True))
    identity = {
        "format": _FORMAT,
        "strategy": parts.strategy.name,
        "settings": settings,
        "ranks": parts.masks.ranks,
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


def _check_strategy(parts: RunParts, found: Mapping[str, Tensor]) -> None:
    strategy = parts.strategy
    if parts.progress.released:
        strategy.begin(parts.statistics)
    try:
        expected = strategy.tensors()
        for name, tensor in expected.items():
            check_tensor(found, name, tensor.shape, tensor.dtype, _STRATEGY)
        unknown = sorted(found.keys() - expected.keys())
        if unknown:
            raise ValueError(f"state[{_STRATEGY + unknown[0]!r}]: found a tensor that the strategy does not know")
    finally:
        if parts.progress.released:
            strategy.release()
