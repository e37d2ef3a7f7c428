"""The whole forward pass in one launch, W, x and y through the tensor memory accelerator; see `pieces`."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from peftkernels.backends.triton.common.arguments import AdapterArguments, Frozen, Sizes
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, options, pointer
from peftkernels.backends.triton.common.products import add_bias, add_frozen_tma, add_low_rank, store_tile_tma, tile_at
from peftkernels.backends.triton.common.ranks import active_and_live
from peftkernels.backends.triton.common.tiles import GROUP, Blocks, Tile
from peftkernels.backends.triton.common.tma import descriptor_types, descriptors
from peftkernels.backends.triton.kernels import pieces
from peftkernels.backends.triton.kernels.pieces import shrink_pieces, wait_for_rows


@triton.jit
def single_tma(
    in_desc, w_desc, out_desc, x_ptr, bias_ptr, a_ptr, b_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, seed_ptr,
    shrink_ptr, left_ptr, progress_ptr,
    scaling, keep_scale, least, M, N, K, r, WIDTH, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PIECE: tl.constexpr, PIECE_K: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x·Wᵀ + S·(scaling·ĝ·Bᵀ) + bias, summed in fp32 and rounded once, from S that the same programs make.

    Grid: programs that stay, each of which takes every num_programs-th tile of y; any number ends.

    Args:
        in_desc: x (M, K) in blocks (BLOCK_M, BLOCK_K), bf16 or fp16.
        w_desc: W (N, K) in blocks (BLOCK_N, BLOCK_K), in x's dtype.
        out_desc: y (M, N) in blocks (BLOCK_M, BLOCK_N / 2), in x's dtype; written.
        x_ptr: x once more, for the shrink; rows `stride_x` apart.
        bias_ptr: (N,), in x's dtype, or None.
        a_ptr … seed_ptr: The `AdapterArguments`.
        shrink_ptr … progress_ptr: `pieces.Results`: S fp32 beside float16 and else in x's dtype, left as S.
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
        row = row_block * BLOCK_M
        column = column_block * BLOCK_N
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums = add_frozen_tma(sums, in_desc, w_desc, row, column, K, False, BLOCK_K)
        wait_for_rows(progress_ptr, row_block, M, BLOCK_M, PIECE)
        sums = add_low_rank(
            sums, left_ptr, b_ptr, order_ptr, rows, columns, M, N, r, WIDTH, n_active,
            out_desc.dtype, False, True, PRECISION,
        )  # fmt: skip
        sums = add_bias(sums, bias_ptr, columns, N)
        store_tile_tma(sums, out_desc, row, column, BLOCK_M, BLOCK_N)


def launch(
    variant: Variant,
    programs: int,
    tile: Tile,
    frozen: Frozen,
    adapter: AdapterArguments,
    results: pieces.Results,
    y: Tensor,
    sizes: Sizes,
) -> None:
    """Launch `single_tma`."""
    rows, _, bias = frozen
    *pointers, numbers = adapter
    variant(
        programs, *descriptors(tile, frozen, y, transposed=False), rows, bias, *pointers, *results,
        *numbers, *sizes, rows.stride(0),
    )  # fmt: skip


@functools.cache
def variant(kinds: Kinds, blocks: Blocks, tile: Tile, block_of_places: int, keep: bool) -> Variant:
    """`single_tma` that keeps S for the backward pass or not."""
    x = pointer(kinds.x)
    types = {
        **descriptor_types(kinds.x, tile, transposed=False),
        "x_ptr": x,
        "bias_ptr": x if kinds.bias else None,
        **pieces.types(kinds, keep),
        **pieces.numbers(),
    }
    constants = {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
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
