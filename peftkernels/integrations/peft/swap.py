"""Exchanging the classes of HF peft's layers for ours, in place, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from peftkernels.integrations.peft.patched_model import PatchedModel
from peftkernels.integrations.peft.report import Report, Row
from peftkernels.integrations.peft.served import ATTRIBUTE, NotServedError, Service
from peftkernels.integrations.peft.sharing import SharedInput
from peftkernels.integrations.peft.steps import count_steps


def swap_layers(model: nn.Module, lora: bool, adalora: bool, impl: str, strict: bool) -> Report:
    """`apply_to_peft` for the layers alone, whatever the release of peft."""
    found = list(adapted(model))
    if not found:
        raise ValueError("model: found no adapter layer of HF peft, expected LoRA or AdaLoRA layers")
    patched = PatchedModel(model, lora, adalora, impl, strict, patch_new_layers)
    rows = tuple(_row(name, module, patched) for name, module in found)
    report = Report(rows)
    if strict and report.served < len(rows):
        raise NotServedError(f"strict=True, and not every adapted module can be served; nothing was changed\n{report}")
    # An earlier call may have patched more.
    revert_layers(model)
    count_steps()
    _patch(found, rows, patched)
    return report


def patch_new_layers(model: nn.Module, patched: PatchedModel, adapters: Collection[str]) -> None:
    """Patch what peft has put one of these adapters on since, as the rest of the model was.

    Raises:
        NotServedError: under ``strict``, one of the modules cannot be served; nothing was changed.
    """
    found = [(n, m) for n, m in adapted(model) if ATTRIBUTE not in vars(m) and _holds(m, adapters)]
    rows = tuple(_row(name, module, patched) for name, module in found)
    refused = tuple(row for row in rows if not row.served)
    if patched.strict and refused:
        raise NotServedError(
            f"strict=True, and not every module that {' and '.join(sorted(adapters))} adapts can be served; nothing "
            f"was patched\n{Report(refused)}"
        )
    _patch(found, rows, patched)


def revert_layers(model: nn.Module) -> None:
    """Give every layer peft's class back, and forget what was kept of it."""
    for module in model.modules():
        service = service_of(module)
        if service is None:
            continue
        if service.refusal is None:
            from peftkernels.integrations.peft.layers import theirs

            module.__class__ = theirs(type(module))
            for name, value in service.undo.items():
                setattr(module.base_layer, name, value)
        del vars(module)[ATTRIBUTE]


def services(model: nn.Module) -> list[Service]:
    """Of all modules that `apply_to_peft` has looked at, patched or not; ValueError where there are none."""
    found = [service for module in model.modules() if (service := service_of(module)) is not None]
    if not found:
        raise ValueError("model: found no module that apply_to_peft was called with, expected one")
    return found


def service_of(module: nn.Module) -> Service | None:
    """What is kept of a module that `swap_layers` has looked at, None for another."""
    found = vars(module).get(ATTRIBUTE)
    return found if isinstance(found, Service) else None


def adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules that peft has put adapters on, whatever their kind."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def own_forward_reason(module: nn.Module, ours: Any) -> str | None:
    """Why calls of an adapted layer do not come to the function ``ours`` of its class, None where they do."""
    own = vars(module)
    found = own.get("forward")
    if found is None:
        return None
    if "_hf_hook" in own:
        # accelerate's hook calls what it found when it was put on.
        found = own.get("_old_forward", found)
    return None if getattr(found, "__func__", None) is ours else "the layer has a forward of its own"


def _row(name: str, module: nn.Module, patched: PatchedModel) -> Row:
    from peftkernels.integrations.peft.classes import ADALORA, CLASSES
    from peftkernels.integrations.peft.layers import theirs

    kind = theirs(type(module))
    if kind not in CLASSES:
        reason = f"{kind.__name__} layers are not served"
    elif not (patched.adalora if kind in ADALORA else patched.lora):
        reason = "not asked for"
    else:
        ours = CLASSES[kind]
        reason = own_forward_reason(module, ours.forward) or ours._base_reason(module) or ""
    return Row(name, f"{kind.__module__.split('.')[-2]}.{kind.__name__}", not reason, reason)


def _patch(found: Sequence[tuple[str, nn.Module]], rows: Sequence[Row], patched: PatchedModel) -> None:
    """Exchange the classes of the modules that will be served, and note of the others that they were seen."""
    from peftkernels.integrations.peft.classes import CLASSES

    # Children of one module may read the same input.
    families: defaultdict[str, SharedInput] = defaultdict(SharedInput)
    for (name, module), row in zip(found, rows, strict=True):
        service = Service(patched.impl, patched.strict, model=patched)
        vars(module)[ATTRIBUTE] = service
        if row.served:
            service.input = families[name.rpartition(".")[0]]
            module.__class__ = CLASSES[type(module)]
            prepare: Any = module
            prepare._prepare(service)
        else:
            service.refusal = row.reason


def _holds(module: Any, adapters: Collection[str]) -> bool:
    """Return True if the module has one of these adapters."""
    there = (getattr(module, name, {}) for name in module.adapter_layer_names)
    return any(name in adapters for found in there for name in found)
