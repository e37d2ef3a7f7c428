"""Every implementation is as exact as plain PyTorch in the same dtype: y and all gradients, in every dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import DTYPES, TRAINABLE, make_call, run
from support.checks import within_budget
from support.implementations import interpreted, skip_unless_served, threads
from support.oracle import Budget, Excess

SITUATIONS: dict[str, dict[str, Any]] = {
    "LoRA": {"gate": False},
    "gated": {},
    "no_bias": {"bias": False},
    "rank_plan": {"plan": True},
    "rank_plan_without_gate": {"plan": True, "gate": False, "bias": False},
    "dropout": {"dropout_p": 0.1, "gate": False},
    "all_of_it": {"plan": True, "dropout_p": 0.5, "scaling": "tensor"},
}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"leading": (2, 9), "n": 21, "k": 35, "r": 6},
    "one_row": {"leading": (1,), "n": 200, "k": 130, "r": 8},
    # Past every block of the C++ kernels: 128 and 256 rows, 64 columns, 768 of depth.
    "blocks": {"leading": (2, 135), "n": 131, "k": 901, "r": 19},
}
# Past every block of the interpreted kernels: 32 rows, 64 columns, 64 of depth.
INTERPRETED_BLOCKS: dict[str, Any] = {"leading": (2, 35), "n": 131, "k": 135, "r": 19}
EVERYWHERE = tuple(name for name in DTYPES if name != "fp64")


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", EVERYWHERE)
def test_within_budget(impl: str, dtype: str, shape: str, situation: str, seed: int) -> None:
    skip_unless_served(impl, dtype)
    sizes = INTERPRETED_BLOCKS if shape == "blocks" and interpreted(impl) else SHAPES[shape]
    within_budget(make_call(seed, dtype=dtype, **sizes, **SITUATIONS[situation]), impl)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_within_budget_in_float64(impl: str, situation: str, seed: int) -> None:
    within_budget(make_call(seed, dtype="fp64", **SHAPES["small"], **SITUATIONS[situation]), impl)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_oracle_is_what_pytorch_computes_in_float64(situation: str, seed: int) -> None:
    """The other opinion on the oracle itself: three `F.linear` and autograd, within the rounding band alone."""
    budget = Budget(make_call(seed, dtype="fp64", **SHAPES["small"], **SITUATIONS[situation]))
    for name, error in budget.plain_errors.items():
        assert (error.abs() <= budget.bands[name]).all(), f"{name}, {budget.call.label}"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-fp32_factors"])
@pytest.mark.parametrize("gate_shape", ["(r,)", "(r, 1)"])
def test_gate_may_be_a_column(impl: str, dtype: str, gate_shape: str, seed: int) -> None:
    call = make_call(seed, dtype=dtype, plan=True)
    assert call.gate is not None
    flat = run(call, impl)
    column = run(call.replace(gate=call.gate.unsqueeze(1)), impl) if gate_shape == "(r, 1)" else run(call, impl)
    column.gradients["gate"] = column.gradients["gate"].reshape(-1)
    for name, expected in flat.named().items():
        assert torch.equal(column.named()[name], expected), name


@pytest.mark.parametrize("rows_n_k", [(3, 700, 400), (70, 300, 130), (300, 140, 130), (1100, 70, 66)], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("impl", ["eager", "cpu"])
def test_two_threads_stay_within_budget(impl: str, dtype: str, rows_n_k: tuple[int, int, int], seed: int) -> None:
    """Large enough for the C++ kernels to share out row blocks, column panels, and both."""
    skip_unless_served(impl, dtype)
    rows, n, k = rows_n_k
    call = make_call(seed, leading=(rows,), n=n, k=k, r=9, plan=True, dropout_p=0.2, dtype=dtype)
    budget = Budget(call)
    with threads(2):
        outcome = run(call, impl, TRAINABLE)
    excesses = budget.excesses(outcome)
    assert not excesses, f"{call.label}: {excesses[0]}"


def test_an_excess_says_what_was_allowed() -> None:
    assert str(Excess("y", 2.0, 1.0, 0.25)) == "y: error 2, allowed 1 (plain PyTorch: 0.25)"
