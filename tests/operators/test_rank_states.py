"""ACTIVE, PROBE and DEAD: who contributes, who receives, and what must never leak."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import make_call, run
from support.checks import (
    contains_dead_ranks,
    contains_probe_ranks,
    follows_rank_states,
    masked_equals_sliced,
    propagates,
    within_budget,
)
from support.implementations import ALL, examples, served, skip_unless_served
from support.oracle import Budget

from peftkernels import RankPlan, lora_linear

DTYPES = ("fp32", "bf16", "bf16-fp32_factors", "fp16-fp32_factors")
SHAPES: dict[str, dict[str, Any]] = {
    "one_row": {"leading": (1,)},
    "three_rows": {"leading": (3,), "n": 65},
    "two_blocks": {"leading": (2, 70), "n": 130, "k": 67},
}
POISONS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
anywhere = pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES)
in_every_shape = pytest.mark.parametrize("shape", SHAPES)


@in_every_dtype
@in_every_shape
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_masked_equals_sliced(impl: str, dtype: str, shape: str, p: float, seed: int) -> None:
    masked_equals_sliced(make_call(seed, r=11, plan=True, dtype=dtype, dropout_p=p, **SHAPES[shape]), impl)


@pytest.mark.parametrize("name", ALL)
def test_masked_equals_sliced_for_any_states(name: str) -> None:
    skip_unless_served(name)

    @settings(max_examples=examples(name, 40))
    @given(
        dtype=st.sampled_from(served(name, DTYPES)),
        state=st.lists(st.integers(0, 2), min_size=1, max_size=40),
        rows=st.sampled_from([1, 2, 4, 5, 129]),
        gate=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
    def check(dtype: str, state: list[int], rows: int, gate: bool, seed: int) -> None:
        call = make_call(seed, leading=(rows,), n=37, k=41, r=len(state), gate=gate, dtype=dtype)
        call = call.replace(rank_plan=RankPlan.from_state(torch.tensor(state, dtype=torch.uint8)))
        masked_equals_sliced(call, name)
        within_budget(call, name)

    check()


@in_every_dtype
@in_every_shape
def test_each_state_receives_what_the_table_says(impl: str, dtype: str, shape: str, seed: int) -> None:
    follows_rank_states(make_call(seed, r=11, plan=True, dtype=dtype, **SHAPES[shape]), impl)


@in_every_dtype
@in_every_shape
@anywhere
def test_dead_ranks_never_leak(impl: str, dtype: str, shape: str, poison: float, seed: int) -> None:
    contains_dead_ranks(make_call(seed, r=11, plan=True, dtype=dtype, **SHAPES[shape]), impl, poison)


@in_every_dtype
@in_every_shape
def test_dead_ranks_never_leak_through_dropout(impl: str, dtype: str, shape: str, seed: int) -> None:
    contains_dead_ranks(make_call(seed, r=11, plan=True, dtype=dtype, dropout_p=0.5, **SHAPES[shape]), impl)


@in_every_dtype
@in_every_shape
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
def test_probe_ranks_reach_only_their_gate(impl: str, dtype: str, shape: str, poison: float, seed: int) -> None:
    contains_probe_ranks(make_call(seed, r=11, plan=True, dtype=dtype, **SHAPES[shape]), impl, poison)


@in_every_shape
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "bias", "gate", "grad_y"])
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_nan_and_inf_propagate(impl: str, shape: str, name: str, poison: float, dtype: str, seed: int) -> None:
    propagates(make_call(seed, r=11, plan=True, dtype=dtype, **SHAPES[shape]), impl, name, poison)


@pytest.mark.parametrize("name", ["x", "grad_y"])
def test_nan_propagates_through_dropout(impl: str, name: str, seed: int) -> None:
    """PyTorch's dropout multiplies by the mask, so a dropped NaN stays NaN."""
    propagates(make_call(seed, r=11, plan=True, dropout_p=0.9), impl, name)


@pytest.mark.parametrize("states", ["PPP", "DDD", "PDP"])
def test_without_active_ranks_the_layer_is_the_frozen_one(impl: str, states: str, seed: int) -> None:
    call = make_call(seed, leading=(20,), r=3)
    plan = RankPlan.from_state(torch.tensor(["DPA".index(letter) for letter in states], dtype=torch.uint8))
    outcome = run(call.replace(rank_plan=plan), impl)
    frozen = run(call.replace(lora_A=call.lora_A[:0], lora_B=call.lora_B[:, :0], gate=None), impl)
    assert torch.equal(outcome.y, frozen.y)
    assert torch.equal(outcome.gradients["x"], frozen.gradients["x"])
    within_budget(call.replace(rank_plan=plan), impl)


def test_a_zero_gate_is_not_a_dead_rank(impl: str, seed: int) -> None:
    """A live rank with gate 0 still trains: its gate receives the dense gradient, its factors receive exact zeros."""
    call = make_call(seed, r=4)
    assert call.gate is not None
    call.gate[1] = 0
    outcome = run(call, impl)
    assert not outcome.gradients["lora_A"][1].any()
    assert not outcome.gradients["lora_B"][:, 1].any()
    assert outcome.gradients["gate"][1] != 0
    within_budget(call, impl)


def test_a_plan_of_active_ranks_is_no_plan(impl: str, seed: int) -> None:
    call = make_call(seed, r=7)
    plan = RankPlan.from_state(torch.full((7,), 2, dtype=torch.uint8))
    dense, planned = run(call, impl).named(), run(call.replace(rank_plan=plan), impl).named()
    for name, expected in dense.items():
        assert torch.equal(planned[name], expected), name


def test_plan_changes_take_effect_at_once(impl: str, seed: int) -> None:
    call = make_call(seed, r=9, plan=True)
    assert call.rank_plan is not None
    for shift in range(3):
        call.rank_plan.update_((call.rank_plan.state + shift) % 3)
        within_budget(call, impl)


def test_a_probe_gradient_is_the_loss_of_leaving_the_rank_out(impl: str, seed: int) -> None:
    """First order: putting gate ε on a PROBE rank changes <G, y> by ε·∂gate."""
    call = make_call(seed, r=3, dtype="fp32")
    assert call.gate is not None
    plan = RankPlan.from_state(torch.tensor([2, 1, 2], dtype=torch.uint8))
    probed = float(run(call.replace(rank_plan=plan), impl).gradients["gate"][1])
    x, weight, lora_A, lora_B, bias, gate = (value.double() for value in call.tensors().values())
    values = []
    for value in (0.0, 1.0):
        gate[1] = value
        y = lora_linear(x, weight, lora_A, lora_B, bias=bias, gate=gate, scaling=1.7, impl="reference")
        values.append(float((y * call.grad_y.double()).sum()))
    allowed = Budget(call.replace(rank_plan=plan)).bands["∂gate"][1] * 4
    assert abs(values[1] - values[0] - probed) <= float(allowed)
