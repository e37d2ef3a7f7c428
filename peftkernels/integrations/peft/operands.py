"""What a layer calls the operator with, and what the operator says of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from peftkernels.functional import lora_linear
from peftkernels.functional.checks import adapter_of, check_call
from peftkernels.ops.call import Adapter, Call
from peftkernels.ops.weights import Weight


def weight_and_bias(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (N, K) and bias of the base layer; a Conv1D's weight is kept transposed."""
    base = module._modules["base_layer"]
    weight = base._parameters["weight"]
    return (weight.t() if type(base) is Conv1D else weight), base._parameters["bias"]


def adapted_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter, shrink: Tensor | None, impl: str
) -> Tensor:
    """`lora_linear` with an adapter as peft holds it: nothing of it is checked yet, and its scaling may be a tensor."""
    return lora_linear(
        x,
        weight,
        adapter.lora_A,
        adapter.lora_B,
        bias=bias,
        gate=adapter.gate,
        scaling=adapter.scale,
        dropout_p=adapter.dropout_p,
        shrink=shrink,
        impl=impl,
    )


def check_operands(x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter) -> None:
    """Raise TypeError or ValueError for the first argument that `adapted_linear` would refuse."""
    lora_A, lora_B, gate, dropout_p = adapter.lora_A, adapter.lora_B, adapter.gate, adapter.dropout_p
    checked = adapter_of(lora_A, lora_B, gate, scaling=adapter.scale, dropout_p=dropout_p)
    check_call(Call(x, weight, checked, bias))


def argument_reason(x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter) -> str | None:
    """What the operator says of arguments that it refuses, None where it takes them."""
    try:
        check_operands(x, weight, bias, adapter)
    except (TypeError, ValueError) as error:
        return str(error)
    return None
