"""One line that moves a model with HF peft's adapters onto our kernels, the way back, and what was served."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from peftkernels.backends.registry import IMPLEMENTATIONS
from peftkernels.integrations.peft.norms import KeptNorms
from peftkernels.integrations.peft.patched_model import PatchedModel
from peftkernels.integrations.peft.report import Report, Row, Stats
from peftkernels.integrations.peft.served import ATTRIBUTE, NotServedError, Service
from peftkernels.integrations.peft.sharing import SharedInput
from peftkernels.integrations.peft.steps import count_steps


def apply_to_peft(
    model: nn.Module, lora: bool = True, adalora: bool = True, impl: str = "auto", strict: bool = False
) -> Report:
    """Let the LoRA and AdaLoRA layers of HF peft in ``model`` compute on `lora_linear`, in place.

    Every layer stays what it is to everybody else: its parameters, its names in state_dict, merging, saving, copying.
    A call that cannot be served (several active adapters, adapter_names, variants other than DoRA, a hooked or trained
    base layer) runs peft's own code, and `stats` says so. What AdaLoRA's model does after a step (scores, masks) and
    its orthogonality term run on the fused allocator, with peft's results.

    Args:
        model: a `PeftModel`, or any model with adapters injected.
        lora, adalora: which kinds of layers.
        impl: the implementation of `lora_linear`.
        strict: raise instead of running peft's own code, here and in every call.

    Returns:
        What was done, module by module. Calling it again with other arguments replaces the first.

    Raises:
        ImportError: peft is not installed.
        RuntimeError: the installed peft is one that this version was not made for, and computes otherwise.
        TypeError, ValueError: an argument cannot be used.
        NotServedError: under ``strict``, some module cannot be served; nothing was changed.
    """
    from peftkernels.integrations.peft.versions import check_version

    _check_model(model)
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: found {impl!r}, expected 'auto' or one of {', '.join(IMPLEMENTATIONS)}")
    check_version()
    report = swap_layers(model, lora, adalora, impl, strict)
    _revert_allocation(model)
    if adalora:
        _swap_allocation(model)
    return report


def swap_layers(model: nn.Module, lora: bool, adalora: bool, impl: str, strict: bool) -> Report:
    """`apply_to_peft` for the layers alone, whatever the release of peft."""
    found = list(_adapted(model))
    if not found:
        raise ValueError("model: found no adapter layer of HF peft, expected LoRA or AdaLoRA layers")
    patched = PatchedModel(model, lora, adalora, impl, strict)
    rows = tuple(_row(name, module, patched) for name, module in found)
    report = Report(rows)
    if strict and report.served < len(rows):
        raise NotServedError(f"strict=True, and not every adapted module can be served; nothing was changed\n{report}")
    # An earlier call may have patched more.
    _revert_layers(model)
    count_steps()
    _patch(found, rows, patched)
    return report


def patch_new_layers(model: nn.Module, patched: PatchedModel, adapters: Collection[str]) -> None:
    """Patch what peft has put one of these adapters on since, as the rest of the model was.

    Raises:
        NotServedError: under ``strict``, one of the modules cannot be served; nothing was changed.
    """
    found = [(n, m) for n, m in _adapted(model) if ATTRIBUTE not in vars(m) and _holds(m, adapters)]
    rows = tuple(_row(name, module, patched) for name, module in found)
    refused = tuple(row for row in rows if not row.served)
    if patched.strict and refused:
        raise NotServedError(
            f"strict=True, and not every module that {' and '.join(sorted(adapters))} adapts can be served; nothing "
            f"was patched\n{Report(refused)}"
        )
    _patch(found, rows, patched)


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
        reason = _own_forward_reason(module, ours.forward) or ours._base_reason(module) or ""
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


def revert(model: nn.Module) -> None:
    """Make ``model`` what it was before `apply_to_peft`; one that never was patched stays as it is."""
    _check_model(model)
    _revert_layers(model)
    _revert_allocation(model)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Vouch that no weight and no factor of ``model`` is written inside the block: DoRA's norms are made once in it.

        with peftkernels.integrations.peft.frozen(model), torch.no_grad():
            model.generate(...)

    Outside they are made anew in every call. Adapters may be switched, added, deleted and rescaled inside; calls that
    record gradients make norms anew here too. A weight that is written all the same, as through `.data`, may go unseen
    until the block ends.

    Raises:
        ValueError: `apply_to_peft` was not called with the model.
    """
    _check_model(model)
    found = _services(model)
    before = [service.norms for service in found]
    for service in found:
        service.norms = KeptNorms()
    try:
        yield
    finally:
        for service, norms in zip(found, before, strict=True):
            service.norms = norms


def stats(model: nn.Module, *, reset: bool = False) -> Stats:
    """How many calls of adapters were served, and why the others were not.

    Args:
        reset: count from zero again afterwards.

    Raises:
        ValueError: `apply_to_peft` was not called with the model.
    """
    _check_model(model)
    modules: dict[str, tuple[int, int]] = {}
    unserved: dict[str, str] = {}
    reasons: dict[str, int] = {}
    shared = 0
    _services(model)
    for name, module in _adapted(model):
        service = _service(module)
        reason = _unserved_reason(module, service)
        if reason is not None:
            unserved[name] = reason
        if service is None or service.refusal is not None:
            continue
        shared += service.shared
        modules[name] = (service.served, service.fell_back)
        for reason, count in service.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
        if reset:
            service.reset()
    served, fell_back = (sum(counts[i] for counts in modules.values()) for i in (0, 1))
    return Stats(served, fell_back, reasons, modules, _allocation_stats(model, reset), shared, unserved)


def _unserved_reason(module: nn.Module, service: Service | None) -> str | None:
    """Why calls of an adapted module run peft's own code and are not counted, None where they are counted."""
    if service is None:
        return "added after apply_to_peft, and not patched"
    if service.refusal is not None or service.served + service.fell_back > 0:
        return service.refusal
    return _own_forward_reason(module, type(module).forward)


def _allocation_stats(model: nn.Module, reset: bool) -> tuple[int, int, dict[str, int]] | None:
    from peftkernels.integrations.peft.allocator import ATTRIBUTE as RECORD

    records = [vars(found)[RECORD] for found in _allocators(model) if RECORD in vars(found)]
    if not records:
        return None
    reasons: dict[str, int] = {}
    for record in records:
        for reason, count in record.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    counts = sum(record.served for record in records), sum(record.fell_back for record in records)
    if reset:
        for record in records:
            record.reset()
    return *counts, reasons


def _allocators(model: nn.Module) -> Iterator[Any]:
    """peft's AdaLoRA models in ``model``: what a `PeftModel` has as its base_model."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.adalora.model import AdaLoraModel

    for module in model.modules():
        if isinstance(module, AdaLoraModel):
            yield module


def _swap_allocation(model: nn.Module) -> None:
    from peft.tuners.adalora.model import AdaLoraModel

    from peftkernels.integrations.peft.allocator import apply_to_adalora_model

    for found in _allocators(model):
        # A subclass of somebody else's may do something else.
        if type(found) is AdaLoraModel:
            apply_to_adalora_model(found)


def _revert_layers(model: nn.Module) -> None:
    for module in model.modules():
        service = _service(module)
        if service is None:
            continue
        if service.refusal is None:
            from peftkernels.integrations.peft.layers import theirs

            module.__class__ = theirs(type(module))
            for name, value in service.undo.items():
                setattr(module.base_layer, name, value)
        del vars(module)[ATTRIBUTE]


def _services(model: nn.Module) -> list[Service]:
    """Of all modules that `apply_to_peft` has looked at, patched or not; ValueError where there are none."""
    found = [service for module in model.modules() if (service := _service(module)) is not None]
    if not found:
        raise ValueError("model: found no module that apply_to_peft was called with, expected one")
    return found


def _service(module: nn.Module) -> Service | None:
    found = vars(module).get(ATTRIBUTE)
    return found if isinstance(found, Service) else None


def _revert_allocation(model: nn.Module) -> None:
    for found in _allocators(model):
        from peftkernels.integrations.peft import allocator

        if type(found) is allocator.PeftKernelsAdaLoraModel:
            allocator.revert_adalora_model(found)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, expected a torch.nn.Module")


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules that peft has put adapters on, whatever their kind."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _own_forward_reason(module: nn.Module, ours: Any) -> str | None:
    """Why calls of an adapted layer do not come to the function ``ours`` of its class, None where they do."""
    own = vars(module)
    found = own.get("forward")
    if found is None:
        return None
    if "_hf_hook" in own:
        # accelerate's hook calls what it found when it was put on.
        found = own.get("_old_forward", found)
    return None if getattr(found, "__func__", None) is ours else "the layer has a forward of its own"
