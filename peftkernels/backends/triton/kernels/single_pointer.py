"""The whole forward pass in one launch, W, x and y through pointers; see `pieces`."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from peftkernels.backends.triton.common.arguments import AdapterArguments, Frozen, Sizes
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, options, pointer
from peftkernels.backends.triton.common.products import add_bias, add_frozen, add_low_rank, store_tile, tile_at
from peftkernels.backends.triton.common.ranks import active_and_live
from peftkernels.backends.triton.common.tiles import GROUP, Blocks, Tile
from peftkernels.backends.triton.kernels import pieces
from peftkernels.backends.triton.kernels.pieces import shrink_pieces, wait_for_rows


@triton.jit
def single_pointer(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, seed_ptr,
    shrink_ptr, left_ptr, progress_ptr, y_ptr,
    scaling, keep_scale, least, M, N, K, r, WIDTH, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PIECE: tl.constexpr, PIECE_K: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x·Wᵀ + S·(scaling·ĝ·Bᵀ) + bias, summed in fp32 and rounded once, from S that the same programs make.

    Grid: programs that stay, each of which takes every num_programs-th tile of y; any number ends.

    Args:
        x_ptr: x (M, K), rows `stride_x` apart, in the dtype of computation.
        w_ptr: W (N, K), in x's dtype.
        bias_ptr: (N,), in x's dtype, or None.
        a_ptr … seed_ptr: The `AdapterArguments`.
        shrink_ptr … progress_ptr: `pieces.Results`: S fp32 beside float16 and else in x's dtype, left as S.
        y_ptr: y (M, N), in x's dtype; written.
        scaling … least: The adapter's `Numbers`.
        M … WIDTH: `Sizes`.
        stride_x: From one row of x to the next.
    """
    shrink_pieces(
        x_ptr, a_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, seed_ptr, shrink_ptr, left_ptr, progress_ptr,
        scaling, keep_scale, least, M, K, r, WIDTH, stride_x,
        BLOCK_M, PIECE, PIECE_K, BLOCK_R, WHOLE_BLOCKS, PRECISION,
    )  # fmt: skip
    n_active, _ = active_and_live(counts_ptr, r)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        row_block, column_block = tile_at(number, M, N, BLOCK_M, BLOCK_N, GROUP)
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums = add_frozen(sums, x_ptr, w_ptr, rows, columns, M, N, K, stride_x, False, BLOCK_K, EVEN, PRECISION)
        wait_for_rows(progress_ptr, row_block, M, BLOCK_M, PIECE)
        sums = add_low_rank(
            sums, left_ptr, b_ptr, order_ptr, rows, columns, M, N, r, WIDTH, n_active,
            y_ptr.dtype.element_ty, False, True, PRECISION,
        )  # fmt: skip
        sums = add_bias(sums, bias_ptr, columns, N)
        store_tile(sums, y_ptr, rows, columns, M, N)


def launch(
    variant: Variant,
    programs: int,
    frozen: Frozen,
    adapter: AdapterArguments,
    results: pieces.Results,
    y: Tensor,
    sizes: Sizes,
) -> None:
    """Launch `single_pointer`."""
    *pointers, numbers = adapter
    variant(programs, *frozen, *pointers, *results, y, *numbers, *sizes, frozen.rows.stride(0))


@functools.cache
def variant(kinds: Kinds, blocks: Blocks, tile: Tile, block_of_places: int, keep: bool, even: bool) -> Variant:
    """`single_pointer` that keeps S for the backward pass or not; even: K is a multiple of the tile's depth."""
    x = pointer(kinds.x)
    types = {
        "x_ptr": x,
        "w_ptr": x,
        "bias_ptr": x if kinds.bias else None,
        **pieces.types(kinds, keep),
        "y_ptr": x,
        **pieces.numbers(),
    }
    constants = {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "GROUP": GROUP,
        "EVEN": even,
        **pieces.constants(kinds, blocks, tile, block_of_places),
    }
    own = ("shrink_ptr", "left_ptr", "y_ptr", "WIDTH")
    return Variant(
        single_pointer,
        types,
        constants,
        aligned=kinds.aligned_names(own, ("x_ptr", "w_ptr", "a_ptr", "b_ptr", "N", "K", "stride_x")),
        options=options(tile.warps, tile.stages),
        wgmma=tile.suits_wgmma(kinds.x),
        label=f"{kinds.label} {tile.name} r{block_of_places}{' keep' * keep}{' even' * even}",
    )
