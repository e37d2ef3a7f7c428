"""HF peft's LoRA and AdaLoRA layers with their forward pass on `lora_linear`; everything else is peft's.

An instance of peft's layer becomes one of ours by its class alone, and peft's again by the same: parameters, names in
state_dict, merging, copies and files stay as they are. Imported only where peft is installed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from peftkernels.backends.registry import sharing_disadvantage
from peftkernels.functional.frozen_weights import weights_changed
from peftkernels.integrations.peft.bypass import PLAIN, bypass_reason
from peftkernels.integrations.peft.dora import dora_linear
from peftkernels.integrations.peft.operands import (
    adapted_linear,
    argument_reason,
    weight_and_bias,
)
from peftkernels.integrations.peft.served import ATTRIBUTE, Service
from peftkernels.integrations.peft.sharing import can_share
from peftkernels.ops.call import Adapter, Shrink

_BASES = (nn.Linear, Conv1D)
_FACTORS = (nn.Linear,)
_DROPOUTS = (nn.Identity, nn.Dropout)
_MAGNITUDES = (DoraLinearLayer,)


class Served:
    """The part that all served layers share: the check that a call can be served, and the frozen product's operands."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y (..., N) of x (..., K), as peft's forward, on `lora_linear` where that can serve."""
        module: Any = self
        if not isinstance(self, Served):
            # The method was kept beyond `revert`, as accelerate's hooks keep it.
            own: Tensor = type(module).forward(module, x, *args, **kwargs)
            return own
        service: Service = vars(module)[ATTRIBUTE]
        present = module._modules["lora_A"]
        names = [name for name in module.active_adapters if name in present]
        if module.disable_adapters or module.merged or not names:
            # The base layer alone: nothing of an adapter is computed.
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        found = served_or_reason(type(module), module, x, names, args, kwargs, service)
        if isinstance(found, str):
            service.fall_back(type(module).__name__, found)
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return found

    def set_adapter(self, adapter_names: Any, *args: Any, **kwargs: Any) -> None:
        """As peft's; layers that came with a new adapter are patched too."""
        super().set_adapter(adapter_names, *args, **kwargs)  # type: ignore[misc]
        shared = vars(self)[ATTRIBUTE].model
        if shared is not None:
            shared.activated(adapter_names)

    def delete_adapter(self, adapter_name: str) -> None:
        """As peft's."""
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        shared = vars(self)[ATTRIBUTE].model
        if shared is not None:
            shared.deleted(adapter_name)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As peft's, which writes the base weight through `.data`: no version counter tells of it."""
        super().merge(*args, **kwargs)  # type: ignore[misc]
        weights_changed(cast(Linear, self).base_layer)

    def unmerge(self) -> None:
        """As peft's, see `merge`."""
        super().unmerge()  # type: ignore[misc]
        weights_changed(cast(Linear, self).base_layer)

    def _prepare(self, service: Service) -> None:
        """Change what else has to be changed while the module is patched, and note in `service.undo` what it was."""

    # What follows is called with peft's own modules too (`stateless`): through a class, never through `self`.

    def _moment_reason(self) -> str | None:
        """Why no call can be served here and now, None where it can."""
        return None

    def _base_reason(self) -> str | None:
        """Why the product with the base layer cannot be served, None where it can."""
        return base_reason(self)

    def _adapter_reason(self, name: str) -> str | None:
        raise NotImplementedError

    def _adapter(self, name: str) -> Adapter:
        """The adapter that the operator is called with."""
        raise NotImplementedError

    def _serve(self, x: Tensor, name: str, adapter: Adapter, service: Service) -> Tensor:
        raise NotImplementedError

    def _argument_reason(self, x: Tensor, adapter: Adapter) -> str | None:
        """What the operator says of the arguments of a call, None where it takes them."""
        return argument_reason(x, *weight_and_bias(self), adapter)

    def _get_name(self) -> str:
        # Models print as they did.
        return theirs(type(self)).__name__


class PeftKernelsLinear(Served, Linear):
    """peft's `lora.Linear`, plain or DoRA: y = x·Wᵀ + b + s·drop(x)·Aᵀ·Bᵀ with peft's s, rsLoRA's included."""

    def _adapter_reason(self, name: str) -> str | None:
        # `_modules`, as nn.Module's way to an attribute of a module takes half a microsecond.
        parts: Any = self._modules
        variant = self.lora_variant.get(name)
        if variant is not None:
            if type(variant) is not DoraLinearVariant:
                return f"the variant {type(variant).__name__}"
            reason = _magnitude_reason(parts["lora_magnitude_vector"]._modules[name])
            if reason is not None:
                return reason
        down, up = parts["lora_A"]._modules[name], parts["lora_B"]._modules[name]
        for module in (down, up):
            reason = bypass_reason(module, "a factor", _FACTORS)
            if reason is not None:
                return reason
            if type(module._parameters.get("weight")) not in PLAIN:
                return f"a factor is a {type(module.weight).__name__}"
        if variant is not None and up._parameters["bias"] is not None:
            return "DoRA with lora_bias"
        return dropout_reason(parts["lora_dropout"]._modules[name])

    def _adapter(self, name: str) -> Adapter:
        parts: Any = self._modules
        # DoRA drops in training alone, whatever mode the dropout module is in.
        drops = self.training or name not in self.lora_variant
        return Adapter(
            parts["lora_A"]._modules[name]._parameters["weight"],
            parts["lora_B"]._modules[name]._parameters["weight"],
            scaling=self.scaling[name],
            dropout_p=dropout_of(parts["lora_dropout"]._modules[name]) if drops else 0.0,
        )

    def _serve(self, x: Tensor, name: str, adapter: Adapter, service: Service) -> Tensor:
        shrink = _shared_shrink(self, x, adapter, service)
        if name in self.lora_variant:
            return dora_linear(self, x, adapter, name, shrink, service)
        weight, bias = weight_and_bias(self)
        return with_lora_bias(self, adapted_linear(x, weight, bias, adapter, shrink, service.impl), name)


class PeftKernelsSVDLinear(Served, SVDLinear):
    """peft's AdaLoRA layer: y = x·Wᵀ + b + σ/(ranknum + 1e-5) · ((drop(x)·Aᵀ) ⊙ E)·Bᵀ.

    ranknum is a constant here as in the paper. peft 0.21 makes it trainable on bases that are not float32, without
    meaning to: it gets no gradient from this layer.
    """

    def _adapter_reason(self, name: str) -> str | None:
        for kind in ("lora_A", "lora_B", "lora_E"):
            factor = svd_factor(self, kind, name)
            if type(factor) not in PLAIN:
                return f"a factor is a {type(factor).__name__}"
        parts: Any = self._modules
        return dropout_reason(parts["lora_dropout"]._modules[name])

    def _adapter(self, name: str) -> Adapter:
        parts: Any = self._modules
        return Adapter(
            svd_factor(self, "lora_A", name),
            svd_factor(self, "lora_B", name),
            svd_factor(self, "lora_E", name),
            scaling=adalora_scale(self, name),
            dropout_p=dropout_of(parts["lora_dropout"]._modules[name]),
        )

    def _serve(self, x: Tensor, name: str, adapter: Adapter, service: Service) -> Tensor:
        shrink = _shared_shrink(self, x, adapter, service)
        weight, bias = weight_and_bias(self)
        return adapted_linear(x, weight, bias, adapter, shrink, service.impl)


def theirs(kind: Any) -> Any:
    """peft's class of layer for one of ours, any other for itself."""
    return kind.__mro__[kind.__mro__.index(Served) + 1] if issubclass(kind, Served) else kind


def served_or_reason(
    kind: Any, module: Any, x: Tensor, names: list[str], args: Any, kwargs: Any, service: Service
) -> Tensor | str:
    """y of a call with the active adapters ``names``, or why it cannot be served; then nothing was computed.

    ``kind`` is one of ours, whose methods are used; the module's class may be peft's.
    """
    reason = call_reason(kind, module, x, names, args, kwargs)
    if reason is not None:
        return reason
    adapter = kind._adapter(module, names[0])
    # Counted before it is made: a checkpointed forward pass is broken off inside its last call.
    service.serve()
    try:
        served: Tensor = kind._serve(module, x, names[0], adapter, service)
    except (TypeError, ValueError):
        # Only now: a call that the operator takes does not pay for a second look at its arguments.
        reason = kind._argument_reason(module, x, adapter)
        # With a factor that is not there yet peft's code would compute from memory that was never written.
        if reason is None or _without_memory(module, x, adapter):
            raise
        service.take_back()
        return reason
    return served


def with_lora_bias(module: Any, y: Tensor, name: str) -> Tensor:
    """y with the bias that peft's ``lora_bias`` gives the factor B."""
    bias = module._modules["lora_B"]._modules[name]._parameters["bias"]
    return y if bias is None else y + (bias * module.scaling[name]).to(y.dtype)


def _without_memory(module: Any, x: Tensor, adapter: Adapter) -> bool:
    """Return True if x is there and an operand lies on the meta device."""
    operands = (*module._modules["base_layer"]._parameters.values(), *adapter)
    return not x.is_meta and any(isinstance(value, Tensor) and value.is_meta for value in operands)


def _shared_shrink(module: Any, x: Tensor, adapter: Adapter, service: Service) -> Tensor | None:
    """S (M, r) where it was made for several projections of x at once. Each has a dropout mask of its own."""
    if service.input is None or adapter.dropout_p > 0 or not can_share():
        return None
    if sharing_disadvantage(service.impl, Shrink(x, (adapter.lora_A,))) is not None:
        return None
    shrink = service.input.shrink(module, x, adapter.lora_A, service.impl, _factor_without_dropout)
    service.shared += shrink is not None
    return shrink


def _factor_without_dropout(module: Any, x: Tensor) -> Tensor | None:
    """A of a module that is patched, if its call with x would be served and drop nothing, else None."""
    service: Service | None = vars(module).get(ATTRIBUTE)
    if service is None or service.refusal is not None:
        # Reverted by itself since it was seen.
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or not names:
        return None
    if call_reason(type(module), module, x, names, (), {}) is not None:
        return None
    adapter: Adapter = module._adapter(names[0])
    if module._argument_reason(x, adapter) is not None or adapter.dropout_p > 0:
        return None
    return adapter.lora_A


def svd_factor(module: Any, kind: str, name: str) -> Tensor:
    """lora_A, lora_B, lora_E or ranknum of peft's AdaLoRA layer."""
    there = module._modules[kind]
    found: Tensor | None = there._parameters.get(name)
    return there[name] if found is None else found


def adalora_scale(module: Any, name: str) -> Any:
    """σ/(ranknum + 1e-5) of one adapter of peft's AdaLoRA layer, a float or a 0-dim tensor.

    It is read anew in every call: on a CPU that costs a fifth of a µs.
    """
    number = svd_factor(module, "ranknum", name)
    if torch.compiler.is_dynamo_compiling() or number.device.type != "cpu":
        # Read where the kernel runs: the host never waits for it.
        return (module.scaling[name] / (number.detach() + 1e-5)).reshape(())
    return module.scaling[name] / (float(number) + 1e-5)


def call_reason(kind: Any, module: Any, x: Tensor, names: list[str], args: Any, kwargs: Any) -> str | None:
    """Why a call with the active adapters ``names`` cannot be served, None where it can as far as can be seen without
    the operator's checks."""
    given = [name for name, value in kwargs.items() if value is not None]
    if args or given:
        return f"the call has the arguments {', '.join(given) or 'of the base layer'}"
    if len(names) > 1:
        return f"{len(names)} adapters are active at once"
    if type(x) not in PLAIN:
        return f"the input is a {type(x).__name__}"
    found: str | None = (
        moment_reason()
        or kind._moment_reason(module)
        or kind._base_reason(module)
        or kind._adapter_reason(module, names[0])
    )
    return found


def moment_reason() -> str | None:
    """Why no layer can be served here and now, None where it can."""
    # torch.compile traces our operators as they are, and answers these questions itself.
    if torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records the call"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is at work"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is at work"
    return None


def base_reason(module: Any) -> str | None:
    """Why the product with the base layer cannot be served, None where it can."""
    base = module._modules["base_layer"]
    reason = bypass_reason(base, "the base layer", _BASES)
    if reason is not None:
        return reason
    weight = base._parameters.get("weight")
    if type(weight) not in PLAIN:
        return f"the base weight is a {type(getattr(base, 'weight', None)).__name__}"
    if weight.requires_grad:
        if not weight.is_leaf:
            return "the base weight is a part of a tensor that is trained, as FSDP makes of parameters it flattens"
        return "the base weight is trained"
    if not weight.is_floating_point():
        return f"the base weight is {weight.dtype}"
    return None


def dropout_reason(dropout: nn.Module) -> str | None:
    """Why a dropout module must be called, None where what it does is known."""
    reason = bypass_reason(dropout, "the dropout", _DROPOUTS)
    if reason is None and type(dropout) is nn.Dropout and dropout.inplace:
        return "the dropout works in place"
    return reason


def dropout_of(dropout: nn.Module) -> float:
    """The probability with which a module drops now."""
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def _magnitude_reason(magnitude: nn.Module) -> str | None:
    reason = bypass_reason(magnitude, "the magnitude", _MAGNITUDES)
    if reason is None and type(magnitude._parameters.get("weight")) not in PLAIN:
        return f"the magnitude is a {type(magnitude.weight).__name__}"
    return reason
