"""y += left·right in place, after the library's GEMM: where its own `addmm_` will not do.

That is in the backward pass with dropout, which falls on left·right alone, and where x is float16, whose left and right
are float32.
"""

import functools

import triton
import triton.language as tl

from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, integers, options, pointer
from peftkernels.backends.triton.common.products import add_low_rank, dropped_low_rank, tile_at
from peftkernels.backends.triton.common.ranks import active_and_live


@triton.jit
def expand(
    y_ptr, left_ptr, right_ptr, bits_ptr, counts_ptr, keep_scale, M, P, r, WIDTH,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y (M, P), left (M, WIDTH), right as `products` has it, bits of `keep_bits` over (M, P) or None (TRANSPOSED)."""
    row_block, column_block = tile_at(tl.program_id(0), M, P, BLOCK_M, BLOCK_P, GROUP)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_P + tl.arange(0, BLOCK_P)
    n_active, _ = active_and_live(counts_ptr, r)
    if bits_ptr is not None:
        sums = dropped_low_rank(
            left_ptr, right_ptr, bits_ptr, rows, column_block * BLOCK_P, M, P, r, WIDTH, n_active, keep_scale,
            y_ptr.dtype.element_ty, BLOCK_M, BLOCK_P, PRECISION,
        )  # fmt: skip
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        sums = add_low_rank(
            sums, left_ptr, right_ptr, None, rows, columns, M, P, r, WIDTH, n_active,
            y_ptr.dtype.element_ty, TRANSPOSED, False, PRECISION,
        )  # fmt: skip
    offsets = rows.to(tl.int64)[:, None] * P + columns[None, :]
    inside = (rows < M)[:, None] & (columns < P)[None, :]
    sums += tl.load(y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, sums.to(y_ptr.dtype.element_ty), mask=inside)


ROWS, COLUMNS, GROUP = 64, 128, 8


@functools.cache
def variant(kinds: Kinds, transposed: bool) -> Variant:
    """`expand` in tiles of ROWS × COLUMNS; kinds.dropout is heeded in the backward direction (transposed) alone."""
    rank = pointer(kinds.rank)
    types = {
        "y_ptr": pointer(kinds.x),
        "left_ptr": rank,
        "right_ptr": rank,
        "bits_ptr": "*i32" if kinds.dropout and transposed else None,
        "counts_ptr": "*i32" if kinds.plan else None,
        "keep_scale": "fp32",
        **integers("M", "P", "r", "WIDTH"),
    }
    constants = {
        "TRANSPOSED": transposed,
        "BLOCK_M": ROWS,
        "BLOCK_P": COLUMNS,
        "GROUP": GROUP,
        "PRECISION": kinds.rank_precision,
    }
    own = ("y_ptr", "left_ptr", "bits_ptr", "WIDTH")
    return Variant(
        expand,
        types,
        constants,
        aligned=kinds.aligned_names(own, ("right_ptr", "P")),
        options=options(4 if kinds.aligned else 8, 2),
        label=f"{kinds.label}{' transposed' * transposed}",
    )


def programs(m: int, p: int) -> int:
    """Programs that share the tiles of y (m, p) among them."""
    return -(-m // ROWS) * -(-p // COLUMNS)
