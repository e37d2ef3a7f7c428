"""S of several adapters of one x, made in one pass and given to each call: nothing but the time changes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cases import DTYPES, Call, make_call, run
from support.checks import contains_dead_ranks, reads_a_given_shrink, within_budget
from support.devices import CPU, device_of
from support.implementations import skip_unless_served
from support.routes import representative, shape_for
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peftkernels import lora_linear, shared_shrink
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.linear import routes

ADAPTERS: list[dict[str, Any]] = [
    {"n": 33, "r": 5},
    {"n": 20, "r": 12, "bias": False, "gate": False},
    {"n": 48, "r": 21, "plan": True, "scaling": "tensor"},
]


def calls(seed: int, **shared: Any) -> list[Call]:
    """Calls of three adapters that read one x."""
    made = [make_call(seed + place, **{**shared, **own}) for place, own in enumerate(ADAPTERS)]
    return [call.replace(x=made[0].x) for call in made]


def sharing(made: list[Call], impl: str) -> list[Call]:
    """The same calls, each with its part of a shared S."""
    here = [call.on(device_of(impl)) for call in made]
    parts = shared_shrink(here[0].x, [call.lora_A for call in here], impl=impl)
    return [call.replace(shrink=part) for call, part in zip(here, parts, strict=True)]


@pytest.mark.parametrize("leading", [(7,), (2, 35), (150,), (), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_as_exact_as_without(impl: str, dtype: str, leading: tuple[int, ...], seed: int) -> None:
    for call in sharing(calls(seed, dtype=dtype, leading=leading), impl):
        within_budget(call, impl)


@pytest.mark.parametrize("way", ["library", "tail, tma", "tail, pointer", "single, pointer", "decode, decode"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16-fp32_factors", "bf16-fp32_factors"])
def test_every_way_through_the_triton_kernels(dtype: str, way: str, seed: int) -> None:
    skip_unless_served("triton", dtype)
    known = representative(dtype)
    if way == "library":
        choice, shape = routes.Choice(routes.LIBRARY), {"leading": (2, 35), "n": 33, "k": 29}
    elif way in known:
        choice, shape = known[way], shape_for(known[way])
    else:
        pytest.skip(f"{dtype} has no tile for {way!r} here")
    call = make_call(seed, r=21, plan=True, dtype=dtype, **shape)
    with routes.forced(choice):
        other = torch.randn(3, call.lora_A.shape[1], device=device_of("triton"))
        here = call.on(device_of("triton"))
        _, part = shared_shrink(here.x, [other, here.lora_A], impl="triton")
        within_budget(call.replace(shrink=part.to(call.x.device)), "triton")


def test_k_is_split_where_rows_are_few(seed: int) -> None:
    skip_unless_served("triton")
    k, device = 1900 if device_of("triton") != CPU else 300, device_of("triton")
    kinds = Kinds(torch.float32, torch.float32)
    shared = importlib.import_module("peftkernels.backends.triton.linear.shared_shrink")
    assert shared.parts_of(kinds, device, 3, k, 38).split.splits > 1
    for call in sharing(calls(seed, leading=(3,), k=k), "triton"):
        within_budget(call, "triton")


def test_what_is_given_is_read(impl: str, seed: int) -> None:
    reads_a_given_shrink(make_call(seed, r=6, plan=True), impl)


def test_a_dead_rank_stays_dead(impl: str, seed: int) -> None:
    """Its column of a shared S is made, and not read, whatever is in it."""
    with device_of(impl):
        contains_dead_ranks(make_call(seed, r=9, plan=True), impl)
        call = make_call(seed, r=9, plan=True)
        dead = call.state == 0
        call.lora_A[dead] = torch.nan
        (call,) = (call.replace(shrink=shared_shrink(call.x, [call.lora_A], impl=impl)[0]),)
        assert call.shrink is not None and call.shrink[:, dead].isnan().all()
        found = run(call, impl)
    for name, value in found.named().items():
        assert value.isfinite().all(), name
    assert not found.gradients["lora_A"][dead].any() and not found.gradients["lora_B"][:, dead].any()


def test_the_given_tensor_is_what_is_saved(impl: str, seed: int) -> None:
    call = make_call(seed)
    lora_B = call.lora_B.requires_grad_()
    (shrink,) = shared_shrink(call.x, [call.lora_A], impl=impl)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        lora_linear(call.x, call.weight, call.lora_A, lora_B, shrink=shrink, impl=impl)
    assert sum(tensor.data_ptr() == shrink.data_ptr() for tensor in saved) == 1
    assert not any(tensor.shape == shrink.shape and tensor.data_ptr() != shrink.data_ptr() for tensor in saved)


def test_parts_are_views_of_one_tensor_without_gradients(impl: str, seed: int) -> None:
    made = calls(seed)
    x, factors = made[0].x.requires_grad_(), [call.lora_A.requires_grad_() for call in made]
    parts = shared_shrink(x, factors, impl=impl)
    assert [part.shape for part in parts] == [(7, 5), (7, 12), (7, 21)]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype, seed: int) -> None:
    made = calls(seed)
    with torch.autocast("cpu", dtype):
        parts = shared_shrink(made[0].x, [call.lora_A for call in made])
        for call, part in zip(made, parts, strict=True):
            assert part.dtype == (torch.float32 if dtype is torch.float16 else dtype)
            found, expected = run_autocast(call.replace(shrink=part)), run_autocast(call)
            torch.testing.assert_close(found, expected)


def run_autocast(call: Call) -> Tensor:
    return lora_linear(call.x, call.weight, call.lora_A, call.lora_B, **call.optional)


def test_in_a_compiled_program(seed: int) -> None:
    made = calls(seed)

    def program(x: Tensor) -> list[Tensor]:
        parts = shared_shrink(x, [call.lora_A for call in made], impl="eager")
        return [
            lora_linear(x, call.weight, call.lora_A, call.lora_B, bias=call.bias, shrink=part, impl="eager")
            for call, part in zip(made, parts, strict=True)
        ]

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(made[0].x), program(made[0].x), strict=True):
        torch.testing.assert_close(found, expected)


def test_schemas_and_fakes(impl: str, seed: int) -> None:
    made = calls(seed)
    operators = torch.ops.peftkernels
    torch.library.opcheck(getattr(operators.lora_shrink, impl), (made[0].x, [call.lora_A for call in made]))
    call = sharing(made, impl)[1]
    arguments = (call.x, call.weight, call.lora_A, call.lora_B, *[None] * 5, 1.0, None, 0.0, None)
    for save in (False, True):
        torch.library.opcheck(getattr(operators.lora_linear_fwd, impl), (*arguments, save, call.shrink))
    assert set(operators.lora_shrink.overloads()) == set(operators.lora_linear_fwd.overloads())


def test_flops_are_those_of_separate_calls(seed: int) -> None:
    made = calls(seed)
    with FlopCounterMode(display=False) as apart:
        for call in made:
            lora_linear(call.x, call.weight, call.lora_A, call.lora_B)
    with FlopCounterMode(display=False) as together:
        for call in sharing(made, "eager"):
            lora_linear(call.x, call.weight, call.lora_A, call.lora_B, shrink=call.shrink)
    assert together.get_total_flops() == apart.get_total_flops()


WRONG: dict[str, tuple[Callable[[Call], dict[str, Any]], type[Exception], str]] = {
    "type": (lambda call: {"shrink": 3}, TypeError, "shrink: found int, expected a tensor"),
    "shape": (
        lambda call: {"shrink": torch.zeros(5, 7)},
        ValueError,
        r"shrink: found shape \(5, 7\), expected \(M, r\) = \(7, 5\)",
    ),
    "dtype": (
        lambda call: {"shrink": torch.zeros(7, 5, dtype=torch.float64)},
        TypeError,
        "shrink: found dtype torch.float64, expected torch.float32 where x is torch.float32",
    ),
    "device": (lambda call: {"shrink": torch.zeros(7, 5, device="meta")}, ValueError, "shrink: found device meta"),
    "gradient": (
        lambda call: {"shrink": torch.zeros(7, 5, requires_grad=True)},
        ValueError,
        "shrink: found a tensor that requires grad",
    ),
    "dropout": (
        lambda call: {"shrink": torch.zeros(7, 5), "dropout_p": 0.5},
        ValueError,
        "shrink: found one beside dropout_p = 0.5, expected dropout_p = 0",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_shrinks(wrong: str, seed: int) -> None:
    call = make_call(seed)
    make, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        lora_linear(call.x, call.weight, call.lora_A, call.lora_B, **make(call))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, []), TypeError, "x: found int, expected a tensor"),
        ((torch.zeros(()), []), ValueError, "x: found a 0-dim tensor"),
        ((torch.zeros(2, 3), torch.zeros(1, 3)), TypeError, "lora_A: found Tensor, expected a sequence"),
        ((torch.zeros(2, 3), []), ValueError, "lora_A: found no tensor"),
        ((torch.zeros(2, 3), [torch.zeros(1, 3), None]), TypeError, r"lora_A\[1\]: found NoneType"),
        ((torch.zeros(2, 3), [torch.zeros(1, 4)]), ValueError, r"lora_A\[0\]: found shape \(1, 4\), expected"),
        ((torch.zeros(2, 3), [torch.zeros(1, 3, device="meta")]), ValueError, r"lora_A\[0\]: found device meta"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        shared_shrink(*arguments)


def test_a_named_implementation_is_never_replaced() -> None:
    with pytest.raises(RuntimeError, match="cannot serve"):
        shared_shrink(torch.zeros(2, 3, dtype=torch.float64), [torch.zeros(1, 3)], impl="cpu")
    with pytest.raises(ValueError, match="impl: found 'gpu'"):
        shared_shrink(torch.zeros(2, 3), [torch.zeros(1, 3)], impl="gpu")
