"""Calls of the operators themselves, past the public functions, most of them with one or two wrong arguments.

A call raises, or it gives what the reference gives for the same arguments, which are legal then. One that reads or
writes beside its tensors may also crash: the child process that dies of it is the fault.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from support.implementations import refusal
from support.raw_allocation_calls import NAMES as ALLOCATION
from support.raw_allocation_calls import call as call_allocation
from support.raw_allocation_calls import valid as valid_allocation
from support.raw_calls import OPERATORS, call, valid
from torch import Tensor

from attacks.attack import Counts, in_children
from peftkernels import lora_linear

NAME = "raw-operators"
TITLE = "random and wrong arguments of every overload of every operator, past the public functions"
SHORT, LONG = 600, 30_000

IMPLEMENTATIONS = ("cpu", "cpu", "cpu", "eager", "reference", "triton")
NUMBERS: tuple[Any, ...] = (None, 0, -1, 0.5, 1.0, 2**63, 1e400, -1e400, float("nan"), 1e38, "1", True, (), [None])
INTEGERS = (-(2**31), -1, 0, 1, 2, 3, 5, 7, 255, 2**31 - 1)
# Sums of float32 in another order than the reference's, of numbers around one.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


def _freed(value: Tensor, dice: random.Random) -> Tensor:
    value = value.clone()
    value.untyped_storage().resize_(dice.choice((0, value.nbytes // 2, max(0, value.nbytes - 1))))
    return value


def _filled(value: Tensor, dice: random.Random) -> Tensor:
    """Other values in some places."""
    value = value.clone()
    flat = value.view(-1)
    for _ in range(dice.choice((1, flat.numel()))):
        if flat.numel():
            at = dice.randrange(flat.numel())
            number: Any = dice.choice((0.0, -1.5, float("inf"), float("nan"), 1e30))
            if not value.is_floating_point():
                limits = torch.iinfo(value.dtype) if value.dtype is not torch.bool else None
                number = dice.choice(INTEGERS)
                number = bool(number) if limits is None else min(max(number, limits.min), limits.max)
            flat[at] = number
    return value


def _reshaped(value: Tensor, dice: random.Random) -> Tensor:
    sizes = list(value.shape)
    what = dice.randrange(6)
    if what == 0 or not sizes:
        sizes = [1, *sizes]
    elif what == 1:
        sizes.pop()
    elif what == 2:
        sizes[dice.randrange(len(sizes))] = 0
    elif what == 3:
        sizes.reverse()
    else:
        at = dice.randrange(len(sizes))
        sizes[at] = max(0, sizes[at] + dice.choice((-1, 1, 60)))
    return torch.ones(sizes, dtype=value.dtype)


def _spaced(value: Tensor, dice: random.Random) -> Tensor:
    wide = value.new_zeros([size * 2 for size in value.shape])
    view = wide[tuple(slice(None, None, 2) for _ in value.shape)]
    return view.copy_(value)


def _expanded(value: Tensor, dice: random.Random) -> Tensor:
    one = value[(slice(0, 1),) * value.dim()]
    sizes = [size if dice.random() < 0.8 else 2**40 for size in value.shape]
    return one.expand(sizes) if one.numel() else value


def _overlapping(value: Tensor, dice: random.Random) -> Tensor:
    """Rows that share memory."""
    if value.dim() != 2 or value.numel() < 2 or value.shape[0] < 2:
        return value
    return value.clone().as_strided(value.shape, (1, 1) if value.shape[0] + value.shape[1] <= value.numel() else (0, 0))


def _nested(value: Tensor, dice: random.Random) -> Tensor:
    return torch.nested.nested_tensor([value.reshape(-1), value.reshape(-1)[:1]])


TENSOR_CHANGES: tuple[Callable[[Tensor, random.Random], Any], ...] = (
    lambda value, dice: dice.choice(NUMBERS),
    lambda value, dice: value.to(dice.choice((torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64))),
    lambda value, dice: value.to(dice.choice((torch.float64, torch.float16, torch.bfloat16, torch.float32))),
    lambda value, dice: value.to("meta"),
    lambda value, dice: value.to_sparse(),
    lambda value, dice: value.to_sparse_csr() if value.dim() == 2 else value.to_sparse(),
    lambda value, dice: value.mT.contiguous().mT if value.dim() == 2 else value,
    lambda value, dice: torch._neg_view(-value) if value.is_floating_point() else value,
    _nested,
    _freed,
    _filled,
    _filled,
    _reshaped,
    _reshaped,
    _spaced,
    _expanded,
    _overlapping,
)


def _changed(value: Any, dice: random.Random) -> Any:
    """Something in the place of an argument."""
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        values = list(value)
        what = dice.randrange(6)
        if what == 0:
            values.pop()
        elif what == 1:
            values.append(values[0])
        elif what == 2:
            values.clear()
        else:
            at = dice.randrange(len(values))
            values[at] = dice.choice(TENSOR_CHANGES)(values[at], dice)
        return values
    if isinstance(value, list):
        return [dice.random() < 0.5 for _ in range(dice.choice((6, 6, 6, 5, 7)))]
    if isinstance(value, Tensor):
        return dice.choice(TENSOR_CHANGES)(value, dice)
    return dice.choice((*NUMBERS, torch.ones(2), True, False))


def _arguments(operator: str, dice: random.Random) -> dict[str, Any]:
    """A legal call, with some of what need not be there left out."""
    if operator in ALLOCATION:
        arguments = valid_allocation(operator)
        for name in ("skip", "mask_now"):
            if name in arguments and dice.random() < 0.3:
                arguments[name] = None
        for name in ("keep", "add_to") if operator == "orthogonality" else ():
            if dice.random() < 0.3:
                arguments[name] = []
        return arguments
    arguments = valid(operator, dice.randrange(1000))
    for name in ("bias", "gate", "scaling_tensor", "given_shrink"):
        if name in arguments and dice.random() < 0.4:
            arguments[name] = None
    if "needs" in arguments:
        arguments["needs"] = [need and dice.random() < 0.8 for need in arguments["needs"]]
        for at, name in ((4, "bias"), (5, "gate")):
            arguments["needs"][at] &= arguments[name] is not None
    if "rank_state" in arguments and dice.random() < 0.4:
        arguments.update(rank_state=None, rank_order=None, rank_counts=None)
    if operator == "lora_linear_fwd" and arguments["given_shrink"] is None and dice.random() < 0.5:
        arguments.update(dropout_p=0.3, dropout_seed=torch.tensor(5), save_shrink=True)
    return arguments


def _copied(value: Any) -> Any:
    """Contiguous copies of tensors that have values, of another memory than anything else."""
    if isinstance(value, list):
        return [_copied(item) for item in value]
    copies = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested and not value.is_meta
    if not copies or value.numel() > 10**6 or value.untyped_storage().nbytes() < value.element_size():
        return value
    return value.resolve_neg().clone(memory_format=torch.contiguous_format)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return not isinstance(one, Tensor) or torch.allclose(one.double(), other.double(), equal_nan=True)


def one(at: int, seed: int) -> tuple[str, str | None]:
    """One call with up to two changed arguments: "refused", "right", "written", or what is wrong with it."""
    dice = random.Random(f"{seed} {at}")
    torch.manual_seed(dice.randrange(2**31))
    lora_linear(torch.ones(1, 2), torch.ones(3, 2), torch.ones(1, 2), torch.ones(3, 1))  # loads the C++ kernels
    operator = dice.choice((*OPERATORS, *OPERATORS, *ALLOCATION))
    arguments = _arguments(operator, dice)
    names = dice.sample(sorted(arguments), dice.choice((0, 1, 1, 1, 1, min(2, len(arguments)))))
    try:
        for name in names:
            arguments[name] = _changed(arguments[name], dice)
    except Exception:
        return "not to be made", None
    impl = "cpu" if operator in ALLOCATION else dice.choice(IMPLEMENTATIONS)
    if refusal(impl) is not None:
        impl = "cpu"
    said = f"{operator}.{impl}, changed: {', '.join(names) or 'nothing'}"
    plain = {name: _copied(value) for name, value in arguments.items()} if operator in ALLOCATION else {}
    try:
        found = call_allocation(operator, arguments) if operator in ALLOCATION else call(operator, impl, arguments)
    except Exception as error:
        return "refused", None if names else f"{said}: refused: {type(error).__name__}: {error}"
    if operator in ALLOCATION:
        call_allocation(operator, plain)
        differs = [name for name, value in arguments.items() if not _same(value, plain[name])]
        return "written", f"{said}: another {', '.join(differs)} than by contiguous copies" if differs else None
    return "right", _wrong(operator, arguments, found, said)


def _wrong(operator: str, arguments: dict[str, Any], found: Any, said: str) -> str | None:
    try:
        expected = call(operator, "reference", arguments)
    except Exception as error:
        return f"{said}: served, though the reference says {type(error).__name__}: {error}"
    # Products with a rank are TF32 beside a float16 x on Triton, whatever dtype they are kept in: ten bits of mantissa.
    low = any(getattr(value, "dtype", None) in (torch.float16, torch.bfloat16) for value in arguments.values())
    wide = {"rtol": 0.02, "atol": 0.02} if low else TOLERANCE
    results = (found, expected) if isinstance(found, tuple) else ((found,), (expected,))
    for place, (one, other) in enumerate(zip(*results, strict=True)):
        if one.shape != other.shape:
            return f"{said}: result {place} has shape {tuple(one.shape)}, the reference's {tuple(other.shape)}"
        known = other.isfinite() & (other.abs() < 1e20)
        tolerance = {"rtol": 0.1, "atol": 0.5} if one.dtype in (torch.float16, torch.bfloat16) else wide
        if not torch.allclose(one[known].double(), other[known].double(), **tolerance):
            worst = (one[known].double() - other[known].double()).abs().max()
            return f"{said}: result {place} is {worst:g} away from the reference's"
    return None


def run(rounds: int, seed: int) -> Counts:
    """As many calls as ``rounds``, in child processes."""
    return in_children(NAME, rounds, seed)
