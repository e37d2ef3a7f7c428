"""The frozen GEMM with the low-rank product as its last steps, through the tensor memory accelerator (compute
capability 9.0 and later). The forward and the backward pass use the same kernel; see `products`.
"""

import functools

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, descriptor, integers, options, pointer
from peftkernels.backends.triton.common.products import (
    add_bias,
    add_frozen_tma,
    add_low_rank,
    dropped_low_rank,
    store_tile_tma,
    tile_at,
)
from peftkernels.backends.triton.common.ranks import active_and_live
from peftkernels.backends.triton.common.tiles import GROUP, Tile, descriptor_blocks


@triton.jit
def gemm_tma(
    x_desc, w_desc, y_desc, bias_ptr, left_ptr, right_ptr, bits_ptr, counts_ptr,
    keep_scale, M, P, Q, r, WIDTH,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Programs that stay and take every num_programs-th tile."""
    n_active, _ = active_and_live(counts_ptr, r)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(P, BLOCK_P)
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        row_block, column_block = tile_at(number, M, P, BLOCK_M, BLOCK_P, GROUP)
        row = row_block * BLOCK_M
        column = column_block * BLOCK_P
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_P)
        sums = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        if bits_ptr is not None:
            if WAIT:
                gdc_wait()
            sums = dropped_low_rank(
                left_ptr, right_ptr, bits_ptr, rows, column, M, P, r, WIDTH, n_active, keep_scale,
                y_desc.dtype, BLOCK_M, BLOCK_P, PRECISION,
            )  # fmt: skip
        sums = add_frozen_tma(sums, x_desc, w_desc, row, column, Q, TRANSPOSED, BLOCK_Q)
        if bits_ptr is None:
            if WAIT:
                gdc_wait()
            sums = add_low_rank(
                sums, left_ptr, right_ptr, None, rows, columns, M, P, r, WIDTH, n_active,
                y_desc.dtype, TRANSPOSED, False, PRECISION,
            )  # fmt: skip
        sums = add_bias(sums, bias_ptr, columns, P)
        store_tile_tma(sums, y_desc, row, column, BLOCK_M, BLOCK_P)


@functools.cache
def variant(kinds: Kinds, tile: Tile, transposed: bool) -> Variant:
    """`gemm_tma`; kinds.dropout is heeded in the backward direction (transposed) alone."""
    x = pointer(kinds.x)
    descriptors = zip(("x_desc", "w_desc", "y_desc"), descriptor_blocks(tile, transposed), strict=True)
    types = {
        **{name: descriptor(kinds.x, block) for name, block in descriptors},
        "bias_ptr": x if kinds.bias and not transposed else None,
        "left_ptr": pointer(kinds.rank),
        "right_ptr": pointer(kinds.rank),
        "bits_ptr": "*i32" if kinds.dropout and transposed else None,
        "counts_ptr": "*i32" if kinds.plan else None,
        "keep_scale": "fp32",
        **integers("M", "P", "Q", "r", "WIDTH"),
    }
    constants = {
        "TRANSPOSED": transposed,
        "BLOCK_M": tile.rows,
        "BLOCK_P": tile.columns,
        "BLOCK_Q": tile.depth,
        "GROUP": GROUP,
        "PRECISION": kinds.rank_precision,
        "WAIT": kinds.pdl,
    }
    own = ("left_ptr", "bits_ptr", "WIDTH")
    return Variant(
        gemm_tma,
        types,
        constants,
        aligned=kinds.aligned_names(own, ("right_ptr", "P", "Q")),
        options=options(tile.warps, tile.stages, kinds.pdl),
        awaited=("left_ptr", "right_ptr"),
        wgmma=tile.suits_wgmma(kinds.x),
        label=f"{kinds.label} {tile.name}{' transposed' * transposed}",
    )
