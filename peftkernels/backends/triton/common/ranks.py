"""Device code: which ranks a kernel walks, and how it reads and writes numbers that belong to ranks.

Kernels walk *places* of the plan's compact order: ACTIVE ranks first, then PROBE, then DEAD. Compact operands are
(rows, width) with a width of r rounded up to 16, zeros at every place that is not ACTIVE.
"""

import triton
import triton.language as tl

# Fewest ranks that a matrix instruction takes: compact operands are padded to multiples of it.
PLACES = 16


def width(r: int) -> int:
    """Columns of a compact operand."""
    return -(-r // PLACES) * PLACES


def block_of_places(r: int, most: int) -> int:
    """Places that one program holds: a power of two, `most` at most; more ranks take several programs."""
    return min(most, triton.next_power_of_2(max(r, PLACES)))


@triton.jit
def widened(values):
    """Elements of x or G as an operand of products with a rank: float32 where they are float16."""
    if values.dtype == tl.float16:
        values = values.to(tl.float32)
    return values


@triton.jit
def as_operand(values, x_type: tl.constexpr):
    """Factors, S or H as an operand of products beside x: in its dtype, or in float32 where that is float16.

    Such products are taken in TF32, which has float16's mantissa with float32's range. The instructions cut what TF32
    does not hold; rounded here, the operands are as near as float16 would be.
    """
    if x_type == tl.float16:
        values = values.to(tl.float32)
        bits = values.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        values = tl.where(tl.abs(values) < float("inf"), rounded, values)
    else:
        values = values.to(x_type)
    return values


@triton.jit
def at_most(values, most):
    """int32 values from 0 to most; what lies outside, negative values too, becomes most, by a single instruction."""
    return tl.minimum(values.to(tl.uint32), most.to(tl.uint32)).to(tl.int32)


@triton.jit
def active_and_live(counts_ptr, r):
    """How many ranks are ACTIVE and how many are not DEAD: all r of them without a plan, never more.

    The host does not read a plan on the device, so that what is written there is kept to ranks that there are.
    """
    n_active = r
    n_live = r
    if counts_ptr is not None:
        n_live = at_most(tl.load(counts_ptr + 1), r)
        n_active = at_most(tl.load(counts_ptr), n_live)
    return n_active, n_live


@triton.jit
def rank_at(order_ptr, places, r):
    """The rank at each place; rank 0 stands for places beyond r, whose values the caller masks."""
    ranks = places
    if order_ptr is not None:
        ranks = tl.load(order_ptr + places, mask=places < r, other=0)
        ranks = at_most(ranks, r - 1)
    return ranks


@triton.jit
def scaled_gate(gate_ptr, scaling_ptr, scaling, ranks, places, n_active):
    """scaling·ĝ in fp32: the gate times the scaling at ACTIVE places, 0 elsewhere."""
    scale = scaling
    if scaling_ptr is not None:
        scale = tl.load(scaling_ptr).to(tl.float32)
    factor = tl.where(places < n_active, scale, 0.0)
    if gate_ptr is not None:
        factor = tl.load(gate_ptr + ranks, mask=places < n_active, other=0.0).to(tl.float32) * scale
    return factor


@triton.jit
def store_by_rank(
    values, shrink_ptr, left_ptr, order_ptr, gate_ptr, scaling_ptr, scaling, rows, places, M, r, WIDTH, n_active, n_live
):
    """Write S or H (fp32, rows × places) as they are saved, and as the next product takes them.

    What shrink_ptr points to, (M, r), is in the order of the factors, with zeros for DEAD ranks; what left_ptr points
    to, (M, WIDTH), is compact and times scaling·ĝ: a place that is not ACTIVE holds 0 whatever its value was.
    """
    ranks = rank_at(order_ptr, places, r)
    wide = rows.to(tl.int64)
    if shrink_ptr is not None:
        inside = (rows < M)[:, None] & (places < r)[None, :]
        kept = tl.where((places < n_live)[None, :], values, 0.0)
        tl.store(shrink_ptr + wide[:, None] * r + ranks[None, :], kept.to(shrink_ptr.dtype.element_ty), mask=inside)
    if left_ptr is not None:
        factor = scaled_gate(gate_ptr, scaling_ptr, scaling, ranks, places, n_active)
        gated = tl.where((places < n_active)[None, :], values * factor[None, :], 0.0)
        inside = (rows < M)[:, None] & (places < WIDTH)[None, :]
        tl.store(left_ptr + wide[:, None] * WIDTH + places[None, :], gated.to(left_ptr.dtype.element_ty), mask=inside)


@triton.jit
def pack_columns(block, b_ptr, right_ptr, order_ptr, counts_ptr, N, r, WIDTH, BLOCK_N: tl.constexpr):
    """Write ACTIVE columns of B (N, r) side by side, right (N, WIDTH), zeros behind them."""
    n_active, _ = active_and_live(counts_ptr, r)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    wide = columns.to(tl.int64)
    for first in range(0, WIDTH, 16):
        places = first + tl.arange(0, 16)
        ranks = rank_at(order_ptr, places, r)
        inside = (columns < N)[:, None]
        values = tl.load(
            b_ptr + wide[:, None] * r + ranks[None, :], mask=inside & (places < n_active)[None, :], other=0.0
        )
        tl.store(
            right_ptr + wide[:, None] * WIDTH + places[None, :], values.to(right_ptr.dtype.element_ty), mask=inside
        )


@triton.jit
def pack_rows(block, a_ptr, right_ptr, order_ptr, counts_ptr, K, r, WIDTH, BLOCK_K: tl.constexpr):
    """Write ACTIVE rows of A (r, K) one below the other, right (WIDTH, K), zeros below them."""
    n_active, _ = active_and_live(counts_ptr, r)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    for first in range(0, WIDTH, 16):
        places = first + tl.arange(0, 16)
        ranks = rank_at(order_ptr, places, r).to(tl.int64)
        inside = (columns < K)[None, :]
        values = tl.load(
            a_ptr + ranks[:, None] * K + columns[None, :], mask=inside & (places < n_active)[:, None], other=0.0
        )
        offsets = places.to(tl.int64)[:, None] * K + columns[None, :]
        tl.store(right_ptr + offsets, values.to(right_ptr.dtype.element_ty), mask=inside)
