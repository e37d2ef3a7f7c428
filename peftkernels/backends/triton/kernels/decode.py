"""Few rows: one launch, bound by reading W once. Every program works S out for itself, from x and A in the L2."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkernels.backends.triton.common.arguments import (
    AdapterArguments,
    Frozen,
    Sizes,
    adapter_types,
    number_types,
    size_types,
)
from peftkernels.backends.triton.common.dropout import dropout_factor
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, integers, options, pointer
from peftkernels.backends.triton.common.products import add_bias, right_tile, store_tile
from peftkernels.backends.triton.common.ranks import (
    active_and_live,
    as_operand,
    rank_at,
    scaled_gate,
    store_by_rank,
    widened,
)
from peftkernels.backends.triton.common.shrink_rows import shrink_rows
from peftkernels.backends.triton.common.tiles import Tile


def most_places(kinds: Kinds) -> int:
    """Places that are multiplied while W is read: more rows of A would crowd W out of the shared memory.

    Float32 ones, beside a float16 W, run out of registers on 8.0 before that.
    """
    return 16 if kinds.x is torch.float16 else 32


@triton.jit
def decode(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, seed_ptr, shrink_ptr, y_ptr,
    scaling, keep_scale, least, M, N, K, r, WIDTH, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x·Wᵀ + S·(scaling·ĝ·Bᵀ) + bias for few rows, all sums in fp32, rounded once.

    The first BLOCK_R places are multiplied in the loop that reads W, the others after it. The first program writes S
    where it is kept.

    Grid: column blocks of y.

    Args:
        x_ptr: x (M, K) with M up to BLOCK_M, rows `stride_x` apart, in the dtype of computation.
        w_ptr: W (N, K), in x's dtype.
        bias_ptr: (N,), in x's dtype, or None.
        a_ptr … seed_ptr: The `AdapterArguments`.
        shrink_ptr: S (M, r) in the order of the factors, fp32 beside float16 and else in x's dtype; written, or None.
        y_ptr: y (M, N), in x's dtype; written.
        scaling … least: The adapter's `Numbers`.
        M … WIDTH: `Sizes`.
        stride_x: From one row of x to the next.
    """
    dtype = x_ptr.dtype.element_ty
    n_active, n_live = active_and_live(counts_ptr, r)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = tl.arange(0, BLOCK_R)
    ranks = rank_at(order_ptr, places, r).to(tl.int64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    product = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        inside = (depth < K)[:, None]
        x = tl.load(
            x_ptr + rows.to(tl.int64)[:, None] * stride_x + depth[None, :],
            mask=(rows < M)[:, None] & (depth < K)[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + columns.to(tl.int64)[None, :] * K + depth[:, None], mask=inside & (columns < N)[None, :], other=0.0
        )
        a = tl.load(a_ptr + ranks[None, :] * K + depth[:, None], mask=inside & (places < n_live)[None, :], other=0.0)
        sums = tl.dot(x, w, sums, input_precision=PRECISION)
        if seed_ptr is not None:
            factor = dropout_factor(seed_ptr, rows, start, K, least, keep_scale, BLOCK_K, WHOLE_BLOCKS)
            x = as_operand(x.to(tl.float32) * factor, dtype)
        product = tl.dot(widened(x), as_operand(a, dtype), product, input_precision=PRECISION)
    for first in range(0, WIDTH, BLOCK_R):
        places = first + tl.arange(0, BLOCK_R)
        if first > 0:
            product = shrink_rows(
                x_ptr, a_ptr, order_ptr, seed_ptr, rows, places, 0, tl.where(first < n_live, K, 0), M, K, r, stride_x,
                least, keep_scale, n_live, BLOCK_K, WHOLE_BLOCKS, PRECISION,
            )  # fmt: skip
        if shrink_ptr is not None:
            if tl.program_id(0) == 0:
                store_by_rank(
                    product, shrink_ptr, None, order_ptr, gate_ptr, scaling_ptr, scaling, rows, places, M, r, WIDTH,
                    n_active, n_live,
                )  # fmt: skip
        factor = scaled_gate(gate_ptr, scaling_ptr, scaling, rank_at(order_ptr, places, r), places, n_active)
        left = tl.where((places < n_active)[None, :], product * factor[None, :], 0.0)
        right = right_tile(b_ptr, order_ptr, columns, places, N, r, WIDTH, n_active, False, True)
        sums = tl.dot(as_operand(left, dtype), as_operand(right, dtype), sums, input_precision=PRECISION)
    sums = add_bias(sums, bias_ptr, columns, N)
    store_tile(sums, y_ptr, rows, columns, M, N)


def launch(
    variant: Variant,
    programs: int,
    frozen: Frozen,
    adapter: AdapterArguments,
    saved: Tensor | None,
    y: Tensor,
    sizes: Sizes,
) -> None:
    """Launch `decode`; saved: where S goes, None where it is not kept."""
    *pointers, numbers = adapter
    variant(programs, *frozen, *pointers, saved, y, *numbers, *sizes, frozen.rows.stride(0))


@functools.cache
def variant(kinds: Kinds, tile: Tile, block_of_places: int, keep: bool) -> Variant:
    """`decode` that keeps S for the backward pass or not."""
    x = pointer(kinds.x)
    types = {
        "x_ptr": x,
        "w_ptr": x,
        "bias_ptr": x if kinds.bias else None,
        **adapter_types(kinds),
        "shrink_ptr": pointer(kinds.rank) if keep else None,
        "y_ptr": x,
        **number_types(),
        **size_types(),
        **integers("stride_x"),
    }
    constants = {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "BLOCK_R": block_of_places,
        "WHOLE_BLOCKS": kinds.whole,
        "PRECISION": kinds.rank_precision,
    }
    own = ("shrink_ptr", "y_ptr", "WIDTH")
    return Variant(
        decode,
        types,
        constants,
        aligned=kinds.aligned_names(own, ("x_ptr", "w_ptr", "a_ptr", "b_ptr", "N", "K", "stride_x")),
        options=options(tile.warps, tile.stages),
        label=f"{kinds.label} {tile.name} r{block_of_places}{' keep' * keep}",
    )
