"""y += drop'(left·right), in place: what follows the library's GEMM in the backward pass with dropout."""

import functools

import triton
import triton.language as tl

from peftkernels.backends.triton.kinds import Kinds
from peftkernels.backends.triton.launch import Variant, integers, options, pointer
from peftkernels.backends.triton.products import dropped_low_rank, tile_at
from peftkernels.backends.triton.ranks import active_and_live


@triton.jit
def expand(
    y_ptr, left_ptr, right_ptr, bits_ptr, counts_ptr, keep_scale, M, P, r, WIDTH,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (M, P), left (M, WIDTH), right (WIDTH, P), bits of `keep_bits` over (M, P)."""
    row_block, column_block = tile_at(tl.program_id(0), M, P, BLOCK_M, BLOCK_P, GROUP)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_P + tl.arange(0, BLOCK_P)
    n_active, _ = active_and_live(counts_ptr, r)
    sums = dropped_low_rank(
        left_ptr, right_ptr, bits_ptr, rows, column_block * BLOCK_P, M, P, r, WIDTH, n_active, keep_scale,
        BLOCK_M, BLOCK_P, PRECISION,
    )  # fmt: skip
    offsets = rows.to(tl.int64)[:, None] * P + columns[None, :]
    inside = (rows < M)[:, None] & (columns < P)[None, :]
    sums += tl.load(y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, sums.to(y_ptr.dtype.element_ty), mask=inside)


ROWS, COLUMNS, GROUP = 64, 128, 8


@functools.cache
def variant(kinds: Kinds) -> Variant:
    """`expand` in tiles of ROWS × COLUMNS."""
    x = pointer(kinds.x)
    types = {
        "y_ptr": x,
        "left_ptr": x,
        "right_ptr": x,
        "bits_ptr": "*i32",
        "counts_ptr": "*i32" if kinds.plan else None,
        "keep_scale": "fp32",
        **integers("M", "P", "r", "WIDTH"),
    }
    constants = {"BLOCK_M": ROWS, "BLOCK_P": COLUMNS, "GROUP": GROUP, "PRECISION": kinds.precision}
    own = ("y_ptr", "left_ptr", "bits_ptr", "WIDTH")
    return Variant(
        expand,
        types,
        constants,
        aligned=kinds.aligned_names(own, ("right_ptr", "P")),
        options=options(4 if kinds.aligned else 8, 2),
        label=kinds.label,
    )
