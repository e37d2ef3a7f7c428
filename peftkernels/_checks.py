"""Checks of `lora_linear`'s arguments: every error names the argument, what was found and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkernels._autocast import CASTABLE, autocast_dtype, autocast_enabled
from peftkernels._ops import rank_dtype
from peftkernels.rank_plan import RankPlan

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_INT64 = 2**63


def _float_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: found {type(value).__name__}, expected a tensor")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: found dtype {value.dtype}, expected float32, bfloat16, float16 or float64")
    if not _dense(value):
        found = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: found {found}, expected a dense tensor")


def _dense(value: Tensor) -> bool:
    """Return True if the tensor has sizes and strides, as sparse, nested and oneDNN's tensors have not."""
    return value.layout is torch.strided and not value.is_nested


def _shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: found shape {tuple(value.shape)}, expected {meaning} = {expected}")


def _device(name: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(f"{name}: found device {value.device}, expected x's, {x.device}")


def _matches_x(name: str, value: Tensor, x: Tensor) -> None:
    """The frozen tensors share x's dtype, except under autocast, which casts both sides."""
    if value.dtype == x.dtype:
        return
    if autocast_enabled(x.device.type) and x.dtype in CASTABLE and value.dtype in CASTABLE:
        return
    raise TypeError(f"{name}: found dtype {value.dtype}, expected x's, {x.dtype}")


def _check_gate(gate: Any, r: int, x: Tensor) -> None:
    _float_tensor("gate", gate)
    if tuple(gate.shape) not in ((r,), (r, 1)):
        raise ValueError(f"gate: found shape {tuple(gate.shape)}, expected (r,) = ({r},) or (r, 1) = ({r}, 1)")
    _device("gate", gate, x)


def _check_plan(plan: Any, r: int, x: Tensor) -> None:
    if not isinstance(plan, RankPlan):
        raise TypeError(f"rank_plan: found {type(plan).__name__}, expected a RankPlan")
    if plan.state.shape[0] != r:
        raise ValueError(f"rank_plan: found {plan.state.shape[0]} ranks, expected r = {r}")
    _device("rank_plan", plan.state, x)


def _check_scaling(scaling: Any, x: Tensor) -> None:
    if isinstance(scaling, Tensor):
        if scaling.dim() != 0:
            raise ValueError(f"scaling: found shape {tuple(scaling.shape)}, expected a float or a 0-dim tensor")
        _float_tensor("scaling", scaling)
        _device("scaling", scaling, x)
        if scaling.requires_grad:
            raise ValueError("scaling: found a tensor that requires grad, expected one that does not (gate may)")
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scaling: found {type(scaling).__name__}, expected a float or a 0-dim tensor")


def _check_dropout(p: Any, seed: Any, x: Tensor) -> None:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"dropout_p: found {type(p).__name__}, expected a float in [0, 1]")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p: found {p}, expected a float in [0, 1]")
    if seed is None:
        return
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"dropout_seed: found dtype {seed.dtype}, expected torch.int64")
        if seed.dim() != 0:
            raise ValueError(f"dropout_seed: found shape {tuple(seed.shape)}, expected a 0-dim tensor")
        _device("dropout_seed", seed, x)
    elif isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"dropout_seed: found {type(seed).__name__}, expected an int or a 0-dim int64 tensor")
    elif not -_INT64 <= seed < _INT64:
        raise ValueError(f"dropout_seed: found {seed}, expected a value that fits in int64")


def _check_shrink(shrink: Any, r: int, dropout_p: float, x: Tensor) -> None:
    _float_tensor("shrink", shrink)
    _shape("shrink", shrink, (x.shape[:-1].numel(), r), "(M, r)")
    computed = autocast_dtype(x.dtype, x.device.type)
    expected = rank_dtype(computed)
    if shrink.dtype != expected:
        raise TypeError(f"shrink: found dtype {shrink.dtype}, expected {expected} where x is computed in {computed}")
    _device("shrink", shrink, x)
    if shrink.requires_grad:
        raise ValueError("shrink: found a tensor that requires grad, expected one that does not (x and lora_A may)")
    if dropout_p > 0:
        raise ValueError(f"shrink: found one beside dropout_p = {dropout_p}, expected dropout_p = 0: it has no mask")


def check_shared_shrink(x: Any, lora_A: Any) -> None:
    """Raise TypeError or ValueError for the first argument of `shared_shrink` that cannot be used."""
    _float_tensor("x", x)
    if not x.shape:
        raise ValueError("x: found a 0-dim tensor, expected shape (..., K)")
    if isinstance(lora_A, Tensor) or not isinstance(lora_A, Sequence):
        raise TypeError(f"lora_A: found {type(lora_A).__name__}, expected a sequence of tensors (r, K)")
    if not lora_A:
        raise ValueError("lora_A: found no tensor, expected one for each adapter")
    for place, factor in enumerate(lora_A):
        name = f"lora_A[{place}]"
        _float_tensor(name, factor)
        if factor.dim() != 2 or factor.shape[1] != x.shape[-1]:
            raise ValueError(f"{name}: found shape {tuple(factor.shape)}, expected (r, K) with x's K = {x.shape[-1]}")
        _device(name, factor, x)


def check_arguments(
    x: Any,
    weight: Any,
    lora_A: Any,
    lora_B: Any,
    bias: Any,
    gate: Any,
    rank_plan: Any,
    scaling: Any,
    dropout_p: Any,
    dropout_seed: Any,
    shrink: Any,
) -> None:
    """Raise TypeError or ValueError for the first argument of `lora_linear` that does not fit the others."""
    for name, value in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(value, Tensor) or value.dtype not in FLOATS or not _dense(value):
            _float_tensor(name, value)
    x_shape = x.shape
    if not x_shape:
        raise ValueError("x: found a 0-dim tensor, expected shape (..., K)")
    if weight.dim() != 2:
        raise ValueError(f"weight: found shape {tuple(weight.shape)}, expected (N, K)")
    n, k = weight.shape
    if x_shape[-1] != k:
        raise ValueError(f"x: found shape {tuple(x_shape)}, expected (..., K) with weight's K = {k}")
    if lora_A.dim() != 2 or lora_A.shape[1] != k:
        raise ValueError(f"lora_A: found shape {tuple(lora_A.shape)}, expected (r, K) with weight's K = {k}")
    r = lora_A.shape[0]
    if lora_B.shape != (n, r):
        _shape("lora_B", lora_B, (n, r), "(N, r)")
    if lora_B.dtype != lora_A.dtype:
        raise TypeError(f"lora_B: found dtype {lora_B.dtype}, expected lora_A's, {lora_A.dtype}")
    _matches_x("weight", weight, x)
    if not x.device == weight.device == lora_A.device == lora_B.device:
        for name, value in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
            _device(name, value, x)
    if bias is not None:
        _float_tensor("bias", bias)
        if bias.shape != (n,):
            _shape("bias", bias, (n,), "(N,)")
        _matches_x("bias", bias, x)
        _device("bias", bias, x)
    if gate is not None:
        _check_gate(gate, r, x)
    if rank_plan is not None:
        _check_plan(rank_plan, r, x)
    if type(scaling) is not float:
        _check_scaling(scaling, x)
    if type(dropout_p) is not float or dropout_p != 0.0 or dropout_seed is not None:
        _check_dropout(dropout_p, dropout_seed, x)
    if shrink is not None:
        _check_shrink(shrink, r, dropout_p, x)
