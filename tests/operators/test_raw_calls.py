"""Operators called by themselves, past the public functions: whatever is wrong with a call raises and names it.

Before they checked anything, such calls read and wrote beside their tensors, or returned what nobody had written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.implementations import refusal
from support.raw_calls import K, M, N, R, call, valid
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from peftkernels import RankPlan, lora_linear
from peftkernels.ops.call import Forward

IMPLEMENTATIONS = ("cpu", "eager", "reference", "triton")
Change = Callable[[Any], Any]


def _freed(value: Tensor) -> Tensor:
    value = value.clone()
    value.untyped_storage().resize_(0)
    return value


def _short(value: Tensor) -> Tensor:
    value = value.clone()
    value.untyped_storage().resize_(value.nbytes - 1)
    return value


def _first(number: int) -> Change:
    """The same with another first element."""

    def change(value: Tensor) -> Tensor:
        value = value.clone()
        value.view(-1)[0] = number
        return value

    return change


DTYPES: dict[str, Change] = {
    "int64": lambda value: value.long(),
    "complex64": lambda value: value.to(torch.complex64),
    "float8": lambda value: value.to(torch.float8_e4m3fn),
}
MEMORY: dict[str, Change] = {"freed": _freed, "made_smaller": _short, "meta": lambda value: value.to("meta")}
FLOATS = {**DTYPES, **MEMORY}
NO_FLOATS = {"float64": lambda value: value.double(), **MEMORY}
LONGER: dict[str, Change] = {"one_more": lambda value: value.new_ones(value.shape[0] + 1, *value.shape[1:])}
ONE: dict[str, Change] = {"one_element": lambda value: value[:1]}
NONE: dict[str, Change] = {"none": lambda value: None}
# operator: argument: what becomes of it
WRONG: dict[str, dict[str, dict[str, Change]]] = {
    "lora_linear_fwd": {
        "x": {
            **FLOATS,
            "0-dim": lambda value: value.new_ones(()),
            "wider": lambda value: value.new_ones(M, K + 1),
            "narrower": lambda value: value[..., 1:],
        },
        "weight": {**FLOATS, "deeper": lambda value: value.new_ones(N, K + 3), "flat": lambda value: value[0]},
        "lora_A": {**FLOATS, **LONGER, "narrow": lambda value: value[:, :3], "flat": lambda value: value[0]},
        "lora_B": {
            **FLOATS,
            **ONE,
            "bfloat16": lambda value: value.bfloat16(),
            "turned": lambda value: value.mT.contiguous(),
        },
        "bias": {**FLOATS, **ONE, **LONGER, "0-dim": lambda value: value[0]},
        "gate": {**FLOATS, **ONE, **LONGER, "row": lambda value: value.mT, "0-dim": lambda value: value[0, 0]},
        "rank_state": {
            **NO_FLOATS,
            **NONE,
            **ONE,
            **LONGER,
            "another_state": _first(1),
            "no_state": _first(77),
        },
        "rank_order": {
            **NO_FLOATS,
            **NONE,
            **ONE,
            **LONGER,
            "beyond": _first(R),
            "far_beyond": _first(2**31 - 1),
            "negative": _first(-1),
            "twice": _first(3),
            "int64": lambda value: value.long(),
        },
        "rank_counts": {
            **NO_FLOATS,
            **NONE,
            **ONE,
            **LONGER,
            "too_many": _first(R + 1),
            "negative": _first(-1),
            "fewer": _first(2),
            "int64": lambda value: value.long(),
        },
        "scaling_tensor": {**FLOATS, "vector": lambda value: value.expand(2)},
        "dropout_p": dict.fromkeys(("none",), lambda value: 0.3),
        "given_shrink": {
            **FLOATS,
            **ONE,
            "wider": lambda value: value.new_ones(M, R + 1),
            "bfloat16": lambda value: value.bfloat16(),
        },
    },
    "lora_linear_bwd": {
        "grad_y": {
            **FLOATS,
            "0-dim": lambda value: value.new_ones(()),
            "wider": lambda value: value.new_ones(2, M // 2, N + 1),
            "more_rows": lambda value: value.new_ones(M + 1, N),
            "bfloat16": lambda value: value.bfloat16(),
        },
        "x": {**FLOATS, **NONE, "more_rows": lambda value: value.new_ones(M + 1, K), "one_row": lambda value: value[0]},
        "weight": {**FLOATS, "wider": lambda value: value.new_ones(N + 1, K)},
        "lora_A": {**FLOATS, **LONGER},
        "lora_B": {**FLOATS, **ONE},
        "bias": {**FLOATS, **NONE, **ONE, **LONGER},
        "shrink": {**FLOATS, **NONE, **ONE, "narrower": lambda value: value[:, 1:]},
        "gate": {**FLOATS, **NONE, **ONE, **LONGER},
        "rank_state": {**NO_FLOATS, **NONE, **ONE},
        "rank_order": {**NO_FLOATS, **NONE, **ONE, "beyond": _first(R), "negative": _first(-1), "twice": _first(3)},
        "rank_counts": {**NO_FLOATS, **NONE, **ONE, "too_many": _first(R + 1), "negative": _first(-1)},
        "scaling_tensor": {**FLOATS, "vector": lambda value: value.expand(2)},
        "dropout_p": {
            "negative": lambda value: -0.1,
            "above_one": lambda value: 1.5,
            "nan": lambda value: float("nan"),
        },
        "dropout_seed": {**NO_FLOATS, **NONE, "vector": lambda value: value.expand(3)},
    },
    "lora_shrink": {
        "x": {**FLOATS, "0-dim": lambda value: value.new_ones(()), "wider": lambda value: value.new_ones(M, K + 1)},
        "lora_A": {
            "none_at_all": lambda value: [],
            "another_width": lambda value: [value[0], value[1][:, 1:]],
            "a_vector": lambda value: [value[0], value[1][0]],
            **{
                name: lambda value, change=change: [value[0], change(value[1])]  # type: ignore[misc]
                for name, change in FLOATS.items()
            },
        },
    },
}
# Words for an argument of the operators in the messages of all implementations.
SPOKEN = {
    "rank_state": "rank_plan", "rank_order": "rank_plan", "rank_counts": "rank_plan", "scaling_tensor": "scaling",
    "given_shrink": "shrink",
}  # fmt: skip
# What the error may speak of instead: the argument that the changed one no longer fits.
PARTNERS = {
    "x": "weight|lora_A",
    "grad_y": "weight|x|shrink",
    "weight": "x|grad_y|lora_A|lora_B",
    "lora_A": "lora_B",
    "dropout_p": "dropout_seed|shrink",
}
CASES = [
    (operator, argument, how)
    for operator, arguments in WRONG.items()
    for argument, changes in arguments.items()
    for how in changes
]


def _skip_unless_registered(impl: str) -> None:
    reason = refusal(impl)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(("operator", "argument", "how"), CASES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_wrong_call_raises_and_names_the_argument(impl: str, operator: str, argument: str, how: str) -> None:
    _skip_unless_registered(impl)
    lora_linear(torch.ones(1, 2), torch.ones(3, 2), torch.ones(1, 2), torch.ones(3, 1))  # loads the C++ kernels
    arguments = valid(operator)
    call(operator, impl, arguments)
    arguments[argument] = WRONG[operator][argument][how](arguments[argument])
    names = "|".join((SPOKEN.get(argument, argument), *PARTNERS.get(argument, "").split("|"))).rstrip("|")
    with pytest.raises((TypeError, ValueError), match=rf"^({names})\b.*: found "):
        call(operator, impl, arguments)


def _is_seen(operator: str, argument: str, how: str) -> bool:
    """Return True if a fake can see it: it has neither memory nor values."""
    values = {"beyond", "far_beyond", "negative", "twice", "too_many", "fewer", "another_state", "no_state"}
    return how not in MEMORY and (argument == "dropout_p" or how not in values)


@pytest.mark.parametrize(("operator", "argument", "how"), [case for case in CASES if _is_seen(*case)])
def test_fakes_refuse_shapes_and_dtypes_too(operator: str, argument: str, how: str) -> None:
    """So that a program that cannot run does not compile. A fake holds no values: those of plans are not seen."""
    arguments = valid(operator)
    arguments[argument] = WRONG[operator][argument][how](arguments[argument])

    def fake(value: Any) -> Any:
        if isinstance(value, list):
            return [fake(item) for item in value]
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    with FakeTensorMode() as mode:
        faked = {name: fake(value) for name, value in arguments.items()}
        with pytest.raises((TypeError, ValueError), match=r": found "):
            call(operator, "eager", faked)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_without_elements_may_be_of_any_number(impl: str) -> None:
    """A loop over 2⁶² rows of nothing never ended."""
    _skip_unless_registered(impl)
    rows, none = torch.empty(2**62, 0), torch.empty(0, 0)
    y = lora_linear(rows, none, none, none, impl=impl)
    assert y.shape == (2**62, 0)
    needs = [True, False, True, True, False, False]
    made = call(
        "lora_linear_bwd",
        impl,
        {
            **dict.fromkeys(valid("lora_linear_bwd")),
            "grad_y": rows,
            "x": rows,
            "weight": none,
            "lora_A": none,
            "lora_B": none,
            "shrink": rows,
            "scaling": 1.0,
            "dropout_p": 0.0,
            "needs": needs,
        },
    )
    assert made[0].shape == (2**62, 0)


def _strided(value: Tensor) -> Tensor:
    wide = value.new_full((value.numel(), 3), 1)
    wide[:, 1] = value
    return wide[:, 1]


@pytest.mark.parametrize("part", ["state", "order", "counts", "all"])
def test_a_plan_of_strided_views_is_the_same_plan(part: str, impl: str) -> None:
    """A column of a table of plans was read as if it lay in one piece, and gave a wrong y."""
    plan = RankPlan.from_state(torch.tensor([1, 2, 0, 2, 1, 2], dtype=torch.uint8))
    names = ("state", "order", "counts")
    parts = {name: getattr(plan, name) for name in names}
    strided = RankPlan(**{name: _strided(v) if part in (name, "all") else v for name, v in parts.items()})
    x, weight = torch.randn(4, K), torch.randn(N, K)
    results = []
    for given in (plan, strided):
        leaves = [value.clone().requires_grad_() for value in _FACTORS]
        y = lora_linear(x, weight, leaves[0], leaves[1], gate=leaves[2], rank_plan=given, impl=impl)
        y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for found, expected in zip(results[1], results[0], strict=True):
        assert found is not None and torch.equal(found, expected)


_FACTORS = [torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in ((6, K), (N, 6), (6,))]


@pytest.mark.parametrize("part", ["state", "order", "counts"])
def test_a_plan_of_memory_that_nobody_wrote_is_refused(part: str, impl: str) -> None:
    """As a layer's buffers are after `to_empty`."""
    plan = RankPlan.from_mask(torch.ones(R, dtype=torch.bool))
    getattr(plan, part).fill_(125)
    with pytest.raises(ValueError, match=r"^rank_plan\.(state|order|counts): found "):
        lora_linear(torch.ones(2, K), torch.ones(N, K), torch.ones(R, K), torch.ones(N, R), rank_plan=plan, impl=impl)


@pytest.mark.parametrize("argument", ["x", "weight", "lora_A", "lora_B", "bias", "gate"])
@pytest.mark.parametrize("change", [_freed, _short])
def test_a_tensor_whose_memory_was_freed_is_refused(argument: str, change: Change, impl: str) -> None:
    """As FSDP and offloading leave weights between their uses."""
    arguments = {name: valid("lora_linear_fwd")[name] for name in ("x", "weight", "lora_A", "lora_B", "bias", "gate")}
    arguments[argument] = change(arguments[argument])
    with pytest.raises(ValueError, match=f"^{argument}: found a storage of .* bytes, expected .*: it was freed"):
        lora_linear(**arguments, impl=impl)


def test_kernels_on_a_device_keep_to_ranks_that_there_are() -> None:
    """On accelerators nobody reads a plan before the kernels: whatever it holds, they stay inside of their tensors."""
    pytest.importorskip("triton")
    _skip_unless_registered("triton")
    from peftkernels.backends.triton import serving

    arguments = valid("lora_linear_fwd")
    names = ("weight", "lora_A", "lora_B", "bias", "gate", "rank_state")
    for order, counts in (([2**31 - 1, -(2**31), 7, -1, 5], [5, 5]), ([0, 1, 2, 3, 4], [2**30, -7])):
        plan = torch.tensor(order, dtype=torch.int32), torch.tensor(counts, dtype=torch.int32)
        call = Forward(arguments["x"], *(arguments[name] for name in names), *plan, 1.0, None, 0.0, None, True)
        y, shrink = serving.BACKEND.forward(call)
        assert y.shape == (2, M // 2, N) and shrink is not None and shrink.shape == (M, R)
