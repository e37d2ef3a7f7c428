"""The autograd boundary of `lora_linear`, and the way from it to what a backend computes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.compiler import is_dynamo_compiling

from peftkernels.backends import registry
from peftkernels.ops import composition
from peftkernels.ops.call import TENSOR_FIELDS, Backward, Forward, Needs

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_X, _WEIGHT, _LORA_A, _LORA_B, _SHRINK, _SAVE_SHRINK = map(
    Forward._fields.index, ("x", "weight", "lora_A", "lora_B", "given_shrink", "save_shrink")
)
_TENSORS = tuple(place for _, place in TENSOR_FIELDS[Forward])
_NUMBERS = tuple(place for place in range(len(Forward._fields)) if place not in _TENSORS)


def _in_transform() -> bool:
    """Return True under a transform of torch.func that runs now; torch.compile traces operators under its own."""
    return not is_dynamo_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _watched(call: Forward | Backward) -> bool:
    """Return True if a mode, a subclass, a tracer, a transform or a profiler has to see the operator itself.

    torch's dispatcher also negates the memory of views that ask for it.
    """
    if (
        is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or _in_transform()
        or torch.autograd._profiler_enabled()
    ):
        return True
    for _, place in TENSOR_FIELDS[type(call)]:
        value: Any = call[place]
        if value is not None and (type(value) not in _PLAIN or value.is_neg()):
            return True
    return False


def forward_of(impl: str, call: Forward) -> tuple[Tensor, Tensor | None]:
    """y, and S where it is saved: by the backend's function, or its overload where something watches operators."""
    operators = registry.OPERATORS[impl]
    if operators.functions is not None and not _watched(call):
        return operators.functions[0](call)
    y, shrink = operators.forward(*call)
    return y, shrink if call.saves_shrink else None


def backward_of(impl: str, call: Backward) -> tuple[Tensor, ...]:
    """The six gradients, likewise; one that is not needed is anything."""
    operators = registry.OPERATORS[impl]
    if operators.functions is not None and not _watched(call):
        return operators.functions[1](call)
    return operators.backward(*call)


class LoraLinearFunction(torch.autograd.Function):
    """The operators of one backend as one node of autograd: what stands behind `lora_linear`.

        y, shrink = LoraLinearFunction.apply(*call, impl, source)

    For libraries that check arguments and choose a backend themselves; everybody else calls `lora_linear`. Under
    transforms of torch.func it runs as operations of torch. S is not differentiable.

    Args:
        call: the fields of `peftkernels.ops.call.Forward`, one by one. Nothing is checked; x has the dtype of
            computation, and `save_shrink` is True where lora_B or gate require grad.
        impl: a backend's name.
        source: None, or the `FrozenWeight` that `call.weight` was made of; it is kept in the weight's place, and makes
            the weight again for the backward pass.

    Returns:
        y (..., N), and S (M, r) where it is saved and was not given, else None.
    """

    generate_vmap_rule = True

    @classmethod
    def record(cls, *arguments: Any) -> Any:
        """`apply` for a call that no transform sees: inspecting `forward` for defaults it has none of takes 8 µs."""
        if is_dynamo_compiling():
            return cls.apply(*arguments)
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(arguments))  # type: ignore[misc]

    @staticmethod
    def forward(*arguments: Any) -> Any:
        call, impl = Forward(*arguments[:-2]), arguments[-2]
        if _in_transform():
            y, shrink = composition.forward(call)
            return y, shrink if call.saves_shrink else None
        return forward_of(impl, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *fields, ctx.impl, ctx.source = inputs
        needs = ctx.needs_input_grad
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])
            fields[_SHRINK] = output[1]
        # What no gradient is made of, and what is made again, is not kept.
        if not fields[_SAVE_SHRINK]:
            fields[_SHRINK] = None
        if not (needs[_LORA_A] or needs[_WEIGHT]):
            fields[_X] = None
        if ctx.source is not None:
            fields[_WEIGHT] = None
        ctx.save_for_backward(*[fields[place] for place in _TENSORS])
        ctx.numbers = [fields[place] for place in _NUMBERS]
        # S has no gradient, and no zeros are made for one.
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype = output[0].shape, output[0].dtype

    @staticmethod
    def backward(ctx: Any, grad_y: Any, _: Any) -> Any:
        unused = (None,) * (len(Forward._fields) - len(Needs._fields) + 2)
        fields: list[Any] = [None] * len(Forward._fields)
        for place, value in zip((*_TENSORS, *_NUMBERS), (*ctx.saved_tensors, *ctx.numbers), strict=True):
            fields[place] = value
        if grad_y is None:
            grad_y = fields[_LORA_B].new_zeros(ctx.shape, dtype=ctx.dtype)
        needs = list(ctx.needs_input_grad[: len(Needs._fields)])
        call = Forward(*fields).backward(grad_y, needs)
        if ctx.source is not None:
            call = call._replace(weight=ctx.source.materialize())
        if _in_transform():
            return *composition.gradients(call), *unused
        # Dynamo traces this with gradients enabled; the compiled graph refuses double backward by itself.
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad() if differentiable else nullcontext():
            gradients = backward_of(ctx.impl, call)
        asked = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
        if differentiable:
            x_left_out = call.x is None and needs[0]
            asked = composition.Gradients.apply(x_left_out, *call, *asked)
        return *asked, *unused
