"""HF peft's LoRA and AdaLoRA layers over bitsandbytes' 4-bit weights (QLoRA, arXiv 2305.14314), on `lora_linear`.

The weight is dequantised for the forward pass and again for the backward pass, and lives no longer than that. Imported
only where bitsandbytes is installed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit as QuantisedLinear
from bitsandbytes.nn import Params4bit
from peft.tuners.adalora.bnb import SVDLinear4bit
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from peftkernels._autocast import without_autocast
from peftkernels.integrations.peft.bypass import KNOWN_FORWARDS, bypass_reason
from peftkernels.integrations.peft.cpu_packing import keep_from_packing, unpack_for_gradients
from peftkernels.integrations.peft.layers import PeftKernelsLinear, PeftKernelsSVDLinear, Served, with_lora_bias
from peftkernels.integrations.peft.operands import adapted_linear, argument_reason
from peftkernels.integrations.peft.served import Service
from peftkernels.ops.call import Adapter
from peftkernels.ops.weights import FrozenWeight

KNOWN_FORWARDS[QuantisedLinear] = QuantisedLinear.forward


class Served4bit(Served):
    """What both layers share: the dequantised weight, in training."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `Served.forward`."""
        unpack_for_gradients(cast(Linear4bit, self).base_layer)
        return Served.forward(self, x, *args, **kwargs)

    def _prepare(self, service: Service) -> None:
        service.undo.update(keep_from_packing(cast(Linear4bit, self).base_layer))

    def _moment_reason(self) -> str | None:
        return _moment_reason()

    def _base_reason(self) -> str | None:
        return _base_reason(self)

    def _argument_reason(self, x: Tensor, adapter: Adapter) -> str | None:
        weight, bias = _base_operands(self, x)
        with without_autocast(x.device.type):
            return argument_reason(x.to(weight.dtype), weight, bias, adapter)


class PeftKernelsLinear4bit(Served4bit, Linear4bit):
    """peft's `lora.Linear4bit` in training; what `PeftKernelsLinear` computes, over the dequantised weight."""

    def _adapter_reason(self, name: str) -> str | None:
        if name in self.lora_variant:
            return f"the variant {type(self.lora_variant[name]).__name__} on a quantised base"
        return PeftKernelsLinear._adapter_reason(self, name)

    def _adapter(self, name: str) -> Adapter:
        return PeftKernelsLinear._adapter(self, name)

    def _serve(self, x: Tensor, name: str, adapter: Adapter, service: Service) -> Tensor:
        return with_lora_bias(self, _product(self, x, adapter, service), name)


class PeftKernelsSVDLinear4bit(Served4bit, SVDLinear4bit):
    """peft's AdaLoRA layer over a 4-bit weight; what `PeftKernelsSVDLinear` computes, over the dequantised weight."""

    def _adapter_reason(self, name: str) -> str | None:
        return PeftKernelsSVDLinear._adapter_reason(self, name)

    def _adapter(self, name: str) -> Adapter:
        return PeftKernelsSVDLinear._adapter(self, name)

    def _serve(self, x: Tensor, name: str, adapter: Adapter, service: Service) -> Tensor:
        return _product(self, x, adapter, service)


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


def _product(module: Any, x: Tensor, adapter: Adapter, service: Service) -> Tensor:
    """y (..., N) in x's dtype, computed in the base layer's dtype of computation, as its own product is."""
    weight, bias = _base_operands(module, x)
    # bitsandbytes' product follows the base layer's dtype, not autocast's.
    with without_autocast(x.device.type):
        return adapted_linear(x.to(weight.dtype), weight, bias, adapter, None, service.impl).to(x.dtype)


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
