"""HF peft's LoRA and AdaLoRA layers over bitsandbytes' 4-bit weights (QLoRA, arXiv 2305.14314), on `lora_linear`.

The weight is dequantised for the forward pass and again for the backward pass, and lives no longer than that. Imported
only where bitsandbytes is installed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit as QuantisedLinear
from bitsandbytes.nn import Params4bit
from peft.tuners.adalora.bnb import SVDLinear4bit
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from peftkernels._autocast import without_autocast
from peftkernels.functional import lora_linear_of
from peftkernels.integrations.peft.layers import (
    PeftKernelsLinear,
    PeftKernelsSVDLinear,
    Served,
    adalora_scale,
    dropout_of,
    hooked,
)
from peftkernels.integrations.peft.served import Service


class PeftKernelsLinear4bit(Served, Linear4bit):
    """peft's `lora.Linear4bit` in training; what `PeftKernelsLinear` computes, over the dequantised weight."""

    def _moment_reason(self) -> str | None:
        return _moment_reason(self)

    def _base_reason(self) -> str | None:
        return _base_reason(self)

    def _adapter_reason(self, name: str) -> str | None:
        if name in self.lora_variant:
            return f"the variant {type(self.lora_variant[name]).__name__} on a quantised base"
        return PeftKernelsLinear._adapter_reason(self, name)

    def _serve(self, x: Tensor, name: str, service: Service) -> Tensor:
        lora_A, up = self.lora_A[name].weight, self.lora_B[name]
        y = _product(
            self,
            x,
            lora_A,
            up.weight,
            scaling=self.scaling[name],
            dropout_p=dropout_of(self.lora_dropout[name]),
            impl=service.impl,
        )
        return y if up.bias is None else y + (up.bias * self.scaling[name]).to(y.dtype)


class PeftKernelsSVDLinear4bit(Served, SVDLinear4bit):
    """peft's AdaLoRA layer over a 4-bit weight; what `PeftKernelsSVDLinear` computes, over the dequantised weight."""

    def _moment_reason(self) -> str | None:
        return _moment_reason(self)

    def _base_reason(self) -> str | None:
        return _base_reason(self)

    def _adapter_reason(self, name: str) -> str | None:
        return PeftKernelsSVDLinear._adapter_reason(self, name)

    def _serve(self, x: Tensor, name: str, service: Service) -> Tensor:
        return _product(
            self,
            x,
            self.lora_A[name],
            self.lora_B[name],
            gate=self.lora_E[name],
            scaling=adalora_scale(self, name, service),
            dropout_p=dropout_of(self.lora_dropout[name]),
            impl=service.impl,
        )


def _base_reason(module: Any) -> str | None:
    """Why the product with the quantised weight cannot be served, None where it can."""
    base = module._modules["base_layer"]
    if type(base) is not QuantisedLinear:
        return f"the base layer is a {type(base).__name__}"
    if hooked(base):
        return "the base layer has hooks"
    if "forward" in base.__dict__:
        return "the base layer has a forward of its own"
    state = getattr(base.weight, "quant_state", None)
    if type(base.weight) is not Params4bit or state is None:
        return "the base weight is not quantised yet"
    return None


def _moment_reason(module: Any) -> str | None:
    if torch.compiler.is_compiling():
        return "a quantised base in a compiled program"
    if not torch.is_grad_enabled():
        # bitsandbytes multiplies few rows faster than a dequantised weight could be written.
        return "no gradients are recorded, and a quantised base is served in training"
    if getattr(getattr(module.base_layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        return "bitsandbytes packed the base weight for inference on the CPU"
    return None


def _product(module: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, **options: Any) -> Tensor:
    """y (..., N) in x's dtype, computed in the base layer's dtype of computation, as its own product is."""
    base = module._modules["base_layer"]
    dtype = x.dtype if base.compute_dtype is None else base.compute_dtype
    bias = None if base.bias is None else base.bias.to(dtype)
    weight_of = functools.partial(_dequantised, base.weight.data, base.weight.quant_state, dtype)
    # bitsandbytes' product follows the base layer's dtype, not autocast's.
    with without_autocast(x.device.type):
        return lora_linear_of(weight_of, x.to(dtype), lora_A, lora_B, bias=bias, **options).to(x.dtype)


@torch.no_grad()
def _dequantised(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """(N, K)"""
    found: Tensor = dequantize_4bit(packed, state).to(dtype)
    return found
