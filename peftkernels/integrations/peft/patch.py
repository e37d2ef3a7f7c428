"""One line that moves a model with HF peft's adapters onto our kernels, the way back, and what was served."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from peftkernels.backends.registry import check_name
from peftkernels.integrations.peft.norms import KeptNorms
from peftkernels.integrations.peft.report import Report, Stats
from peftkernels.integrations.peft.served import Service
from peftkernels.integrations.peft.swap import (
    adapted,
    own_forward_reason,
    revert_layers,
    service_of,
    services,
    swap_layers,
)
from peftkernels.integrations.peft.versions import check_version


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
        lora: True to serve LoRA layers.
        adalora: True to serve AdaLoRA layers.
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
    _check_model(model)
    check_name(impl)
    check_version()
    report = swap_layers(model, lora, adalora, impl, strict)
    _revert_allocation(model)
    if adalora:
        _swap_allocation(model)
    return report


def revert(model: nn.Module) -> None:
    """Make ``model`` what it was before `apply_to_peft`; one that never was patched stays as it is."""
    _check_model(model)
    revert_layers(model)
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
    found = services(model)
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
        model: the model.
        reset: count from zero again afterwards.

    Returns:
        The counts since `apply_to_peft`, or since the last reset.

    Raises:
        ValueError: `apply_to_peft` was not called with the model.
    """
    _check_model(model)
    modules: dict[str, tuple[int, int]] = {}
    unserved: dict[str, str] = {}
    reasons: dict[str, int] = {}
    shared = 0
    services(model)
    for name, module in adapted(model):
        service = service_of(module)
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
    return own_forward_reason(module, type(module).forward)


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
        # A subclass may do something else.
        if type(found) is AdaLoraModel:
            apply_to_adalora_model(found)


def _revert_allocation(model: nn.Module) -> None:
    for found in _allocators(model):
        from peftkernels.integrations.peft import allocator

        if type(found) is allocator.PeftKernelsAdaLoraModel:
            allocator.revert_adalora_model(found)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, expected a torch.nn.Module")
