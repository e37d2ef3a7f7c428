"""Device code that the GEMM kernels share: which tile a program takes, its main loop, its low-rank tail.

    out (M, OUT) = in (M, DEPTH) · Wop (DEPTH, OUT)  +  left (M, WIDTH) · right

forward (TRANSPOSED False): OUT is N, DEPTH is K, Wop = Wᵀ, W (N, K) as it lies, right (N, WIDTH) holds ACTIVE columns
of B; backward (TRANSPOSED True): OUT is K, DEPTH is N, Wop = W, right (WIDTH, K) holds ACTIVE rows of A.
"""

import triton
import triton.language as tl

from peftkernels.backends.triton.common.dropout import factor_from_bits
from peftkernels.backends.triton.common.ranks import as_operand, rank_at


@triton.jit
def out_and_depth(N, K, TRANSPOSED: tl.constexpr):
    """OUT and DEPTH of a direction."""
    if TRANSPOSED:
        out = K
        depth = N
    else:
        out = N
        depth = K
    return out, depth


@triton.jit
def tile_at(number, M, OUT, BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr, GROUP: tl.constexpr):
    """Row and column block of a tile: groups of GROUP row blocks go through all columns together, for the L2."""
    row_blocks = tl.cdiv(M, BLOCK_M)
    column_blocks = tl.cdiv(OUT, BLOCK_OUT)
    group = number // (GROUP * column_blocks)
    first = group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    within = number % (GROUP * column_blocks)
    return first + within % size, within // size


@triton.jit
def add_frozen(
    sums, in_ptr, w_ptr, rows, columns, M, OUT, DEPTH, stride_in,
    TRANSPOSED: tl.constexpr, BLOCK_DEPTH: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + in·Wop for a tile, through pointers. EVEN: DEPTH is a multiple of BLOCK_DEPTH."""
    wide_rows = rows.to(tl.int64)
    wide_columns = columns.to(tl.int64)
    for start in range(0, DEPTH, BLOCK_DEPTH):
        depth = start + tl.arange(0, BLOCK_DEPTH)
        row_mask = (rows < M)[:, None]
        column_mask = (columns < OUT)[None, :]
        if not EVEN:
            row_mask = row_mask & (depth < DEPTH)[None, :]
            column_mask = column_mask & (depth < DEPTH)[:, None]
        values = tl.load(in_ptr + wide_rows[:, None] * stride_in + depth[None, :], mask=row_mask, other=0.0)
        if TRANSPOSED:
            w = tl.load(w_ptr + depth.to(tl.int64)[:, None] * OUT + columns[None, :], mask=column_mask, other=0.0)
        else:
            w = tl.load(w_ptr + wide_columns[None, :] * DEPTH + depth[:, None], mask=column_mask, other=0.0)
        sums = tl.dot(values, w, sums, input_precision=PRECISION)
    return sums


@triton.jit
def add_frozen_tma(sums, in_desc, w_desc, row, column, DEPTH, TRANSPOSED: tl.constexpr, BLOCK_DEPTH: tl.constexpr):
    """sums + in·Wop for the tile at (row, column), through the tensor memory accelerator."""
    for start in range(0, DEPTH, BLOCK_DEPTH):
        values = in_desc.load([row, start])
        if TRANSPOSED:
            sums = tl.dot(values, w_desc.load([start, column]), sums)
        else:
            sums = tl.dot(values, w_desc.load([column, start]).T, sums)
    return sums


@triton.jit
def add_low_rank(
    sums, left_ptr, right_ptr, order_ptr, rows, columns, M, OUT, r, WIDTH, n_active,
    x_type: tl.constexpr, TRANSPOSED: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + left·right over the ACTIVE places, sixteen a step, left from memory."""
    row_mask = (rows < M)[:, None]
    for first in range(0, n_active, 16):
        places = first + tl.arange(0, 16)
        left = tl.load(left_ptr + rows.to(tl.int64)[:, None] * WIDTH + places[None, :], mask=row_mask, other=0.0)
        right = right_tile(right_ptr, order_ptr, columns, places, OUT, r, WIDTH, n_active, TRANSPOSED, GATHER)
        sums = tl.dot(as_operand(left, x_type), as_operand(right, x_type), sums, input_precision=PRECISION)
    return sums


@triton.jit
def right_tile(
    right_ptr, order_ptr, columns, places, OUT, r, WIDTH, n_active, TRANSPOSED: tl.constexpr, GATHER: tl.constexpr
):
    """right at some places and columns, (places, columns).

    GATHER: right is B (N, r) itself in its own dtype, whose ACTIVE columns are picked. Otherwise it is compact.
    """
    inside = (columns < OUT)[None, :]
    wide = columns.to(tl.int64)
    if GATHER:
        ranks = rank_at(order_ptr, places, r)
        active = inside & (places < n_active)[:, None]
        right = tl.load(right_ptr + wide[None, :] * r + ranks[:, None], mask=active, other=0.0)
    elif TRANSPOSED:
        right = tl.load(right_ptr + places.to(tl.int64)[:, None] * OUT + columns[None, :], mask=inside, other=0.0)
    else:
        right = tl.load(right_ptr + wide[None, :] * WIDTH + places[:, None], mask=inside, other=0.0)
    return right


@triton.jit
def dropped_low_rank(
    left_ptr, right_ptr, bits_ptr, rows, column, M, K, r, WIDTH, n_active, keep_scale,
    x_type: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """drop'(left·right) for the backward pass's tile of ∂x (M, K).

    It comes before the main loop, whose sums then start from it: the mask concerns the adapter's share alone, and a
    second set of sums would not fit the registers.
    """
    columns = column + tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    sums = add_low_rank(
        sums, left_ptr, right_ptr, None, rows, columns, M, K, r, WIDTH, n_active, x_type, True, False, PRECISION
    )
    return sums * factor_from_bits(bits_ptr, rows, column, M, K, keep_scale, BLOCK_K)


@triton.jit
def add_bias(sums, bias_ptr, columns, OUT):
    """sums + bias, where there is one."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < OUT, other=0.0)
        sums += bias.to(tl.float32)[None, :]
    return sums


@triton.jit
def store_tile(sums, out_ptr, rows, columns, M, OUT):
    """Round the sums once and write them to out (M, OUT)."""
    offsets = rows.to(tl.int64)[:, None] * OUT + columns[None, :]
    inside = (rows < M)[:, None] & (columns < OUT)[None, :]
    tl.store(out_ptr + offsets, sums.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_tile_tma(sums, out_desc, row, column, BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """The same through the tensor memory accelerator, half the columns at a time: that takes half the shared memory."""
    halves = tl.permute(tl.reshape(sums, (BLOCK_M, 2, BLOCK_OUT // 2)), (0, 2, 1))
    left, right = tl.split(halves)
    out_desc.store([row, column], left.to(out_desc.dtype))
    out_desc.store([row, column + BLOCK_OUT // 2], right.to(out_desc.dtype))
