"""A call's tensors as kernels take them, and what the plan of a call depends on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from peftkernels._autocast import without_autocast
from peftkernels.backends.triton.common.dropout import threshold
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import overlaps

_LARGEST = 2**31 - 1
NO_DROPOUT = (0, 1.0)


def rows_of(tensor: Tensor) -> Tensor:
    """(..., C) as (M, C) whose rows are contiguous and do not overlap; a view where that is possible."""
    columns = tensor.shape[-1]
    rows = tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[:-1].numel(), columns)
    row_stride, column_stride = rows.stride()
    if column_stride == 1 and columns <= row_stride <= _LARGEST:
        return rows
    # One row may have any stride and count as contiguous.
    return rows.contiguous().as_strided(rows.shape, (columns, 1))


def is_aligned(tensors: Iterable[Tensor], *sizes: int) -> bool:
    """Whether all tensors start at multiples of 16 bytes and all sizes are multiples of 16."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    for size in sizes:
        bits |= size
    return bits & 15 == 0


def dense(tensor: Tensor | None) -> Tensor | None:
    """Contiguous; a view where possible."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def dropped(p: float, seed: Tensor | None) -> tuple[int, float]:
    """The least word that keeps an element and the factor of kept ones, as kernels take them."""
    return NO_DROPOUT if seed is None else threshold(p)


def fp32_precision(dtype: torch.dtype) -> str:
    """How fp32 products are taken: "tf32" where torch's own matmuls may, else "ieee"."""
    if dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def kinds_of(
    rows: Tensor,
    lora_A: Tensor,
    gate: Tensor | None,
    scaling_tensor: Tensor | None,
    counts: Tensor | None,
    seed: Tensor | None,
    bias: Tensor | None,
    aligned: bool,
) -> Kinds:
    """The call of which these are the operands, as the compiler sees it; rows: of x, or of G."""
    r, k = lora_A.shape
    return Kinds(
        x=rows.dtype,
        factor=lora_A.dtype,
        gate=None if gate is None else gate.dtype,
        scaling=None if scaling_tensor is None else scaling_tensor.dtype,
        plan=counts is not None,
        dropout=seed is not None,
        bias=bias is not None,
        aligned=aligned,
        even_rank=r % 16 == 0,
        whole=k % 4 == 0,
        precision=fp32_precision(rows.dtype),
        pdl=overlaps(rows.device),
    )


_HERE = nullcontext()


def place(tensor: Tensor) -> Any:
    """A context in which kernels run on the tensor's device, with the operators' own dtypes."""
    kind = "cuda" if tensor.is_cuda else "cpu"
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return _elsewhere(tensor.device)
    return without_autocast(kind) if torch.is_autocast_enabled(kind) else _HERE


@contextmanager
def _elsewhere(device: torch.device) -> Iterator[None]:
    with torch.cuda.device(device), without_autocast(device.type):
        yield
