"""The operators of rank allocation, called past the allocator: what is wrong with a call raises, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.raw_allocation_calls import NAMES, call, valid
from torch import Tensor

from peftkernels.backends import cpu

Change = Callable[[Any], Any]
pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))


def _freed(value: Tensor) -> Tensor:
    value = value.clone()
    value.untyped_storage().resize_(0)
    return value


def _put(row: int, column: int, number: int) -> Change:
    def change(table: Tensor) -> Tensor:
        table = table.clone()
        table[row, column] = number
        return table

    return change


def _second(change: Change) -> Change:
    """Of a list, the second."""
    return lambda values: [values[0], change(values[1]), *values[2:]]


TENSOR: dict[str, Change] = {
    "freed": _freed,
    "int64": lambda value: value.long() if value.dtype is not torch.int64 else value.int(),
    "one_element": lambda value: value.flatten()[:1],
    "one_more": lambda value: torch.cat([value, value[-1:]]),
}
LIST = {name: _second(change) for name, change in TENSOR.items()} | {"one_fewer": lambda values: values[:-1]}
SPACED: dict[str, Change] = {"strided": lambda value: value.repeat_interleave(2, 0)[::2]}
EXPANDED: dict[str, Change] = {"one_for_all": lambda value: value[:1].expand(value.shape)}
WRONG: dict[str, dict[str, dict[str, Change]]] = {
    "averages": {
        "parameters": LIST,
        "gradients": LIST,
        "table": {
            "freed": _freed, "int32": lambda table: table.int(), "flat": lambda table: table.flatten(),
            "turned": lambda table: table.mT.contiguous().mT, "beyond": _put(0, 0, 10**12), "negative": _put(1, 0, -8),
            "long": _put(2, 1, 2**40), "overflowing": _put(2, 1, 2**62), "overlapping": _put(3, 0, 0),
            "negative_rows": _put(0, 1, -3), "no_layers": lambda table: table[:5],
        },
        "sensitivity": {**TENSOR, **SPACED, **EXPANDED},
        "uncertainty": {**TENSOR, **SPACED, **EXPANDED},
        "beta1": {"nan": lambda beta: float("nan"), "large": lambda beta: 1.5},
        "beta2": {"negative": lambda beta: -0.5},
        "skip": {
            "freed": _freed, "a_byte": lambda flag: flag.byte(), "two": lambda flag: flag.expand(2),
            "none_at_all": lambda flag: flag.expand(0) if flag.dim() else flag.new_empty(0),
        },
    },
    "scores": {
        "table": {"beyond": _put(0, 0, 10**12), "negative": _put(1, 0, -8), "another_rank": _put(1, 2, 1)},
        "sensitivity": {**TENSOR, **SPACED},
        "uncertainty": {**TENSOR, **SPACED},
    },
    "mask": {
        "keep": {**TENSOR, **SPACED},
        "mask_now": {"freed": _freed, "none_at_all": lambda flag: flag.new_empty(0)},
        "gates": {**LIST, **{name: _second(change) for name, change in EXPANDED.items()}},
        "states": LIST | {"strided": _second(SPACED["strided"])},
        "orders": LIST | {"strided": _second(SPACED["strided"])},
        "counts": LIST,
        "masked_state": {"three": lambda state: 3, "negative": lambda state: -1, "large": lambda state: 258},
    },
    "orthogonality": {
        "lora_A": {**LIST, "none": lambda values: [], "a_vector": _second(lambda value: value[0])},
        "lora_B": LIST,
        "keep": LIST,
        "add_to": {**LIST, "one_for_all": _second(EXPANDED["one_for_all"])},
    },
}  # fmt: skip
CASES = [
    (operator, argument, how)
    for operator, arguments in WRONG.items()
    for argument, changes in arguments.items()
    for how in changes
]


@pytest.mark.parametrize(("operator", "argument", "how"), CASES)
def test_a_wrong_call_raises_and_writes_nothing(operator: str, argument: str, how: str) -> None:
    call(operator, valid(operator))
    arguments = valid(operator)
    arguments[argument] = WRONG[operator][argument][how](arguments[argument])
    others = {name: value for name, value in arguments.items() if name != argument}
    before = [value.clone() for value in _tensors(others)]
    with pytest.raises((TypeError, ValueError), match=r": found "):
        call(operator, arguments)
    for found, expected in zip(_tensors(others), before, strict=True):
        assert torch.equal(found, expected)


def _tensors(arguments: dict[str, Any]) -> list[Tensor]:
    lists = (value if isinstance(value, list) else [value] for value in arguments.values())
    return [value for values in lists for value in values if isinstance(value, Tensor)]


@pytest.mark.parametrize(
    ("operator", "argument"),
    [
        (operator, name)
        for operator in NAMES
        for name, value in valid(operator).items()
        if isinstance(value, (Tensor, list))
    ],
)
def test_a_tensor_of_another_device_is_refused(operator: str, argument: str) -> None:
    """One on the meta device made the operator do nothing, without a word."""
    arguments = valid(operator)
    value = arguments[argument]
    arguments[argument] = value.to("meta") if isinstance(value, Tensor) else [*value[:-1], value[-1].to("meta")]
    with pytest.raises((ValueError, RuntimeError), match="device"):
        call(operator, arguments)


def test_averages_are_not_written_into_the_factors() -> None:
    arguments = valid("averages")
    arguments["uncertainty"] = arguments["sensitivity"]
    with pytest.raises(ValueError, match=r"^uncertainty: found memory of sensitivity"):
        call("averages", arguments)
    arguments = valid("averages")
    arguments["parameters"][0] = arguments["sensitivity"][:15].view(3, 5)
    with pytest.raises(ValueError, match=r"^parameters\[0\]: found memory of the averages"):
        call("averages", arguments)


def test_tensors_that_overlap_are_not_added_to() -> None:
    arguments = valid("orthogonality")
    both = torch.zeros(40)
    arguments["add_to"][0], arguments["add_to"][1] = both[:15].view(3, 5), both[8:20].view(2, 6)
    with pytest.raises(ValueError, match=r"^add_to: found tensors that share a part of their memory"):
        call("orthogonality", arguments)


@pytest.mark.parametrize("strides", [(1, 1), (0, 1), (3, 1)], ids=["sliding", "expanded", "rows_that_overlap"])
def test_a_tensor_whose_elements_share_memory_is_not_added_to(strides: tuple[int, int]) -> None:
    arguments = valid("orthogonality")
    arguments["add_to"][1] = torch.zeros(30).as_strided((2, 6), strides)
    with pytest.raises(ValueError, match=r"^add_to\[1\]: found strides .*, by which elements share memory"):
        call("orthogonality", arguments)


@pytest.mark.parametrize("strides", [(1, 2), (6, 1), (13, 2)], ids=["turned", "contiguous", "spaced"])
def test_strided_tensors_are_added_to(strides: tuple[int, int]) -> None:
    arguments, plain = valid("orthogonality"), valid("orthogonality")
    arguments["add_to"][1] = torch.zeros(30).as_strided((2, 6), strides)
    plain["add_to"][1] = torch.zeros(2, 6)
    call("orthogonality", arguments)
    call("orthogonality", plain)
    assert torch.equal(arguments["add_to"][1], plain["add_to"][1]) and plain["add_to"][1].any()


@pytest.mark.parametrize(("operator", "argument"), [("averages", "sensitivity"), ("mask", "states")])
def test_inference_tensors_are_not_written_outside_of_inference_mode(operator: str, argument: str) -> None:
    """That they cannot be was said after they had been."""
    arguments = valid(operator)
    with torch.inference_mode():
        value = arguments[argument]
        arguments[argument] = value.clone() if isinstance(value, Tensor) else [item.clone() for item in value]
    before = [value.clone() for value in _tensors(arguments)]
    with pytest.raises((ValueError, RuntimeError), match="inference"):
        call(operator, arguments)
    assert all(torch.equal(*pair) for pair in zip(_tensors(arguments), before, strict=True))
