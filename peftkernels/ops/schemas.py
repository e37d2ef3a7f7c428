"""Every operator's schema, fake implementation and FLOP formula. Backends only implement what is declared here.

`peftkernels::lora_linear_fwd` and `peftkernels::lora_linear_bwd` have one overload per implementation (`.reference`,
`.eager`, `.cpu`, `.triton`), all with the same arguments, so that the choice made by `dispatch` is part of a traced
program; so has `peftkernels::lora_shrink`, which makes S for several adapters of one x. `reference.py` says what they
compute. The dtype of x is the dtype of computation: weight, bias, factors and gate are cast to it, x never is. What has
one number per rank (factors, S, H) is float32 where x is float16: see `rank_dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from peftkernels.ops.checks import check_backward, check_forward, check_shrink, checked
from peftkernels.ops.rules import rank_dtype as rank_dtype

IMPLEMENTATIONS = ("reference", "eager", "cpu", "triton")

_SHARED = (
    "Tensor? gate, Tensor? rank_state, Tensor? rank_order, Tensor? rank_counts, "
    "float scaling, Tensor? scaling_tensor, float dropout_p, Tensor? dropout_seed"
)
_FORWARD = (
    "lora_linear_fwd.{name}(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, "
    f"{_SHARED}, bool save_shrink, Tensor? given_shrink=None) -> (Tensor y, Tensor shrink)"
)
_BACKWARD = (
    "lora_linear_bwd.{name}(Tensor grad_y, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, "
    "Tensor? shrink, "
    f"{_SHARED}, bool[6] needs) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_A, Tensor grad_B, "
    "Tensor grad_bias, Tensor grad_gate)"
)
_SHRINK = "lora_shrink.{name}(Tensor x, Tensor[] lora_A) -> Tensor"

library = torch.library.Library("peftkernels", "DEF")


def shrink_shape(x: Tensor, lora_A: Tensor, save_shrink: bool) -> tuple[int, int]:
    """(M, r) when the backward pass needs an S that the caller does not have, else (0, r)."""
    return (math.prod(x.shape[:-1]) if save_shrink else 0, lora_A.shape[0])


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    rank_state: Tensor | None,
    rank_order: Tensor | None,
    rank_counts: Tensor | None,
    scaling: float,
    scaling_tensor: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    save_shrink: bool,
    given_shrink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_forward(
        x, weight, lora_A, lora_B, bias, gate, rank_state, rank_order, rank_counts, scaling, scaling_tensor, dropout_p,
        dropout_seed, save_shrink, given_shrink,
    )  # fmt: skip
    save_shrink = save_shrink and given_shrink is None
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty(shrink_shape(x, lora_A, save_shrink), dtype=rank_dtype(x.dtype))


def _shrink_fake(x: Tensor, lora_A: list[Tensor]) -> Tensor:
    check_shrink(x, lora_A)
    ranks = sum(factor.shape[0] for factor in lora_A)
    return x.new_empty((math.prod(x.shape[:-1]), ranks), dtype=rank_dtype(x.dtype))


def empty_gradients(
    grad_y: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Uninitialised results of the backward operator; a gradient nobody asked for is an empty tensor of shape (0,)."""
    grad_x_shape = (*grad_y.shape[:-1], weight.shape[1])
    likes = (weight, lora_A, lora_B, grad_y if bias is None else bias, lora_A if gate is None else gate)
    grad_x = grad_y.new_empty(grad_x_shape if needs[0] else (0,))
    return grad_x, *(like.new_empty(like.shape if need else (0,)) for like, need in zip(likes, needs[1:], strict=True))


def _backward_fake(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    shrink: Tensor | None,
    gate: Tensor | None,
    *shared: Any,
) -> tuple[Tensor, ...]:
    check_backward(grad_y, x, weight, lora_A, lora_B, bias, shrink, gate, *shared)
    return empty_gradients(grad_y, weight, lora_A, lora_B, bias, gate, shared[-1])


for _name in IMPLEMENTATIONS:
    library.define(_FORWARD.format(name=_name))
    library.define(_BACKWARD.format(name=_name))
    library.define(_SHRINK.format(name=_name))
    torch.library.register_fake(f"peftkernels::lora_linear_fwd.{_name}", _forward_fake, lib=library)
    torch.library.register_fake(f"peftkernels::lora_linear_bwd.{_name}", _backward_fake, lib=library)
    torch.library.register_fake(f"peftkernels::lora_shrink.{_name}", _shrink_fake, lib=library)


def implement(name: str, forward: Callable[..., Any], backward: Callable[..., Any], shrink: Callable[..., Any]) -> None:
    """Implement the overloads of ``name`` on every device by functions of Python, which need not check arguments."""
    for operator, check, function in (
        ("lora_linear_fwd", check_forward, forward),
        ("lora_linear_bwd", check_backward, backward),
        ("lora_shrink", check_shrink, shrink),
    ):
        library.impl(f"{operator}.{name}", checked(check, function), "CompositeExplicitAutograd")


@register_flop_formula(torch.ops.peftkernels.lora_linear_fwd)
def _forward_flops(
    x_shape: Any, weight_shape: Any, a_shape: Any, *args: Any, given_shrink: Any = None, **kwargs: Any
) -> int:
    """2MNK + 2MrN, and 2MrK for an S that is not given; every rank counts: no formula reads a mask on the device."""
    rows, (n, k) = math.prod(x_shape[:-1]), weight_shape
    # Shapes come by position where the operator's arguments do: eleven stand between lora_A and given_shrink.
    given = given_shrink is not None or (len(args) > 11 and args[11] is not None)
    return 2 * rows * n * k + 2 * rows * a_shape[0] * (n if given else n + k)


@register_flop_formula(torch.ops.peftkernels.lora_shrink)
def _shrink_flops(x_shape: Any, factor_shapes: Any, *args: Any, **kwargs: Any) -> int:
    """2MK·Σr."""
    return 2 * math.prod(x_shape) * sum(shape[0] for shape in factor_shapes)


@register_flop_formula(torch.ops.peftkernels.lora_linear_bwd)
def _backward_flops(grad_shape: Any, x_shape: Any, weight_shape: Any, a_shape: Any, *args: Any, **kwargs: Any) -> int:
    """2MNK for ∂x and as much for ∂W, 2MrN for H, 2MrK for the adapter's share of ∂x, 2MrK for ∂A, 2MrN for ∂B."""
    rows = math.prod(grad_shape[:-1])
    needs_x, needs_weight, needs_A, needs_B, _, needs_gate = args[-1]
    rank, (n, k) = a_shape[0], weight_shape
    flops = 2 * rows * n * k * (needs_x + needs_weight)
    flops += 2 * rows * rank * n * (needs_x or needs_A or needs_gate) + 2 * rows * rank * k * needs_x
    return flops + 2 * rows * rank * (k * needs_A + n * needs_B)
