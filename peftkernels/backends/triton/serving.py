"""Which calls the Triton kernels serve; the first that needs them imports them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from torch import Tensor

from peftkernels.backends import triton
from peftkernels.backends.backend import Allocation, Backend
from peftkernels.backends.triton import allocation
from peftkernels.backends.triton.linear import routes
from peftkernels.ops.call import Backward, Call, Forward, Request, Shrink

# Elements of x from which on one shrink is made for several projections. Each projection but one is spared a read of
# x, at an H200's 4.3 TB/s 8 µs for this many in 16 bits, for two more launches of 3 to 5 µs: arithmetic, not measured.
SHARED_FROM = 2**24


@functools.cache
def _forward_pass() -> Callable[[Forward], tuple[Tensor, Tensor | None]]:
    forward: Callable[[Forward], tuple[Tensor, Tensor | None]]
    forward = importlib.import_module("peftkernels.backends.triton.linear.forward_pass").forward
    return forward


@functools.cache
def _backward_pass() -> Callable[[Backward], tuple[Tensor, ...]]:
    backward: Callable[[Backward], tuple[Tensor, ...]]
    backward = importlib.import_module("peftkernels.backends.triton.linear.backward_pass").backward
    return backward


def _forward(call: Forward) -> tuple[Tensor, Tensor | None]:
    return _forward_pass()(call)


def _backward(call: Backward) -> tuple[Tensor, ...]:
    return _backward_pass()(call)


def _shrink(call: Shrink) -> Tensor:
    made: Tensor = importlib.import_module("peftkernels.backends.triton.linear.shared_shrink").lora_shrink(call)
    return made


def _refusal(request: Request) -> str | None:
    reason = triton.refusal(request.x.device, request.x.dtype)
    if reason is None and isinstance(request, Call) and request.weight.requires_grad:
        return "weight requires grad, the Triton kernels serve frozen weights"
    return reason


def _disadvantage(request: Request) -> str | None:
    return triton.disadvantage(request.x.device, request.x.dtype)


def _sharing_disadvantage(request: Shrink) -> str | None:
    count = request.x.numel()
    if count >= SHARED_FROM:
        return None
    return f"x has {count} elements: from {SHARED_FROM} on, reading it once less takes longer than a launch"


def _routes(call: Call) -> dict[str, str]:
    """For the forward and the backward product: which way it goes, and why."""
    launch = importlib.import_module("peftkernels.backends.triton.common.launch")
    x, (n, k) = call.x, call.weight.shape
    gpu, capability = launch.gpu_name(x.device), launch.capability(x.device)
    words = {}
    for direction in routes.DIRECTIONS:
        product = routes.Product(direction, str(x.dtype).removeprefix("torch."), x.shape[:-1].numel(), n, k)
        choice, reason = routes.choose(product, gpu, capability)
        words[direction] = f"{choice} ({reason})"
    return words


BACKEND = Backend(
    "triton",
    disadvantage=_disadvantage,
    forward=_forward,
    backward=_backward,
    shrink=_shrink,
    unavailable_reason=triton.unavailable_reason,
    refusal=_refusal,
    sharing_disadvantage=_sharing_disadvantage,
    allocation=Allocation(allocation.refusal, allocation.disadvantage, allocation.kernels),
    routes=_routes,
    devices=("cuda",),
    compiled=True,
)
