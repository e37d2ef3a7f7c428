"""The frozen GEMM with the low-rank product as its last steps, through pointers: any GPU, any alignment.

The forward and the backward pass use the same kernel; see `products`.
"""

import functools

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, integers, options, pointer
from peftkernels.backends.triton.common.products import (
    add_bias,
    add_frozen,
    add_low_rank,
    dropped_low_rank,
    store_tile,
    tile_at,
)
from peftkernels.backends.triton.common.ranks import active_and_live
from peftkernels.backends.triton.common.tiles import GROUP, Tile


@triton.jit
def gemm_pointer(
    x_ptr, w_ptr, bias_ptr, left_ptr, right_ptr, bits_ptr, counts_ptr, y_ptr,
    keep_scale, M, P, Q, r, WIDTH, stride_x,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """One program a tile of y (M, P). bits given: the low-rank share passes dropout (backward)."""
    row_block, column_block = tile_at(tl.program_id(0), M, P, BLOCK_M, BLOCK_P, GROUP)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_P + tl.arange(0, BLOCK_P)
    n_active, _ = active_and_live(counts_ptr, r)
    sums = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    if bits_ptr is not None:
        if WAIT:
            gdc_wait()
        sums = dropped_low_rank(
            left_ptr, right_ptr, bits_ptr, rows, column_block * BLOCK_P, M, P, r, WIDTH, n_active, keep_scale,
            y_ptr.dtype.element_ty, BLOCK_M, BLOCK_P, PRECISION,
        )  # fmt: skip
    sums = add_frozen(sums, x_ptr, w_ptr, rows, columns, M, P, Q, stride_x, TRANSPOSED, BLOCK_Q, EVEN, PRECISION)
    if bits_ptr is None:
        if WAIT:
            gdc_wait()
        sums = add_low_rank(
            sums, left_ptr, right_ptr, None, rows, columns, M, P, r, WIDTH, n_active,
            y_ptr.dtype.element_ty, TRANSPOSED, False, PRECISION,
        )  # fmt: skip
    sums = add_bias(sums, bias_ptr, columns, P)
    store_tile(sums, y_ptr, rows, columns, M, P)


@functools.cache
def variant(kinds: Kinds, tile: Tile, transposed: bool, even: bool) -> Variant:
    """`gemm_pointer`; kinds.dropout is heeded in the backward direction (transposed) alone."""
    x = pointer(kinds.x)
    types = {
        "x_ptr": x,
        "w_ptr": x,
        "bias_ptr": x if kinds.bias and not transposed else None,
        "left_ptr": pointer(kinds.rank),
        "right_ptr": pointer(kinds.rank),
        "bits_ptr": "*i32" if kinds.dropout and transposed else None,
        "counts_ptr": "*i32" if kinds.plan else None,
        "y_ptr": x,
        "keep_scale": "fp32",
        **integers("M", "P", "Q", "r", "WIDTH", "stride_x"),
    }
    constants = {
        "TRANSPOSED": transposed,
        "BLOCK_M": tile.rows,
        "BLOCK_P": tile.columns,
        "BLOCK_Q": tile.depth,
        "GROUP": GROUP,
        "EVEN": even,
        "PRECISION": kinds.rank_precision,
        "WAIT": kinds.pdl,
    }
    own = ("left_ptr", "bits_ptr", "y_ptr", "WIDTH")
    return Variant(
        gemm_pointer,
        types,
        constants,
        aligned=kinds.aligned_names(own, ("x_ptr", "w_ptr", "right_ptr", "P", "Q", "stride_x")),
        options=options(tile.warps, tile.stages, kinds.pdl),
        awaited=("left_ptr", "right_ptr"),
        wgmma=tile.suits_wgmma(kinds.x),
        label=f"{kinds.label} {tile.name}{' transposed' * transposed}{' even' * even}",
    )
