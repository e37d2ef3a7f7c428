"""Device code: S = drop(x)·Aᵀ for some rows and some places, as three kernels take it."""

import triton
import triton.language as tl

from peftkernels.backends.triton.common.dropout import dropout_factor
from peftkernels.backends.triton.common.ranks import as_operand, rank_at, widened


@triton.jit
def shrink_rows(
    x_ptr, a_ptr, order_ptr, seed_ptr, rows, places, first, end, M, K, r, stride_x, least, keep_scale, n_live,
    BLOCK_K: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ over columns first … end of drop(x)·Aᵀ for some rows of x and some places, in fp32."""
    ranks = rank_at(order_ptr, places, r).to(tl.int64)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_x
    a_rows = a_ptr + ranks[None, :] * K
    sums = tl.zeros((rows.shape[0], places.shape[0]), tl.float32)
    for start in range(first, end, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + columns[None, :], mask=(rows < M)[:, None] & (columns < K)[None, :], other=0.0)
        if seed_ptr is not None:
            factor = dropout_factor(seed_ptr, rows, start, K, least, keep_scale, BLOCK_K, WHOLE_BLOCKS)
            x = as_operand(x.to(tl.float32) * factor, x_ptr.dtype.element_ty)
        a = tl.load(a_rows + columns[:, None], mask=(columns < K)[:, None] & (places < n_live)[None, :], other=0.0)
        sums = tl.dot(widened(x), as_operand(a, x_ptr.dtype.element_ty), sums, input_precision=PRECISION)
    return sums
