"""The frozen GEMM with the low-rank product as its last steps, through the tensor memory accelerator.

That needs compute capability 9.0. The forward and the backward pass use the same kernel; see `products`.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from peftkernels.backends.triton.common.arguments import Frozen, LowRank, Sizes, low_rank_types, size_types
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, options, pointer
from peftkernels.backends.triton.common.products import (
    add_bias,
    add_frozen_tma,
    add_low_rank,
    dropped_low_rank,
    out_and_depth,
    store_tile_tma,
    tile_at,
)
from peftkernels.backends.triton.common.ranks import active_and_live
from peftkernels.backends.triton.common.tiles import GROUP, Tile
from peftkernels.backends.triton.common.tma import descriptor_types, descriptors


@triton.jit
def gemm_tma(
    in_desc, w_desc, out_desc, bias_ptr, left_ptr, right_ptr, bits_ptr, counts_ptr,
    keep_scale, M, N, K, r, WIDTH,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """y = x·Wᵀ + left·rightᵀ + bias, or TRANSPOSED ∂x = G·W + drop'(left·right), summed in fp32 and rounded once.

    Grid: programs that stay, each of which takes every num_programs-th tile of out.

    Args:
        in_desc: x (M, K), or G (M, N), in blocks (BLOCK_M, BLOCK_DEPTH), bf16 or fp16.
        w_desc: W (N, K) in blocks (BLOCK_OUT, BLOCK_DEPTH), TRANSPOSED (BLOCK_DEPTH, BLOCK_OUT), in the dtype of in.
        out_desc: y (M, N), or ∂x (M, K), in blocks (BLOCK_M, BLOCK_OUT / 2), in the dtype of in; written.
        bias_ptr: (N,), in the dtype of in, or None.
        left_ptr … counts_ptr: `LowRank`; the launches before this one write left and right.
        keep_scale: What dropout multiplies an element by that it keeps.
        M … WIDTH: `Sizes`.
    """
    OUT, DEPTH = out_and_depth(N, K, TRANSPOSED)
    n_active, _ = active_and_live(counts_ptr, r)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(OUT, BLOCK_OUT)
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        row_block, column_block = tile_at(number, M, OUT, BLOCK_M, BLOCK_OUT, GROUP)
        row = row_block * BLOCK_M
        column = column_block * BLOCK_OUT
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_OUT)
        sums = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
        if bits_ptr is not None:
            if WAIT:
                gdc_wait()
            sums = dropped_low_rank(
                left_ptr, right_ptr, bits_ptr, rows, column, M, OUT, r, WIDTH, n_active, keep_scale,
                out_desc.dtype, BLOCK_M, BLOCK_OUT, PRECISION,
            )  # fmt: skip
        sums = add_frozen_tma(sums, in_desc, w_desc, row, column, DEPTH, TRANSPOSED, BLOCK_DEPTH)
        if bits_ptr is None:
            if WAIT:
                gdc_wait()
            sums = add_low_rank(
                sums, left_ptr, right_ptr, None, rows, columns, M, OUT, r, WIDTH, n_active,
                out_desc.dtype, TRANSPOSED, False, PRECISION,
            )  # fmt: skip
        sums = add_bias(sums, bias_ptr, columns, OUT)
        store_tile_tma(sums, out_desc, row, column, BLOCK_M, BLOCK_OUT)


def launch(
    variant: Variant, programs: int, tile: Tile, frozen: Frozen, low_rank: LowRank, out: Tensor, transposed: bool,
    keep_scale: float, sizes: Sizes,
) -> None:  # fmt: skip
    """Launch `gemm_tma`."""
    in_w_out = descriptors(tile, frozen, out, transposed)
    variant(programs, *in_w_out, frozen.bias, *low_rank, keep_scale, *sizes)


@functools.cache
def variant(kinds: Kinds, tile: Tile, transposed: bool) -> Variant:
    """`gemm_tma`."""
    types = {
        **descriptor_types(kinds.x, tile, transposed),
        "bias_ptr": pointer(kinds.x) if kinds.bias and not transposed else None,
        **low_rank_types(kinds, transposed),
        "keep_scale": "fp32",
        **size_types(),
    }
    constants = {
        "TRANSPOSED": transposed,
        "BLOCK_M": tile.rows,
        "BLOCK_OUT": tile.columns,
        "BLOCK_DEPTH": tile.depth,
        "GROUP": GROUP,
        "PRECISION": kinds.rank_precision,
        "WAIT": kinds.pdl,
    }
    own = ("left_ptr", "bits_ptr", "WIDTH")
    return Variant(
        gemm_tma,
        types,
        constants,
        aligned=kinds.aligned_names(own, ("right_ptr", "N", "K")),
        options=options(tile.warps, tile.stages, kinds.pdl),
        awaited=("left_ptr", "right_ptr"),
        wgmma=tile.suits_wgmma(kinds.x),
        label=f"{kinds.label} {tile.name}{' transposed' * transposed}",
    )
