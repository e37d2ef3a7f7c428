"""Which implementation serves a call, and the reason in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftkernels._tracing import constant_when_traced
from peftkernels.backends import cpu, eager, reference, triton
from peftkernels.ops import schemas
from peftkernels.ops.rank_plan import RankPlan
from peftkernels.ops.rules import FLOATS

IMPLEMENTATIONS = ("reference", "eager", "cpu", "triton", "cuda")
REGISTERED = schemas.IMPLEMENTATIONS
_CUDA_UNAVAILABLE = "this version of peftkernels has no CUDA C++ kernels"

_REFUSED = {
    "limit": "PEFTKERNELS_CPU_PACK_LIMIT leaves no room to keep this weight packed",
    "memory": "the system gave no memory to keep this weight packed",
}

PYTHON_FUNCTIONS = {"triton": (triton.forward, triton.backward)}

reference.register()
eager.register()
triton.register()


@constant_when_traced
def _cpu_unavailable_reason() -> str | None:
    return cpu.unavailable_reason()


@constant_when_traced
def _cpu_has_bf16_kernels() -> bool:
    return cpu.has_bf16_kernels()


@constant_when_traced
def _triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    return triton.refusal(device, dtype)


@constant_when_traced
def _triton_disadvantage(device: torch.device, dtype: torch.dtype) -> str | None:
    return triton.disadvantage(device, dtype)


def backend_status() -> dict[str, str | None]:
    """For every implementation by name: None when it can run in this process, else why it cannot."""
    return {
        "reference": None,
        "eager": None,
        "cpu": _cpu_unavailable_reason(),
        "triton": triton.unavailable_reason(),
        "cuda": _CUDA_UNAVAILABLE,
    }


def _unserved_dtype(dtype: torch.dtype) -> str | None:
    """Why the C++ kernels cannot serve x of this dtype; None when they can."""
    if dtype in (torch.float64, torch.float16):
        return f"x is {dtype}, the C++ kernels compute in float32 and bfloat16"
    return None


def _slow_dtype(dtype: torch.dtype) -> str | None:
    """Why the library's matmuls are faster than the C++ kernels for x of this dtype; None when they are not."""
    if dtype is torch.bfloat16 and not _cpu_has_bf16_kernels():
        return "x is torch.bfloat16, for which this processor has no fast matrix kernels"
    return None


def refusal(impl: str, x: Tensor, weight: Tensor) -> str | None:
    """None when `impl` can serve this call (x and weight in the dtype of computation), else why it cannot."""
    if impl in ("reference", "eager"):
        return None
    if impl == "cpu":
        if x.device.type != "cpu":
            return f"x is on {x.device}, the C++ kernels run on the CPU"
        reason = _cpu_unavailable_reason()
        if reason is not None:
            return reason
        if weight.requires_grad:
            return "weight requires grad, the C++ kernels serve frozen weights"
        return _unserved_dtype(x.dtype)
    if impl == "triton":
        reason = _triton_refusal(x.device, x.dtype)
        if reason is None and weight.requires_grad:
            return "weight requires grad, the Triton kernels serve frozen weights"
        return reason
    return _CUDA_UNAVAILABLE


def disadvantage(impl: str, x: Tensor, weight: Tensor) -> str | None:
    """None when "auto" may take `impl`, else why it cannot or would be slower than the library's matmuls."""
    reason = refusal(impl, x, weight)
    if reason is None and impl == "triton":
        return _triton_disadvantage(x.device, x.dtype)
    if reason is not None or impl != "cpu":
        return reason
    reason = _slow_dtype(x.dtype)
    if reason is not None:
        return reason
    if not cpu.keeps_packs():
        return "PEFTKERNELS_CPU_PACK is off, and packing the weight in every call costs more than it saves"
    # A compiled program does not follow the cache: it keeps the choice that was right while there was room.
    if not torch.compiler.is_compiling() and (refused := cpu.pack_refusal(weight)) is not None:
        return f"{_REFUSED[refused]}, and packing it in every call costs more than it saves"
    return None


def choose(impl: str, x: Tensor, weight: Tensor) -> str:
    """The implementation that serves a call.

    "auto" takes the fastest that can; any other name is taken or refused, never replaced. Raises ValueError for an
    unknown name and RuntimeError, with the reason, for one that cannot serve.
    """
    if impl == "auto":
        kernels = "cpu" if x.device.type == "cpu" else "triton"
        return kernels if disadvantage(kernels, x, weight) is None else "eager"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: found {impl!r}, expected 'auto' or one of {', '.join(IMPLEMENTATIONS)}")
    reason = refusal(impl, x, weight)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot serve this call: {reason}")
    return impl


def sharing_disadvantage(impl: str, x: Tensor, weight: Tensor) -> str | None:
    """None when projections of the same x gain by one x·Aᵀ for all of them, else why not. Raises as `choose`."""
    chosen = choose(impl, x, weight)
    if chosen == "cpu":
        return "the C++ kernels make x A^T while rows of x are in cache for the frozen product: a pass of it costs more"
    if chosen == "triton":
        return triton.sharing_disadvantage(x)
    return None


def direct_call(second_derivatives: Callable[..., list[Tensor | None]]) -> Callable[..., Tensor | None] | None:
    """The C++ entry for plain calls on the C++ kernels (csrc/python_call.h), or None where they cannot run.

    It is told what `choose` answers for each dtype of x, and leaves to Python every call whose choice depends on more.
    """
    if _cpu_unavailable_reason() is not None:
        return None
    named = [dtype for dtype in FLOATS if _unserved_dtype(dtype) is None]
    automatic = [dtype for dtype in named if _slow_dtype(dtype) is None]
    return cpu.direct_call(automatic, named, RankPlan, second_derivatives)


@dataclass(frozen=True)
class Explanation:
    """What `impl="auto"` takes for a call, and why each faster implementation was not taken.

    routes  on "triton": for the forward and the backward product which way it goes, and why
    """

    chosen: str
    why_not: dict[str, str] = field(default_factory=dict)
    routes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"lora_linear runs on {self.chosen!r}"]
        lines += [f"  {direction}: {route}" for direction, route in self.routes.items()]
        lines += [f"  not {name!r}: {reason}" for name, reason in self.why_not.items()]
        return "\n".join(lines)


def explain_choice(x: Tensor, weight: Tensor) -> Explanation:
    """`choose("auto", …)` with its reasons, fastest implementation first."""
    chosen = choose("auto", x, weight)
    faster = ("cuda", "triton", "cpu", "eager")
    why_not = {name: disadvantage(name, x, weight) for name in faster[: faster.index(chosen)]}
    reasons = {name: reason for name, reason in why_not.items() if reason is not None}
    return Explanation(chosen, reasons, triton.route_in_words(x, weight) if chosen == "triton" else {})
