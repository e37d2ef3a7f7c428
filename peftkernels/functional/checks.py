"""Checks of the public functions' arguments: every error names the argument, what was found and what was expected."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from peftkernels._autocast import CASTABLE, autocast_dtype, autocast_enabled
from peftkernels.ops import rules
from peftkernels.ops.call import Adapter, Call, Shrink
from peftkernels.ops.checks import check_memory, check_operands, check_precomputed_shrink, check_shrink
from peftkernels.ops.rank_plan import RankPlan
from peftkernels.ops.weights import Weight

_INT64 = 2**63
_NUMBERS = (int, float, torch.SymFloat, torch.SymInt)


def adapter_of(
    lora_A: Any,
    lora_B: Any,
    gate: Any = None,
    rank_plan: Any = None,
    scaling: Any = 1.0,
    dropout_p: Any = 0.0,
    dropout_seed: Any = None,
) -> Adapter:
    """The adapter of these arguments of `lora_linear`, whose types are checked; `check_call` looks at the rest.

    Raises:
        TypeError: a plan that is no `RankPlan`, or a number of another type.
        ValueError: a scaling that requires grad or that no float holds, a seed that int64 does not hold.
    """
    state = order = counts = scaling_tensor = None
    if rank_plan is not None:
        if not isinstance(rank_plan, RankPlan):
            raise TypeError(f"rank_plan: found {type(rank_plan).__name__}, expected a RankPlan")
        state, order, counts = rank_plan.state, rank_plan.order, rank_plan.counts
    if type(scaling) is not float:
        if isinstance(scaling, Tensor):
            scaling, scaling_tensor = 1.0, _without_gradient(scaling)
        else:
            scaling = _number(scaling)
    if type(dropout_p) is not float or dropout_p != 0.0 or dropout_seed is not None:
        dropout_p, dropout_seed = _probability(dropout_p), _seed(dropout_seed)
    return Adapter(lora_A, lora_B, gate, state, order, counts, scaling, scaling_tensor, dropout_p, dropout_seed)


def _without_gradient(scaling: Tensor) -> Tensor:
    if scaling.requires_grad:
        raise ValueError("scaling: found a tensor that requires grad, expected one that does not (gate may)")
    return scaling


def _number(scaling: Any) -> Any:
    if isinstance(scaling, bool) or (not isinstance(scaling, _NUMBERS) and not isinstance(scaling, Real)):
        raise TypeError(f"scaling: found {type(scaling).__name__}, expected a float or a 0-dim tensor")
    if isinstance(scaling, int) and abs(scaling) > sys.float_info.max:
        raise ValueError("scaling: found an int that no float can hold, expected a float or a 0-dim tensor")
    return _plain(scaling, float)


def _probability(p: Any) -> Any:
    if isinstance(p, bool) or (not isinstance(p, (int, float)) and not isinstance(p, Real)):
        raise TypeError(f"dropout_p: found {type(p).__name__}, expected a float in [0, 1]")
    rules.probability(p)
    return _plain(p, float)


def _seed(seed: Any) -> Any:
    if seed is None or isinstance(seed, Tensor):
        return seed
    if isinstance(seed, bool) or (not isinstance(seed, (int, torch.SymInt)) and not isinstance(seed, Integral)):
        raise TypeError(f"dropout_seed: found {type(seed).__name__}, expected an int or a 0-dim int64 tensor")
    if not -_INT64 <= int(seed) < _INT64:
        raise ValueError(f"dropout_seed: found {seed}, expected a value that fits in int64")
    return _plain(seed, int)


def _plain(value: Any, kind: type) -> Any:
    """A number that is not Python's own, such as NumPy's, as one; symbolic numbers as they are."""
    if type(value) is kind or isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value
    return kind(value)


def check_call(call: Call) -> None:
    """Raise TypeError or ValueError for the first argument of `lora_linear` that does not fit the others."""
    x, adapter = call.x, call.adapter
    check_operands("x", x, call.weight, adapter, call.bias)
    _matches_x("weight", call.weight, x)
    if call.bias is not None:
        _matches_x("bias", call.bias, x)
    if call.shrink is not None:
        computed = autocast_dtype(x.dtype, x.device.type)
        check_precomputed_shrink(call.shrink, "x", x, adapter.lora_A.shape[0], computed, adapter.dropout_p)
        if call.shrink.requires_grad:
            raise ValueError("shrink: found a tensor that requires grad, expected one that does not (x and lora_A may)")
    check_memory(call)


def _matches_x(name: str, value: Weight, x: Tensor) -> None:
    """The frozen tensors share x's dtype, except under autocast, which casts both sides."""
    if value.dtype == x.dtype:
        return
    if autocast_enabled(x.device.type) and x.dtype in CASTABLE and value.dtype in CASTABLE:
        return
    raise TypeError(f"{name}: found dtype {value.dtype}, expected x's, {x.dtype}")


def check_shared_shrink(x: Any, lora_A: Any) -> None:
    """Raise TypeError or ValueError for the first argument of `shared_shrink` that cannot be used."""
    rules.float_tensor("x", x)
    if isinstance(lora_A, Tensor) or not isinstance(lora_A, Sequence):
        raise TypeError(f"lora_A: found {type(lora_A).__name__}, expected a sequence of tensors (r, K)")
    call = Shrink(x, lora_A)
    check_shrink(call)
    check_memory(call)
