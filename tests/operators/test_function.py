"""`LoraLinearFunction`, for libraries that check arguments and choose a backend themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import Call, make_call, run
from support.implementations import skip_unless_served
from torch import Tensor
from torch.func import grad, vmap

from peftkernels import LoraLinearFunction
from peftkernels.ops.weights import FrozenWeight

IMPLEMENTATIONS = ("reference", "eager", "cpu")
TRAINED = ("x", "lora_A", "lora_B", "bias", "gate")


def _apply(call: Call, impl: str, source: Any = None, **leaves: Tensor) -> tuple[Tensor, Tensor | None]:
    return LoraLinearFunction.apply(*call.record()._replace(**leaves), impl, source)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_it_is_what_stands_behind_the_operator(impl: str, seed: int) -> None:
    skip_unless_served(impl)
    call = make_call(seed, plan=True)
    expected = run(call, impl)
    leaves = {name: call.tensors()[name].clone().requires_grad_() for name in TRAINED}
    y, shrink = _apply(call, impl, **leaves)
    assert torch.equal(y, expected.y)
    assert shrink is not None and not shrink.requires_grad
    gradients = torch.autograd.grad(y, list(leaves.values()), call.grad_y)
    for name, found in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(found, expected.gradients[name])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("samples", [False, True], ids=["grad", "per_sample"])
def test_transforms_of_torch_func(impl: str, samples: bool, seed: int) -> None:
    skip_unless_served(impl)
    call = make_call(seed, leading=(6,), plan=True)
    factors = (call.lora_A, call.lora_B)

    def loss(lora_A: Tensor, lora_B: Tensor, x: Tensor) -> Tensor:
        y, _ = _apply(call, impl, lora_A=lora_A, lora_B=lora_B, x=x)
        return y.square().sum()

    def by_autograd(x: Tensor) -> tuple[Tensor, ...]:
        leaves = [factor.clone().requires_grad_() for factor in factors]
        return torch.autograd.grad(loss(*leaves, x), leaves)

    rows = call.x.unsqueeze(1)
    if samples:
        found = vmap(grad(loss, (0, 1)), (None, None, 0))(*factors, rows)
        expected = tuple(torch.stack(both) for both in zip(*map(by_autograd, rows), strict=True))
    else:
        found, expected = grad(loss, (0, 1))(*factors, call.x), by_autograd(call.x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class _Counted(FrozenWeight):
    """A weight that is made when it is needed."""

    def __init__(self, values: Tensor) -> None:
        self.shape, self.dtype, self.device = values.shape, values.dtype, values.device
        self.values, self.made = values, 0

    def materialize(self) -> Tensor:
        self.made += 1
        return self.values.clone()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_weight_that_is_made_is_not_kept(impl: str, seed: int) -> None:
    skip_unless_served(impl)
    call = make_call(seed)
    source = _Counted(call.weight)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):
        y, _ = _apply(call, impl, source, x=call.x.clone().requires_grad_())
    assert source.made == 0
    assert all(value.shape != call.weight.shape for value in saved)
    y.backward(call.grad_y)
    assert source.made == 1


@pytest.mark.parametrize("recorded", [False, True])
def test_the_operator_takes_it(recorded: bool, seed: int) -> None:
    """A `FrozenWeight` in the weight's place: made once for each pass, with the results of the weight."""
    from peftkernels import explain, lora_linear

    call = make_call(seed)
    source = _Counted(call.weight)
    x = call.x.clone().requires_grad_(recorded)
    optional = {**call.optional, "impl": "eager"}
    y = lora_linear(x, source, call.lora_A, call.lora_B, **optional)
    assert source.made == 1
    assert torch.equal(y, lora_linear(call.x, call.weight, call.lora_A, call.lora_B, **optional))
    if recorded:
        y.backward(call.grad_y)
        assert source.made == 2
        torch.testing.assert_close(x.grad, run(call, "eager").gradients["x"])
    explanation = explain(x, source, call.lora_A, call.lora_B)
    assert explanation.chosen == "eager" and source.made == 1 + recorded
    with pytest.raises(ValueError, match=r"^x: found shape"):
        lora_linear(x[..., 1:], source, call.lora_A, call.lora_B)
