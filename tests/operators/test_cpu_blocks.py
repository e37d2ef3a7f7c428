"""Shapes on either side of every boundary that the C++ kernels cut their work at, and rows that share cache sets."""

from __future__ import annotations

import pytest
import torch
from support.cases import make_call, run
from support.checks import drops_as_philox_says, masked_equals_sliced, within_budget
from support.implementations import skip_unless_served, threads

# Vectors hold 16 columns, panels 64, a task of ∂A or ∂B 128; chains close at a depth of 384, blocks at 1024.
WIDTHS = (15, 16, 17, 31, 33, 48, 49, 63, 64, 65, 127, 128, 129)
DEPTHS = (1, 2, 3, 383, 384, 385, 767, 1023, 1024, 1025, 2049, 3100)
# Tiles hold up to 12 rows, shares 16, a step of ∂A or ∂B 64, blocks 128.
ROWS = (1, 2, 4, 5, 11, 12, 13, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 300)
# Tiles hold up to 6 ranks in ∂A and ∂B, 64 in S and H.
RANKS = (1, 5, 6, 7, 15, 16, 17, 33, 63, 64, 65, 130)

in_each_dtype = pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-fp32_factors"])


@pytest.fixture(autouse=True)
def _served() -> None:
    skip_unless_served("cpu")


@in_each_dtype
@pytest.mark.parametrize("n", WIDTHS)
def test_output_widths(n: int, dtype: str, seed: int) -> None:
    within_budget(make_call(seed, leading=(21,), n=n, k=70, r=5, plan=True, dtype=dtype), "cpu")


@in_each_dtype
@pytest.mark.parametrize("k", DEPTHS)
def test_depths(k: int, dtype: str, seed: int) -> None:
    """K is the forward pass's depth; N, which is the backward pass's, takes the same values."""
    within_budget(make_call(seed, leading=(19,), n=k, k=66, r=6, dtype=dtype), "cpu")
    within_budget(make_call(seed, leading=(19,), n=66, k=k, r=6, dtype=dtype), "cpu")


@in_each_dtype
@pytest.mark.parametrize("rows", ROWS)
def test_rows_on_one_thread_and_on_three(rows: int, dtype: str, seed: int) -> None:
    call = make_call(seed, leading=(rows,), n=150, k=140, r=7, plan=True, dropout_p=0.2, dtype=dtype)
    outcomes = []
    for count in (1, 3):
        with threads(count):
            within_budget(call, "cpu")
            outcomes.append(run(call, "cpu").named())
    for name, expected in outcomes[0].items():
        assert torch.equal(outcomes[1][name], expected), name


@in_each_dtype
@pytest.mark.parametrize("r", RANKS)
def test_ranks(r: int, dtype: str, seed: int) -> None:
    call = make_call(seed, leading=(35,), n=90, k=75, r=r, plan=True, dtype=dtype)
    within_budget(call, "cpu")
    masked_equals_sliced(call, "cpu")


@in_each_dtype
@pytest.mark.parametrize("k", [1024, 2048, 3072])
def test_rows_that_share_cache_sets(k: int, dtype: str, seed: int) -> None:
    """Strides of whole 4096 bytes, where tiles take fewer rows."""
    within_budget(make_call(seed, leading=(29,), n=40, k=k, r=20, dtype=dtype), "cpu")


@in_each_dtype
@pytest.mark.parametrize("k", [1, 2, 3, 5, 30, 31, 33])
@pytest.mark.parametrize("rows", [3, 18, 131])
def test_dropout_of_rows_that_begin_anywhere_in_a_random_block(rows: int, k: int, dtype: str, seed: int) -> None:
    """Four elements share a block of random bits, thirty-two a word of kept ones."""
    drops_as_philox_says("cpu", seed, 0.3, (rows,), k)
    within_budget(make_call(seed, leading=(rows,), n=40, k=k, r=5, dropout_p=0.3, dtype=dtype), "cpu")
