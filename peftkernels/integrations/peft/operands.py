"""What a layer calls the operator with, and what the operator says of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftkernels.functional.checks import check_arguments

# The arguments of `lora_linear` by name that say what is computed: all but x, shrink and impl.
Operands = dict[str, Any]
_DEFAULTS = dict.fromkeys(("bias", "gate", "rank_plan", "dropout_seed", "shrink"))


def check_operands(x: Tensor, operands: Operands) -> None:
    """Raise TypeError or ValueError for the first argument that `lora_linear` would refuse."""
    check_arguments(x=x, **{**_DEFAULTS, **operands})


def argument_reason(x: Tensor, operands: Operands) -> str | None:
    """What `lora_linear` says of arguments that it refuses, None where it takes them."""
    try:
        check_operands(x, operands)
    except (TypeError, ValueError) as error:
        return str(error)
    return None
