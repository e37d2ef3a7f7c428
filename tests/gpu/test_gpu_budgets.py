"""Every route, tile and dtype is as exact as plain PyTorch, on shapes of many tiles, into memory full of NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import Call, make_call, run
from support.devices import moved
from support.implementations import served, skip_unless_served
from support.oracle import Budget
from support.routes import choices, representative

from peftkernels.backends.triton.linear import routes
from peftkernels.backends.triton.linear.routes import Choice

gpu = pytest.mark.gpu
LIBRARY = Choice(routes.LIBRARY)

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"leading": (37,), "n": 48, "k": 112},
    "one_row": {"leading": (1,), "n": 1040, "k": 528},
    "few_rows": {"leading": (3, 5), "n": 2048, "k": 1024},
    "aligned": {"leading": (777,), "n": 1040, "k": 528},
    # Rows of W, x and G of no more than 16 bytes, 8 bytes and 2 bytes in common.
    "by_eights": {"leading": (777,), "n": 1032, "k": 520},
    "by_fours": {"leading": (259,), "n": 1028, "k": 516},
    "odd": {"leading": (259,), "n": 1031, "k": 519},
    "many_tiles": {"leading": (4096,), "n": 1024, "k": 1024},
    "deep": {"leading": (130,), "n": 144, "k": 8208},
    "tall": {"leading": (20000,), "n": 144, "k": 80},
}
small_everywhere = [
    pytest.param(shape, marks=() if shape == "small" else gpu, id=shape) for shape in SHAPES
]  # fmt: skip
SITUATIONS: dict[str, dict[str, Any]] = {
    "LoRA": {"r": 16, "gate": False, "bias": False},
    "everything": {"r": 44, "plan": True, "dropout_p": 0.3, "scaling": "tensor"},
    "many_ranks": {"r": 320, "gate": False},
}
DTYPES = ("bf16", "bf16-fp32_factors", "fp16", "fp16-fp32_factors", "fp32", "fp32-bf16_factors")


def _assert_within_budget_on(ways: list[Choice], call: Call) -> None:
    """One budget for all ways; every way that is not within it is named."""
    budget, excesses = Budget(call), []
    for way in ways:
        with routes.forced(way):
            excesses += [f"{way}: {excess}" for excess in budget.excesses(run(call, "triton"))]
    assert not excesses, f"{call.label}:\n  " + "\n  ".join(excesses)


def _ways(dtype: str, call: Call) -> list[Choice]:
    """The library, and the representatives of our kernels that can serve the call."""
    (n, k), m = call.weight.shape, call.x.shape[:-1].numel()
    possible = choices(dtype, m, n, k)
    return [LIBRARY, *(choice for choice in representative(dtype).values() if choice in possible)]


# Where kernels are interpreted, `tests/operators` has the other dtypes.
@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=() if dtype == "fp32-bf16_factors" else gpu) for dtype in DTYPES]
)
@pytest.mark.parametrize("shape", small_everywhere)
def test_every_route_in_every_dtype(dtype: str, shape: str, seed: int) -> None:
    skip_unless_served("triton", dtype)
    call = make_call(seed, dtype=dtype, **SHAPES[shape], **SITUATIONS["everything"])
    _assert_within_budget_on(_ways(dtype, call), call)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("shape", small_everywhere)
def test_every_route_in_every_situation(situation: str, shape: str, seed: int) -> None:
    (dtype, *_) = served("triton", ("bf16-fp32_factors", "fp16-fp32_factors"))
    call = make_call(seed, dtype=dtype, **SHAPES[shape], **SITUATIONS[situation])
    _assert_within_budget_on(_ways(dtype, call), call)


@gpu
@pytest.mark.parametrize("shape", ["few_rows", "aligned", "odd", "many_tiles"])
@pytest.mark.parametrize("dtype", ["bf16-fp32_factors", "fp32"])
def test_every_tile(dtype: str, shape: str, seed: int) -> None:
    call = make_call(seed, dtype=dtype, **SHAPES[shape], **SITUATIONS["everything"])
    (n, k), m = call.weight.shape, call.x.shape[:-1].numel()
    _assert_within_budget_on(choices(dtype, m, n, k), call)


@pytest.mark.parametrize("layout", ["transposed", "every_second", "row_padded", "offset", "expanded"])
@pytest.mark.parametrize("shape", [pytest.param("small"), pytest.param("aligned", marks=gpu)])
def test_strided_x(layout: str, shape: str, seed: int) -> None:
    """Strides that the tensor memory accelerator cannot take go another way, whatever is asked for."""
    (dtype, *_) = served("triton", ("bf16-fp32_factors", "fp16-fp32_factors"))
    call = make_call(seed, dtype=dtype, **SHAPES[shape], **SITUATIONS["everything"])
    x = {
        "transposed": call.x.T.contiguous().T,
        "every_second": call.x.repeat_interleave(2, -1)[..., ::2],
        "row_padded": torch.cat((call.x, call.x), -1)[..., : call.x.shape[-1]],
        "offset": torch.cat((call.x.new_zeros(3), call.x.reshape(-1)))[3:].view(call.x.shape),
        # ∂A's terms all have the same x: their rounding errors add up where G's rows do not differ, and they do.
        "expanded": call.x[:1].expand(call.x.shape),
    }[layout]
    strided = call.replace(x=x)
    assert moved(x, torch.device("meta")).stride() == x.stride()
    _assert_within_budget_on(_ways(dtype, strided), strided)
