"""Work is done for the gradients that were asked for, and they do not depend on which others were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import TRAINABLE, make_call, run
from support.checks import subsets_agree
from support.implementations import interpreted, skip_unless_served, threads
from torch.utils._python_dispatch import TorchDispatchMode

from peftkernels import lora_linear

CALLS: dict[str, dict[str, Any]] = {
    "LoRA": {"gate": False},
    "rank_plan": {"plan": True},
    "dropout": {"plan": True, "dropout_p": 0.25},
    "bf16-fp32_factors": {"plan": True, "dtype": "bf16-fp32_factors"},
    "fp16-fp32_factors": {"plan": True, "dtype": "fp16-fp32_factors"},
    "two_blocks": {"leading": (2, 131), "n": 70, "k": 66, "plan": True, "dropout_p": 0.25},
}


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_every_subset_gets_the_same_bits(impl: str, arguments: dict[str, Any], seed: int) -> None:
    if interpreted(impl) and arguments is CALLS["two_blocks"]:
        # Of 16 and 32 rows, not of 128.
        arguments = {**arguments, "leading": (2, 19)}
    subsets_agree(make_call(seed, **arguments), impl)


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_every_subset_gets_the_same_bits_on_two_threads(arguments: dict[str, Any], seed: int) -> None:
    """The C++ kernels share out their work by what was asked for."""
    skip_unless_served("cpu", arguments.get("dtype", "fp32"))
    with threads(2):
        subsets_agree(make_call(seed, **arguments), "cpu")


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("others", [(), ("x",), TRAINABLE], ids=["alone", "with_x", "with_all"])
def test_weight_gradient_is_served(impl: str, others: tuple[str, ...], seed: int) -> None:
    call = make_call(seed, leading=(5, 3), dropout_p=0.5, dtype="fp64")
    outcome = run(call, impl, ("weight", *others))
    expected = call.grad_y.flatten(0, 1).T @ call.x.flatten(0, 1)
    torch.testing.assert_close(outcome.gradients["weight"], expected, rtol=1e-12, atol=1e-12)


class _Watch(TorchDispatchMode):
    """Keeps what the backward operators were asked for, and the number of elements that they returned."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[bool]] = []
        self.returned: list[list[int]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if operator.overloadpacket is torch.ops.peftkernels.lora_linear_bwd:
            self.asked.append(args[-1])
            self.returned.append([gradient.numel() for gradient in result])
        return result


@pytest.mark.parametrize("needs", [("x",), ("lora_A",), ("lora_B",), ("bias",), ("gate",)], ids="+".join)
def test_the_backward_operator_is_told_what_is_needed(impl: str, needs: tuple[str, ...], seed: int) -> None:
    call = make_call(seed, plan=True)
    leaves = {name: value.requires_grad_(name in needs) for name, value in call.tensors().items()}
    y = lora_linear(*(leaves[name] for name in ("x", "weight", "lora_A", "lora_B")), impl=impl, **call.optional)
    with _Watch() as watch:
        y.backward(call.grad_y)
    names = ("x", "weight", "lora_A", "lora_B", "bias", "gate")
    assert watch.asked == [[name in needs for name in names]]
    assert watch.returned == [[leaves[name].numel() if name in needs else 0 for name in names]]


def test_a_call_that_needs_no_gradient_runs_no_autograd_function(impl: str, seed: int) -> None:
    call = make_call(seed)
    y = lora_linear(call.x, call.weight, call.lora_A, call.lora_B, impl=impl, **call.optional)
    assert not y.requires_grad
    assert y.grad_fn is None


def test_auto_serves_a_trainable_weight(seed: int) -> None:
    call = make_call(seed)
    weight = call.weight.clone().requires_grad_()
    lora_linear(call.x, weight, call.lora_A, call.lora_B).backward(call.grad_y)
    assert weight.grad is not None
    expected = call.grad_y.double().T @ call.x.double()
    torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-4, atol=1e-4)
