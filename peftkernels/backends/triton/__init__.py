"""Triton kernels for NVIDIA GPUs behind the `.triton` overloads. Triton is imported by the first call that needs it."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re

import torch

from peftkernels._tracing import constant_when_traced

OLDEST = (8, 0)
_OFF = ("", "0", "false", "off", "no", "n", "f")


def interpreting() -> bool:
    """Return True if Triton interprets its kernels on the CPU (TRITON_INTERPRET=1): slow, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() not in _OFF


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


@functools.cache
def _broken_interpreter() -> str | None:
    """Triton's interpreter up to 3.6 takes the ends of loops from arrays in a way that NumPy has refused since 2.4."""
    try:
        triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    except importlib.metadata.PackageNotFoundError as error:
        return f"TRITON_INTERPRET is set, and Triton's interpreter needs {error.name}, which is not installed"
    if _release(triton) >= (3, 7) or _release(numpy) < (2, 4):
        return None
    return (
        f"TRITON_INTERPRET is set, and the interpreter of Triton {triton} breaks with NumPy {numpy}: "
        "Triton 3.7 or NumPy below 2.4 is needed"
    )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _absent(interpreted: bool) -> str | None:
    """Why there is nothing that could run a kernel, on whatever device; None where there is."""
    return _missing() or (_broken_interpreter() if interpreted else None)


@functools.cache
def _old_gpu(device: torch.device) -> str | None:
    found = torch.cuda.get_device_capability(device)
    if found >= OLDEST:
        return None
    return f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, the kernels need 8.0"


def unavailable_reason() -> str | None:
    """None when the kernels can run in this process, on some device, else why not."""
    interpreted = interpreting()
    reason = _absent(interpreted)
    if reason is not None or interpreted:
        return reason
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _old_gpu(torch.device("cuda", torch.cuda.current_device()))


@constant_when_traced
def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the kernels can compute with an x of this device and dtype, else why not."""
    interpreted = interpreting()
    reason = _absent(interpreted)
    if reason is not None:
        return reason
    if dtype is torch.float64:
        return "x is torch.float64, the Triton kernels compute in float32, float16 and bfloat16"
    if interpreted:
        if device.type != "cpu":
            return f"x is on {device}, and TRITON_INTERPRET is set, which runs kernels on the CPU"
        if dtype is torch.bfloat16:
            return "x is torch.bfloat16, which Triton's interpreter multiplies wrongly"
        return None
    if device.type != "cuda":
        return f"x is on {device}, the Triton kernels run on CUDA devices"
    if torch.version.cuda is None:
        return "this torch was built for AMD GPUs, for which the kernels were not built"
    return _old_gpu(device)


@constant_when_traced
def disadvantage(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when "auto" may take the kernels, else why not."""
    reason = refusal(device, dtype)
    if reason is None and interpreting():
        return "TRITON_INTERPRET is set: the kernels are interpreted, which is for tests"
    return reason
