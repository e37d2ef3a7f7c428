"""y += left·right in place, after the library's GEMM: where its own `addmm_` does not serve.

That is in the backward pass with dropout, which falls on left·right alone, and where x is float16, whose left and right
are float32.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from peftkernels.backends.triton.common.arguments import LowRank, Sizes, low_rank_types, size_types
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, options, pointer
from peftkernels.backends.triton.common.products import add_low_rank, dropped_low_rank, out_and_depth, tile_at
from peftkernels.backends.triton.common.ranks import active_and_live


@triton.jit
def expand(
    out_ptr, left_ptr, right_ptr, bits_ptr, counts_ptr, keep_scale, M, N, K, r, WIDTH,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y += left·rightᵀ, or TRANSPOSED ∂x += drop'(left·right), summed in fp32 and rounded once.

    Grid: tiles of out.

    Args:
        out_ptr: y (M, N), or ∂x (M, K), in the dtype of computation; read and written.
        left_ptr … counts_ptr: `LowRank`.
        keep_scale: What dropout multiplies an element by that it keeps.
        M … WIDTH: `Sizes`.
    """
    OUT, _ = out_and_depth(N, K, TRANSPOSED)
    row_block, column_block = tile_at(tl.program_id(0), M, OUT, BLOCK_M, BLOCK_OUT, GROUP)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    n_active, _ = active_and_live(counts_ptr, r)
    if bits_ptr is not None:
        sums = dropped_low_rank(
            left_ptr, right_ptr, bits_ptr, rows, column_block * BLOCK_OUT, M, OUT, r, WIDTH, n_active, keep_scale,
            out_ptr.dtype.element_ty, BLOCK_M, BLOCK_OUT, PRECISION,
        )  # fmt: skip
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
        sums = add_low_rank(
            sums, left_ptr, right_ptr, None, rows, columns, M, OUT, r, WIDTH, n_active,
            out_ptr.dtype.element_ty, TRANSPOSED, False, PRECISION,
        )  # fmt: skip
    offsets = rows.to(tl.int64)[:, None] * OUT + columns[None, :]
    inside = (rows < M)[:, None] & (columns < OUT)[None, :]
    sums += tl.load(out_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, sums.to(out_ptr.dtype.element_ty), mask=inside)


ROWS, COLUMNS, GROUP = 64, 128, 8


def launch(variant: Variant, out: Tensor, low_rank: LowRank, keep_scale: float, sizes: Sizes) -> None:
    """Launch `expand` over out."""
    m, columns = out.shape
    variant(-(-m // ROWS) * -(-columns // COLUMNS), out, *low_rank, keep_scale, *sizes)


@functools.cache
def variant(kinds: Kinds, transposed: bool) -> Variant:
    """`expand` in tiles of ROWS × COLUMNS."""
    types = {
        "out_ptr": pointer(kinds.x),
        **low_rank_types(kinds, transposed),
        "keep_scale": "fp32",
        **size_types(),
    }
    constants = {
        "TRANSPOSED": transposed,
        "BLOCK_M": ROWS,
        "BLOCK_OUT": COLUMNS,
        "GROUP": GROUP,
        "PRECISION": kinds.rank_precision,
    }
    own = ("out_ptr", "left_ptr", "bits_ptr", "WIDTH")
    return Variant(
        expand,
        types,
        constants,
        aligned=kinds.aligned_names(own, ("right_ptr", "N", "K")),
        options=options(4 if kinds.aligned else 8, 2),
        label=f"{kinds.label}{' transposed' * transposed}",
    )
