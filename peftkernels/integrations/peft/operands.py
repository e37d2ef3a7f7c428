"""What a layer calls the operator with, and what the operator says of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftkernels.functional.checks import adapter_of, check_call
from peftkernels.ops.call import Call

# The arguments of `lora_linear` by name that say what is computed: all but x, shrink and impl.
Operands = dict[str, Any]


def check_operands(x: Tensor, operands: Operands) -> None:
    """Raise TypeError or ValueError for the first argument that `lora_linear` would refuse."""
    adapter = {name: value for name, value in operands.items() if name not in ("weight", "bias")}
    check_call(Call(x, operands["weight"], adapter_of(**adapter), operands.get("bias")))


def argument_reason(x: Tensor, operands: Operands) -> str | None:
    """What `lora_linear` says of arguments that it refuses, None where it takes them."""
    try:
        check_operands(x, operands)
    except (TypeError, ValueError) as error:
        return str(error)
    return None
