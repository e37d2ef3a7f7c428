"""What the operators ask of their arguments: for the overloads that are written in Python, and for every fake.

csrc/check_call.h says the same for the C++ kernels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from peftkernels.ops import rules
from peftkernels.ops.rank_plan import check_plan, check_values


def _check(
    name: str,
    first: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    rank_state: Tensor | None,
    rank_order: Tensor | None,
    rank_counts: Tensor | None,
    scaling_tensor: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    shrink: Tensor | None,
) -> None:
    """What forward and backward share; ``first`` is x, or the gradient of y."""
    rules.matrices(name, first, 1 if name == "x" else 0, weight, lora_A, lora_B)
    n, r = lora_B.shape
    if bias is not None:
        rules.bias(bias, n, first, name)
    if gate is not None:
        rules.gate(gate, r, first, name)
    parts = (rank_state, rank_order, rank_counts)
    if any(part is not None for part in parts):
        if rank_state is None or rank_order is None or rank_counts is None:
            raise TypeError("rank_plan: found a part of a plan, expected state, order and counts")
        check_plan(rank_state, rank_order, rank_counts, "rank_plan.")
        rules.shape("rank_plan.state", rank_state, (r,), "(r,)")
        rules.device("rank_plan", rank_state, first, name)
    if scaling_tensor is not None:
        rules.scaling(scaling_tensor, first, name)
    rules.probability(dropout_p)
    if dropout_seed is not None:
        rules.seed(dropout_seed, first, name)
    elif dropout_p > 0:
        raise TypeError(f"dropout_seed: found None beside dropout_p = {dropout_p}, expected a 0-dim int64 tensor")
    if shrink is not None:
        rules.float_tensor("shrink", shrink)
        rules.shape("shrink", shrink, (math.prod(first.shape[:-1]), r), "(M, r)")
        expected = rules.rank_dtype(first.dtype)
        if shrink.dtype != expected:
            raise TypeError(f"shrink: found dtype {shrink.dtype}, expected {expected} where {name} is {first.dtype}")
        rules.device("shrink", shrink, first, name)


def check_forward(
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
) -> None:
    """Raise TypeError or ValueError for the first argument of `lora_linear_fwd` that does not fit the others."""
    _check(
        "x", x, weight, lora_A, lora_B, bias, gate, rank_state, rank_order, rank_counts, scaling_tensor, dropout_p,
        dropout_seed, given_shrink,
    )  # fmt: skip
    if given_shrink is not None and dropout_p > 0:
        raise ValueError(f"shrink: found one beside dropout_p = {dropout_p}, expected dropout_p = 0: it has no mask")


def check_backward(
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
    needs: Sequence[bool],
) -> None:
    """Raise TypeError or ValueError for the first argument of `lora_linear_bwd` that does not fit the others."""
    _check(
        "grad_y", grad_y, weight, lora_A, lora_B, bias, gate, rank_state, rank_order, rank_counts, scaling_tensor,
        dropout_p, dropout_seed, shrink,
    )  # fmt: skip
    if x is not None:
        rules.float_tensor("x", x)
        rows = (*grad_y.shape[:-1], weight.shape[1])
        rules.shape("x", x, tuple(rows), "(..., K) with grad_y's rows and weight's K")
        rules.of_dtype("x", x, grad_y.dtype)
        rules.device("x", x, grad_y, "grad_y")
    asked = dict(zip(("x", "weight", "lora_A", "lora_B", "bias", "gate"), needs, strict=True))
    made_of = {
        "x": (x, asked["weight"] or asked["lora_A"]),
        "shrink": (shrink, asked["lora_B"] or asked["gate"]),
        "bias": (bias, asked["bias"]),
        "gate": (gate, asked["gate"]),
    }
    for name, (value, needed) in made_of.items():
        if needed and value is None:
            raise TypeError(f"{name}: found None, expected a tensor: a gradient that is made of it was asked for")


def check_shrink(x: Tensor, lora_A: Sequence[Tensor]) -> None:
    """Raise TypeError or ValueError for the first argument of `lora_shrink` that does not fit the others."""
    rules.float_tensor("x", x)
    if not x.shape:
        raise ValueError("x: found a 0-dim tensor, expected shape (..., K)")
    if not lora_A:
        raise ValueError("lora_A: found no tensor, expected one for each adapter")
    for place, factor in enumerate(lora_A):
        rules.factor(f"lora_A[{place}]", factor, x)


# What errors call an argument of an operator.
_SPOKEN = {
    "rank_state": "rank_plan.state",
    "rank_order": "rank_plan.order",
    "rank_counts": "rank_plan.counts",
    "scaling_tensor": "scaling",
    "given_shrink": "shrink",
}


def checked(check: Callable[..., None], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind its check, and behind a look at memory and plans, which fakes have not."""
    names = [_SPOKEN.get(name, name) for name in inspect.signature(check).parameters]

    def operator(*arguments: Any) -> Any:
        check(*arguments)
        if rules.has_memory():
            given = dict(zip(names, arguments, strict=False))
            for name, value in given.items():
                if isinstance(value, Tensor):
                    rules.backed(name, value)
                elif name == "lora_A":
                    for place, factor in enumerate(value):
                        rules.backed(f"lora_A[{place}]", factor)
            if given.get("rank_plan.state") is not None:
                check_values(given["rank_plan.state"], given["rank_plan.order"], given["rank_plan.counts"])
        return function(*arguments)

    return operator
