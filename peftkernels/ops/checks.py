"""What calls are asked: what the public functions and the operators share, and what the operators ask.

The operators' checks stand before backends that are written in Python, and in every fake; csrc/check_call.h says the
same for compiled ones. Every error names the argument, what was found and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftkernels.ops import rules
from peftkernels.ops.call import Adapter, Backward, Call, Forward, Needs, Record, Shrink, named_tensors
from peftkernels.ops.rank_plan import check_plan, check_values
from peftkernels.ops.weights import Weight


def check_operands(name: str, first: Tensor, weight: Weight, adapter: Adapter, bias: Tensor | None) -> None:
    """Raise TypeError or ValueError for the first of a call's operands that does not fit the others.

    Args:
        name: "x", or "grad_y".
        first: x (..., K), or the gradient of y (..., N).
        weight: W (N, K).
        adapter: with a seed that is a tensor, an int that the call will make one of, or None.
        bias: (N,), or None.
    """
    rules.matrices(name, first, 1 if name == "x" else 0, weight, adapter.lora_A, adapter.lora_B)
    n, r = adapter.lora_B.shape
    if bias is not None:
        rules.bias(bias, n, first, name)
    if adapter.gate is not None:
        rules.gate(adapter.gate, r, first, name)
    state, order, counts = adapter.rank_state, adapter.rank_order, adapter.rank_counts
    if state is not None or order is not None or counts is not None:
        if state is None or order is None or counts is None:
            raise TypeError("rank_plan: found a part of a plan, expected state, order and counts")
        check_plan(state, order, counts, "rank_plan.")
        rules.shape("rank_plan.state", state, (r,), "(r,)")
        rules.device("rank_plan", state, first, name)
    if adapter.scaling_tensor is not None:
        rules.scaling(adapter.scaling_tensor, first, name)
    rules.probability(adapter.dropout_p)
    if isinstance(adapter.dropout_seed, Tensor):
        rules.seed(adapter.dropout_seed, first, name)


def check_precomputed_shrink(
    shrink: Tensor, name: str, first: Tensor, r: int, computed: torch.dtype, dropout_p: float = 0.0
) -> None:
    """Raise TypeError or ValueError for an S (M, r) that does not fit x or y's gradient, computed in ``computed``."""
    rules.float_tensor("shrink", shrink)
    rules.shape("shrink", shrink, (math.prod(first.shape[:-1]), r), "(M, r)")
    expected = rules.rank_dtype(computed)
    if shrink.dtype != expected:
        where = f"is {computed}" if computed is first.dtype else f"is computed in {computed}"
        raise TypeError(f"shrink: found dtype {shrink.dtype}, expected {expected} where {name} {where}")
    rules.device("shrink", shrink, first, name)
    if dropout_p > 0:
        raise ValueError(f"shrink: found one beside dropout_p = {dropout_p}, expected dropout_p = 0: it has no mask")


def check_memory(call: Call | Record) -> None:
    """Raise ValueError where a tensor's memory was freed, or a plan on the CPU, which costs nothing to read, is none.

    Nothing is looked at where tensors are stand-ins, as a tracer's are.
    """
    if not rules.has_memory():
        return
    for name, tensor in named_tensors(call):
        rules.backed(name, tensor)
    plan = None if isinstance(call, Shrink) else call.adapter if isinstance(call, Call) else call
    if plan is not None and plan.rank_state is not None:
        assert plan.rank_order is not None and plan.rank_counts is not None
        check_values(plan.rank_state, plan.rank_order, plan.rank_counts)


def _check_seed(adapter: Adapter) -> None:
    if adapter.dropout_seed is None and adapter.dropout_p > 0:
        raise TypeError(
            f"dropout_seed: found None beside dropout_p = {adapter.dropout_p}, expected a 0-dim int64 tensor"
        )


def check_forward(call: Forward) -> None:
    """Raise TypeError or ValueError for the first argument of `lora_linear_fwd` that does not fit the others."""
    adapter = call.adapter
    check_operands("x", call.x, call.weight, adapter, call.bias)
    _check_seed(adapter)
    if call.given_shrink is not None:
        r = adapter.lora_A.shape[0]
        check_precomputed_shrink(call.given_shrink, "x", call.x, r, call.x.dtype, adapter.dropout_p)


def check_backward(call: Backward) -> None:
    """Raise TypeError or ValueError for the first argument of `lora_linear_bwd` that does not fit the others."""
    adapter, grad_y, x = call.adapter, call.grad_y, call.x
    check_operands("grad_y", grad_y, call.weight, adapter, call.bias)
    _check_seed(adapter)
    if call.shrink is not None:
        check_precomputed_shrink(call.shrink, "grad_y", grad_y, adapter.lora_A.shape[0], grad_y.dtype)
    if x is not None:
        rules.float_tensor("x", x)
        rows = (*grad_y.shape[:-1], call.weight.shape[1])
        rules.shape("x", x, tuple(rows), "(..., K) with grad_y's rows and weight's K")
        rules.of_dtype("x", x, grad_y.dtype)
        rules.device("x", x, grad_y, "grad_y")
    needs = Needs(*call.needs)
    made_of = {
        "x": (x, needs.weight or needs.lora_A),
        "shrink": (call.shrink, needs.lora_B or needs.gate),
        "bias": (call.bias, needs.bias),
        "gate": (call.gate, needs.gate),
    }
    for name, (value, needed) in made_of.items():
        if needed and value is None:
            raise TypeError(f"{name}: found None, expected a tensor: a gradient that is made of it was asked for")


def check_shrink(call: Shrink) -> None:
    """Raise TypeError or ValueError for the first argument of `lora_shrink` that does not fit the others."""
    rules.float_tensor("x", call.x)
    if not call.x.shape:
        raise ValueError("x: found a 0-dim tensor, expected shape (..., K)")
    if not call.lora_A:
        raise ValueError("lora_A: found no tensor, expected one for each adapter")
    for place, factor in enumerate(call.lora_A):
        rules.factor(f"lora_A[{place}]", factor, call.x)


def checked(
    record: type[Forward] | type[Backward] | type[Shrink], check: Callable[[Any], None], function: Callable[[Any], Any]
) -> Callable[..., Any]:
    """An operator's function, which takes its arguments one by one: the function of a record, behind its check."""

    def operator(*arguments: Any) -> Any:
        call = record(*arguments)
        check(call)
        check_memory(call)
        return function(call)

    return operator
