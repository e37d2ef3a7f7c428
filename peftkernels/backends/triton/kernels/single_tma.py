"""The whole forward pass in one launch, W, x and y through the tensor memory accelerator; see `pieces`."""

import functools

import triton
import triton.language as tl

from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, descriptor, options, pointer
from peftkernels.backends.triton.common.products import add_bias, add_frozen_tma, add_low_rank, store_tile_tma, tile_at
from peftkernels.backends.triton.common.ranks import active_and_live
from peftkernels.backends.triton.common.tiles import GROUP, Blocks, Tile, descriptor_blocks
from peftkernels.backends.triton.kernels import pieces
from peftkernels.backends.triton.kernels.pieces import shrink_pieces, wait_for_rows


@triton.jit
def single_tma(
    x_desc, w_desc, y_desc, x_ptr, bias_ptr, a_ptr, b_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, seed_ptr,
    shrink_ptr, left_ptr, progress_ptr,
    scaling, keep_scale, least, M, N, K, r, WIDTH, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, GROUP: tl.constexpr,
    PIECE: tl.constexpr, PIECE_K: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y (M, N) with W, x and y through the tensor memory accelerator."""
    shrink_pieces(
        x_ptr, a_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, seed_ptr, shrink_ptr, left_ptr, progress_ptr,
        scaling, keep_scale, least, M, K, r, WIDTH, stride_x,
        BLOCK_M, PIECE, PIECE_K, BLOCK_R, WHOLE_BLOCKS, PRECISION,
    )  # fmt: skip
    n_active, _ = active_and_live(counts_ptr, r)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_P)
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        row_block, column_block = tile_at(number, M, N, BLOCK_M, BLOCK_P, GROUP)
        row = row_block * BLOCK_M
        column = column_block * BLOCK_P
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_P)
        sums = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        sums = add_frozen_tma(sums, x_desc, w_desc, row, column, K, False, BLOCK_Q)
        wait_for_rows(progress_ptr, row_block, M, BLOCK_M, PIECE)
        sums = add_low_rank(
            sums, left_ptr, b_ptr, order_ptr, rows, columns, M, N, r, WIDTH, n_active,
            y_desc.dtype, False, True, PRECISION,
        )  # fmt: skip
        sums = add_bias(sums, bias_ptr, columns, N)
        store_tile_tma(sums, y_desc, row, column, BLOCK_M, BLOCK_P)


@functools.cache
def variant(kinds: Kinds, blocks: Blocks, tile: Tile, block_of_places: int, keep: bool) -> Variant:
    """`single_tma` that keeps S for the backward pass or not."""
    x = pointer(kinds.x)
    descriptors = zip(("x_desc", "w_desc", "y_desc"), descriptor_blocks(tile, False), strict=True)
    types = {
        **{name: descriptor(kinds.x, block) for name, block in descriptors},
        "x_ptr": x,
        "bias_ptr": x if kinds.bias else None,
        **pieces.types(kinds, keep),
        **pieces.numbers(),
    }
    constants = {
        "BLOCK_M": tile.rows,
        "BLOCK_P": tile.columns,
        "BLOCK_Q": tile.depth,
        "GROUP": GROUP,
        **pieces.constants(kinds, blocks, tile, block_of_places),
    }
    own = ("shrink_ptr", "left_ptr", "WIDTH")
    return Variant(
        single_tma,
        types,
        constants,
        aligned=kinds.aligned_names(own, ("x_ptr", "a_ptr", "b_ptr", "N", "K", "stride_x")),
        options=options(tile.warps, tile.stages),
        wgmma=True,
        label=f"{kinds.label} {tile.name} r{block_of_places}{' keep' * keep}",
    )
