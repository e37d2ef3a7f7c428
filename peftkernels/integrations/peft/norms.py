"""DoRA's norms ‖W_n + s·B_n·A‖, and the one place where they may be kept from one call to the next."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from peftkernels._autocast import without_autocast
from peftkernels.functional.frozen_weights import generation
from peftkernels.ops.call import Adapter

# Rows of a weight of low precision that are in float32 at a time.
_ROWS = 1024


@torch.no_grad()
def row_norms(weight: Tensor, adapter: Adapter) -> Tensor:
    """‖W_n + s·B_n·A‖ (N,) in float32, or in float64 where the weight or the factors are.

    From the factors, without the N·K numbers of a product B·A: with U = s·B,

        ‖W_n + U_n·A‖² = ‖W_n‖² + U_n·(2·A·W_nᵀ + A·Aᵀ·U_nᵀ)
    """
    with without_autocast(weight.device.type):
        return _row_norms(weight, adapter)


def _row_norms(weight: Tensor, adapter: Adapter) -> Tensor:
    lora_A, lora_B = adapter.lora_A, adapter.lora_B
    dtype = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
    lora_A, up = lora_A.to(dtype), lora_B.to(dtype) * adapter.scale
    # As many columns as ranks, and as rows.
    across, gram = lora_A.t(), lora_A @ lora_A.t()
    if weight.dtype is dtype or weight.shape[0] <= _ROWS:
        return _of_rows(weight.to(dtype), up, across, gram)
    rows = zip(weight.split(_ROWS), up.split(_ROWS), strict=True)
    return torch.cat([_of_rows(some.to(dtype), theirs, across, gram) for some, theirs in rows])


def _of_rows(weight: Tensor, up: Tensor, across: Tensor, gram: Tensor) -> Tensor:
    mixed = torch.addmm(up @ gram, weight, across, alpha=2).mul_(up).sum(1)
    # Rounding can take the square of a row that cancels below zero.
    return torch.linalg.vector_norm(weight, dim=1).square_().add_(mixed).clamp_min_(0).sqrt_()


class _Norms(NamedTuple):
    norms: Tensor
    read: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int | None, ...]
    generation: int
    scaling: float


class KeptNorms:
    """The norms of one module's adapters inside `frozen`, where no weight and no factor is written.

    They are those of the very tensors that they were made of, whatever was deleted, loaded or exchanged in between. A
    scaling that is a tensor could change without being another: nothing is kept then.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Norms] = {}

    def of(self, name: str, base: Tensor, weight: Tensor, adapter: Adapter) -> Tensor:
        """`row_norms` of the adapter ``name``; base: the weight as its module holds it, which may be transposed."""
        scaling = adapter.scale
        if isinstance(scaling, Tensor):
            return row_norms(weight, adapter)
        read = base, adapter.lora_A, adapter.lora_B
        versions = tuple(None if tensor.is_inference() else tensor._version for tensor in read)
        kept = self._kept.get(name)
        if (
            kept is None
            or kept.scaling != scaling
            or kept.versions != versions
            or kept.generation != generation()
            or any(one() is not tensor for one, tensor in zip(kept.read, read, strict=True))
        ):
            made_in = generation()
            norms = row_norms(weight, adapter)
            kept = self._kept[name] = _Norms(norms, tuple(map(weakref.ref, read)), versions, made_in, scaling)
        return kept.norms
