"""A backend that somebody else adds: taken by name and by "auto", checked, compiled and differentiated like ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from support.cases import Call, make_call, run
from support.checks import within_budget
from torch import Tensor
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

from peftkernels import Backend, explain, lora_linear, nn, register_backend, shared_shrink
from peftkernels.ops import call as records
from peftkernels.ops import reference

made: list[str] = []


def _forward(call: records.Forward) -> tuple[Tensor, Tensor | None]:
    made.append("forward")
    y, shrink = reference.lora_linear_forward(call)
    return y, shrink if call.saves_shrink else None


def _backward(call: records.Backward) -> tuple[Tensor, ...]:
    made.append("backward")
    rows = torch.zeros(*call.grad_y.shape[:-1], call.weight.shape[1]) if call.x is None else call.x
    shrink = torch.zeros(call.grad_y[..., 0].numel(), call.lora_A.shape[0]) if call.shrink is None else call.shrink
    gradients = reference.lora_linear_backward(call._replace(x=rows, shrink=shrink))
    empty = call.empty_gradients([False] * 6)
    return tuple(g if need else none for g, none, need in zip(gradients, empty, call.needs, strict=True))


def _refusal(request: records.Request) -> str | None:
    return None if request.x.dtype is torch.float32 else f"x is {request.x.dtype}, mine takes torch.float32"


def _disadvantage(request: records.Request) -> str | None:
    return None if request.x.shape[-1] % 16 == 0 else "K is no multiple of 16"


MINE = Backend("mine", disadvantage=_disadvantage, forward=_forward, backward=_backward, refusal=_refusal)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    registration = register_backend(MINE)
    made.clear()
    yield
    registration.remove()
    registration.remove()


def test_it_is_taken_by_its_name(seed: int) -> None:
    call = make_call(seed, plan=True)
    run(call, "mine")
    assert made == ["forward", "backward"]
    within_budget(call, "mine")


@pytest.mark.parametrize(("k", "mine"), [(32, True), (29, False)])
def test_auto_asks_it_first(k: int, mine: bool, seed: int) -> None:
    call = make_call(seed, k=k)
    run(call, "auto")
    assert bool(made) is mine
    explanation = explain(call.x, call.weight, call.lora_A, call.lora_B)
    assert (explanation.chosen == "mine") is mine
    assert mine or explanation.why_not["mine"] == "K is no multiple of 16"


def test_a_call_that_it_cannot_serve_is_refused(seed: int) -> None:
    call = make_call(seed, dtype="bf16")
    message = "^impl='mine' cannot serve this call: x is torch.bfloat16, mine takes torch.float32"
    with pytest.raises(RuntimeError, match=message):
        run(call, "mine")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.peftkernels.lora_linear_fwd.mine(*call.record())
    with pytest.raises(RuntimeError, match=r"^impl='mine' cannot serve .*: 'mine' makes no S of several adapters"):
        shared_shrink(torch.ones(2, 3), [torch.ones(1, 3)], impl="mine")


def test_its_arguments_are_checked_before_it_runs(seed: int) -> None:
    call = make_call(seed)
    with pytest.raises(ValueError, match=r"^lora_A: found shape"):
        lora_linear(call.x, call.weight, call.lora_A[:, 1:], call.lora_B, impl="mine")
    with pytest.raises(ValueError, match=r"^lora_A: found shape"):
        torch.ops.peftkernels.lora_linear_fwd.mine(*call.record()._replace(lora_A=call.lora_A[:, 1:]))
    assert not made


def _compiled(call: Call) -> Tensor:
    function = torch.compile(lambda x: lora_linear(x, call.weight, call.lora_A, call.lora_B, impl="mine"))
    return function(call.x)


def test_it_is_compiled_and_checked_by_torch(seed: int) -> None:
    call = make_call(seed)
    expected = lora_linear(call.x, call.weight, call.lora_A, call.lora_B, impl="mine")
    assert torch.equal(_compiled(call), expected)
    torch.library.opcheck(torch.ops.peftkernels.lora_linear_fwd.mine, tuple(call.record()))


@pytest.mark.parametrize("impl", ["mine", "eager"])
def test_its_operations_are_counted(impl: str, seed: int) -> None:
    """And those of the backends that were there before it."""
    call = make_call(seed, leading=(6,), n=33, k=29, r=5)
    with FlopCounterMode(display=False) as counter:
        lora_linear(call.x, call.weight, call.lora_A, call.lora_B, impl=impl)
    assert counter.get_total_flops() == 2 * 6 * (33 * 29 + 5 * (33 + 29))


def test_an_argument_that_joins_later_is_served_by_those_that_name_it(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if `shrink` had joined after the backends were written."""
    monkeypatch.setattr(records, "_LATER_OF_CALL", ("shrink",))
    call = make_call(seed)
    shrink = call.x.reshape(-1, call.x.shape[-1]) @ call.lora_A.T
    arguments = (call.x, call.weight, call.lora_A, call.lora_B)
    for impl in ("mine", "eager"):
        with pytest.raises(RuntimeError, match=f"^impl='{impl}' cannot serve this call: it does not serve shrink"):
            lora_linear(*arguments, shrink=shrink, impl=impl)
        lora_linear(*arguments, impl=impl)
    serving = register_backend(dataclasses.replace(MINE, name="another", serves=frozenset(("shrink",))))
    try:
        made.clear()
        lora_linear(*arguments, shrink=shrink, impl="another")
        assert made == ["forward"]
        with pytest.raises(RuntimeError, match=r"^shrink: found beside a transform of torch.func"):
            vmap(lambda x: lora_linear(x, *arguments[1:], shrink=shrink[:1], impl="another"))(call.x.reshape(-1, 1, 29))
    finally:
        serving.remove()


def test_layers_take_it(seed: int) -> None:
    layer = nn.LoRALinear.from_linear(torch.nn.Linear(5, 7), r=2, lora_alpha=4, impl="mine")
    layer(torch.randn(3, 5))
    assert made == ["forward"]


def test_once_removed_it_is_unknown(seed: int) -> None:
    call = make_call(seed)
    registration = register_backend(dataclasses.replace(MINE, name="another"))
    run(call, "another")
    registration.remove()
    with pytest.raises(ValueError, match=r"^impl: found 'another', expected 'auto' or one of reference, eager, cpu"):
        run(call, "another")
    with pytest.raises(RuntimeError, match=r"^impl='another' cannot serve this call: it was taken out of the registry"):
        torch.ops.peftkernels.lora_linear_fwd.another(*call.record())
    again = register_backend(registration.backend)
    registration.remove()
    run(call, "another")
    again.remove()


@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [
        ("mine", TypeError, "backend: found str, expected a Backend"),
        (Backend("empty", disadvantage=_disadvantage), TypeError, "backend: found 'empty' without forward or backward"),
        (MINE, ValueError, "backend: found the name 'mine', expected lower-case letters, digits and underscores, and"),
        (
            dataclasses.replace(MINE, name="Two words"),
            ValueError,
            "backend: found the name 'Two words'",
        ),
        (dataclasses.replace(MINE, name="auto"), ValueError, "backend: found the name 'auto', expected lower-case"),
    ],
    ids=["no_backend", "no_functions", "taken", "no_name", "auto"],
)
def test_what_is_no_backend_is_refused(backend: Backend, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        register_backend(backend)
