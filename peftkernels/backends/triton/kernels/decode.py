"""Few rows: one launch, bound by reading W once. Every program works S out for itself, from x and A in the L2."""

import functools

import torch
import triton
import triton.language as tl

from peftkernels.backends.triton.common.dropout import dropout_factor
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, integers, options, pointer, rank_arguments
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
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (M, N) for M up to BLOCK_M; a program has BLOCK_P columns. The first one writes S where it is kept.

    The first BLOCK_R places are multiplied in the loop that reads W, the others after it.
    """
    dtype = x_ptr.dtype.element_ty
    n_active, n_live = active_and_live(counts_ptr, r)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    places = tl.arange(0, BLOCK_R)
    ranks = rank_at(order_ptr, places, r).to(tl.int64)
    sums = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    product = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_Q):
        depth = start + tl.arange(0, BLOCK_Q)
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
            factor = dropout_factor(seed_ptr, rows, start, K, least, keep_scale, BLOCK_Q, WHOLE_BLOCKS)
            x = as_operand(x.to(tl.float32) * factor, dtype)
        product = tl.dot(widened(x), as_operand(a, dtype), product, input_precision=PRECISION)
    for first in range(0, WIDTH, BLOCK_R):
        places = first + tl.arange(0, BLOCK_R)
        if first > 0:
            product = shrink_rows(
                x_ptr, a_ptr, order_ptr, seed_ptr, rows, places, 0, tl.where(first < n_live, K, 0), M, K, r, stride_x,
                least, keep_scale, n_live, BLOCK_Q, WHOLE_BLOCKS, PRECISION,
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


@functools.cache
def variant(kinds: Kinds, tile: Tile, block_of_places: int, keep: bool) -> Variant:
    """`decode` that keeps S for the backward pass or not."""
    x = pointer(kinds.x)
    types = {
        "x_ptr": x,
        "w_ptr": x,
        "bias_ptr": x if kinds.bias else None,
        "a_ptr": pointer(kinds.factor),
        "b_ptr": pointer(kinds.factor),
        **rank_arguments(kinds),
        "seed_ptr": "*i64" if kinds.dropout else None,
        "shrink_ptr": pointer(kinds.rank) if keep else None,
        "y_ptr": x,
        "scaling": "fp32",
        "keep_scale": "fp32",
        "least": "i64",
        **integers("M", "N", "K", "r", "WIDTH", "stride_x"),
    }
    constants = {
        "BLOCK_M": tile.rows,
        "BLOCK_P": tile.columns,
        "BLOCK_Q": tile.depth,
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
