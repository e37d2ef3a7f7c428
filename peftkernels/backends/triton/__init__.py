"""Triton kernels for NVIDIA GPUs behind the `.triton` overloads. Triton is imported by the first call that needs it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from peftkernels import _ops

OLDEST = (8, 0)
_OFF = ("", "0", "false", "off", "no", "n", "f")


def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1): slow, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() not in _OFF


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


@functools.cache
def _old_gpu(device: torch.device) -> str | None:
    found = torch.cuda.get_device_capability(device)
    if found >= OLDEST:
        return None
    return f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, the kernels need 8.0"


def unavailable_reason() -> str | None:
    """None when the kernels can run in this process, on some device, else why not."""
    reason = _missing()
    if reason is not None or interpreting():
        return reason
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _old_gpu(torch.device("cuda", torch.cuda.current_device()))


def refusal(x: Tensor) -> str | None:
    """None when the kernels can compute with x's device and dtype, else why not."""
    reason = _missing()
    if reason is not None:
        return reason
    if x.dtype is torch.float64:
        return "x is torch.float64, the Triton kernels compute in float32, float16 and bfloat16"
    if interpreting():
        if x.device.type != "cpu":
            return f"x is on {x.device}, and TRITON_INTERPRET is set, which runs kernels on the CPU"
        if x.dtype is torch.bfloat16:
            return "x is torch.bfloat16, which Triton's interpreter multiplies wrongly"
        return None
    if x.device.type != "cuda":
        return f"x is on {x.device}, the Triton kernels run on CUDA devices"
    if torch.version.cuda is None:
        return "this torch was built for AMD GPUs, for which the kernels were not built"
    return _old_gpu(x.device)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return importlib.import_module("peftkernels.backends.triton.forward").forward(*arguments)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    return importlib.import_module("peftkernels.backends.triton.backward").backward(*arguments)


def register() -> None:
    """Implement the `.triton` overloads."""
    _ops.library.impl("lora_linear_fwd.triton", _forward, "CompositeExplicitAutograd")
    _ops.library.impl("lora_linear_bwd.triton", _backward, "CompositeExplicitAutograd")
