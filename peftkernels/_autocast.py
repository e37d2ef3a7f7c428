"""What autocast asks of a call."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from peftkernels._tracing import constant_when_traced

# Autocast leaves every other dtype, float64 among them, as it is.
CASTABLE = frozenset((torch.float32, torch.bfloat16, torch.float16))


@constant_when_traced
def _knows_autocast(device_type: str) -> bool:
    # torch 2.11's compiler does not trace this question.
    return torch.amp.is_autocast_available(device_type)


def autocast_enabled(device_type: str) -> bool:
    """Return True if autocast is on for a device type; False for types that know no autocast, such as "meta"."""
    return _knows_autocast(device_type) and torch.is_autocast_enabled(device_type)


def autocast_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype that x of `dtype` is computed in: autocast's where it is on and applies, else `dtype` itself."""
    if autocast_enabled(device_type) and dtype in CASTABLE:
        return torch.get_autocast_dtype(device_type)
    return dtype


def without_autocast(device_type: str) -> Any:
    """A context in which operators that state their own dtypes run: autocast would round their fp32 arithmetic."""
    if autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
