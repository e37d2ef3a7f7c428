"""What the backward pass takes from one read of G (or of x): sums over rows for the factors, and H on the way.

    sums_s (C, WIDTH) = Σ over the rows of split s of inᵀ·left        in (M, C), left S (∂B, ∂gate) or gated H (∂A)
    slots_c (M, WIDTH) = in[:, tile c] · B[tile c]                     the parts of H = G·B

∂gate needs no product of its own: Σ_t S_ti·H_ti = Σ_n B_ni·(Gᵀ·S)_ni. So a PROBE rank costs S and Gᵀ·S, an ACTIVE one
H besides. The parts lie in slots that `finish` adds in order.
"""

import functools

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from peftkernels.backends.triton.common.dropout import factor_from_bits
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, integers, options, pointer
from peftkernels.backends.triton.common.products import right_tile
from peftkernels.backends.triton.common.ranks import active_and_live, as_operand, rank_at, widened
from peftkernels.backends.triton.common.tiles import Blocks


@triton.jit
def left_tile(left_ptr, order_ptr, rows, places, M, r, WIDTH, n_live, COMPACT: tl.constexpr):
    """left (rows, places): compact, or S (M, r) as it was saved, whose live columns are gathered."""
    wide = rows.to(tl.int64)
    inside = (rows < M)[:, None]
    if COMPACT:
        left = tl.load(
            left_ptr + wide[:, None] * WIDTH + places[None, :], mask=inside & (places < WIDTH)[None, :], other=0.0
        )
    else:
        ranks = rank_at(order_ptr, places, r)
        live = inside & (places < n_live)[None, :]
        left = tl.load(left_ptr + wide[:, None] * r + ranks[None, :], mask=live, other=0.0)
    return left


@triton.jit
def column_products(
    in_ptr, left_ptr, b_ptr, bits_ptr, order_ptr, counts_ptr, sums_ptr, slots_ptr,
    keep_scale, M, C, r, WIDTH, stride_in, splits, rows_of_split,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, COMPACT: tl.constexpr,
    PRECISION: tl.constexpr, DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """Programs: column tiles × splits of the rows × blocks of places. bits given: in passes dropout.

    sums   fp32 (splits, C, WIDTH) or None; slots fp32 (column tiles, M, WIDTH) or None
    """
    if DEPENDENTS:
        # `finish_rows` may start, and the product after it: both wait before they read what is written here.
        gdc_launch_dependents()
    n_active, n_live = active_and_live(counts_ptr, r)
    place_blocks = tl.cdiv(WIDTH, BLOCK_R)
    program = tl.program_id(0)
    places = (program % place_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = (program // place_blocks) % splits
    tile = program // (place_blocks * splits)
    column = tile * BLOCK_C
    columns = column + tl.arange(0, BLOCK_C)
    first = split * rows_of_split
    end = tl.minimum(first + rows_of_split, M)
    # Where no rank of the block is live nobody reads the result.
    end = tl.where((program % place_blocks) * BLOCK_R < n_live, end, first)
    sums = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    if slots_ptr is not None:
        right = right_tile(b_ptr, order_ptr, columns, places, C, r, WIDTH, n_active, False, True)
        right = tl.trans(as_operand(right, in_ptr.dtype.element_ty))
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None] & (columns < C)[None, :]
        values = tl.load(in_ptr + rows.to(tl.int64)[:, None] * stride_in + columns[None, :], mask=inside, other=0.0)
        if bits_ptr is not None:
            factor = factor_from_bits(bits_ptr, rows, column, M, C, keep_scale, BLOCK_C)
            values = as_operand(values.to(tl.float32) * factor, in_ptr.dtype.element_ty)
        values = widened(values)
        if sums_ptr is not None:
            left = left_tile(left_ptr, order_ptr, rows, places, M, r, WIDTH, n_live, COMPACT)
            left = as_operand(left, in_ptr.dtype.element_ty)
            sums = tl.dot(tl.trans(values), left, sums, input_precision=PRECISION)
        if slots_ptr is not None:
            part = tl.dot(values, right, input_precision=PRECISION)
            offsets = (tile.to(tl.int64) * M + rows)[:, None] * WIDTH + places[None, :]
            tl.store(slots_ptr + offsets, part, mask=(rows < M)[:, None] & (places < WIDTH)[None, :])
    if sums_ptr is not None:
        offsets = (split.to(tl.int64) * C + columns)[:, None] * WIDTH + places[None, :]
        tl.store(sums_ptr + offsets, sums, mask=(columns < C)[:, None] & (places < WIDTH)[None, :])


@functools.cache
def variant(kinds: Kinds, blocks: Blocks, block_of_places: int, compact: bool, sums: bool, slots: bool) -> Variant:
    """For ∂A (compact) or for ∂B, ∂gate (sums) and H (slots); kinds.dropout is heeded for ∂A alone."""
    x = pointer(kinds.x)
    types = {
        "in_ptr": x,
        "left_ptr": pointer(kinds.rank) if sums else None,
        "b_ptr": pointer(kinds.factor) if slots else None,
        "bits_ptr": "*i32" if kinds.dropout and compact else None,
        "order_ptr": "*i32" if kinds.plan else None,
        "counts_ptr": "*i32" if kinds.plan else None,
        "sums_ptr": "*fp32" if sums else None,
        "slots_ptr": "*fp32" if slots else None,
        "keep_scale": "fp32",
        **integers("M", "C", "r", "WIDTH", "stride_in", "splits", "rows_of_split"),
    }
    constants = {
        "BLOCK_M": blocks.column_rows,
        "BLOCK_C": blocks.column_columns,
        "BLOCK_R": block_of_places,
        "COMPACT": compact,
        "PRECISION": kinds.rank_precision,
        "DEPENDENTS": kinds.pdl and slots,
    }
    own = ("bits_ptr", "sums_ptr", "slots_ptr", "WIDTH", "rows_of_split")
    return Variant(
        column_products,
        types,
        constants,
        aligned=kinds.aligned_names(own, ("in_ptr", "left_ptr", "b_ptr", "C", "stride_in")),
        options=options(8, 2),
        label=f"{kinds.label} r{block_of_places}{' compact' * compact}{' sums' * sums}{' slots' * slots}",
    )
