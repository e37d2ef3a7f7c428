"""One line that moves a model with HF peft's adapters onto our kernels, the way back, and what was served."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peftkernels.dispatch import IMPLEMENTATIONS
from peftkernels.integrations.peft.served import ATTRIBUTE, NotServedError, Service
from peftkernels.integrations.peft.sharing import SharedInput
from peftkernels.integrations.peft.steps import count_steps
from peftkernels.integrations.peft.table import columns


@dataclass(frozen=True)
class Row:
    """One adapted module: its path, peft's class, whether its calls will be served, and why not."""

    module: str
    kind: str
    served: bool
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What `apply_to_peft` did, module by module; prints as a table."""

    rows: tuple[Row, ...]

    @property
    def served(self) -> int:
        """Modules that will be served."""
        return sum(row.served for row in self.rows)

    def __str__(self) -> str:
        cells = [(row.module, row.kind, "yes" if row.served else "no", row.reason) for row in self.rows]
        table = columns(("module", "layer", "served", "reason"), cells)
        return f"{table}\n{self.served} of {len(self.rows)} adapted modules are served by peftkernels"


@dataclass(frozen=True)
class Stats:
    """Calls of adapters since `apply_to_peft`, or since the counts were reset.

    served      ran on our kernels
    fell_back   ran peft's own code
    reasons     how many of these for which reason
    shared      served calls whose x·Aᵀ was made together with that of others which read the same input
    modules     (served, fell back) by module path
    allocation  (served, fell back, reasons) of AdaLoRA's own work: updates of scores, masks, orthogonality terms; None
                without an AdaLoRA model
    """

    served: int
    fell_back: int
    reasons: dict[str, int]
    modules: dict[str, tuple[int, int]] = field(repr=False)
    allocation: tuple[int, int, dict[str, int]] | None = None
    shared: int = 0

    def __str__(self) -> str:
        lines = _share("adapter calls", self.served, self.fell_back, self.reasons)
        if self.shared:
            lines.append(f"  {self.shared} of them with an x A^T made for several at once")
        if self.allocation is not None:
            lines += _share("calls of AdaLoRA's allocation", *self.allocation)
        return "\n".join(lines)


def _share(what: str, served: int, fell_back: int, reasons: dict[str, int]) -> list[str]:
    calls = served + fell_back
    share = f" ({100 * served / calls:.0f} %)" if calls else ""
    return [
        f"{served} of {calls} {what} served{share}",
        *(f"  {count} x {reason}" for reason, count in sorted(reasons.items())),
    ]


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
    from peftkernels.integrations.peft.classes import ADALORA, CLASSES

    wanted = {kind: adalora if kind in ADALORA else lora for kind in CLASSES}
    own = {ours: theirs for theirs, ours in CLASSES.items()}
    rows = []
    found: list[tuple[str, nn.Module]] = []
    for name, module in _adapted(model):
        kind = own.get(type(module), type(module))
        reason = _reason(module, kind, wanted)
        rows.append(Row(name, f"{kind.__module__.split('.')[-2]}.{kind.__name__}", reason is None, reason or ""))
        if reason is None:
            found.append((name, module))
    if not rows:
        raise ValueError("model: found no adapter layer of HF peft, expected LoRA or AdaLoRA layers")
    report = Report(tuple(rows))
    if strict and report.served < len(rows):
        raise NotServedError(f"strict=True, and not every adapted module can be served; nothing was changed\n{report}")
    # An earlier call may have patched more.
    _revert_layers(model)
    # Children of one module may read the same input.
    families = {name.rpartition(".")[0]: SharedInput() for name, _ in found}
    count_steps()
    for name, module in found:
        module.__class__ = CLASSES[type(module)]
        module.__dict__[ATTRIBUTE] = Service(impl, strict, input=families[name.rpartition(".")[0]])
    return report


def revert(model: nn.Module) -> None:
    """Make ``model`` what it was before `apply_to_peft`; one that never was patched stays as it is."""
    _check_model(model)
    _revert_layers(model)
    _revert_allocation(model)


def stats(model: nn.Module, *, reset: bool = False) -> Stats:
    """How many calls of adapters were served, and why the others were not.

    Args:
        reset: count from zero again afterwards.

    Raises:
        ValueError: no module of the model is patched.
    """
    _check_model(model)
    modules: dict[str, tuple[int, int]] = {}
    reasons: dict[str, int] = {}
    shared = 0
    for name, module, _ in _patched(model):
        service: Service = module.__dict__[ATTRIBUTE]
        shared += service.shared
        modules[name] = (service.served, service.fell_back)
        for reason, count in service.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
        if reset:
            service.reset()
    if not modules:
        raise ValueError("model: found no patched module, expected one that apply_to_peft was called with")
    served, fell_back = (sum(counts[i] for counts in modules.values()) for i in (0, 1))
    return Stats(served, fell_back, reasons, modules, _allocation_stats(model, reset), shared)


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
    for _, module, theirs in _patched(model):
        module.__class__ = theirs
        del module.__dict__[ATTRIBUTE]


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


def _patched(model: nn.Module) -> Iterator[tuple[str, nn.Module, type]]:
    for name, module in model.named_modules():
        if ATTRIBUTE in module.__dict__ and isinstance(module.__dict__[ATTRIBUTE], Service):
            yield name, module, type(module).__mro__[2]


def _reason(module: Any, kind: type, wanted: dict[type, bool]) -> str | None:
    from peftkernels.integrations.peft.classes import CLASSES

    if kind not in wanted:
        return f"{kind.__name__} layers are not served"
    if not wanted[kind]:
        return "not asked for"
    reason: str | None = CLASSES[kind]._base_reason(module)
    return reason
