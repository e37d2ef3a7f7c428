"""Autograd's other doors: checkpointing, functional_call, create_graph, version counters, copies, hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.cases import Call, make_call, run
from support.devices import FROZEN_WEIGHTS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftkernels import RankPlan, lora_linear


def _leaves(call: Call, impl: str) -> dict[str, Tensor]:
    return {
        name: value.detach().clone().requires_grad_(name != "weight" or impl not in FROZEN_WEIGHTS)
        for name, value in call.tensors().items()
    }


def _apply(leaves: dict[str, Tensor], call: Call, impl: str, **changes: Any) -> Tensor:
    keywords = {**call.optional, "bias": leaves.get("bias"), "gate": leaves.get("gate"), **changes}
    return lora_linear(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], impl=impl, **keywords)


def _assert_gradients(leaves: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        assert torch.equal(leaves[name].grad, gradient), f"∂{name}"


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_checkpointing(impl: str, use_reentrant: bool, p: float, seed: int) -> None:
    call = make_call(seed, plan=True, dropout_p=p)
    leaves = _leaves(call, impl)
    y = checkpoint(lambda x: _apply({**leaves, "x": x}, call, impl), leaves["x"], use_reentrant=use_reentrant)
    y.backward(call.grad_y)
    expected = run(call, impl)
    assert torch.equal(y.detach(), expected.y)
    _assert_gradients(leaves, expected.gradients)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointing_recomputes_a_drawn_mask(impl: str, use_reentrant: bool, seed: int) -> None:
    """The seed that is drawn again in recomputation is the one that made y."""
    call = make_call(seed, leading=(40,), dropout_p=0.5).replace(dropout_seed=None)
    torch.manual_seed(seed)
    once = _leaves(call, impl)
    expected = _apply(once, call, impl)
    expected.backward(call.grad_y)

    torch.manual_seed(seed)
    leaves = _leaves(call, impl)
    y = checkpoint(lambda x: _apply({**leaves, "x": x}, call, impl), leaves["x"], use_reentrant=use_reentrant)
    torch.rand(100)
    y.backward(call.grad_y)
    assert torch.equal(y, expected)
    _assert_gradients(leaves, {name: leaf.grad for name, leaf in once.items() if leaf.grad is not None})


def test_checkpointing_keeps_no_activation(impl: str, seed: int) -> None:
    call = make_call(seed, leading=(40,), dropout_p=0.5)
    leaves = _leaves(call, impl)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        checkpoint(lambda x: _apply({**leaves, "x": x}, call, impl), leaves["x"], use_reentrant=True)
    assert all(value.data_ptr() == leaves["x"].data_ptr() for value in kept)


class _Layer(nn.Module):
    def __init__(self, call: Call, impl: str) -> None:
        super().__init__()
        self.call, self.impl = call, impl
        self.register_buffer("weight", call.weight)
        self.lora_A, self.lora_B = nn.Parameter(call.lora_A), nn.Parameter(call.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.weight, self.lora_A, self.lora_B, impl=self.impl)


def test_functional_call(impl: str, seed: int) -> None:
    call, other = make_call(seed), make_call(seed + 1)
    layer = _Layer(call, impl)
    replaced = {"lora_A": other.lora_A.requires_grad_(), "weight": other.weight}
    y = torch.func.functional_call(layer, replaced, (call.x,))
    y.backward(call.grad_y)
    assert torch.equal(y, lora_linear(call.x, other.weight, other.lora_A, call.lora_B, impl=impl))
    assert other.lora_A.grad is not None
    assert layer.lora_A.grad is None
    assert layer.lora_B.grad is not None


def test_create_graph_without_a_second_derivative(impl: str, seed: int) -> None:
    call = make_call(seed, plan=True, dropout_p=0.2)
    leaves = _leaves(call, impl)
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(_apply(leaves, call, impl), list(trained.values()), call.grad_y, create_graph=True)
    expected = run(call, impl).gradients
    for name, gradient in zip(trained, gradients, strict=True):
        assert torch.equal(gradient, expected[name]), f"∂{name}"


def test_a_plan_changed_between_forward_and_backward(impl: str, seed: int) -> None:
    """Backward refuses to mix two plans: autograd's version counters notice the update."""
    call = make_call(seed, r=3).replace(rank_plan=RankPlan.from_state(torch.tensor([2, 1, 0], dtype=torch.uint8)))
    assert call.rank_plan is not None
    y = _apply(_leaves(call, impl), call, impl)
    call.rank_plan.update_(torch.tensor([0, 2, 1], dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(call.grad_y)


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "gate"])
def test_an_argument_changed_between_forward_and_backward(impl: str, name: str, seed: int) -> None:
    call = make_call(seed)
    leaves = _leaves(call, impl)
    y = _apply(leaves, call, impl)
    with torch.no_grad():
        leaves[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(call.grad_y)


def test_retained_graphs_give_the_same_gradients_again(impl: str, seed: int) -> None:
    call = make_call(seed, plan=True, dropout_p=0.4)
    leaves = _leaves(call, impl)
    y = _apply(leaves, call, impl)
    trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
    first = torch.autograd.grad(y, trained, call.grad_y, retain_graph=True)
    second = torch.autograd.grad(y, trained, call.grad_y)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_gradients_accumulate(impl: str, seed: int) -> None:
    call = make_call(seed)
    leaves = _leaves(call, impl)
    for _ in range(2):
        _apply(leaves, call, impl).backward(call.grad_y)
    for name, gradient in run(call, impl).gradients.items():
        assert torch.equal(leaves[name].grad, 2 * gradient), f"∂{name}"


def test_one_tensor_as_two_arguments(impl: str, seed: int) -> None:
    """N = K and r = N: the same tensor serves as A and B, and its gradient is the sum."""
    call = make_call(seed, n=6, k=6, r=6, gate=False)
    tied = call.lora_A.clone().requires_grad_()
    lora_linear(call.x, call.weight, tied, tied, scaling=1.7, impl=impl).backward(call.grad_y)
    separate = run(call.replace(lora_B=call.lora_A, bias=None), impl).gradients
    assert torch.equal(tied.grad, separate["lora_A"] + separate["lora_B"])


def test_layers_may_be_copied(impl: str, seed: int) -> None:
    call = make_call(seed)
    layer = _Layer(call, impl)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.lora_A.zero_()
        layer.weight.zero_()
    expected = lora_linear(call.x, twin.weight, twin.lora_A, twin.lora_B, impl=impl)
    assert torch.equal(twin(call.x), expected)
    assert not torch.equal(layer(call.x), expected)


def test_gradients_of_intermediate_results(impl: str, seed: int) -> None:
    """x, the gate and the factors may be results of other operations."""
    call = make_call(seed)
    leaves = _leaves(call, impl)
    doubled = {name: 2 * value if value.requires_grad else value for name, value in leaves.items()}
    _apply(doubled, call, impl).backward(call.grad_y)
    twice = call.replace(**{name: 2 * value for name, value in call.tensors().items() if leaves[name].requires_grad})
    for name, gradient in run(twice, impl).gradients.items():
        assert torch.equal(leaves[name].grad, 2 * gradient), f"∂{name}"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_results_without_gradients_are_the_same(impl: str, mode: Any, seed: int) -> None:
    call = make_call(seed, plan=True, dropout_p=0.2)
    leaves = _leaves(call, impl)
    leaves["weight"].requires_grad_(False)
    with mode():
        y = _apply(leaves, call, impl)
    assert not y.requires_grad
    assert torch.equal(y, run(call, impl).y)


def test_an_inference_tensor_as_x(impl: str, seed: int) -> None:
    call = make_call(seed)
    with torch.inference_mode():
        x = call.x.clone()
        y = lora_linear(x, call.weight, call.lora_A, call.lora_B, impl=impl)
    assert torch.equal(y, lora_linear(call.x, call.weight, call.lora_A, call.lora_B, impl=impl))


def test_anomaly_mode_and_hooks(impl: str, seed: int) -> None:
    call = make_call(seed)
    leaves = _leaves(call, impl)
    seen: list[Tensor] = []
    leaves["lora_A"].register_hook(seen.append)
    with torch.autograd.set_detect_anomaly(True):
        y = _apply(leaves, call, impl)
        y.register_hook(lambda gradient: 3 * gradient)
        y.backward(call.grad_y)
    assert torch.equal(seen[0], run(call.replace(grad_y=3 * call.grad_y), impl).gradients["lora_A"])
