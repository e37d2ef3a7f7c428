"""The direct way from Python's arguments to the C++ kernels: when it is taken, and that it changes nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import GRADIENTS, TRAINABLE, Call, make_call, mixed_plan, run
from support.implementations import skip_unless_served
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from peftkernels import RankPlan, dispatch, functional, lora_linear
from peftkernels._checks import check_arguments
from peftkernels.backends import cpu

OPTIONAL = ("bias", "gate", "rank_plan", "scaling", "dropout_p", "dropout_seed", "impl")
ORDER = ("x", "weight", "lora_A", "lora_B", *OPTIONAL)

TOO_LARGE = 10**400


@pytest.fixture(autouse=True)
def _served() -> None:
    skip_unless_served("cpu")
    lora_linear(torch.ones(1, 2), torch.ones(3, 2), torch.ones(1, 2), torch.ones(3, 1))


@pytest.fixture(params=["direct", "by_python"])
def _both_ways(request: pytest.FixtureRequest) -> None:
    if request.param == "by_python":
        request.getfixturevalue("without_direct_call")


on_both_ways = pytest.mark.usefixtures("_both_ways")


def _arguments(call: Call, impl: str = "auto") -> dict[str, Any]:
    return {**call.tensors(), "bias": call.bias, "gate": call.gate, **call.optional, "impl": impl}


def _direct(arguments: dict[str, Any]) -> Tensor | None:
    return functional._direct_call(*(arguments[name] for name in ORDER))


def _by_python(function: Callable[[], Any]) -> Any:
    """What `function` returns when every call goes through the Python function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "_direct_call", functional._leave_to_python)
        return function()


def _plan_subclass() -> RankPlan:
    plan = mixed_plan(5, torch.Generator())
    return _PlanSubclass(plan.state, plan.order, plan.counts)


class _Subclass(Tensor):
    pass


class _PlanSubclass(RankPlan):
    __slots__ = ()


class _IgnoreFunctions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class _IgnoreOperators(TorchDispatchMode):
    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operator(*args, **(kwargs or {}))


SITUATIONS: dict[str, dict[str, Any]] = {
    "LoRA": {"gate": False, "bias": False},
    "everything": {"plan": True, "scaling": "tensor", "dropout_p": 0.3},
    "bf16-fp32_factors": {"plan": True, "dtype": "bf16-fp32_factors"},
    "fp32-fp64_factors": {"dtype": "fp32-fp64_factors"},
    "one_dimension": {"leading": ()},
    "no_rows": {"leading": (2, 0)},
    "no_ranks": {"r": 0},
}


@pytest.mark.parametrize("impl", ["auto", "cpu"])
@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_plain_calls_are_served(situation: str, gradients: bool, impl: str, seed: int) -> None:
    call = make_call(seed, **SITUATIONS[situation])
    if dispatch.choose("auto", call.x, call.weight) != "cpu" and impl == "auto":
        pytest.skip(str(dispatch.explain_choice(call.x, call.weight)))
    if gradients:
        call.lora_A.requires_grad_()
    y = _direct(_arguments(call, impl))
    assert y is not None
    assert y.requires_grad == gradients
    assert type(y) is Tensor


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_parameters_and_gradient_modes_are_served(mode: Any, seed: int) -> None:
    call = make_call(seed)
    call = call.replace(lora_A=nn.Parameter(call.lora_A), weight=nn.Parameter(call.weight, requires_grad=False))
    with mode():
        y = _direct(_arguments(call))
    assert y is not None
    assert y.requires_grad == (mode is torch.enable_grad)
    assert y.is_inference() == (mode is torch.inference_mode)


# name of the situation: what is changed in the arguments, all of which the Python function serves
LEFT_TO_PYTHON: dict[str, Callable[[Call], dict[str, Any]]] = {
    "reference": lambda call: {"impl": "reference"},
    "eager": lambda call: {"impl": "eager"},
    "trained_weight": lambda call: {"weight": call.weight.requires_grad_()},
    "float64": lambda call: {name: value.double() for name, value in call.tensors().items()},
    "subclass": lambda call: {"x": call.x.as_subclass(_Subclass)},
    "subclass_of_a_bias": lambda call: {"bias": call.bias.as_subclass(_Subclass)},  # type: ignore[union-attr]
    "subclass_of_a_parameter": lambda call: {"lora_A": nn.Parameter(call.lora_A.as_subclass(_Subclass))},
    "subclass_of_a_plan": lambda call: {"rank_plan": _plan_subclass()},
    "negative_view": lambda call: {"x": torch.view_as_complex(torch.randn(7, 29, 2)).conj().imag},
    "scaling_of_numpy": lambda call: {"scaling": np.float64(1.5)},
    "meta": lambda call: {name: value.to("meta") for name, value in call.tensors().items()},
}


@pytest.mark.parametrize("situation", LEFT_TO_PYTHON)
def test_other_arguments_are_left_to_python(situation: str, seed: int) -> None:
    call = make_call(seed)
    arguments = {**_arguments(call), **LEFT_TO_PYTHON[situation](call)}
    assert _direct(arguments) is None
    assert lora_linear(**arguments).shape == (7, 33)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "FakeTensorMode": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "FlopCounterMode": lambda: FlopCounterMode(display=False),
    "TorchDispatchMode": _IgnoreOperators,
    "TorchFunctionMode": _IgnoreFunctions,
    "device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_leave_the_call_to_python(mode: str, seed: int) -> None:
    arguments = _arguments(make_call(seed))
    with MODES[mode]():
        assert _direct(arguments) is None
        assert lora_linear(**arguments).shape == (7, 33)
    assert _direct(arguments) is not None


def test_autocast_switched_off_inside_is_no_autocast(seed: int) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert _direct(_arguments(make_call(seed))) is not None


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_leave_the_call_to_python(transform: str, seed: int) -> None:
    """For what is transformed and for what only stands beside it."""
    call = make_call(seed)
    answers: list[Tensor | None] = []

    def function(x: Tensor) -> Tensor:
        answers.append(_direct({**_arguments(call), "x": x}))
        answers.append(_direct(_arguments(call)))
        return x.sum()

    x = torch.randn(29)
    if transform == "vmap":
        torch.func.vmap(function)(torch.randn(2, 29))
    elif transform == "grad":
        torch.func.grad(function)(x)
    else:
        torch.func.jvp(function, (x,), (x,))
    assert answers == [None, None]


def test_forward_gradients_leave_the_call_to_python(seed: int) -> None:
    call = make_call(seed)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(call.x, torch.ones_like(call.x))
        assert _direct({**_arguments(call), "x": dual}) is None


def test_a_traced_call_is_left_to_python(seed: int) -> None:
    call = make_call(seed)
    answers: list[Tensor | None] = []

    def function(x: Tensor) -> Tensor:
        answers.append(_direct({**_arguments(call), "x": x}))
        return lora_linear(x, call.weight, call.lora_A, call.lora_B)

    traced = torch.jit.trace(function, call.x)
    assert answers[0] is None
    assert "peftkernels::lora_linear_fwd" in str(traced.graph)


def test_compiled_calls_do_not_take_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*arguments: Any) -> None:
        raise AssertionError("the direct call ran in a compiled program")

    call = make_call(seed)
    expected = lora_linear(call.x, call.weight, call.lora_A, call.lora_B)
    monkeypatch.setattr(functional, "_direct_call", called)
    torch._dynamo.reset()
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(call.x, call.weight, call.lora_A, call.lora_B), expected)
    with pytest.raises(AssertionError, match="the direct call ran"):
        lora_linear(call.x, call.weight, call.lora_A, call.lora_B)
    torch._dynamo.reset()


def test_an_exported_call_holds_the_operator(seed: int) -> None:
    call = make_call(seed)

    class Layer(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
            return lora_linear(x, weight, lora_A, lora_B)

    for strict in (False, True):
        program = torch.export.export(Layer(), (call.x, call.weight, call.lora_A, call.lora_B), strict=strict)
        assert "lora_linear_fwd.cpu" in program.graph_module.code, f"strict={strict}"


def test_packs_that_are_not_kept(seed: int) -> None:
    """Then "auto" takes another implementation, and asks Python for it; impl="cpu" is served as before."""
    call, before = make_call(seed), cpu.pack_cache_stats()["mode"]
    assert isinstance(before, str)
    cpu.set_pack_mode("off")
    try:
        assert dispatch.choose("auto", call.x, call.weight) == "eager"
        assert _direct(_arguments(call)) is None
        assert _direct(_arguments(call, "cpu")) is not None
    finally:
        cpu.set_pack_mode(before)
    assert _direct(_arguments(call)) is not None


@st.composite
def _any_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of exact types, valid but for up to two, which may be wrong in shape, dtype, device or value."""
    n, k, r = (draw(st.integers(0, 4)) for _ in range(3))
    odd = draw(st.sets(st.sampled_from(ORDER), max_size=2))
    usual = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64])
    factor = draw(st.sampled_from([usual, torch.float32, torch.bfloat16, torch.float64, torch.int32]))

    def tensor(name: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> Tensor:
        shape, device = shapes[0], "cpu"
        if name in odd:
            shape, dtype = draw(st.sampled_from(shapes)), draw(st.just(dtype) | dtypes)
            device = draw(st.sampled_from(["cpu", "cpu", "cpu", "meta"]))
        trained = dtype.is_floating_point and (name != "weight" or name in odd) and draw(st.booleans())
        return torch.zeros(shape, dtype=dtype, device=device, requires_grad=trained)

    def value(name: str, usual: list[Any], unusual: list[Any]) -> Any:
        return draw(st.sampled_from(unusual if name in odd else usual))

    leading = draw(st.sampled_from([(), (0,), (3,), (2, 3)]))
    gate_shape = draw(st.sampled_from([(r,), (r, 1)]))
    states = torch.full((value("rank_plan", [r], [r + 1, 0]),), 2, dtype=torch.uint8)
    seeds = [2**63, -(2**63) - 1, True, 1.0, "1", torch.tensor(3.0), torch.zeros(1, dtype=torch.int64)]
    scalings = [-2, 0, TOO_LARGE, True, "1", None, torch.zeros(1), torch.tensor(1), torch.tensor(1.0).requires_grad_()]
    return {
        "x": tensor("x", usual, (*leading, k), (*leading, k + 1), ()),
        "weight": tensor("weight", usual, (n, k), (k, n), (n,), (1, n, k)),
        "lora_A": tensor("lora_A", factor, (r, k), (k, r), (r,)),
        "lora_B": tensor("lora_B", factor, (n, r), (r, n), ()),
        "bias": tensor("bias", usual, (n,), (n, 1), (n + 1,)) if draw(st.booleans()) else None,
        "gate": tensor("gate", factor, gate_shape, (1, r), ()) if draw(st.booleans()) else None,
        "rank_plan": RankPlan.from_state(states) if draw(st.booleans()) else None,
        "scaling": value("scaling", [1.5, 2, torch.tensor(2.0), torch.tensor(2.0).double()], scalings),
        "dropout_p": value("dropout_p", [0.0, 0.25, 1.0, 1], [-0.1, 1.1, float("nan"), True, "0", None]),
        "dropout_seed": value("dropout_seed", [None, 0, -(2**63), 2**63 - 1, torch.tensor(3)], seeds),
        "impl": value("impl", ["auto", "cpu"], ["eager", "reference", "triton", "CPU", None, 3]),
    }


@settings(max_examples=1000)
@given(arguments=_any_arguments())
def test_it_serves_what_python_would_give_to_the_kernels_and_nothing_else(arguments: dict[str, Any]) -> None:
    """The checks and the choice, made twice, agree; where the call is declined, no seed is drawn."""
    try:
        check_arguments(*(arguments[name] for name in ORDER[:-1]))
        expected = dispatch.choose(arguments["impl"], arguments["x"], arguments["weight"]) == "cpu"
    except (TypeError, ValueError, RuntimeError):
        expected = False
    # Passes the checks, and cannot be handed to any operator.
    expected &= arguments["scaling"] is not TOO_LARGE
    before = torch.random.get_rng_state()
    assert (_direct(arguments) is not None) == expected
    if not expected:
        assert torch.equal(torch.random.get_rng_state(), before)


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
    needs=st.sets(st.sampled_from(TRAINABLE)),
)
def test_both_ways_give_the_same_bits(
    seed: int, dtype: str, dropout: str, needs: set[str], bias: bool, gate: bool, **shape: Any
) -> None:
    call = make_call(seed, dtype=dtype, bias=bias, gate=gate, dropout_p=0.0 if dropout == "none" else 0.4, **shape)
    if dropout != "none":
        seeds = {"drawn": None, "int": seed - 2**30, "tensor": torch.tensor(seed)}
        call = call.replace(dropout_seed=seeds[dropout])
    asked = tuple(name for name in TRAINABLE if name in needs and name in call.tensors())
    assert _direct(_arguments(call, "cpu")) is not None

    def outcome() -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(seed)
        return run(call, "cpu", asked).named(), torch.random.get_rng_state()

    (found, generator), (expected, expected_generator) = outcome(), _by_python(outcome)
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
    assert found == _by_python(saved)


def test_the_node_is_named(seed: int) -> None:
    call = make_call(seed)
    node = _apply(_leaves(call), call).grad_fn
    assert node is not None
    assert node.name() == "torch::autograd::CppNode<peftkernels::cpu::LoraLinearBackward>"


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
        assert torch.equal(leaves[name].grad, torch.zeros_like(leaves[name])), name  # type: ignore[arg-type]


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
        assert torch.equal(leaves[name].grad, gradient), f"∂{name}"  # type: ignore[arg-type]


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
    """A plan whose order has the wrong dtype, which nobody checks before the kernel, is refused the same way."""
    plan = RankPlan(torch.full((5,), 2, dtype=torch.uint8), torch.arange(5), torch.full((2,), 5, dtype=torch.int32))
    arguments = {**_arguments(make_call(seed)), "rank_plan": plan}
    messages = []
    for way in (lambda function: function(), _by_python):
        with pytest.raises(RuntimeError) as error:
            way(lambda: lora_linear(**arguments))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "expected scalar type Int but found Long" in messages[0]


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
    torch._dynamo.reset()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward(call.grad_y)
    torch._dynamo.reset()
    for name, gradient in run(call, "cpu").gradients.items():
        assert torch.equal(leaves[name].grad, gradient), f"∂{name}"  # type: ignore[arg-type]


def test_other_implementations_do_not_load_the_kernels() -> None:
    program = (
        "import sys, torch\n"
        "from peftkernels import lora_linear\n"
        "for impl in ('eager', 'reference'):\n"
        "    lora_linear(torch.ones(1, 2), torch.ones(3, 2), torch.ones(1, 2), torch.ones(3, 1), impl=impl)\n"
        "print('peftkernels._C' in sys.modules)\n"
        "lora_linear(torch.ones(1, 2), torch.ones(3, 2), torch.ones(1, 2), torch.ones(3, 1))\n"
        "print('peftkernels._C' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "True"]
