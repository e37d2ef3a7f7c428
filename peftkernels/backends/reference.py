"""`reference.py` behind the operators: slow, exact at any precision, for checking the others through the same door."""

from __future__ import annotations

from torch import Tensor

from peftkernels._autocast import without_autocast
from peftkernels.ops import reference, schemas


def _forward(
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
    scale = scaling if scaling_tensor is None else scaling_tensor
    with without_autocast(x.device.type):
        y, shrink = reference.lora_linear_forward(
            x, weight, lora_A, lora_B, bias, gate, rank_state, scale, dropout_p, dropout_seed, given_shrink
        )
    return y, shrink if save_shrink and given_shrink is None else shrink.new_empty((0, lora_A.shape[0]))


def _backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    shrink: Tensor | None,
    gate: Tensor | None,
    rank_state: Tensor | None,
    rank_order: Tensor | None,
    rank_counts: Tensor | None,
    scaling: float,
    scaling_tensor: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    scale = scaling if scaling_tensor is None else scaling_tensor
    # What is missing was not saved because no gradient asked for it: any value serves.
    rows = grad_y.new_zeros((*grad_y.shape[:-1], weight.shape[1])) if x is None else x
    if shrink is None:
        shape = (grad_y.shape[:-1].numel(), lora_A.shape[0])
        shrink = grad_y.new_zeros(shape, dtype=reference.rank_dtype(grad_y.dtype))
    with without_autocast(grad_y.device.type):
        gradients = reference.lora_linear_backward(
            grad_y, rows, weight, lora_A, lora_B, gate, shrink, rank_state, scale, dropout_p, dropout_seed
        )
    empty = schemas.empty_gradients(grad_y, weight, lora_A, lora_B, bias, gate, [False] * 6)
    return tuple(
        gradient.to(nothing.dtype) if need else nothing
        for gradient, nothing, need in zip(gradients, empty, needs, strict=True)
    )


def _shrink(x: Tensor, lora_A: list[Tensor]) -> Tensor:
    with without_autocast(x.device.type):
        return reference.lora_shrink(x, lora_A)


def register() -> None:
    """Implement the `.reference` overloads on every device."""
    schemas.implement("reference", _forward, _backward, _shrink)
