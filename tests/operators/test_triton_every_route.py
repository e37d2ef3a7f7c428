"""Every way through the Triton kernels keeps every rule: library, tail, single launch, decode, each kind of tile."""

from __future__ import annotations

import pytest
from support.implementations import skip_unless_served
from support.routes import ROUTE_CHECKS, representative, shape_for

from peftkernels.backends.triton.linear import routes

WAYS = ("tail, tma", "tail, pointer", "single, tma", "single, pointer", "decode, decode")


@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("check", ROUTE_CHECKS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["bf16-fp32_factors", "fp16-fp32_factors", "fp32"])
def test_every_check(impl: str, dtype: str, way: str, check: str, seed: int) -> None:
    skip_unless_served(impl, dtype)
    known = representative(dtype)
    if way not in known:
        pytest.skip(f"{dtype} has no tile for {way!r} here")
    with routes.forced(known[way]):
        ROUTE_CHECKS[check](seed, dtype, shape_for(known[way]))


def test_no_way_is_forgotten() -> None:
    skip_unless_served("triton")
    for dtype in ("bf16", "fp16", "fp32"):
        assert set(representative(dtype)) <= set(WAYS)
