"""Every way through the Triton kernels keeps every rule: library, tail, single launch, decode, each kind of tile."""

from __future__ import annotations

import pytest
from support.implementations import refusal, served, skip_unless_served
from support.routes import ROUTE_CHECKS, representative, shape_for

from peftkernels.backends.triton import routes
from peftkernels.backends.triton.routes import Choice

DTYPES = served("triton", ("bf16-fp32_factors", "fp16-fp32_factors", "fp32")) if refusal("triton") is None else []


@pytest.mark.parametrize("check", ROUTE_CHECKS)
@pytest.mark.parametrize(
    ("dtype", "choice"), [(dtype, choice) for dtype in DTYPES for choice in representative(dtype)], ids=str
)
def test_every_check(dtype: str, choice: Choice, check: str, seed: int) -> None:
    skip_unless_served("triton", dtype)
    with routes.forced(choice):
        ROUTE_CHECKS[check](seed, dtype, shape_for(choice))
