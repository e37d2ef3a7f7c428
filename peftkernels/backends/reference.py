"""`ops/reference.py` as a backend: slow, exact at any precision, for checking the others through the same door."""

from __future__ import annotations

from torch import Tensor

from peftkernels._autocast import without_autocast
from peftkernels.backends.backend import Backend
from peftkernels.ops import reference
from peftkernels.ops.call import Backward, Forward, Request, Shrink


def _forward(call: Forward) -> tuple[Tensor, Tensor | None]:
    with without_autocast(call.x.device.type):
        y, shrink = reference.lora_linear_forward(call)
    return y, shrink if call.saves_shrink else None


def _backward(call: Backward) -> tuple[Tensor, ...]:
    grad_y = call.grad_y
    # What is missing was not saved because no gradient asked for it: any value serves.
    x, shrink = call.x, call.shrink
    if x is None:
        x = grad_y.new_zeros((*grad_y.shape[:-1], call.weight.shape[1]))
    if shrink is None:
        shape = (grad_y.shape[:-1].numel(), call.lora_A.shape[0])
        shrink = grad_y.new_zeros(shape, dtype=reference.rank_dtype(grad_y.dtype))
    with without_autocast(grad_y.device.type):
        gradients = reference.lora_linear_backward(call._replace(x=x, shrink=shrink))
    empty = call.empty_gradients([False] * 6)
    return tuple(
        gradient.to(nothing.dtype) if need else nothing
        for gradient, nothing, need in zip(gradients, empty, call.needs, strict=True)
    )


def _shrink(call: Shrink) -> Tensor:
    with without_autocast(call.x.device.type):
        return reference.lora_shrink(call)


def _never(request: Request) -> str:
    return "it is the slow reference that the others are judged by"


BACKEND = Backend("reference", disadvantage=_never, forward=_forward, backward=_backward, shrink=_shrink)
