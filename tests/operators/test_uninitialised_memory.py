"""Kernels write every element they return, and never read what was in memory before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.cases import make_call, run
from support.implementations import interpreted
from support.oracle import Budget

CALLS: dict[str, dict[str, Any]] = {
    "odd": {"leading": (5,), "n": 33, "k": 29, "r": 5},
    "one_row": {"leading": (1,), "n": 67, "k": 65, "r": 3},
    "blocks": {"leading": (261,), "n": 131, "k": 71, "r": 9},
    "no_rank": {"leading": (7,), "n": 9, "k": 11, "r": 0},
    "no_depth": {"leading": (7,), "n": 9, "k": 0, "r": 2},
    "no_columns": {"leading": (7,), "n": 0, "k": 11, "r": 2},
    "no_rows": {"leading": (0,), "n": 9, "k": 11, "r": 2},
}
in_every_call = pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
in_every_dtype = pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-fp32_factors", "fp16-fp32_factors"])
in_every_mode = pytest.mark.parametrize(
    "options", [{}, {"plan": True}, {"plan": True, "dropout_p": 0.4}, {"bias": False, "gate": False}], ids=str
)


@pytest.fixture
def _poisoned_allocations() -> Iterator[None]:
    """torch fills what `torch.empty` returns, at::empty of C++ included, with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("_poisoned_allocations")
def test_allocations_are_poisoned() -> None:
    """The fixture does what the tests below rely on."""
    assert torch.empty(3).isnan().all()
    assert torch.ops.aten.empty.memory_format([3], dtype=torch.bfloat16).isnan().all()


@pytest.mark.usefixtures("_poisoned_allocations")
@in_every_call
@in_every_dtype
@in_every_mode
def test_poisoned_outputs(impl: str, arguments: dict[str, Any], dtype: str, options: dict[str, Any], seed: int) -> None:
    call = make_call(seed, dtype=dtype, **arguments, **options)
    excesses = Budget(call).excesses(run(call, impl))
    assert not excesses, f"{call.label}: {excesses[0]}"


@in_every_dtype
@in_every_mode
def test_memory_of_earlier_calls(impl: str, dtype: str, options: dict[str, Any], seed: int) -> None:
    """A call full of NaN, freed or kept in scratch buffers, leaves nothing behind for a smaller and a larger call."""
    # Interpreted kernels work on a few dozen rows and columns.
    blocks = {"leading": (69,), "n": 67, "k": 71, "r": 9} if interpreted(impl) else CALLS["blocks"]
    for arguments in (blocks, CALLS["odd"], CALLS["one_row"], blocks):
        poison = make_call(seed, dtype=dtype, **blocks, **options)
        for value in (*poison.tensors().values(), poison.grad_y):
            value.fill_(float("nan"))
        run(poison, impl)
        call = make_call(seed + 1, dtype=dtype, **arguments, **options)
        excesses = Budget(call).excesses(run(call, impl))
        assert not excesses, f"{call.label}: {excesses[0]}"
