"""What the kernels of the single launch share: programs work off the shrink first, then take GEMM tiles.

Shrink pieces are drawn from a ticket counter, so that a piece is always in the hands of a program that runs and waits
for nobody; a tile waits, just before its tail, until the pieces of its rows are counted as done. That ends for any
number of programs, resident together or not, one included.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from peftkernels.backends.triton.common.arguments import Types, adapter_types, number_types, size_types
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import integers, pointer
from peftkernels.backends.triton.common.ranks import active_and_live, store_by_rank
from peftkernels.backends.triton.common.shrink_rows import shrink_rows
from peftkernels.backends.triton.common.tiles import Blocks, Tile

# Places of a piece at a time: with more, the registers beside a tile's sums run out.
MOST_PLACES = 32


@triton.jit
def shrink_pieces(
    x_ptr, a_ptr, order_ptr, counts_ptr, gate_ptr, scaling_ptr, seed_ptr, shrink_ptr, left_ptr, progress_ptr,
    scaling, keep_scale, least, M, K, r, WIDTH, stride_x,
    BLOCK_M: tl.constexpr, PIECE: tl.constexpr, PIECE_K: tl.constexpr, BLOCK_R: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Draw and work off pieces of PIECE rows: S in fp32, written as it is saved and as the tail takes it."""
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


class Results(NamedTuple):
    """What the shrink's pieces write.

    Attributes:
        shrink: S (M, r) as it is saved, or None.
        left: (M, WIDTH), compact, S·scaling·ĝ.
        progress: int32 (1 + row blocks), zeros before: the next ticket, then pieces done for each row block.
    """

    shrink: Tensor | None
    left: Tensor
    progress: Tensor


def types(kinds: Kinds, keep: bool) -> Types:
    """The types of `AdapterArguments` and `Results`; keep: S is saved."""
    rank = pointer(kinds.rank)
    results = {"shrink_ptr": rank if keep else None, "left_ptr": rank, "progress_ptr": "*i32"}
    return {**adapter_types(kinds), **results}


def numbers() -> Types:
    """The types of the numbers behind them."""
    return {**number_types(), **size_types(), **integers("stride_x")}


def constants(kinds: Kinds, blocks: Blocks, tile: Tile, block_of_places: int) -> dict[str, object]:
    """The constants behind those of the tile."""
    return {
        "PIECE": min(blocks.piece, tile.rows),
        "PIECE_K": blocks.shrink_depth,
        "BLOCK_R": block_of_places,
        "WHOLE_BLOCKS": kinds.whole,
        "PRECISION": kinds.rank_precision,
    }
