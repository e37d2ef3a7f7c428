"""Gradients against finite differences in float64, through the public function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.cases import GRADIENTS, Call, make_call
from torch import Tensor

from peftkernels import RankPlan, RankState, lora_linear

SUBSETS = [
    tuple(name for place, name in enumerate(GRADIENTS) if bits >> place & 1) for bits in range(1, 2 ** len(GRADIENTS))
]
differentiating = pytest.mark.parametrize("impl", ["reference", "eager"])


def _function(call: Call, names: tuple[str, ...], impl: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """y as a function of the arguments in `names`, where a gate counts as its ACTIVE entries alone.

    A PROBE rank's ∂gate is by definition not the derivative of y, which does not depend on that gate.
    """
    active = (call.state == RankState.ACTIVE).nonzero().squeeze(1)
    inputs = {name: value for name, value in call.tensors().items() if name in names}
    if "gate" in inputs:
        inputs["gate"] = inputs["gate"][active]

    def function(*values: Tensor) -> Tensor:
        given = {**call.tensors(), **dict(zip(inputs, values, strict=True))}
        if "gate" in inputs:
            assert call.gate is not None
            given["gate"] = call.gate.index_copy(0, active, given["gate"])
        keywords = {**call.optional, "bias": given.get("bias"), "gate": given.get("gate")}
        return lora_linear(given["x"], given["weight"], given["lora_A"], given["lora_B"], impl=impl, **keywords)

    return function, tuple(value.clone().requires_grad_() for value in inputs.values())


def _assert_gradcheck(call: Call, names: tuple[str, ...], impl: str) -> None:
    function, inputs = _function(call, names, impl)
    assert torch.autograd.gradcheck(function, inputs), call.label


@differentiating
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_every_subset_of_inputs(impl: str, names: tuple[str, ...], seed: int) -> None:
    call = make_call(seed, leading=(2,), n=2, k=3, r=4, plan=True, dtype="fp64")
    _assert_gradcheck(call, names, impl)


@differentiating
@pytest.mark.parametrize("states", ["AA", "PP", "DD", "APD", "DPA", "PADAPD"])
def test_rank_states(impl: str, states: str, seed: int) -> None:
    state = torch.tensor(["DPA".index(letter) for letter in states], dtype=torch.uint8)
    call = make_call(seed, leading=(2, 2), n=3, k=4, r=len(states), dtype="fp64")
    names = GRADIENTS if "A" in states else tuple(name for name in GRADIENTS if name != "gate")
    _assert_gradcheck(call.replace(rank_plan=RankPlan.from_state(state)), names, impl)


@differentiating
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scaling", [0.37, "tensor"])
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no_gate"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_dropout_and_scaling(impl: str, p: float, scaling: float | str, gate: bool, bias: bool, seed: int) -> None:
    call = make_call(
        seed, leading=(3,), n=3, k=5, r=3, dtype="fp64", dropout_p=p, scaling=scaling, gate=gate, bias=bias
    )
    _assert_gradcheck(call, GRADIENTS, impl)


@differentiating
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 1, 2)], ids=str)
def test_leading_dimensions(impl: str, leading: tuple[int, ...], seed: int) -> None:
    _assert_gradcheck(make_call(seed, leading=leading, n=2, k=3, r=2, dtype="fp64"), GRADIENTS, impl)


@differentiating
def test_strided_inputs(impl: str, seed: int) -> None:
    call = make_call(seed, leading=(3,), n=3, k=4, r=2, dtype="fp64")
    weight = call.weight.T.contiguous().T
    x = call.x.repeat(1, 2)[:, ::2]
    _assert_gradcheck(call.replace(weight=weight, x=x), GRADIENTS, impl)
