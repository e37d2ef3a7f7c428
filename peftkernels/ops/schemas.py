"""Every operator's schema, fake implementation and FLOP formula. Backends only implement what is declared here.

`peftkernels::lora_linear_fwd` and `peftkernels::lora_linear_bwd` have one overload for each backend (`.reference`,
`.eager`, `.cpu`, `.triton`), all with the same arguments, so that the choice of a backend is part of a traced program;
so has `peftkernels::lora_shrink`, which makes S for several adapters of one x. `call.py` lists the arguments and
`reference.py` says what the operators compute. The dtype of x is the dtype of computation: weight, bias, factors and
gate are cast to it, x never is. What has one number per rank (factors, S, H) is float32 where x is float16: see
`rank_dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from peftkernels.ops.call import Backward, Forward, Needs, Record, Shrink, schema
from peftkernels.ops.checks import check_backward, check_forward, check_shrink, checked
from peftkernels.ops.rules import rank_dtype as rank_dtype

# Backends whose overloads are declared here; others declare theirs as they are registered.
IMPLEMENTATIONS = ("reference", "eager", "cpu", "triton")

library = torch.library.Library("peftkernels", "DEF")

ForwardFunction = Callable[[Forward], tuple[Tensor, "Tensor | None"]]
BackwardFunction = Callable[[Backward], tuple[Tensor, ...]]
ShrinkFunction = Callable[[Shrink], Tensor]


def _forward_fake(call: Forward) -> tuple[Tensor, Tensor]:
    x = call.x
    rows = math.prod(x.shape[:-1]) if call.saves_shrink else 0
    y = x.new_empty((*x.shape[:-1], call.weight.shape[0]))
    return y, x.new_empty((rows, call.lora_A.shape[0]), dtype=rank_dtype(x.dtype))


def _backward_fake(call: Backward) -> tuple[Tensor, ...]:
    return call.empty_gradients()


def _shrink_fake(call: Shrink) -> Tensor:
    ranks = sum(factor.shape[0] for factor in call.lora_A)
    return call.x.new_empty((math.prod(call.x.shape[:-1]), ranks), dtype=rank_dtype(call.x.dtype))


# What a FLOP counter hands over has the arguments' shapes in the place of tensors.
def _forward_flops(*shapes: Any, out_shape: Any = None, **named: Any) -> int:
    """2MNK + 2MrN, and 2MrK for an S that is not given; every rank counts: no formula reads a mask on the device."""
    call: Any = Forward(*shapes, **named)
    rows, (n, k), rank = math.prod(call.x[:-1]), call.weight, call.lora_A[0]
    return 2 * rows * n * k + 2 * rows * rank * (n if call.given_shrink is not None else n + k)


def _shrink_flops(*shapes: Any, out_shape: Any = None, **named: Any) -> int:
    """2MK·Σr."""
    call: Any = Shrink(*shapes, **named)
    return 2 * math.prod(call.x) * sum(shape[0] for shape in call.lora_A)


def _backward_flops(*shapes: Any, out_shape: Any = None, **named: Any) -> int:
    """2MNK for ∂x and as much for ∂W, 2MrN for H, 2MrK for the adapter's share of ∂x, 2MrK for ∂A, 2MrN for ∂B."""
    call: Any = Backward(*shapes, **named)
    needs = Needs(*call.needs)
    rows, (n, k), rank = math.prod(call.grad_y[:-1]), call.weight, call.lora_A[0]
    flops = 2 * rows * n * k * (needs.x + needs.weight)
    flops += 2 * rows * rank * n * (needs.x or needs.lora_A or needs.gate) + 2 * rows * rank * k * needs.x
    return flops + 2 * rows * rank * (k * needs.lora_A + n * needs.lora_B)


class _Operator(NamedTuple):
    """A declared operator: its arguments, its results, what it asks of arguments, its fake, and its FLOP formula."""

    record: type[Record]
    results: str
    check: Callable[[Any], None]
    fake: Callable[[Any], Any]
    flops: Callable[..., int]


_OPERATORS = {
    "lora_linear_fwd": _Operator(Forward, "(Tensor y, Tensor shrink)", check_forward, _forward_fake, _forward_flops),
    "lora_linear_bwd": _Operator(
        Backward,
        "(Tensor grad_x, Tensor grad_weight, Tensor grad_A, Tensor grad_B, Tensor grad_bias, Tensor grad_gate)",
        check_backward,
        _backward_fake,
        _backward_flops,
    ),
    "lora_shrink": _Operator(Shrink, "Tensor", check_shrink, _shrink_fake, _shrink_flops),
}
NAMES = tuple(_OPERATORS)


def overloads(backend: str) -> tuple[Any, ...]:
    """A backend's overloads of the three operators, in the order of `NAMES`."""
    return tuple(getattr(getattr(torch.ops.peftkernels, operator), backend) for operator in NAMES)


def declare(backend: str) -> None:
    """Define a backend's overloads of the three operators, and their fakes."""
    for name, operator in _OPERATORS.items():
        library.define(f"{name}.{backend}{schema(operator.record)} -> {operator.results}")
        fake = checked(operator.record, operator.check, operator.fake)
        torch.library.register_fake(f"peftkernels::{name}.{backend}", fake, lib=library)
        packet = getattr(torch.ops.peftkernels, name)
        # A new overload changes the hash of its packet, by which FLOP counters look formulas up.
        if packet not in flop_registry:
            register_flop_formula(packet)(operator.flops)


def implement(backend: str, forward: ForwardFunction, backward: BackwardFunction, shrink: ShrinkFunction) -> None:
    """Implement a backend's overloads on every device by functions of Python, which need not check arguments.

    Args:
        backend: its name, as given to `declare`.
        forward: gives y, and S where `Forward.saves_shrink` asks for it, else None.
        backward: gives the six gradients, `Backward.empty_gradients` for those that are not needed.
        shrink: gives S of several adapters.
    """

    def whole_forward(call: Forward) -> tuple[Tensor, Tensor]:
        y, saved = forward(call)
        nothing = saved if saved is not None else y.new_empty((0, call.lora_A.shape[0]), dtype=rank_dtype(y.dtype))
        return y, nothing

    functions: dict[str, Callable[[Any], Any]] = {
        "lora_linear_fwd": whole_forward,
        "lora_linear_bwd": backward,
        "lora_shrink": shrink,
    }
    for name, function in functions.items():
        operator = _OPERATORS[name]
        guarded = checked(operator.record, operator.check, function)
        library.impl(f"{name}.{backend}", guarded, "CompositeExplicitAutograd")


for _name in IMPLEMENTATIONS:
    declare(_name)
