"""Autocast: the autocast dtype comes out, parameters keep their gradients' dtype, float64 is left alone."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from support.cases import Call, Outcome, make_call, run
from support.devices import FROZEN_WEIGHTS
from support.implementations import served, skip_unless_served
from support.oracle import Budget, mask
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftkernels import lora_linear

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
low_precision = pytest.mark.parametrize("low", LOW)


def _device_type() -> str:
    return torch.get_default_device().type


def _low(impl: str) -> str:
    """bf16, or fp16 where `impl` has no bf16."""
    return served(impl, tuple(LOW))[0]


def _leaves(call: Call, impl: str) -> dict[str, Tensor]:
    return {
        name: value.detach().clone().requires_grad_(name != "weight" or impl not in FROZEN_WEIGHTS)
        for name, value in call.tensors().items()
    }


def _run(call: Call, impl: str, dtype: torch.dtype, inside: bool = False, cache: bool = True) -> Outcome:
    """Forward under autocast, backward outside it as PyTorch recommends, or `inside` it."""
    leaves = _leaves(call, impl)
    keywords = {**call.optional, "bias": leaves.get("bias"), "gate": leaves.get("gate")}
    with torch.autocast(_device_type(), dtype, cache_enabled=cache):
        y = lora_linear(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], impl=impl, **keywords)
        if inside:
            y.backward(call.grad_y.to(y.dtype))
    if not inside:
        y.backward(call.grad_y.to(y.dtype))
    return Outcome(y.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})


def _plain(call: Call, dtype: torch.dtype) -> Outcome:
    leaves = _leaves(call, "plain")
    with torch.autocast(_device_type(), dtype):
        shrink = F.linear(leaves["x"] * mask(call).to(leaves["x"].dtype), leaves["lora_A"])
        delta = F.linear(shrink * leaves["gate"], leaves["lora_B"]) * call.scaling
        y = F.linear(leaves["x"], leaves["weight"], leaves["bias"]) + delta
    y.backward(call.grad_y.to(y.dtype))
    return Outcome(y.detach(), {name: leaf.grad for name, leaf in leaves.items()})


@low_precision
@pytest.mark.parametrize("p", [0.0, 0.2], ids=["", "dropout"])
def test_within_the_budget_of_plain_autocast(impl: str, low: str, p: float, seed: int) -> None:
    """float32 arguments, computed in the autocast dtype: y in it, gradients in float32."""
    skip_unless_served(impl, low)
    call = make_call(seed, leading=(2, 21), n=40, k=50, r=6, dropout_p=p)
    # What comes back into the call is in the autocast dtype for everybody.
    call = call.replace(grad_y=call.grad_y.to(LOW[low]).float())
    outcome = _run(call, impl, LOW[low])
    assert outcome.y.dtype == LOW[low]
    assert all(gradient.dtype == torch.float32 for gradient in outcome.gradients.values())
    excesses = Budget(call, LOW[low], _plain(call, LOW[low])).excesses(outcome)
    assert not excesses, f"{call.label}: {excesses[0]}"


@low_precision
@pytest.mark.parametrize("plan", [False, True], ids=["", "rank_plan"])
@pytest.mark.parametrize("inside", [False, True], ids=["backward_outside", "backward_inside"])
def test_the_bits_of_casting_by_hand(impl: str, low: str, plan: bool, inside: bool, seed: int) -> None:
    """Autocast casts x; the operator casts the rest as it always does. Nothing else is rounded in between."""
    skip_unless_served(impl, low)
    call = make_call(seed, leading=(2, 21), n=40, k=50, r=6, plan=plan)
    assert call.bias is not None
    low_tensors = {name: getattr(call, name).to(LOW[low]) for name in ("x", "weight", "bias", "grad_y")}
    by_hand = run(call.replace(**low_tensors), impl)
    outcome = _run(call, impl, LOW[low], inside)
    assert torch.equal(outcome.y, by_hand.y)
    for name, gradient in outcome.gradients.items():
        expected = by_hand.gradients[name]
        # A parameter in float32 gets its gradient rounded once, to float32; casting by hand rounds it to `low`.
        assert torch.equal(gradient.to(expected.dtype), expected), f"∂{name}"


@pytest.mark.parametrize("name", ["reference", "eager"])
def test_float64_is_left_alone(name: str, seed: int) -> None:
    call = make_call(seed, dtype="fp64", plan=True)
    outcome, expected = _run(call, name, torch.bfloat16), run(call, name)
    assert outcome.y.dtype == torch.float64
    for key, value in expected.named().items():
        assert torch.equal(outcome.named()[key], value), key


def test_low_precision_arguments_stay_as_they_are(impl: str, seed: int) -> None:
    """bf16 x and weight with float32 factors, the usual case of a frozen model in bf16."""
    call = make_call(seed, dtype=f"{_low(impl)}-fp32_factors", plan=True, dropout_p=0.1)
    outcome, expected = _run(call, impl, LOW[_low(impl)]), run(call, impl)
    for key, value in expected.named().items():
        assert torch.equal(outcome.named()[key], value), key


def test_mixed_arguments_meet_in_the_autocast_dtype(impl: str, seed: int) -> None:
    """A float32 x on a bf16 weight is an error outside autocast, and served inside it."""
    call = make_call(seed)
    low = LOW[_low(impl)]
    mixed = call.replace(weight=call.weight.to(low))
    with pytest.raises(TypeError, match=rf"weight: found dtype {re.escape(str(low))}, expected x's"):
        lora_linear(mixed.x, mixed.weight, mixed.lora_A, mixed.lora_B, impl=impl)
    outcome = _run(mixed, impl, low)
    assert torch.equal(outcome.y, _run(call, impl, low).y)
    assert outcome.gradients["x"].dtype == torch.float32


def test_the_weight_cache_changes_nothing(impl: str, seed: int) -> None:
    call, low = make_call(seed), LOW[_low(impl)]
    with_cache, without = _run(call, impl, low), _run(call, impl, low, cache=False)
    for key, value in with_cache.named().items():
        assert torch.equal(without.named()[key], value), key


def test_disabled_autocast_inside_autocast(impl: str, seed: int) -> None:
    call = make_call(seed)
    with torch.autocast(_device_type(), torch.bfloat16), torch.autocast(_device_type(), enabled=False):
        y = lora_linear(call.x, call.weight, call.lora_A, call.lora_B, impl=impl, **call.optional)
    assert y.dtype == torch.float32
    assert torch.equal(y, run(call, impl).y)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointing_under_autocast(impl: str, use_reentrant: bool, seed: int) -> None:
    call = make_call(seed, dropout_p=0.3)
    leaves = _leaves(call, impl)

    def layer(x: Tensor) -> Tensor:
        keywords = {**call.optional, "bias": leaves["bias"], "gate": leaves["gate"]}
        return lora_linear(x, leaves["weight"], leaves["lora_A"], leaves["lora_B"], impl=impl, **keywords)

    low = LOW[_low(impl)]
    with torch.autocast(_device_type(), low):
        y = checkpoint(layer, leaves["x"], use_reentrant=use_reentrant)
    y.backward(call.grad_y.to(y.dtype))
    expected = _run(call, impl, low)
    assert torch.equal(y.detach(), expected.y)
    for name, gradient in expected.gradients.items():
        assert torch.equal(leaves[name].grad, gradient), f"∂{name}"
