"""torch.compile: one frame, no recompilation when masks, gates or scalings change value, the same numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.cases import TRAINABLE, Call, make_call, run
from support.devices import FROZEN_WEIGHTS
from support.implementations import skip_unless_served
from support.oracle import Budget
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from peftkernels import RankPlan, lora_linear


@pytest.fixture(autouse=True)
def _fresh_compiler(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Every test compiles for itself, and a second compilation of the same frame is an error."""
    caplog.set_level(logging.WARNING)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def _leaves(call: Call, impl: str) -> dict[str, Tensor]:
    return {
        name: value.detach().clone().requires_grad_(name != "weight" or impl not in FROZEN_WEIGHTS)
        for name, value in call.tensors().items()
    }


def _apply(leaves: dict[str, Tensor], call: Call, impl: str, **changes: Any) -> Tensor:
    keywords = {**call.optional, "bias": leaves.get("bias"), "gate": leaves.get("gate"), **changes}
    return lora_linear(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], impl=impl, **keywords)


def _compiled(function: Callable[..., Tensor], backend: str = "aot_eager") -> tuple[Callable[..., Tensor], Any]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def _assert_as_uncompiled(y: Tensor, leaves: dict[str, Tensor], call: Call, impl: str) -> None:
    y.backward(call.grad_y)
    expected = run(call, impl)
    assert torch.equal(y.detach(), expected.y)
    for name, gradient in expected.gradients.items():
        assert torch.equal(leaves[name].grad, gradient), f"∂{name}"


SITUATIONS: dict[str, dict[str, Any]] = {
    "LoRA": {"gate": False, "bias": False},
    "everything": {"plan": True, "scaling": "tensor", "dropout_p": 0.3},
    "bf16-fp32_factors": {"plan": True, "dtype": "bf16-fp32_factors"},
    "fp16-fp32_factors": {"plan": True, "dtype": "fp16-fp32_factors"},
    "three_dimensions": {"leading": (2, 3)},
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_one_frame_and_the_bits_of_eager_mode(impl: str, situation: str, seed: int) -> None:
    call = make_call(seed, **SITUATIONS[situation])
    leaves = _leaves(call, impl)
    function, counter = _compiled(lambda: _apply(leaves, call, impl))
    _assert_as_uncompiled(function(), leaves, call, impl)
    assert counter.frame_count == 1


def test_auto_is_traced(seed: int) -> None:
    call = make_call(seed, plan=True)
    leaves = _leaves(call, "cpu")
    function, counter = _compiled(lambda: _apply(leaves, call, "auto"))
    y = function()
    y.backward(call.grad_y)
    expected = run(call, "auto", TRAINABLE)
    assert torch.equal(y.detach(), expected.y)
    for name in TRAINABLE:
        assert torch.equal(leaves[name].grad, expected.gradients[name]), f"∂{name}"
    assert counter.frame_count == 1


def test_no_recompilation_when_values_change(impl: str, seed: int) -> None:
    """One frame serves every gate, scaling tensor and rank plan, updated in place or exchanged."""
    call = make_call(seed, r=6, plan=True, scaling="tensor")
    assert call.rank_plan is not None
    function, counter = _compiled(
        lambda leaves, scaling, plan: _apply(leaves, call, impl, scaling=scaling, rank_plan=plan)
    )
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    for step in range(6):
        state = torch.randint(3, (6,), generator=generator, dtype=torch.uint8)
        if step == 0:
            state.fill_(2)
        elif step == 1:
            state.fill_(0)
        call.rank_plan.update_(state)
        gate = torch.randn(6, generator=generator)
        now = call.replace(gate=gate, scaling=torch.tensor(float(step) - 2.5))
        if step == 5:
            now = now.replace(rank_plan=RankPlan.from_state(state.flip(0)))
        leaves = _leaves(now, impl)
        y = function(leaves, now.scaling, now.rank_plan)
        _assert_as_uncompiled(y, leaves, now, impl)
    assert counter.frame_count == 1


def test_a_plan_may_be_updated_inside(impl: str, seed: int) -> None:
    call = make_call(seed, r=5, plan=True)
    assert call.rank_plan is not None
    plan = call.rank_plan

    def step(leaves: dict[str, Tensor], state: Tensor) -> Tensor:
        plan.update_(state)
        return _apply(leaves, call, impl)

    function, counter = _compiled(step)
    for state in ([2, 1, 0, 1, 2], [0, 0, 2, 2, 1]):
        now = torch.tensor(state, dtype=torch.uint8)
        leaves = _leaves(call, impl)
        y = function(leaves, now)
        assert plan.state.tolist() == state
        _assert_as_uncompiled(y, leaves, call, impl)
    assert counter.frame_count == 1


def test_dropout_inside_draws_seeds_of_its_own(impl: str, seed: int) -> None:
    """A seed drawn in the compiled program follows torch.manual_seed, changes with every call, and serves backward."""
    lora_A, lora_B, x = torch.eye(24), torch.eye(24), torch.ones(40, 24)

    def dropped(x: Tensor) -> Tensor:
        return lora_linear(x, torch.zeros(24, 24), lora_A, lora_B, dropout_p=0.5, impl=impl)

    function, counter = _compiled(dropped)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    first = function(leaf)
    second = function(leaf)
    torch.manual_seed(seed)
    again = function(leaf)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert 0.3 < float((first == 0).float().mean()) < 0.7
    again.backward(torch.ones_like(again))
    assert torch.equal(leaf.grad, again.detach())
    assert counter.frame_count == 1


def test_dropout_with_a_seed_of_the_callers(impl: str, seed: int) -> None:
    """The mask of eager mode; the seed's value, as a tensor, is data that needs no second program."""
    lora_A, lora_B, x = torch.eye(24), torch.eye(24), torch.randn(40, 24)

    def dropped(dropout_seed: Tensor) -> Tensor:
        return lora_linear(x, torch.zeros(24, 24), lora_A, lora_B, dropout_p=0.3, dropout_seed=dropout_seed, impl=impl)

    function, counter = _compiled(dropped)
    for value in (seed, seed + 1, -5):
        as_tensor = torch.tensor(value)
        assert torch.equal(function(as_tensor), dropped(as_tensor))
    assert counter.frame_count == 1


def test_dynamic_rows(impl: str, seed: int) -> None:
    """With `dynamic=True` one program serves batches of any size."""
    counter = CompileCounterWithBackend("aot_eager")

    def function(leaves: dict[str, Tensor], plan: RankPlan) -> Tensor:
        return lora_linear(
            leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"],
            bias=leaves["bias"], gate=leaves["gate"], rank_plan=plan, scaling=1.7, impl=impl,
        )  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for rows in (7, 12, 31):
        call = make_call(seed, leading=(rows,), plan=True)
        leaves = _leaves(call, impl)
        assert call.rank_plan is not None
        _assert_as_uncompiled(compiled(leaves, call.rank_plan), leaves, call, impl)
        frames.append(counter.frame_count)
    # The first call may compile twice, once to find that the default dropout_p is a constant.
    assert frames == [frames[0]] * 3


def test_a_module_compiles_with_its_neighbours(impl: str, seed: int) -> None:
    """Two adapted layers with an activation between them are one graph."""
    first, second = make_call(seed, n=40, k=29), make_call(seed + 1, n=12, k=40, plan=True)

    def network(x: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(_apply({**first.tensors(), "x": x}, first, impl))
        return _apply({**second.tensors(), "x": hidden}, second, impl)

    function, counter = _compiled(network)
    x = first.x.clone().requires_grad_()
    y = function(x)
    y.sum().backward()
    again = first.x.clone().requires_grad_()
    expected = network(again)
    expected.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, again.grad)
    assert counter.frame_count == 1


def test_double_backward_of_a_compiled_call(impl: str, seed: int) -> None:
    call = make_call(seed)
    leaves = _leaves(call, impl)
    function, _ = _compiled(lambda: _apply(leaves, call, impl))
    y = function()
    (gradient,) = torch.autograd.grad(y, leaves["x"], call.grad_y, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        (gradient.square().sum() + y.sum()).backward()


def test_errors_of_a_compiled_call_are_ours(seed: int) -> None:
    call = make_call(seed)
    function, _ = _compiled(lambda x: lora_linear(x, call.weight, call.lora_A, call.lora_B, impl="cuda"))
    with pytest.raises(Exception, match=r"this version of peftkernels has no CUDA C\+\+ kernels"):
        function(call.x)


@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_inductor(name: str, seed: int) -> None:
    """The default backend, forward and backward, within the budget of plain PyTorch."""
    skip_unless_served(name)
    call = make_call(seed, leading=(2, 9), plan=True, scaling="tensor", dropout_p=0.2)
    leaves = _leaves(call, name)
    y = torch.compile(lambda: _apply(leaves, call, name), fullgraph=True, dynamic=False)()
    y.backward(call.grad_y)
    outcome = run(call, name)
    outcome.y = y.detach()
    outcome.gradients = {key: leaves[key].grad for key in outcome.gradients}
    excesses = Budget(call).excesses(outcome)
    assert not excesses, excesses[0]
