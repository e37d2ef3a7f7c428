"""Which calls the C++ kernels serve, and which of them faster than the library's own products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftkernels._tracing import constant_when_traced
from peftkernels.backends import cpu
from peftkernels.backends.backend import Allocation, Backend
from peftkernels.backends.cpu.allocation import CpuKernels
from peftkernels.ops.call import Call, Request, Shrink
from peftkernels.ops.rank_plan import RankPlan
from peftkernels.ops.rules import FLOATS

_REFUSED = {
    "limit": "PEFTKERNELS_CPU_PACK_LIMIT leaves no room to keep this weight packed",
    "memory": "the system gave no memory to keep this weight packed",
}


@constant_when_traced
def _unavailable_reason() -> str | None:
    return cpu.unavailable_reason()


@constant_when_traced
def _has_bf16_kernels() -> bool:
    return cpu.has_bf16_kernels()


def _unserved_dtype(dtype: torch.dtype) -> str | None:
    """Why the C++ kernels cannot serve x of this dtype; None when they can."""
    if dtype in (torch.float64, torch.float16):
        return f"x is {dtype}, the C++ kernels compute in float32 and bfloat16"
    return None


def _slow_dtype(dtype: torch.dtype) -> str | None:
    """Why the library's matmuls are faster than the C++ kernels for x of this dtype; None when they are not."""
    if dtype is torch.bfloat16 and not _has_bf16_kernels():
        return "x is torch.bfloat16, for which this processor has no fast matrix kernels"
    return None


def _refusal(request: Request) -> str | None:
    x = request.x
    if not x.is_cpu:  # in a tenth of the time that x.device.type takes
        return f"x is on {x.device}, the C++ kernels run on the CPU"
    reason = _unavailable_reason()
    if reason is not None:
        return reason
    if isinstance(request, Call) and request.weight.requires_grad:
        return "weight requires grad, the C++ kernels serve frozen weights"
    return _unserved_dtype(x.dtype)


def _disadvantage(request: Request) -> str | None:
    reason = _slow_dtype(request.x.dtype)
    if reason is not None:
        return reason
    if not cpu.keeps_packs():
        return "PEFTKERNELS_CPU_PACK is off, and packing the weight in every call costs more than it saves"
    if isinstance(request, Shrink):
        return None
    if not isinstance(request.weight, Tensor):
        return "weight is made for each pass, and packing it for a single use costs more than it saves"
    # A compiled program does not follow the cache: it keeps the choice that was right while there was room.
    if not torch.compiler.is_compiling() and (refused := cpu.pack_refusal(request.weight)) is not None:
        return f"{_REFUSED[refused]}, and packing it in every call costs more than it saves"
    return None


def _sharing_disadvantage(request: Shrink) -> str:
    return "the C++ kernels make x A^T while rows of x are in cache for the frozen product: a pass of it costs more"


def direct_call(
    second_derivatives: Callable[..., list[Tensor | None]], automatic: bool
) -> Callable[..., Tensor | None] | None:
    """The C++ entry for plain calls on the C++ kernels (csrc/python_call.h), or None where they cannot run.

    It is told what the choice of a backend is for each dtype of x, and leaves to Python every call whose choice depends
    on more.

    Args:
        second_derivatives: `composition.second_derivatives`.
        automatic: whether it may serve impl="auto".
    """
    if _unavailable_reason() is not None:
        return None
    fast: list[Any] = [dtype for dtype in FLOATS if (_unserved_dtype(dtype) or _slow_dtype(dtype)) is None]
    return cpu.direct_call(fast if automatic else [], RankPlan, second_derivatives)


def _averages_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU, found {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"its averages are float32 or float64, found {dtype}"
    return _unavailable_reason()


BACKEND = Backend(
    "cpu",
    disadvantage=_disadvantage,
    unavailable_reason=_unavailable_reason,
    refusal=_refusal,
    sharing_disadvantage=_sharing_disadvantage,
    allocation=Allocation(_averages_refusal, _averages_refusal, CpuKernels),
    devices=("cpu",),
    compiled=True,
)
