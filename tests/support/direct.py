"""The direct way to the C++ kernels, called past the public function or kept from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peftkernels import lora_linear
from peftkernels.functional import linear
from support.cases import Call

OPTIONAL = ("bias", "gate", "rank_plan", "scaling", "dropout_p", "dropout_seed", "shrink", "impl")
ORDER = ("x", "weight", "lora_A", "lora_B", *OPTIONAL)


def load() -> None:
    """The first call of all loads the kernels."""
    lora_linear(torch.ones(1, 2), torch.ones(3, 2), torch.ones(1, 2), torch.ones(3, 1))


def arguments_of(call: Call, impl: str = "auto") -> dict[str, Any]:
    return {**call.tensors(), **call.optional, "impl": impl}


def direct(arguments: dict[str, Any]) -> Tensor | None:
    """y, or None where the call is left to Python."""
    return linear._direct_call(*(arguments[name] for name in ORDER))


def by_python(function: Callable[[], Any]) -> Any:
    """What `function` returns when every call goes through the Python function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_direct_call", linear._leave_to_python)
        return function()
