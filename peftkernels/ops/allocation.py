"""Schemas and fake implementations of the operators of rank allocation; `allocation.kernels` says what they mean.

A table has one row (offset, rows, columns) for every factor, int64, on the CPU. The operators write to tensors in place
and are not differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkernels.ops.schemas import library

_SCHEMAS = {
    "averages": "(Tensor[] parameters, Tensor?[] gradients, Tensor table, Tensor(a!) sensitivity, "
    "Tensor(b!) uncertainty, float beta1, float beta2, Tensor? skip, bool with_scores) "
    "-> (Tensor finite, Tensor scores)",
    "scores": "(Tensor table, Tensor sensitivity, Tensor uncertainty) -> Tensor scores",
    "mask": "(Tensor keep, Tensor? mask_now, Tensor(a!)[] gates, Tensor(b!)[] states, Tensor(c!)[] orders, "
    "Tensor(d!)[] counts, int masked_state) -> ()",
    "orthogonality": "(Tensor[] lora_A, Tensor[] lora_B, float weight, Tensor[] keep, Tensor(a!)[] add_to, "
    "float scale, bool gradients) -> (Tensor term, Tensor[] gradients)",
}

for _name, _schema in _SCHEMAS.items():
    library.define(f"allocation_{_name}.cpu{_schema}")


def _one_device(first: Tensor, *others: Tensor | Sequence[Tensor | None] | None) -> None:
    """A fake is also what runs where one of the tensors lies on the meta device: it must not do nothing instead."""
    for other in others:
        for value in other if isinstance(other, (list, tuple)) else (other,):
            if isinstance(value, Tensor) and value.device != first.device:
                raise ValueError(f"found tensors on the devices {first.device} and {value.device}, expected one device")


@torch.library.register_fake("peftkernels::allocation_averages.cpu", lib=library)
def _averages(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    table: Tensor,
    sensitivity: Tensor,
    uncertainty: Tensor,
    beta1: float,
    beta2: float,
    skip: Tensor | None,
    with_scores: bool,
) -> tuple[Tensor, Tensor]:
    _one_device(sensitivity, table, uncertainty, skip, parameters, gradients)
    # There are scores only where the averages were updated, which their values decide.
    count = torch.library.get_ctx().new_dynamic_size() if with_scores else 0
    return sensitivity.new_empty((), dtype=torch.bool), sensitivity.new_empty((count,))


@torch.library.register_fake("peftkernels::allocation_scores.cpu", lib=library)
def _scores(table: Tensor, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
    _one_device(sensitivity, table, uncertainty)
    # The table is data: how many ranks it has is known when the operator runs.
    return sensitivity.new_empty((torch.library.get_ctx().new_dynamic_size(),))


@torch.library.register_fake("peftkernels::allocation_mask.cpu", lib=library)
def _mask(
    keep: Tensor,
    mask_now: Tensor | None,
    gates: Sequence[Tensor],
    states: Sequence[Tensor],
    orders: Sequence[Tensor],
    counts: Sequence[Tensor],
    masked_state: int,
) -> None:
    _one_device(keep, mask_now, gates, states, orders, counts)


@torch.library.register_fake("peftkernels::allocation_orthogonality.cpu", lib=library)
def _orthogonality(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    weight: float,
    keep: Sequence[Tensor],
    add_to: Sequence[Tensor],
    scale: float,
    gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    factors = [*lora_A, *lora_B]
    _one_device(factors[0], factors, keep, add_to)
    in_double = any(factor.dtype is torch.float64 for factor in factors)
    term = factors[0].new_empty((), dtype=torch.float64 if in_double else torch.float32)
    if add_to or not gradients:
        return term, []
    return term, [
        factor.new_empty(factor.shape, dtype=torch.promote_types(factor.dtype, torch.float32)) for factor in factors
    ]
