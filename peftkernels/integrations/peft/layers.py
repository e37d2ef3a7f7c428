"""HF peft's LoRA and AdaLoRA layers with their forward pass on `lora_linear`; everything else is peft's.

An instance of peft's layer becomes one of ours by its class alone, and peft's again by the same: parameters, names in
state_dict, merging, copies and files stay as they are. Imported only where peft is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkernels.dispatch import sharing_disadvantage
from peftkernels.functional import lora_linear
from peftkernels.integrations.peft.dora import dora_linear
from peftkernels.integrations.peft.served import ATTRIBUTE, Service
from peftkernels.integrations.peft.sharing import can_share

PLAIN = (Tensor, nn.Parameter)
_LOW_RANK_MODULES = (nn.Linear,)


class Served:
    """What both layers share: whether a call can be served, and what the frozen product needs."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y (..., N) of x (..., K), as peft's forward, on `lora_linear` where that can serve."""
        module: Any = self
        present = module.lora_A
        names = [name for name in module.active_adapters if name in present]
        if module.disable_adapters or module.merged or not names:
            # The base layer alone: nothing of an adapter is computed.
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        service: Service = module.__dict__[ATTRIBUTE]
        reason = self._reason(x, names, args, kwargs)
        if reason is not None:
            service.fall_back(type(module).__name__, reason)
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        service.serve()
        return self._serve(x, names[0], service)

    def train(self, mode: bool = True) -> Any:
        """As nn.Module's; what may have changed since is forgotten."""
        vars(self)[ATTRIBUTE].forget_norms()
        return super().train(mode)  # type: ignore[misc]

    def _reason(self, x: Tensor, names: list[str], args: Any, kwargs: Any) -> str | None:
        """Why a call cannot be served, None where it can."""
        return (
            call_reason(x, names, args, kwargs)
            or self._moment_reason()
            or self._base_reason()
            or self._adapter_reason(names[0])
        )

    def _moment_reason(self) -> str | None:
        """Why no call can be served here and now, None where it can."""
        return None

    def _base_reason(self) -> str | None:
        """Why the product with the base layer cannot be served, None where it can."""
        return base_reason(self)

    def _adapter_reason(self, name: str) -> str | None:
        raise NotImplementedError

    def _serve(self, x: Tensor, name: str, service: Service) -> Tensor:
        raise NotImplementedError

    def _get_name(self) -> str:
        # Models print as they did.
        return type(self).__mro__[2].__name__


class PeftKernelsLinear(Served, Linear):
    """peft's `lora.Linear`, plain or DoRA: y = x·Wᵀ + b + s·drop(x)·Aᵀ·Bᵀ with peft's s, rsLoRA's included."""

    def _adapter_reason(self, name: str) -> str | None:
        variant = self.lora_variant.get(name)
        if variant is not None and type(variant) is not DoraLinearVariant:
            return f"the variant {type(variant).__name__}"
        down, up = self.lora_A[name], self.lora_B[name]
        for module in (down, up):
            if type(module) not in _LOW_RANK_MODULES:
                return f"the factors are in a {type(module).__name__}"
            if hooked(module):
                return "a factor has hooks"
            if type(module._parameters.get("weight")) not in PLAIN:
                return f"a factor is a {type(module.weight).__name__}"
        if variant is not None and up.bias is not None:
            return "DoRA with lora_bias"
        return dropout_reason(self.lora_dropout[name])

    def _serve(self, x: Tensor, name: str, service: Service) -> Tensor:
        weight, bias = frozen(self)
        lora_A, up = self.lora_A[name].weight, self.lora_B[name]
        dropout_p = dropout_of(self.lora_dropout[name])
        shrink = _shared_shrink(self, x, weight, lora_A, dropout_p, service)
        if name in self.lora_variant:
            return dora_linear(self, x, weight, bias, name, dropout_p, shrink, service)
        y = lora_linear(
            x,
            weight,
            lora_A,
            up.weight,
            bias=bias,
            scaling=self.scaling[name],
            dropout_p=dropout_p,
            shrink=shrink,
            impl=service.impl,
        )
        return y if up.bias is None else y + (up.bias * self.scaling[name]).to(y.dtype)


class PeftKernelsSVDLinear(Served, SVDLinear):
    """peft's AdaLoRA layer: y = x·Wᵀ + b + σ/(ranknum + 1e-5) · ((drop(x)·Aᵀ) ⊙ E)·Bᵀ.

    ranknum is a constant here as in the paper, read once. peft 0.21 makes it trainable on bases that are not float32,
    without meaning to: it gets no gradient from this layer.
    """

    def _adapter_reason(self, name: str) -> str | None:
        for factor in (self.lora_A[name], self.lora_B[name], self.lora_E[name]):
            if type(factor) not in PLAIN:
                return f"a factor is a {type(factor).__name__}"
        return dropout_reason(self.lora_dropout[name])

    def _serve(self, x: Tensor, name: str, service: Service) -> Tensor:
        weight, bias = frozen(self)
        lora_A, dropout_p = self.lora_A[name], dropout_of(self.lora_dropout[name])
        return lora_linear(
            x,
            weight,
            lora_A,
            self.lora_B[name],
            bias=bias,
            gate=self.lora_E[name],
            scaling=adalora_scale(self, name, service),
            dropout_p=dropout_p,
            shrink=_shared_shrink(self, x, weight, lora_A, dropout_p, service),
            impl=service.impl,
        )


def _shared_shrink(
    module: Any, x: Tensor, weight: Tensor, lora_A: Tensor, dropout_p: float, service: Service
) -> Tensor | None:
    """S (M, r) where it was made for several projections of x at once. Each has a dropout mask of its own."""
    if service.input is None or dropout_p > 0 or not can_share():
        return None
    if sharing_disadvantage(service.impl, x, weight) is not None:
        return None
    shrink = service.input.shrink(module, x, lora_A, service.impl, _factor_without_dropout)
    service.shared += shrink is not None
    return shrink


def _factor_without_dropout(module: Any, x: Tensor) -> Tensor | None:
    """A of a module that is patched, if its call with x would be served and drop nothing, else None."""
    if ATTRIBUTE not in vars(module):
        # Reverted by itself since it was seen.
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or not names or module._reason(x, names, (), {}) is not None:
        return None
    if dropout_of(module.lora_dropout[names[0]]) > 0:
        return None
    factor = module.lora_A[names[0]]
    return factor.weight if isinstance(factor, nn.Linear) else factor


def adalora_scale(module: Any, name: str, service: Service) -> float | Tensor:
    """σ/(ranknum + 1e-5) of one adapter of peft's AdaLoRA layer."""
    number = module.ranknum[name]
    if torch.compiler.is_dynamo_compiling() or not (service.keeps or number.device.type == "cpu"):
        # Read where the kernel runs: the host never waits for it.
        return (module.scaling[name] / (number.detach() + 1e-5)).reshape(())
    if not service.keeps:
        return module.scaling[name] / (float(number) + 1e-5)
    key = (number.data_ptr(), number._version, module.scaling[name])
    kept = service.cache.get(f"scale {name}")
    if kept is None or kept[0] != key:
        kept = (key, module.scaling[name] / (float(number) + 1e-5))
        service.cache[f"scale {name}"] = kept
    return kept[1]


def frozen(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (N, K) and bias of the base layer; a Conv1D's weight is kept transposed."""
    base = module._modules["base_layer"]
    weight = base.weight
    return (weight.t() if type(base) is Conv1D else weight), base.bias


def call_reason(x: Tensor, names: list[str], args: Any, kwargs: Any) -> str | None:
    """Why a call with the active adapters ``names`` cannot be served whatever the layer, None where it can."""
    given = [name for name, value in kwargs.items() if value is not None]
    if args or given:
        return f"the call has the arguments {', '.join(given) or 'of the base layer'}"
    if len(names) > 1:
        return f"{len(names)} adapters are active at once"
    if type(x) not in PLAIN:
        return f"the input is a {type(x).__name__}"
    return None


def base_reason(module: Any) -> str | None:
    """Why the product with the base layer cannot be served, None where it can."""
    base = module._modules["base_layer"]
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"the base layer is a {type(base).__name__}"
    if hooked(base):
        return "the base layer has hooks"
    if "forward" in base.__dict__:
        return "the base layer has a forward of its own"
    weight = base._parameters.get("weight")
    if type(weight) not in PLAIN:
        return f"the base weight is a {type(getattr(base, 'weight', None)).__name__}"
    if weight.requires_grad:
        return "the base weight is trained"
    if not weight.is_floating_point():
        return f"the base weight is {weight.dtype}"
    return None


def hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def dropout_reason(dropout: nn.Module) -> str | None:
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"the dropout is a {type(dropout).__name__}"
    return "the dropout has hooks" if hooked(dropout) else None


def dropout_of(dropout: nn.Module) -> float:
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
