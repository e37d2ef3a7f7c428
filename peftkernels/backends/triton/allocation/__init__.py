"""Rank allocation on CUDA devices; Triton is imported with the kernels."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

import torch

from peftkernels.backends import triton

if TYPE_CHECKING:
    from peftkernels.backends.triton.allocation.implementation import TritonKernels


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when averages of this dtype can be kept on the device, else why not."""
    if dtype is torch.float64:
        return "averages are torch.float64, the Triton kernels keep them in float32"
    reason = triton.refusal(device, torch.float32)
    return None if reason is None else reason.replace("x is on", "averages are on")


def disadvantage(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when "auto" may take the kernels, else why not."""
    return refusal(device, dtype) or triton.disadvantage(device, torch.float32)


@functools.cache
def _module() -> type[TritonKernels]:
    made: type[TritonKernels] = importlib.import_module(
        "peftkernels.backends.triton.allocation.implementation"
    ).TritonKernels
    return made


def kernels() -> TritonKernels:
    """An object that serves one allocator."""
    return _module()()
