"""The memory that the tests here compute into is full of NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import make_call, run
from support.implementations import served


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [3, 1000, 3_000_000])
def test_fresh_memory_is_poisoned(device: torch.device, size: int, dtype: torch.dtype) -> None:
    assert torch.empty(size, dtype=dtype, device=device).isnan().all()


@pytest.mark.parametrize("rows", [pytest.param(33), pytest.param(1500, marks=pytest.mark.gpu)])
def test_nan_of_an_earlier_call_stays_there(device: torch.device, rows: int, seed: int) -> None:
    """Nothing that is kept between calls, counters and scratch among it, remembers their values."""
    (dtype, *_) = served("triton", ("bf16-fp32_factors", "fp16-fp32_factors"))
    arguments: dict[str, Any] = {
        "leading": (rows,),
        "n": 80,
        "k": 112,
        "r": 21,
        "plan": True,
        "dropout_p": 0.2,
        "dtype": dtype,
    }
    call = make_call(seed, **arguments).on(device)
    expected = run(call, "triton").named()
    full_of_nan = make_call(seed + 1, **arguments).on(device)
    for value in (*full_of_nan.tensors().values(), full_of_nan.grad_y):
        value.fill_(float("nan"))
    run(full_of_nan, "triton")
    for name, value in run(call, "triton").named().items():
        assert torch.equal(value, expected[name]), name
