"""Checks of `lora_linear`'s arguments: every error names the argument, what was found and what was expected."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from peftkernels._autocast import CASTABLE, autocast_dtype, autocast_enabled
from peftkernels.ops import rules
from peftkernels.ops.rank_plan import RankPlan, check_plan, check_values
from peftkernels.ops.rules import FLOATS, rank_dtype

__all__ = ["FLOATS", "check_arguments", "check_shared_shrink", "plain_number"]
_INT64 = 2**63
_NUMBERS = (int, float, torch.SymFloat, torch.SymInt)


def _matches_x(name: str, value: Tensor, x: Tensor) -> None:
    """The frozen tensors share x's dtype, except under autocast, which casts both sides."""
    if value.dtype == x.dtype:
        return
    if autocast_enabled(x.device.type) and x.dtype in CASTABLE and value.dtype in CASTABLE:
        return
    raise TypeError(f"{name}: found dtype {value.dtype}, expected x's, {x.dtype}")


def _check_plan(plan: Any, r: int, x: Tensor) -> None:
    if not isinstance(plan, RankPlan):
        raise TypeError(f"rank_plan: found {type(plan).__name__}, expected a RankPlan")
    if plan.state.shape[0] != r:
        raise ValueError(f"rank_plan: found {plan.state.shape[0]} ranks, expected r = {r}")
    check_plan(plan.state, plan.order, plan.counts, "rank_plan.")
    rules.device("rank_plan", plan.state, x)


def _check_scaling(scaling: Any, x: Tensor) -> None:
    if isinstance(scaling, Tensor):
        rules.scaling(scaling, x)
        if scaling.requires_grad:
            raise ValueError("scaling: found a tensor that requires grad, expected one that does not (gate may)")
    elif isinstance(scaling, bool) or (not isinstance(scaling, _NUMBERS) and not isinstance(scaling, Real)):
        raise TypeError(f"scaling: found {type(scaling).__name__}, expected a float or a 0-dim tensor")
    elif isinstance(scaling, int) and abs(scaling) > sys.float_info.max:
        raise ValueError("scaling: found an int that no float can hold, expected a float or a 0-dim tensor")


def _check_dropout(p: Any, seed: Any, x: Tensor) -> None:
    if isinstance(p, bool) or (not isinstance(p, (int, float)) and not isinstance(p, Real)):
        raise TypeError(f"dropout_p: found {type(p).__name__}, expected a float in [0, 1]")
    rules.probability(p)
    if seed is None:
        return
    if isinstance(seed, Tensor):
        rules.seed(seed, x)
    elif isinstance(seed, bool) or (not isinstance(seed, (int, torch.SymInt)) and not isinstance(seed, Integral)):
        raise TypeError(f"dropout_seed: found {type(seed).__name__}, expected an int or a 0-dim int64 tensor")
    elif not -_INT64 <= int(seed) < _INT64:
        raise ValueError(f"dropout_seed: found {seed}, expected a value that fits in int64")


def plain_number(value: Any, kind: type = float) -> Any:
    """A checked number that is not Python's own, such as NumPy's, as one; tensors and symbolic numbers as they are."""
    if type(value) is kind or value is None or isinstance(value, (Tensor, torch.SymFloat, torch.SymInt)):
        return value
    return kind(value)


def _check_shrink(shrink: Any, r: int, dropout_p: float, x: Tensor) -> None:
    rules.float_tensor("shrink", shrink)
    rules.shape("shrink", shrink, (x.shape[:-1].numel(), r), "(M, r)")
    computed = autocast_dtype(x.dtype, x.device.type)
    expected = rank_dtype(computed)
    if shrink.dtype != expected:
        raise TypeError(f"shrink: found dtype {shrink.dtype}, expected {expected} where x is computed in {computed}")
    rules.device("shrink", shrink, x)
    if shrink.requires_grad:
        raise ValueError("shrink: found a tensor that requires grad, expected one that does not (x and lora_A may)")
    if dropout_p > 0:
        raise ValueError(f"shrink: found one beside dropout_p = {dropout_p}, expected dropout_p = 0: it has no mask")


def check_shared_shrink(x: Any, lora_A: Any) -> None:
    """Raise TypeError or ValueError for the first argument of `shared_shrink` that cannot be used."""
    rules.float_tensor("x", x)
    if not x.shape:
        raise ValueError("x: found a 0-dim tensor, expected shape (..., K)")
    if isinstance(lora_A, Tensor) or not isinstance(lora_A, Sequence):
        raise TypeError(f"lora_A: found {type(lora_A).__name__}, expected a sequence of tensors (r, K)")
    if not lora_A:
        raise ValueError("lora_A: found no tensor, expected one for each adapter")
    for place, factor in enumerate(lora_A):
        rules.factor(f"lora_A[{place}]", factor, x)
    if rules.has_memory():
        rules.backed("x", x)
        for place, factor in enumerate(lora_A):
            rules.backed(f"lora_A[{place}]", factor)


def _check_memory(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    plan: RankPlan | None,
    scaling: Any,
    seed: Any,
    shrink: Tensor | None,
) -> None:
    """What can be read is there, and a plan on the CPU, which costs nothing to read, is one."""
    rules.backed("x", x)
    rules.backed("weight", weight)
    rules.backed("lora_A", lora_A)
    rules.backed("lora_B", lora_B)
    optional = (("bias", bias), ("gate", gate), ("scaling", scaling), ("dropout_seed", seed), ("shrink", shrink))
    for name, value in optional:
        if isinstance(value, Tensor):
            rules.backed(name, value)
    if plan is not None:
        check_values(plan.state, plan.order, plan.counts)


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
    rules.matrices("x", x, 1, weight, lora_A, lora_B)
    _matches_x("weight", weight, x)
    n, r = lora_B.shape
    if bias is not None:
        rules.bias(bias, n, x)
        _matches_x("bias", bias, x)
    if gate is not None:
        rules.gate(gate, r, x)
    if rank_plan is not None:
        _check_plan(rank_plan, r, x)
    if type(scaling) is not float:
        _check_scaling(scaling, x)
    if type(dropout_p) is not float or dropout_p != 0.0 or dropout_seed is not None:
        _check_dropout(dropout_p, dropout_seed, x)
    if shrink is not None:
        _check_shrink(shrink, r, dropout_p, x)
    if rules.has_memory():
        _check_memory(x, weight, lora_A, lora_B, bias, gate, rank_plan, scaling, dropout_seed, shrink)
