"""The whole forward pass in one launch: programs work off the shrink first, then take GEMM tiles.

Shrink pieces are drawn from a ticket counter, so that a piece is always in the hands of a program that runs and waits
for nobody; a tile waits, just before its tail, until the pieces of its rows are counted as done. That ends for any
number of programs, resident together or not, one included.
"""

import functools

import triton
import triton.language as tl

from peftkernels.backends.triton.gemm import GROUP, descriptor_blocks
from peftkernels.backends.triton.kinds import Kinds
from peftkernels.backends.triton.launch import Variant, descriptor, integers, options, pointer, rank_arguments
from peftkernels.backends.triton.products import (
    add_bias,
    add_frozen,
    add_frozen_tma,
    add_low_rank,
    store_tile,
    store_tile_tma,
    tile_at,
)
from peftkernels.backends.triton.ranks import active_and_live, store_by_rank
from peftkernels.backends.triton.shrink import shrink_rows
from peftkernels.backends.triton.tiles import Blocks, Tile

# Places of a piece at a time: with more, the registers beside a tile's sums run out.
MOST_PLACES = 32


@triton.jit
def shrink_pieces(
    x_ptr, a_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, seed_ptr, shrink_ptr, left_ptr, progress_ptr,
    scaling, keep_scale, least, M, K, r, WIDTH, stride_x,
    BLOCK_M: tl.constexpr, PIECE: tl.constexpr, PIECE_K: tl.constexpr, BLOCK_R: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Draw and work off pieces of PIECE rows. progress int32: the next ticket, then pieces done for each row block."""
    n_active, n_live = active_and_live(counts_ptr, r)
    pieces = tl.cdiv(M, PIECE)
    piece = tl.atomic_add(progress_ptr, 1, sem="relaxed")
    while piece < pieces:
        rows = piece * PIECE + tl.arange(0, PIECE)
        for first in range(0, WIDTH, BLOCK_R):
            places = first + tl.arange(0, BLOCK_R)
            sums = shrink_rows(
                x_ptr, a_ptr, order_ptr, seed_ptr, rows, places, 0, tl.where(first < n_live, K, 0), M, K, r, stride_x,
                least, keep_scale, n_live, PIECE_K, WHOLE_BLOCKS, PRECISION,
            )  # fmt: skip
            store_by_rank(
                sums, shrink_ptr, left_ptr, order_ptr, gate_ptr, scaling_ptr, scaling, rows, places, M, r, WIDTH,
                n_active, n_live,
            )  # fmt: skip
        # Every thread's stores come before the one thread's release.
        tl.debug_barrier()
        tl.atomic_add(progress_ptr + 1 + piece * PIECE // BLOCK_M, 1, sem="release")
        piece = tl.atomic_add(progress_ptr, 1, sem="relaxed")


@triton.jit
def wait_for_rows(progress_ptr, row_block, M, BLOCK_M: tl.constexpr, PIECE: tl.constexpr):
    """Return once all pieces of a row block are done and what they wrote is visible."""
    needed = tl.cdiv(tl.minimum(M - row_block * BLOCK_M, BLOCK_M), PIECE)
    done = tl.atomic_add(progress_ptr + 1 + row_block, 0, sem="acquire")
    while done < needed:
        done = tl.atomic_add(progress_ptr + 1 + row_block, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def single_pointer(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, seed_ptr,
    shrink_ptr, left_ptr, progress_ptr, y_ptr,
    scaling, keep_scale, least, M, N, K, r, WIDTH, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PIECE: tl.constexpr, PIECE_K: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y (M, N) with W, x and y through pointers."""
    shrink_pieces(
        x_ptr, a_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, seed_ptr, shrink_ptr, left_ptr, progress_ptr,
        scaling, keep_scale, least, M, K, r, WIDTH, stride_x,
        BLOCK_M, PIECE, PIECE_K, BLOCK_R, WHOLE_BLOCKS, PRECISION,
    )  # fmt: skip
    n_active, _ = active_and_live(counts_ptr, r)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_P)
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        row_block, column_block = tile_at(number, M, N, BLOCK_M, BLOCK_P, GROUP)
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = column_block * BLOCK_P + tl.arange(0, BLOCK_P)
        sums = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        sums = add_frozen(sums, x_ptr, w_ptr, rows, columns, M, N, K, stride_x, False, BLOCK_Q, EVEN, PRECISION)
        wait_for_rows(progress_ptr, row_block, M, BLOCK_M, PIECE)
        sums = add_low_rank(
            sums, left_ptr, b_ptr, order_ptr, rows, columns, M, N, r, WIDTH, n_active,
            y_ptr.dtype.element_ty, False, True, PRECISION,
        )  # fmt: skip
        sums = add_bias(sums, bias_ptr, columns, N)
        store_tile(sums, y_ptr, rows, columns, M, N)


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


def _types(kinds: Kinds, keep: bool) -> dict[str, str | None]:
    """The arguments that both kernels have from A on."""
    rank = pointer(kinds.rank)
    return {
        "a_ptr": pointer(kinds.factor),
        "b_ptr": pointer(kinds.factor),
        **rank_arguments(kinds),
        "seed_ptr": "*i64" if kinds.dropout else None,
        "shrink_ptr": rank if keep else None,
        "left_ptr": rank,
        "progress_ptr": "*i32",
    }


def _numbers() -> dict[str, str | None]:
    return {
        "scaling": "fp32",
        "keep_scale": "fp32",
        "least": "i64",
        **integers("M", "N", "K", "r", "WIDTH", "stride_x"),
    }


def _pieces(kinds: Kinds, blocks: Blocks, tile: Tile, block_of_places: int) -> dict[str, object]:
    return {
        "PIECE": min(blocks.piece, tile.rows),
        "PIECE_K": blocks.shrink_depth,
        "BLOCK_R": block_of_places,
        "WHOLE_BLOCKS": kinds.whole,
        "PRECISION": kinds.rank_precision,
    }


@functools.cache
def pointer_variant(kinds: Kinds, blocks: Blocks, tile: Tile, block_of_places: int, keep: bool, even: bool) -> Variant:
    """`single_pointer` that keeps S for the backward pass or not; even: K is a multiple of the tile's depth."""
    x = pointer(kinds.x)
    types = {"x_ptr": x, "w_ptr": x, "bias_ptr": x if kinds.bias else None, **_types(kinds, keep), "y_ptr": x}
    constants = {
        "BLOCK_M": tile.rows,
        "BLOCK_P": tile.columns,
        "BLOCK_Q": tile.depth,
        "GROUP": GROUP,
        "EVEN": even,
        **_pieces(kinds, blocks, tile, block_of_places),
    }
    own = ("shrink_ptr", "left_ptr", "y_ptr", "WIDTH")
    return Variant(
        single_pointer,
        {**types, **_numbers()},
        constants,
        aligned=kinds.aligned_names(own, ("x_ptr", "w_ptr", "a_ptr", "b_ptr", "N", "K", "stride_x")),
        options=options(tile.warps, tile.stages),
        wgmma=kinds.x.itemsize == 2 and tile.rows >= 64,
        label=f"{kinds.label} {tile.name} r{block_of_places}{' keep' * keep}{' even' * even}",
    )


@functools.cache
def tma_variant(kinds: Kinds, blocks: Blocks, tile: Tile, block_of_places: int, keep: bool) -> Variant:
    """`single_tma` that keeps S for the backward pass or not."""
    x = pointer(kinds.x)
    descriptors = zip(("x_desc", "w_desc", "y_desc"), descriptor_blocks(tile, False), strict=True)
    types = {
        **{name: descriptor(kinds.x, block) for name, block in descriptors},
        "x_ptr": x,
        "bias_ptr": x if kinds.bias else None,
        **_types(kinds, keep),
        **_numbers(),
    }
    constants = {
        "BLOCK_M": tile.rows,
        "BLOCK_P": tile.columns,
        "BLOCK_Q": tile.depth,
        "GROUP": GROUP,
        **_pieces(kinds, blocks, tile, block_of_places),
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
