"""The frozen GEMM with the low-rank product as its last steps, through pointers: any GPU, any alignment.

The forward and the backward pass use the same kernel; see `products`.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from peftkernels.backends.triton.common.arguments import Frozen, LowRank, Sizes, low_rank_types, size_types
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, integers, options, pointer
from peftkernels.backends.triton.common.products import (
    add_bias,
    add_frozen,
    add_low_rank,
    dropped_low_rank,
    out_and_depth,
    store_tile,
    tile_at,
)
from peftkernels.backends.triton.common.ranks import active_and_live
from peftkernels.backends.triton.common.tiles import GROUP, Tile


@triton.jit
def gemm_pointer(
    in_ptr, w_ptr, bias_ptr, left_ptr, right_ptr, bits_ptr, counts_ptr, out_ptr,
    keep_scale, M, N, K, r, WIDTH, stride_in,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """y = x·Wᵀ + left·rightᵀ + bias, or TRANSPOSED ∂x = G·W + drop'(left·right), summed in fp32 and rounded once.

    Grid: tiles of out.

    Args:
        in_ptr: x (M, K), or G (M, N); rows `stride_in` apart, in the dtype of computation.
        w_ptr: W (N, K), in the dtype of in.
        bias_ptr: (N,), in the dtype of in, or None.
        left_ptr … counts_ptr: `LowRank`; the launches before this one write left and right.
        out_ptr: y (M, N), or ∂x (M, K), in the dtype of in; written.
        keep_scale: What dropout multiplies an element by that it keeps.
        M … WIDTH: `Sizes`.
        stride_in: From one row of in to the next.
    """
    OUT, DEPTH = out_and_depth(N, K, TRANSPOSED)
    row_block, column_block = tile_at(tl.program_id(0), M, OUT, BLOCK_M, BLOCK_OUT, GROUP)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    n_active, _ = active_and_live(counts_ptr, r)
    sums = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    if bits_ptr is not None:
        if WAIT:
            gdc_wait()
        sums = dropped_low_rank(
            left_ptr, right_ptr, bits_ptr, rows, column_block * BLOCK_OUT, M, OUT, r, WIDTH, n_active, keep_scale,
            out_ptr.dtype.element_ty, BLOCK_M, BLOCK_OUT, PRECISION,
        )  # fmt: skip
    sums = add_frozen(
        sums, in_ptr, w_ptr, rows, columns, M, OUT, DEPTH, stride_in, TRANSPOSED, BLOCK_DEPTH, EVEN, PRECISION
    )
    if bits_ptr is None:
        if WAIT:
            gdc_wait()
        sums = add_low_rank(
            sums, left_ptr, right_ptr, None, rows, columns, M, OUT, r, WIDTH, n_active,
            out_ptr.dtype.element_ty, TRANSPOSED, False, PRECISION,
        )  # fmt: skip
    sums = add_bias(sums, bias_ptr, columns, OUT)
    store_tile(sums, out_ptr, rows, columns, M, OUT)


def launch(
    variant: Variant, programs: int, frozen: Frozen, low_rank: LowRank, out: Tensor, keep_scale: float, sizes: Sizes
) -> None:
    """Launch `gemm_pointer`."""
    variant(programs, *frozen, *low_rank, out, keep_scale, *sizes, frozen.rows.stride(0))


@functools.cache
def variant(kinds: Kinds, tile: Tile, transposed: bool, even: bool) -> Variant:
    """`gemm_pointer`; even: the depth is a multiple of the tile's."""
    x = pointer(kinds.x)
    types = {
        "in_ptr": x,
        "w_ptr": x,
        "bias_ptr": x if kinds.bias and not transposed else None,
        **low_rank_types(kinds, transposed),
        "out_ptr": x,
        "keep_scale": "fp32",
        **size_types(),
        **integers("stride_in"),
    }
    constants = {
        "TRANSPOSED": transposed,
        "BLOCK_M": tile.rows,
        "BLOCK_OUT": tile.columns,
        "BLOCK_DEPTH": tile.depth,
        "GROUP": GROUP,
        "EVEN": even,
        "PRECISION": kinds.rank_precision,
        "WAIT": kinds.pdl,
    }
    own = ("left_ptr", "bits_ptr", "out_ptr", "WIDTH")
    return Variant(
        gemm_pointer,
        types,
        constants,
        aligned=kinds.aligned_names(own, ("in_ptr", "w_ptr", "right_ptr", "N", "K", "stride_in")),
        options=options(tile.warps, tile.stages, kinds.pdl),
        awaited=("left_ptr", "right_ptr"),
        wgmma=tile.suits_wgmma(kinds.x),
        label=f"{kinds.label} {tile.name}{' transposed' * transposed}{' even' * even}",
    )
