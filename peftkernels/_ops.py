"""Every operator's schema, fake implementation and FLOP formula. Backends only implement what is declared here.

`peftkernels::lora_linear_fwd` and `peftkernels::lora_linear_bwd` have one overload per implementation (`.reference`,
`.eager`, `.cpu`, `.triton`), all with the same arguments, so that the choice made by `dispatch` is part of a traced
program. `reference.py` says what they compute. The dtype of x is the dtype of computation: weight, bias, factors and
gate are cast to it, x never is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

IMPLEMENTATIONS = ("reference", "eager", "cpu", "triton")

_SHARED = (
    "Tensor? gate, Tensor? rank_state, Tensor? rank_order, Tensor? rank_counts, "
    "float scaling, Tensor? scaling_tensor, float dropout_p, Tensor? dropout_seed"
)
_FORWARD = (
    "lora_linear_fwd.{name}(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, "
    f"{_SHARED}, bool save_shrink) -> (Tensor y, Tensor shrink)"
)
_BACKWARD = (
    "lora_linear_bwd.{name}(Tensor grad_y, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, "
    "Tensor? shrink, "
    f"{_SHARED}, bool[6] needs) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_A, Tensor grad_B, "
    "Tensor grad_bias, Tensor grad_gate)"
)

library = torch.library.Library("peftkernels", "DEF")


def shrink_shape(x: Tensor, lora_A: Tensor, save_shrink: bool) -> tuple[int, int]:
    """(M, r) when the backward pass needs S, else (0, r)."""
    return (math.prod(x.shape[:-1]) if save_shrink else 0, lora_A.shape[0])


def _forward_fake(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, *shared: Any
) -> tuple[Tensor, Tensor]:
    save_shrink: bool = shared[-1]
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty(shrink_shape(x, lora_A, save_shrink))


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
    return empty_gradients(grad_y, weight, lora_A, lora_B, bias, gate, shared[-1])


for _name in IMPLEMENTATIONS:
    library.define(_FORWARD.format(name=_name))
    library.define(_BACKWARD.format(name=_name))
    torch.library.register_fake(f"peftkernels::lora_linear_fwd.{_name}", _forward_fake, lib=library)
    torch.library.register_fake(f"peftkernels::lora_linear_bwd.{_name}", _backward_fake, lib=library)


def _low_rank_flops(rows: int, weight_shape: Any, rank: int) -> int:
    return 2 * rows * rank * (weight_shape[0] + weight_shape[1])


@register_flop_formula(torch.ops.peftkernels.lora_linear_fwd)
def _forward_flops(x_shape: Any, weight_shape: Any, a_shape: Any, *args: Any, **kwargs: Any) -> int:
    """2MNK + 2Mr(K + N), counting every rank: a mask is device data that no formula reads."""
    rows = math.prod(x_shape[:-1])
    return 2 * rows * math.prod(weight_shape) + _low_rank_flops(rows, weight_shape, a_shape[0])


@register_flop_formula(torch.ops.peftkernels.lora_linear_bwd)
def _backward_flops(grad_shape: Any, x_shape: Any, weight_shape: Any, a_shape: Any, *args: Any, **kwargs: Any) -> int:
    """2MNK for ∂x and as much for ∂W, 2MrN for H, 2MrK for the adapter's share of ∂x, 2MrK for ∂A, 2MrN for ∂B."""
    rows = math.prod(grad_shape[:-1])
    needs_x, needs_weight, needs_A, needs_B, _, needs_gate = args[-1]
    rank, (n, k) = a_shape[0], weight_shape
    flops = 2 * rows * n * k * (needs_x + needs_weight)
    flops += 2 * rows * rank * n * (needs_x or needs_A or needs_gate) + 2 * rows * rank * k * needs_x
    return flops + 2 * rows * rank * (k * needs_A + n * needs_B)
