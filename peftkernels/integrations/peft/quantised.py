"""HF peft's LoRA and AdaLoRA layers over bitsandbytes' 4-bit weights (QLoRA, arXiv 2305.14314), on `lora_linear`.

The weight is dequantised for the forward pass and again for the backward pass, and lives no longer than that. Imported
only where bitsandbytes is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit as QuantisedLinear
from bitsandbytes.nn import Params4bit
from peft.tuners.adalora.bnb import SVDLinear4bit
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from peftkernels._autocast import without_autocast
from peftkernels.functional import lora_linear
from peftkernels.integrations.peft.bypass import KNOWN_FORWARDS, bypass_reason
from peftkernels.integrations.peft.cpu_packing import keep_from_packing, unpack_for_gradients
from peftkernels.integrations.peft.layers import (
    PeftKernelsLinear,
    PeftKernelsSVDLinear,
    Served,
    adalora_scale,
    dropout_of,
    svd_factor,
)
from peftkernels.integrations.peft.operands import Operands, argument_reason
from peftkernels.integrations.peft.served import Service
from peftkernels.ops.weights import FrozenWeight

KNOWN_FORWARDS[QuantisedLinear] = QuantisedLinear.forward


class PeftKernelsLinear4bit(Served, Linear4bit):
    """peft's `lora.Linear4bit` in training; what `PeftKernelsLinear` computes, over the dequantised weight."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `Served.forward`."""
        unpack_for_gradients(self.base_layer)
        return Served.forward(self, x, *args, **kwargs)

    def _prepare(self, service: Service) -> None:
        service.undo.update(keep_from_packing(self.base_layer))

    def _moment_reason(self) -> str | None:
        return _moment_reason()

    def _base_reason(self) -> str | None:
        return _base_reason(self)

    def _adapter_reason(self, name: str) -> str | None:
        if name in self.lora_variant:
            return f"the variant {type(self.lora_variant[name]).__name__} on a quantised base"
        return PeftKernelsLinear._adapter_reason(self, name)

    def _operands(self, name: str) -> Operands:
        return {
            "lora_A": self.lora_A[name].weight,
            "lora_B": self.lora_B[name].weight,
            "scaling": self.scaling[name],
            "dropout_p": dropout_of(self.lora_dropout[name]),
        }

    def _argument_reason(self, x: Tensor, operands: Operands) -> str | None:
        return _argument_reason(self, x, operands)

    def _serve(self, x: Tensor, name: str, operands: Operands, service: Service) -> Tensor:
        y = _product(self, x, operands, service)
        bias = self.lora_B[name].bias
        return y if bias is None else y + (bias * self.scaling[name]).to(y.dtype)


class PeftKernelsSVDLinear4bit(Served, SVDLinear4bit):
    """peft's AdaLoRA layer over a 4-bit weight; what `PeftKernelsSVDLinear` computes, over the dequantised weight."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `Served.forward`."""
        unpack_for_gradients(self.base_layer)
        return Served.forward(self, x, *args, **kwargs)

    def _prepare(self, service: Service) -> None:
        service.undo.update(keep_from_packing(self.base_layer))

    def _moment_reason(self) -> str | None:
        return _moment_reason()

    def _base_reason(self) -> str | None:
        return _base_reason(self)

    def _adapter_reason(self, name: str) -> str | None:
        return PeftKernelsSVDLinear._adapter_reason(self, name)

    def _operands(self, name: str) -> Operands:
        return {
            "lora_A": svd_factor(self, "lora_A", name),
            "lora_B": svd_factor(self, "lora_B", name),
            "gate": svd_factor(self, "lora_E", name),
            "scaling": adalora_scale(self, name),
            "dropout_p": dropout_of(self.lora_dropout[name]),
        }

    def _argument_reason(self, x: Tensor, operands: Operands) -> str | None:
        return _argument_reason(self, x, operands)

    def _serve(self, x: Tensor, name: str, operands: Operands, service: Service) -> Tensor:
        return _product(self, x, operands, service)


def _base_reason(module: Any) -> str | None:
    """Why the product with the quantised weight cannot be served, None where it can."""
    base = module._modules["base_layer"]
    reason = bypass_reason(base, "the base layer", (QuantisedLinear,))
    if reason is not None:
        return reason
    state = getattr(base.weight, "quant_state", None)
    if type(base.weight) is not Params4bit or state is None:
        return "the base weight is not quantised yet"
    return None


def _moment_reason() -> str | None:
    if torch.compiler.is_compiling():
        return "a quantised base in a compiled program"
    if not torch.is_grad_enabled():
        # bitsandbytes multiplies few rows faster than a dequantised weight could be written.
        return "no gradients are recorded, and a quantised base is served in training"
    return None


def _product(module: Any, x: Tensor, operands: Operands, service: Service) -> Tensor:
    """y (..., N) in x's dtype, computed in the base layer's dtype of computation, as its own product is."""
    weight, bias = _base_operands(module, x)
    # bitsandbytes' product follows the base layer's dtype, not autocast's.
    with without_autocast(x.device.type):
        return lora_linear(x.to(weight.dtype), weight, **operands, bias=bias, impl=service.impl).to(x.dtype)


def _argument_reason(module: Any, x: Tensor, operands: Operands) -> str | None:
    weight, bias = _base_operands(module, x)
    with without_autocast(x.device.type):
        return argument_reason(x.to(weight.dtype), {**operands, "weight": weight, "bias": bias})


class _Weight4bit(FrozenWeight):
    """The weight (N, K) of a quantised base layer, in the dtype that the layer computes in."""

    def __init__(self, packed: Tensor, state: Any, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.device = torch.Size(state.shape), dtype, packed.device
        self._packed, self._state = packed, state

    @torch.no_grad()
    def materialize(self) -> Tensor:
        found: Tensor = dequantize_4bit(self._packed, self._state).to(self.dtype)
        return found


def _base_operands(module: Any, x: Tensor) -> tuple[_Weight4bit, Tensor | None]:
    """The weight and the bias, in the dtype that the base layer computes in."""
    base = module._modules["base_layer"]
    dtype = x.dtype if base.compute_dtype is None else base.compute_dtype
    bias = None if base.bias is None else base.bias.to(dtype)
    return _Weight4bit(base.weight.data, base.weight.quant_state, dtype), bias
