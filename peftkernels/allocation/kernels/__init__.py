"""What an allocator computes on the device of the layers: one contract, several implementations."""

from __future__ import annotations

import torch

from peftkernels.allocation.kernels.eager import EagerKernels
from peftkernels.backends.cpu import allocation as cpu_allocation
from peftkernels.backends.triton import allocation as triton_allocation
from peftkernels.ops.allocation_kernels import AllocationKernels
from peftkernels.ops.factor_layout import FactorLayout

IMPLEMENTATIONS = ("eager", "cpu", "triton")

__all__ = ["IMPLEMENTATIONS", "AllocationKernels", "FactorLayout", "kernels_for"]


def kernels_for(device: torch.device, dtype: torch.dtype, impl: str = "auto") -> AllocationKernels:
    """Make the kernels of one allocator.

    Args:
        device: Where the layers are.
        dtype: Of the averages, float32 or float64.
        impl: "auto" for the fastest that can serve, or a name of `IMPLEMENTATIONS`, which is served or refused.

    Raises:
        ValueError: For another name.
        RuntimeError: Where the one that was named cannot serve, saying why.
    """
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"impl: found {impl!r}, expected one of auto, {', '.join(IMPLEMENTATIONS)}")
    if impl in ("auto", "cpu"):
        reason = cpu_allocation.refusal(device, dtype)
        if reason is None:
            return cpu_allocation.CpuKernels(EagerKernels().select)
        if impl == "cpu":
            raise RuntimeError(f"impl='cpu' cannot run: {reason}")
    if impl == "triton" or (impl == "auto" and triton_allocation.disadvantage(device, dtype) is None):
        reason = triton_allocation.refusal(device, dtype)
        if reason is not None:
            raise RuntimeError(f"impl='triton' cannot run: {reason}")
        return triton_allocation.kernels()
    return EagerKernels()
