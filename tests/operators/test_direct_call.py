"""The direct way to the C++ kernels: when it is taken, and when the call is left to Python."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import Call, make_call, mixed_plan
from support.direct import ORDER, arguments_of, direct, load
from support.implementations import skip_unless_served
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from peftkernels import RankPlan, lora_linear
from peftkernels.backends import cpu, registry
from peftkernels.functional import linear
from peftkernels.functional.checks import adapter_of, check_call
from peftkernels.ops import call as records

TOO_LARGE = 10**400


@pytest.fixture(autouse=True)
def _served() -> None:
    skip_unless_served("cpu")
    load()


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
    if registry.choose("auto", call.request()) != "cpu" and impl == "auto":
        pytest.skip(str(registry.explain_choice(call.request())))
    if gradients:
        call.lora_A.requires_grad_()
    y = direct(arguments_of(call, impl))
    assert y is not None
    assert y.requires_grad == gradients
    assert type(y) is Tensor


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_parameters_and_gradient_modes_are_served(mode: Any, seed: int) -> None:
    call = make_call(seed)
    call = call.replace(lora_A=nn.Parameter(call.lora_A), weight=nn.Parameter(call.weight, requires_grad=False))
    with mode():
        y = direct(arguments_of(call))
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
    "subclass_of_a_bias": lambda call: {"bias": call.bias.as_subclass(_Subclass)},
    "subclass_of_a_parameter": lambda call: {"lora_A": nn.Parameter(call.lora_A.as_subclass(_Subclass))},
    "subclass_of_a_plan": lambda call: {"rank_plan": _plan_subclass()},
    "negative_view": lambda call: {"x": torch.view_as_complex(torch.randn(7, 29, 2)).conj().imag},
    "scaling_of_numpy": lambda call: {"scaling": np.float64(1.5)},
    "meta": lambda call: {name: value.to("meta") for name, value in call.tensors().items()},
}


@pytest.mark.parametrize("situation", LEFT_TO_PYTHON)
def test_other_arguments_are_left_to_python(situation: str, seed: int) -> None:
    call = make_call(seed)
    arguments = {**arguments_of(call), **LEFT_TO_PYTHON[situation](call)}
    assert direct(arguments) is None
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
    arguments = arguments_of(make_call(seed))
    with MODES[mode]():
        assert direct(arguments) is None
        assert lora_linear(**arguments).shape == (7, 33)
    assert direct(arguments) is not None


def test_autocast_switched_off_inside_is_no_autocast(seed: int) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert direct(arguments_of(make_call(seed))) is not None


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_leave_the_call_to_python(transform: str, seed: int) -> None:
    """For what is transformed and for what only stands beside it."""
    call = make_call(seed)
    answers: list[Tensor | None] = []

    def function(x: Tensor) -> Tensor:
        answers.append(direct({**arguments_of(call), "x": x}))
        answers.append(direct(arguments_of(call)))
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
        assert direct({**arguments_of(call), "x": dual}) is None


def test_a_traced_call_is_left_to_python(seed: int) -> None:
    call = make_call(seed)
    answers: list[Tensor | None] = []

    def function(x: Tensor) -> Tensor:
        answers.append(direct({**arguments_of(call), "x": x}))
        return lora_linear(x, call.weight, call.lora_A, call.lora_B)

    traced = torch.jit.trace(function, call.x)
    assert answers[0] is None
    assert "peftkernels::lora_linear_fwd" in str(traced.graph)


def test_compiled_calls_do_not_take_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*arguments: Any) -> None:
        raise AssertionError("the direct call ran in a compiled program")

    call = make_call(seed)
    expected = lora_linear(call.x, call.weight, call.lora_A, call.lora_B)
    monkeypatch.setattr(linear, "_direct_call", called)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(call.x, call.weight, call.lora_A, call.lora_B), expected)
    with pytest.raises(AssertionError, match="the direct call ran"):
        lora_linear(call.x, call.weight, call.lora_A, call.lora_B)


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
        assert registry.choose("auto", call.request()) == "eager"
        assert direct(arguments_of(call)) is None
        assert direct(arguments_of(call, "cpu")) is not None
    finally:
        cpu.set_pack_mode(before)
    assert direct(arguments_of(call)) is not None


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
    rows = math.prod(leading)
    shrink = None
    if "shrink" in odd or draw(st.booleans()):
        shrink = tensor("shrink", usual, (rows, r), (rows, r + 1), (rows + 1, r), (r,))
        shrink.requires_grad_("shrink" in odd and shrink.requires_grad)
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
        "shrink": shrink,
        "impl": value("impl", ["auto", "cpu"], ["eager", "reference", "triton", "CPU", None, 3]),
    }


def _checked(x: Any, weight: Any, bias: Any, shrink: Any, **adapter: Any) -> records.Call:
    call = records.Call(x, weight, adapter_of(**adapter), bias, shrink)
    check_call(call)
    return call


@settings(max_examples=1000)
@given(arguments=_any_arguments())
def test_it_serves_what_python_would_give_to_the_kernels_and_nothing_else(arguments: dict[str, Any]) -> None:
    """The checks and the choice, made twice, agree; where the call is declined, no seed is drawn."""
    try:
        call = _checked(**{name: value for name, value in arguments.items() if name != "impl"})
        expected = registry.choose(arguments["impl"], call) == "cpu"
    except (TypeError, ValueError, RuntimeError):
        expected = False
    # Passes the checks, and cannot be handed to any operator.
    expected &= arguments["scaling"] is not TOO_LARGE
    before = torch.random.get_rng_state()
    assert (direct(arguments) is not None) == expected
    if not expected:
        assert torch.equal(torch.random.get_rng_state(), before)


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
