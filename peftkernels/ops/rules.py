"""Rules about single tensors that all checks share; every error names the argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from peftkernels.ops.weights import FrozenWeight

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_PLAIN = (Tensor, Parameter)


def rank_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of factors, S and H in a call whose x has `dtype`: float32 for float16, else that of x.

    Float16 ends at 65504 and at 6e-8: G·B of a young B, or S times a large scaling, would become zeros or infinities.
    """
    return torch.float32 if dtype is torch.float16 else dtype


def float_tensor(name: str, value: Any) -> None:
    """A dense tensor of floats."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: found {type(value).__name__}, expected a tensor")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: found dtype {value.dtype}, expected float32, bfloat16, float16 or float64")
    dense(name, value)


def dense(name: str, value: Tensor) -> None:
    if value.is_nested:
        raise TypeError(f"{name}: found a nested tensor, expected a dense one")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: found layout {value.layout}, expected a dense tensor")


def shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: found shape {tuple(value.shape)}, expected {meaning} = {expected}")


def device(name: str, value: Tensor | FrozenWeight, x: Tensor, first: str = "x") -> None:
    if value.device != x.device:
        raise ValueError(f"{name}: found device {value.device}, expected {first}'s, {x.device}")


def of_dtype(name: str, value: Tensor, expected: torch.dtype) -> None:
    if value.dtype != expected:
        raise TypeError(f"{name}: found dtype {value.dtype}, expected {expected}")


def has_memory() -> bool:
    """Return True if tensors of this thread are what they are, not stand-ins that a tracer or a transform looks at."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def backed(name: str, value: Tensor) -> None:
    """The storage is there and holds all elements: it may have been freed (FSDP, offloading) or made smaller."""
    if type(value) not in _PLAIN:
        return
    held = value.untyped_storage().nbytes()
    if value.is_contiguous():
        needed = value.storage_offset() * value.element_size() + value.nbytes if value.numel() else 0
    else:
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        needed = (value.storage_offset() + last + 1) * value.element_size() if value.numel() else 0
    if held < needed:
        raise ValueError(f"{name}: found a storage of {held} bytes, expected {needed}: it was freed or made smaller")


def matrices(name: str, first: Any, side: int, weight: Any, lora_A: Any, lora_B: Any) -> None:
    """``first``, x (..., K) or y's gradient (..., N), by the ``side`` of weight that it meets, and the matrices."""
    for named, value in ((name, first), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if (
            not isinstance(value, Tensor)
            or value.dtype not in FLOATS
            or value.layout is not torch.strided
            or value.is_nested
        ) and not (named == "weight" and isinstance(value, FrozenWeight)):
            float_tensor(named, value)
    found = first.shape
    letter = "NK"[side]
    if not found:
        raise ValueError(f"{name}: found a 0-dim tensor, expected shape (..., {letter})")
    if len(weight.shape) != 2:
        raise ValueError(f"weight: found shape {tuple(weight.shape)}, expected (N, K)")
    n, k = weight.shape
    size = k if side == 1 else n
    if found[-1] != size:
        raise ValueError(
            f"{name}: found shape {tuple(found)}, expected (..., {letter}) with weight's {letter} = {size}"
        )
    if lora_A.dim() != 2 or lora_A.shape[1] != k:
        raise ValueError(f"lora_A: found shape {tuple(lora_A.shape)}, expected (r, K) with weight's K = {k}")
    r = lora_A.shape[0]
    if lora_B.shape != (n, r):
        shape("lora_B", lora_B, (n, r), "(N, r)")
    if lora_B.dtype != lora_A.dtype:
        raise TypeError(f"lora_B: found dtype {lora_B.dtype}, expected lora_A's, {lora_A.dtype}")
    if not first.device == weight.device == lora_A.device == lora_B.device:
        for named, value in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
            device(named, value, first, name)


def bias(value: Any, n: int, first: Tensor, name: str = "x") -> None:
    float_tensor("bias", value)
    if value.shape != (n,):
        shape("bias", value, (n,), "(N,)")
    device("bias", value, first, name)


def gate(value: Any, r: int, first: Tensor, name: str = "x") -> None:
    float_tensor("gate", value)
    if tuple(value.shape) not in ((r,), (r, 1)):
        raise ValueError(f"gate: found shape {tuple(value.shape)}, expected (r,) = ({r},) or (r, 1) = ({r}, 1)")
    device("gate", value, first, name)


def scaling(value: Tensor, first: Tensor, name: str = "x") -> None:
    dense("scaling", value)
    if value.dim() != 0:
        raise ValueError(f"scaling: found shape {tuple(value.shape)}, expected a float or a 0-dim tensor")
    float_tensor("scaling", value)
    device("scaling", value, first, name)


def seed(value: Tensor, first: Tensor, name: str = "x") -> None:
    of_dtype("dropout_seed", value, torch.int64)
    dense("dropout_seed", value)
    if value.dim() != 0:
        raise ValueError(f"dropout_seed: found shape {tuple(value.shape)}, expected a 0-dim tensor")
    device("dropout_seed", value, first, name)


def probability(value: Any) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"dropout_p: found {value}, expected a float in [0, 1]")


def factor(name: str, value: Any, x: Tensor) -> None:
    """A factor (r, K) of one of several adapters of x."""
    float_tensor(name, value)
    if value.dim() != 2 or value.shape[1] != x.shape[-1]:
        raise ValueError(f"{name}: found shape {tuple(value.shape)}, expected (r, K) with x's K = {x.shape[-1]}")
    device(name, value, x)
