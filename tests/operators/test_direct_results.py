"""The direct way to the C++ kernels gives what the way through Python gives, under whatever autograd does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import GRADIENTS, TRAINABLE, Call, make_call, run
from support.direct import arguments_of, by_python, direct, load
from support.implementations import skip_unless_served
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftkernels import RankPlan, lora_linear


@pytest.fixture(autouse=True)
def _served() -> None:
    skip_unless_served("cpu")
    load()


@pytest.fixture(params=["direct", "by_python"])
def _both_ways(request: pytest.FixtureRequest) -> None:
    if request.param == "by_python":
        request.getfixturevalue("without_direct_call")


on_both_ways = pytest.mark.usefixtures("_both_ways")


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    leading=st.sampled_from([(), (0,), (1,), (5,), (2, 3), (140,)]),
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    r=st.integers(0, 9),
    dtype=st.sampled_from(["fp32", "bf16", "bf16-fp32_factors", "fp32-bf16_factors", "fp32-fp64_factors"]),
    bias=st.booleans(),
    gate=st.booleans(),
    plan=st.booleans(),
    scaling=st.sampled_from([1.7, "tensor"]),
    dropout=st.sampled_from(["none", "drawn", "int", "tensor"]),
    strided=st.booleans(),
    precomputed=st.booleans(),
    needs=st.sets(st.sampled_from(TRAINABLE)),
)
def test_both_ways_give_the_same_bits(
    seed: int, dtype: str, dropout: str, strided: bool, precomputed: bool, needs: set[str], **shape: Any
) -> None:
    call = make_call(seed, dtype=dtype, dropout_p=0.0 if dropout == "none" else 0.4, **shape)
    if strided:
        tensors = {name: torch.stack((value, value), -1)[..., 0] for name, value in call.tensors().items()}
        call = call.replace(**tensors, grad_y=torch.stack((call.grad_y, call.grad_y), -1)[..., 0])
    if precomputed and dropout == "none":
        call = call.replace(shrink=torch.randn(call.x.shape[:-1].numel(), call.r).to(call.x.dtype))
    if dropout != "none":
        seeds = {"drawn": None, "int": seed - 2**30, "tensor": torch.tensor(seed)}
        call = call.replace(dropout_seed=seeds[dropout])
    asked = tuple(name for name in TRAINABLE if name in needs and name in call.tensors())
    assert direct(arguments_of(call, "cpu")) is not None

    def outcome() -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(seed)
        return run(call, "cpu", asked).named(), torch.random.get_rng_state()

    (found, generator), (expected, expected_generator) = outcome(), by_python(outcome)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name} ({call.label})"
    assert torch.equal(generator, expected_generator)


def _leaves(call: Call) -> dict[str, Tensor]:
    return {name: value.clone().requires_grad_(name != "weight") for name, value in call.tensors().items()}


def _apply(leaves: dict[str, Tensor], call: Call) -> Tensor:
    keywords = {**call.optional, "bias": leaves.get("bias"), "gate": leaves.get("gate")}
    return lora_linear(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], impl="cpu", **keywords)


@pytest.mark.parametrize("needs", [(), ("x",), ("lora_A",), ("lora_B",), ("bias",), ("gate",), TRAINABLE], ids="+".join)
def test_both_ways_save_the_same_tensors(needs: tuple[str, ...], seed: int) -> None:
    call = make_call(seed, plan=True, scaling="tensor", dropout_p=0.2)

    def saved() -> list[tuple[torch.Size, torch.dtype, bool]]:
        leaves = {name: value.clone().requires_grad_(name in needs) for name, value in call.tensors().items()}
        kept: list[tuple[torch.Size, torch.dtype, bool]] = []

        def keep(value: Tensor) -> Tensor:
            kept.append((value.shape, value.dtype, value.requires_grad))
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            _apply(leaves, call)
        return kept

    found = saved()
    assert bool(found) == bool(needs)
    assert sorted(found, key=str) == sorted(by_python(saved), key=str)


def test_the_node_is_named(seed: int) -> None:
    call = make_call(seed)
    node = _apply(_leaves(call), call).grad_fn
    assert node is not None
    assert node.name() == "torch::autograd::CppNode<peftkernels::LoraLinearBackward>"


def test_only_asked_gradients_are_computed(seed: int) -> None:
    """`torch.autograd.grad` of one argument leaves the others' gradients out, though they require grad."""
    call = make_call(seed)
    leaves = _leaves(call)
    y = _apply(leaves, call)
    asked: list[list[bool]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if operator is torch.ops.peftkernels.lora_linear_bwd.cpu:
                asked.append(args[-1])
            return operator(*args, **(kwargs or {}))

    with Watch():
        (gradient,) = torch.autograd.grad(y, leaves["lora_B"], call.grad_y)
    assert asked == [[name == "lora_B" for name in GRADIENTS]]
    assert torch.equal(gradient, run(call, "cpu").gradients["lora_B"])


class _Blocked(torch.autograd.Function):
    """An operation that gives no gradient back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None


@on_both_ways
def test_an_undefined_gradient_counts_as_zero(seed: int) -> None:
    call = make_call(seed)
    leaves = _leaves(call)
    _Blocked.apply(_apply(leaves, call)).backward(call.grad_y)
    for name in TRAINABLE:
        assert torch.equal(leaves[name].grad, torch.zeros_like(leaves[name])), name


@on_both_ways
@pytest.mark.parametrize("create_graph", [False, True], ids=["", "create_graph"])
def test_batched_incoming_gradients(create_graph: bool, seed: int) -> None:
    call = make_call(seed, plan=True)
    leaves = _leaves(call)
    trained = [leaves[name] for name in TRAINABLE]
    y = _apply(leaves, call)
    grads = torch.stack((call.grad_y, 2 * call.grad_y))
    batched = torch.autograd.grad(
        y, trained, grads, is_grads_batched=True, retain_graph=True, create_graph=create_graph
    )
    for index, grad_y in enumerate(grads):
        one = torch.autograd.grad(y, trained, grad_y, retain_graph=True)
        for found, expected in zip(batched, one, strict=True):
            torch.testing.assert_close(found[index], expected)


@on_both_ways
def test_y_may_be_changed_in_place(seed: int) -> None:
    call = make_call(seed)
    leaves = _leaves(call)
    y = _apply(leaves, call)
    y.mul_(2)[0].zero_()
    y.backward(call.grad_y)
    grad_y = 2 * call.grad_y
    grad_y[0] = 0
    for name, gradient in run(call.replace(grad_y=grad_y), "cpu").gradients.items():
        assert torch.equal(leaves[name].grad, gradient), f"∂{name}"


def _in_threads(count: int, function: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            function(index)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


@on_both_ways
def test_many_threads_train_with_the_same_parameters(seed: int) -> None:
    """Forward and backward in four threads; and one graph differentiated by all of them."""
    call = make_call(seed, plan=True, dropout_p=0.3)
    expected = run(call, "cpu")
    leaves = _leaves(call)
    trained = [leaves[name] for name in TRAINABLE]
    shared = _apply(leaves, call)

    def work(index: int) -> None:
        for y in (_apply(leaves, call), shared):
            gradients = torch.autograd.grad(y, trained, call.grad_y, retain_graph=True)
            assert torch.equal(y, expected.y)
            for name, gradient in zip(TRAINABLE, gradients, strict=True):
                assert torch.equal(gradient, expected.gradients[name]), f"∂{name} in thread {index}"

    _in_threads(4, work)


@on_both_ways
def test_errors_of_hooks_come_through(seed: int) -> None:
    """What a hook for saved tensors raises, in the forward pass or in the backward pass, is what the caller gets."""
    call = make_call(seed)

    def refuse(value: Any) -> Any:
        raise LookupError("refused")

    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(refuse, lambda value: value), pytest.raises(LookupError, match="refused"):
        _apply(_leaves(call), call)
    with hooks(lambda value: value, refuse):
        y = _apply(_leaves(call), call)
    with pytest.raises(LookupError, match="refused"):
        y.backward(call.grad_y)


def test_errors_of_the_kernel_come_through(seed: int) -> None:
    """A plan whose order names a rank that there is not, known once its values are read, is refused the same way."""
    order = torch.tensor([0, 1, 2, 3, 5], dtype=torch.int32)
    plan = RankPlan(torch.full((5,), 2, dtype=torch.uint8), order, torch.full((2,), 5, dtype=torch.int32))
    arguments = {**arguments_of(make_call(seed)), "rank_plan": plan}
    messages = []
    for way in (lambda function: function(), by_python):
        with pytest.raises(ValueError, match="rank_plan") as error:
            way(lambda: lora_linear(**arguments))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith("rank_plan.order: found rank 5 at place 4, expected ranks from 0 to 4")


def test_the_profiler_sees_the_operators(seed: int) -> None:
    call = make_call(seed)
    with torch.autograd.profiler.profile() as profile:
        _apply(_leaves(call), call).backward(call.grad_y)
    names = {event.name for event in profile.function_events}
    assert {"peftkernels::lora_linear_fwd", "peftkernels::lora_linear_bwd"} <= names


@on_both_ways
def test_compiled_autograd(seed: int) -> None:
    """A graph recorded without the compiler, whose backward pass is compiled."""
    from torch._dynamo import compiled_autograd

    call = make_call(seed)
    leaves = _leaves(call)
    y = _apply(leaves, call)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward(call.grad_y)
    for name, gradient in run(call, "cpu").gradients.items():
        assert torch.equal(leaves[name].grad, gradient), f"∂{name}"
