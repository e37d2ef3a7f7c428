"""A call's tensors as kernels take them, and what the plan of a call depends on."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from peftkernels._autocast import without_autocast
from peftkernels.backends.triton.common.arguments import AdapterArguments, Numbers
from peftkernels.backends.triton.common.dropout import threshold
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import overlaps
from peftkernels.ops.call import Backward, Forward

_LARGEST = 2**31 - 1


def rows_of(tensor: Tensor) -> Tensor:
    """(..., C) as (M, C) whose rows are contiguous and do not overlap; a view where that is possible."""
    columns = tensor.shape[-1]
    rows = tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[:-1].numel(), columns)
    row_stride, column_stride = rows.stride()
    if column_stride == 1 and columns <= row_stride <= _LARGEST:
        return rows
    # One row may have any stride and count as contiguous.
    return rows.contiguous().as_strided(rows.shape, (columns, 1))


def is_aligned(tensors: Iterable[Tensor | None], sizes: int) -> bool:
    """Return True if all tensors start at multiples of 16 bytes, and sizes, joined by `|`, are multiples of 16."""
    for tensor in tensors:
        if tensor is not None:
            sizes |= tensor.data_ptr()
    return sizes & 15 == 0


def dense(tensor: Tensor | None) -> Tensor | None:
    """Contiguous; a view where possible."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


@functools.lru_cache(maxsize=1024)
def numbers_of(scaling: float, p: float | None) -> Numbers:
    """What a call brings as numbers, as kernels take it; p: None without dropout."""
    if p is None:
        return Numbers(scaling)
    least, keep_scale = threshold(p)
    return Numbers(scaling, keep_scale, least)


def adapter_of(call: Forward | Backward) -> AdapterArguments:
    """The adapter of a call, as kernels take it."""
    seed = call.dropout_seed
    return AdapterArguments(
        call.lora_A.contiguous(),
        call.lora_B.contiguous(),
        dense(call.rank_order),
        dense(call.rank_counts),
        dense(call.gate),
        call.scaling_tensor,
        seed,
        numbers_of(call.scaling, None if seed is None else call.dropout_p),
    )


def fp32_precision(dtype: torch.dtype) -> str:
    """How fp32 products are taken: "tf32" where torch's own matmuls may, else "ieee"."""
    if dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def kinds_of(rows: Tensor, adapter: AdapterArguments, bias: Tensor | None, aligned: bool) -> Kinds:
    """The call of which these are the operands, as the compiler sees it; rows: of x, or of G."""
    lora_A, _, _, counts, gate, scaling_tensor, seed, _ = adapter
    r, k = lora_A.shape
    dtype = rows.dtype
    return _kinds(
        dtype,
        lora_A.dtype,
        None if gate is None else gate.dtype,
        None if scaling_tensor is None else scaling_tensor.dtype,
        counts is not None,
        seed is not None,
        bias is not None,
        aligned,
        r % 16 == 0,
        k % 4 == 0,
        fp32_precision(dtype),
        overlaps(rows.device),
    )


# Looked up in half the time that it takes to make them anew.
_kinds = functools.lru_cache(maxsize=4096)(Kinds)


NOTHING_TO_DO = nullcontext()


def device_guard(tensor: Tensor) -> Any:
    """Return a context in which kernels run on the tensor's device, with the operators' own dtypes."""
    kind = "cpu"
    if tensor.is_cuda:
        kind = "cuda"
        if tensor.get_device() != torch.cuda.current_device():
            return _elsewhere(tensor.device)
    return without_autocast(kind) if torch.is_autocast_enabled(kind) else NOTHING_TO_DO


@contextmanager
def _elsewhere(device: torch.device) -> Iterator[None]:
    with torch.cuda.device(device), without_autocast(device.type):
        yield
