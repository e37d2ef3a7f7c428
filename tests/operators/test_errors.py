"""Every wrong argument: the error names it, what was found and what was expected, and comes before any kernel runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.devices import FROZEN_WEIGHTS, device_of, moved, moved_plan
from torch import Tensor

from peftkernels import RankPlan, explain, lora_linear
from peftkernels.backends import registry, triton
from peftkernels.functional import linear

X, N, K, R = (2, 3, 5), 4, 5, 2


def _valid() -> dict[str, Any]:
    return {
        "x": torch.randn(X),
        "weight": torch.randn(N, K),
        "lora_A": torch.randn(R, K),
        "lora_B": torch.randn(N, R),
        "bias": torch.randn(N),
        "gate": torch.randn(R),
        "rank_plan": RankPlan.from_state(torch.tensor([2, 1], dtype=torch.uint8)),
        "scaling": 1.5,
        "dropout_p": 0.25,
        "dropout_seed": None,
    }


def _meta(*shape: int) -> Tensor:
    return torch.randn(*shape, device="meta")


def _on(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments on `device`, those on the meta device as they are."""

    def there(value: Any) -> Any:
        if isinstance(value, RankPlan):
            return moved_plan(value, device)
        return moved(value, device) if isinstance(value, Tensor) and not value.is_meta else value

    return {name: there(value) for name, value in arguments.items()}


def _plan(*state: int, device: str = "cpu") -> RankPlan:
    plan = RankPlan.from_state(torch.tensor(state, dtype=torch.uint8))
    return RankPlan(*(value.to(device) for value in (plan.state, plan.order, plan.counts)))


FLOATS = "expected float32, bfloat16, float16 or float64"
# name of the case: (what to change, error, message)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x_list": ({"x": [1.0]}, TypeError, "x: found list, expected a tensor"),
    "x_none": ({"x": None}, TypeError, "x: found NoneType, expected a tensor"),
    "x_int": ({"x": torch.ones(X, dtype=torch.int64)}, TypeError, f"x: found dtype torch.int64, {FLOATS}"),
    "x_complex": (
        {"x": torch.ones(X, dtype=torch.complex64)},
        TypeError,
        f"x: found dtype torch.complex64, {FLOATS}",
    ),
    "x_float8": (
        {"x": torch.ones(X).to(torch.float8_e4m3fn)},
        TypeError,
        f"x: found dtype torch.float8_e4m3fn, {FLOATS}",
    ),
    "x_scalar": ({"x": torch.tensor(1.0)}, ValueError, "x: found a 0-dim tensor, expected shape (..., K)"),
    "x_depth": (
        {"x": torch.randn(2, 6)},
        ValueError,
        "x: found shape (2, 6), expected (..., K) with weight's K = 5",
    ),
    "weight_array": ({"weight": 3.0}, TypeError, "weight: found float, expected a tensor"),
    "weight_int": (
        {"weight": torch.ones(N, K, dtype=torch.int8)},
        TypeError,
        f"weight: found dtype torch.int8, {FLOATS}",
    ),
    "weight_dims": ({"weight": torch.randn(K)}, ValueError, "weight: found shape (5,), expected (N, K)"),
    "weight_3d": ({"weight": torch.randn(1, N, K)}, ValueError, "weight: found shape (1, 4, 5), expected (N, K)"),
    "weight_dtype": (
        {"weight": torch.randn(N, K).bfloat16()},
        TypeError,
        "weight: found dtype torch.bfloat16, expected x's, torch.float32",
    ),
    "weight_device": ({"weight": _meta(N, K)}, ValueError, "weight: found device meta, expected x's, cpu"),
    "lora_A_none": ({"lora_A": None}, TypeError, "lora_A: found NoneType, expected a tensor"),
    "lora_A_bool": (
        {"lora_A": torch.ones(R, K, dtype=torch.bool)},
        TypeError,
        f"lora_A: found dtype torch.bool, {FLOATS}",
    ),
    "lora_A_depth": (
        {"lora_A": torch.randn(R, 6)},
        ValueError,
        "lora_A: found shape (2, 6), expected (r, K) with weight's K = 5",
    ),
    "lora_A_dims": (
        {"lora_A": torch.randn(K)},
        ValueError,
        "lora_A: found shape (5,), expected (r, K) with weight's K = 5",
    ),
    "lora_A_transposed": (
        {"lora_A": torch.randn(K, R)},
        ValueError,
        "lora_A: found shape (5, 2), expected (r, K) with weight's K = 5",
    ),
    "lora_A_device": ({"lora_A": _meta(R, K)}, ValueError, "lora_A: found device meta, expected x's, cpu"),
    "lora_B_string": ({"lora_B": "B"}, TypeError, "lora_B: found str, expected a tensor"),
    "lora_B_int": (
        {"lora_B": torch.ones(N, R, dtype=torch.int32)},
        TypeError,
        f"lora_B: found dtype torch.int32, {FLOATS}",
    ),
    "lora_B_rank": ({"lora_B": torch.randn(N, 3)}, ValueError, "lora_B: found shape (4, 3), expected (N, r) = (4, 2)"),
    "lora_B_transposed": (
        {"lora_B": torch.randn(R, N)},
        ValueError,
        "lora_B: found shape (2, 4), expected (N, r) = (4, 2)",
    ),
    "lora_B_dims": ({"lora_B": torch.randn(N)}, ValueError, "lora_B: found shape (4,), expected (N, r) = (4, 2)"),
    "lora_B_dtype": (
        {"lora_B": torch.randn(N, R).double()},
        TypeError,
        "lora_B: found dtype torch.float64, expected lora_A's, torch.float32",
    ),
    "lora_B_device": ({"lora_B": _meta(N, R)}, ValueError, "lora_B: found device meta, expected x's, cpu"),
    "bias_list": ({"bias": [0.0] * N}, TypeError, "bias: found list, expected a tensor"),
    "bias_int": (
        {"bias": torch.ones(N, dtype=torch.int64)},
        TypeError,
        f"bias: found dtype torch.int64, {FLOATS}",
    ),
    "bias_shape": ({"bias": torch.randn(K)}, ValueError, "bias: found shape (5,), expected (N,) = (4,)"),
    "bias_row": ({"bias": torch.randn(1, N)}, ValueError, "bias: found shape (1, 4), expected (N,) = (4,)"),
    "bias_dtype": (
        {"bias": torch.randn(N).half()},
        TypeError,
        "bias: found dtype torch.float16, expected x's, torch.float32",
    ),
    "bias_device": ({"bias": _meta(N)}, ValueError, "bias: found device meta, expected x's, cpu"),
    "gate_float": ({"gate": 1.0}, TypeError, "gate: found float, expected a tensor"),
    "gate_int": (
        {"gate": torch.ones(R, dtype=torch.int64)},
        TypeError,
        f"gate: found dtype torch.int64, {FLOATS}",
    ),
    "gate_shape": (
        {"gate": torch.randn(3)},
        ValueError,
        "gate: found shape (3,), expected (r,) = (2,) or (r, 1) = (2, 1)",
    ),
    "gate_row": (
        {"gate": torch.randn(1, R)},
        ValueError,
        "gate: found shape (1, 2), expected (r,) = (2,) or (r, 1) = (2, 1)",
    ),
    "gate_scalar": (
        {"gate": torch.tensor(1.0)},
        ValueError,
        "gate: found shape (), expected (r,) = (2,) or (r, 1) = (2, 1)",
    ),
    "gate_device": ({"gate": _meta(R)}, ValueError, "gate: found device meta, expected x's, cpu"),
    "plan_tensor": (
        {"rank_plan": torch.ones(R, dtype=torch.uint8)},
        TypeError,
        "rank_plan: found Tensor, expected a RankPlan",
    ),
    "plan_ranks": (
        {"rank_plan": _plan(2, 1, 0)},
        ValueError,
        "rank_plan.state: found shape (3,), expected (r,) = (2,)",
    ),
    "plan_device": (
        {"rank_plan": _plan(2, 1, device="meta")},
        ValueError,
        "rank_plan: found device meta, expected x's, cpu",
    ),
    "scaling_none": ({"scaling": None}, TypeError, "scaling: found NoneType, expected a float or a 0-dim tensor"),
    "scaling_bool": ({"scaling": True}, TypeError, "scaling: found bool, expected a float or a 0-dim tensor"),
    "scaling_string": ({"scaling": "2"}, TypeError, "scaling: found str, expected a float or a 0-dim tensor"),
    "scaling_vector": (
        {"scaling": torch.ones(1)},
        ValueError,
        "scaling: found shape (1,), expected a float or a 0-dim tensor",
    ),
    "scaling_int_tensor": ({"scaling": torch.tensor(2)}, TypeError, f"scaling: found dtype torch.int64, {FLOATS}"),
    "scaling_device": (
        {"scaling": torch.tensor(1.0, device="meta")},
        ValueError,
        "scaling: found device meta, expected x's, cpu",
    ),
    "scaling_requires_grad": (
        {"scaling": torch.tensor(1.0, requires_grad=True)},
        ValueError,
        "scaling: found a tensor that requires grad, expected one that does not",
    ),
    "dropout_p_none": ({"dropout_p": None}, TypeError, "dropout_p: found NoneType, expected a float in [0, 1]"),
    "dropout_p_bool": ({"dropout_p": True}, TypeError, "dropout_p: found bool, expected a float in [0, 1]"),
    "dropout_p_false": ({"dropout_p": False}, TypeError, "dropout_p: found bool, expected a float in [0, 1]"),
    "dropout_p_string": ({"dropout_p": "0.1"}, TypeError, "dropout_p: found str, expected a float in [0, 1]"),
    "dropout_p_tensor": (
        {"dropout_p": torch.tensor(0.1)},
        TypeError,
        "dropout_p: found Tensor, expected a float in [0, 1]",
    ),
    "dropout_p_vector": (
        {"dropout_p": torch.tensor([0.1, 0.2])},
        TypeError,
        "dropout_p: found Tensor, expected a float in [0, 1]",
    ),
    "dropout_p_negative": ({"dropout_p": -0.1}, ValueError, "dropout_p: found -0.1, expected a float in [0, 1]"),
    "dropout_p_above_one": ({"dropout_p": 1.01}, ValueError, "dropout_p: found 1.01, expected a float in [0, 1]"),
    "dropout_p_percent": ({"dropout_p": 10}, ValueError, "dropout_p: found 10, expected a float in [0, 1]"),
    "dropout_p_nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p: found nan, expected a float in [0, 1]"),
    "seed_float": (
        {"dropout_seed": 1.0},
        TypeError,
        "dropout_seed: found float, expected an int or a 0-dim int64 tensor",
    ),
    "seed_bool": (
        {"dropout_seed": True},
        TypeError,
        "dropout_seed: found bool, expected an int or a 0-dim int64 tensor",
    ),
    "seed_too_large": (
        {"dropout_seed": 2**63},
        ValueError,
        f"dropout_seed: found {2**63}, expected a value that fits in int64",
    ),
    "seed_too_small": (
        {"dropout_seed": -(2**63) - 1},
        ValueError,
        f"dropout_seed: found {-(2**63) - 1}, expected a value that fits in int64",
    ),
    "seed_int32_tensor": (
        {"dropout_seed": torch.tensor(1, dtype=torch.int32)},
        TypeError,
        "dropout_seed: found dtype torch.int32, expected torch.int64",
    ),
    "seed_vector": (
        {"dropout_seed": torch.tensor([1])},
        ValueError,
        "dropout_seed: found shape (1,), expected a 0-dim tensor",
    ),
    "seed_device": (
        {"dropout_seed": torch.tensor(1, device="meta")},
        ValueError,
        "dropout_seed: found device meta, expected x's, cpu",
    ),
    "seed_without_dropout": (
        {"dropout_p": 0.0, "dropout_seed": "zero"},
        TypeError,
        "dropout_seed: found str, expected an int or a 0-dim int64 tensor",
    ),
}
every_wrong_call = pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)


@pytest.fixture
def _no_kernel_may_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every operator raises, and the random generator must not have been used."""

    def ran(*arguments: Any) -> None:
        raise AssertionError("a kernel ran before the error")

    direct_call = linear._direct_call

    def declines(*arguments: Any) -> None:
        assert direct_call(*arguments) is None, "a kernel ran before the error"

    for name in list(registry.OPERATORS):
        monkeypatch.setitem(registry.OPERATORS, name, registry.Operators(ran, ran, ran))
    monkeypatch.setattr(linear, "_direct_call", declines)
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before), "a seed was drawn before the error"


def _call(function: Any, changes: dict[str, Any], valid: dict[str, Any], **keywords: Any) -> Any:
    arguments = {**valid, **changes}
    positional = [arguments.pop(name) for name in ("x", "weight", "lora_A", "lora_B")]
    return function(*positional, **arguments, **keywords)


VALID = _valid()


@pytest.mark.usefixtures("_no_kernel_may_run")
@every_wrong_call
@pytest.mark.parametrize("name", ["auto", "reference", "eager", "cpu"])
def test_lora_linear(changes: dict[str, Any], error: type[Exception], message: str, name: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        _call(lora_linear, changes, VALID, impl=name)


@pytest.mark.usefixtures("_no_kernel_may_run")
@every_wrong_call
def test_explain(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        _call(explain, changes, VALID)


@pytest.mark.usefixtures("_no_kernel_may_run")
@pytest.mark.parametrize("name", ["auto", "reference", "eager", "cpu"])
def test_the_fixture_notices_a_kernel(name: str) -> None:
    with pytest.raises(AssertionError, match="a kernel ran before the error"):
        _call(lora_linear, {"dropout_seed": 1}, VALID, impl=name)


def test_the_unchanged_call_is_served(impl: str) -> None:
    assert _call(lora_linear, {}, _on(torch.get_default_device(), VALID), impl=impl).shape == (2, 3, N)


@pytest.mark.usefixtures("_no_kernel_may_run")
@pytest.mark.parametrize("name", ["fastest", "", "CPU", None, 3, ["cpu"]], ids=repr)
def test_an_unknown_implementation(name: Any) -> None:
    message = f"impl: found {name!r}, expected 'auto' or one of reference, eager, cpu, triton, cuda"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        _call(lora_linear, {}, VALID, impl=name)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "cpu_float64": (
        "cpu",
        {name: VALID[name].double() for name in ("x", "weight", "lora_A", "lora_B", "bias", "gate")},
        "x is torch.float64",
    ),
    "cpu_trainable_weight": (
        "cpu",
        {"weight": torch.randn(N, K, requires_grad=True)},
        "weight requires grad, the C++ kernels serve frozen weights",
    ),
    "cpu_on_another_device": (
        "cpu",
        {name: VALID[name].to("meta") for name in ("x", "weight", "lora_A", "lora_B", "bias", "gate")}
        | {"rank_plan": None},
        "x is on meta, the C++ kernels run on the CPU",
    ),
    "triton_float64": (
        "triton",
        {name: VALID[name].double() for name in ("x", "weight", "lora_A", "lora_B", "bias", "gate")},
        "x is torch.float64, the Triton kernels compute in float32, float16 and bfloat16",
    ),
    "triton_trainable_weight": (
        "triton",
        {"weight": torch.randn(N, K, requires_grad=True)},
        "weight requires grad, the Triton kernels serve frozen weights",
    ),
    "triton_on_another_device": (
        "triton",
        {name: VALID[name].to("meta") for name in ("x", "weight", "lora_A", "lora_B", "bias", "gate")}
        | {"rank_plan": None},
        "x is on meta, ",
    ),
    "cuda": ("cuda", {}, "this version of peftkernels has no CUDA C++ kernels"),
}


@pytest.mark.usefixtures("_no_kernel_may_run")
@pytest.mark.parametrize(("name", "changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_named_implementation_that_cannot_serve(name: str, changes: dict[str, Any], reason: str) -> None:
    """RuntimeError with the reason; never another implementation instead."""
    message = f"impl='{name}' cannot serve this call: {reason}"
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        _call(lora_linear, _on(device_of(name), changes), _on(device_of(name), VALID), impl=name)


@pytest.mark.skipif(not triton.interpreting(), reason="bfloat16 is served where the Triton kernels are compiled")
@pytest.mark.usefixtures("_no_kernel_may_run")
def test_bf16_where_triton_is_interpreted() -> None:
    changes = {name: VALID[name].bfloat16() for name in ("x", "weight", "lora_A", "lora_B", "bias", "gate")}
    message = "impl='triton' cannot serve this call: x is torch.bfloat16, which Triton's interpreter multiplies wrongly"
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        _call(lora_linear, changes, VALID, impl="triton")


@pytest.mark.usefixtures("without_direct_call", "_no_kernel_may_run")
def test_fp16_on_the_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftkernels.backends.cpu.serving._unavailable_reason", lambda: None)
    changes = {name: VALID[name].half() for name in ("x", "weight", "lora_A", "lora_B", "bias", "gate")}
    message = "impl='cpu' cannot serve this call: x is torch.float16, the C++ kernels compute in float32 and bfloat16"
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        _call(lora_linear, changes, VALID, impl="cpu")


@pytest.mark.usefixtures("_no_kernel_may_run")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": torch.randn(N, K).double()},
            "weight: found dtype torch.float64, expected x's, torch.float32",
        ),
        (
            {"x": torch.randn(X).double()},
            "weight: found dtype torch.float32, expected x's, torch.float64",
        ),
        ({"bias": torch.randn(N).double()}, "bias: found dtype torch.float64, expected x's, torch.float32"),
    ],
    ids=["weight", "x", "bias"],
)
def test_autocast_casts_no_float64(changes: dict[str, Any], message: str) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="^" + re.escape(message)):
        _call(lora_linear, changes, VALID)


def test_operators_of_frozen_weights_refuse_a_weight_gradient_themselves(impl: str) -> None:
    """Who calls the operator past the public function is not served in silence either."""
    backward = getattr(torch.ops.peftkernels.lora_linear_bwd, impl)
    here = _on(torch.get_default_device(), VALID)
    rest = [None, torch.zeros(6, R), None, None, None, None, 1.0, None, 0.0, None, [False, True, *[False] * 4]]
    arguments = (torch.randn(6, N), torch.randn(6, K), here["weight"], here["lora_A"], here["lora_B"], *rest)
    if impl in FROZEN_WEIGHTS:
        with pytest.raises(RuntimeError, match=r"kernels? serves? frozen (weights|ones)"):
            backward(*arguments)
    else:
        assert backward(*arguments)[1].shape == (N, K)
